"""Turns a block of PTX into a Python function on NumPy arrays, one element per thread.

A register is a variable; a value that all threads share is an array of one element. Bits are
uint16, uint32 or uint64, predicates bool; a suffix names another view of the same bits: `r5_f` is
the float of `r5`, `r5_s` the signed integer. Each opcode has a function here that writes lines of
code; what needs memory or other threads calls the machine `m` with the threads `t`.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import numerics
from ptxsim.parse import Block, Imm, Ins, Kernel, Mem, Pair, Reg, Sym, UnsupportedError, Vec

DTYPES = {
    ("p", 1): np.bool_, ("u", 16): np.uint16, ("u", 32): np.uint32, ("u", 64): np.uint64,
    ("s", 16): np.int16, ("s", 32): np.int32, ("s", 64): np.int64, ("f", 16): np.float16,
    ("f", 32): np.float32, ("f", 64): np.float64, ("u", 8): np.uint8, ("s", 8): np.int8,
}  # fmt: skip
_TYPE = re.compile(r"(b|u|s|f)(8|16|32|64)$")
SPECIAL = {
    "%tid.x": "t.tid", "%laneid": "t.lane", "%warpid": "(t.tid >> N.u4(5))",
    "%ntid.x": "m.ntid", "%nctaid.x": "m.grid[0]", "%nctaid.y": "m.grid[1]",
    "%nctaid.z": "m.grid[2]", "%ctaid.x": "m.ctaid(t, 0)", "%ctaid.y": "m.ctaid(t, 1)",
    "%ctaid.z": "m.ctaid(t, 2)", "%cluster_ctarank": "m.zero", "%cluster_ctaid.x": "m.zero",
    "%cluster_nctaid.x": "m.one", "%tid.y": "m.zero", "%tid.z": "m.zero", "%ntid.y": "m.one",
    "%ntid.z": "m.one", "%smid": "m.zero", "%clock": "m.clock()", "%clock64": "m.clock64()",
    "%globaltimer": "m.clock64()",
}  # fmt: skip

_OPS: dict[str, Callable[["Emitter", Ins], None]] = {}


def op(*names: str) -> Callable[[Any], Any]:
    """The function emits these opcodes, whose names begin so."""

    def register(function: Any) -> Any:
        _OPS.update(dict.fromkeys(names, function))
        return function

    return register


def find(opcode: str) -> Callable[["Emitter", Ins], None] | None:
    words = opcode.split(".")
    for n in range(len(words), 0, -1):
        if (found := _OPS.get(".".join(words[:n]))) is not None:
            return found
    return None


def kind_of(ins: Ins, word: str | None = None) -> tuple[str, int]:
    """The type that an opcode ends with, as kind and bits; "b" counts as unsigned."""
    word = word or ins.words[-1]
    found = _TYPE.match(word)
    if not found:
        raise UnsupportedError(f"type .{word} of {ins.text!r} ({ins.place})")
    return found[1].replace("b", "u"), int(found[2])


WITHOUT_RESULT = (
    "st", "red", "bra", "bar", "barrier", "ret", "exit", "cp", "fence", "membar", "stmatrix",
    "prefetch", "prefetchu", "trap", "griddepcontrol", "setmaxnreg", "nanosleep", "pmevent",
    "mbarrier.init", "mbarrier.inval", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
    "discard", "applypriority", "tensormap",
)  # fmt: skip


def registers(operand: Any) -> list[Reg]:
    """All registers of an operand."""
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Vec):
        return [reg for one in operand.items for reg in registers(one)]
    if isinstance(operand, Pair):
        return registers(operand.first) + registers(operand.second)
    if isinstance(operand, Mem):
        return registers(operand.base) + [r for one in operand.coordinates for r in registers(one)]
    return []


def writes(ins: Ins) -> list[Reg]:
    """What an instruction sets."""
    if ins.opcode.startswith(WITHOUT_RESULT) and any(
        ins.opcode == one or ins.opcode.startswith(one + ".") for one in WITHOUT_RESULT
    ):
        return []
    return registers(ins.operands[0]) if ins.operands else []


def reads(ins: Ins) -> list[Reg]:
    """What it needs; if it is guarded, also what it may leave as it was."""
    set_by = writes(ins)
    out = [reg for one in ins.operands[1 if set_by or _has_sink(ins) else 0 :]
           for reg in registers(one)]  # fmt: skip
    if ins.guard is not None:
        out += [ins.guard, *set_by]
    if ins.opcode.startswith("wgmma.mma_async"):
        out += set_by
    return out


def _has_sink(ins: Ins) -> bool:
    return bool(ins.operands) and ins.operands[0] is None


class Emitter:
    """Writes the function of one block."""

    def __init__(self, kernel: Kernel, scope: dict[str, Any], watched: frozenset[str]) -> None:
        self.kernel, self.scope, self.watched = kernel, scope, watched
        self.lines: list[str] = []
        self.have: dict[str, set[str]] = {}
        self.guard = ""
        self.guarded = False
        self.temporary = 0

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def fresh(self, expression: str) -> str:
        """A new variable with this value."""
        self.temporary += 1
        self.emit(f"x{self.temporary} = {expression}")
        return f"x{self.temporary}"

    def constant(self, value: Any, dtype: Any) -> str:
        """The name of a constant of one element."""
        array = np.array([value]).astype(dtype) if not isinstance(value, np.ndarray) else value
        key = f"k_{array.dtype.name}_{array.tobytes().hex()}"
        self.scope.setdefault(key, array)
        return key

    def object(self, prefix: str, value: Any) -> str:
        """The name of any object that the code refers to."""
        key = f"{prefix}{len(self.scope)}"
        self.scope[key] = value
        return key

    def get(self, x: Any, kind: str, bits: int = 0) -> str:
        """An expression for an operand, as this kind of number."""
        if isinstance(x, Imm):
            return self._immediate(x.text, kind, bits)
        if isinstance(x, Sym):
            return self._symbol(x.name, kind, bits)
        assert isinstance(x, Reg), x
        base = "p" if x.bits == 1 else "u"
        have = self.have.setdefault(x.name, {base})
        name = _variable(x.name)
        if kind not in have:
            if base == "p" or kind == "p":
                raise UnsupportedError(f"predicate {x.name} as a number, or a number as predicate")
            source = next(iter(have))
            dtype = np.dtype(DTYPES[kind, x.bits]).name
            self.emit(f"{name}_{kind} = {name}_{source}.view(np.{dtype})")
            have.add(kind)
        if bits and bits < x.bits and kind != "p":  # the low bits
            return f"{self.get(x, 'u')}.astype(np.{np.dtype(DTYPES[kind, bits]).name})"
        if bits > x.bits:
            raise UnsupportedError(f"{x.name} of {x.bits} bits as one of {bits}")
        return f"{name}_{kind}"

    def _immediate(self, text: str, kind: str, bits: int) -> str:
        if text[:2] in ("0f", "0F"):
            raw = np.array([int(text[2:], 16)], np.uint32)
        elif text[:2] in ("0d", "0D"):
            raw = np.array([int(text[2:], 16)], np.uint64)
        elif kind == "p":
            return self.constant(int(text, 0) != 0, np.bool_)
        elif "." in text:
            raw = np.array([float(text)], DTYPES["f", bits])
        else:
            value = int(text.rstrip("U"), 0) & ((1 << bits) - 1)
            raw = np.array([value], DTYPES["u", bits])
        return self.constant(raw.view(DTYPES[kind, bits]), None)

    def _symbol(self, name: str, kind: str, bits: int) -> str:
        if name in SPECIAL:
            value = SPECIAL[name]
            return self.fresh(f"{value}.view(np.int32)") if kind == "s" else value
        if name in self.kernel.static:
            return self.constant(self.kernel.static[name], DTYPES[kind, bits])
        if any(name == one.name for one in self.kernel.params):
            return f"m.param_address({name!r}, np.{np.dtype(DTYPES[kind, bits]).name})"
        raise UnsupportedError(f"symbol {name}")

    def put(self, x: Any, kind: str, expression: str) -> None:
        """Assign to a register; under a guard, for the threads where it holds."""
        if x is None:
            return
        assert isinstance(x, Reg), x
        if self.guard and not self.guarded:
            old = self.get(x, kind)
            expression = f"np.where({self.guard}, {expression}, {old})"
        self.emit(f"{_variable(x.name)}_{kind} = {expression}")
        self.have[x.name] = {kind}

    def address(self, x: Mem) -> str:
        bits = x.base.bits if isinstance(x.base, Reg) else 32
        base = self.get(x.base, "u", bits)
        return f"{base} + {self._immediate(str(x.offset), 'u', bits)}" if x.offset else base

    def vector(self, x: Any) -> list[Any]:
        return list(x.items) if isinstance(x, Vec) else [x]

    def call(self, ins: Ins, method: str, *args: str, out: Any = (), kind: str = "u") -> None:
        """Call the machine, which is told the guard and does what it says itself."""
        name = self.object("i", ins)
        call = f"m.{method}(t, {name}, {self.guard or None}{''.join(', ' + a for a in args)})"
        if not out:
            self.emit(call)
            return
        value = self.fresh(call)
        for k, reg in enumerate(out):
            if reg is not None:
                self.guarded = True
                self.put(reg, kind, f"{value}[{k}]")
                self.guarded = False

    def instruction(self, ins: Ins) -> None:
        function = find(ins.opcode)
        if function is None:
            raise UnsupportedError(f"opcode {ins.opcode} in {ins.text!r} ({ins.place})")
        self.guard = self.condition(ins)
        if names := tuple(reg.name for reg in writes(ins) if reg.name in self.watched):
            self.call(ins, "note_factors", repr(names))
        function(self, ins)
        self.guard = ""

    def condition(self, ins: Ins) -> str:
        if ins.guard is None:
            return ""
        value = self.get(ins.guard, "p")
        return self.fresh(f"~{value}") if ins.negated else value


def _variable(name: str) -> str:
    return "v" + re.sub(r"\W", "_", name)


def compile_block(
    kernel: Kernel, block: Block, live_in: list[Reg], live_out: list[Reg], watched: frozenset[str]
) -> Callable[..., Any]:
    """A function (m, t, *live_in) that returns the values of live_out, and of the jump's guard."""
    scope: dict[str, Any] = {"np": np, "N": numerics}
    e = Emitter(kernel, scope, watched)
    for reg in live_in:
        e.have[reg.name] = {"p" if reg.bits == 1 else "u"}
    for ins in block.body:
        e.instruction(ins)
    jump, out = "None", list(live_out)
    if block.end is not None:
        if find(block.end.opcode):  # a wait: it sets a predicate
            e.instruction(block.end)
            jump = f"~{e.get(block.end.operands[0], 'p')}"
        elif block.end.guard is not None:
            jump = e.condition(block.end)
        elif block.end.operands and block.end.words[0] in ("bar", "barrier"):
            known = [e.get(one, "u", 32) for one in block.end.operands]
            jump = f"({', '.join(known)},)"
    results = [e.get(reg, "p" if reg.bits == 1 else "u") for reg in out]
    names = [f"{_variable(r.name)}_{'p' if r.bits == 1 else 'u'}" for r in live_in]
    lines = [*e.lines, f"return ({', '.join(results)}{',' * bool(results)}), {jump}"]
    text = f"def block(m, t, {', '.join(names)}):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(text, f"<{kernel.name}, block {block.index}>", "exec"), scope)
    return scope["block"]
