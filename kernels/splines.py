"""Interpolation along one axis as a matrix, in plain PyTorch."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def positions(like: Tensor, length: int, shift: float, step: float, start: float) -> Tensor:
    """Where along an axis of the old image the voxels of the new one lie (`Grid`): (length,)."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (torch.arange(length, dtype=exact, device=like.device) + shift) * step + start


def hats(where: Tensor, size: int) -> Tensor:
    """The matrix (length, size) of linear interpolation between zeros."""
    old = torch.arange(size, dtype=where.dtype, device=where.device)
    return (1 - (where[:, None] - old).abs()).clamp(min=0)


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply `matrix` (length, size) into one axis of x; the result is contiguous.

    In the dtype of the image: interpolation is no convolution, which autocast may round.
    """
    length, size = matrix.shape
    others = math.prod(x.shape[axis + 1 :])
    lines = x.reshape(*x.shape[:axis], size, others)
    with _exact(x.device.type):
        out = matrix @ lines if axis < x.ndim - 1 else (lines.squeeze(-1) @ matrix.T)
    return out.reshape(*x.shape[:axis], length, *x.shape[axis + 1 :])


def _exact(device: str) -> AbstractContextManager:
    # (a tracer cannot ask before torch 2.12, and traces for devices that have it)
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
