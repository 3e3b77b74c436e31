"""Networks whose forward is repeated as a program (`recording.programs`).

The second forward on a kind of image is traced; from then on its program runs, as long as the
modules, the kinds of their parameters and the settings of the process are as they were.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import chains
from cassetta.kernels import dispatch
from cassetta.layers import decisions, fusing
from cassetta.recording import programs, recordings

F = TypeVar("F", bound=Callable[..., Any])

VARIANTS = 4
"""How many kinds of parameters are known at a time for a kind of image, such as frozen ones."""

LOOKED_AT = (
    "no kernel takes such an image, or somebody looks at operators, launches or modules, or "
    "forbids replays"
)
"""Why nothing is repeated, whatever the module."""

_SEEN = "seen"
_forwards: set[Any] = set()  # that are decorated


class _Refused(str):
    """Why a forward has no program."""


class _Variants(list[tuple[Callable[..., bool], Any]]):
    """For kinds of parameters, a program, or why there is none, or that they were seen once."""


def repeated(forward: F) -> F:
    """Decorate the forward of a module of tensors, so that it is repeated where it may be."""

    @functools.wraps(forward)
    def whole(self: nn.Module, *images: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _may_repeat(self, images, options):
            return forward(self, *images, **options)
        now = decisions.of(self)
        found, tensors = now.found, now.tensors()
        key = _key(images, options)
        variants = found.get(key)
        if variants is None:
            variants = decisions.add(found, key, _Variants())
        for n, (are_alike, program) in enumerate(variants):
            if not are_alike(*tensors):
                continue
            if program is _SEEN:
                traced, out = _traced(forward, self, images, options, tensors)
                variants[n] = are_alike, traced
                return out
            if type(program) is _Refused:
                return forward(self, *images, **options)
            return program(images, tensors)
        if not _share(tensors):
            variants[:] = [*variants[1 - VARIANTS :], (recordings.alike(tensors), _SEEN)]
        return forward(self, *images, **options)

    _forwards.add(whole)
    return whole  # type: ignore[return-value]


def may_be(module: nn.Module) -> bool:
    """Tell whether the forward of a module is decorated."""
    return getattr(type(module), "forward", None) in _forwards


def why_not(module: nn.Module, image: Tensor) -> str | None:
    """Explain in a sentence why no program repeats a module's forward; None if nothing is known.

    Whether torch tells the host a value on the way, say, is known once it was traced, in the second
    forward on a kind of image.
    """
    if not _may_repeat(module, (image,), {}):
        return LOOKED_AT
    if (why := _why_unknown(module)) is not None:
        return why
    known = decisions.of(module)
    if _share(known.tensors()):
        return "a parameter or buffer is in two places"
    own = known.found.get(_key((image,), {}))  # not of modules within, which get other images
    several = [own] if own else [one for one in known.found.values() if type(one) is _Variants]
    told = [one for _, one in itertools.chain.from_iterable(several)]
    refused = [str(one) for one in told if type(one) is _Refused]
    return refused[-1] if refused and len(refused) == len(told) else None


def _share(tensors: list[Tensor]) -> bool:
    """Tell whether one tensor is in two places: of these no program can tell which is meant."""
    return len({*map(id, tensors)}) < len(tensors)


def _may_repeat(module: nn.Module, images: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Tell whether nobody looks at what happens within, and it is of plain images."""
    for x in images:
        if type(x) not in dispatch.PLAIN:
            return False
    for option in options.values():
        if type(option) is not bool:
            return False
    return (
        len(images) > 0
        and recordings.may_replay(images[0])
        and not fusing.is_observed()
        and not torch_module._has_any_global_hook()
        and "_is_replica" not in module.__dict__
    )


def _key(images: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """Return all that a forward depends on, but for its module."""
    forms: list[Any] = []
    for x in images:
        forms += *recordings.form(x), x.requires_grad, x.data_ptr() % 16
    first = images[0]
    return (
        *options.items(), *forms, torch.is_inference_mode_enabled(), decisions.process(first),
        recordings.settings(first), recordings.are_saved_by_hooks(),
    )  # fmt: skip


def _traced(
    forward: Callable[..., Any], module: nn.Module, images: Any, options: Any, tensors: Any
) -> tuple[programs.Program | _Refused, Any]:
    """Return the program of a forward, or why there is none, and what it returned now."""
    if (why := _why_unknown(module)) is not None:
        return _Refused(why), forward(module, *images, **options)
    with programs.Trace(images, tensors) as trace:
        out = forward(module, *images, **options)
    # where saved tensors are counted, as by checkpoints, they are those of the general path
    program = trace.program(out, None if recordings.are_saved_by_hooks() else chains.joined)
    return _Refused(trace.why) if program is None else program, out


def _why_unknown(module: nn.Module) -> str | None:
    """Explain in a sentence why it is unknown what a module does beside calling torch, if it is."""
    first, *within = module.modules()
    for one in first, *within:
        if not _is_known(type(one)):
            return f"it is unknown what its {type(one).__name__} depends on"
    return fusing.why_hooked(within)


def _is_known(kind: type[nn.Module]) -> bool:
    if issubclass(kind, torch.jit.ScriptModule):  # whose class has no `forward` to ask
        return False
    homes = kind.__module__, kind.forward.__module__
    return all(home.startswith(("cassetta.", "torch.nn.modules.")) for home in homes)
