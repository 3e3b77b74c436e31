"""Reads PTX text: a kernel's parameters, registers, and basic blocks of instructions."""

import re
from typing import NamedTuple


class UnsupportedError(NotImplementedError):
    """The PTX holds something that the simulator does not know; the message names it."""


class Reg(NamedTuple):
    name: str  # unique in the kernel, without "%"
    bits: int  # 1 for a predicate


class Imm(NamedTuple):
    text: str


class Sym(NamedTuple):
    """A symbol or a special register."""

    name: str


class Mem(NamedTuple):
    base: "Reg | Sym | Imm"
    offset: int
    coordinates: tuple = ()


class Vec(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    """Two predicates, as `setp` writes them."""

    first: "Reg | None"
    second: "Reg | None"


class Ins(NamedTuple):
    number: int
    opcode: str
    guard: "Reg | None"
    negated: bool
    operands: tuple
    text: str
    place: str  # line of the PTX, and of the source where it is known

    @property
    def words(self) -> list[str]:
        return self.opcode.split(".")


class Param(NamedTuple):
    name: str
    size: int  # bytes


class Block(NamedTuple):
    """Instructions that follow one another; only the last may jump or wait."""

    index: int
    body: tuple[Ins, ...]
    end: "Ins | None"  # a branch, a return, a barrier or a wait; None falls through
    target: int  # of the branch


class Kernel(NamedTuple):
    name: str
    params: tuple[Param, ...]
    blocks: tuple[Block, ...]
    static: dict[str, int]  # offsets of symbols in shared memory
    static_size: int
    arch: str


_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4,
          "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 0}  # fmt: skip
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_NAME = r"[%\w$.]+"


def parse(text: str) -> Kernel:
    """The one kernel of a module.

    Raises
    ------
    UnsupportedError
        If there is not exactly one, or it holds what the parser does not know.
    """
    found = list(_ENTRY.finditer(text))
    if len(found) != 1:
        raise UnsupportedError(f"{len(found)} kernels in one module")
    if ".func" in text:
        raise UnsupportedError("a function that is not inlined (.func)")
    name, params, start = found[0][1], found[0][2], found[0].end()
    arch = re.search(r"\.target\s+(\w+)", text)
    reader = _Reader(text, start)
    reader.read_shared(text[: found[0].start()])
    reader.read()
    blocks = reader.blocks()
    return Kernel(
        name, tuple(map(_param, filter(str.strip, params.split(",")))), blocks, reader.static,
        reader.static_size, arch[1] if arch else "",
    )  # fmt: skip


def _param(text: str) -> Param:
    kind = re.search(r"\.([bufs]\d+)\b", text)
    name = re.search(r"([\w$]+)\s*(\[(\d+)\])?\s*$", text.strip())
    if not kind or not name:
        raise UnsupportedError(f"parameter {text!r}")
    return Param(name[1], _SIZES[kind[1]] * int(name[3] or 1))


class _Reader:
    """Goes through the body of a kernel, statement by statement."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.at = text, start
        self.line = text.count("\n", 0, start) + 1
        self.source = ""
        self.scopes: list[dict[str, Reg]] = [{}]
        self.prefixes: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.scope_labels: list[dict[str, str]] = [{}]
        self.open: list[tuple[int, dict[str, str]]] = []
        self.code: list[Ins] = []
        self.jumps: dict[int, tuple[str, list[dict[str, str]]]] = {}
        self.static: dict[str, int] = {}
        self.static_size = 0
        self.unique = 0

    def read_shared(self, text: str) -> None:
        """Declarations of shared memory before the kernel."""
        for declared in re.finditer(
            r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?", text
        ):
            self.declare_shared(*declared.groups())

    def declare_shared(self, align: str, kind: str, name: str, count: str | None) -> None:
        step = int(align or 1)
        self.static_size = -(-self.static_size // step) * step
        self.static[name] = self.static_size
        if count != "":
            self.static_size += _SIZES[kind] * int(count or 1)

    def read(self) -> None:
        text = self.text
        skip = re.compile(r"(?:[ \t\r\n;]+|//[^\n]*|/\*.*?\*/)+", re.S)
        label = re.compile(r"([\w$]+):(?!:)")
        while True:
            gap = skip.match(text, self.at)
            if gap:
                self._advance(gap.end())
            if text[self.at] == "{":
                self.scopes.append({})
                self.scope_labels.append({})
                self._advance(self.at + 1)
                continue
            if text[self.at] == "}":
                if len(self.scopes) == 1:
                    return
                self.scopes.pop()
                self.scope_labels.pop()
                self._advance(self.at + 1)
                continue
            if text.startswith((".loc", ".file"), self.at):
                end = text.index("\n", self.at)
                told = re.search(r"//\s*(\S+:\d+:\d+)", text[self.at : end])
                if told:
                    self.source = told[1]
                self._advance(end)
                continue
            found = label.match(text, self.at)
            if found:
                self._label(found[1])
                self._advance(found.end())
                continue
            end = text.index(";", self.at)
            statement = re.sub(r"//[^\n]*", "", text[self.at : end])
            self._statement(" ".join(statement.split()))
            self._advance(end + 1)

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _label(self, name: str) -> None:
        known = self.scope_labels[-1].get(name)
        if known is None:
            self.unique += 1
            known = self.scope_labels[-1][name] = f"{name}.{self.unique}"
        self.labels[known] = len(self.code)

    def _statement(self, text: str) -> None:
        if text.startswith("."):
            self._declare(text)
            return
        guard, negated = None, False
        if text.startswith("@"):
            word, text = text.split(None, 1)
            negated = word.startswith("@!")
            guard = self._operand(word.lstrip("@!"))
        opcode, _, rest = text.partition(" ")
        number = len(self.code)
        place = f"line {self.line}" + (f", {self.source}" if self.source else "")
        if opcode.split(".")[0] == "bra":
            self.jumps[number] = (rest.strip(), list(self.scope_labels))
            operands: tuple = ()
        else:
            operands = tuple(map(self._operand, _split(rest)))
        self.code.append(Ins(number, opcode, guard, negated, operands, text, place))

    def _declare(self, text: str) -> None:
        words = text.split(None, 1)
        if words[0] == ".reg":
            kind, names = words[1].split(None, 1)
            bits = _SIZES[kind.lstrip(".")] * 8 or 1
            for name in (one.strip() for one in names.split(",")):
                many = re.fullmatch(r"(%?[\w$]+)<\d+>", name)
                if many:
                    self.prefixes[many[1]] = bits
                else:
                    self.unique += 1
                    unique = f"{name.lstrip('%')}_{self.unique}"
                    self.scopes[-1][name] = Reg(unique, bits)
        elif words[0] == ".shared":
            self.read_shared(text)
        elif words[0] not in (".pragma", ".loc", ".file"):
            raise UnsupportedError(f"directive {text!r} (line {self.line})")

    def _operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return Vec(tuple(map(self._operand, _split(text[1:-1]))))
        if text.startswith("["):
            return self._memory(text[1:-1])
        if "|" in text:
            return Pair(*(self._operand(one) for one in text.split("|")))
        if text == "_":
            return None
        if re.match(r"-?\d", text):
            return Imm(text)
        if text.startswith("!"):
            raise UnsupportedError(f"negated operand {text!r} (line {self.line})")
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        many = re.fullmatch(r"(%?[A-Za-z$_]+)\d+", text)
        if many and many[1] in self.prefixes:
            return Reg(text.lstrip("%"), self.prefixes[many[1]])
        return Sym(text)

    def _memory(self, text: str) -> Mem:
        base, *rest = _split(text)
        coordinates = self._operand(rest[0]).items if rest else ()
        found = re.fullmatch(rf"\s*({_NAME})\s*(?:([+-])\s*(-?\w+))?\s*", base)
        if not found:
            raise UnsupportedError(f"address [{text}] (line {self.line})")
        offset = int(found[3], 0) if found[3] else 0
        return Mem(self._operand(found[1]), -offset if found[2] == "-" else offset, coordinates)

    def blocks(self) -> tuple[Block, ...]:
        """Cut behind everything that jumps or waits, and before every label."""
        targets = {}
        for number, (name, scopes) in self.jumps.items():
            known = next((one[name] for one in reversed(scopes) if name in one), None)
            if known is None:
                raise UnsupportedError(f"unknown label {name}")
            targets[number] = self.labels[known]
        starts = {0, *targets.values()}
        for ins in self.code:
            if ends(ins):
                starts.add(ins.number + 1)
            if ins.opcode.startswith("mbarrier.try_wait"):
                starts.add(ins.number)
        starts = sorted(one for one in starts if one < len(self.code))
        order = {start: index for index, start in enumerate(starts)}
        order[len(self.code)] = len(starts)
        out = []
        for index, start in enumerate(starts):
            body = self.code[start : starts[index + 1] if index + 1 < len(starts) else None]
            last = body[-1] if ends(body[-1]) else None
            inner = tuple(body[:-1]) if last else tuple(body)
            target = order[targets[last.number]] if last and last.number in targets else -1
            out.append(Block(index, inner, last, target))
        return tuple(out)


def ends(ins: Ins) -> bool:
    """Whether a block ends with this instruction."""
    first = ins.words[0]
    if first in ("call", "brx"):
        raise UnsupportedError(f"{ins.text} ({ins.place})")
    if ins.opcode.startswith("bar.warp"):
        return False
    return first in ("bra", "ret", "exit", "bar", "barrier", "trap") or ins.opcode.startswith(
        ("mbarrier.try_wait", "mbarrier.test_wait")
    )


def _split(text: str) -> list[str]:
    """At commas that are not inside braces or brackets."""
    out, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        depth += sign in "{["
        depth -= sign in "}]"
        if sign == "," and not depth:
            out.append(text[start:at])
            start = at + 1
    rest = text[start:]
    return [*out, rest] if rest.strip() else out
