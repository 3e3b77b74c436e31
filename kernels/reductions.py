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
    eps, unbiased, momentum, size,
    p, q, C, V, x_n, x_c, x_v, r_n, r_c, r_v, z_n, z_c, z_v, chunks, c_blocks, loops,
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
        finalize.store_statistics(
            whole, spread, before_ptr, gamma_ptr, beta_ptr, out_ptr, running_mean_ptr,
            running_var_ptr, batches_ptr, eps, unbiased, momentum, size, n, c, C,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    mean_ptr, m2_ptr, count_ptr, out_mean_ptr, out_m2_ptr, out_count_ptr,
    before_ptr, gamma_ptr, beta_ptr, out_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps, unbiased, momentum, size, C, chunks, some, outs, c_blocks,
    LAST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
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
        # (a march along D leaves chunks without voxels, which weigh nothing)
        middle = tl.sum(means * counts, 0) / tl.maximum(here, 1.0)
        apart = means - middle[None, :]
        spread = tl.sum(m2s + tl.where(inside, counts * apart * apart, 0.0), 0)
        delta = middle - mean
        both = tl.maximum(count + here, 1.0)
        mean += delta * (here / both)
        m2 += spread + delta * (delta * (count * here / both))
        count += here
        start += BLOCK_V
    if LAST:
        m2 = m2 / count  # the variance
    if out_ptr is None:
        at = (n * outs + out) * C + c
        tl.store(out_mean_ptr + at, mean, mask=c < C)
        tl.store(out_m2_ptr + at, m2, mask=c < C)
        tl.store(out_count_ptr + out + c * 0, count, mask=n + c == 0)
    else:  # the last stage, and a pool of its own
        finalize.store_statistics(
            mean, m2, before_ptr, gamma_ptr, beta_ptr, out_ptr, running_mean_ptr, running_var_ptr,
            batches_ptr, eps, unbiased, momentum, size, n, c, C,
        )  # fmt: skip


_NO_NORM = *[None] * 7, 0.0, 0.0, 0.0, 0


def combine(means: Tensor, m2s: Tensor, counts: Tensor, norm: Any = _NO_NORM) -> Any:
    """The moments of images from means and squared deviations of their chunks (N, chunks, C).

    `counts` (chunks,) says of how many voxels each chunk is, in float32. Of a single chunk, what is
    given is the variance. Of several, the last stage may go on with the algebra of a norm, which
    leaves no moments.
    """
    (n, chunks, c), parts = means.shape, [means, m2s, counts]
    while chunks > 1:
        config = configs.over_chunks(n, chunks, c)
        own = norm if config.chunks == 1 else _NO_NORM
        out = partial(n, config.chunks, c, means.device) if own is _NO_NORM else [None] * 3
        tile.launch(
            _combine_kernel, means, config,
            *parts, *out, *own, c, chunks, config.loops * config.block_v, config.chunks,
            config.c_blocks, LAST=config.chunks == 1,
        )  # fmt: skip
        parts, chunks = out, config.chunks
    return None if norm is not _NO_NORM else Moments(parts[0][:, 0], parts[1][:, 0])


NO_PARTS = (None, None, None)
"""In their place, where nobody asks for moments."""


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
    """By the kernels of the moments alone, where each channel of each sample is a pool."""
    n, c = x.shape[:2]
    *kept, momentum = running
    if pooling.pools(n, c)[1] == 1:
        out = torch.empty(6, n, c, dtype=torch.float32, device=x.device)
        own = *map(finalize.dense, (before, gamma, beta)), out, *kept
        numbers = eps, pooling.unbiased(n, c, tile.voxels(x)), momentum, n * c
        _moments(x, p, None, None, (*own, *numbers))
        return out
    given = moments(x, p), before, gamma, beta, eps, tile.voxels(x)
    if kept[-1] is None:
        return finalize.norm_finalize(*given, pooling)
    return finalize.norm_finalize_running(*given, *running)


def materialize_moments(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    z = layout.like(x, dtype)
    return z, *_moments(x, p, residual, z)


def _moments(
    x: Tensor, p: Prologue, residual: Tensor | None, z: Tensor | None, norm: Any = _NO_NORM
) -> Any:
    """Of z, which is written; or, if there is no z to write, of what is before its last affine.

    The last kernel may go on with the algebra of a norm; it leaves no moments then.
    """
    name = "moments" if z is None else "materialize_moments"
    x, x_strides = tile.strided(x)
    residual, r_strides = (None, (0, 0, 0)) if residual is None else tile.strided(residual)
    z, z_strides = (None, (0, 0, 0)) if z is None else tile.strided(z)
    n, c = x.shape[:2]
    config = configs.of(name, x, x_strides, reduce=True)
    config = config._replace(registers=128)  # left to itself, ptxas keeps to 64, and spills
    own = norm if config.chunks == 1 else _NO_NORM
    parts: Any = partial(n, config.chunks, c, x.device) if own is _NO_NORM else [None] * 3
    images = [one for one in (x, residual, z) if one is not None]
    last = (None, None) if z is None else (p.s2, p.t2)
    tile.launch(
        _moments_kernel, x, config,
        x, *parts, p.s1, p.t1, p.slope, *last, residual, z, *own,
        p.activation.p, p.activation.q, c, tile.voxels(x), *x_strides, *r_strides, *z_strides,
        config.chunks, config.c_blocks, config.loops,
        ACT=p.activation.name, WIDE=tile.is_wide(*images), WORDS=tile.in_words(*images),
    )  # fmt: skip
    return combine(*parts, norm) if own is _NO_NORM else None


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
        finalize.store_gradient(
            h, hb, out_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, gamma_ptr, size,
            n, c, C, V, FIXED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["V", "N", "chunks", "c_blocks"])
def _norm_sums_kernel(
    sums_ptr, out_ptr, mean_ptr, rstd_ptr, before_ptr, after_ptr, gamma_ptr, centre_ptr, C, V, N,
    chunks, c_blocks, FIXED: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, n, c = tile.place(1, c_blocks, BLOCK_C)
    h = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    hb = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    start = 0
    while start < chunks:
        k = start + tl.arange(0, BLOCK_V)
        inside = (k < chunks)[:, None] & (c < C)[None, :]
        at = sums_ptr + (n.to(tl.int64) * chunks + k)[:, None] * C + c[None, :]
        h += tl.load(at, mask=inside, other=0.0)
        hb += tl.load(at + N.to(tl.int64) * chunks * C, mask=inside, other=0.0)
        start += BLOCK_V
    finalize.store_gradient(
        tl.sum(h, 0), tl.sum(hb, 0), out_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr,
        gamma_ptr, N * C, n, c, C, V, FIXED,
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
    if pooling.pools(*x.shape[:2])[1] == 1:
        norm = *map(finalize.dense, (mean, rstd, before, after, gamma)), pooling.kind == "fixed"
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
    """Of each chunk (3, N, chunks, C); or, of a norm, what they amount to (5, N, 1, C)."""
    g, g_strides = tile.strided(g)
    x, x_strides = tile.strided(x)
    n, c = x.shape[:2]
    config = configs.of("prologue_sums", x, x_strides, reduce=True)
    *own, is_fixed = norm if config.chunks == 1 else _NO_GRADIENT
    rows = 3 if own[0] is None else 5
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
    return out if norm is _NO_GRADIENT or rows == 5 else _with_gradient(out, x, centre, norm)


def _with_gradient(sums: Tensor, x: Tensor, centre: Any, norm: Any) -> Tensor:
    """Add the sums of several chunks, and finish the norm's gradient; torch adds very many."""
    _, n, chunks, c = sums.shape
    config = configs.over_chunks(n, chunks, c)
    if config.chunks != 1:
        sums, chunks = sums.sum(2), 1
        config = configs.over_chunks(n, chunks, c)
    elif config.loops > 1:  # each of which waits for memory
        config = config._replace(block_v=256, warps=8)
    *own, is_fixed = norm
    out = torch.empty(5, n, 1, c, dtype=torch.float32, device=x.device)
    tile.launch(
        _norm_sums_kernel, x, config,
        sums, out, *own, centre, c, tile.voxels(x), n, chunks, config.c_blocks, FIXED=is_fixed,
    )  # fmt: skip
    return out
