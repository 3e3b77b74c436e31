"""The passes in plain PyTorch: the specification of the kernels, and their fallback.

They are steps of a written-out gradient (`cassetta.functional`), and are not differentiated
themselves. All compute in float32 (float64 for float64) and round once, when they store; only
convolutions round before their epilogue, too. What convolutions and interpolation return is
channels last in whole words (`layout`).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cassetta.kernels import activations, layout, library
from cassetta.kernels.splines import along, hats, positions
from cassetta.kernels.types import (
    NOTHING,
    Activation,
    Fold,
    Geometry,
    Grid,
    Moments,
    Pooling,
    Prologue,
    Size,
)


def conv_fprop(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    x2: Tensor | None = None, epilogue: Prologue = NOTHING, residual: Tensor | None = None,
    moments_of: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolve z, what x stands for, and further channels x2, in the dtype of the weights.

    y = s2 act(s1 (z * w + b) + t1) + t2 (+ residual)    by `epilogue`; zeros surround z

    x (N, C, *X), x2 (N, C2, *X), w (K, C + C2, *T), y and residual (N, K, *Y). Returns y, and the
    mean and variance of `moments_of` y: (N, K), or nothing (0,) where that is None.
    """
    z = _transformed(x, p, None, w.dtype)
    z = z if x2 is None else torch.cat([z, x2.to(w.dtype)], 1)
    y = library.conv(z, w, b, geometry)
    y = materialize(y, epilogue, residual, w.dtype, words=True)
    if moments_of is None:
        nothing = y.new_empty(0, dtype=torch.promote_types(y.dtype, torch.float32))
        return y, nothing, nothing.clone()
    return y, *moments(y, Prologue(activation=moments_of))


def conv_dgrad(
    g: Tensor, w: Tensor, geometry: Geometry, size: Size, x: Tensor | None = None,
    p: Prologue = NOTHING, centre: Tensor | None = None, after: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient dz (N, C, *size), given that of y, g (N, K, *Y), in its dtype.

    With x and its pending transform p, also the first two `prologue_sums` of dz, for no fold:
    (2, N, C); else nothing (0,).
    """
    image = g.new_empty((g.shape[0], w.shape[1], *size))
    found, _, _ = library.conv_backward(g, image, w, geometry, (True, False, False))
    assert found is not None
    dz = layout.empty(tuple(image.shape), g.dtype, g.device).copy_(found)
    if x is None or centre is None:
        return dz, g.new_empty(0, dtype=torch.promote_types(g.dtype, torch.float32))
    return dz, prologue_sums(dz, x, p, centre, None, after)[:2]


def conv_wgrad(
    g: Tensor, x: Tensor, p: Prologue, taps: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """The gradient of w (K, C, *taps), in float32 at least, given that of y, g (N, K, *Y)."""
    z = _transformed(x, p, None, g.dtype)
    w = g.new_empty((g.shape[1], x.shape[1], *taps))
    _, dw, _ = library.conv_backward(g, z, w, geometry, (False, True, False))
    assert dw is not None
    return torch.empty_like(w, dtype=torch.promote_types(g.dtype, torch.float32)).copy_(dw)


def conv_transposed(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    epilogue: Prologue = NOTHING, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The adjoint of a convolution whose stride is its size, of z: x (N, K, *Y) to (N, C, *X).

    w (K, C, *T), in whose dtype it is computed; bias (C,), epilogue and residual as `conv_fprop`.
    """
    z = _transformed(x, p, None, w.dtype)
    y = library.conv_transposed(z, w, b, geometry, (0,) * (x.ndim - 2))
    return materialize(y, epilogue, residual, w.dtype, words=True)


def max_pool(x: Tensor, p: Prologue, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The maximum of z, what x (N, C, *X) stands for, over windows: y (N, C, *(X // window)).

    z is rounded to the dtype of x first; y is laid out as x. And where in its window the maximum
    is, counted row by row, in uint8 for up to 256 places, else int32; as torch has it, the first of
    equals, and the last NaN. Voxels that a size leaves over at the end are dropped.
    """
    z = _transformed(x, p, None, x.dtype)
    y, where = layout.pooled(x, window)
    y.fill_(-math.inf)
    where.zero_()
    for tap, at in enumerate(_places(window, y.shape[2:])):
        takes = (z[at] > y) | z[at].isnan()
        y.copy_(torch.where(takes, z[at], y))
        where.masked_fill_(takes, tap)
    return y, where


def max_pool_dgrad(g: Tensor, where: Tensor, window: tuple[int, ...], size: Size) -> Tensor:
    """The gradient dz (N, C, *size), given that of y, g (N, C, *Y): g where the maximum was.

    Laid out as `where`.
    """
    dz = layout.sized(where, size, g.dtype).zero_()
    for tap, at in enumerate(_places(window, g.shape[2:])):
        dz[at] = torch.where(where == tap, g, 0)
    return dz


def _places(window: Sequence[int], size: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """For each voxel of a window, in their order, those of an image in so many windows."""
    for place in itertools.product(*map(range, window)):
        axes = zip(place, size, window, strict=True)
        yield (..., *(slice(i, n * t, t) for i, n, t in axes))


def moments(x: Tensor, p: Prologue) -> Moments:
    """Mean and variance over the voxels of act(s1 x + t1), for x (N, C, *X): (N, C) each."""
    _, v = _inner(x, p)
    space = tuple(range(2, x.ndim))
    mean, var = v.mean(space), v.var(space, correction=0)
    return Moments(layout.tables(x).copy_(mean), layout.tables(x).copy_(var))


def materialize(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype, words: bool = False
) -> Tensor:
    """z = s2 act(s1 x + t1) + t2 (+ residual), for x (N, C, *X), in `dtype`.

    Laid out as x; or channels last in whole `words`, as convolutions read it (`layout`).
    """
    z = _transformed(x, p, residual, dtype)
    if words:
        return layout.empty(tuple(z.shape), dtype, z.device).copy_(z)
    return layout.likened(z, x)


def _transformed(x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z (+ residual), in any layout; x itself where nothing is done to it."""
    _, z = _inner(x, p)
    if p.s2 is not None and p.t2 is not None:
        z = _over(p.s2, x) * z + _over(p.t2, x)
    return (z if residual is None else z + residual).to(dtype)


def concatenate(x: Tensor, p: Prologue, x2: Tensor, p2: Prologue, dtype: torch.dtype) -> Tensor:
    """What x (N, C, *X) and x2 (N, C2, *X) stand for, as one image (N, C + C2, *X) in `dtype`.

    Channels last if x is.
    """
    z = layout.wider(x, x2.shape[1], dtype)
    parts = [_transformed(x, p, None, dtype), _transformed(x2, p2, None, dtype)]
    return torch.cat(parts, 1, out=z)


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
    return layout.likened(dx.to(x.dtype), x)


def resize(x: Tensor, p: Prologue, size: Size, grid: Grid) -> Tensor:
    """Linear interpolation of z, what x (N, C, *X) stands for, between zeros: (N, C, *size),
    laid out as x.

    out[i] = sum_j  prod_a max(0, 1 - |p_a(i_a) - j_a|) z[j]    over the axes a, p being `grid`
    """
    z = _transformed(x, p, None, torch.promote_types(x.dtype, torch.float32))
    for axis, (old, new, *where) in enumerate(zip(x.shape[2:], size, *grid, strict=True)):
        z = along(z, axis + 2, hats(positions(z, new, *where), old))
    return layout.sized(x, size, x.dtype).copy_(z)


def resize_dgrad(g: Tensor, size: Size, grid: Grid) -> Tensor:
    """The gradient (N, C, *size) of z, given that of what `resize` made of it, g (N, C, *Y)."""
    dz = g.to(torch.promote_types(g.dtype, torch.float32))
    for axis, (new, old, *where) in enumerate(zip(g.shape[2:], size, *grid, strict=True)):
        dz = along(dz, axis + 2, hats(positions(dz, new, *where), old).T)
    return layout.sized(g, size, g.dtype).copy_(dz)


def norm_finalize(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    """The statistics of a norm, and its affine: mean, var, rstd, scale, shift, and the mean of b.

    With b the value whose moments are `own`, and f the factor `before` (N, C), what is normalized
    is v = f b, and gamma (v - mean) rstd + beta = scale b + shift. "fixed" moments are those of v.
    The variance that is returned, but not that of rstd, is unbiased for so many `voxels` of each
    channel of each sample; for 0, and of "fixed" moments, it is not.

    Returns a tensor (6, N, C).
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
    var = var * pooling.unbiased(*var.shape, voxels)
    return torch.stack([mean, var, rstd, scale, shift, own.mean])


def norm_finalize_running(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    voxels: int, mean: Tensor, var: Tensor, batches: Tensor, momentum: float,
) -> Tensor:  # fmt: skip
    """`norm_finalize` of a batch, which also updates what a norm keeps for evaluation.

    The running mean and variance (C,), in float32, move towards those of the batch, by the fraction
    `momentum` of the way; one is added to the number of `batches`.
    """
    out = norm_finalize(own, before, gamma, beta, eps, voxels, Pooling("batch"))
    new_mean, new_var = out[:2, :1].mean(1)  # the samples share theirs
    mean.lerp_(new_mean.to(mean.dtype), momentum)
    var.lerp_(new_var.to(var.dtype), momentum)
    batches.add_(1)
    return out


def norm_statistics(
    x: Tensor, p: Prologue, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, pooling: Pooling,
) -> Tensor:  # fmt: skip
    """`norm_finalize` of the moments of act(s1 x + t1), for x (N, C, *X): (6, N, C)."""
    voxels = math.prod(x.shape[2:])
    return norm_finalize(moments(x, p), before, gamma, beta, eps, voxels, pooling)


def norm_statistics_running(
    x: Tensor, p: Prologue, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, mean: Tensor, var: Tensor, batches: Tensor, momentum: float,
) -> Tensor:  # fmt: skip
    """`norm_finalize_running` of the moments of act(s1 x + t1), for x (N, C, *X): (6, N, C)."""
    running, voxels = (mean, var, batches, momentum), math.prod(x.shape[2:])
    return norm_finalize_running(moments(x, p), before, gamma, beta, eps, voxels, *running)


def norm_sums(
    g: Tensor, x: Tensor, p: Prologue, mean: Tensor, rstd: Tensor, centre: Tensor,
    before: Tensor | None, after: Tensor | None, gamma: Tensor | None, outer: bool,
    pooling: Pooling,
) -> Tensor:  # fmt: skip
    """`norm_finalize_backward` of the sums of the gradient g of z, for x (N, C, *X): (5, N, C).

    `outer` is the argument `after` of `prologue_sums`.
    """
    sums, voxels = prologue_sums(g, x, p, centre, None, outer), math.prod(x.shape[2:])
    return norm_finalize_backward(sums, mean, rstd, centre, before, after, gamma, voxels, pooling)


def norm_finalize_backward(
    sums: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None,
    after: Tensor | None, gamma: Tensor | None, voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    """Shares of each sample in the gradients of gamma and beta, and what flows through the moments.

    `sums` (>= 2, N, C) are those of G and of G (b - centre), G being the gradient of what leaves
    the norm times the factor `after`. The gradient of b is scale G + a + k (b - centre).

    Returns a tensor (5, N, C) of dgamma, dbeta, sums of the gradient of b where `centre` is the
    mean of b, a, k; a and k are 0 for "fixed" moments.
    """
    dgamma, dbeta = norm_shares(sums, mean, rstd, centre, before, after)
    weight = 1.0 if gamma is None else gamma.to(dbeta.dtype)
    direct = (rstd if before is None else before * rstd) * weight * dbeta
    if pooling.kind == "fixed":
        zero = torch.zeros_like(dbeta)
        return torch.stack([dgamma, dbeta, direct, zero, zero])
    m0, m1 = (_pooled(share * weight / voxels, pooling) for share in (dbeta, dgamma))
    a, k = norm_fold(m0, m1, mean, rstd, centre, before)
    return torch.stack([dgamma, dbeta, direct + voxels * a, a, k])


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
