"""Operands of asynchronous products: whether a compiled loop overwrites what may still be read.

Newer tensor cores (sm_90's `wgmma`, sm_100's `tcgen05`) read their operands from memory of the
program after the instruction that starts them, until something has waited for them. The software
pipeline copies operands ahead, into the buffers of a ring: one is taken from the start of its copy
until the product that reads it is known to be finished. If a copy is started D steps before its
product, and a wait leaves P products running (`pendings`), then when the next copy begins after a
wait,

    P products run, D - 1 copies are under way or done, and one begins: it takes D + P buffers,

and one more if the copy comes before the wait of its step. Triton (3.4 to 3.9) forgets the P for a
load that something else reads too, a sum for instance (triton#6691, #7110, #8554): the copy
overwrites, now and then, what is being multiplied.

Nothing of this is assumed. The loop of the TTGIR, Triton's last text before it assigns registers,
is walked through until its pipeline is full, and what is taken is counted. Indices are not
computed: steps use the buffers of a ring in turn.

What no loop writes, as weights that stay, is not overwritten, however often it is read.

On sm_90 the first operand may also come from registers. Those have no ring: whether they are set
anew too early is for ptxas to see, and before CUDA 13.3 it does not always (triton#9433, #11781).
So an asynchronous product may have an operand there only if it is awaited in the same turn of the
loop, by a wait that hands the operand on. (LLVM may hand on halves of its registers; a test reads
the machine code of `conv_march`, the one kernel that has such an operand.)
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

_TURNS = 16
"""Of a loop: more than any pipeline has steps under way."""

_OPERATION = re.compile(r"(?:(%[\w$.-]+)(?::\d+)? = )?(\w+\.\w+)(.*)")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_WRITES = re.compile(
    r"async_copy_global_to_local|async_tma_(copy_global_to_local|gather)|(local|tmem)_store"
)


class Shortage(NamedTuple):
    """An operand that is overwritten while it may still be read."""

    operand: str  # its name in the kernel, or nearly
    buffers: int | None  # None: it is in registers
    needed: int

    def __str__(self) -> str:
        if self.buffers is None:
            return f"operand {self.operand} is in registers, which may change while they are read"
        few = f"{self.buffers} buffer{'s' * (self.buffers != 1)}"
        return f"operand {self.operand} has {few}, and its asynchronous product needs {self.needed}"


def shortages(ttgir: str) -> list[Shortage]:
    """List operands of asynchronous products that may be overwritten, from a kernel's TTGIR: those
    that have too few buffers, or are in registers.

    Raises
    ------
    ValueError
        If the loops cannot be followed, so that nothing can be said.
    """
    if not re.search(r"ttng\.(warp_group_dot|tc_gen5_mma)", ttgir):
        return []
    walk = walked(ttgir)
    return [
        *(Shortage(name, None, 1) for name in sorted(walk.registers)),
        *(
            Shortage(name, walk.buffers.get(name, 1), walk.needed[name])
            for name in sorted(walk.operands)
            if walk.needed[name] > walk.buffers.get(name, 1)
        ),
    ]


def walked(ttgir: str) -> "_Walk":
    """Follow a kernel's TTGIR from its first line to its last."""
    lines = [line.partition(" loc(")[0].strip() for line in ttgir.splitlines()]
    lines = [line for line in lines if not line.startswith("#")]
    first = _Walk(None)
    first.through(lines)
    walk = _Walk(first.renewed)
    walk.through(lines)
    return walk


class _Walk:
    """A count of the buffers in use of each allocation, as the lines of a kernel are followed.

    A place is a buffer as it was addressed once: the allocation, the value that addresses it, and
    the turn of the loop in which it did. `renewed` are allocations that a loop writes, by a walk
    before; without it, what is finished is not counted.
    """

    def __init__(self, renewed: set[str] | None) -> None:
        self.renewed: set[str] = set() if renewed is None else renewed
        self._is_first = renewed is None
        self.places: dict[str, tuple[str, str, int]] = {}  # of values that are memory
        self.buffers: dict[str, int] = {}  # of allocations that are rings
        self.operands: set[str] = set()
        self.registers: set[str] = set()  # operands that are no memory
        self.needed: Counter[str] = Counter()
        self._written: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        # places, the barrier, and an operand in registers, or ""
        self._running: list[tuple[set[tuple[str, str, int]], str, str]] = []
        self._turn = 0
        self._depth = 0

    def through(self, lines: list[str]) -> None:
        """Follow these lines; of a condition, both branches, the first one first."""
        at = 0
        while at < len(lines):
            if " = scf.for " in lines[at]:
                end = _end(lines, at)
                self._loop(lines[at], lines[at + 1 : end])
                at = end
            elif found := _OPERATION.match(lines[at]):
                self._operation(found[1], found[2].partition(".")[2], found[3])
            at += 1

    def _loop(self, head: str, body: list[str]) -> None:
        _, _, rest = head.partition("iter_args(")
        carried = _VALUE.findall(rest.partition(") -> ")[0])
        names, given = carried[::2], carried[1::2]
        outside = self.places
        self._depth += 1
        for _ in range(_TURNS):
            self._turn += 1
            found = [self.places.get(value) for value in given]
            inner = {k: v for k, v in zip(names, found, strict=True) if v}
            self.places = {**outside, **inner}  # names of one turn, or loop, are not the next one's
            self.through(body)
            given = _VALUE.findall(body[-1].partition(" : ")[0]) if names else []
            self.registers |= {register for *_, register in self._running if register}
        self._depth -= 1
        self._turn += 1
        result, inside = head.partition(":")[0], self.places
        left = {f"{result}#{n}": inside[value] for n, value in enumerate(given) if value in inside}
        self.places = {**outside, **left}

    def _operation(self, result: str, name: str, rest: str) -> None:
        values, _, types = rest.partition(" : ")
        given = _VALUE.findall(values)
        memory = [self.places[value] for value in given if value in self.places]
        if name in ("local_alloc", "tmem_alloc"):
            self.places[result] = (result, result, self._turn)
            if given:
                self._write(result)
        elif name.startswith("memdesc_") and memory:
            self.places[result] = memory[0]
            old, new = (one.split("x") for one in re.findall(r"memdesc<(\d+(?:x\d+)*)", types))
            if name in ("memdesc_index", "memdesc_subview") and len(old) > len(new):
                self.places[result] = (memory[0][0], result, self._turn)
                self.buffers[memory[0][0]] = int(old[0])
        elif _WRITES.fullmatch(name) and memory:
            self._write(memory[0][0])
        elif name in ("warp_group_dot", "tc_gen5_mma"):
            self._start(given, rest)
        elif name == "warp_group_dot_wait":
            (pendings,) = re.findall(r"pendings = (\d+)", rest)
            self._finish(len(self._running) - int(pendings), given)
        elif name == "wait_barrier" and memory:
            ours = [n for n, (_, bar, _) in enumerate(self._running) if bar == memory[0][0]]
            self._finish(ours[0] + 1 if ours else 0, ())

    def _write(self, allocation: str) -> None:
        self._written[allocation] += 1
        if self._is_first and self._depth:
            self.renewed.add(allocation)
        taken = self._written[allocation] - self._finished[allocation]
        self.needed[allocation] = max(self.needed[allocation], taken)

    def _start(self, given: list[str], rest: str) -> None:
        read = {self.places[value] for value in given[:2] if value in self.places}
        barriers = [self.places[value][0] for value in given[3:] if value in self.places]
        barrier = barriers[0] if barriers else ""
        in_registers = rest.rpartition(" : ")[2].startswith("tensor")
        if barrier or re.search(r"isAsync = true|is_async", rest):
            self._running.append((read, barrier, given[0] if in_registers else ""))
            self.operands |= {allocation for allocation, *_ in read}
        else:
            self._running.append((read, barrier, ""))
            self._finish(len(self._running), ())

    def _finish(self, count: int, handed_on: Sequence[str]) -> None:
        """Finish the `count` oldest running products; what others read too is not free yet."""
        done, self._running = self._running[: max(count, 0)], self._running[max(count, 0) :]
        self.registers |= {one for *_, one in done if one and one not in handed_on}
        if self._is_first:
            return
        busy: set[Any] = set().union(*(read for read, *_ in self._running))
        free = set().union(*(read for read, *_ in done)) - busy
        kept = {one for one, *_ in free if self._written[one]} - self.renewed
        free = {place for place in free if place[0] not in kept}
        self._finished.update(allocation for allocation, *_ in free)
        for allocation, *_ in free:  # or nothing could be told
            if self._finished[allocation] > self._written[allocation]:
                raise ValueError(f"{allocation} is read more often than it is written")


def _end(lines: list[str], start: int) -> int:
    """Find the line that closes what is opened at `start`."""
    depth = 0
    for n in range(start, len(lines)):
        depth += lines[n].endswith("{") - lines[n].startswith("}")
        if n > start and depth <= 0:
            return n
    raise ValueError(f"the loop of line {start} does not end: {lines[start][:80]}")
