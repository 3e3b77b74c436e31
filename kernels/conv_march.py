"""Convolution of three taps along D and along W, of few channels, as a march along D (sm_90).

Of an image of 21 channels, an implicit GEMM spends its time on reading x once per tap. Here taps
along D and W are columns of the product, as channels of the result are: a plane of x, with its taps
along H side by side, is multiplied with the weights of all nine others at once. So x is read three
times, not 27, and weights stay in shared memory:

    u[t0, t2][z, h, q] = sum over t1, c of x[z, h + t1 d1, q, c] w[t0, t1, t2, c]
    y[z, h, q] = sum over t0, t2 of u[t0, t2][z + t0 d0, h, q + t2 d2]

A program marches along D through the planes of a lattice of stride d0, however large that is. Each
plane adds to three accumulators, of the results one plane behind, here, and one ahead; then that
behind is whole, and its taps along W are shifted and added, by way of shared memory (`shifting`).
While one plane is multiplied, the result of the plane before is finished and stored.

Products are asynchronous, all of a plane at once. Their first operand, x, is in registers, where
channels that do not exist are masked; products are awaited before these are set again. An image of
two axes is marched through along its first. Epilogue and moments are those of `conv_fprop`, and so
are the weights: (T, C, K), in whole words.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from cassetta.kernels import aot, layout, lines, march, plans, reductions, shifting, tile
from cassetta.kernels.geometry import Walk, walk
from cassetta.kernels.lines import MarchConfig
from cassetta.kernels.operands import voxel_steps
from cassetta.kernels.shifting import barrier
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue

_SIZES = [
    "C", "K", "X0", "X1", "X2", "Y0", "Y1", "Y2", "b0", "b1", "b2", "d0", "d1", "d2", "x_n", "x_v",
    "y_n", "y_v", "phases", "shift", "low", "length", "splits", "tiles", "lattices", "part",
    "parts", "chunks",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _conv_march_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, e_s1, e_t1, e_slope, e_s2, e_t2, e_p, e_q, mean_ptr, m2_ptr,
    count_ptr, m_p, m_q, C, K, X0, X1, X2, Y0, Y1, Y2, b0, b1, b2, d0, d1, d2, x_n, x_v, y_n, y_v,
    phases, shift, low, length, splits, tiles, lattices, part, parts, chunks,
    E_ACT: gl.constexpr, M_ACT: gl.constexpr, GUARD: gl.constexpr, WIDE: gl.constexpr,
    T1: gl.constexpr, CP: gl.constexpr, KP: gl.constexpr, SHIFT: gl.constexpr,
    M: gl.constexpr, BOX2: gl.constexpr, DEEP: gl.constexpr, REST: gl.constexpr, N: gl.constexpr,
    N2: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """A tile has M rows, lines of BOX2 places. In powers of two, DEEP and REST hold the depth
    (t1, c), N and N2 the KP channels of the result, NP all of these, and 2 NP and what is left the
    columns (t2, k), of two products.
    """
    program, walk = gl.program_id(0), (phases, shift, low, length, splits)
    index, rest = program % tiles, program // tiles
    segment, rest = rest % parts, rest // parts
    lattice, n = rest % lattices, (rest // lattices).to(gl.int64)
    x_ptr += n * (x_n // 8 * 8)
    y_ptr += n * (y_n // 8 * 8)
    first = segment * part
    last = gl.minimum(first + part, (Y0 - lattice + d0 - 1) // d0)
    x_step, y_step, z = x_v // 8 * 8, y_v // 8 * 8, lattice - b0 + first * d0
    x_plane, y_plane = X1 * X2 * x_step, Y1 * Y2 * y_step
    if WIDE:
        x_plane, y_plane = x_plane.to(gl.int64), y_plane.to(gl.int64)
    a = march.operand(
        x_ptr, w_ptr, 0, index, b1, b2, d1, d2, X1, X2, x_step, walk, T1, CP, KP, M, BOX2, DEEP, NP
    )  # fmt: skip
    b = a
    if REST:
        b = march.operand(
            x_ptr, w_ptr, DEEP, index, b1, b2, d1, d2, X1, X2, x_step, walk, T1, CP, KP, M, BOX2,
            REST, NP,
        )  # fmt: skip
    hopper.fence_async_shared()
    ring = shifting.allocated(M, 3 * KP if N2 else 2 * KP, BOX2)
    out, at, ok = march.result(y_ptr, index, b2, d2, Y1, Y2, y_step, walk, M, BOX2, NP, KP)
    bias = None
    if b_ptr is not None:
        bias = march.kept_bias(b_ptr, K)
    lane, mine, own = march.slab(index, b2, d2, Y1, Y2, walk, M, BOX2, N)
    lane2, mine2, own2 = lane, mine, own
    if N2:
        lane2, mine2, own2 = march.slab(index, b2, d2, Y1, Y2, walk, M, BOX2, N2)
    sums, middle = march.no_sums(M, 2 * NP, 3 * KP - 2 * NP)
    for j in gl.static_range(2):
        march.begin(a, b, j, x_ptr, z, X0, x_plane, True, REST)
        z += d0
    for start in range(first - 1, last + 2, 3):
        for turn in gl.static_range(3):  # then accumulators and buffers are in their places again
            i, epilogue = start + turn, (e_s1, e_t1, e_slope, e_s2, e_t2, e_p, e_q)
            async_copy.wait_group(1)
            barrier()  # and the ring has what is found of the plane before
            held, sums = march.products(a, b, turn, sums, C, CP, GUARD, REST)
            march.begin(
                a, b, (turn + 2) % 3, x_ptr, z, X0, x_plane, i + 2 <= last, REST
            )  # fmt: skip
            given = ring, middle, out, epilogue, n, K, shift
            march.finish(given, bias, lane, 0, N, KP, BOX2, SHIFT, E_ACT)
            if N2:
                march.finish(given, bias, lane2, N, N2, KP, BOX2, SHIFT, E_ACT)
            barrier()
            y0, whole = lattice + (i - 2) * d0, (i > first + 1) & (i <= last + 1)
            y = out.load(march.words(NP, gl.num_warps()))
            gl.store(y_ptr + (y0 * y_plane + at), y, mask=ok & whole)
            sums, middle = march.awaited(ring, held, sums, KP, BOX2)
            if mean_ptr is not None:  # (here, registers are to be had)
                now = whole, start == first + 2, m_p, m_q
                own = march.summed(out, mine, now, own, 0, N, M_ACT, turn == 0)
                if N2:
                    own2 = march.summed(out, mine2, now, own2, N, N2, M_ACT, turn == 0)
            z += d0
    if mean_ptr is not None:
        to, planes = program.to(gl.int64) * K, gl.maximum(last - first, 0)
        outs = mean_ptr + to, m2_ptr + to, count_ptr + program, program < chunks, chunks == 1
        march.leave_moments(mine, own, planes, K, outs, 0, N)
        if N2:
            march.leave_moments(mine2, own2, planes, K, outs, N, N2)


def run(
    config: MarchConfig, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, steps: Walk,
    epilogue: Prologue = NOTHING, moments_of: Activation | None = None,
    parts: Sequence[Any] = reductions.NO_PARTS,
) -> None:  # fmt: skip
    """Start the kernel: y = x * w over `steps`, w (T, C, K) in whole words; and, as `parts`, the
    moments of each chunk."""
    arguments, constants = _call(config, x, w, b, y, steps, epilogue, moments_of, parts)
    tile.launch(_conv_march_kernel, x, config, *arguments, **constants)


def _call(
    config: MarchConfig, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, steps: Walk,
    epilogue: Prologue, moments_of: Activation | None, parts: Sequence[Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Return the arguments and the constants that the kernel is called with."""
    e1, f1, act, slope, e2, f2 = epilogue
    m_act = moments_of or Activation()
    inp, out, size, _, before, dilation = steps
    c, k = x.shape[1], y.shape[1]
    deep, rest = _halves(size[1] * layout.padded(c), 16)
    first, second = _halves(layout.padded(k), 8)
    arguments = (
        x, w, b, y, e1, f1, slope, e2, f2, act.p, act.q, *parts, m_act.p, m_act.q,
        c, k, *inp, *out, *before, *dilation, *voxel_steps(x), *voxel_steps(y), *config.walk,
    )  # fmt: skip
    constants = {
        "E_ACT": act.name, "M_ACT": m_act.name, "GUARD": c % layout.WORD != 0,
        "WIDE": tile.is_wide(x, y), "T1": size[1], "CP": layout.padded(c), "KP": layout.padded(k),
        "SHIFT": config.shift if shifting.SLICES.value else 0, "DEEP": deep, "REST": rest,
        "N": first, "N2": second, "NP": first if second == 0 else 2 * first,
    }  # fmt: skip
    return arguments, constants


def _halves(n: int, least: int) -> tuple[int, int]:
    """Return the power of two that is not above n, and one that holds what is left, or 0."""
    first = max(least, 1 << (n.bit_length() - 1))
    rest = n - first
    return first, 0 if rest <= 0 else max(least, 1 << (rest - 1).bit_length())


def compiled(high: int, channels: int, results: int) -> aot.Report:
    """Compile the kernel for so many taps along H and channels, with moments, which takes the most
    registers, and report what became of it. No GPU is needed.

    Raises
    ------
    Exception
        What this triton raises: parts of Gluon that are used here come and go.
    """
    same = Geometry((1,) * 3, ((1, 1), (high // 2,) * 2, (1, 1)), (1,) * 3)
    steps = walk((32,) * 3, (3, high, 3), same)
    x, y = (layout.empty((1, c, 32, 32, 32), torch.bfloat16, "meta") for c in (channels, results))
    w = torch.empty(9 * high, channels, results, dtype=torch.bfloat16, device="meta")
    config = lines.marching(plans.MarchPlan(), 1, steps, results)
    parts = reductions.partial(1, config.chunks, results, x.device)
    arguments, constants = _call(config, x, w, w, y, steps, NOTHING, Activation("relu"), parts)
    constants |= {"GUARD": True} | config.blocks
    built = aot.compiled(_conv_march_kernel, arguments, constants, config.options, 90)
    return aot.report_of("conv_march", "", 90, built)
