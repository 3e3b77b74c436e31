"""Resampling of images on a regular grid, with the numbers of torch-interpol.

Spline interpolation on a grid is separable: along each axis a matrix maps the old voxels to the
new ones. For linear interpolation, row i holds the hat function (the B-spline of order one) around
the position p(i),

    out[i] = sum_j  max(0, 1 - |p(i) - j|) inp[j]

Beyond the last voxel the sum finds nothing: that is the boundary condition "zero", and the reason
why edges darken. The matrix of any other spline is what torch-interpol makes of the identity.

One small matrix product per axis is faster than sampling voxel by voxel (bench/bench_resize.py),
keeps nothing but the matrix for backward, and is differentiable any number of times.
`resize_deferred` is linear interpolation of a `Deferred`, in one pass over memory for all axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bounds import BoundType as Bound, to_int
from torch import Tensor
from torch.autograd import Function

from cassetta.core.later import interpol
from cassetta.functional.deferred import Deferred
from cassetta.functional.nodes import first_order
from cassetta.kernels import layout, ops, splines
from cassetta.kernels.types import Grid, flat
from cassetta.recording import recordings
from cassetta.recording.programs import applied


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
        return interpol().resize(inp, **options, extrapolate=extrapolate)
    sizes = inp.shape[2:]
    zooms = factor or [new / old for new, old in zip(shape or (), sizes, strict=True)]
    lengths = shape or [_scaled(size, zoom) for size, zoom in zip(sizes, zooms, strict=True)]
    if not isinstance(inp.shape[2], torch.SymInt) and min(lengths) < 1:
        raise ValueError(f"factor={factor} leaves nothing of an image of size {tuple(sizes)}")
    grid = linear_grid(sizes, lengths, zooms, anchor)
    for axis, (size, length, *affine) in enumerate(zip(sizes, lengths, *grid, strict=True)):
        where = splines.positions(inp, length, *affine)
        order, edge = nth(interpolation, axis), Bound(to_int(nth(bound, axis)))
        if is_linear(order, edge, extrapolate):
            matrix = splines.hats(where, size)
        else:
            matrix = _splines(where, size, order, edge, extrapolate, prefilter)
        inp = splines.along(inp, axis + 2, matrix.to(inp.dtype))
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


def linear_grid(
    sizes: Sequence[int], lengths: Sequence[int], zooms: Sequence[float], anchor: Any
) -> Grid:
    """Where in an image of `sizes` the voxels of one of `lengths`, larger by `zooms`, lie."""
    anchors = (nth(anchor, axis)[0].lower() for axis in range(len(sizes)))
    axes = (_affine(*axis) for axis in zip(sizes, lengths, zooms, anchors, strict=True))
    return Grid(*zip(*axes, strict=True))


def _affine(size: int, length: int, factor: float, anchor: str) -> tuple[float, float, float]:
    """Shift, step and start of an axis."""
    if anchor == "e":  # the outer edges of the two images coincide
        return 0.5, size / length, -0.5
    if anchor == "c":  # the centres of the corner voxels coincide
        return 0.0, (size - 1) / (length - 1) if length > 1 else 0.0, 0.0
    return 0.0, 1 / factor, 0.0 if anchor == "f" else size - 1 - (length - 1) / factor


def _splines(
    where: Tensor, size: int, order: Any, bound: Bound, extrapolate: bool, prefilter: bool
) -> Tensor:
    """The matrix (length, size) of any spline interpolation."""
    identity = torch.eye(size, dtype=where.dtype, device=where.device)[None]
    grid = where[None, :, None]
    columns = interpol().grid_pull(identity, grid, order, bound.name, extrapolate, prefilter)
    return columns[0].T


def resize_deferred(x: Deferred, size: tuple[int, ...], grid: Grid) -> Tensor:
    """Linear interpolation of what x stands for, between zeros: (N, C, *size), laid out as x.

    For backward nothing is kept: the gradient of z depends on that of the result alone.
    """
    image = x.settled().read()
    return applied(_Resize, image.alone(), *flat(image.prologue), size, grid)


class _Resize(Function):
    """z interpolated, from what stands for it."""

    @staticmethod
    def forward(ctx: Any, held: Any, x: Tensor, *rest: Any) -> Tensor:
        *prologue, size, ctx.grid = rest
        ctx.size, ctx.nb_others = tuple(x.shape[2:]), len(rest)
        return recordings.transform(held, "resize", x, prologue, (), size, ctx.grid)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        size, grid = ctx.size, ctx.grid
        again = lambda g: (ops.resize_dgrad(g, size, grid),)  # noqa: E731
        (dz,) = recordings.run(("resize_dgrad", size, grid), again, (g,))
        return None, dz, *[None] * ctx.nb_others


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


def fit_at_once(inp: Tensor, size: Sequence[int]) -> Tensor:
    """`fit` in one copy, and another for its first derivative, however many axes are odd."""
    if tuple(inp.shape[2:]) == tuple(size):
        return inp
    if torch.compiler.is_compiling():  # which makes one pass of it anyway
        return fit(inp, size)
    return applied(_Fit, inp, tuple(size))


class _Fit(Function):
    """`fit`, laid out as x."""

    @staticmethod
    def forward(ctx: Any, held: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.size = tuple(x.shape[2:])
        out = layout.sized(x, size, x.dtype)
        common = tuple(map(min, size, ctx.size))
        _first(out, common).copy_(_first(x, common))
        for axis, (have, want) in enumerate(zip(common, size, strict=True), start=2):
            for beyond in range(have, want):
                out.select(axis, beyond).copy_(out.select(axis, have - 1))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        return None, _folded(g, ctx.size), None


def _folded(g: Tensor, size: tuple[int, ...]) -> Tensor:
    """The adjoint of `fit`: what lies beyond the end of an axis is added to its last voxel."""
    common = tuple(map(min, size, g.shape[2:]))
    out = layout.sized(g, size, g.dtype)
    if common != size:  # what was cropped
        out.zero_()
    _first(out, common).copy_(_first(g, common))
    for axis, have in enumerate(size):  # the first axis along which a voxel lies beyond
        if g.shape[axis + 2] > have:
            inside = common[:axis]
            beyond = _first(g, inside).narrow(axis + 2, have, g.shape[axis + 2] - have)
            slab = _folded(beyond.sum(axis + 2, keepdim=True), (*inside, 1, *size[axis + 1 :]))
            _first(out, inside).narrow(axis + 2, have - 1, 1).add_(slab)
    return out


def _first(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first voxels of each axis, so many."""
    return x[(slice(None), slice(None), *map(slice, size))]
