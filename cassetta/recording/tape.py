"""Note what a function of tensors does, step by step, so that it can be replayed (`replay`).

What is noted: operators of ATen, by a dispatch mode; allocations; and launches of kernels, whose
passes run as they are (`tile.launch` asks for the tape of its thread, `records.here`).

A recording holds for tensors of the shapes, strides and dtypes of those that it was made of, and
for the same settings, for which its caller answers (`recordings`). What no key can know is asked in
each replay: whether addresses are aligned as they were, and operators lay out their results as they
did. If not, `Changed` is raised, and nothing that was given has been written.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cassetta.kernels import records

Function = Callable[..., tuple[Tensor | None, ...]]

aten = torch.ops.aten
_MAKERS = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
_READERS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}


class Changed(Exception):
    """An address or a layout that is other than recorded; nothing that was given was written."""


class Unrecordable(Exception):
    """What no recording can repeat, in words."""


class Entry(NamedTuple):
    """A tensor that a recorded function meets: one that was given, or the first on its storage."""

    name: str
    tensor: Tensor
    kind: str  # "given", "made" by an allocation, or the "result" of an operator


class Call(NamedTuple):
    """A step that is an operator of ATen."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Any, ...]


class Start(NamedTuple):
    """A step that launches a kernel."""

    kernel: Any
    compiled: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Tape(TorchDispatchMode):
    """What a function does, step by step, while it is the mode of its thread."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Entry | Call | Start] = []  # an entry: it is allocated
        self.entries: dict[int, Entry] = {}  # by storage
        self.given = [Entry(f"a{n}", x, "given") for n, x in enumerate(given) if x is not None]
        self.changed: int | None = None  # after how many steps what was given is other than before
        self.twins: set[tuple[str, str]] = set()  # of these, that are one tensor here
        self._alive: list[Any] = [given]  # so that no address is used twice
        self._outer: list[Tape | None] = []

    def __enter__(self) -> "Tape":
        self._outer.append(records.here.tape)
        records.here.tape = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        records.here.tape = self._outer.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READERS:
            raise Unrecordable(f"the host reads a value ({func})")
        if func.namespace == "cassetta":
            with self:
                out = records.run(func)(*args, **kwargs)
            if func._schema.is_mutable and self.changed is None:
                self.changed = len(self.steps)
            return out
        out = func(*args, **kwargs)
        results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        self._alive += [out, [one.untyped_storage() for one in results if isinstance(one, Tensor)]]
        if func is aten.set_.source_Storage_storage_offset:  # another shape of a known storage
            return out
        kind, known = "made" if func in _MAKERS else "result", len(self.entries)
        for one in results:
            if isinstance(one, Tensor) and not self._on_given(one):
                where = one.untyped_storage()._cdata
                self.entries.setdefault(where, Entry(f"t{len(self.entries)}", one, kind))
        if kind == "made":
            self.steps.append(self.of(results[0]))
        elif len(self.entries) > known or func._schema.is_mutable:
            self.steps.append(Call(func, args, kwargs, results))
        return out

    def launch(self, kernel: Any, programs: int, args: tuple[Any, ...], constants: Any) -> None:
        """Launch a kernel, as `tile.launch` does, and record that."""
        if any(hasattr(one, "block_shape") for one in args):
            raise Unrecordable("a kernel copies boxes, by descriptions of tensors")
        with _disable_current_modes():  # an interpreter calls torch
            compiled = kernel[(programs,)](*args, **constants)
        self._alive.append(args)
        self.steps.append(Start(kernel, compiled, programs, args, constants))

    def of(self, x: Tensor) -> Entry:
        """Return what a tensor lies on: one that was given, or a storage that was made.

        Raises
        ------
        Unrecordable
            If it may lie on several that were given, or nobody knows where it is from.
        """
        on = self._on_given(x)
        if not on and x.untyped_storage()._cdata in self.entries:
            return self.entries[x.untyped_storage()._cdata]
        if on and not x.numel():
            return on[0]
        kind = x.data_ptr(), x.shape, x.stride()
        same = [one for one in on if (one.tensor.data_ptr(), *form(one.tensor)) == kind]
        around = [one for one in on if within(x, one.tensor)]
        self.twins |= {(same[0].name, one.name) for one in same[1:]}
        if same or len(around) == 1:
            return (same or around)[0]
        raise Unrecordable("tensors that are given share their memory")

    def _on_given(self, x: Tensor) -> list[Entry]:
        where = x.untyped_storage()._cdata
        return [one for one in self.given if one.tensor.untyped_storage()._cdata == where]


def form(x: Tensor) -> tuple[Any, ...]:
    """Return the shape and the strides of a tensor."""
    return x.shape, x.stride()


def within(x: Tensor, other: Tensor) -> bool:
    """Tell whether all of x lies between the first and the last element of another tensor."""
    begin, end = _ends(x)
    first, last = _ends(other)
    return first <= begin and end <= last


def _ends(x: Tensor) -> tuple[int, int]:
    begin = x.data_ptr()
    reach = sum(s * (n - 1) for n, s in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (reach + 1) * x.itemsize
