"""Replay what a tape has recorded, as straight-line code: the function that is written from it.

In the code a launch takes the address of a tensor plus an offset, so that views vanish; small
tensors that launches alone read share one allocation; a temporary is freed after its last reader.
What is left per call is: allocate, convolve, launch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cassetta.kernels import machine
from cassetta.recording.tape import Call, Changed, Entry, Function, Start, Tape, Unrecordable, form

_QUICKER = {  # than through the overload, with these options
    (torch.ops.aten.convolution.default, ()): torch.convolution,
    (torch.ops.aten._to_copy.default, ("dtype",)): lambda x, dtype: x.to(dtype, copy=True),
}
_SHARED = 2**20
"""Bytes up to which a temporary shares an allocation."""


def record(function: Function, *given: Tensor | None) -> tuple[Function | None, tuple[Any, ...]]:
    """Run a function of tensors once; return its recording, and what it returned now.

    The recording takes those that are not None. There is none where it was found, after the
    function had run, that nothing can repeat it.

    Raises
    ------
    Unrecordable
        If that was found before it had come to its end.
    """
    tape = Tape(given)
    with torch.no_grad(), tape:
        out = function(*given)
    try:
        return _Writer(tape, out).function(), out
    except Unrecordable:
        return None, out


class _Writer:
    """The code of a recording."""

    def __init__(self, tape: Tape, out: Sequence[Tensor | None]) -> None:
        self.tape, self.out = tape, out
        self.lines: list[str] = []
        self.known: dict[str, Any] = {}  # what the code names
        self.rows: dict[int, str] = {}  # what is written for a tensor, by its id
        self.writes = False  # to what was given: from then on nothing may raise
        self.pointers: set[str] = set()
        everything = [*tape.given, *tape.entries.values()]
        self.device = everything[0].tensor.device
        self.by_address = machine.is_gpu(self.device)  # an interpreter takes tensors
        self.returned = {tape.of(x).name for x in out if x is not None}
        self.launched = {tape.of(x).name for step in tape.steps for x in _read(step, Start)}
        read = [(x, tape.of(x)) for step in tape.steps for x in _read(step, Call)]
        called = {one.name for _, one in read}
        self.viewed = {one.name for x, one in read if form(x) != form(one.tensor)}
        self.last: dict[str, int] = {}
        for n, step in enumerate(tape.steps):
            for x in _read(step):
                self.last[tape.of(x).name] = n
        self.shared, self.room = {}, 0
        for one in tape.entries.values():  # small temporaries of launches alone
            size = one.tensor.untyped_storage().nbytes()
            if not self.by_address or one.kind != "made" or size >= _SHARED:
                continue
            if one.name not in self.returned | called:
                self.shared[one.name] = self.room
                self.room += -(-size // 256) * 256

    def function(self) -> Function:
        """Compile it."""
        self._begin()
        for n, step in enumerate(self.tape.steps):
            self.writes |= n == self.tape.changed
            if isinstance(step, Entry):
                self._allocate(step)
            elif isinstance(step, Call):
                self._call(step)
            else:
                self._start(step)
            kept = self.returned | {*self.shared}
            gone = [
                one.name for one in self.tape.entries.values()
                if self.last.get(one.name) == n and one.name not in kept
            ]  # fmt: skip
            if gone:
                self.lines.append(f"del {', '.join(gone)}")
        image, *others = self.out
        self._unbind(others)
        found = [self._result(image), *map(self._argument, others)]
        self.lines.append(f"return {', '.join(found)},")
        given = ", ".join(one.name for one in self.tape.given)
        body = "".join(f"    {line}\n" for line in self.lines)
        exec(compile(f"def replay({given}):\n{body}", "<recording>", "exec"), self.known)
        return self.known["replay"]

    def _begin(self) -> None:
        """Ask what no key can know, and make room for small temporaries."""
        changed = self._constant(Changed)
        for one, other in sorted(self.tape.twins):
            same = f"{one}.data_ptr() != {other}.data_ptr()"
            self.lines.append(f"if {same}: raise {changed}('two tensors were one')")
        if not self.launched or not self.by_address:
            return
        apart = []
        for one in self.tape.given:
            if one.name in self.launched:
                rest = one.tensor.data_ptr() % 16
                apart.append(f"{self._point(one.name)} - {rest}" if rest else self._point(one.name))
        if apart:
            self.lines.append(f"if ({' | '.join(apart)}) & 15: raise {changed}('alignment')")
        self.lines.append(
            f"stream = {self._constant(machine.stream_reader())}({self.device.index or 0})"
        )
        if self.room:
            empty, kind = self._constant(torch.empty), self._constant(torch.uint8)
            where = self._constant(self.device)
            self.lines.append(f"room = {empty}({self.room}, dtype={kind}, device={where})")
            self.lines.append("p_room = room.data_ptr()")

    def _point(self, name: str) -> str:
        if name not in self.pointers:
            self.pointers.add(name)
            self.lines.append(f"p_{name} = {name}.data_ptr()")
        return f"p_{name}"

    def _allocate(self, one: Entry) -> None:
        if one.name in self.shared:
            return
        if (like := self._like(one.tensor)) is not None:  # which is quicker
            self.lines.append(f"{one.name} = {self._constant(torch.empty_like)}({like})")
            return
        make, kind, where = map(
            self._constant, (torch.empty_strided, one.tensor.dtype, self.device)
        )
        shape, stride = tuple(one.tensor.shape), one.tensor.stride()
        self.lines.append(f"{one.name} = {make}({shape}, {stride}, dtype={kind}, device={where})")

    def _like(self, x: Tensor) -> str | None:
        """Name what was given that `empty_like` makes such a tensor of; strides are in the key."""
        kind = x.dtype, *form(x)
        for name, given, _ in self.tape.given:
            if (given.dtype, *form(given)) == kind and given.device == x.device:
                is_alike = form(torch.empty_like(given, device="meta")) == form(x)
                return name if is_alike and type(given) is Tensor else None
        return None

    def _call(self, step: Call) -> None:
        func = step.operator
        given = [*map(self._argument, step.args)]
        given += [f"{key}={self._argument(value)}" for key, value in step.kwargs.items()]
        quick = _QUICKER.get((func, (*step.kwargs,)), func)
        call = f"{self._constant(quick)}({', '.join(given)})"
        if func._schema.is_mutable:  # what is changed has its name
            self.lines.append(call)
            self.writes |= any(self.tape.of(x).kind == "given" for x in _written(step))
            return
        names = [self.tape.of(x).name if isinstance(x, Tensor) else "_" for x in step.results]
        self.lines.append(f"{', '.join(names)}{',' * (len(func._schema.returns) > 1)} = {call}")
        for name, x in zip(names, step.results, strict=True):
            if name in self.launched | self.returned | self.viewed:
                if self.writes:
                    raise Unrecordable("it goes on after it has changed what was given")
                changed = self._constant(Changed)
                self.lines.append(f"if {name}.stride() != {x.stride()}: raise {changed}('layout')")

    def _start(self, step: Start) -> None:
        kernel, compiled, programs, args, constants = step
        if not self.by_address:
            grid, more = self._constant(kernel[(programs,)]), self._constant(constants)
            self.lines.append(f"{grid}({', '.join(map(self._argument, args))}, **{more})")
            return
        rest = (constants[name] for name in kernel.arg_names[len(args) :])
        given = ", ".join([*map(self._address, args), *map(self._constant, rest)])
        run, function, packed = map(
            self._constant, (compiled.run, compiled.function, compiled.packed_metadata)
        )
        self.lines.append(
            f"{run}({programs}, 1, 1, stream, {function}, {packed}, None, None, None, {given})"
        )

    def _address(self, x: Any) -> str:
        if not isinstance(x, Tensor):
            return self._constant(x)
        if not x.numel():
            return "0"
        one = self.tape.of(x)
        offset = x.data_ptr() - one.tensor.data_ptr()
        if one.name in self.shared:
            return f"p_room + {self.shared[one.name] + offset}"
        name = self._point(one.name)
        return f"{name} + {offset}" if offset else name

    def _tensor(self, x: Tensor) -> str:
        """Write a tensor: by its name, or as a view of what it lies on."""
        one = self.tape.of(x)
        y, offset = one.tensor, x.storage_offset() - one.tensor.storage_offset()
        if x.dtype != y.dtype or x.is_conj() or x.is_neg():
            raise Unrecordable("a tensor is seen as one of another kind")
        if not offset and form(x) == form(y):
            return one.name
        begin = f"{one.name}.storage_offset() + {offset}" if one.kind == "given" else f"{offset}"
        if one.kind != "given" and y.storage_offset():
            raise Unrecordable("an operator returns a part of its storage")
        view = self._constant(torch.as_strided)
        return f"{view}({one.name}, {tuple(x.shape)}, {x.stride()}, {begin})"

    def _result(self, x: Tensor | None) -> str:
        """Write what is returned first: an image is no view, for users may change it in place."""
        if x is None:
            return "None"
        name, one = self._tensor(x), self.tape.of(x)
        if name == one.name or one.kind == "given" or x.ndim < 3:
            return name
        form = f"{x.storage_offset()}, {tuple(x.shape)}, {x.stride()}"
        return f"{one.name}.new_empty(0).set_({one.name}.untyped_storage(), {form})"

    def _unbind(self, results: Sequence[Tensor | None]) -> None:
        """Make views of the rows of a table all at once, where several are returned."""
        rows: dict[str, list[tuple[Tensor, int]]] = {}
        for x in results:
            one = None if x is None else self.tape.of(x)
            if x is None or one is None or one.kind == "given" or not x.numel():
                continue
            for n, row in enumerate(one.tensor.unbind() if one.tensor.ndim > 1 else ()):
                if (x.data_ptr(), x.dtype, *form(x)) == (row.data_ptr(), row.dtype, *form(row)):
                    rows.setdefault(one.name, []).append((x, n))
                    break
        for name, found in rows.items():
            if len(found) > 1:
                self.lines.append(f"r_{name} = {name}.unbind()")
                self.rows |= {id(x): f"r_{name}[{n}]" for x, n in found}

    def _argument(self, x: Any) -> str:
        if id(x) in self.rows:
            return self.rows[id(x)]
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, (list, tuple)) and any(isinstance(one, Tensor) for one in x):
            return f"[{', '.join(map(self._argument, x))}]"
        return self._constant(x)

    def _constant(self, value: Any) -> str:
        is_number = isinstance(value, (bool, int, str)) or (
            isinstance(value, float) and math.isfinite(value)
        )
        if value is None or is_number:
            return repr(value)
        if isinstance(value, (list, tuple)) and all(type(one) in (bool, int) for one in value):
            return repr(tuple(value))
        for name, known in self.known.items():
            if known is value:
                return name
        self.known[name := f"k{len(self.known)}"] = value
        return name


def _read(step: Entry | Call | Start, kind: Any = None) -> list[Tensor]:
    """List the tensors that a step reads, or writes; none, of another kind than is asked for."""
    if isinstance(step, Entry) or (kind is not None and not isinstance(step, kind)):
        return []
    more = step.kwargs if isinstance(step, Call) else {}
    return [x for x in tree_leaves((step.args, more)) if isinstance(x, Tensor)]


def _written(step: Call) -> list[Tensor]:
    """List the tensors that an operator writes, among its arguments."""
    parameters = step.operator._schema.arguments
    given = {one.name: x for one, x in zip(parameters, step.args, strict=False)} | step.kwargs
    kinds = {one.name: one.alias_info for one in parameters}
    found = [x for name, x in given.items() if kinds[name] is not None and kinds[name].is_write]
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]
