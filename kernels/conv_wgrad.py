"""The gradient of the weights and the bias of a convolution: a product over all voxels.

    dw[k, c, t] = sum over n, v of z[n, c, s v - before + d t] g[n, k, v]        db[k] = sum of g

Rows are taps x channels of z, columns channels of g, depth the voxels, which are split over
programs: each leaves its share in float32, and these are added in their order. No atomics: the same
input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, layout, tile
from cassetta.kernels.conv_fprop import voxel_steps, walk
from cassetta.kernels.types import Geometry, Prologue

_SIZES = [
    "C", "K", "V", "X0", "X1", "X2", "Y1", "Y2", "T1", "T2", "s0", "s1", "s2", "b0", "b1", "b2",
    "d0", "d1", "d2", "x_n", "x_v", "g_n", "g_v", "taps", "part", "splits", "c_blocks", "k_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _conv_wgrad_kernel(
    x_ptr, g_ptr, dw_ptr, db_ptr, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
    C, K, V, X0, X1, X2, Y1, Y2, T1, T2, s0, s1, s2, b0, b1, b2, d0, d1, d2,
    x_n, x_v, g_n, g_v, taps, part, splits, c_blocks, k_blocks,
    PRE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    k_block, rest = program % k_blocks, program // k_blocks
    c_block, rest = rest % c_blocks, rest // c_blocks
    t_blocks = tl.cdiv(taps, BLOCK_T)
    t_block, rest = rest % t_blocks, rest // t_blocks
    split, n = rest % splits, (rest // splits).to(tl.int64)
    row = tl.arange(0, BLOCK_T * BLOCK_C)
    tap, c = t_block * BLOCK_T + row // BLOCK_C, c_block * BLOCK_C + row % BLOCK_C
    k = k_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o0 = tap // (T1 * T2) * d0 - b0
    o1 = tap // T2 % T1 * d1 - b1
    o2 = tap % T2 * d2 - b2
    wanted = (c < tile.edge(C, True)) & (tap < taps)
    if PRE:
        scale, shift = tile.row(p_s1, n, c, C, 1.0), tile.row(p_t1, n, c, C, 0.0)
        outer, offset = tile.row(p_s2, n, c, C, 1.0), tile.row(p_t2, n, c, C, 0.0)
        slope = tile.row(p_slope, n, c, C, 0.0)
    x_base = x_ptr + n * (x_n // 8 * 8)
    g_base = g_ptr + n * (g_n // 8 * 8)
    x_step, g_step = x_v // 8 * 8, g_v // 8 * 8
    total = tl.zeros((BLOCK_T * BLOCK_C, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    end = tl.minimum((split + 1) * part, V)
    for start in tl.range(split * part, end, BLOCK_V, num_stages=STAGES):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < V
        i0 = (v // Y2 // Y1 * s0)[:, None] + o0[None, :]
        i1 = (v // Y2 % Y1 * s1)[:, None] + o1[None, :]
        i2 = (v % Y2 * s2)[:, None] + o2[None, :]
        ok = (i0 >= 0) & (i0 < X0) & (i1 >= 0) & (i1 < X1) & (i2 >= 0) & (i2 < X2)
        ok = ok & inside[:, None] & wanted[None, :]
        at = (i0 * X1 + i1) * X2 + i2
        if WIDE:
            at, v = at.to(tl.int64), v.to(tl.int64)
        x = tl.load(x_base + at * x_step + c[None, :], mask=ok, other=0.0)
        if PRE:
            u = tile.activation(scale * x.to(tl.float32) + shift, p_p, p_q, slope, ACT)
            x = tl.where(ok, outer * u + offset, 0.0).to(g_ptr.dtype.element_ty)
        there = inside[:, None] & (k < tile.edge(K, True))[None, :]
        g = tl.load(g_base + (v * g_step)[:, None] + k[None, :], mask=there, other=0.0)
        bias += tl.sum(g.to(tl.float32), 0)
        total = tl.dot(tl.trans(x), g, total, input_precision=PRECISION)
    share = n * splits + split
    at = ((share * taps + tap) * C + c)[:, None] * K + k[None, :]
    tl.store(dw_ptr + at, total, mask=((c < C) & (tap < taps))[:, None] & (k < K)[None, :])
    if t_block + c_block == 0:
        tl.store(db_ptr + share * K + k, bias, mask=k < K)


def conv_wgrad(
    g: Tensor, x: Tensor, p: Prologue, taps: tuple[int, ...], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    g, x = layout.in_words(g), layout.in_words(x)
    (n, c), k = x.shape[:2], g.shape[1]
    inp, out, size, stride, before, dilation = walk(x, taps, geometry)
    voxels, many = out[0] * out[1] * out[2], size[0] * size[1] * size[2]
    product = configs.Product("conv_wgrad", tuple(x.shape), k, taps, geometry, g.dtype)
    config = configs.wgrad(product, voxels, x.device, not p.is_identity)
    tables = {"dtype": torch.float32, "device": x.device}
    dw = torch.empty(n * config.splits, many, c, k, **tables)
    db = torch.empty(n * config.splits, k, **tables)
    s1, t1, act, slope, s2, t2 = p
    tile.launch(
        _conv_wgrad_kernel, x, config,
        x, g, dw, db, s1, t1, slope, s2, t2, act.p, act.q,
        c, k, voxels, *inp, *out[1:], *size[1:], *stride, *before, *dilation,
        *voxel_steps(x), *voxel_steps(g), many, config.part, config.splits, config.c_blocks,
        config.k_blocks, PRE=not p.is_identity, ACT=act.name, WIDE=tile.is_wide(x, g),
        PRECISION=configs.precision(g.dtype),
    )  # fmt: skip
    return dw.sum(0).permute(2, 1, 0).contiguous().reshape(k, c, *taps), db.sum(0)
