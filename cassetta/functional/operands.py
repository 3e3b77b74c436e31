"""What convolutions of a `Deferred` do before they multiply: dtypes meet, and z is built."""

import torch
from torch import Tensor

from cassetta.kernels import ops
from cassetta.kernels.types import Prologue


def rounded(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """The dtype in which x is convolved, and the parameters: under autocast, rounded to its own."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return dtype, weight.to(dtype), None if bias is None else bias.to(dtype)


def refuse_other(dtype: torch.dtype, weight: Tensor) -> None:
    """Refuse weights that are not in the dtype of the image, as torch's convolutions do."""
    if weight.dtype != dtype:
        raise TypeError(
            f"inp is in {dtype}, but the weights are in {weight.dtype}: convert one of them, "
            "or use torch.autocast"
        )


def summed(g: Tensor) -> Tensor:
    """The gradient of a bias (K,), given that of the image it was added to, g (N, K, *Y).

    A pass of its own, as no product can take it along (`kernels.conv_wgrad`); by torch, which adds
    up in an order of its own, but always the same.
    """
    return g.sum((0, *range(2, g.ndim)), dtype=torch.promote_types(g.dtype, torch.float32))


def built(x: Tensor, prologue: Prologue, dtype: torch.dtype, words: bool = False) -> Tensor:
    """What x stands for, for a kernel that applies nothing to it; see `ops.materialize`."""
    return (
        x.to(dtype) if prologue.is_identity() else ops.materialize(x, prologue, None, dtype, words)
    )
