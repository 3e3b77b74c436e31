"""What sm_90 adds: barriers in shared memory, copies of boxes (TMA), and products of warp groups.

Nothing is really asynchronous. What is copied is poison from its start until somebody waits for it;
products are done at once, but until they are waited for nobody may write to what they read.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from ptxsim import matrices
from ptxsim.memory import RaceError, SimulationError, Threads, active
from ptxsim.parse import UnsupportedError

Array = np.ndarray
u2, u4, f4 = np.uint16, np.uint32, np.float32
SWIZZLE = {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}
"""Bits of an address that are exchanged with those three above, by CUDA's code of the pattern."""
_SPAN = {0: 1 << 30, 1: 32, 2: 64, 3: 128}
_MODE = {0: 0, 1: 3, 2: 2, 3: 1}  # of wgmma's descriptors, whose codes run the other way


def swizzled(address: Array, mode: int) -> Array:
    """Byte addresses with bits 4 to 6 exchanged by those three above, as far as the mode says."""
    return address ^ (address >> 3 & SWIZZLE[mode]) if mode else address


class TensorMap(NamedTuple):
    """What cuTensorMapEncodeTiled makes; outermost first, strides in elements."""

    address: int
    swizzle: int
    elem_size: int
    block: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nan: bool

    def check(self) -> None:
        """As the CUDA driver does."""
        steps = [s * self.elem_size for s in self.strides[:-1]]
        inner = self.block[-1] * self.elem_size
        why = (
            "an address that is no multiple of 16" if self.address % 16
            else f"strides of {steps} bytes" if any(s % 16 or not 0 <= s < 2**40 for s in steps)
            else f"a box {self.block}" if not all(0 < b <= 256 for b in self.block)
            else f"{inner} bytes along the last axis" if inner % 16 or inner > _SPAN[self.swizzle]
            else f"a shape {self.shape}" if not all(0 < n <= 2**32 for n in self.shape)
            else ""
        )  # fmt: skip
        if why:
            raise SimulationError(f"no tensor map has {why}: {self}")

    @property
    def bytes(self) -> int:
        """From the address to the end of what it may read."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.elem_size

    def box(self, first: list[int], memory: Any) -> Array:
        """The bytes of the box that begins there, (elements, elem_size); outermost index first."""
        inside, offset = np.ones((), bool), np.zeros((), np.int64)
        for axis, (begin, side) in enumerate(zip(first, self.block, strict=True)):
            at = begin + np.arange(side)
            at = at.reshape([side if n == axis else 1 for n in range(len(self.block))])
            inside = inside & (at >= 0) & (at < self.shape[axis])
            offset = offset + at * self.strides[axis]
        inside, offset = inside.reshape(-1), (offset * self.elem_size).reshape(-1)
        fill = 0xFF if self.nan else 0
        out = np.full((len(inside), self.elem_size), fill, np.uint8)
        if inside.any():
            stop = self.address + self.bytes
            region = next(r for r in memory.regions if r.start <= self.address and stop <= r.stop)
            start = offset[inside] + (self.address - region.start)
            out[inside] = region.words[1][start[:, None] + np.arange(self.elem_size)]
        return out


class Barrier:
    """An mbarrier of one CTA."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0
        self.copies: list[Any] = []  # under way

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class Hopper:
    """Methods of a batch; `shared`, `launch` and the rest are its own."""

    def _each(self, t: Threads, guard: Any, *values: Array) -> Any:
        """For each active thread: its position, and its element of each value."""
        at = active(guard)
        if at is not None and len(guard) == 1:
            return []
        spread = [np.broadcast_to(one, t.n) for one in values]
        return [(int(k), *(int(one[k]) for one in spread))
                for k in (range(t.n) if at is None else at)]  # fmt: skip

    def _barrier(self, t: Threads, ins: Any, k: int, address: int) -> Barrier:
        found = self.barriers.get((int(t.cta[k]), address))
        if found is None:
            raise SimulationError(f"no barrier at {address:#x}\n  by {t.say(k)}\n  in {ins.text!r} "
                                  f"({ins.place})")  # fmt: skip
        return found

    def _wake(self, cta: int) -> None:
        self.stalled.reshape(self.ctas, -1)[cta] = False

    def barrier_init(self, t, ins, guard, address, count) -> None:
        for k, where, number in self._each(t, guard, address, count):
            if where % 8 or where + 8 > self.shared.size:
                raise SimulationError(f"a barrier at {where:#x} in {ins.text!r} ({ins.place})")
            self.barriers[int(t.cta[k]), where] = Barrier(number)

    def barrier_inval(self, t, ins, guard, address) -> None:
        for k, where in self._each(t, guard, address):
            if self._barrier(t, ins, k, where).copies:
                raise SimulationError(f"{ins.text!r} ({ins.place}) while copies are under way")
            del self.barriers[int(t.cta[k]), where]

    def barrier_arrive(self, t, ins, guard, address, count, size) -> None:
        for k, where, number, more in self._each(t, guard, address, count, size):
            barrier = self._barrier(t, ins, k, where)
            barrier.bytes += more
            barrier.pending -= number
            if barrier.pending < 0:
                raise SimulationError(f"more arrivals than awaited: {ins.text!r} ({ins.place})")
            if not barrier.copies:
                barrier.settle()
            self._wake(int(t.cta[k]))

    def barrier_wait(self, t, ins, guard, address, parity) -> Any:
        """Whether the phase of this parity is over; what is under way arrives now."""
        out = np.zeros(t.n, bool)
        keys = t.cta.astype(np.int64) << 40 | np.broadcast_to(address, t.n).astype(np.int64)
        parity = np.broadcast_to(parity, t.n)
        for key in np.unique(keys):
            here = (keys == key).nonzero()[0]
            barrier = self._barrier(t, ins, int(here[0]), int(key & (1 << 40) - 1))
            if barrier.copies and barrier.pending == 0:
                for where, data in barrier.copies:
                    self.shared.raw[where] = data
                    barrier.bytes -= data.size
                barrier.copies = []
                if barrier.bytes:
                    raise SimulationError(f"{barrier.bytes} bytes more are awaited than copied: "
                                          f"{ins.text!r} ({ins.place})")  # fmt: skip
                barrier.settle()
                self._wake(int(key >> 40))
            out[here] = parity[here] != barrier.phase
        return [out]

    def copy_box(self, t, ins, guard, to, tensor, barrier, *first) -> None:
        """Poison at once, data when somebody waits."""
        for k, where, address, at, *begin in self._each(t, guard, to, tensor, barrier, *first):
            box = self.launch.objects.get(address)
            if box is None:
                raise SimulationError(f"no tensor map at {address:#x}: {ins.text!r} ({ins.place})")
            begin = [one - (one >> 31 << 32) for one in begin[::-1]]
            if begin[-1] * box.elem_size % 16:  # seen on an H200
                raise SimulationError(f"an illegal instruction: a box that begins at {begin}, no "
                                      f"multiple of 16 bytes along the last axis\n  by {t.say(k)}\n"
                                      f"  in {ins.text!r} ({ins.place})")  # fmt: skip
            data = box.box(begin, self.launch.memory)
            if where % 128 or where + data.size > self.shared.size:
                raise SimulationError(f"a box to {where:#x}\n  by {t.say(k)}\n  in {ins.text!r} "
                                      f"({ins.place})")  # fmt: skip
            if box.swizzle and where % (8 * _SPAN[box.swizzle]):
                raise UnsupportedError(f"a swizzled box at {where:#x} ({ins.place})")
            place = self._places(where, data.shape, box.swizzle) + int(t.base[k])
            self.shared.touch(ins, place.reshape(-1)[::4], 4, generic=False)
            if self.shared.races:
                one = np.full(data.size // 4, k)
                self.shared.note_write(ins, t, one, place.reshape(-1)[::4], 4, [np.zeros(0, u4)])
            self.shared.raw[place] = 0xFF
            found = self._barrier(t, ins, k, at)
            found.copies.append((place, data))
            self._wake(int(t.cta[k]))

    @staticmethod
    def _places(where: int, shape: tuple[int, ...], swizzle: int) -> Array:
        return swizzled(where + np.arange(math.prod(shape)), swizzle).reshape(shape)

    def multiply_group(self, t, ins, guard, a, b, d, keep, columns, kind, flip_a, flip_b, signs,
                       names):  # fmt: skip
        """wgmma: 64 rows of a warp group by `columns`; a in registers, or the description of it."""
        warps = t.warps
        if warps % 4 or (t.warp.reshape(warps, 32)[::4, 0] % 4).any():
            raise SimulationError(f"{ins.text[:60]!r} in a part of a warp group ({ins.place})")
        groups, base = warps // 4, t.base.reshape(-1, 128)[:, 0]
        depth = 8 if kind == "tf32" else 16
        if isinstance(a, tuple):
            values = matrices.numbers_of(matrices.stacked(a, warps), kind)
            left = matrices.rows_fragment(values).reshape(groups, 64, depth)
            for thread in t.every[::128].tolist() if self.launch.factors else ():
                self.factors.append((thread, int(self.product_group[thread]), names))
        else:
            left = self._operand(t, ins, a, base, 64, depth, kind, flip_a)
        right = self._operand(t, ins, b, base, columns, depth, kind, flip_b)
        product = np.matmul(left * f4(signs[0]), (right * f4(signs[1])).swapaxes(1, 2))
        row, column = matrices.accumulator_order(columns)
        found = product[:, row, column].reshape(-1, len(d))  # (threads, registers)
        keep = np.broadcast_to(keep, t.n)
        if keep.all():
            return [found[:, k] + old for k, old in enumerate(d)]
        return [np.where(keep, found[:, k] + old, found[:, k]) for k, old in enumerate(d)]

    def _operand(self, t, ins, described, base, rows, depth, kind, flip) -> Array:
        """(groups, rows, depth) from shared memory."""
        every = np.broadcast_to(described, t.n).reshape(-1, 128)
        if (every != every[:, :1]).any():
            raise SimulationError(
                f"a warp group has several operands: {ins.text[:60]!r} ({ins.place})"
            )
        size = 4 if kind == "tf32" else 2
        out = np.empty((len(base), rows, depth), f4)
        for key in np.unique(every[:, 0]):
            one = int(key)
            start, lead, step = ((one >> at & 0x3FFF) << 4 for at in (0, 16, 32))
            mode = _MODE[one >> 62]
            if one >> 49 & 7:
                raise UnsupportedError(f"a base offset in {ins.text[:60]!r} ({ins.place})")
            where = swizzled(start + _layout(rows, depth, size, lead, step, mode, flip), mode)
            if int(where.max()) + size > self.shared.size:
                raise SimulationError(f"an operand outside of shared memory: {ins.text[:60]!r} "
                                      f"({ins.place})")  # fmt: skip
            here = every[:, 0] == key
            words = (where[None] + base[here][:, None, None]) // size
            self._note_operand(t, ins, base[here], where, here)
            found = self.shared.words[size].take(words)
            if size == 4:
                out[here] = matrices.numbers_of(found, kind)[..., 0]
            elif kind == "f16":
                out[here] = found.view(np.float16)
            else:
                out[here] = (found.astype(u4) << u4(16)).view(f4)
        return out

    def _note_operand(self, t, ins, base, where, here) -> None:
        """The operand is read, by the first thread of each group, until it is waited for."""
        words = np.unique(where // 4)
        every = (base[:, None] // 4 + words[None, :]).reshape(-1)
        first = here.nonzero()[0] * 128
        at = np.repeat(first, len(words))
        if self.shared.races:
            self.shared.note_read(ins, t, at, every * 4, 4)
        if self.shared.unfenced[every].any():
            k = int(self.shared.unfenced[every].nonzero()[0][0])
            where = int(every[k] * 4 - t.base[at[k]])
            raise SimulationError(
                f"no fence.proxy.async since shared memory at {where:#x} was written\n"
                f"  read by the warp group of {t.say(int(at[k]))}\n"
                f"  in {ins.text[:60]!r} ({ins.place})"
            )
        for thread, part in zip(t.every[first], every.reshape(len(first), -1), strict=True):
            self.shared.busy[part] += 1  # (several groups may read the same)
            self.products.append((int(thread), int(self.product_group[thread]), part))

    def commit_products(self, t, ins, guard) -> None:
        self.product_group[t.every] += 1

    def wait_products(self, t, ins, guard, pending) -> None:
        left, mine = [], set(t.every[::128].tolist())
        for thread, group, words in self.products:
            if thread in mine and group + pending < self.product_group[thread]:
                self.shared.busy[words] -= 1
            else:
                left.append((thread, group, words))
        self.products = left
        self.factors = [
            one for one in self.factors
            if one[0] not in mine or one[1] + pending >= self.product_group[one[0]]
        ]  # fmt: skip

    def note_factors(self, t, ins, guard, names) -> None:
        """These registers are set: no product may still read them."""
        if self.factors:
            mine = set(t.every[::128].tolist())
            for thread, _, read in self.factors:
                if thread in mine and not set(names).isdisjoint(read):
                    raise RaceError(
                        f"a product of a warp group that was not waited for may still read the "
                        f"registers {names} that are set by\n  {ins.text!r} ({ins.place})"
                    )


@functools.lru_cache(256)
def _layout(rows: int, depth: int, size: int, lead: int, step: int, mode: int, flip: bool) -> Array:
    """Bytes from the start of an operand to its elements (rows, depth), before the swizzle.

    The canonical layouts of the PTX ISA: core matrices of 8 by 16 bytes; `flip` if the rows run
    along them (MN-major).
    """
    r, c = np.arange(rows)[:, None], np.arange(depth)[None, :]
    unit = 16 // size
    width = {0: 1, 1: 2, 2: 4, 3: 8}[mode]  # in units of 16 bytes
    if not flip:
        inner = c // unit * (16 if mode else lead) + c % unit * size
        return r % 8 * (16 * width) + r // 8 * step + inner
    along = width * unit
    if mode == 0:
        return r % unit * size + r // unit * step + c % 8 * 16 + c // 8 * lead
    return r % along * size + r // along * lead + c % 8 * (16 * width) + c // 8 * step
