"""The gradient of the weights of a convolution: a product over all voxels.

    dw[k, c, t0, t1, t2] = sum over n, v of z[n, c, s v - before + d t] g[n, k, v]

Its rows are taps and channels of z in one flat axis (t0, t1, c), its columns taps along the last
axis, W, and channels of g in another (t2, k), each cut wherever a tile ends. So z is read once for
all taps along W, and g from other places of its row for each of them: what a tap sees of a shifted
z, z sees of a g that is shifted the other way. Where the convolution strides, no two taps see the
same voxel, and all taps are rows; likewise where z has a pending transform.

Depth is the voxels, split over programs: each leaves its share in float32, and these are added in
their order. No atomics: the same input gives the same bits. A step is a part of a row of W, whose
place is counted, not divided; or, where rows are short, several of them. A tile's columns are two
powers of two: 3 taps of 32 channels are 64 and 32 columns.

Nothing but products reads what is copied ahead: the gradient of the bias, a sum of g, is taken
elsewhere. An operand that something else in the loop reads, too, is copied to one buffer fewer than
products that are asynchronous need (triton#6691), and is overwritten while it is multiplied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, layout, precision, tile
from cassetta.kernels.geometry import walk
from cassetta.kernels.operands import added, voxel_steps
from cassetta.kernels.plans import Product
from cassetta.kernels.types import Geometry, Prologue

_SIZES = [
    "C", "K", "X0", "X1", "X2", "Y0", "Y1", "Y2", "T0", "T1", "T2", "s0", "s1", "s2", "b0", "b1",
    "b2", "d0", "d1", "d2", "x_n", "x_v", "g_n", "g_v", "start", "stop", "width", "across",
    "lines", "steps", "part", "splits", "r_blocks", "q_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _conv_wgrad_kernel(
    x_ptr, g_ptr, dw_ptr, p_s1, p_t1, p_slope, p_s2, p_t2, p_p, p_q,
    C, K, X0, X1, X2, Y0, Y1, Y2, T0, T1, T2, s0, s1, s2, b0, b1, b2, d0, d1, d2,
    x_n, x_v, g_n, g_v, start, stop, width, across, lines, steps, part, splits, r_blocks, q_blocks,
    PRE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    ALONG: tl.constexpr, APART: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dw (N, splits, rows, columns): T0 x T1 x taps along W x channels of x, and taps along W x
    channels of g, both in whole words. ALONG, the latter are all taps along W; else the former.

    APART, rows see a row of W at places of their own. LATE, a step multiplies what the step before
    made of x, as in `conv_fprop.accumulate`.
    """
    program = tl.program_id(0)
    q_block, rest = program % q_blocks, program // q_blocks
    r_block, rest = rest % r_blocks, rest // r_blocks
    split, n = rest % splits, (rest // splits).to(tl.int64)
    channels, results = tile.edge(C, True), tile.edge(K, True)
    tall, wide = 1 if ALONG else T2, T2 if ALONG else 1
    r = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    tap, c = _in_words(r, channels)
    t0, t1, t2 = tap // tall // T1, tap // tall % T1, tap % tall
    o0, o1, o2 = t0 * d0 - b0, t1 * d1 - b1, t2 * d2 - b2
    wanted = t0 < T0
    q = q_block * (BLOCK_N + BLOCK_N2) + tl.arange(0, BLOCK_N)
    columns = wide * results
    column, k = _in_words(q, results)
    x_step, g_step = x_v // 8 * 8, g_v // 8 * 8
    x_ptr += n * (x_n // 8 * 8)
    g_ptr += n * (g_n // 8 * 8)
    if PRE:
        scale, shift = _table(p_s1, n, c, C, 1.0), _table(p_t1, n, c, C, 0.0)
        outer, offset = _table(p_s2, n, c, C, 1.0), _table(p_t2, n, c, C, 0.0)
        slope = _table(p_slope, n, c, C, 0.0)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if BLOCK_N2:
        q2 = q_block * (BLOCK_N + BLOCK_N2) + BLOCK_N + tl.arange(0, BLOCK_N2)
        column2, k2 = _in_words(q2, results)
        total2 = tl.zeros((BLOCK_R, BLOCK_N2), tl.float32)
    first, end = split * part, tl.minimum((split + 1) * part, steps)
    e, y1, y0 = first % across, first // across % lines, first // across // lines
    LATE: tl.constexpr = tile.on_hopper() and PRECISION != "ieee" and PRE
    if LATE:
        end += 1
        f, h1, h0 = e, y1, y0  # where g is read
        z = tl.zeros((BLOCK_R, BLOCK_V), g_ptr.dtype.element_ty)
    for step in tl.range(first, end, num_stages=STAGES):
        y, u, inside = _places(y1, e, start, stop, Y1, width, BLOCK_V, APART)
        at, ok = _met(
            y0, y, u, inside, o0, o1, o2, b2, c, wanted, X0, X1, X2, s0, s1, s2, x_step,
            WIDE, APART,
        )  # fmt: skip
        x = tl.load(x_ptr + at, mask=ok, other=0.0)
        if LATE:
            y, u, inside = _places(h1, f, start, stop, Y1, width, BLOCK_V, APART)
            inside = inside & (step > first)
        else:
            f, h1, h0 = e, y1, y0
        line = h0 * Y1 if APART else h0 * Y1 + h1
        line = tl.where(h0 < Y0, line, 0)  # (what is not copied has an address inside, too)
        g_at = g_ptr + line.to(tl.int64) * Y2 * g_step
        y = y * Y2 if APART else tl.zeros((BLOCK_V,), tl.int32)
        g = _seen(g_at, y, u, inside, k, column * d2, q < columns, g_step, Y2, WIDE)
        if LATE:
            total = tl.dot(z, g, total, input_precision=PRECISION)
            f, h1, h0 = _next(f, h1, h0, (step > first).to(tl.int32), across, lines)
        if PRE:
            v = tile.activation(scale * x.to(tl.float32) + shift, p_p, p_q, slope, ACT)
            x = tl.where(ok, outer * v + offset, 0.0).to(g.dtype)
        if LATE:
            z = x
        else:
            total = tl.dot(x, g, total, input_precision=PRECISION)
        if BLOCK_N2:
            g = _seen(g_at, y, u, inside, k2, column2 * d2, q2 < columns, g_step, Y2, WIDE)
            total2 = tl.dot(x, g, total2, input_precision=PRECISION)
        e, y1, y0 = _next(e, y1, y0, 1, across, lines)
    rows = T0 * T1 * tall * channels
    at = dw_ptr + ((n * splits + split) * rows + r)[:, None] * columns
    tl.store(at + q[None, :], total, mask=(r < rows)[:, None] & (q < columns)[None, :])
    if BLOCK_N2:
        tl.store(at + q2[None, :], total2, mask=(r < rows)[:, None] & (q2 < columns)[None, :])


@triton.jit
def _in_words(flat, channels):
    """Take an axis of taps x channels apart; the compiler is told that words are of one tap."""
    return tl.max_constancy(flat // channels, 8), flat % channels


@triton.jit
def _places(y1, e, start, stop, Y1, width, BLOCK_V: tl.constexpr, APART: tl.constexpr):
    """The places (BLOCK_V,) of a step along the last two axes, and which of them are wanted.

    A part of the row y1; APART, of as many rows as a step has, each `width` places.
    """
    v = tl.arange(0, BLOCK_V)
    if APART:
        u = start + e * width + v % width
        y1 = y1 * (BLOCK_V // width) + v // width
        inside = (u < stop) & (y1 < Y1)
    else:
        u = start + e * BLOCK_V + v
        inside = u < stop
    return y1, u, inside


@triton.jit
def _met(
    y0, y1, u, inside, o0, o1, o2, b2, c, wanted, X0, X1, X2, s0, s1, s2, step,
    WIDE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Where in x rows meet places, (rows, BLOCK_V), and whether they do: offsets inside a sample.

    What they do not meet has an offset inside, too. APART, each row asks each place; else a row
    meets all places or none.
    """
    a = y0 * s0 + o0
    wanted = wanted & (a >= 0) & (a < X0)
    if APART:
        i1, i2 = (y1 * s1)[None, :] + o1[:, None], (u * s2)[None, :] + o2[:, None]
        ok = inside[None, :] & wanted[:, None]
        ok = ok & (i1 >= 0) & (i1 < X1) & (i2 >= 0) & (i2 < X2)
        at = tl.where(ok, ((a * X1)[:, None] + i1) * X2 + i2, 0)
        if WIDE:
            at = at.to(tl.int64)
        at = at * step + tile.whole(0, c, wanted)[:, None]
    else:
        b = y1 * s1 + o1
        wanted = wanted & (b >= 0) & (b < X1)
        line, place = (a * X1 + b) * X2 + o2 + b2, tl.where(inside, u * s2 - b2, 0)
        if WIDE:
            line, place = line.to(tl.int64), place.to(tl.int64)
        at = tile.whole(line * step, c, wanted)[:, None] + (place * step)[None, :]
        ok = inside[None, :] & wanted[:, None]
    return at, ok


@triton.jit
def _table(ptr, n, c, C, DEFAULT: tl.constexpr):
    """Of a table (N, C), the entries of rows: (rows, 1)."""
    return tl.trans(tile.row(ptr, n, c, C, DEFAULT))


@triton.jit
def _seen(at, line, u, inside, k, far, known, step, Y2, WIDE: tl.constexpr):
    """Load g as columns see it from places u of rows, each so far before: (BLOCK_V, columns)."""
    place = u[:, None] - far[None, :]
    ok = inside[:, None] & (place >= 0) & (place < Y2) & known[None, :]
    place = tl.where(ok, line[:, None] + place, 0)
    if WIDE:
        place = place.to(tl.int64)
    word = tl.max_contiguous(tl.multiple_of(k, 8), 8)
    return tl.load(at + (place * step + word[None, :]), mask=ok, other=0.0)


@triton.jit
def _next(e, y1, y0, step, across, lines):
    """Return the place that is `step` steps (0 or 1) behind this one."""
    e, wrap = tile.carried(e + step, across)
    y1, wrap = tile.carried(y1 + wrap, lines)
    return e, y1, y0 + wrap


def conv_wgrad(
    g: Tensor, x: Tensor, p: Prologue, taps: tuple[int, ...], geometry: Geometry
) -> Tensor:
    g, x = layout.in_words(g), layout.in_words(x)
    (n, c), k = x.shape[:2], g.shape[1]
    product = Product("conv_wgrad", tuple(x.shape), k, taps, geometry, g.dtype)
    steps = walk(x.shape[2:], taps, geometry)
    config = configs.wgrad(product, steps, x.device, not p.is_identity())
    t0, t1, t2 = steps.taps
    rows, columns = (1, t2) if config.along else (t2, 1)
    shape = (t0, t1, rows, layout.padded(c), columns, layout.padded(k))
    dw = torch.empty(n * config.splits, *shape, dtype=torch.float32, device=x.device)
    s1, f1, act, slope, s2, f2 = p
    inp, out, size, stride, before, dilation = steps
    tile.launch(
        _conv_wgrad_kernel, x, config,
        x, g, dw, s1, f1, slope, s2, f2, act.p, act.q, c, k, *inp, *out, *size, *stride, *before,
        *dilation, *voxel_steps(x), *voxel_steps(g), *config.walk,
        PRE=not p.is_identity(), ACT=act.name, WIDE=tile.is_wide(x, g),
        PRECISION=precision.of(g.dtype),
    )  # fmt: skip
    dw = added(dw, 0)[:, :, :, :c, :, :k].permute(5, 3, 0, 1, 2, 4)
    return dw.clone(memory_format=torch.contiguous_format).reshape(k, c, *taps)
