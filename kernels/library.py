"""The convolutions of torch (cuDNN's, on a GPU), in any geometry, and their gradients."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cassetta.kernels.types import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x (N, C, *X) with w (K, C/G, *T), zeros outside x: (N, K, *Y).

    Where a sample has 2^31 elements or more, in slabs: cuDNN has returned zeros there, or asked for
    a hundred GiB (pytorch#87354, #132300).
    """
    pieces = _slabs(x, w, geometry)
    if pieces:
        outputs = [
            conv(x.narrow(2, start, stop - start), w, b, part) for _, (start, stop), part in pieces
        ]
        return torch.cat(outputs, 2)
    stride, padding, dilation, groups = geometry
    if any(before != after for before, after in padding):
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
        padding = ((0, 0),) * len(padding)
    symmetric = tuple(before for before, _ in padding)
    return _CONV[len(stride)](x, w, b, stride, symmetric, dilation, groups)


def conv_backward(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, w and a bias in `conv`, given that of y; those that are needed."""
    pieces = _slabs(x, w, geometry)
    if pieces:
        return _backward_in_slabs(g, x, w, pieces, needs)
    stride, padding, dilation, groups = geometry
    shape = x.shape
    uneven = any(before != after for before, after in padding)
    if uneven:
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    common = [0 if uneven else before for before, _ in padding]
    dx, dw, db = torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]] if needs[2] else None, stride, common, dilation, False,
        [0] * len(stride), groups, needs,
    )  # fmt: skip
    if uneven and dx is not None:
        for axis, (before, _) in enumerate(padding, start=2):
            dx = dx.narrow(axis, before, shape[axis])
    return dx, dw, db


LARGEST = 2**31
"""Elements of a sample from which on convolutions are done in slabs."""

Slab = tuple[tuple[int, int], tuple[int, int], Geometry]  # rows of y, rows of x, padding there


def _slabs(x: Tensor, w: Tensor, geometry: Geometry) -> list[Slab]:
    """Slabs along the first spatial axis, of which each has a quarter of LARGEST at most.

    A compiler sees one convolution, because the size of the image may be open.
    """
    if torch.compiler.is_compiling():
        return []
    (stride, *_), padding, (dilation, *_), _ = geometry
    before, after = padding[0]
    span = dilation * (w.shape[2] - 1) + 1
    size = x.shape[2]
    rows = (size + before + after - span) // stride + 1
    elements = math.prod(x.shape[3:]) * max(x.shape[1] * size, w.shape[0] * rows)
    if elements < LARGEST or rows < 2 or max(before, after) >= span:
        return []
    step = max(1, rows * LARGEST // (4 * elements))
    slabs = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        start, stop = first * stride - before, (last - 1) * stride - before + span
        edges = (max(0, -start), max(0, stop - size))
        part = geometry._replace(padding=(edges, *padding[1:]))
        slabs.append(((first, last), (max(start, 0), min(stop, size)), part))
    return slabs


def _backward_in_slabs(
    g: Tensor, x: Tensor, w: Tensor, slabs: list[Slab], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of slabs, added where they overlap; all but that of x in float32 at least."""
    dx = torch.zeros_like(x) if needs[0] else None
    wide = torch.promote_types(w.dtype, torch.float32)
    dw = torch.zeros_like(w, dtype=wide) if needs[1] else None
    db = w.new_zeros(w.shape[:1], dtype=wide) if needs[2] else None
    for (first, last), (start, stop), part in slabs:
        here = x.narrow(2, start, stop - start)
        one, two, three = conv_backward(g.narrow(2, first, last - first), here, w, part, needs)
        for total, share in ((None if dx is None else dx.narrow(2, start, stop - start), one),
                             (dw, two), (db, three)):  # fmt: skip
            if total is not None and share is not None:
                total += share
    return dx, None if dw is None else dw.to(w.dtype), None if db is None else db.to(w.dtype)


def conv_transposed(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    """The adjoint of `conv` in x, plus b: x (N, K, *Y), w (K, C/G, *T) to (N, C, *X).

    What the forward convolution pads is cropped here; `output_padding` lengthens the end of each
    axis, which a stride leaves open.
    """
    stride, padding, dilation, groups = geometry
    common = tuple(min(pair) for pair in padding)
    y = _CONV_TRANSPOSED[len(stride)](x, w, b, stride, common, output_padding, groups, dilation)
    for axis, (before, after) in enumerate(padding, start=2):
        if before != after:
            start = before - min(before, after)
            y = y.narrow(axis, start, y.shape[axis] - abs(after - before))
    return y


def conv_transposed_backward(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, w and a bias in `conv_transposed`, given that of y; those that are needed.

    Nothing lengthens the ends of axes. Where a sample is large, by the convolution whose image is g
    and the gradient of whose result is x.
    """
    stride, padding, dilation, groups = geometry
    if _slabs(g, w, geometry):
        dx = conv(g, w, None, geometry) if needs[0] else None
        dw = conv_backward(x, g, w, geometry, (False, True, False))[1] if needs[1] else None
        return dx, dw, g.sum((0, *range(2, g.ndim))) if needs[2] else None
    common = [min(pair) for pair in padding]
    if any(before != after for before, after in padding):  # what was cropped has no gradient
        cropped = zip(reversed(padding), reversed(common), strict=True)
        g = F.pad(g, [p - least for pair, least in cropped for p in pair])
    return torch.ops.aten.convolution_backward(
        g, x, w, [g.shape[1]] if needs[2] else None, stride, common, dilation, True,
        [0] * len(stride), groups, needs,
    )  # fmt: skip
