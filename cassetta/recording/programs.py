"""The forward of a whole network, traced once and repeated: which nodes, on which tensors.

What the general path does between an image and the result (layers, steps, decisions) ends in a few
calls: nodes of autograd (`applied`) and functions of torch. Which these are, in which order and of
which tensors, follows from the kinds of the tensors, from what the modules are, and from settings;
whoever repeats a program answers for these (`cassetta.layers.repeated`). A trace notes the calls
while the general path runs, and they are written down as straight-line code.

There is no program of a forward in which torch tells the host a value, or which uses a tensor that
came, or was changed, in a way that the trace has not seen.
"""

import functools
import itertools
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from cassetta.kernels.dispatch import PLAIN
from cassetta.recording import recordings

Program = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
"""Takes the images, and the parameters and buffers; returns what the forward returns."""

_METHODS = (
    "__len__", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "numel",
    "size", "storage_offset", "stride",
)  # fmt: skip
_ATTRIBUTES = (
    "_base", "device", "dtype", "is_leaf", "is_meta", "is_nested",
    "is_quantized", "is_sparse", "itemsize", "layout", "ndim", "requires_grad", "shape",
)  # fmt: skip
_ABOUT_FORM: frozenset[Any] = frozenset((
    torch.promote_types, torch.result_type, torch._C._set_grad_enabled,
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
))  # fmt: skip
"""Functions that return the form of a tensor, or what it is a view of: no trace notes them."""

_NEEDLESS: frozenset[Any] = frozenset((
    torch.empty, torch.empty_strided, torch.empty_like, Tensor.new_empty, Tensor.new_empty_strided,
    Tensor.expand, Tensor.detach, Tensor.unbind,
))  # fmt: skip
"""Functions that are not called where nobody uses what they return."""

_CONSTANT = (
    bool, int, float, str, type(None), type(...),
    torch.dtype, torch.device, torch.memory_format, torch.layout, recordings.Held,
)  # fmt: skip

_SMALL = 2**16
"""Elements up to which a trace holds a tensor."""


class _Here(threading.local):
    trace: "Trace | None" = None


_here = _Here()


def calling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls a function: as one call of the program, if one is traced."""
    trace = _here.trace
    return function if trace is None else functools.partial(trace.call, function)


def applied(kind: type[Function], *arguments: Any) -> Any:
    """Return kind.apply(held, *arguments), without what that does for torch's own transforms.

    No kernel runs where one of these is active. What is held is a `recordings.Held`, which stays
    where the call is in a program; None for a compiler.
    """
    if torch.compiler.is_compiling():
        return kind.apply(None, *arguments)
    apply = super(Function, kind).apply  # type: ignore[attr-defined]
    return calling(apply)(recordings.Held(), *arguments)


class _Name(str):
    """What the code calls a tensor."""


class Call(NamedTuple):
    """A step of a program."""

    targets: tuple[_Name | None, ...]  # None: nothing, or a tensor that has a name already
    is_one: bool  # it returns a tensor, not a tuple
    function: Any
    args: Any  # with names for tensors
    kwargs: dict[str, Any]
    grad: bool  # whether gradients are asked for


class Trace(TorchFunctionMode):
    """The calls of a forward, while it is the mode of its thread."""

    def __init__(self, images: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.why = ""  # there is no program
        self._calls: list[Call] = []
        self._known: dict[int, tuple[ReferenceType, _Name, int | None]] = {}
        self._held: list[Tensor] = []
        self._nb_made = 0
        self._grad = torch.is_grad_enabled()
        for kind, several in (("x", images), ("t", tensors)):
            for n, x in enumerate(several):
                if type(x) not in PLAIN or self._knows(x):
                    self._refuse("a tensor is of another kind, or in two places")
                self._know(x, _Name(f"{kind}[{n}]"))

    def __enter__(self) -> "Trace":
        _here.trace = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _here.trace = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_FORM:
            return func(*args, **kwargs)
        return self._noted(func, args, kwargs)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function as one step, whatever it calls itself."""
        _here.trace = None
        try:
            with _pop_mode_temporarily():
                return self._noted(function, arguments, {})
        finally:
            _here.trace = self

    def program(
        self, out: Any, joined: Callable[[Sequence[Call], Any], Sequence[Call]] | None = None
    ) -> Program | None:
        """Write the program that returns what is `out` here; None if there is none.

        Parameters
        ----------
        joined : callable, optional
            Returns the calls of a program that returns `out`, several of them perhaps as one.
        """
        named = self._named(out)
        if self.why:
            return None
        calls = _needed(self._calls, named)
        return _written(joined(calls, named) if joined else calls, named, self._grad)

    def _noted(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        named, options = self._named(args), {key: self._named(x) for key, x in kwargs.items()}
        out = function(*args, **kwargs)
        is_one = isinstance(out, Tensor)
        results = (out,) if is_one else out
        if not isinstance(results, (tuple, list)) or not results:
            self._refuse(f"{function} returns {type(out).__name__}")
            return out
        given = [x for x in _tensors((args, kwargs)) if self._knows(x)]
        changed = {_place(x) for x in given if _version(x) != self._known[id(x)][2]}
        if changed:  # and so are all that lie there
            for x, name in [(one(), name) for one, name, _ in self._known.values()]:
                if x is not None and _place(x) in changed:
                    self._know(x, name)
        targets: list[_Name | None] = []
        for x in results:
            name = None
            if isinstance(x, Tensor) and not self._knows(x):
                self._nb_made += 1
                name = self._know(x, _Name(f"v{self._nb_made}"))
            elif x is not None and not isinstance(x, Tensor):
                self._refuse(f"{function} returns {type(x).__name__} among others")
            targets.append(name)
        grad = torch.is_grad_enabled()
        self._calls.append(Call(tuple(targets), is_one, function, named, options, grad))
        return out

    def _refuse(self, why: str) -> None:
        self.why = self.why or why

    def _knows(self, x: Tensor) -> bool:
        return id(x) in self._known and self._known[id(x)][0]() is x

    def _know(self, x: Tensor, name: _Name) -> _Name:
        """Call a tensor by this name.

        What is large is not held, for it must go when it would. What is small is, to be the same
        object when it is met again: as that which a table is a row of.
        """
        if x.numel() <= _SMALL:
            self._held.append(x)
        self._known[id(x)] = ref(x), name, _version(x)
        return name

    def _named(self, x: Any) -> Any:
        """Return x, in which names stand for tensors."""
        if isinstance(x, Tensor):
            if not self._knows(x):
                self._refuse("nobody has seen where a tensor comes from")
                return _Name("")
            _, name, version = self._known[id(x)]
            if version != _version(x):
                self._refuse("nobody has seen what has changed a tensor")
            return name
        if isinstance(x, (tuple, list)):
            parts = [self._named(one) for one in x]
            if all(map(operator.is_, parts, x)):
                return x
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        parts = (x.start, x.stop, x.step) if isinstance(x, slice) else (x,)
        if not all(isinstance(one, _CONSTANT) for one in parts):
            self._refuse(f"an argument is a {type(x).__name__}")
        return x


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed; torch does not count that of a tensor for inference."""
    return None if x.is_inference() else x._version


def _place(x: Tensor) -> int:
    """Return an address of the storage of a tensor, which its views share."""
    return x.untyped_storage()._cdata


def _tensors(x: Any) -> Iterator[Tensor]:
    """List the tensors among arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for one in x.values() if isinstance(x, dict) else x:
            yield from _tensors(one)


def names(x: Any) -> set[_Name]:
    """List the names of tensors that the program has made, among arguments."""
    if isinstance(x, _Name):
        return {x} if x[0] == "v" else set()
    if isinstance(x, (tuple, list, dict)):
        return set().union(*map(names, x.values() if isinstance(x, dict) else x))
    return set()


class _Code:
    """The text of a program, and what it names."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def function(self, lines: Sequence[str]) -> Program:
        """Compile these lines."""
        body = "".join(f"    {line}\n" for line in lines)
        exec(compile(f"def program(x, t):\n{body}", "<program>", "exec"), self._known)
        return self._known["program"]

    def text(self, x: Any) -> str:
        """Write an argument, or what is returned."""
        if isinstance(x, _Name):
            return x
        if isinstance(x, list):
            return f"[{', '.join(map(self.text, x))}]"
        if isinstance(x, tuple) and _has_name(x):
            inside = ", ".join(map(self.text, x))
            return (
                f"{self.constant(type(x))}({inside})" if hasattr(x, "_fields") else f"({inside},)"
            )
        is_short = x is None or isinstance(x, (bool, int, str))
        if is_short or (isinstance(x, float) and math.isfinite(x)):
            return repr(x)
        return self.constant(x)

    def constant(self, x: Any) -> str:
        """Name an object."""
        for name, known in self._known.items():
            if known is x:
                return name
        self._known[name := f"k{len(self._known)}"] = x
        return name

    def call(self, call: Call, is_read: bool) -> str:
        """Write a call; its results get their names if any of them is read later."""
        given = [*map(self.text, call.args)]
        given += [f"{key}={self.text(x)}" for key, x in call.kwargs.items()]
        made = "".join(f"{name or '_'}, " for name in call.targets) if is_read else ""
        results = made.rstrip(", ") if call.is_one else made
        return f"{results}{' = ' * is_read}{self.constant(call.function)}({', '.join(given)})"


def _has_name(x: Any) -> bool:
    return isinstance(x, _Name) or (isinstance(x, (tuple, list)) and any(map(_has_name, x)))


def _needed(calls: Sequence[Call], out: Any) -> list[Call]:
    """Return the calls without those of which nobody uses what they return."""
    alive, found = names(out), []
    for call in reversed(calls):
        if call.function not in _NEEDLESS or not alive.isdisjoint(call.targets):
            alive |= names((call.args, call.kwargs))
            found.append(call)
    return found[::-1]


def _written(calls: Sequence[Call], out: Any, grad: bool) -> Program:
    """Compile the code of calls that return `out`; what nobody reads any more is freed at once."""
    code, alive = _Code(), names(out)
    last, steps = f"return {code.text(out)}", []
    for call in reversed(calls):
        used, is_read = names((call.args, call.kwargs)), not alive.isdisjoint(call.targets)
        gone = used - alive
        if is_read:
            gone |= {name or _Name("_") for name in call.targets} - alive
        alive = (alive | used) - {*call.targets}
        steps.append((call.grad, code.call(call, is_read), ", ".join(gone)))
    lines: list[str] = []
    for asked, several in itertools.groupby(reversed(steps), lambda step: step[0]):
        if asked != grad:
            lines.append(f"with {code.constant(torch.set_grad_enabled)}({asked}):")
        for _, text, gone in several:
            indent = "    " * (asked != grad)
            lines += [indent + text, *[f"{indent}del {gone}"] * bool(gone)]
    return code.function([*lines, last])
