"""The passes in plain PyTorch: the specification of the kernels, and their fallback.

The convolutions are under torch's own autograd; the passes over a pending transform are steps of a
written-out gradient (`cassetta.functional`), and are not differentiated themselves. All compute in
float32 (float64 for float64) and round once, when they store.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cassetta.kernels import activations
from cassetta.kernels.types import Fold, Geometry, Moments, Pooling, Prologue

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_fprop(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x (N, C, *X) with w (K, C/G, *T), zeros outside x: (N, K, *Y).

    Where a sample has 2^31 elements or more, in slabs: cuDNN has returned zeros there, or asked for
    a hundred GiB (pytorch#87354, #132300).
    """
    pieces = _slabs(x, w, geometry)
    if pieces:
        outputs = [
            conv_fprop(x.narrow(2, start, stop - start), w, b, part)
            for _, (start, stop), part in pieces
        ]
        return torch.cat(outputs, 2)
    stride, padding, dilation, groups = geometry
    if any(before != after for before, after in padding):
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
        padding = ((0, 0),) * len(padding)
    symmetric = tuple(before for before, _ in padding)
    return _CONV[len(stride)](x, w, b, stride, symmetric, dilation, groups)


def conv_backward(
    g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, w and b in `conv_fprop`, given that of y; those that are needed."""
    pieces = _slabs(x, w, geometry)
    if pieces:
        return _backward_in_slabs(g, x, w, b, pieces, needs)
    stride, padding, dilation, groups = geometry
    shape = x.shape
    uneven = any(before != after for before, after in padding)
    if uneven:
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    common = [0 if uneven else before for before, _ in padding]
    dx, dw, db = torch.ops.aten.convolution_backward(
        g, x, w, None if b is None else list(b.shape), stride, common, dilation, False,
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
    g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, slabs: list[Slab],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of slabs, added where they overlap; those of w and b in float32 at least."""
    dx = torch.zeros_like(x) if needs[0] else None
    wide = torch.promote_types(w.dtype, torch.float32)
    dw = torch.zeros_like(w, dtype=wide) if needs[1] else None
    db = None if b is None or not needs[2] else torch.zeros_like(b, dtype=wide)
    for (first, last), (start, stop), part in slabs:
        here = x.narrow(2, start, stop - start)
        one, two, three = conv_backward(g.narrow(2, first, last - first), here, w, b, part, needs)
        for total, share in ((None if dx is None else dx.narrow(2, start, stop - start), one),
                             (dw, two), (db, three)):  # fmt: skip
            if total is not None and share is not None:
                total += share
    return dx, None if dw is None else dw.to(w.dtype), None if db is None else db.to(w.dtype)


def conv_transposed(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    """The adjoint of `conv_fprop` in x, plus b: x (N, K, *Y), w (K, C/G, *T) to (N, C, *X).

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


def moments(x: Tensor, p: Prologue) -> Moments:
    """Mean and variance over the voxels of act(s1 x + t1), for x (N, C, *X): (N, C) each."""
    _, v = _inner(x, p)
    space = tuple(range(2, x.ndim))
    return Moments(v.mean(space), v.var(space, correction=0))


def materialize(x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z = s2 act(s1 x + t1) + t2 (+ residual), for x (N, C, *X), in `dtype`."""
    _, z = _inner(x, p)
    if p.s2 is not None and p.t2 is not None:
        z = _over(p.s2, x) * z + _over(p.t2, x)
    if residual is not None:
        z = z + residual
    return z.to(dtype)


def materialize_moments(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`materialize`, and the mean and variance of what it stores."""
    z = materialize(x, p, residual, dtype)
    return z, *moments(z, Prologue())


def prologue_sums(
    g: Tensor, x: Tensor, p: Prologue, centre: Tensor, fold: Fold | None, after: bool
) -> Tensor:
    """Sums over the voxels of what the gradient g of z gives to b, and to the slope: (3, N, C).

    b is v = act(s1 x + t1), the value after the activation, or x, the value before:

        after       h = g               b = v       e = s2 g + fold(v)
        before      h = e act'(u)       b = x       e = s2 g
        sums of     h,    h (b - centre),    e min(u, 0)
    """
    u, v = _inner(x, p)
    g = g.to(u.dtype)
    outer = g if p.s2 is None else g * _over(p.s2, x)
    if fold is not None and after:
        outer = outer + _folded(fold, v)
    h, b = g, v
    if not after:
        h, b = outer * activations.derivative(u, p.activation, _slope(p, x)), x.to(u.dtype)
    space = tuple(range(2, x.ndim))
    slope = (outer * u.clamp(max=0)).sum(space)
    return torch.stack([h.sum(space), (h * (b - _over(centre, x))).sum(space), slope])


def prologue_dgrad(g: Tensor, x: Tensor, p: Prologue, fold: Fold | None, after: bool) -> Tensor:
    """The gradient of x (N, C, *X), given that of z, and what the statistics of b add to b's.

    after       e = s2 g + fold(v)         dx = s1 e act'(u)
    before      e = s2 g                   dx = s1 e act'(u) + fold(x)
    """
    u = _argument(x, p)
    e = g.to(u.dtype)
    if p.s2 is not None:
        e = e * _over(p.s2, x)
    if fold is not None and after:
        e = e + _folded(fold, activations.apply(u, p.activation, _slope(p, x)))
    dx = e * activations.derivative(u, p.activation, _slope(p, x))
    if p.s1 is not None:
        dx = dx * _over(p.s1, x)
    if fold is not None and not after:
        dx = dx + _folded(fold, x.to(u.dtype))
    return dx.to(x.dtype)


def norm_finalize(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    pooling: Pooling,
) -> Tensor:  # fmt: skip
    """The statistics of a norm, and the affine it amounts to: mean, var, rstd, scale, shift.

    With b the value whose moments are `own`, and f the factor `before` (N, C), what is normalized
    is v = f b, and gamma (v - mean) rstd + beta = scale b + shift. "fixed" moments are those of v.

    Returns a tensor (5, N, C).
    """
    mean, var = own
    if before is not None and pooling.kind != "fixed":
        mean, var = before * mean, before.square() * var
    apart = mean
    mean = _pooled(mean, pooling)
    var = _pooled(var + (apart - mean).square(), pooling)  # Chan et al. (1979)
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma.to(rstd.dtype)
    shift = -mean * scale if beta is None else beta.to(rstd.dtype) - mean * scale
    scale = scale if before is None else scale * before
    return torch.stack([mean, var, rstd, scale, shift])


def norm_finalize_backward(
    sums: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None,
    after: Tensor | None, gamma: Tensor | None, voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    """Shares of each sample in the gradients of gamma and beta, and what flows through the moments.

    `sums` (>= 2, N, C) are those of G and of G (b - centre), G being the gradient of what leaves
    the norm times the factor `after`. The gradient of b is scale G + a + k (b - centre).

    Returns a tensor (4, N, C) of dgamma, dbeta, a, k; a and k are 0 for "fixed" moments.
    """
    dgamma, dbeta = norm_shares(sums, mean, rstd, centre, before, after)
    if pooling.kind == "fixed":
        zero = torch.zeros_like(dbeta)
        return torch.stack([dgamma, dbeta, zero, zero])
    k = 1.0 if gamma is None else gamma.to(dbeta.dtype)
    m0, m1 = (_pooled(share * k / voxels, pooling) for share in (dbeta, dgamma))
    return torch.stack([dgamma, dbeta, *norm_fold(m0, m1, mean, rstd, centre, before)])


def norm_shares(
    sums: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None,
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shares (N, C) of each sample in the gradients of gamma and beta."""
    sum_g, sum_gb = sums[0], sums[1]
    middle = centre if before is None else before * centre
    spread = sum_gb if before is None else before * sum_gb
    dgamma, dbeta = rstd * (spread + (middle - mean) * sum_g), sum_g
    return (dgamma, dbeta) if after is None else (after * dgamma, after * dbeta)


def norm_fold(
    m0: Tensor, m1: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a and k (N, C), from the means over each pool of the gradients of w and of w times w.

    w = (v - mean) rstd is what gamma multiplies.
    """
    middle = centre if before is None else before * centre
    a = -rstd * (m0 + rstd * m1 * (middle - mean))
    k = -rstd.square() * m1
    return (a, k) if before is None else (before * a, before.square() * k)


def _pooled(table: Tensor, pooling: Pooling) -> Tensor:
    """The mean of each pool, at each of its members (N, C)."""
    n, c = table.shape
    if pooling.kind == "batch":
        return table.mean(0, keepdim=True).expand(n, c)
    if pooling.kind == "group":
        pools = (n, pooling.groups, c // pooling.groups)
        return table.reshape(pools).mean(-1, True).expand(pools).reshape(n, c)
    return table


def _inner(x: Tensor, p: Prologue) -> tuple[Tensor, Tensor]:
    """u = s1 x + t1 and v = act(u)."""
    u = _argument(x, p)
    return u, activations.apply(u, p.activation, _slope(p, x))


def _argument(x: Tensor, p: Prologue) -> Tensor:
    """u = s1 x + t1."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    return u if p.s1 is None or p.t1 is None else _over(p.s1, x) * u + _over(p.t1, x)


def _slope(p: Prologue, x: Tensor) -> Tensor | None:
    return None if p.slope is None else _over(p.slope, x)


def _folded(fold: Fold, b: Tensor) -> Tensor:
    return _over(fold.a, b) + _over(fold.k, b) * (b - _over(fold.centre, b))


def _over(table: Tensor, x: Tensor) -> Tensor:
    """A table (N, C) over the voxels of x: (N, C, 1, ...)."""
    return table.reshape(*table.shape, *[1] * (x.ndim - 2))
