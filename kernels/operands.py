"""What engines and passes share: the operand that a product reads, and sums by torch."""

import torch
from torch import Tensor

from cassetta.kernels import layout, ops
from cassetta.kernels.types import Prologue


def built(x: Tensor, p: Prologue, dtype: torch.dtype, words: bool = False) -> Tensor:
    """Return what x stands for, for a product that applies nothing to it; see `ops.materialize`."""
    return x.to(dtype) if p.is_identity() else ops.materialize(x, p, None, dtype, words)


def summed(g: Tensor) -> Tensor:
    """Return the gradient of a bias (K,), given that of the image it is added to, g (N, K, *Y).

    By torch, which adds up in an order of its own, but always the same.
    """
    return g.sum((0, *range(2, g.ndim)), dtype=torch.promote_types(g.dtype, torch.float32))


def added(parts: Tensor, dim: int) -> Tensor:
    """Return the sum along a dimension, in a fixed order; of a single part, the part itself."""
    return parts.select(dim, 0) if parts.shape[dim] == 1 else parts.sum(dim)


def voxel_steps(x: Tensor) -> tuple[int, int]:
    """Return from how many elements on the next sample and the next voxel of an image begin."""
    steps = layout.strides(x)
    assert steps is not None, "whoever reads it in words has asked before"
    return steps[0], steps[2]
