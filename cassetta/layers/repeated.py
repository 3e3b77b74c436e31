"""Networks whose forward is repeated as a program (`functional.programs`).

The second forward on a kind of image is traced; from then on its program runs, as long as the
modules, the kinds of their parameters and the settings of the process are as they were.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import chains, programs, recordings
from cassetta.kernels import dispatch, layout
from cassetta.layers import decisions, fusing

F = TypeVar("F", bound=Callable[..., Any])

VARIANTS = 4
"""How many kinds of parameters are known at a time for a kind of image, such as frozen ones."""

_SEEN, _NEVER = "seen", "never"


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
            variants = decisions.add(found, key, [])
        for n, (are_alike, program) in enumerate(variants):
            if not are_alike(*tensors):
                continue
            if program is _SEEN:
                traced, out = _traced(forward, self, images, options, tensors)
                variants[n] = are_alike, _NEVER if traced is None else traced
                return out
            return (
                forward(self, *images, **options) if program is _NEVER else program(images, tensors)
            )
        if len({*map(id, tensors)}) == len(tensors):
            variants[:] = [*variants[1 - VARIANTS :], (recordings.alike(tensors), _SEEN)]
        return forward(self, *images, **options)

    return whole  # type: ignore[return-value]


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
        and _saving(False) is None
        and "_is_replica" not in module.__dict__
    )


_saving: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore


def _key(images: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """Return all that a forward depends on, but for its module."""
    forms: list[Any] = []
    for x in images:
        shape = x.shape
        forms += shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() % 16
        if len(shape) > 2 and shape[1] % layout.WORD:
            forms.append(layout.is_in_words(x))
    first = images[0]
    return (
        *options.items(), *forms, torch.is_inference_mode_enabled(), decisions.process(first),
        recordings.settings(first),
    )  # fmt: skip


def _traced(
    forward: Callable[..., Any], module: nn.Module, images: Any, options: Any, tensors: Any
) -> tuple[programs.Program | None, Any]:
    """Return the program of a forward, or None, and what it returned now."""
    if not _is_ours(module):
        return None, forward(module, *images, **options)
    with programs.Trace(images, tensors) as trace:
        out = forward(module, *images, **options)
    return trace.program(out, chains.joined), out


def _is_ours(module: nn.Module) -> bool:
    """Tell whether it is known what a module and those within do, beside calling torch."""
    first, *within = module.modules()
    ours = all(_is_known(type(one)) for one in (first, *within))
    return ours and fusing.why_hooked(within) is None


def _is_known(kind: type[nn.Module]) -> bool:
    homes = kind.__module__, kind.forward.__module__
    return all(home.startswith(("cassetta.", "torch.nn.modules.")) for home in homes)
