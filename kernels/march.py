"""Parts of `conv_march` (Gluon, sm_90): operands of its products, what is made of their sums, and
moments.

`walk` is how planes are cut along W (`lines`): phases, shift, low, length, splits; an `operand` is
room for three planes, weights for both products, where in a plane it is read, and whether it is.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from cassetta.kernels import shifting, tile
from cassetta.kernels.shifting import accumulator

copied = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Begin to copy (its name until triton 3.7 comes second)."""


@gluon.constexpr_function
def words(columns, warps):
    """Return a layout of loads and copies: a lane has 8 channels, and the next lane the next 8."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _room(dtype: gl.constexpr, many: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """Allocate shared memory for so many operands of a product."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return gl.allocate_shared_memory(dtype, [many, rows, columns], layout)


@gluon.jit
def _weights(
    w_ptr, row: gl.constexpr, column: gl.constexpr, T1: gl.constexpr, CP: gl.constexpr,
    KP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Copy weights to shared memory, for each t0: rows (t1, c) and columns (t2, k), from these on.

    Columns are of the taps before, after, and in the middle, which is where two products share
    them. TURNED, they are stored as rows: of 8 columns, wgmma wants them so.
    """
    wide: gl.constexpr = ROWS if TURNED else COLUMNS
    layout: gl.constexpr = words(wide, gl.num_warps())
    of_r: gl.constexpr = gl.SliceLayout(0 if TURNED else 1, layout)
    of_n: gl.constexpr = gl.SliceLayout(1 if TURNED else 0, layout)
    r, n = row + gl.arange(0, ROWS, layout=of_r), column + gl.arange(0, COLUMNS, layout=of_n)
    wanted_r, wanted_n = r < T1 * CP, n < 3 * KP
    t1, t2 = gl.where(wanted_r, r // CP, 0), gl.where(wanted_n, n // KP, 0)
    t2 = gl.where(t2 == 0, 0, 3 - t2)
    down, across = (3 * t1 * CP + r % CP) * KP, t2 * CP * KP + n % KP
    if TURNED:
        at, ok = down[None, :] + across[:, None], wanted_r[None, :] & wanted_n[:, None]
        room = _room(w_ptr.dtype.element_ty, 3, COLUMNS, ROWS)
    else:
        at, ok = down[:, None] + across[None, :], wanted_r[:, None] & wanted_n[None, :]
        room = _room(w_ptr.dtype.element_ty, 3, ROWS, COLUMNS)
    for t0 in gl.static_range(3):
        w = gl.load(w_ptr + (t0 * (3 * T1 * CP * KP) + at), mask=ok, other=0.0)
        room.index(t0).store(w)
    return room


@gluon.jit
def _voxels(
    index, b2, d2, Y1, Y2, walk, M: gl.constexpr, BOX2: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Return, of each row of a tile, its voxel of the result along H and along W, its lane, and
    whether the voxel is the tile's own.

    A tile is lines of BOX2 places along W, which are `phases` voxels apart. A line that is longer
    is split, and its pieces overlap by what is shifted.
    """
    phases, shift, low, length, splits = walk
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    split, line, lane = index % splits, index // splits * (M // BOX2) + m // BOX2, m % BOX2
    place = split * (BOX2 - 2 * shift) + lane
    y1, y2 = line // phases, low + line % phases + place * phases + b2 - d2
    first, last = gl.where(split > 0, shift, 0), gl.where(split < splits - 1, shift, 0)
    mine = (place < length) & (y1 < Y1) & (y2 >= 0) & (y2 < Y2)
    return y1, y2, lane, mine & (lane >= first) & (lane < BOX2 - last)


@gluon.jit
def operand(
    x_ptr, w_ptr, row: gl.constexpr, index, b1, b2, d1, d2, X1, X2, x_step, walk,
    T1: gl.constexpr, CP: gl.constexpr, KP: gl.constexpr, M: gl.constexpr, BOX2: gl.constexpr,
    DEEP: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Return the operand of the depth (t1, c) from `row` on, with its weights copied."""
    layout: gl.constexpr = words(DEEP, gl.num_warps())
    room = _room(x_ptr.dtype.element_ty, 3, M, DEEP)
    w = _weights(w_ptr, row, 0, T1, CP, KP, DEEP, 2 * NP, False)
    v = _weights(w_ptr, row, 2 * NP, T1, CP, KP, DEEP, 3 * KP - 2 * NP, True)
    y1, y2, _, _ = _voxels(index, b2, d2, 0, 0, walk, M, BOX2, layout)
    q = y2 - b2 + d2  # as the middle tap sees it
    r = row + gl.arange(0, DEEP, layout=gl.SliceLayout(0, layout))
    t1, c = r // CP, r % CP
    i1 = (y1 - b1)[:, None] + (t1 * d1)[None, :]
    ok = (i1 >= 0) & (i1 < X1) & ((q >= 0) & (q < X2))[:, None] & (t1 < T1)[None, :]
    at = gl.where(ok, (i1 * X2 + q[:, None]) * x_step, 0) + c[None, :]
    return room, w, v, gl.max_contiguous(gl.multiple_of(at, [1, 8]), [1, 8]), ok


@gluon.jit
def begin(
    first, second, slot: gl.constexpr, x_ptr, z, X0, plane, wanted, REST: gl.constexpr
):  # fmt: skip
    """Begin to copy the operands of the plane z of x, or zeros where it lies outside."""
    wanted = wanted & (z >= 0) & (z < X0)
    z = gl.where(wanted, z, 0)
    copied(first[0].index(slot), x_ptr + (z * plane + first[3]), mask=first[4] & wanted)
    if REST:
        copied(second[0].index(slot), x_ptr + (z * plane + second[3]), mask=second[4] & wanted)
    async_copy.commit_group()


@gluon.jit
def _multiplied(
    operand, slot: gl.constexpr, sums, C, row: gl.constexpr, CP: gl.constexpr, GUARD: gl.constexpr
):  # fmt: skip
    """Start to multiply an operand of a plane; the first one begins what is a plane ahead.

    Returns it, as both products hold it in registers, and the sums.
    """
    o0, o1, o2, m0, m1, m2 = sums
    w, v = operand[1], operand[2]
    of_o: gl.constexpr = gl.DotOperandLayout(0, accumulator(w.shape[2], gl.num_warps()), 2)
    of_m: gl.constexpr = gl.DotOperandLayout(0, accumulator(v.shape[1], gl.num_warps()), 2)
    x = operand[0].index(slot).load(of_o)
    if GUARD:
        r = row + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, of_o))
        is_full = r // 8 % (CP // 8) < CP // 8 - 1  # (a constant for each register)
        x = gl.where((is_full | (r % 8 < C - (CP - 8)))[None, :], x, 0.0)
    x_m = gl.convert_layout(x, of_m, assert_trivial=True)
    o2 = hopper.warpgroup_mma(x, w.index(2), o2, is_async=True)
    m2 = hopper.warpgroup_mma(x_m, v.index(2).permute((1, 0)), m2, is_async=True)
    o1 = hopper.warpgroup_mma(x, w.index(1), o1, is_async=True)
    m1 = hopper.warpgroup_mma(x_m, v.index(1).permute((1, 0)), m1, is_async=True)
    o0 = hopper.warpgroup_mma(x, w.index(0), o0, use_acc=row > 0, is_async=True)
    m0 = hopper.warpgroup_mma(x_m, v.index(0).permute((1, 0)), m0, use_acc=row > 0, is_async=True)
    return x, x_m, (o0, o1, o2, m0, m1, m2)


@gluon.jit
def products(
    first, second, slot: gl.constexpr, sums, C, CP: gl.constexpr, GUARD: gl.constexpr,
    REST: gl.constexpr,
):  # fmt: skip
    """Start all products of a plane; return what they hold in registers, and their sums."""
    x, x_m, sums = _multiplied(first, slot, sums, C, 0, CP, GUARD)
    u, u_m = x, x_m
    if REST:
        u, u_m, sums = _multiplied(second, slot, sums, C, first[0].shape[2], CP, GUARD)
    return (x, x_m, u, u_m), sums


@gluon.jit
def awaited(ring, held, sums, KP: gl.constexpr, BOX2: gl.constexpr):
    """Await all products of a plane, store in the ring what is whole, and turn accumulators.

    Returns the sums, and of the middle taps those that are whole.
    """
    x, x_m, u, u_m = held
    o0, o1, o2, m0, m1, m2 = sums
    o0, o1, o2, m0, m1, m2, x, x_m, u, u_m = hopper.warpgroup_mma_wait(
        0, [o0, o1, o2, m0, m1, m2, x, x_m, u, u_m]
    )  # fmt: skip
    shifting.kept(ring, o2, 0, BOX2)
    if m2.shape[1] != KP:
        shifting.kept(ring, m2, o2.shape[1], BOX2)
    return (o2, o0, o1, m2, m0, m1), m2


@gluon.jit
def no_sums(M: gl.constexpr, NA: gl.constexpr, NB: gl.constexpr):
    """Return accumulators of zeros, of three planes for both products; and such a middle."""
    of_o: gl.constexpr = accumulator(NA, gl.num_warps())
    of_m: gl.constexpr = accumulator(NB, gl.num_warps())
    o, m = gl.zeros([M, NA], gl.float32, of_o), gl.zeros([M, NB], gl.float32, of_m)
    return (o, o, o, m, m, m), m


@gluon.jit
def finish(
    given, bias, lane, k0: gl.constexpr, N: gl.constexpr, KP: gl.constexpr, BOX2: gl.constexpr,
    SHIFT: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Add up what taps along W have found of a plane, for N channels from k0 on, and store what the
    epilogue makes of it. What is read beyond a line, where nothing was found, is dropped."""
    ring, middle, out, epilogue, n, K, shift = given
    M: gl.constexpr = lane.shape[0]
    of_k: gl.constexpr = gl.SliceLayout(0, accumulator(N, gl.num_warps()))
    before = shifting.shifted(ring, -shift, M, N, k0, BOX2, -SHIFT)
    after = shifting.shifted(ring, shift, M, N, KP + k0, BOX2, SHIFT)
    if middle.shape[1] == KP:  # it is whole in an accumulator
        total = middle
    else:
        total = shifting.shifted(ring, 0, M, N, 2 * KP + k0, BOX2, 0)
    total += gl.where((lane >= shift)[:, None], before, 0.0)
    total += gl.where((lane + shift < BOX2)[:, None], after, 0.0)
    if bias is not None:
        total += bias.slice(k0, N).load(of_k)[None, :]
    k = k0 + gl.arange(0, N, layout=of_k)
    s1, t1, slope, s2, t2, p, q = epilogue
    total = tile.transformed(total, n, k, K, s1, t1, slope, s2, t2, p, q, ACT)
    out.slice(k0, N, dim=1).store(total.to(out.dtype))


@gluon.jit
def _by_thread(values):
    """Split the rows of a tile (M, N), (M / 64, 4, 2, 8, N): a thread has those along axes 0, 2."""
    M: gl.constexpr = values.shape[0]
    return gl.reshape(values, [M // 64, 4, 2, 8, values.shape[1]])


@gluon.jit
def _added(values):
    """Add up the rows that each thread has: (4, 8, N)."""
    return gl.sum(gl.sum(values, 2), 0)


@gluon.jit
def slab(
    index, b2, d2, Y1, Y2, walk, M: gl.constexpr, BOX2: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Return, for N channels of a tile, the lanes of its rows (M,); which voxels are its own, by
    thread; and sums of nothing: a centre, the sum of distances from it, and of their squares."""
    layout: gl.constexpr = accumulator(N, gl.num_warps())
    _, _, lane, mine = _voxels(index, b2, d2, Y1, Y2, walk, M, BOX2, layout)
    k = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    mine = _by_thread(mine[:, None] & (k < N)[None, :])
    none = gl.zeros_like(_added(mine.to(gl.float32)))
    return lane, mine, (none, none, none)


@gluon.jit
def summed(
    out, mine, now, sums, k0: gl.constexpr, N: gl.constexpr, ACT: gl.constexpr,
    CENTRES: gl.constexpr,
):  # fmt: skip
    """Add what is stored of a plane, N channels from k0 on, to the sums of each thread, about a
    centre of its own: its mean of the first plane that is whole."""
    centre, sum1, sum2 = sums
    whole, is_first, p, q = now
    value = out.slice(k0, N, dim=1).load(accumulator(N, gl.num_warps())).to(gl.float32)
    value = _by_thread(tile.activation(value, p, q, 0.0, ACT))
    if CENTRES:
        share = gl.where(_added(mine.to(gl.int32)) == 2, 0.5, 1.0)  # (of 64 rows)
        centre = gl.where(is_first, _added(gl.where(mine, value, 0.0)) * share, centre)
    off = value - gl.expand_dims(gl.expand_dims(centre, 0), 2)
    off = gl.where(mine & whole, off, 0.0)
    return centre, sum1 + _added(off), sum2 + _added(off * off)


@gluon.jit
def leave_moments(
    mine, sums, planes, K, outs, k0: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Store the moments of a chunk, as `conv_fprop` does. Threads have sums about centres of their
    own; they are combined as Chan, Golub and LeVeque do (1983)."""
    centre, sum1, sum2 = sums
    mean_out, m2_out, count_out, is_first, alone = outs
    count = _added(mine.to(gl.float32)) * planes
    one = 1.0 / gl.maximum(count, 1.0)
    mean, apart = centre + sum1 * one, sum2 - sum1 * (sum1 * one)
    total = _of_rows(count)
    share = 1.0 / gl.maximum(total, 1.0)
    middle = _of_rows(count * mean) * share
    off = mean - gl.expand_dims(gl.expand_dims(middle, 0), 0)
    spread = _of_rows(apart + count * off * off)
    spread = gl.where(spread < 0, 0.0, spread)  # (and NaN of NaN)
    if alone:
        spread *= share
    of_k: gl.constexpr = gl.SliceLayout(0, accumulator(N, gl.num_warps()))
    k = k0 + gl.arange(0, N, layout=of_k)
    gl.store(mean_out + k, gl.convert_layout(middle, of_k), mask=k < K)
    gl.store(m2_out + k, gl.convert_layout(spread, of_k), mask=k < K)
    total = gl.convert_layout(total, of_k)
    gl.store(count_out + gl.zeros_like(k), total, mask=(k == 0) & is_first)


@gluon.jit
def _of_rows(values):
    """Add up what all threads have: (N,)."""
    return gl.sum(gl.sum(values, 0), 0)


@gluon.jit
def result(
    y_ptr, index, b2, d2, Y1, Y2, y_step, walk, M: gl.constexpr, BOX2: gl.constexpr,
    NP: gl.constexpr, KP: gl.constexpr,
):  # fmt: skip
    """Return room for a tile of a plane of the result, where it is stored, and whether it is."""
    out = _room(y_ptr.dtype.element_ty, 1, M, NP).index(0)
    layout: gl.constexpr = words(NP, gl.num_warps())
    y1, y2, _, mine = _voxels(index, b2, d2, Y1, Y2, walk, M, BOX2, layout)
    k = gl.arange(0, NP, layout=gl.SliceLayout(0, layout))
    return out, ((y1 * Y2 + y2) * y_step)[:, None] + k[None, :], mine[:, None] & (k < KP)[None, :]


@gluon.jit
def kept_bias(b_ptr, K):
    """Copy a bias to shared memory, in float32, followed by zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k = gl.arange(0, 32, layout=layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bias = gl.allocate_shared_memory(gl.float32, [32], flat)
    bias.store(gl.load(b_ptr + k, mask=k < K, other=0.0).to(gl.float32))
    return bias
