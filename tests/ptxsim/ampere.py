"""What blocks of code call: registers of a thread, memory, copies, other threads, matrices."""

from typing import Any

import numpy as np

from ptxsim import matrices
from ptxsim.memory import WORDS, SimulationError, Threads, active, merged

Array = np.ndarray
LANES = np.arange(32)


class Ampere:
    """Methods of a batch; `shared`, `launch` and the rest are its own."""

    # special registers and parameters

    def ctaid(self, t: Threads, axis: int) -> Array:
        if self.ctas == 1:
            return self.ids[:, axis].astype(np.uint32)
        return self.ids[t.cta, axis].astype(np.uint32)

    def clock(self) -> Array:
        return np.array([next(self.time)], np.uint32)

    def clock64(self) -> Array:
        return np.array([next(self.time)], np.uint64)

    def param_address(self, name: str, dtype: Any) -> Array:
        return np.array([self.launch.addresses[name]], dtype)

    def param(self, name: str, offset: int, dtype: Any) -> Array:
        return np.frombuffer(self.launch.arguments[name], dtype, 1, offset)

    # memory

    def load_global(self, t, ins, guard, address, width, count, of, to, old) -> Any:
        return self._load(self.launch.memory, t, ins, guard, address, width, count, of, to, old)

    def load_shared(self, t, ins, guard, address, width, count, of, to, old) -> Any:
        return self._load(self.shared, t, ins, guard, address, width, count, of, to, old)

    def _load(self, memory, t, ins, guard, address, width, count, of, to, old) -> Any:
        at = active(guard)
        if at is not None and not len(at):
            return old
        if memory is self.shared and len(address) == 1:
            address = np.broadcast_to(address, t.n)
        if at is not None and len(address) > 1:
            address = address[at]
        elif at is not None and len(guard) == 1:
            return old
        found = memory.fetch(ins, t, at, address, width, count)
        if of is not to or np.dtype(of).kind == "i":
            found = [one.view(of).astype(to) for one in found]
        return found if at is None else [
            merged(before, at, one, t.n) for before, one in zip(old, found, strict=True)
        ]  # fmt: skip

    def store_global(self, t, ins, guard, address, width, values) -> None:
        self._store(self.launch.memory, t, ins, guard, address, width, values)

    def store_shared(self, t, ins, guard, address, width, values) -> None:
        self._store(self.shared, t, ins, guard, address, width, values)

    def _store(self, memory, t, ins, guard, address, width, values) -> None:
        at = active(guard)
        if at is not None and (not len(at) or len(guard) == 1):
            return
        address = np.broadcast_to(address, t.n)
        if at is not None:
            address = address[at]
            values = [one if len(one) == 1 else one[at] for one in values]
        memory.put(ins, t, at, address, width, values)

    def atomic(self, t, ins, guard, space, address, how, dtype, values, old) -> Any:
        """One thread after the other."""
        at = active(guard)
        address = np.broadcast_to(address, t.n)
        values = [np.broadcast_to(one, t.n) for one in values]
        out = np.empty(t.n, dtype)
        if old is not None:
            out[:] = old
        memory = self.launch.memory if space == "global" else self.shared
        width = np.dtype(dtype).itemsize
        for k in range(t.n) if at is None else at:
            one = np.array([k])
            before = memory.fetch(ins, t, one, address[one], width, 1)[0].view(dtype)
            new = _ATOMIC[how](before, *(v[one] for v in values)).astype(dtype)
            memory.put(ins, t, one, address[one], width, [new.view(WORDS[width])])
            out[k] = before[0]
        return [out]

    # copies to shared memory that do not wait

    def copy_async(self, t, ins, guard, to, of, size, source) -> None:
        """Poison at once, data at the wait."""
        at = active(guard)
        if at is not None and (not len(at) or len(guard) == 1):
            return
        to, of, source = (np.broadcast_to(one, t.n) for one in (to, of, source))
        if at is not None:
            to, of, source = to[at], of[at], source[at]
        where = self.shared.locate(ins, t, at, to, size, "copy")
        if self.launch.copies:  # also of nothing
            self.launch.memory.spans(ins, t, at, of, size, min(size, 8), "copy")
        data = np.zeros((len(where), size // 4), np.uint32)
        if not np.isin(source, (0, size)).all():
            raise SimulationError(f"a part of {size} bytes is copied by {ins.text!r} ({ins.place})")
        real = (source > 0).nonzero()[0]
        if len(real):
            who = real if at is None else at[real]
            words = (
                self.launch.memory.fetch(ins, t, who, of[real], size, 1)[0] if size < 16 else None
            )
            if words is not None:
                data.view(WORDS[size])[real, 0] = words
            else:
                for k, word in enumerate(
                    self.launch.memory.fetch(ins, t, who, of[real], 4, size // 4)
                ):
                    data[real, k] = word
        self.shared.touch(ins, where, size, generic=False)
        if self.shared.races:
            self.shared.note_write(ins, t, at, where, 4, [data[:0, 0]] * (size // 4))
        self.shared.fill(where, size)
        every = t.every if at is None else t.every[at]
        self.copies.append((ins, every, self.group[every], where, data))

    def commit_copies(self, t, ins, guard) -> None:
        self.group[t.every] += 1

    def wait_copies(self, t, ins, guard, pending) -> None:
        """Let arrive what belongs to all groups but the last `pending`; -1: everything."""
        left = []
        for copy in self.copies:
            start, every, group, where, data = copy
            done = group + pending < self.group[every]
            if t.index is not None:
                done &= np.isin(every, t.index)
            if not done.any():
                left.append(copy)
                continue
            if not done.all():
                left.append((start, every[~done], group[~done], where[~done], data[~done]))
                every, where, data = every[done], where[done], data[done]
            words = where // 4
            self.shared.touch(start, where, 4 * data.shape[1], generic=False)
            if self.shared.races:
                whole = Threads(self, every)
                self.shared.note_write(start, whole, None, where, 4, [data[:0, 0]] * data.shape[1])
            for k in range(data.shape[1]):
                self.shared.words[4][words + k] = data[:, k]
        self.copies = left

    def fence(self, t, ins, guard) -> None:
        """What was written is now seen by products of warp groups too."""
        if self.shared.groups and guard is None:
            self.shared.fence(np.unique(t.base))

    # other threads of the warp

    def _rows(self, t: Threads, a: Array) -> Array:
        """(warps, 32)."""
        warps = t.warps
        return np.ascontiguousarray(np.broadcast_to(a, t.n)).reshape(warps, 32)

    def shuffle(self, t, ins, guard, a, b, c, how) -> Any:
        rows = self._rows(t, a)
        if len(b) == 1 and len(c) == 1:
            lanes = _lanes(how, int(b[0]), int(c[0]))
            return [rows[:, lanes].reshape(-1)]
        b, c = self._rows(t, b).astype(np.int64), self._rows(t, c).astype(np.int64)
        lanes = _source(how, b, c)
        return [np.take_along_axis(rows, lanes, 1).reshape(-1)]

    def vote(self, t, ins, guard, a, how) -> Any:
        rows = self._rows(t, a if guard is None else a & guard)
        if how == "ballot":
            bits = (rows.astype(np.uint32) << LANES.astype(np.uint32)).sum(1, dtype=np.uint32)
            return [bits.repeat(32)]
        found = {"any": rows.any(1), "all": rows.all(1), "uni": rows.all(1) | ~rows.any(1)}[how]
        return [found.repeat(32)]

    def reduce(self, t, ins, guard, a, how) -> Any:
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                    "or": np.bitwise_or, "xor": np.bitwise_xor}[how]  # fmt: skip
        return [function.reduce(self._rows(t, a), axis=1, dtype=a.dtype).repeat(32)]

    # matrices

    def multiply(self, t, ins, guard, a, b, c, shape, kind) -> Any:
        matrices.check(shape, kind, a, b)
        left = self._fragment(matrices.left, a, kind, t.warps)
        right = self._fragment(matrices.right, b, kind, t.warps)
        return matrices.multiply(left, right, c)

    def _fragment(self, make, registers, kind, warps) -> Array:
        """Made once in a block: the same registers are factors of several products."""
        key = make, kind, *map(id, registers)
        if key not in self.fragments:  # (which holds the registers, so that no id is used again)
            self.fragments[key] = registers, make(registers, kind, warps)
        return self.fragments[key][1]

    def _matrix_rows(self, t, ins, address, count) -> tuple[Array, Array]:
        """Threads that give addresses of rows of 16 bytes, (warps, count, 8), and those."""
        warps = t.warps
        lanes = np.arange(warps)[:, None] * 32 + np.arange(8 * count)[None, :]
        at = lanes.reshape(-1)
        return at, np.broadcast_to(address, t.n)[at]

    def load_matrix(self, t, ins, guard, address, count, transposed) -> Any:
        at, address = self._matrix_rows(t, ins, address, count)
        found = self.shared.fetch(ins, t, at, address, 4, 4)
        rows = np.stack(found, 1).reshape(t.warps, count, 8, 4)
        rows = matrices.transposed(rows) if transposed else rows
        return [rows[:, k].reshape(-1) for k in range(count)]

    def store_matrix(self, t, ins, guard, address, values, transposed) -> None:
        at, address = self._matrix_rows(t, ins, address, len(values))
        rows = np.stack([self._rows(t, one) for one in values], 1)
        rows = rows.reshape(t.warps, len(values), 8, 4)
        rows = matrices.transposed(rows) if transposed else rows
        rows = rows.reshape(-1, 4)
        self.shared.put(ins, t, at, address, 4, [rows[:, k] for k in range(4)])


_ATOMIC = {
    "add": lambda old, new: old + new, "exch": lambda old, new: new, "min": np.minimum,
    "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "cas": lambda old, test, new: np.where(old == test, new, old),
}  # fmt: skip


_KNOWN_LANES: dict[Any, Array] = {}


def _lanes(how: str, b: int, c: int) -> Array:
    key = how, b, c
    if key not in _KNOWN_LANES:
        one = np.full((1, 32), b), np.full((1, 32), c)
        _KNOWN_LANES[key] = _source(how, *one)[0]
    return _KNOWN_LANES[key]


def _source(how: str, b: Array, c: Array) -> Array:
    """From which lane each one takes, as shfl.sync says; (warps, 32)."""
    lane, segment, clamp = LANES[None, :], c >> 8 & 31, c & 31
    b = b & 31
    most, least = (lane & segment) | (clamp & ~segment), lane & segment
    at = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[how]
    inside = at >= most if how == "up" else at <= most
    return np.where(inside, at, lane)
