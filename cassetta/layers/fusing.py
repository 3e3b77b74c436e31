"""How layers become steps of a pending transform, and which modules may hand one on.

A module that fuses has, beside `forward`, a method `defer`: it takes a `Deferred` and returns one.
Containers call it where nobody can tell the difference: where the module is as we wrote it, and
carries no hook. Any other module meets tensors, as always.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import Deferred, Pool, defer, materialize
from cassetta.kernels import dispatch
from cassetta.kernels.types import Activation, Moments
from cassetta.layers.conv import Conv
from cassetta.layers.dropout import ChannelDropout
from cassetta.layers.norm import BatchNorm, InstanceNorm, LayerNorm, check_statistics

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

_listener = threading.local()
"""`log`: which blocks ran in this thread, and why not fused, while somebody asks."""


def run(module: nn.Module, x: Tensor | Deferred) -> Tensor | Deferred:
    """What the module makes of x, pending transforms and all if it can hand them on."""
    if _defers(module):
        return module.defer(defer(x))  # type: ignore[operator]
    return module(materialize(x))


def run_as_written(module: nn.Module, x: Tensor | Deferred) -> Tensor:
    """`run`, with a tensor in the end."""
    return materialize(run(module, x))


@contextmanager
def listening() -> Iterator[list[tuple[nn.Module, str | None]]]:
    """What is noted in this block of code, in the order of execution."""
    before = getattr(_listener, "log", None)
    _listener.log = log = []
    try:
        yield log
    finally:
        _listener.log = before


def note(block: nn.Module, why: str | None) -> None:
    """Tell who asks that a block ran, fused (None) or not, and then why not."""
    log = getattr(_listener, "log", None)
    if log is not None:
        log.append((block, why))


def why_plain(layers: dict[str, nn.Module | None], x: Deferred) -> str | None:
    """Why a block of these layers runs as plain PyTorch on x, as a sentence; None if it does not.

    Parameters
    ----------
    layers : dict
        Modules by letter: n norm, c conv, d dropout, a activation, x attention.
    """
    conv, norm, activation, dropout = (layers.get(letter) for letter in "cnad")
    for layer in layers.values():
        if layer is not None and not _is_bare(layer):
            return f"a hook is attached to its {type(layer).__name__}"
    if type(conv) is not Conv:
        return f"its convolution is a {type(conv).__name__}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if norm is not None and (why := _why_no_norm(norm, x.raw)):
        return why
    if activation is not None and activation_of(activation) is None:
        return f"no kernel has the activation {type(activation).__name__}"
    if dropout is not None and x.raw.ndim - 2 not in _DROPOUT.get(type(dropout), ()):
        return f"no kernel has the dropout {type(dropout).__name__} in {x.raw.ndim - 2}-D"
    if x.raw.shape[0] == 0:
        return "the batch is empty"
    if isinstance(norm, nn.SyncBatchNorm) and _process_group(norm) is not None:
        return None  # torch's own is for GPUs only
    return dispatch.why_reference(x.raw)


def _why_no_norm(norm: Any, x: Tensor) -> str | None:
    """Combinations that torch would refuse, or take otherwise, are left to it."""
    if x.ndim - 2 not in _NORM.get(type(norm), ()):
        return f"no kernel has the norm {type(norm).__name__} in {x.ndim - 2}-D"
    if (norm.weight is None) != (norm.bias is None):
        return f"its {type(norm).__name__} has a weight or a bias, but not both"
    return None


def activation_of(module: nn.Module) -> Activation | None:
    """What the kernels call an activation; None if they have none such."""
    kind = type(module)
    if kind in _PLAIN:
        return Activation(_PLAIN[kind])
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Activation("elu", float(module.alpha))
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        return Activation("softplus", float(module.beta), float(module.threshold))
    return None


def normalized(x: Deferred, norm: Any) -> Deferred:
    """A norm of torch or of ours as a step, its running statistics kept as its own forward does."""
    n, c, *size = x.raw.shape
    kind = type(norm)
    groups = kind in _GROUP
    channels = norm.num_channels if groups else norm.num_features
    if c != channels:
        raise ValueError(
            f"inp has {c} channels, but {type(norm).__name__} normalizes {channels} channels"
        )
    check_statistics(norm, n, size, "")
    if groups:
        return x.normalized(norm.weight, norm.bias, norm.eps, Pool("group", norm.num_groups))
    batch, known = kind in _BATCH, norm.running_mean is not None
    own = norm.training or not (known if batch else norm.track_running_stats)  # statistics
    fixed = None if own else Moments(norm.running_mean, norm.running_var)
    pool = Pool("batch" if batch else "instance")
    if batch and fixed is None and isinstance(norm, nn.SyncBatchNorm):
        pool = pool._replace(process_group=_process_group(norm))
    track = None
    if own and known and (norm.track_running_stats or not batch):
        track = lambda moments, count: _track(norm, moments, count)  # noqa: E731
    return x.normalized(norm.weight, norm.bias, norm.eps, pool, fixed, track)


def dropped(x: Deferred, dropout: Any) -> Deferred:
    """Channel dropout as a step; the same channels as its own forward would drop."""
    if not dropout.training or dropout.p == 0:
        return x
    n, c, *size = x.raw.shape
    ones = x.raw.new_ones(n, c, *[1] * len(size))
    factor = torch.feature_dropout(ones, dropout.p, True).reshape(n, c)
    return x.scaled(factor.to(torch.promote_types(factor.dtype, torch.float32)))


def activated(x: Deferred, module: nn.Module) -> Deferred:
    """An activation as a step."""
    activation = activation_of(module)
    assert activation is not None
    return x.activated(activation, module.weight if isinstance(module, nn.PReLU) else None)


def _track(norm: Any, moments: Moments, count: int) -> None:
    """Update running statistics: those of a batch, or the average over instances."""
    momentum, averaged = norm.momentum, type(norm) in _INSTANCE
    if not averaged and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    momentum = 0.0 if momentum is None else momentum
    unbiased = moments.var * (count / max(count - 1, 1))
    for running, new in ((norm.running_mean, moments.mean), (norm.running_var, unbiased)):
        new = new.mean(0) if averaged else new[0]
        running.lerp_(new.to(running.dtype), momentum)


def _process_group(norm: nn.SyncBatchNorm) -> Any:
    """The group whose processes share the statistics; None if the process is alone."""
    if not (norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def fuses(kind: type) -> type:
    """Class decorator: `defer` may stand for this `forward`, and for no other."""
    _FORWARD[kind] = kind.forward  # type: ignore[attr-defined]
    return kind


_FORWARD: dict[type, Any] = {}


def _defers(module: nn.Module) -> bool:
    """Whether `module.defer` does what calling it does: nobody has put another forward there."""
    kind = type(module)
    own = next((_FORWARD[base] for base in kind.__mro__ if base in _FORWARD), None)
    return own is not None and kind.forward is own and _is_bare(module)


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


_PLAIN: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.Mish: "mish", nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid", nn.Hardswish: "hardswish", nn.PReLU: "prelu",
}  # fmt: skip
