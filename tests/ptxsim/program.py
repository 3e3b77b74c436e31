"""A kernel, ready to be run: its blocks, and which registers each of them takes and leaves."""

from typing import Any

from ptxsim import emitter, transfers
from ptxsim.parse import Kernel, Reg, Vec, parse


class Program:
    """A kernel, parsed, with its blocks compiled as they are first run."""

    def __init__(self, text: str) -> None:
        self.kernel: Kernel = parse(text)
        self.live = _live(self.kernel)
        self.code: dict[int, Any] = {}
        sizes = [8 * transfers.access(i)[1] for b in self.kernel.blocks for i in b.body
                 if i.words[0] in ("ld", "st") and "shared" in i.opcode]  # fmt: skip
        self.collective = [any(".sync" in i.opcode for i in b.body) for b in self.kernel.blocks]
        self.factors = frozenset(  # registers that products of warp groups read
            reg.name for b in self.kernel.blocks for i in b.body
            if i.opcode.startswith("wgmma.mma_async") and isinstance(i.operands[1], Vec)
            for reg in emitter.registers(i.operands[1])
        )  # fmt: skip
        self.has_groups = any("wgmma" in i.opcode for b in self.kernel.blocks for i in b.body)
        self.granule = min([4, *(bits // 8 for bits in sizes)])

    def block(self, index: int) -> tuple[Any, list[Reg], list[Reg]]:
        """Its function, the registers that it takes and those that it leaves."""
        if index not in self.code:
            block = self.kernel.blocks[index]
            after = self.live[index]
            set_here = {reg for ins in all_of(block) for reg in emitter.writes(ins)}
            needed = _needed(block)
            takes, leaves = sorted(needed), sorted(after & set_here)
            function = emitter.compile_block(self.kernel, block, takes, leaves, self.factors)
            self.code[index] = function, takes, leaves
        return self.code[index]


def all_of(block: Any) -> tuple:
    return block.body if block.end is None else (*block.body, block.end)


def _needed(block: Any) -> set[Reg]:
    """Registers that are read before they are set."""
    out: set[Reg] = set()
    done: set[Reg] = set()
    for ins in all_of(block):
        out.update(reg for reg in emitter.reads(ins) if reg not in done)
        done.update(emitter.writes(ins))
    return out


def _live(kernel: Kernel) -> list[set[Reg]]:
    """Registers that are needed after each block."""
    blocks = kernel.blocks
    need = [_needed(one) for one in blocks]
    kill = [{reg for ins in all_of(one) for reg in emitter.writes(ins)} for one in blocks]
    before: list[set[Reg]] = [set(one) for one in need]
    after: list[set[Reg]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for one in reversed(blocks):
            out: set[Reg] = set()
            for following in _following(one, len(blocks)):
                out |= before[following]
            if out != after[one.index]:
                after[one.index] = out
                before[one.index] = need[one.index] | (out - kill[one.index])
                changed = True
    return after


def _following(block: Any, count: int) -> list[int]:
    end = block.end
    first = end.words[0] if end is not None else ""
    out = [] if first in ("ret", "exit", "trap", "bra") and end.guard is None else [block.index + 1]
    if first == "bra":
        out.append(block.target)
    return [one for one in out if one < count]
