"""The gradient of the weights of a convolution: a product over all voxels.

    dw[k, c, t] = sum over n, v of z[n, c, s v - before + d t] g[n, k, v]

Rows are taps x channels of z, columns channels of g, depth the voxels, which are split over
programs: each leaves its share in float32, and these are added in their order. No atomics: the same
input gives the same bits.

Nothing but the product reads g: the gradient of the bias, its sum, is taken elsewhere. An operand
that something else in the loop reads, too, is copied to one buffer fewer than products that are
asynchronous need (triton#6691), and is overwritten while it is multiplied.

A box begins at a multiple of 16 bytes along its channels, also where it lies outside of an image:
anything else is an illegal instruction (triton#7385; seen on an H200).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import boxes, configs, layout, plans, precision, tile
from cassetta.kernels.boxes import NO_BOX
from cassetta.kernels.conv_fprop import voxel_steps, walk
from cassetta.kernels.operands import added
from cassetta.kernels.types import Geometry, Prologue

_SIZES = [
    "C", "K", "V", "X0", "X1", "X2", "Y0", "Y1", "Y2", "T1", "T2", "s0", "s1", "s2", "b0", "b1",
    "b2", "d0", "d1", "d2", "x_n", "x_v", "g_n", "g_v", "taps", "steps", "part", "splits",
    "c_blocks", "k_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _conv_wgrad_kernel(
    x_ptr, g_ptr, dw_ptr, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
    C, K, V, X0, X1, X2, Y0, Y1, Y2, T1, T2, s0, s1, s2, b0, b1, b2, d0, d1, d2,
    x_n, x_v, g_n, g_v, taps, steps, part, splits, c_blocks, k_blocks,
    PRE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    BOX0: tl.constexpr, BOX1: tl.constexpr, BOX2: tl.constexpr,
):  # fmt: skip
    BOXED: tl.constexpr = BOX0 > 0
    program = tl.program_id(0)
    k_block, rest = program % k_blocks, program // k_blocks
    c_block, rest = rest % c_blocks, rest // c_blocks
    t_blocks = tl.cdiv(taps, BLOCK_T)
    t_block, rest = rest % t_blocks, rest // t_blocks
    split, n = rest % splits, rest // splits
    row = tl.arange(0, BLOCK_T * BLOCK_C)
    tap, c = t_block * BLOCK_T + row // BLOCK_C, c_block * BLOCK_C + row % BLOCK_C
    k = k_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o0, o1, o2 = _offsets(tap, T1, T2, d0, d1, d2, b0, b1, b2)
    q0, q1, q2 = _offsets(t_block, T1, T2, d0, d1, d2, b0, b1, b2)  # BOXED, it is the tap
    wanted = (c < tile.edge(C, True)) & (tap < taps)
    c_at = tile.whole(c_block * BLOCK_C, row % BLOCK_C, wanted)
    k_at = tile.whole(k_block * BLOCK_N, tl.arange(0, BLOCK_N), k < tile.edge(K, True))
    if PRE:
        scale, shift = tile.row(p_s1, n, c, C, 1.0), tile.row(p_t1, n, c, C, 0.0)
        outer, offset = tile.row(p_s2, n, c, C, 1.0), tile.row(p_t2, n, c, C, 0.0)
        slope = tile.row(p_slope, n, c, C, 0.0)
    total = tl.zeros((BLOCK_T * BLOCK_C, BLOCK_N), tl.float32)
    first, end = split * part, tl.minimum((split + 1) * part, steps)
    e0, e1, e2 = tile.box_of(first, Y1, Y2, BOX0, BOX1, BOX2)
    f0, f1, f2 = e0, e1, e2  # the box of g
    LATE: tl.constexpr = tile.on_hopper() and PRECISION != "ieee" and (PRE or RAGGED or BOXED)
    if LATE:  # as in `conv_fprop.accumulate`
        end += 1
        z = tl.zeros((BLOCK_T * BLOCK_C, BLOCK_V), g_ptr.dtype if BOXED else g_ptr.dtype.element_ty)
    for step in tl.range(first, end, num_stages=STAGES):
        late = (step > first).to(tl.int32) if LATE else 1
        v, y0, y1, y2, inside = tile.voxels_of(
            step, e0, e1, e2, V, Y0, Y1, Y2, BLOCK_V, BOX0, BOX1, BOX2
        )  # fmt: skip
        at, ok = _met(y0, y1, y2, s0, s1, s2, o0, o1, o2, X0, X1, X2)
        ok = ok & inside[:, None] & wanted[None, :]
        if BOXED:
            x = x_ptr.load([n, e0 * BOX0 + q0, e1 * BOX1 + q1, e2 * BOX2 + q2, c_block * BLOCK_C])
            x = tl.reshape(x, (BLOCK_V, BLOCK_C))
            k0 = tl.where(late > 0, k_block * BLOCK_N, tile.edge(K, True))  # (zeros, in words)
            g = tl.reshape(g_ptr.load([n, f0 * BOX0, f1 * BOX1, f2 * BOX2, k0]), (BLOCK_V, BLOCK_N))
        else:
            at, there = tl.where(ok, at, 0), inside
            if LATE:
                v -= BLOCK_V
                there = (v < V) & (step > first)
            v = tl.where(there, v, 0)
            if WIDE:
                at, v = at.to(tl.int64), v.to(tl.int64)
            many = n.to(tl.int64)
            x_at = x_ptr + many * (x_n // 8 * 8) + (at * (x_v // 8 * 8) + c_at[None, :])
            x = tl.load(x_at, mask=ok, other=0.0)
            g_at = g_ptr + many * (g_n // 8 * 8) + ((v * (g_v // 8 * 8))[:, None] + k_at[None, :])
            there = there[:, None] & (k < tile.edge(K, True))[None, :]
            g = tl.load(g_at, mask=there, other=0.0)
        if LATE:
            total = tl.dot(z, g, total, input_precision=PRECISION)
        if PRE:
            u = tile.activation(scale * x.to(tl.float32) + shift, p_p, p_q, slope, ACT)
            x = tl.where(ok, outer * u + offset, 0.0).to(g.dtype)
        elif RAGGED:  # beyond the end of g, which is 0 there, x may be anything, NaN too
            x = tl.where(inside[:, None], x, 0.0)
        if LATE:
            z = tl.trans(x)
        else:
            total = tl.dot(tl.trans(x), g, total, input_precision=PRECISION)
        if BOXED:
            e0, e1, e2 = _next_box(e0, e1, e2, 1, Y1, Y2, BOX1, BOX2)
            f0, f1, f2 = _next_box(f0, f1, f2, late, Y1, Y2, BOX1, BOX2)
    n = n.to(tl.int64)
    share = n * splits + split
    at = ((share * taps + tap) * C + c)[:, None] * K + k[None, :]
    tl.store(dw_ptr + at, total, mask=((c < C) & (tap < taps))[:, None] & (k < K)[None, :])


@triton.jit
def _met(y0, y1, y2, s0, s1, s2, o0, o1, o2, X0, X1, X2):
    """The voxels of an image that taps meet, and whether they are inside: (BLOCK_V, rows)."""
    i0, i1 = (y0 * s0)[:, None] + o0[None, :], (y1 * s1)[:, None] + o1[None, :]
    i2 = (y2 * s2)[:, None] + o2[None, :]
    ok = (i0 >= 0) & (i0 < X0) & (i1 >= 0) & (i1 < X1) & (i2 >= 0) & (i2 < X2)
    return (i0 * X1 + i1) * X2 + i2, ok


@triton.jit
def _next_box(e0, e1, e2, step, Y1, Y2, BOX1: tl.constexpr, BOX2: tl.constexpr):
    """Return the box that is `step` boxes (0 or 1) behind this one."""
    e2, wrap = tile.carried(e2 + step, tl.cdiv(Y2, BOX2))
    e1, wrap = tile.carried(e1 + wrap, tl.cdiv(Y1, BOX1))
    return e0 + wrap, e1, e2


@triton.jit
def _offsets(tap, T1, T2, d0, d1, d2, b0, b1, b2):
    """Where a tap lies, along each axis, from where its voxel does."""
    return tap // (T1 * T2) * d0 - b0, tap // T2 % T1 * d1 - b1, tap % T2 * d2 - b2


def conv_wgrad(
    g: Tensor, x: Tensor, p: Prologue, taps: tuple[int, ...], geometry: Geometry
) -> Tensor:
    g, x = layout.in_words(g), layout.in_words(x)
    (n, c), k = x.shape[:2], g.shape[1]
    inp, out, size, stride, before, dilation = walk(x, taps, geometry)
    many = math.prod(size)
    product = plans.Product("conv_wgrad", tuple(x.shape), k, taps, geometry, g.dtype)
    shape = (out[0], out[1], out[2])
    config = configs.wgrad(
        product, shape, x.device, not p.is_identity(),
        lambda: boxes.strides(x) is not None and boxes.strides(g) is not None,
    )  # fmt: skip
    read: tuple[Any, Any] = (x, g)
    if config.box != NO_BOX:
        read = (
            tile.image_in_boxes(x, config.box, config.block_c),
            tile.image_in_boxes(g, config.box, config.block_n),
        )
    dw = torch.empty(n * config.splits, many, c, k, dtype=torch.float32, device=x.device)
    s1, t1, act, slope, s2, t2 = p
    tile.launch(
        _conv_wgrad_kernel, x, config,
        *read, dw, s1, t1, slope, s2, t2, act.p, act.q,
        c, k, math.prod(out), *inp, *out, *size[1:], *stride, *before, *dilation,
        *voxel_steps(x), *voxel_steps(g), many, config.steps, config.part, config.splits,
        config.c_blocks, config.k_blocks,
        PRE=not p.is_identity(), ACT=act.name, WIDE=tile.is_wide(x, g),
        PRECISION=precision.of(g.dtype), RAGGED=boxes.are_ragged(config.box, shape),
    )  # fmt: skip
    dw = added(dw, 0).permute(2, 1, 0).clone(memory_format=torch.contiguous_format)
    return dw.reshape(k, c, *taps)
