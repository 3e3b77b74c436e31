"""Runs a kernel: many CTAs at once, each instruction for all threads that are there.

Threads that part wait for each other: of the threads that can go on, those run that are furthest
behind in the code. Registers are arrays over the threads of all CTAs of a batch.
"""

import itertools
from typing import Any

import numpy as np

from ptxsim import emitter
from ptxsim.ampere import Ampere
from ptxsim.hopper import Hopper
from ptxsim.memory import Global, Shared, SimulationError, Threads, merged
from ptxsim.parse import Reg
from ptxsim.program import Program, all_of

Array = np.ndarray


class Launch:
    """One launch of a program: its arguments and the memory that it may touch."""

    def __init__(
        self, program: Program, grid: tuple[int, int, int], threads: int, arguments: dict[str, Any],
        memory: Global, shared: int, races: bool = True, lanes: int = 8192, factors: bool = False,
        copies: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.threads, self.memory = program, threads, memory
        self.arguments = arguments
        self.sizes = grid
        self.grid = [np.array([n], np.uint32) for n in grid]
        self.ntid = np.array([threads], np.uint32)
        self.zero, self.one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        self.shared_size = max(shared, program.kernel.static_size)
        self.races, self.factors, self.copies = races, factors, copies
        self.batch_size = max(1, lanes // threads)
        self.instructions = 0  # CTA-instructions
        self.addresses = {name: 0x1000 + 128 * k for k, name in enumerate(arguments)}
        self.objects = {  # tensor maps, by address
            self.addresses[name]: value
            for name, value in arguments.items() if not isinstance(value, bytes)
        }  # fmt: skip

    def run(self) -> None:
        count = self.sizes[0] * self.sizes[1] * self.sizes[2]
        with np.errstate(all="ignore"):
            for start in range(0, count, self.batch_size):
                numbers = np.arange(start, min(start + self.batch_size, count))
                Batch(self, numbers).run()


class Batch(Ampere, Hopper):
    """Some CTAs of a launch, which run at the same time. What blocks of code call is here."""

    def __init__(self, launch: Launch, numbers: Array) -> None:
        self.launch, self.threads = launch, launch.threads
        x, y, _ = launch.sizes
        self.ids = np.stack([numbers % x, numbers // x % y, numbers // x // y], 1)
        n, ctas = launch.threads, len(numbers)
        self.count, self.ctas = n * ctas, ctas
        self.numbers = np.arange(self.count)
        self.tid = np.tile(np.arange(n, dtype=np.uint32), ctas)
        self.cta = np.repeat(np.arange(ctas), n)
        self.warp = (self.tid // 32).astype(np.int64)
        self.shared = Shared(ctas, launch.shared_size, launch.races, launch.program.granule,
                             launch.program.has_groups)  # fmt: skip
        self.base = self.cta * self.shared.stride
        self.epoch = np.zeros(ctas, np.int64)
        self.grid, self.ntid = launch.grid, launch.ntid
        self.zero, self.one = launch.zero, launch.one
        self.registers: dict[Reg, Array] = {}
        self.copies: list[Any] = []  # under way: (threads, group of each, where, data)
        self.group = np.zeros(self.count, np.int64)
        self.products: list[Any] = []  # of warp groups, under way: (thread, group, words)
        self.factors: list[Any] = []  # registers that they read: (thread, group, names)
        self.product_group = np.zeros(self.count, np.int64)
        self.time = itertools.count(1)
        self.fragments: dict[Any, Any] = {}
        self.barriers: dict[Any, Any] = {}
        self.stalled = np.zeros(self.count, bool)

    # the scheduler

    def run(self) -> None:
        program = self.launch.program
        blocks, last = program.kernel.blocks, len(program.kernel.blocks)
        together, at = Threads(self, None), 0
        pc = np.zeros(self.count, np.int64)
        waiting = np.full(self.count, -1, np.int64)
        apart = False
        while True:
            if apart:
                ready = (waiting < 0) & (pc < last) & ~self.stalled
                if not ready.any():
                    if (pc >= last).all():
                        return
                    self._stuck(pc, waiting, blocks)
                at, index = self._choose(program, pc, ready)
                if len(index) == self.count:
                    apart = False
            elif at >= last:
                return
            t = Threads(self, index) if apart else together
            jump = self._execute(program, at, t)
            block = blocks[at]
            end = block.end
            first = end.words[0] if end is not None else ""
            if first in ("bra", "ret", "exit", "trap"):
                target = block.target if first == "bra" else last
                if first == "trap":
                    raise SimulationError(f"{t.say(0)} runs into {end.text!r} ({end.place})")
                if jump is None or jump.all():
                    to: Any = target
                elif not jump.any():
                    to = at + 1
                else:
                    to = np.where(jump, target, at + 1)
            elif first == "mbarrier":
                to = at + 1
                stalled = jump
                if stalled.any():
                    to = np.where(stalled, at, at + 1)
                    self.stalled[t.every[stalled]] = True
            else:
                to = at + 1
            if first in ("bar", "barrier") and "arrive" not in end.words:
                if not apart and jump is None:
                    self.epoch += 1
                else:
                    apart = self._spread(apart, pc, at)
                    waiting[t.every] = int(jump[0][0]) if jump else 0
                    pc[t.every] = to
                    self._release(waiting, pc, last, jump)
                    continue
            elif first in ("bar", "barrier"):
                raise SimulationError(f"{end.text!r} is not supported ({end.place})")
            if apart:
                pc[t.every] = to
                if first in ("ret", "exit"):
                    self._release(waiting, pc, last, None)
            elif isinstance(to, np.ndarray):
                apart, pc = True, to.copy()
            else:
                at = to

    def _choose(self, program: Program, pc: Array, ready: Array) -> tuple[int, Array]:
        """The block that runs next, and its threads: those furthest behind.

        An instruction for whole warps waits for all threads of a warp that have not ended.
        """
        last = len(program.kernel.blocks)
        for at in np.unique(pc[ready]):
            here = pc == at
            if program.collective[at]:
                alive = (pc < last).reshape(-1, 32).sum(1)
                here = here.reshape(-1, 32) & (here.reshape(-1, 32).sum(1) == alive)[:, None]
                here = here.reshape(-1)
            index = (ready & here).nonzero()[0]
            if len(index):
                return int(at), index
        raise SimulationError("threads of a warp wait for each other at different instructions")

    def _spread(self, apart: bool, pc: Array, at: int) -> bool:
        if not apart:
            pc[:] = at
        return True

    def _release(self, waiting: Array, pc: Array, last: int, told: Any) -> None:
        """Let go on whoever waits at a barrier that is complete."""
        by_cta = waiting.reshape(self.ctas, -1)
        alive = (pc.reshape(self.ctas, -1) < last).sum(1)
        for number in np.unique(waiting[waiting >= 0]):
            here = (by_cta == number).sum(1)
            whole = here == alive
            full = here == (int(told[1][0]) if told is not None and len(told) > 1
                            and int(told[0][0]) == number else alive)  # fmt: skip
            for cta in (full & (here > 0)).nonzero()[0]:
                by_cta[cta][by_cta[cta] == number] = -1
                self.stalled.reshape(self.ctas, -1)[cta] = False
                if whole[cta]:
                    self.epoch[cta] += 1

    def _execute(self, program: Program, at: int, t: Threads) -> Any:
        function, takes, leaves = program.block(at)
        values = self.registers
        whole = t.index is None
        inputs = []
        for reg in takes:
            value = values.get(reg)
            if value is None:
                value = values[reg] = _poison(reg)
            inputs.append(value if whole or len(value) == 1 else value[t.index])
        outputs, jump = function(self, t, *inputs)
        self.fragments.clear()
        if whole:
            values.update(zip(leaves, outputs, strict=True))
        else:
            for reg, value in zip(leaves, outputs, strict=True):
                values[reg] = merged(values.get(reg, _poison(reg)), t.index, value, self.count)
        self.launch.instructions += (len(program.kernel.blocks[at].body) + 1) * (t.n / self.threads)
        return jump

    def _stuck(self, pc: Array, waiting: Array, blocks: Any) -> None:
        told = []
        for k in range(0, self.count, 32):
            if pc[k] < len(blocks):
                block = blocks[min(pc[k], len(blocks) - 1)]
                what = all_of(block)[0]
                why = f"barrier {waiting[k]}, before" if waiting[k] >= 0 else "stalled at"
                told.append(f"CTA {tuple(self.ids[k // self.threads].tolist())} warp "
                            f"{self.warp[k]}: {why} {what.text!r} ({what.place})")  # fmt: skip
        raise SimulationError("deadlock: nobody can go on\n  " + "\n  ".join(told[:16]))


def _poison(reg: Reg) -> Array:
    """What a register holds that nobody has set."""
    return np.ones(1, bool) if reg.bits == 1 else ~np.zeros(1, emitter.DTYPES["u", reg.bits])
