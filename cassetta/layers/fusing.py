"""How layers become steps of a pending transform, and which modules may hand one on.

A module that fuses has, beside `forward`, a method `defer`: it takes a `Deferred` and returns one.
Containers call it where nobody can tell the difference: where the module is as we wrote it, and
carries no hook. Any other module meets tensors, as always.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import Deferred, Normalization, Pool, Running, materialize
from cassetta.kernels import dispatch
from cassetta.kernels.dispatch import Choice
from cassetta.kernels.types import Moments
from cassetta.layers.activations import activation_of
from cassetta.layers.conv import Conv
from cassetta.layers.dropout import ChannelDropout
from cassetta.layers.norm import (
    BatchNorm,
    InstanceNorm,
    LayerNorm,
    check_statistics,
    process_group,
)

_ANY = (1, 2, 3)  # for how many spatial dimensions a layer is made
_BATCH: dict[type, tuple[int, ...]] = {
    BatchNorm: _ANY, nn.SyncBatchNorm: _ANY,
    nn.BatchNorm1d: (1,), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,),
}  # fmt: skip
_INSTANCE: dict[type, tuple[int, ...]] = {
    InstanceNorm: _ANY,
    nn.InstanceNorm1d: (1,), nn.InstanceNorm2d: (2,), nn.InstanceNorm3d: (3,),
}  # fmt: skip
_GROUP: dict[type, tuple[int, ...]] = {LayerNorm: _ANY, nn.GroupNorm: _ANY}
_NORM = {**_BATCH, **_INSTANCE, **_GROUP}
_DROPOUT: dict[type, tuple[int, ...]] = {
    ChannelDropout: _ANY,
    nn.Dropout1d: (1,),
    nn.Dropout2d: (2,),
    nn.Dropout3d: (3,),
}


class _Listener(threading.local):
    """What ran in this thread, while somebody asks, and what it was chosen for."""

    log: list["Ran"] | None = None
    training: bool | None = None


_listener = _Listener()


def deferred_call(module: nn.Module) -> Callable[..., Any]:
    """Return what calls the module on `Deferred` images: it takes and returns them if it can.

    Any other module takes tensors, and returns one; if it does not, TypeError is raised.
    """
    if defers(module):
        return module.defer  # type: ignore[return-value]

    def called(*images: Any) -> Tensor:
        out = module(*map(materialize, images))
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(module).__name__} returns a {type(out).__name__}: within a group, a level "
                "or a backbone, a module returns one tensor"
            )
        return out

    return called


Steps = Sequence[Callable[[Deferred], Any]]


def steps(module: nn.Module, x: Deferred) -> Steps:
    """Return what the module does to x, step by step, while nothing changes.

    Within `listening`, the only step is the module's own `defer`, so that the stack of calls shows
    which module computes.
    """
    has_steps = hasattr(type(module), "deferred_steps") and defers(module)
    if is_observed() or not has_steps:
        return [deferred_call(module)]
    return module.deferred_steps(x)  # type: ignore[operator]


class Ran(NamedTuple):
    """A block that ran, who ran it, and on what."""

    block: nn.Module
    choice: Choice
    images: tuple[Tensor, ...]  # that it read side by side, without data
    key: str  # of the block on this image
    engines: Mapping[str, str | None]  # why each has no kernel for it; None if it has


@contextmanager
def listening(training: bool) -> Iterator[list[Ran]]:
    """What runs in this block of code, in order, chosen as for training or as for inference."""
    before = _listener.log, _listener.training
    log: list[Ran] = []
    _listener.log, _listener.training = log, training
    try:
        yield log
    finally:
        _listener.log, _listener.training = before


def is_observed() -> bool:
    """Tell whether this thread is within `listening`."""
    return _listener.log is not None


def choose(block: nn.Module, layers: dict[str, nn.Module | None], x: Deferred) -> Choice:
    """Choose the engine of a block of these layers on x; whoever listens is told.

    Parameters
    ----------
    layers : dict
        Modules by letter: n norm, c conv, d dropout, a activation, x attention; in their order.
    """
    why = _why_plain(block, layers, x)
    found, what = lacks(layers["c"]), lambda: ", ".join(words(layers))
    if why is None and process_group(layers.get("n")) is not None:
        choice = Choice(dispatch.DEFAULT, "", "torch's own SyncBatchNorm is for GPUs only")
        return _told(block, choice, x, what, found)
    return choose_for(block, x, what, why, found, layers["c"])


def lacks(conv: nn.Module | None, convolves: bool = True) -> dict[str, str | None]:
    """Tell of each engine why it has no kernel for a convolution of ours; None if it has.

    Where nothing is convolved, the default engine alone is one, for all would do the same.
    """
    found: dict[str, str | None] = {"reference": None}
    geometry = conv.geometry if isinstance(conv, Conv) else None
    for name, engine in dispatch.ENGINES.items():
        found[name] = None
        if not convolves and name != dispatch.DEFAULT:
            found[name] = "there is nothing to convolve"
        elif isinstance(conv, Conv):
            found[name] = engine.supports(geometry, conv.kernel_size)
    return found


def choose_for(
    module: nn.Module, x: Deferred, what: Callable[[], str], why: str | None,
    lacks: Mapping[str, str | None], conv: nn.Module | None = None,
) -> Choice:  # fmt: skip
    """Choose an engine, which must lack nothing, for a module on x; with a reason `why`, none.

    `what` tells what it does, if a table is looked into, or somebody listens; `conv` convolves.
    """
    taps, product = math.prod(conv.kernel_size) if isinstance(conv, Conv) else 0, None
    if isinstance(conv, Conv) and len(x.parts) == 1:  # (of two images, none marches)
        product = lambda: conv.product(x.shape, _rounded(x.image) or x.image.dtype)  # noqa: E731
    use = dispatch.Use(taps, x.parts[0].is_last, _is_training(), product)
    choice = dispatch.choose(x.image, why, lambda: key(what(), x), lacks, use)
    return _told(module, choice, x, what, lacks)


def _told(
    module: nn.Module, choice: Choice, x: Deferred, what: Callable[[], str],
    lacks: Mapping[str, str | None],
) -> Choice:  # fmt: skip
    """The choice, of which whoever listens is told."""
    if _listener.log is not None:
        images = tuple(part.like() for part in x.parts)
        _listener.log.append(Ran(module, choice, images, key(what(), x), lacks))
    return choice


def words(layers: dict[str, nn.Module | None]) -> list[str]:
    """What these layers do."""
    words = []
    for letter, layer in layers.items():
        if isinstance(layer, Conv):
            bias = " bias" * (layer.bias is not None)
            words.append(f"conv {layer.out_channels} k{layer.kernel_size}{_walk(layer)}{bias}")
        elif letter == "n" and type(layer) in _NORM:
            pool = _pool(layer)
            words.append("fixed norm" if pool is None else f"{pool.kind} norm {pool.groups}")
        elif letter == "d":
            words += ["dropout"] if layer is not None and layer.training else []
        elif layer is not None:
            words.append(type(layer).__name__)
    return words


def _walk(conv: Conv) -> str:
    """How a convolution walks, as far as it is not as in most blocks."""
    stride, padding, dilation, groups = conv.geometry
    words = f" d{dilation}"
    words += f" s{stride}" if max(stride) > 1 else ""
    words += "" if conv.padding == "same" else f" p{padding}"
    return words + (f" g{groups}" if groups > 1 else "")


def key(what: str, x: Deferred) -> str:
    """The name of what is done with an image, or with two, in the table of what was measured."""
    image, parts = x.image, x.parts
    n, _, *size = image.shape
    channels = "+".join(str(part.shape[1]) for part in parts)
    kind = f"{'last' if parts[0].is_last else 'first'} {image.dtype} {_rounded(image) or ''}"
    kind, use = kind.replace("torch.", "").strip(), "training" if _is_training() else "inference"
    return f"{'x'.join(map(str, (n, channels, *size)))} {kind}, {what}, {use}"


def _rounded(image: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast rounds an image to, if it does."""
    kind = image.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _is_training() -> bool:
    """Tell whether gradients are asked for; while somebody listens, whether the network trains."""
    return torch.is_grad_enabled() if _listener.training is None else _listener.training


def _why_plain(block: nn.Module, layers: dict[str, nn.Module | None], x: Deferred) -> str | None:
    """Why no kernel covers a block of these layers, as a sentence; None if one does."""
    conv, norm, activation, dropout = (layers.get(letter) for letter in "cnad")
    known = list(layers.values())
    for child in block.children():  # (torch 2.8 exports neither `any` nor `in` of modules)
        if not [layer for layer in known if layer is child]:
            return "layers were appended to it"
    if (why := why_hooked(layers.values())) is not None:
        return why
    if type(conv) is not Conv:
        return f"its convolution is a {type(conv).__name__}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    size = conv.geometry.size_of(x.shape[2:], conv.kernel_size)
    if any(n < 1 for n in size):
        return "nothing is left of the image"
    if (why := dispatch.why_too_large(size)) is not None:
        return why
    if norm is not None and (why := _why_no_norm(norm, x.image)):
        return why
    if activation is not None and activation_of(activation) is None:
        return f"no kernel has the activation {type(activation).__name__}"
    if dropout is not None and len(x.shape) - 2 not in _DROPOUT.get(type(dropout), ()):
        return f"no kernel has the dropout {type(dropout).__name__} in {len(x.shape) - 2}-D"
    alone = process_group(norm) is None  # else the other processes wait for what is found here
    return "the batch is empty" if alone and x.shape[0] == 0 else None


def why_hooked(layers: Iterable[nn.Module | None]) -> str | None:
    """Why these layers must be called as users call them, as a sentence."""
    for layer in layers:
        if layer is not None and not _is_bare(layer):
            return f"a hook is attached to its {type(layer).__name__}"
    return None


def _why_no_norm(norm: Any, x: Tensor) -> str | None:
    """Combinations that torch would refuse, or take otherwise, are left to it."""
    if x.ndim - 2 not in _NORM.get(type(norm), ()):
        return f"no kernel has the norm {type(norm).__name__} in {x.ndim - 2}-D"
    if (norm.weight is None) != (norm.bias is None):
        return f"its {type(norm).__name__} has a weight or a bias, but not both"
    return None


def step(letter: str, layer: Any) -> Callable[[Deferred], Deferred]:
    """Return what a layer, not a convolution, does: a norm, dropout, activation or attention.

    It holds while the attributes of the layer are as they are.
    """
    return {"n": _normalization, "d": _dropping, "a": _activating, "x": _attending}[letter](layer)


def _attending(layer: Any) -> Callable[[Deferred], Deferred]:
    """Return an attention as a step."""
    return lambda x: Deferred(layer(materialize(x)))


def _normalization(norm: Any) -> Callable[[Deferred], Deferred]:
    """Return a norm as a step, which keeps running statistics as the norm's own forward does."""
    kind = type(norm)
    groups, batch = kind in _GROUP, kind in _BATCH
    found = _pool(norm)
    pool, is_fixed = found or Pool("fixed"), found is None
    if kind is nn.SyncBatchNorm and not is_fixed:
        pool = Pool(pool.kind, pool.groups, process_group(norm))
    keeps = not groups and norm.running_mean is not None
    tracks = not is_fixed and keeps and (norm.track_running_stats or not batch)
    channels, eps = norm.num_channels if groups else norm.num_features, norm.eps
    momentum = norm.momentum if tracks else None

    def normalized(x: Deferred) -> Deferred:
        n, c, *size = x.shape
        if c != channels:
            raise ValueError(
                f"inp has {c} channels, but {kind.__name__} normalizes {channels} channels"
            )
        check_statistics(norm, n, size, "")
        fixed = Moments(norm.running_mean, norm.running_var) if is_fixed else None
        running = None
        if tracks:
            batches = norm.num_batches_tracked if batch else None
            running = Running(norm.running_mean, norm.running_var, batches, momentum, not batch)
        own = Normalization(norm.weight, norm.bias, eps, pool, fixed, running)
        return x.normalized(own, groups and _is_promoting(x))

    return normalized


def _pool(norm: Any) -> Pool | None:
    """Which channels share their statistics; None if these are fixed."""
    kind = type(norm)
    if kind in _GROUP:
        return Pool("group", norm.num_groups)
    batch = kind in _BATCH
    own = norm.running_mean is None if batch else not norm.track_running_stats
    return Pool("batch" if batch else "instance") if norm.training or own else None


def _dropping(dropout: Any) -> Callable[[Deferred], Deferred]:
    """Return channel dropout as a step, which drops the channels its own forward would drop."""
    p = dropout.p
    if not dropout.training or p == 0:
        return lambda x: x

    def dropped(x: Deferred) -> Deferred:
        n, c, *size = x.shape
        ones = x.image.new_ones(n, c, *[1] * len(size))
        factor = torch.feature_dropout(ones, p, True).reshape(n, c)
        return x.scaled(factor.to(torch.promote_types(factor.dtype, torch.float32)))

    return dropped


def _activating(module: Any) -> Callable[[Deferred], Deferred]:
    """Return an activation as a step."""
    activation = activation_of(module)
    assert activation is not None
    learns, promotes = isinstance(module, nn.PReLU), type(module) in _PROMOTED

    def activated(x: Deferred) -> Deferred:
        weight = module.weight if learns else None
        return x.activated(activation, weight, promotes and _is_promoting(x))

    return activated


def _is_promoting(x: Deferred) -> bool:
    """Tell whether autocast has torch compute some layers in float32, as it does on a GPU alone.

    These are `_GROUP` and `_PROMOTED`. Kernels compute in float32 whatever they store, so that
    only what others see is stored so.
    """
    return x.image.device.type == "cuda" and torch.is_autocast_enabled("cuda")


_PROMOTED = (nn.Softplus,)


def fuses(kind: type) -> type:
    """Class decorator: `defer` may stand for this `forward`, and for no other."""
    _FORWARD[kind] = kind.forward  # type: ignore[attr-defined]
    return kind


_FORWARD: dict[type, Any] = {}


def defers(module: nn.Module) -> bool:
    """Whether `module.defer` does what calling it does: nobody has put another forward there."""
    kind = type(module)
    known = _FORWARD.get(kind)
    if known is None:
        own = [_FORWARD[base] for base in kind.__mro__ if base in _FORWARD]  # (torch 2.8 traces it)
        known = own[0] if own else None
    return known is not None and kind.forward is known and _is_bare(module)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling this module is calling the forward of its class, and nothing else."""
    return (
        type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch_module._has_any_global_hook()
    )
