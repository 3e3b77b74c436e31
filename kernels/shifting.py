"""Tiles in shared memory that are read some rows on (Gluon, sm_90): the ring of `conv_march`.

A product leaves, side by side, what the taps before, in the middle and after have found for each
place along W. Sums of these need a shift along the rows of accumulators, which registers of one
thread do not hold. So they are stored, and read some places on.

Until triton 3.8, a view of memory may begin at any place, and the shift is a number at run time.
Since, no view may reach beyond the one that it is taken of; but slices may begin anywhere that is
known to the compiler, so that each shift is compiled for itself (`SLICES`).
"""

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until triton 3.6
SLICES = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


def _viewed(ring: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Within a kernel: memory as a tile of float32 in another layout."""
    view = ring.reinterpret if SLICES.value else ring._reinterpret
    return view(gl.float32, shape, layout, _semantic=_semantic)


_viewed.__triton_builtin__ = True  # type: ignore[attr-defined]


@gluon.constexpr_function
def accumulator(columns, warps):
    """Return a layout of accumulators: 4 warps along the rows of a tile, others along columns."""
    groups = warps // 4
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, columns // groups, 16])


@gluon.constexpr_function
def _cells(rows, columns):
    """Return a layout of shared memory in cells of 8 columns, in which the next row is the next
    cell: a shift is a distance, and neither stores of accumulators nor loads meet a bank twice."""
    bases = [[0, 1], [0, 2], [0, 4]]
    bases += [[1 << n, 0] for n in range(rows.bit_length() - 1)]
    bases += [[0, 1 << n] for n in range(3, columns.bit_length() - 1)]
    return gl.SharedLinearLayout(bases)


@gluon.jit
def allocated(M: gl.constexpr, COLUMNS: gl.constexpr, AROUND: gl.constexpr):
    """Allocate a ring of M places of so many columns, (places, 1, 8).

    Places AROUND it are read, and what is read there is not used.
    """
    places: gl.constexpr = COLUMNS // 8 * M + 2 * AROUND
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(gl.float32, [places, 1, 8], flat)


@gluon.jit
def _view(
    ring, place, by, M: gl.constexpr, N: gl.constexpr, BY: gl.constexpr
):  # fmt: skip
    """Return a view of a tile (M, N) of the ring, `by`, or BY, places on from this one."""
    if SLICES:  # noqa: SIM108 (of a conditional expression, both sides would be compiled)
        view = ring.slice(place + BY, N // 8 * M)
    else:
        view = ring.index(place + by)
    return _viewed(view, [M, N], _cells(M, N))


@gluon.jit
def kept(ring, value, column: gl.constexpr, AROUND: gl.constexpr):
    """Store a tile (M, N) of accumulators as columns from this one on."""
    M: gl.constexpr = value.shape[0]
    place: gl.constexpr = AROUND + column // 8 * M
    _view(ring, place, 0, M, value.shape[1], 0).store(value)


@gluon.jit
def shifted(
    ring, by, M: gl.constexpr, N: gl.constexpr, column: gl.constexpr, AROUND: gl.constexpr,
    BY: gl.constexpr,
):  # fmt: skip
    """Load N columns from this one on, `by` places on, as accumulators lie: (M, N).

    BY is the same for the compiler, where it has to be known to it.
    """
    place: gl.constexpr = AROUND + column // 8 * M
    return _view(ring, place, by, M, N, BY).load(accumulator(N, gl.num_warps()))
