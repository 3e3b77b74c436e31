"""Global memory, checked against the storages that a launch may touch, and shared memory."""

import bisect
import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF
"""Every byte of shared memory that nobody has written; a NaN in all floating-point types."""


class SimulationError(RuntimeError):
    """The kernel did what no kernel may do; the message says what, where and who."""


class MemoryFault(SimulationError):
    """An access out of bounds or misaligned."""


class RaceError(SimulationError):
    """Two warps access the same shared memory, one of them writing, without a barrier between."""


class Threads:
    """The threads that execute a block of instructions together, of all CTAs of a batch."""

    def __init__(self, batch: Any, index: Array | None) -> None:
        pick = (lambda a: a) if index is None else (lambda a: a[index])
        self.batch, self.index = batch, index
        self.every = batch.numbers if index is None else index  # numbers in the batch
        self.tid = pick(batch.tid)
        self.cta = pick(batch.cta)
        self.base = pick(batch.base)  # of shared memory, in bytes
        self.warp = pick(batch.warp)  # in the CTA
        self.n = len(self.tid)
        self._whole: bool | None = None

    @property
    def lane(self) -> Array:
        return self.tid & np.uint32(31)

    @property
    def warps(self) -> int:
        """How many whole warps these are; an error if some warp is not whole."""
        if self._whole is None:
            one = self.n % 32 == 0
            self._whole = bool(one and (self.every.reshape(-1, 32)[:, 0] % 32 == 0).all()
                               and (np.diff(self.every.reshape(-1, 32)) == 1).all())  # fmt: skip
        if not self._whole:
            raise SimulationError("an instruction for whole warps runs in a part of a warp")
        return self.n // 32

    def say(self, k: int) -> str:
        """Who the k-th of these threads is."""
        return f"CTA {tuple(self.batch.ids[self.cta[k]].tolist())}, thread {int(self.tid[k])}"


def active(guard: Array | None) -> Array | None:
    """Indices of the threads whose guard holds; None for all."""
    if guard is None or guard.all():
        return None
    return guard.nonzero()[0]


def merged(old: Array, at: Array, new: Array, n: int) -> Array:
    """`old`, with `new` at these threads."""
    out = np.empty(n, old.dtype)
    out[:] = old
    out[at] = new
    return out


class Region(NamedTuple):
    start: int
    stop: int
    name: str
    words: dict[int, Array]


class Global:
    """Host memory that a launch may touch, by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.starts: list[int] = []
        self.last: dict[int, Region] = {}

    def add(self, start: int, size: int, name: str) -> None:
        """Allow accesses to so many bytes from `start` on."""
        if size == 0 or any(
            one.start == start and one.stop >= start + size for one in self.regions
        ):
            return
        self.regions = [one for one in self.regions if one.start != start]
        raw = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        words = {n: raw[: size // n * n].view(kind) for n, kind in WORDS.items()}
        self.regions.append(Region(start, start + size, name, words))
        self.regions.sort()
        self.starts = [one.start for one in self.regions]

    def _place(self, address: int) -> str:
        at = bisect.bisect_right(self.starts, address) - 1
        near = self.regions[max(at, 0) : at + 2]
        if not near:
            return "no tensor is known"
        told = [
            f"{address - one.stop} bytes behind the end of {one.name}" if address >= one.stop
            else f"{one.start - address} bytes before {one.name}" if address < one.start
            else f"byte {address - one.start} of the {one.stop - one.start} of {one.name}"
            for one in near
        ]  # fmt: skip
        return " and ".join(told)

    def spans(
        self, ins: Any, t: Threads, at: Array | None, address: Array, size: int, width: int, to: str
    ) -> tuple[Region, Array] | list[tuple[Region, Array, Array]]:
        """The region of all addresses and the word numbers there; or one entry per region.

        `address` is that of the active threads `at`; each access has `size` bytes, in words of
        `width`.
        """
        off = address & np.uint64(size - 1)
        if off.any():
            k = int(off.nonzero()[0][0])
            self._fault(ins, t, at, address, k, f"misaligned {to} of {size} bytes")
        low, high = int(address.min()), int(address.max()) + size
        region = self.last.get(ins.number)
        if region is None or low < region.start or high > region.stop:
            where = bisect.bisect_right(self.starts, low) - 1
            region = self.regions[where] if where >= 0 else None
            if region is None or high > region.stop:
                return self._scattered(ins, t, at, address, size, width, to)
            self.last[ins.number] = region
        return region, (address - np.uint64(region.start)).view(np.int64) // width

    def _scattered(self, ins, t, at, address, size, width, to):
        which = np.searchsorted(np.array(self.starts, np.uint64), address, "right") - 1
        stops = np.array([one.stop for one in self.regions] or [0], np.uint64)
        bad = (which < 0) | (address + np.uint64(size) > stops[which])
        if bad.any():
            k = int(bad.nonzero()[0][0])
            self._fault(ins, t, at, address, k, f"{to} of {size} bytes out of bounds")
        out = []
        for number in np.unique(which):
            region, these = self.regions[number], (which == number).nonzero()[0]
            words = (address[these] - np.uint64(region.start)).view(np.int64) // width
            out.append((region, words, these))
        return out

    def _fault(self, ins, t, at, address, k, what) -> None:
        who = t.say(k if at is None else int(at[k])) if len(address) > 1 else t.say(0)
        here = int(address[k])
        raise MemoryFault(
            f"{what} at {here:#x} ({self._place(here)})\n  by {who}\n"
            f"  in {ins.text!r} ({ins.place})"
        )

    def fetch(self, ins, t, at, address, width: int, count: int) -> list[Array]:
        """The words at these addresses, of the active threads."""
        found = self.spans(ins, t, at, address, width * count, width, "read")
        if isinstance(found, tuple):
            region, words = found
            data = region.words[width]
            return [data.take(words + k if k else words) for k in range(count)]
        out = [np.empty(len(address), WORDS[width]) for _ in range(count)]
        for region, words, these in found:
            for k in range(count):
                out[k][these] = region.words[width].take(words + k)
        return out

    def put(self, ins, t, at, address, width: int, values: Sequence[Array]) -> None:
        """Write a word of each of `values` to these addresses, of the active threads."""
        found = self.spans(ins, t, at, address, width * len(values), width, "write")
        if isinstance(found, tuple):
            region, words = found
            for k, value in enumerate(values):
                region.words[width][words + k] = value
            return
        for region, words, these in found:
            for k, value in enumerate(values):
                region.words[width][words + k] = value[these] if len(value) > 1 else value


class Shared:
    """The shared memory of all CTAs of a batch, one after the other.

    With `races`, remembers for every granule who wrote and read it since which barrier; with
    `groups`, which words no fence has shown to products of warp groups, and which these read.
    """

    def __init__(
        self, ctas: int, size: int, races: bool, granule: int = 4, groups: bool = False
    ) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 1024) * 1024
        raw = np.full(ctas * self.stride, POISON, np.uint8)
        self.words = {n: raw.view(kind) for n, kind in WORDS.items()}
        self.raw = raw
        self.races, self.granule, self.groups = races, granule, groups
        if groups:
            self.unfenced = np.zeros(len(raw) // 4, bool)
            self.busy = np.zeros(len(raw) // 4, np.int16)
        if races:
            # tags: 1 + 64 * epoch + warp, so that larger is later; of readers, the first and last
            self.writer, self.reader, self.reader_first = (
                np.zeros(len(raw) // granule, np.int32) for _ in range(3)
            )

    def locate(self, ins, t, at, address, size: int, to: str) -> Array:
        """Byte offsets in `raw` of the accesses of the active threads, checked."""
        address = address.astype(np.int64)
        bad = (address & (size - 1)) != 0
        if bad.any() or int(address.max()) + size > self.size:
            if not bad.any():
                bad = address + size > self.size
            k = int(bad.nonzero()[0][0])
            why = "misaligned" if address[k] & (size - 1) else "out of bounds"
            who = t.say(k if at is None else int(at[k])) if len(address) > 1 else t.say(0)
            raise MemoryFault(
                f"{why} {to} of {size} bytes of shared memory at {int(address[k]):#x} of "
                f"{self.size:#x}\n  by {who}\n  in {ins.text!r} ({ins.place})"
            )
        base = t.base if at is None else t.base[at]
        return base + address

    def fetch(self, ins, t, at, address, width: int, count: int) -> list[Array]:
        """As of `Global`."""
        where = self.locate(ins, t, at, address, width * count, "read")
        if self.races:
            self.note_read(ins, t, at, where, width * count)
        words = where // width
        data = self.words[width]
        return [data.take(words + k if k else words) for k in range(count)]

    def put(self, ins, t, at, address, width: int, values: Sequence[Array]) -> None:
        """As of `Global`."""
        where = self.locate(ins, t, at, address, width * len(values), "write")
        self.touch(ins, where, width * len(values), generic=True)
        if self.races:
            self.note_write(ins, t, at, where, width, values)
        words = where // width
        for k, value in enumerate(values):
            self.words[width][words + k] = value

    def touch(self, ins: Any, where: Array, size: int, generic: bool) -> None:
        """Before a write: nobody may be reading there."""
        if not self.groups:
            return
        for k in range(max(1, size // 4)):
            words = where // 4 + k
            if self.busy.take(words).any():
                raise RaceError(f"a product of a warp group that was not waited for may still read "
                                f"what is written by\n  {ins.text!r} ({ins.place})")  # fmt: skip
            self.unfenced[words] = generic

    def fence(self, bases: Array) -> None:
        for base in bases.tolist():
            self.unfenced[base // 4 : (base + self.stride) // 4] = False

    def fill(self, where: Array, size: int, value: int = POISON) -> None:
        """Set the bytes of accesses of `size` bytes at these offsets."""
        width = min(size, 8)
        word = np.array([value] * width, np.uint8).view(WORDS[width])[0]
        words = where // width
        for k in range(size // width):
            self.words[width][words + k] = word

    def _tags(self, t: Threads, at: Array | None) -> tuple[Array, Array]:
        warp, cta = (t.warp, t.cta) if at is None else (t.warp[at], t.cta[at])
        epoch = t.batch.epoch[cta] * 64 + 1
        return epoch, warp

    def note_read(self, ins, t, at, where, size: int) -> None:
        epoch, warp = self._tags(t, at)
        first = where // self.granule
        mine, reverse = epoch + warp, epoch + (63 - warp)
        for k in range(max(1, size // self.granule)):
            here = first + k if k else first
            wrote = self.writer.take(here)
            bad = (wrote >= epoch) & (wrote != mine)
            if bad.any():
                self._race(ins, t, at, where, bad, wrote - epoch, "reads", "wrote")
            self.reader[here] = np.maximum(self.reader.take(here), mine)
            before = np.maximum(self.reader_first.take(here), reverse)
            self.reader_first[here[::-1]] = before[::-1]

    def note_write(self, ins, t, at, where, width: int, values: Sequence[Array]) -> None:
        """Remember a write of a word of each of `values`; empty arrays stand for unknown ones."""
        epoch, warp = self._tags(t, at)
        first, size = where // self.granule, width * len(values)
        mine, reverse = epoch + warp, epoch + (63 - warp)
        for k in range(max(1, size // self.granule)):
            here = first + k if k else first
            wrote, read = self.writer.take(here), self.reader.take(here)
            bad = (wrote >= epoch) & (wrote != mine)
            if bad.any():  # the same value may be written twice
                value = values[k * self.granule // width]
                if len(value):
                    old = self.words[width].take(where // width + k * self.granule // width)
                    bad &= old != value
                if bad.any():
                    self._race(ins, t, at, where, bad, wrote - epoch, "writes", "wrote")
            bad = (read >= epoch) & (read != mine)
            if bad.any():
                self._race(ins, t, at, where, bad, read - epoch, "writes", "read")
            read = self.reader_first.take(here)
            bad = (read >= epoch) & (read != reverse)
            if bad.any():
                self._race(ins, t, at, where, bad, 63 - (read - epoch), "writes", "read")
            self.writer[here] = mine

    def _race(self, ins, t, at, where, bad, other, does, did) -> None:
        k = int(bad.nonzero()[0][0])
        thread = k if at is None else int(at[k])
        at = int(where[k] - t.base[thread])
        raise RaceError(
            f"{t.say(thread)} {does} shared memory at {at:#x} that warp "
            f"{int(other[k])} {did} since the last barrier\n  in {ins.text!r} ({ins.place})"
        )
