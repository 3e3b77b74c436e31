"""Max pooling by windows that do not overlap, of a pending transform, and its gradient.

    y[v] = max over the taps t of z[window v + t]        z = s2 act(s1 x + t1) + t2

A program of the forward pass holds a tile of coarse voxels and walks over the taps, whose number is
known at run time only, so that one compilation serves all windows. Each element of x is read once,
each result written once. Scales and shifts are read again for each tap, from the caches: the fewer
registers a thread holds, the more reads are under way.

Backward is a gather, and adds nothing up: each fine voxel looks up which of its window was the
largest. g and `where` are read once per tap, mostly from the caches, dz is written once.

`where` is what torch's pooling returns, in the window instead of the image: the first of equals,
and the last NaN. It fits into a byte for windows of up to 256 voxels.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, layout, plans, tile
from cassetta.kernels.conv_fprop import lifted
from cassetta.kernels.types import Prologue, Size

_SIZES = ["V", "X1", "X2", "Y0", "Y1", "Y2", "T0", "T1", "T2", "taps", "chunks", "c_blocks"]
"""What is a number at run time, whatever it is."""


@triton.jit(do_not_specialize=_SIZES)
def _max_pool_kernel(
    x_ptr, y_ptr, where_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, C, V,
    X1, X2, Y1, Y2, T0, T1, T2, taps, x_n, x_c, x_v, out_n, out_c, out_v, chunks, c_blocks,
    ACT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, OUT_WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
    largest = tl.full((BLOCK_V, BLOCK_C), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_V, BLOCK_C), tl.int32)
    at = ((v // Y2 // Y1 * T0) * X1 + v // Y2 % Y1 * T1) * X2 + v % Y2 * T2  # of the first tap
    tap, i1, i2 = 0, 0, 0
    while tap < taps:
        x = tl.load(tile.at(x_ptr, n, at, c, x_n, x_c, x_v, WIDE, WORDS), mask=inside, other=0.0)
        z = tile.transformed(
            x.to(tl.float32), n, c, C, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, ACT
        )  # fmt: skip
        z = z.to(x_ptr.dtype.element_ty).to(tl.float32)  # as whoever stores z would round it
        takes = (z > largest) | (z != z)  # and tl.maximum would drop NaN
        largest = tl.where(takes, z, largest)
        where = tl.where(takes, tap, where)
        tap += 1
        i2, wrap = tile.carried(i2 + 1, T2)
        at += 1 + wrap * (X2 - T2)
        i1, wrap = tile.carried(i1 + wrap, T1)
        at += wrap * (X1 - T1) * X2
    inside = (v < V)[:, None] & (c < tile.edge(C, OUT_WORDS))[None, :]
    y_at = tile.at(y_ptr, n, v, c, out_n, out_c, out_v, WIDE, OUT_WORDS)
    tl.store(y_at, largest.to(y_ptr.dtype.element_ty), mask=inside)
    w_at = tile.at(where_ptr, n, v, c, out_n, out_c, out_v, WIDE, OUT_WORDS)
    tl.store(w_at, where.to(where_ptr.dtype.element_ty), mask=inside)


def max_pool(x: Tensor, p: Prologue, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x, x_strides = tile.strided(x)
    y, where = layout.pooled(x, window)
    _, *fine = lifted(tuple(x.shape[2:]), 1)
    _, *coarse = lifted(tuple(y.shape[2:]), 1)
    y, y_strides = tile.strided(y)
    config = _config(y, 4096 // x.itemsize if layout.is_in_words(x) else 1024)
    tile.launch(
        _max_pool_kernel, x, config,
        x, y, where, p.s1, p.t1, p.slope, p.s2, p.t2, p.activation.p, p.activation.q,
        x.shape[1], tile.voxels(y), *fine, *coarse, *lifted(window, 1), math.prod(window),
        *x_strides, *y_strides, config.chunks, config.c_blocks, ACT=p.activation.name,
        WIDE=tile.is_wide(x, y), WORDS=tile.in_words(x), OUT_WORDS=layout.is_in_words(y),
    )  # fmt: skip
    return y, where


@triton.jit(do_not_specialize=_SIZES)
def _max_pool_dgrad_kernel(
    g_ptr, where_ptr, dz_ptr, C, V, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    g_n, g_c, g_v, w_n, w_c, w_v, out_n, out_c, out_v, chunks, c_blocks,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
    OUT_WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    i0, i1, i2 = v // X2 // X1, v // X2 % X1, v % X2
    y0, y1, y2 = i0 // T0, i1 // T1, i2 // T2
    tap = ((i0 - y0 * T0) * T1 + i1 - y1 * T1) * T2 + i2 - y2 * T2
    there = (v < V) & (y0 < Y0) & (y1 < Y1) & (y2 < Y2)  # and not left over by a size
    there = there[:, None] & (c < tile.edge(C, WORDS))[None, :]
    y = (y0 * Y1 + y1) * Y2 + y2
    w_at = tile.at(where_ptr, n, y, c, w_n, w_c, w_v, WIDE, WORDS)
    where = tl.load(w_at, mask=there, other=0).to(tl.int32)
    g_at = tile.at(g_ptr, n, y, c, g_n, g_c, g_v, WIDE, WORDS)
    g = tl.load(g_at, mask=there, other=0.0)
    dz = tl.where(where == tap[:, None], g, 0.0)
    inside = (v < V)[:, None] & (c < tile.edge(C, OUT_WORDS))[None, :]
    tl.store(tile.at(dz_ptr, n, v, c, out_n, out_c, out_v, WIDE, OUT_WORDS), dz, mask=inside)


def max_pool_dgrad(g: Tensor, where: Tensor, window: tuple[int, ...], size: Size) -> Tensor:
    g, g_strides = tile.strided(g)
    where, w_strides = tile.strided(where)
    dz, d_strides = tile.strided(layout.sized(where, size, g.dtype))
    _, *fine = lifted(size, 1)
    config = _config(dz, 4096 // dz.itemsize)
    tile.launch(
        _max_pool_dgrad_kernel, g, config,
        g, where, dz, g.shape[1], tile.voxels(dz), *fine, *lifted(tuple(g.shape[2:]), 1),
        *lifted(window, 1), *g_strides, *w_strides, *d_strides, config.chunks, config.c_blocks,
        WIDE=tile.is_wide(g, where, dz), WORDS=tile.in_words(g, where),
        OUT_WORDS=layout.is_in_words(dz),
    )  # fmt: skip
    return dz


def _config(out: Tensor, elements: int) -> configs.Config:
    """By what is written. A thread reads 16 bytes at once, or else four elements."""
    n, c = out.shape[:2]
    last = out.stride(1) == 1
    return configs.over_voxels(n, c, tile.voxels(out), last, False, plans.Plan(elements, 8))
