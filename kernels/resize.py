"""Linear interpolation on a regular grid between zeros, and its adjoint, in 1 to 3 dimensions.

    out[i] = sum_j  prod_a max(0, 1 - |p_a(i_a) - j_a|) z[j]      p_a(i) = (i + shift) step + start

Forward, a program gathers the 2, 4 or 8 voxels around each position, and applies the pending
transform of x to each; zeros surround z, not x. Backward, it gathers for each voxel j the outputs
around which its hat is not zero: those with |p(i) - j| < 1 along each axis, of which the first is
computed from j and the number is known in advance (`Reach`). No atomics: the same input gives the
same bits. Both compute a weight by the same operations.

Each image is read from memory once, if the caches hold what neighbours share, and the result is
written once. The transform is applied once per corner, 8 times per voxel of a 3-D result.
"""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, layout, plans, reference, tile
from cassetta.kernels.conv_fprop import lifted
from cassetta.kernels.types import Grid, Prologue, Size

_SIZES = ["V", "X0", "X1", "X2", "Y0", "Y1", "Y2", "taps0", "taps1", "taps2", "chunks", "c_blocks"]
"""What is a number at run time, whatever it is."""


@triton.jit
def _weight(i, j, shift, step, start):
    """Of voxel j in output i, along an axis."""
    w = 1 - tl.abs((i.to(tl.float32) + shift) * step + start - j.to(tl.float32))
    return tl.where(w > 0, w, 0.0)


@triton.jit
def _before(i, shift, step, start):
    """The last voxel that is not beyond the position of output i."""
    return tl.floor((i.to(tl.float32) + shift) * step + start).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES)
def _resize_kernel(
    x_ptr, y_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, C, V, X0, X1, X2, Y1, Y2,
    shift0, shift1, shift2, step0, step1, step2, start0, start1, start2,
    x_n, x_c, x_v, y_n, y_c, y_v, chunks, c_blocks,
    PRE: tl.constexpr, ACT: tl.constexpr, CORNERS: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
    i0, i1, i2 = v // Y2 // Y1, v // Y2 % Y1, v % Y2
    first0 = _before(i0, shift0, step0, start0)
    first1 = _before(i1, shift1, step1, start1)
    first2 = _before(i2, shift2, step2, start2)
    s1, t1 = tile.row(s1_ptr, n, c, C, 1.0), tile.row(t1_ptr, n, c, C, 0.0)
    slope = tile.row(slope_ptr, n, c, C, 0.0)
    s2, t2 = tile.row(s2_ptr, n, c, C, 1.0), tile.row(t2_ptr, n, c, C, 0.0)
    total = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    corner = 0
    while corner < CORNERS:
        for one in tl.static_range(UNROLLED):  # these loads are under way together
            k = corner + one
            j0, j1, j2 = first0 + k // 4, first1 + k // 2 % 2, first2 + k % 2
            w = _weight(i0, j0, shift0, step0, start0) * _weight(i1, j1, shift1, step1, start1)
            w *= _weight(i2, j2, shift2, step2, start2)
            there = (j0 >= 0) & (j0 < X0) & (j1 >= 0) & (j1 < X1) & (j2 >= 0) & (j2 < X2) & (w > 0)
            at = tile.at(x_ptr, n, (j0 * X1 + j1) * X2 + j2, c, x_n, x_c, x_v, WIDE, WORDS)
            z = tl.load(at, mask=there[:, None] & inside, other=0.0).to(tl.float32)
            if PRE:
                z = s2 * tile.activation(s1 * z + t1, p, q, slope, ACT) + t2
                z = tl.where(there[:, None], z, 0.0)
            total += w[:, None] * z
        corner += UNROLLED
    y_at = tile.at(y_ptr, n, v, c, y_n, y_c, y_v, WIDE, WORDS)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


def resize(x: Tensor, p: Prologue, size: Size, grid: Grid) -> Tensor:
    if _is_beyond(x.shape[2:], size):
        return reference.resize(x, p, size, grid)
    x, x_strides = tile.strided(x)
    y, y_strides = tile.strided(layout.sized(x, size, x.dtype))
    config, corners = _config(y, 128), 2 ** len(size)
    tile.launch(
        _resize_kernel, x, config,
        x, y, p.s1, p.t1, p.slope, p.s2, p.t2, p.activation.p, p.activation.q,
        x.shape[1], tile.voxels(y), *lifted(tuple(x.shape[2:]), 1), *lifted(size, 1)[1:],
        *_numbers(grid), *x_strides, *y_strides, config.chunks, config.c_blocks,
        PRE=not p.is_identity(), ACT=p.activation.name, CORNERS=corners,
        UNROLLED=corners if p.is_identity() else 1,  # of a transform, registers hold no more
        WIDE=tile.is_wide(x, y), WORDS=tile.in_words(x, y),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=_SIZES)
def _resize_dgrad_kernel(
    g_ptr, d_ptr, C, V, X1, X2, Y0, Y1, Y2,
    shift0, shift1, shift2, step0, step1, step2, start0, start1, start2,
    rate0, rate1, rate2, offset0, offset1, offset2, taps0, taps1, taps2,
    g_n, g_c, g_v, d_n, d_c, d_v, chunks, c_blocks,
    UNROLLED: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
    j0, j1, j2 = v // X2 // X1, v // X2 % X1, v % X2
    first0, first1 = _first(j0, rate0, offset0), _first(j1, rate1, offset1)
    first2 = _first(j2, rate2, offset2)
    total = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    t0 = 0
    while t0 < taps0:
        i0 = first0 + t0
        w0 = tl.where(i0 < Y0, _weight(i0, j0, shift0, step0, start0), 0.0)
        t1 = 0
        while t1 < taps1:
            i1 = first1 + t1
            w1 = w0 * tl.where(i1 < Y1, _weight(i1, j1, shift1, step1, start1), 0.0)
            line = (i0 * Y1 + i1) * Y2
            t2 = 0
            while t2 < taps2:
                for one in tl.static_range(UNROLLED):  # these loads are under way together
                    i2 = first2 + t2 + one
                    w = w1 * tl.where(i2 < Y2, _weight(i2, j2, shift2, step2, start2), 0.0)
                    at = tile.at(g_ptr, n, line + i2, c, g_n, g_c, g_v, WIDE, WORDS)
                    g = tl.load(at, mask=(w > 0)[:, None] & inside, other=0.0)
                    total += w[:, None] * g.to(tl.float32)
                t2 += UNROLLED
            t1 += 1
        t0 += 1
    d_at = tile.at(d_ptr, n, v, c, d_n, d_c, d_v, WIDE, WORDS)
    tl.store(d_at, total.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _first(j, rate, offset):
    """The first output that may see voxel j, along an axis."""
    return tl.maximum(tl.ceil(j.to(tl.float32) * rate + offset).to(tl.int32), 0)


def resize_dgrad(g: Tensor, size: Size, grid: Grid) -> Tensor:
    if _is_beyond(g.shape[2:], size):
        return reference.resize_dgrad(g, size, grid)
    g, g_strides = tile.strided(g)
    dz, d_strides = tile.strided(layout.sized(g, size, g.dtype))
    config = _config(dz, configs.REGISTERS)
    numbers, new, old = _numbers(grid), lifted(tuple(g.shape[2:]), 1), lifted(size, 1)
    axes = zip(old, new, numbers[:3], numbers[3:6], numbers[6:], strict=True)
    rates, offsets, taps = zip(*(reach(*axis) for axis in axes), strict=True)
    tile.launch(
        _resize_dgrad_kernel, g, config,
        g, dz, g.shape[1], tile.voxels(dz), *old[1:], *new, *numbers, *rates, *offsets, *taps,
        *g_strides, *d_strides, config.chunks, config.c_blocks,
        UNROLLED=min(4, taps[2]), WIDE=tile.is_wide(g, dz), WORDS=tile.in_words(g, dz),
    )  # fmt: skip
    return dz


class Reach(NamedTuple):
    """Which outputs may see a voxel j along an axis: `taps` from max(0, ceil(rate j + offset))."""

    rate: float
    offset: float
    taps: int


@functools.lru_cache(1024)
def reach(size: int, length: int, shift: float, step: float, start: float) -> Reach:
    """The outputs i of an axis of `length` that may see a voxel j of `size`: |p(i) - j| < 1.

    They lie between rate j + low and rate j + high, with rate = 1 / step; where the kernel computes
    p(i), and the first i, in float32, up to `slack`, which bounds 16 roundings: one of each
    operation and of each number. The range is wider by it at both ends; but where the step or the
    rate is whole, the ends meet whole numbers exactly or never, and an output at an end weighs
    nothing, so that the range is smaller by it: 4 outputs, not 5, when an image is doubled.
    """
    if step == 0:  # all outputs lie at one place
        return Reach(0.0, 0.0, length)
    rate, low, high = 1 / step, (-1 - start) / step - shift, (1 - start) / step - shift
    slack = 2**-20 * ((size + 1 + abs(start)) / step + abs(shift) + 1)
    period = round(step) if step > 1 else 1
    is_whole = abs(rate * period - round(rate * period)) * size < 1e-9
    if is_whole and period <= 64 and 4 * slack < 1:
        ends = [(rate * j + low, rate * j + high) for j in range(period)]
        apart = [abs(end - round(end)) for pair in ends for end in pair]
        if all(one < 1e-9 or one > 2 * slack for one in apart):
            taps = max(math.floor(b - slack) - math.ceil(a + slack) + 1 for a, b in ends)
            return Reach(rate, low + slack, min(taps, length))
    return Reach(rate, low - slack, min(math.floor(high - low + 2 * slack) + 1, length))


def _numbers(grid: Grid) -> tuple[float, ...]:
    """Shifts, steps and starts of three axes; 1-D and 2-D have axes of size 1, with voxel 0."""
    more = 3 - len(grid.step)
    lifted = ([one] * more + list(axes) for axes, one in zip(grid, (0.0, 1.0, 0.0), strict=True))
    return tuple(float(number) for axes in lifted for number in axes)


def _is_beyond(*sizes: tuple[int, ...]) -> bool:
    """Whether an image has more voxels than 31 bits count."""
    return any(math.prod(size) >= configs.VOXELS for size in sizes)


def _config(out: Tensor, registers: int) -> configs.Config:
    """By rule, as nobody has measured plans: with so many registers for a thread that nothing
    spills, which the compiler, left alone, does."""
    n, c = out.shape[:2]
    last = out.stride(1) == 1
    plan = plans.Plan() if last else plans.Plan(512, 4)  # positions of each element, not of 8
    config = configs.over_voxels(n, c, tile.voxels(out), last, False, plan)
    return config._replace(registers=registers)
