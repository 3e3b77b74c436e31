"""A pass, stated once: its record, and the operator of torch that follows from it.

An operator takes tensors, numbers and words. Its schema follows from the signature of the
reference, by the type of each argument (`_KINDS`); so do what callers call, which takes arguments
apart, and what runs an operator or says what it returns, which puts them together again. These
functions are generated, as those of a named tuple are: a call costs what it would if they were
written by hand, and tracers see plain code.
"""

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.utils import get_layout_constraint_tag
from torch.library import Library, register_autograd, register_fake

from cassetta.kernels import types
from cassetta.kernels.examples import Sample

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PassRecord(Generic[P, R]):
    """What there is to say of a pass beside its formula, its kernel and its gradient."""

    reference: Callable[P, R]  # the formula; its name and signature are those of the operator
    launcher: str  # module and function that launch the kernel: imported late, with triton
    fake: Callable[..., Any]  # takes what the reference takes, and allocates what it returns
    examples: Callable[[Sample], Iterable[tuple[Any, ...]]]  # what it may be called with
    of: str = "images"  # or "products" (convolutions), or "tables" (N, C)
    flops: Callable[..., int] | None = None  # of the shapes of its results and arguments
    judge: str = ""  # the argument that decides who runs it; the first, if nothing is said
    planned: bool = False  # whether the tuner may plan it, by a `plans.Plan`
    changes: tuple[str, ...] = ()  # the tensors that it writes, among its arguments

    @property
    def name(self) -> str:
        """That of the pass, of its operator and of its functions."""
        return self.reference.__name__

    def names(self) -> list[str]:
        """List the names of the arguments of the pass."""
        return [*self._kinds()]

    @property
    def schema(self) -> str:
        """The arguments and results of the operator, as torch writes them."""
        arguments, letters = [], iter("abcdefgh")
        for name, kind in self._kinds().items():
            for type_, field in kind.flat(name):
                if name in self.changes:
                    type_ = type_.replace("Tensor", f"Tensor({next(letters)}!)")
                arguments.append(f"{type_} {field}")
        made = self.reference.__annotations__["return"]
        count = 1 if made is Tensor else len(getattr(made, "_fields", None) or made.__args__)
        results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        return f"({', '.join(arguments)}) -> {results}"

    def stated(self) -> Callable[P, R]:
        """Define the operator of the pass, and return the function that calls it."""
        PASSES[self.name] = self
        name = f"cassetta::{self.name}"
        _LIBRARY.define(self.name + self.schema)
        operator = getattr(torch.ops.cassetta, self.name).default
        register_fake(name, _known_to_inductor(operator, self.together(self.fake)), lib=_LIBRARY)
        if not self.changes:  # torch takes no gradient for what writes
            register_autograd(name, _refuse, lib=_LIBRARY)
        return self.caller(operator)

    def launched(self) -> Callable[P, R]:
        """Import and return what launches the kernel."""
        module, _, name = self.launcher.partition(".")
        return getattr(importlib.import_module(f"cassetta.kernels.{module}"), name)

    def caller(self, operator: Any) -> Callable[P, R]:
        """Make the function that has the reference's signature and calls the operator."""
        kinds, returned = self._kinds(), self.reference.__annotations__["return"]
        parts = [f"*pack_{k}({k})" if "," in kind.fields else k for k, kind in kinds.items()]
        call, known = f"operator({', '.join(parts)})", {"operator": operator}
        known |= {f"pack_{k}": kind.pack for k, kind in kinds.items() if "," in kind.fields}
        if hasattr(returned, "_fields"):
            call, known["returned"] = f"returned(*{call})", returned
        made = _function(self.name, kinds, call, known)
        made.__defaults__ = self.reference.__defaults__  # type: ignore[attr-defined]
        made.__annotations__ = self.reference.__annotations__
        made.__doc__ = f"`reference.{self.name}`, by whoever runs it."
        return made

    def together(self, run: Callable[..., Any], judged: bool = False) -> Callable[..., Any]:
        """Make the function that has the operator's arguments and calls `run` with the pass's own.

        If `judged`, `run` is first called with the tensor that decides, and returns what runs.
        """
        kinds = self._kinds()
        fields = {k: ", ".join(own for _, own in kind.flat(k)) for k, kind in kinds.items()}
        known = {f"make_{k}": kind.unpack for k, kind in kinds.items() if kind.unpack}
        parts = [f"make_{k}(({own}))" if f"make_{k}" in known else k for k, own in fields.items()]
        judge, *_ = fields[self.judge or next(iter(fields))].split(",")
        call = f"run({judge})({', '.join(parts)})" if judged else f"run({', '.join(parts)})"
        return _function(self.name, fields.values(), call, {"run": run, **known})

    def counted(self, *arguments: Any, out_shape: Any) -> int:
        """The operations of the operator, of shapes, as torch's counter asks for them."""
        flops = functools.partial(self.flops, out_shape) if self.flops else lambda *_: 0
        return self.together(flops)(*arguments)

    def _kinds(self) -> "dict[str, _Kind]":
        parameters = inspect.signature(self.reference).parameters
        return {name: _KINDS[one.annotation] for name, one in parameters.items()}


def _known_to_inductor(operator: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fake`, which first registers the operator with inductor as inductor would do itself.

    Before torch 2.13, inductor writes for its log, which nobody reads, all that an operator depends
    on when it meets one that it does not know: time and memory grow as 2 to the number of blocks
    before it (`torch._inductor.graph.GraphLowering.call_function`).
    """

    def run(*arguments: Any) -> Any:
        inductor: Any = sys.modules.get("torch._inductor.lowering")
        if inductor is not None and operator not in inductor.lowerings:
            tag = get_layout_constraint_tag(operator, with_default=True)
            constraint = inductor.tag_to_layout_constraint(tag)
            inductor.make_fallback(operator, constraint, warn=False)
        return fake(*arguments)

    return run


class _Kind(NamedTuple):
    """A type of argument, and what it is for an operator: one argument, or several."""

    fields: str  # their types, and names if there are several
    pack: Callable[[Any], Any] = tuple  # makes the several
    unpack: Callable[[Any], Any] | None = None  # undoes it; None of what stays as it is

    def flat(self, name: str) -> list[tuple[str, str]]:
        """List the operator's arguments for an argument of this name: types and names."""
        fields = (field.split() for field in self.fields.split(", "))
        return [(type_, "_".join([name, *own])) for type_, *own in fields]


def _numbers(geometry: types.Geometry) -> tuple[list[int], list[int], list[int]]:
    """A geometry without groups, as the arguments of an operator."""
    stride, padding, dilation, groups = geometry
    if groups != 1:
        raise ValueError(f"groups={groups}: our own convolutions have one; `library.conv` has more")
    return list(stride), [side for pair in padding for side in pair], list(dilation)


def _geometry(numbers: tuple[list[int], list[int], list[int]]) -> types.Geometry:
    """What `_numbers` took apart."""
    stride, padding, dilation = numbers
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return types.Geometry(tuple(stride), pairs, tuple(dilation))


_KINDS: dict[Any, _Kind] = {
    Tensor: _Kind("Tensor"),
    Tensor | None: _Kind("Tensor?"),
    torch.dtype: _Kind("ScalarType"),
    bool: _Kind("bool"),
    float: _Kind("float"),
    int: _Kind("SymInt"),
    tuple[int, ...]: _Kind("int[]", unpack=tuple),
    types.Size: _Kind("SymInt[]", unpack=tuple),
    types.Prologue: _Kind(
        "Tensor? s1, Tensor? t1, str act, float p, float q, Tensor? slope, Tensor? s2, Tensor? t2",
        types.flat, types.unflat,
    ),
    types.Activation | None: _Kind(
        "str? act, float p, float q", lambda act: (None, 0.0, 0.0) if act is None else act,
        lambda f: None if f[0] is None else types.Activation(*f),
    ),
    types.Fold | None: _Kind(
        "Tensor? a, Tensor? k, Tensor? centre", lambda fold: (None,) * 3 if fold is None else fold,
        lambda f: None if f[0] is None else types.Fold(*f),
    ),
    types.Geometry: _Kind("int[] stride, int[] padding, int[] dilation", _numbers, _geometry),
    types.Grid: _Kind(
        "float[] shift, float[] step, float[] start", unpack=lambda f: types.Grid(*map(tuple, f))
    ),
    types.Moments: _Kind("Tensor mean, Tensor var", unpack=types.Moments._make),
    types.Pooling: _Kind("str kind, int groups", unpack=types.Pooling._make),
}  # fmt: skip


def _function(name: str, parameters: Iterable[str], returned: str, known: dict[str, Any]) -> Any:
    """Make a function of this module from the code of what it returns, which may name `known`."""
    inner = f"    def {name}({', '.join(parameters)}):\n        return {returned}\n"
    text = f"def make({', '.join(known)}):\n{inner}    return {name}"
    made: dict[str, Any] = {}
    exec(compile(text, f"<{__name__}: {name}>", "exec"), globals(), made)
    return made["make"](**known)


PASSES: dict[str, PassRecord[Any, Any]] = {}
"""All that are stated, by name."""

_LIBRARY = Library("cassetta", "FRAGMENT")


_RUNS: dict[str, Callable[..., Any]] = {}


class _Here(threading.local):
    """Of this thread, what notes its launches, and starts them; None if nothing does."""

    tape: Any = None


here = _Here()


def run(operator: Any) -> Callable[..., Any]:
    """Return the function that runs an operator of ours, for a tape, which runs it step by step."""
    return _RUNS[operator.name().partition(".")[0]]


def run_by(passes: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Let every operator be run by what `passes` names for a tensor; return `passes`."""
    for name, record in PASSES.items():
        run = record.together(lambda x, name=name: getattr(passes(x), name), judged=True)
        _RUNS[f"cassetta::{name}"] = run
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return passes


def count_operations() -> None:
    """Tell the counters of torch that are made from now on what each operator counts."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # imports triton

    for name, record in PASSES.items():
        operator = getattr(torch.ops.cassetta, name)
        if operator not in flop_registry:
            register_flop_formula(operator)(record.counted)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "an operator of cassetta was called outside of its autograd.Function and has no gradient: "
        "export a network that is to be trained within `with cassetta.use_backend('reference'):`"
    )
