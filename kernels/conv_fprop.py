"""Convolution as an implicit GEMM, channels last: rows are voxels, columns channels.

    y = act(s1 (z * w + b) + t1) s2 + t2 (+ residual)      the epilogue, and
    mean, var = moments of act'(y) over the voxels         of what is stored

Depth is taps x channels (arXiv:1410.0759): one flat loop, so that the loads of the next steps are
under way while one is multiplied, over tap and channel at run time, so that one compilation serves
all dilations, strides and sizes. A tap that lies outside the image reads zeros *after* the pending
transform of x, if there is one: padding surrounds z, not x.

The same kernel computes the gradient of the image (`conv_dgrad`: taps mirrored, channels
exchanged) and, with SCATTER, what writes to one tap per voxel: transposed convolutions whose stride
is their size. 2 N |Y| K C T operations; x is read T times, mostly from the L2 cache.
"""

import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import boxes, configs, layout, lines, plans, precision, reductions, tile
from cassetta.kernels.boxes import NO_BOX
from cassetta.kernels.configs import GemmConfig
from cassetta.kernels.geometry import Walk, along_depth, lifted, walk
from cassetta.kernels.lines import MarchConfig
from cassetta.kernels.operands import added, voxel_steps
from cassetta.kernels.plans import MarchPlan, Product
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue

_SIZES = [
    "C", "C2", "K", "V", "X0", "X1", "X2", "Y0", "Y1", "Y2", "Z1", "Z2", "T0", "T1", "T2", "s0",
    "s1", "s2", "b0", "b1", "b2", "d0", "d1", "d2", "x_n", "x_v", "u_n", "u_v", "y_n", "y_v",
    "taps", "outs", "tiles", "k_blocks", "size",
]  # fmt: skip
"""What is a number at run time, whatever it is."""


@triton.jit
def accumulate(
    total, x_ptr, w_ptr, n, i0, i1, i2, q0, q1, q2, inside, out, k0, C, K, x_n, x_v, X0, X1, X2,
    T1, T2, taps, d0, d1, d2, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
    PRE: tl.constexpr, ACT: tl.constexpr, GUARD: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, BOXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to `total` (BLOCK_M, BLOCK_N) the products of all taps, the first one at i0, i1, i2.

    `out` is the first tap of w. BOXED, the images are descriptors, and the tile begins at q0, q1,
    q2.

    What is copied ahead (cp.async) has its address inside its tensor, masked or not, by `whole` and
    by selecting 0: copies of nothing have accessed what they pointed at (pytorch#187081, sm_100).

    LATE, a step multiplies what the step before made of x: Triton would feed what was computed, and
    not copied, to wgmma from registers, which ptxas sets anew too early (triton#11781); what a step
    hands on, it stores to shared memory.
    """
    BLOCK_M: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    channels, columns = tile.edge(C, True), tile.edge(K, True)
    blocks = tl.cdiv(channels, BLOCK_K)
    lane, column, last = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N), out + taps - 1
    k = k0 + column
    k_at = tile.whole(k0, column, k < columns)
    tap, block, t0, t1, t2 = out, 0, 0, 0, 0
    LATE: tl.constexpr = tile.on_hopper() and PRECISION != "ieee" and (PRE or GUARD or BOXED)
    w_tap, w_block, steps = out, 0, taps * blocks
    if LATE:
        w_block, steps = -1, steps + 1
        z = tl.zeros((BLOCK_M, BLOCK_K), w_ptr.dtype if BOXED else w_ptr.dtype.element_ty)
    for _ in tl.range(0, steps, num_stages=STAGES):
        if not LATE:
            w_tap, w_block = tap, block
        a, b, e = i0 + t0 * d0, i1 + t1 * d1, i2 + t2 * d2
        ok = inside & (a >= 0) & (a < X0) & (b >= 0) & (b < X1) & (e >= 0) & (e < X2)
        c = block * BLOCK_K + lane
        if BOXED:
            x = x_ptr.load([n, q0 + t0 * d0, q1 + t1 * d1, q2 + t2 * d2, block * BLOCK_K])
            x = tl.reshape(x, (BLOCK_M, BLOCK_K))
            w = tl.reshape(w_ptr.load([w_tap, w_block * BLOCK_K, k0]), (BLOCK_K, BLOCK_N))
        else:
            v = tl.where(ok, (a * X1 + b) * X2 + e, 0)
            if WIDE:
                v = v.to(tl.int64)
            at = x_ptr + n.to(tl.int64) * (x_n // 8 * 8)
            at += (v * (x_v // 8 * 8))[:, None]
            at += tile.whole(block * BLOCK_K, lane, c < channels)[None, :]
            x = tl.load(at, mask=ok[:, None] & (c < channels)[None, :], other=0.0)
            w_c = w_block * BLOCK_K + lane
            within = (w_c >= 0) & (w_c < channels)
            row = tl.minimum(w_tap, last) * channels + tl.where(within, w_c, 0)
            at = row[:, None] * columns + k_at[None, :]
            there = within[:, None] & (k < columns)[None, :]
            w = tl.load(w_ptr + at, mask=there, other=0.0)
        if LATE:
            total = tl.dot(z, w, total, input_precision=PRECISION)
        if PRE:
            u = tile.transformed(
                x.to(tl.float32), n, tl.where(c < C, c, 0), C,
                p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q, ACT,
            )  # fmt: skip
            x = tl.where(ok[:, None] & (c < C)[None, :], u, 0.0).to(w.dtype)
        elif GUARD and not BOXED:
            x = tl.where((c < C)[None, :], x, 0.0)
        if LATE:
            z = x
            w_block, wrap = tile.carried(w_block + 1, blocks)
            w_tap += wrap
        else:
            total = tl.dot(x, w, total, input_precision=PRECISION)
        block, wrap = tile.carried(block + 1, blocks)
        tap += wrap
        t2, wrap = tile.carried(t2 + wrap, T2)
        t1, wrap = tile.carried(t1 + wrap, T1)
        t0 += wrap
    return total


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    x_ptr, u_ptr, w_ptr, w2_ptr, b_ptr, y_ptr, r_ptr, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
    e_s1, e_t1, e_slope, e_s2, e_t2, e_p, e_q, centre_ptr, out_ptr, mean_ptr, m2_ptr,
    count_ptr, m_p, m_q, C, C2, K, V, X0, X1, X2, Y0, Y1, Y2, Z1, Z2, T0, T1, T2, s0, s1, s2,
    b0, b1, b2, d0, d1, d2, x_n, x_v, u_n, u_v, y_n, y_v, r_n, r_c, r_v, taps, outs, tiles,
    k_blocks, size,
    PRE: tl.constexpr, P_ACT: tl.constexpr, E_ACT: tl.constexpr, M_ACT: tl.constexpr,
    SCATTER: tl.constexpr, AFTER: tl.constexpr, GUARD: tl.constexpr, GUARD2: tl.constexpr,
    R_WORDS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BOX0: tl.constexpr, BOX1: tl.constexpr, BOX2: tl.constexpr,
):  # fmt: skip
    BOXED: tl.constexpr = BOX0 > 0
    program = tl.program_id(0)
    k0 = (program % k_blocks) * BLOCK_N
    k = k0 + tl.arange(0, BLOCK_N)
    rest = program // k_blocks
    tile_m, out = rest % tiles, rest // tiles % outs  # `out` is the tap that is written to
    n = rest // tiles // outs
    e0, e1, e2 = tile.box_of(tile_m, Y1, Y2, BOX0, BOX1, BOX2)
    m, y0, y1, y2, inside = tile.voxels_of(
        tile_m, e0, e1, e2, V, Y0, Y1, Y2, BLOCK_M, BOX0, BOX1, BOX2
    )  # fmt: skip
    q0, q1, q2 = e0 * BOX0 - b0, e1 * BOX1 - b1, e2 * BOX2 - b2
    i0, i1, i2 = y0 * s0 - b0, y1 * s1 - b1, y2 * s2 - b2
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = accumulate(
        total, x_ptr, w_ptr, n, i0, i1, i2, q0, q1, q2, inside, out, k0, C, K,
        x_n, x_v, X0, X1, X2, T1, T2, taps, d0, d1, d2, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
        PRE, P_ACT, GUARD, BLOCK_K, WIDE, BOXED, PRECISION, STAGES,
    )  # fmt: skip
    if u_ptr is not None:  # further channels, in another image
        total = accumulate(
            total, u_ptr, w2_ptr, n, i0, i1, i2, q0, q1, q2, inside, out, k0, C2, K,
            u_n, u_v, X0, X1, X2, T1, T2, taps, d0, d1, d2,
            None, None, None, None, None, p_p, p_q,
            False, P_ACT, GUARD2, BLOCK_K, WIDE, BOXED, PRECISION, STAGES,
        )  # fmt: skip
    n = n.to(tl.int64)
    if b_ptr is not None:
        total += tl.load(b_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    v = m
    if SCATTER:
        v = ((y0 * T0 + out // (T1 * T2)) * Z1 + y1 * T1 + out // T2 % T1) * Z2
        v += y2 * T2 + out % T2
    known = inside[:, None] & (k < K)[None, :]
    if out_ptr is None:
        total = tile.transformed(
            total, n, k, K, e_s1, e_t1, e_slope, e_s2, e_t2, e_p, e_q, E_ACT
        )  # fmt: skip
        if r_ptr is not None:  # (read so late, it takes no registers that the tables need)
            total += _read(r_ptr, n, v, k, r_n, r_c, r_v, inside, K, WIDE, R_WORDS)
    y = total.to(y_ptr.dtype.element_ty)
    there = inside[:, None] & (k < tile.edge(K, True))[None, :]
    tl.store(tile.at(y_ptr, n, v, k, y_n, 1, y_v, WIDE, True), y, mask=there)
    value = y.to(tl.float32)
    chunk = (n * outs * tiles + out * tiles + tile_m) * K + k
    if out_ptr is not None:
        r = _read(r_ptr, n, v, k, r_n, r_c, r_v, inside, K, WIDE, R_WORDS)
        _leave_sums(
            value, r, known, n, k, K, e_s1, e_t1, e_slope, e_s2, e_p, e_q, centre_ptr,
            out_ptr + chunk, size, E_ACT, AFTER,
        )  # fmt: skip
    if mean_ptr is not None:
        slope = tl.zeros((1, BLOCK_N), tl.float32)
        value = tile.activation(value, m_p, m_q, slope, M_ACT)
        alone = outs * tiles == 1
        count = _leave_moments(value, inside, k < K, mean_ptr + chunk, m2_ptr + chunk, alone)
        tl.store(count_ptr + out * tiles + tile_m, count, mask=n + k0 == 0)


@triton.jit
def _read(
    ptr, n, v, k, stride_n, stride_k, stride_v, inside, K, WIDE: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """A tile of the residual, or of what a gradient is of, in float32."""
    there = inside[:, None] & (k < tile.edge(K, WORDS))[None, :]
    at = tile.at(ptr, n, v, k, stride_n, stride_k, stride_v, WIDE, WORDS)
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _leave_sums(
    g, x, known, n, k, K, s1_ptr, t1_ptr, slope_ptr, s2_ptr, p, q, centre_ptr, out, size,
    ACT: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Of a tile of a gradient, what `prologue_sums` makes of it, x being what is pending."""
    u = tile.row(s1_ptr, n, k, K, 1.0) * x + tile.row(t1_ptr, n, k, K, 0.0)
    slope = tile.row(slope_ptr, n, k, K, 0.0)
    if AFTER:
        h, b = g, tile.activation(u, p, q, slope, ACT)
    else:
        h, b = g * tile.row(s2_ptr, n, k, K, 1.0) * tile.derivative(u, p, q, slope, ACT), x
    h = tl.where(known, h, 0.0)
    hb = tl.where(known, h * (b - tile.row(centre_ptr, n, k, K, 0.0)), 0.0)
    tl.store(out, tl.sum(h, 0), mask=k < K)
    tl.store(out + size, tl.sum(hb, 0), mask=k < K)


@triton.jit
def _leave_moments(value, inside, wanted, mean_out, m2_out, alone):
    """The mean of each channel of a tile, and the sum of squared deviations from it.

    Of a tile that is alone, their mean: the variance. Returns the number of voxels.
    """
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / count
    apart = tl.where(inside[:, None], value - mean[None, :], 0.0)
    tl.store(mean_out, mean, mask=wanted)
    spread = tl.sum(apart * apart, 0)
    if alone:
        spread /= count
    tl.store(m2_out, spread, mask=wanted)
    return count


def conv_fprop(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    x2: Tensor | None = None, epilogue: Prologue = NOTHING, residual: Tensor | None = None,
    moments_of: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    steps = walk(x.shape[2:], w.shape[2:], geometry)
    shape = (x.shape[0], w.shape[0], *steps.out[3 - (x.ndim - 2) :])
    y = layout.empty(shape, w.dtype, x.device)
    c = x.shape[1]
    packed = [layout.packed(part.flatten(2).permute(2, 1, 0)) for part in (w[:, :c], w[:, c:])]
    x2 = None if x2 is None else layout.in_words(x2)
    product = Product(
        "conv_fprop", (x.shape[0], *w.shape[1:2], *x.shape[2:]), w.shape[0], tuple(w.shape[2:]),
        geometry, w.dtype,
    )  # fmt: skip
    found = run(
        product, layout.in_words(x), p, packed[0], b, y, steps, x2=x2,
        w2=None if x2 is None else packed[1], epilogue=epilogue, image=residual,
        moments_of=moments_of,
    )  # fmt: skip
    return y, *found


def run(
    product: Product, x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, y: Tensor, steps: Walk,
    x2: Tensor | None = None, w2: Tensor | None = None, epilogue: Prologue = NOTHING,
    image: Tensor | None = None, moments_of: Activation | None = None,
    centre: Tensor | None = None, after: bool = False, scatter: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Start the kernel: y = x * w over `steps`; w (T, C, K) in whole words; or march along D.

    `image` is the residual; or, with `centre`, what `epilogue` is the pending transform of, and
    then the sums that it asks for come back: (2, N, K), and nothing else. Otherwise the moments.
    """
    (n, c), k = x.shape[:2], y.shape[1]
    b = None if b is None else b.contiguous()
    plain = x2 is None and p.is_identity() and (image is None or centre is not None)
    marches, deep = plain and product.marches, along_depth(steps)
    if marches:
        marches = lines.are_covered(n, deep, max(voxel_steps(x)[1], voxel_steps(y)[1]))
    plan = plans.chosen(product, x.device, marches)
    if isinstance(plan, MarchPlan):
        march = lines.marching(plan, n, deep, k)
        return _marched(march, x, w, b, y, deep, epilogue, image, moments_of, centre, after)
    taps = steps.taps[0] * steps.taps[1] * steps.taps[2]
    outs, taps = (taps, 1) if scatter else (1, taps)
    heavy = image is not None or not p.is_identity() or not epilogue.is_identity()
    heavy |= moments_of is not None and moments_of.name not in ("identity", "relu", "leaky_relu")
    readable = partial(_are_readable, x, x2, w, w2)
    config = configs.gemm(plan, product, n * outs, steps.out, x.device, heavy, readable)
    chunks, tables = outs * config.tiles, {"dtype": torch.float32, "device": x.device}
    sums = None if centre is None else torch.empty(2, n, chunks, k, **tables)
    parts = _parts(moments_of, n, chunks, k, x.device)
    r_strides = (0, 0, 0)
    if image is not None:
        image, r_strides = tile.strided(image)
    images = [one for one in (x, x2, y, image) if one is not None]
    s1, t1, act, slope, s2, t2 = p
    e1, f1, e_act, e_slope, e2, f2 = epilogue
    m_act = moments_of or Activation()
    inp, out, size, stride, before, dilation = steps
    if scatter:
        stride, before = (1, 1, 1), (0, 0, 0)
    tile.launch(
        _conv_kernel, x, config,
        *_operands(config, x, x2, w, w2), b, y, image, s1, t1, slope, s2, t2, act.p, act.q,
        e1, f1, e_slope, e2, f2, e_act.p, e_act.q, centre, sums, *parts,
        m_act.p, m_act.q,
        c, 0 if x2 is None else x2.shape[1], k, math.prod(out), *inp, *out,
        *lifted(tuple(y.shape[2:]), 1)[1:], *size, *stride, *before, *dilation,
        *voxel_steps(x), *((0, 0) if x2 is None else voxel_steps(x2)), *voxel_steps(y), *r_strides,
        taps, outs, config.tiles, config.k_blocks, n * chunks * k,
        PRE=not p.is_identity(), P_ACT=act.name, E_ACT=e_act.name, M_ACT=m_act.name,
        SCATTER=scatter, AFTER=after, GUARD=c % layout.WORD != 0,
        GUARD2=x2 is not None and x2.shape[1] % layout.WORD != 0,
        R_WORDS=image is not None and layout.is_in_words(image),
        WIDE=tile.is_wide(*images), PRECISION=precision.of(w.dtype),
    )  # fmt: skip
    if sums is not None:
        return added(sums, 2), sums.new_empty(0)
    return _moments(x, parts)


def _marched(
    config: MarchConfig, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, steps: Walk,
    epilogue: Prologue, image: Tensor | None, moments_of: Activation | None,
    centre: Tensor | None, after: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """March along D. The sums that a centre asks for are a pass of their own, then."""
    march = importlib.import_module("cassetta.kernels.conv_march")  # Gluon is not in every triton
    if image is None:
        parts = _parts(moments_of, x.shape[0], config.chunks, y.shape[1], x.device)
        march.run(config, x, w, b, y, steps, epilogue, moments_of, parts)
        return _moments(x, parts)
    march.run(config, x, w, b, y, steps)
    sums = reductions.prologue_sums(y, image, epilogue, centre, None, after)
    return sums[:2], sums.new_empty(0)


def _parts(
    moments_of: Activation | None, n: int, chunks: int, k: int, device: torch.device
) -> Sequence[Any]:
    """Allocate the moments of chunks, if they are asked for."""
    if moments_of is None:
        return reductions.NO_PARTS
    return reductions.partial(n, chunks, k, device)


def _moments(x: Tensor, parts: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Combine moments of parts; if there are none, return two tables without entries."""
    if parts[0] is None:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    mean, var = reductions.combine(*parts)
    return mean, var


def _are_readable(x: Tensor, x2: Tensor | None, *tables: Tensor | None) -> bool:
    """Whether all of these can be read in boxes."""
    images = (boxes.strides(one) is not None for one in (x, x2) if one is not None)
    return all(images) and all(one is None or one.data_ptr() % 16 == 0 for one in tables)


def _operands(config: GemmConfig, x: Tensor, x2: Tensor | None, *tables: Tensor | None) -> Any:
    """What the kernel reads, as pointers, or as descriptors of boxes."""
    if config.box == NO_BOX:
        return x, x2, *tables
    images = (tile.image_in_boxes(one, config.box, config.block_k) for one in (x, x2))
    return *images, *(tile.table_in_boxes(one, config.block_k, config.block_n) for one in tables)
