"""Sums and statistics over the voxels of each channel of each sample, in two ordered stages.

Each program of the first stage visits one chunk of voxels and leaves one partial result; the second
stage combines the chunks in their order. No atomics: the same input gives the same bits. Of a
single chunk, as small images are, the partial result is the result.

Statistics are running means and squared deviations, one per lane, merged by the formula of Chan et
al. (1979); never E[x^2] - E[x]^2, which cancels. What is added up are squares: in Welford's
delta (value - mean), the compiler may subtract from `value` before it rounds it (fma), so that the
factors differ in sign, and the variance of a constant comes out negative.

The loops are `while`, because triton 3.6's interpreter cannot give `range` a bound under numpy 2.4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, finalize, layout, tile
from cassetta.kernels.operands import added
from cassetta.kernels.types import Fold, Moments, Pooling, Prologue


@triton.jit
def _moments_kernel(
    x_ptr, mean_ptr, m2_ptr, count_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, r_ptr, z_ptr,
    before_ptr, gamma_ptr, beta_ptr, out_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps, unbiased, momentum,
    p, q, C, V, x_n, x_c, x_v, r_n, r_c, r_v, z_n, z_c, z_v, chunks, c_blocks, loops, size,
    ACT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    s1, t1 = tile.row(s1_ptr, n, c, C, 1.0), tile.row(t1_ptr, n, c, C, 0.0)
    slope = tile.row(slope_ptr, n, c, C, 0.0)
    s2, t2 = tile.row(s2_ptr, n, c, C, 1.0), tile.row(t2_ptr, n, c, C, 0.0)
    mean = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_V, 1), tl.float32)
    i = 0
    while i < loops:  # a lane that is outside stays outside: its count is i + 1 until then
        v = (chunk * loops + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
        at = tile.at(x_ptr, n, v, c, x_n, x_c, x_v, WIDE, WORDS)
        u = s1 * tl.load(at, mask=inside, other=0.0).to(tl.float32) + t1
        value = tile.activation(u, p, q, slope, ACT)
        if z_ptr is not None:  # the value is that of z, as it is stored
            value = s2 * value + t2
            if r_ptr is not None:
                r_at = tile.at(r_ptr, n, v, c, r_n, r_c, r_v, WIDE, WORDS)
                value += tl.load(r_at, mask=inside, other=0.0).to(tl.float32)
            z = value.to(z_ptr.dtype.element_ty)
            z_at = tile.at(z_ptr, n, v, c, z_n, z_c, z_v, WIDE, WORDS)
            tl.store(z_at, z, mask=inside)
            value = z.to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        share = 1.0 / (i + 1.0)
        mean += delta * share
        m2 += delta * (delta * (i * share))
        count += (v < V)[:, None].to(tl.float32)
        i += 1
    voxels = tl.sum(tl.sum(count, 0), 0)
    total = tl.maximum(voxels, 1.0)
    whole = tl.sum(mean * count, 0) / total
    apart = mean - whole[None, :]
    spread = tl.sum(m2 + count * apart * apart, 0)
    if chunks == 1:
        spread /= total  # the variance
    out, inside = (n * chunks + chunk) * C + c, c < C
    if out_ptr is None:
        tl.store(mean_ptr + out, whole, mask=inside)
        tl.store(m2_ptr + out, spread, mask=inside)
        tl.store(count_ptr + chunk + c * 0, voxels, mask=n + c == 0)
    else:  # a single chunk, and a pool of its own
        before = finalize.entry(before_ptr, out, inside, 1.0)
        mean, var = before * whole, before * before * spread
        if batches_ptr is not None:
            finalize.update_running(
                running_mean_ptr, running_var_ptr, batches_ptr, c, inside, mean, var * unbiased,
                momentum,
            )  # fmt: skip
        finalize.store_tables(
            out_ptr + out, size, inside, whole, mean, var, before,
            finalize.entry(gamma_ptr, c, inside, 1.0), finalize.entry(beta_ptr, c, inside, 0.0),
            eps, unbiased,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    mean_ptr, m2_ptr, count_ptr, out_mean_ptr, out_m2_ptr, out_count_ptr, C, chunks, some, outs,
    c_blocks, LAST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    out, n, c = tile.place(outs, c_blocks, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    start = out * some
    end = tl.minimum(start + some, chunks)
    while start < end:
        k = start + tl.arange(0, BLOCK_V)
        inside = (k < end)[:, None] & (c < C)[None, :]
        at = (n.to(tl.int64) * chunks + k)[:, None] * C + c[None, :]
        means = tl.load(mean_ptr + at, mask=inside, other=0.0)
        m2s = tl.load(m2_ptr + at, mask=inside, other=0.0)
        counts = tl.load(count_ptr + k, mask=k < end, other=0.0)[:, None]
        here = tl.sum(counts)
        middle = tl.sum(means * counts, 0) / here
        apart = means - middle[None, :]
        spread = tl.sum(m2s + tl.where(inside, counts * apart * apart, 0.0), 0)
        delta = middle - mean
        both = count + here
        mean += delta * (here / both)
        m2 += spread + delta * (delta * (count * here / both))
        count = both
        start += BLOCK_V
    if LAST:
        m2 = m2 / count  # the variance
    at = (n * outs + out) * C + c
    tl.store(out_mean_ptr + at, mean, mask=c < C)
    tl.store(out_m2_ptr + at, m2, mask=c < C)
    tl.store(out_count_ptr + out + c * 0, count, mask=n + c == 0)


def combine(means: Tensor, m2s: Tensor, counts: Tensor) -> Moments:
    """The moments of images from means and squared deviations of their chunks (N, chunks, C).

    `counts` (chunks,) says of how many voxels each chunk is, in float32. Of a single chunk, what is
    given is the variance.
    """
    n, chunks, c = means.shape
    while chunks > 1:
        config = configs.over_chunks(n, chunks, c)
        *out, some = partial(n, config.chunks, c, means.device)
        tile.launch(
            _combine_kernel, means, config,
            means, m2s, counts, *out, some, c, chunks, config.loops * config.block_v,
            config.chunks, config.c_blocks, LAST=config.chunks == 1,
        )  # fmt: skip
        (means, m2s), counts, chunks = out, some, config.chunks
    return Moments(means[:, 0], m2s[:, 0])


def partial(n: int, chunks: int, c: int, device: torch.device) -> list[Tensor]:
    """Room for the means, squared deviations (n, chunks, c) and sizes (chunks,) of chunks."""
    shapes = ((n, chunks, c), (n, chunks, c), (chunks,))
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]


def moments(x: Tensor, p: Prologue) -> Moments:
    return _moments(x, p, None, None)


def norm_statistics(
    x: Tensor, p: Prologue, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, pooling: Pooling,
) -> Tensor:  # fmt: skip
    return _statistics(x, p, before, gamma, beta, eps, pooling, None, None, None, 0.0)


def norm_statistics_running(
    x: Tensor, p: Prologue, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, mean: Tensor, var: Tensor, batches: Tensor, momentum: float,
) -> Tensor:  # fmt: skip
    running = mean, var, batches, momentum
    return _statistics(x, p, before, gamma, beta, eps, Pooling("batch"), *running)


def _statistics(
    x: Tensor, p: Prologue, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, pooling: Pooling, *running: Any,
) -> Tensor:  # fmt: skip
    """By the kernel of the moments alone, where one program sees all of a pool."""
    n, c = x.shape[:2]
    x, strides = tile.strided(x)
    *kept, momentum = running
    if _is_seen_whole("moments", x, strides, pooling):
        out = torch.empty(6, n, c, dtype=torch.float32, device=x.device)
        own = *map(finalize.dense, (before, gamma, beta)), out, *kept
        numbers = eps, pooling.unbiased(n, c, tile.voxels(x)), momentum
        _moments(x, p, None, None, (*own, *numbers))
        return out
    given = moments(x, p), before, gamma, beta, eps, tile.voxels(x)
    if kept[-1] is None:
        return finalize.norm_finalize(*given, pooling)
    return finalize.norm_finalize_running(*given, *running)


def _is_seen_whole(
    name: str, x: Tensor, strides: tuple[int, int, int], pooling: Pooling
) -> bool:  # fmt: skip
    """Tell whether a pass has one chunk, and each channel of each sample is a pool."""
    _, members, *_ = pooling.pools(*x.shape[:2])
    return members == 1 and configs.of(name, x, strides, reduce=True).chunks == 1


_NO_NORM = *[None] * 7, 0.0, 0.0, 0.0


def materialize_moments(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    z = layout.like(x, dtype)
    return z, *_moments(x, p, residual, z)


def _moments(
    x: Tensor, p: Prologue, residual: Tensor | None, z: Tensor | None, norm: Any = _NO_NORM
) -> Moments:
    """Of z, which is written; or, if there is no z to write, of what is before its last affine.

    Of a single chunk the kernel may go on with the algebra of a norm; it leaves no moments then.
    """
    name = "moments" if z is None else "materialize_moments"
    x, x_strides = tile.strided(x)
    residual, r_strides = (None, (0, 0, 0)) if residual is None else tile.strided(residual)
    z, z_strides = (None, (0, 0, 0)) if z is None else tile.strided(z)
    n, c = x.shape[:2]
    config = configs.of(name, x, x_strides, reduce=True)
    config = config._replace(registers=128)  # left to itself, ptxas keeps to 64, and spills
    parts: Any = partial(n, config.chunks, c, x.device) if norm is _NO_NORM else [None] * 3
    images = [one for one in (x, residual, z) if one is not None]
    last = (None, None) if z is None else (p.s2, p.t2)
    tile.launch(
        _moments_kernel, x, config,
        x, *parts, p.s1, p.t1, p.slope, *last, residual, z, *norm,
        p.activation.p, p.activation.q, c, tile.voxels(x), *x_strides, *r_strides, *z_strides,
        config.chunks, config.c_blocks, config.loops, n * c,
        ACT=p.activation.name, WIDE=tile.is_wide(*images), WORDS=tile.in_words(*images),
    )  # fmt: skip
    return combine(*parts) if norm is _NO_NORM else Moments(*parts[:2])


@triton.jit
def _prologue_sums_kernel(
    g_ptr, x_ptr, out_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, centre_ptr,
    a_ptr, k_ptr, fold_ptr, mean_ptr, rstd_ptr, before_ptr, after_ptr, gamma_ptr,
    p, q, C, V, g_n, g_c, g_v, x_n, x_c, x_v, size, chunks, c_blocks, loops,
    ACT: tl.constexpr, AFTER: tl.constexpr, FIXED: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    s1, t1 = tile.row(s1_ptr, n, c, C, 1.0), tile.row(t1_ptr, n, c, C, 0.0)
    s2, slope = tile.row(s2_ptr, n, c, C, 1.0), tile.row(slope_ptr, n, c, C, 0.0)
    centre = tile.row(centre_ptr, n, c, C, 0.0)
    sum_h = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    sum_hb = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    sum_slope = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    i = 0
    while i < loops:
        v = (chunk * loops + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
        x_at = tile.at(x_ptr, n, v, c, x_n, x_c, x_v, WIDE, WORDS)
        g_at = tile.at(g_ptr, n, v, c, g_n, g_c, g_v, WIDE, WORDS)
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
        u = s1 * x + t1
        if AFTER:
            h = g
            b = tile.activation(u, p, q, slope, ACT)
        else:
            h = g * s2 * tile.derivative(u, p, q, slope, ACT)
            b = x
        sum_h += h  # outside, g and so h are zero
        sum_hb += h * (b - centre)
        if ACT == "prelu":
            e = g * s2
            if a_ptr is not None:
                apart = b - tile.row(fold_ptr, n, c, C, 0.0)
                e += tile.row(a_ptr, n, c, C, 0.0) + tile.row(k_ptr, n, c, C, 0.0) * apart
            sum_slope += tl.where(inside, e * tile.below(u, 0.0), 0.0)
        i += 1
    out, inside = (n * chunks + chunk) * C + c, c < C
    h, hb = tl.sum(sum_h, 0), tl.sum(sum_hb, 0)
    if mean_ptr is None:
        tl.store(out_ptr + out, h, mask=inside)
        tl.store(out_ptr + size + out, hb, mask=inside)
        tl.store(out_ptr + 2 * size + out, tl.sum(sum_slope, 0), mask=inside)
    else:  # a single chunk, and a pool of its own
        dgamma, dbeta, rstd, apart, before = finalize.shares(
            h, hb, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, out, inside
        )
        gamma = finalize.entry(gamma_ptr, c, inside, 1.0)
        tl.store(out_ptr + out, dgamma, mask=inside)
        tl.store(out_ptr + size + out, dbeta, mask=inside)
        finalize.store_fold(
            out_ptr + 2 * size + out, size, inside, dbeta, gamma, dbeta * gamma / V,
            dgamma * gamma / V, rstd, apart, before, V * 1.0, FIXED,
        )  # fmt: skip


def prologue_sums(
    g: Tensor, x: Tensor, p: Prologue, centre: Tensor, fold: Fold | None, after: bool
) -> Tensor:
    return added(_sums(g, x, p, centre, fold, after), 2)


def norm_sums(
    g: Tensor, x: Tensor, p: Prologue, mean: Tensor, rstd: Tensor, centre: Tensor,
    before: Tensor | None, after: Tensor | None, gamma: Tensor | None, outer: bool,
    pooling: Pooling,
) -> Tensor:  # fmt: skip
    own, (x, strides) = (mean, rstd, before, after, gamma), tile.strided(x)
    if _is_seen_whole("prologue_sums", x, strides, pooling):
        norm = *map(finalize.dense, own), pooling.kind == "fixed"
        return _sums(g, x, p, finalize.dense(centre), None, outer, norm)[:, :, 0]
    sums = prologue_sums(g, x, p, centre, None, outer)
    return finalize.norm_finalize_backward(
        sums, mean, rstd, centre, before, after, gamma, tile.voxels(x), pooling
    )


_NO_GRADIENT = *[None] * 5, False


def _sums(
    g: Tensor, x: Tensor, p: Prologue, centre: Any, fold: Fold | None, after: bool,
    norm: Any = _NO_GRADIENT,
) -> Tensor:  # fmt: skip
    """Of each chunk (3, N, chunks, C); or, of a single one, what they amount to (5, N, 1, C)."""
    g, g_strides = tile.strided(g)
    x, x_strides = tile.strided(x)
    n, c = x.shape[:2]
    config = configs.of("prologue_sums", x, x_strides, reduce=True)
    rows, (*own, is_fixed) = 3 if norm is _NO_GRADIENT else 5, norm
    out = torch.empty(rows, n, config.chunks, c, dtype=torch.float32, device=x.device)
    tile.launch(
        _prologue_sums_kernel, x, config,
        g, x, out, p.s1, p.t1, p.slope, p.s2, centre,
        *(fold if fold is not None and after else (None,) * 3), *own, p.activation.p,
        p.activation.q, c, tile.voxels(x), *g_strides, *x_strides, out[0].numel(), config.chunks,
        config.c_blocks, config.loops,
        ACT=p.activation.name, AFTER=after, FIXED=is_fixed, WIDE=tile.is_wide(g, x),
        WORDS=tile.in_words(g, x),
    )  # fmt: skip
    return out
