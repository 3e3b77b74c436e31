"""Resampling of images on a regular grid, with the numbers of torch-interpol.

Spline interpolation on a grid is separable: along each axis a matrix maps the old voxels to the
new ones. For linear interpolation, row i holds the hat function (the B-spline of order one) around
the position p(i),

    out[i] = sum_j  max(0, 1 - |p(i) - j|) inp[j]

Beyond the last voxel the sum finds nothing: that is the boundary condition "zero", and the reason
why edges darken. The matrix of any other spline is what torch-interpol makes of the identity.

One small matrix product per axis is faster than sampling voxel by voxel (bench/bench_resize.py),
keeps nothing but the matrix for backward, and is differentiable any number of times.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import interpol
import torch
from bounds import BoundType as Bound, to_int
from torch import Tensor


def resize(
    inp: Tensor,
    factor: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    anchor: Any = "edge",
    interpolation: Any = "linear",
    bound: Any = "zero",
    extrapolate: bool = True,
    prefilter: bool = True,
) -> Tensor:
    """Resample inp (B, C, *size) to `shape`, or to int(size * factor): (B, C, *shape).

    The arguments are those of `cassetta.layers.Resize`. Integer images are label maps, resampled
    label by label.
    """
    if not inp.is_floating_point():
        options: dict[str, Any] = {"interpolation": interpolation, "prefilter": prefilter}
        options.update(factor=factor, shape=shape, anchor=anchor, bound=bound)
        return interpol.resize(inp, **options, extrapolate=extrapolate)
    sizes = inp.shape[2:]
    zooms = factor or [new / old for new, old in zip(shape or (), sizes, strict=True)]
    lengths = shape or [_scaled(size, zoom) for size, zoom in zip(sizes, zooms, strict=True)]
    if not isinstance(inp.shape[2], torch.SymInt) and min(lengths) < 1:
        raise ValueError(f"factor={factor} leaves nothing of an image of size {tuple(sizes)}")
    for axis, (size, length, zoom) in enumerate(zip(sizes, lengths, zooms, strict=True)):
        where = _positions(inp, size, length, zoom, nth(anchor, axis)[0].lower())
        order, edge = nth(interpolation, axis), Bound(to_int(nth(bound, axis)))
        if is_linear(order, edge, extrapolate):
            matrix = _hats(where, size)
        else:
            matrix = _splines(where, size, order, edge, extrapolate, prefilter)
        inp = _along(inp, axis + 2, matrix.to(inp.dtype))
    return inp


def is_linear(order: Any, bound: Any, extrapolate: bool) -> bool:
    """Whether it is linear interpolation between zeros, which is a formula."""
    return order in (1, "linear") and Bound(to_int(bound)) == Bound.zero and extrapolate


def _scaled(size: int, factor: float) -> int:
    """int(size * factor), also for sizes that torch.export leaves open, if the factor is whole."""
    return size * int(factor) if factor == int(factor) else int(size * factor)


def nth(value: Any, axis: int) -> Any:
    """The entry for one axis of what may be one value for all; the last one is repeated."""
    return value[min(axis, len(value) - 1)] if isinstance(value, (list, tuple)) else value


def _positions(like: Tensor, size: int, length: int, factor: float, anchor: str) -> Tensor:
    """Where in the old image, in voxels, the centres of the new voxels lie: (length,)."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    new = torch.arange(length, dtype=exact, device=like.device)
    if anchor == "e":  # the outer edges of the two images coincide
        return (new + 0.5) * (size / length) - 0.5
    if anchor == "c":  # the centres of the corner voxels coincide
        return new * ((size - 1) / (length - 1) if length > 1 else 0)
    return new / factor + (0 if anchor == "f" else size - 1 - (length - 1) / factor)


def _hats(where: Tensor, size: int) -> Tensor:
    """The matrix (length, size) of linear interpolation between zeros."""
    old = torch.arange(size, dtype=where.dtype, device=where.device)
    return (1 - (where[:, None] - old).abs()).clamp(min=0)


def _splines(
    where: Tensor, size: int, order: Any, bound: Bound, extrapolate: bool, prefilter: bool
) -> Tensor:
    """The matrix (length, size) of any spline interpolation."""
    identity = torch.eye(size, dtype=where.dtype, device=where.device)[None]
    grid = where[None, :, None]
    columns = interpol.grid_pull(identity, grid, order, bound.name, extrapolate, prefilter)
    return columns[0].T


def _along(inp: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply `matrix` (length, size) into one axis of `inp`; the result is contiguous.

    In the dtype of the image: interpolation is no convolution, which autocast may round.
    """
    length, size = matrix.shape
    others = math.prod(inp.shape[axis + 1 :])
    lines = inp.reshape(*inp.shape[:axis], size, others)
    with _exact(inp.device.type):
        out = matrix @ lines if axis < inp.ndim - 1 else (lines.squeeze(-1) @ matrix.T)
    return out.reshape(*inp.shape[:axis], length, *inp.shape[axis + 1 :])


def _exact(device: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def fit(inp: Tensor, size: Sequence[int]) -> Tensor:
    """Crop inp (B, C, *any) at the end of each axis, or repeat the last voxel: (B, C, *size).

    An image of odd size does not survive being halved and doubled; this makes up for the voxel.
    """
    for axis, (have, want) in enumerate(zip(inp.shape[2:], size, strict=True), start=2):
        if want < have:
            inp = inp.narrow(axis, 0, want)
        elif want > have:
            last = inp.narrow(axis, have - 1, 1)
            inp = torch.cat([inp, *[last] * (want - have)], axis)
    return inp
