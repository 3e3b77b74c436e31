"""The passes, each stated once, by its record; and as functions that call registered operators.

Compilers and exporters see one call each. Operators have no gradient of their own, and say so; the
`torch.autograd.Function`s of `cassetta.functional` call them, forward and backward.
"""

import itertools
import math
from collections.abc import Iterator
from operator import mul
from typing import Any

import torch
from torch import Tensor

from cassetta.kernels import activations, layout, reference
from cassetta.kernels.examples import Sample
from cassetta.kernels.records import PASSES as PASSES, PassRecord
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Pooling, Prologue

Examples = Iterator[tuple[Any, ...]]


def _fake_fprop(x: Tensor, p: Any, w: Tensor, b: Any, geometry: Geometry, *rest: Any) -> Any:
    size = geometry.size_of(x.shape[2:], w.shape[2:])
    y = layout.empty((x.shape[0], w.shape[0], *size), w.dtype, x.device)
    return y, *((_no_table(y) if rest[-1] is None else layout.tables(y)) for _ in range(2))


def _fprop_examples(s: Sample) -> Examples:
    (_, c, *_), k = s.shape, s.more
    after, bias = (s.pending(k), s.weights(k)) if s.full else (NOTHING, None)
    moments_of = None if s.p.slope is not None else s.p.activation
    for geometry, taps, size in s.kept(1), s.kept(3):
        p = s.p if max(taps) == 1 else NOTHING
        one, two = (s.weights(k, c, *taps), None), (s.weights(k, 2 * c, *taps), s.x)
        (w, x2), (w_of_moments, x2_of_moments) = (two, one) if s.full else (one, two)
        yield s.x, p, w, bias, geometry, x2, after, s.of(k, size) if s.full else None, None
        yield s.x, p, w_of_moments, bias, geometry, x2_of_moments, NOTHING, None, moments_of
    geometry, taps, _ = s.halved()
    rest = s.weights(k, c, *taps), bias, geometry, None, NOTHING, None, None
    yield s.x, s.p if s.full else NOTHING, *rest


conv_fprop = PassRecord(
    reference.conv_fprop, "conv_fprop.conv_fprop", _fake_fprop, _fprop_examples,
    of="products", flops=lambda out, x, p, w, *rest: _products(w, out[0]), judge="w",
).stated()  # fmt: skip


def _fake_dgrad(g: Tensor, w: Tensor, geometry: Any, size: Any, x: Any, *rest: Any) -> Any:
    dz = layout.empty((g.shape[0], w.shape[1], *size), g.dtype, g.device)
    return dz, _no_table(g) if x is None else layout.tables(dz, 2)


def _dgrad_examples(s: Sample) -> Examples:
    sums = (s.x, s.p, s.one, True) if s.full else (None, NOTHING, None, False)
    for geometry, taps, size in s.kept(1), s.kept(3), s.halved():
        w = s.weights(s.more, s.shape[1], *taps)
        yield s.of(s.more, size), w, geometry, s.shape[2:], *sums


conv_dgrad = PassRecord(
    reference.conv_dgrad, "conv_dgrad.conv_dgrad", _fake_dgrad, _dgrad_examples,
    of="products", flops=lambda out, g, w, *rest: _products(w, g),
).stated()  # fmt: skip


def _wgrad_examples(s: Sample) -> Examples:
    for geometry, taps, size in s.kept(1), s.kept(3), s.halved():
        is_pending = s.full if max(geometry.stride) > 1 else max(taps) == 1
        yield s.of(s.more, size), s.x, s.p if is_pending else NOTHING, taps, geometry


conv_wgrad = PassRecord(
    reference.conv_wgrad, "conv_wgrad.conv_wgrad",
    lambda g, x, p, taps, geometry: g.new_empty(
        (g.shape[1], x.shape[1], *taps), dtype=torch.promote_types(g.dtype, torch.float32)
    ),
    _wgrad_examples,
    of="products", flops=lambda out, g, *rest: _products(out, g),
).stated()  # fmt: skip


def _transposed_examples(s: Sample) -> Examples:
    (_, c, *_), k, (geometry, taps, coarse) = s.shape, s.more, s.halved()
    fused = (s.p, s.of(c, tuple(map(mul, coarse, taps)))) if s.full else (NOTHING, None)
    p, bias = (s.pending(k), s.weights(c)) if s.full else (NOTHING, None)
    yield s.of(k, coarse), p, s.weights(k, c, *taps), bias, geometry, *fused


conv_transposed = PassRecord(
    reference.conv_transposed, "conv_dgrad.conv_transposed",
    lambda x, p, w, b, geometry, *rest: layout.empty(
        (x.shape[0], w.shape[1], *map(mul, x.shape[2:], geometry.stride)), w.dtype, x.device
    ),
    _transposed_examples,
    of="products", flops=lambda out, x, p, w, *rest: _products(w, x), judge="w",
).stated()  # fmt: skip


def _no_table(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _products(w: Any, y: Any) -> int:
    """Every weight meets every voxel of y: a multiplication and an addition."""
    return 2 * math.prod(w) * y[0] * math.prod(y[2:])


def _windows(s: Sample) -> tuple[int, ...]:
    """Of two voxels along each axis; or large ones, whose voxels a byte does not count."""
    return s.window((257, 17, 7)[len(s.shape) - 3] if s.other else 2)


max_pool = PassRecord(
    reference.max_pool, "pool.max_pool", lambda x, p, window: layout.pooled(x, window),
    lambda s: [(s.x, s.p, _windows(s))],
).stated()  # fmt: skip


def _pooled_examples(s: Sample) -> Examples:
    y, where = layout.pooled(s.x, _windows(s))
    places = torch.arange(y.numel(), device=y.device) % math.prod(_windows(s))
    where.copy_(places.reshape(y.shape))
    yield s.image(tuple(y.shape)), where, _windows(s), s.shape[2:]


max_pool_dgrad = PassRecord(
    reference.max_pool_dgrad, "pool.max_pool_dgrad",
    lambda g, where, window, size: layout.sized(where, size, g.dtype), _pooled_examples,
).stated()  # fmt: skip

moments = PassRecord(
    reference.moments, "reductions.moments", lambda x, p: (layout.tables(x), layout.tables(x)),
    lambda s: [(s.x, s.p)], planned=True,
).stated()  # fmt: skip

materialize = PassRecord(
    reference.materialize, "pointwise.materialize",
    lambda x, p, residual, dtype, words: (
        layout.empty(tuple(x.shape), dtype, x.device) if words else layout.like(x, dtype)
    ),
    lambda s: [(x := s.x, s.p, s.x if s.full else None, x.dtype, s.other and not s.full)],
    planned=True,
).stated()  # fmt: skip

concatenate = PassRecord(
    reference.concatenate, "pointwise.concatenate",
    lambda x, p, x2, p2, dtype: layout.wider(x, x2.shape[1], dtype),
    lambda s: [(x := s.x, s.p, s.of(s.more), s.pending(s.more), x.dtype)],
).stated()  # fmt: skip

materialize_moments = PassRecord(
    reference.materialize_moments, "reductions.materialize_moments",
    lambda x, p, r, dtype: (layout.like(x, dtype), layout.tables(x), layout.tables(x)),
    lambda s: [(x := s.x, s.p, s.x if s.full else None, x.dtype)], planned=True,
).stated()  # fmt: skip

prologue_sums = PassRecord(
    reference.prologue_sums, "reductions.prologue_sums", lambda g, x, *rest: layout.tables(x, 3),
    lambda s: [(s.x, s.x, s.p, s.one, s.fold, s.other)], judge="x", planned=True,
).stated()  # fmt: skip


def _dgrad_by_either(s: Sample) -> Examples:
    """By the argument of the activation, and by its result where that tells the derivative."""
    yield s.x, s.x, s.p, s.fold, s.other
    name, *constants = s.p.activation
    if activations.BY_RESULT.get(name, name) != name:
        told = Activation(activations.BY_RESULT[name], *constants)
        yield s.x, s.x, s.p._replace(s1=None, t1=None, activation=told), None, False


prologue_dgrad = PassRecord(
    reference.prologue_dgrad, "pointwise.prologue_dgrad",
    lambda g, x, *rest: layout.like(x, x.dtype), _dgrad_by_either, judge="x", planned=True,
).stated()  # fmt: skip

resize = PassRecord(
    reference.resize, "resize.resize",
    lambda x, p, size, grid: layout.sized(x, size, x.dtype), lambda s: [(s.x, s.p, *s.grid())],
).stated()  # fmt: skip

resize_dgrad = PassRecord(
    reference.resize_dgrad, "resize.resize_dgrad",
    lambda g, size, grid: layout.sized(g, size, g.dtype),
    lambda s: [(s.of(s.shape[1], s.grid()[0]), s.shape[2:], s.grid()[1])],
).stated()  # fmt: skip


def _norms(s: Sample) -> Iterator[tuple[Tensor | None, Tensor | None, Pooling]]:
    """With and without parameters and factors, by each way of pooling."""
    groups = Pooling("group", 3 if s.shape[1] % 3 == 0 else 1)
    poolings = Pooling("batch"), Pooling("instance"), groups, Pooling("fixed")
    return itertools.product((None, s.weights(s.shape[1])), (None, s.one), poolings)


norm_finalize = PassRecord(
    reference.norm_finalize, "finalize.norm_finalize",
    lambda own, *rest: layout.tables(own.mean, 6),
    lambda s: [
        (Moments(s.one, s.one), factor, gamma, gamma, 1e-5, 8, pooling)
        for gamma, factor, pooling in _norms(s)
    ],
    of="tables",
).stated()  # fmt: skip

norm_finalize_running = PassRecord(
    reference.norm_finalize_running, "finalize.norm_finalize_running",
    lambda own, *rest: layout.tables(own.mean, 6),
    lambda s: [
        (Moments(s.one, s.one), f, gamma, gamma, 1e-5, 8, s.table(c), s.table(c), s.counter, 0.1)
        for c in s.shape[1:2] for gamma in (None, s.weights(c)) for f in (None, s.one)
    ],
    of="tables", changes=("mean", "var", "batches"),
).stated()  # fmt: skip

norm_finalize_backward = PassRecord(
    reference.norm_finalize_backward, "finalize.norm_finalize_backward",
    lambda sums, mean, *rest: layout.tables(mean, 5),
    lambda s: [
        (s.table(3, *s.shape[:2]), s.one, s.one, s.one, factor, factor, gamma, 8, pooling)
        for gamma, factor, pooling in _norms(s)
    ],
    of="tables",
).stated()  # fmt: skip


def _normalized(s: Sample, n: int) -> Iterator[tuple[Tensor, Any, Tensor | None, Tensor | None]]:
    """Yield an image, p, a factor and gamma: of one chunk, then of several."""
    c, size = s.shape[1], s.shape[2:]
    slope = None if s.p.slope is None else s.table(n, c)
    affine = (s.table(n, c), s.table(n, c)) if s.full else (None, None)
    factor, gamma = (s.table(n, c), s.weights(c)) if s.full else (None, None)
    pending = Prologue(*affine, s.p.activation, slope, *affine)
    for kept in (tuple(min(2, length) for length in size), size):
        yield s.image((n, c, *kept)), pending, factor, gamma


norm_statistics = PassRecord(
    reference.norm_statistics, "reductions.norm_statistics",
    lambda x, *rest: layout.tables(x, 6),
    lambda s: [
        (x, p, factor, gamma, gamma, 1e-5, Pooling("instance"))
        for x, p, factor, gamma in _normalized(s, s.shape[0])
    ],
).stated()  # fmt: skip

norm_statistics_running = PassRecord(
    reference.norm_statistics_running, "reductions.norm_statistics_running",
    lambda x, *rest: layout.tables(x, 6),
    lambda s: [
        (x, p, factor, gamma, gamma, 1e-5, s.table(c), s.table(c), s.counter, 0.1)
        for c in s.shape[1:2] for x, p, factor, gamma in _normalized(s, 1)
    ],
    changes=("mean", "var", "batches"),
).stated()  # fmt: skip

norm_sums = PassRecord(
    reference.norm_sums, "reductions.norm_sums", lambda g, x, *rest: layout.tables(x, 5),
    lambda s: [
        (x, x, p, s.one, s.one, s.one, factor, factor, gamma, s.other, Pooling("instance"))
        for x, p, factor, gamma in _normalized(s, s.shape[0])
    ],
    judge="x",
).stated()  # fmt: skip
