"""The passes as registered operators of torch, so that compilers and exporters see one call each.

Each has a fake implementation (shapes without data), and counts as nothing in `FlopCounterMode`, as
torch's own elementwise operations do (`flops`). They have no gradient of their own, and say so;
the `torch.autograd.Function`s of `cassetta.functional` call them, forward and backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from cassetta.kernels import dispatch, layout
from cassetta.kernels.types import (
    NOTHING,
    Activation,
    Fold,
    Geometry,
    Grid,
    Moments,
    Pooling,
    Prologue,
    flat,
    unflat,
)

_PROLOGUE = (
    "Tensor? s1, Tensor? t1, str act, float p, float q, Tensor? slope, Tensor? s2, Tensor? t2"
)
_EPILOGUE = _PROLOGUE.replace("? ", "? e_").replace("str ", "str e_").replace("float ", "float e_")
_WALK = "int[] stride, int[] padding, int[] dilation"
_GRID = "float[] shift, float[] step, float[] start"
_SCHEMAS = {
    "conv_fprop": f"(Tensor x, {_PROLOGUE}, Tensor w, Tensor? b, {_WALK}, Tensor? x2, {_EPILOGUE},"
    " Tensor? residual, str? moments_of, float m_p, float m_q) -> (Tensor, Tensor, Tensor)",
    "conv_dgrad": f"(Tensor g, Tensor w, {_WALK}, SymInt[] size, Tensor? x, {_PROLOGUE},"
    " Tensor? around, bool after) -> (Tensor, Tensor)",
    "conv_wgrad": f"(Tensor g, Tensor x, {_PROLOGUE}, int[] taps, {_WALK}) -> Tensor",
    "conv_transposed": f"(Tensor x, {_PROLOGUE}, Tensor w, Tensor? b, {_WALK}, {_EPILOGUE},"
    " Tensor? residual) -> Tensor",
    "max_pool": f"(Tensor x, {_PROLOGUE}, int[] window) -> (Tensor, Tensor)",
    "max_pool_dgrad": "(Tensor g, Tensor where, int[] window, SymInt[] size) -> Tensor",
    "moments": f"(Tensor x, {_PROLOGUE}) -> (Tensor, Tensor)",
    "materialize": f"(Tensor x, {_PROLOGUE}, Tensor? residual, ScalarType dtype, bool words)"
    " -> Tensor",
    "concatenate": f"(Tensor x, {_PROLOGUE}, Tensor x2, {_EPILOGUE}, ScalarType dtype) -> Tensor",
    "materialize_moments": f"(Tensor x, {_PROLOGUE}, Tensor? residual, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "prologue_sums": f"(Tensor g, Tensor x, {_PROLOGUE}, Tensor around, Tensor? a, Tensor? k,"
    " Tensor? centre, bool after) -> Tensor",
    "prologue_dgrad": f"(Tensor g, Tensor x, {_PROLOGUE}, Tensor? a, Tensor? k, Tensor? centre,"
    " bool after) -> Tensor",
    "resize": f"(Tensor x, {_PROLOGUE}, SymInt[] size, {_GRID}) -> Tensor",
    "resize_dgrad": f"(Tensor g, SymInt[] size, {_GRID}) -> Tensor",
    "norm_finalize": "(Tensor mean, Tensor var, Tensor? before, Tensor? gamma, Tensor? beta,"
    " float eps, str kind, int groups) -> Tensor",
    "norm_finalize_backward": "(Tensor sums, Tensor mean, Tensor rstd, Tensor centre,"
    " Tensor? before, Tensor? after, Tensor? gamma, SymInt voxels, str kind, int groups) -> Tensor",
}

NAMES = tuple(_SCHEMAS)


def conv_fprop(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    x2: Tensor | None = None, epilogue: Prologue = NOTHING, residual: Tensor | None = None,
    moments_of: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.conv_fprop`, by whoever runs it."""
    of = (None, 0.0, 0.0) if moments_of is None else moments_of
    return torch.ops.cassetta.conv_fprop(
        x, *flat(p), w, b, *_numbers(geometry), x2, *flat(epilogue), residual, *of
    )


def conv_dgrad(
    g: Tensor, w: Tensor, geometry: Geometry, size: tuple[int, ...], x: Tensor | None = None,
    p: Prologue = NOTHING, centre: Tensor | None = None, after: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.conv_dgrad`, by whoever runs it."""
    return torch.ops.cassetta.conv_dgrad(
        g, w, *_numbers(geometry), size, x, *flat(p), centre, after
    )


def conv_wgrad(
    g: Tensor, x: Tensor, p: Prologue, taps: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """`reference.conv_wgrad`, by whoever runs it."""
    return torch.ops.cassetta.conv_wgrad(g, x, *flat(p), taps, *_numbers(geometry))


def conv_transposed(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    epilogue: Prologue = NOTHING, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference.conv_transposed`, by whoever runs it."""
    return torch.ops.cassetta.conv_transposed(
        x, *flat(p), w, b, *_numbers(geometry), *flat(epilogue), residual
    )


def max_pool(x: Tensor, p: Prologue, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`reference.max_pool`, by whoever runs it."""
    return torch.ops.cassetta.max_pool(x, *flat(p), window)


def max_pool_dgrad(
    g: Tensor, where: Tensor, window: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """`reference.max_pool_dgrad`, by whoever runs it."""
    return torch.ops.cassetta.max_pool_dgrad(g, where, window, size)


def moments(x: Tensor, p: Prologue) -> Moments:
    """`reference.moments`, by whoever runs it."""
    return Moments(*torch.ops.cassetta.moments(x, *flat(p)))


def materialize(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype, words: bool = False
) -> Tensor:
    """`reference.materialize`, by whoever runs it."""
    return torch.ops.cassetta.materialize(x, *flat(p), residual, dtype, words)


def concatenate(x: Tensor, p: Prologue, x2: Tensor, p2: Prologue, dtype: torch.dtype) -> Tensor:
    """`reference.concatenate`, by whoever runs it."""
    return torch.ops.cassetta.concatenate(x, *flat(p), x2, *flat(p2), dtype)


def materialize_moments(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.materialize_moments`, by whoever runs it."""
    return torch.ops.cassetta.materialize_moments(x, *flat(p), residual, dtype)


def prologue_sums(
    g: Tensor, x: Tensor, p: Prologue, centre: Tensor, fold: Fold | None, after: bool
) -> Tensor:
    """`reference.prologue_sums`, by whoever runs it."""
    folds = (None,) * 3 if fold is None else fold
    return torch.ops.cassetta.prologue_sums(g, x, *flat(p), centre, *folds, after)


def prologue_dgrad(g: Tensor, x: Tensor, p: Prologue, fold: Fold | None, after: bool) -> Tensor:
    """`reference.prologue_dgrad`, by whoever runs it."""
    return torch.ops.cassetta.prologue_dgrad(
        g, x, *flat(p), *((None,) * 3 if fold is None else fold), after
    )


def resize(x: Tensor, p: Prologue, size: tuple[int, ...], grid: Grid) -> Tensor:
    """`reference.resize`, by whoever runs it."""
    return torch.ops.cassetta.resize(x, *flat(p), size, *grid)


def resize_dgrad(g: Tensor, size: tuple[int, ...], grid: Grid) -> Tensor:
    """`reference.resize_dgrad`, by whoever runs it."""
    return torch.ops.cassetta.resize_dgrad(g, size, *grid)


def norm_finalize(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    pooling: Pooling,
) -> Tensor:  # fmt: skip
    """`reference.norm_finalize`, by whoever runs it."""
    return torch.ops.cassetta.norm_finalize(*own, before, gamma, beta, eps, *pooling)


def norm_finalize_backward(
    sums: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None,
    after: Tensor | None, gamma: Tensor | None, voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    """`reference.norm_finalize_backward`, by whoever runs it."""
    return torch.ops.cassetta.norm_finalize_backward(
        sums, mean, rstd, centre, before, after, gamma, voxels, *pooling
    )


def _numbers(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """A geometry without groups, as the arguments of an operator."""
    stride, padding, dilation, groups = geometry
    if groups != 1:
        raise ValueError(f"groups={groups}: our own convolutions have one; `library.conv` has more")
    return list(stride), [side for pair in padding for side in pair], list(dilation)


def _geometry(stride: list[int], padding: list[int], dilation: list[int]) -> Geometry:
    """What `_numbers` took apart."""
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Geometry(tuple(stride), pairs, tuple(dilation))


def _conv_fprop(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    p, (w, b), walk, x2, e = rest[:8], rest[8:10], rest[10:13], rest[13], rest[14:22]
    residual, name, *numbers = rest[22:]
    of = None if name is None else Activation(name, *numbers)
    passes = dispatch.passes(w)
    return passes.conv_fprop(x, unflat(p), w, b, _geometry(*walk), x2, unflat(e), residual, of)


def _conv_dgrad(g: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    walk, size, x, p, (centre, after) = rest[:3], rest[3], rest[4], rest[5:13], rest[13:]
    passes = dispatch.passes(g)
    return passes.conv_dgrad(g, w, _geometry(*walk), tuple(size), x, unflat(p), centre, after)


def _conv_wgrad(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    p, taps, walk = rest[:8], rest[8], rest[9:]
    return dispatch.passes(g).conv_wgrad(g, x, unflat(p), tuple(taps), _geometry(*walk))


def _conv_transposed(x: Tensor, *rest: Any) -> Tensor:
    p, (w, b), walk, e, residual = rest[:8], rest[8:10], rest[10:13], rest[13:21], rest[21]
    passes = dispatch.passes(w)
    return passes.conv_transposed(x, unflat(p), w, b, _geometry(*walk), unflat(e), residual)


def _max_pool(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *prologue, window = rest
    return dispatch.passes(x).max_pool(x, unflat(prologue), tuple(window))


def _max_pool_dgrad(g: Tensor, where: Tensor, window: list[int], size: list[int]) -> Tensor:
    return dispatch.passes(g).max_pool_dgrad(g, where, tuple(window), tuple(size))


def _moments(x: Tensor, *prologue: Any) -> tuple[Tensor, Tensor]:
    mean, var = dispatch.passes(x).moments(x, unflat(prologue))
    return mean, var


def _materialize(x: Tensor, *rest: Any) -> Tensor:
    *prologue, residual, dtype, words = rest
    return dispatch.passes(x).materialize(x, unflat(prologue), residual, dtype, words)


def _concatenate(x: Tensor, *rest: Any) -> Tensor:
    p, x2, p2, dtype = rest[:8], rest[8], rest[9:17], rest[17]
    return dispatch.passes(x).concatenate(x, unflat(p), x2, unflat(p2), dtype)


def _materialize_moments(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *prologue, residual, dtype = rest
    return dispatch.passes(x).materialize_moments(x, unflat(prologue), residual, dtype)


def _prologue_sums(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *prologue, around, a, k, centre, after = rest
    fold = None if a is None else Fold(a, k, centre)
    return dispatch.passes(x).prologue_sums(g, x, unflat(prologue), around, fold, after)


def _prologue_dgrad(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *prologue, a, k, centre, after = rest
    fold = None if a is None else Fold(a, k, centre)
    return dispatch.passes(x).prologue_dgrad(g, x, unflat(prologue), fold, after)


def _resize(x: Tensor, *rest: Any) -> Tensor:
    prologue, size, grid = rest[:8], tuple(rest[8]), Grid(*map(tuple, rest[9:]))
    return dispatch.passes(x).resize(x, unflat(prologue), size, grid)


def _resize_dgrad(g: Tensor, size: list[int], *grid: list[float]) -> Tensor:
    return dispatch.passes(g).resize_dgrad(g, tuple(size), Grid(*map(tuple, grid)))


def _norm_finalize(mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
    *others, kind, groups = rest
    own, pooling = Moments(mean, var), Pooling(kind, groups)
    return dispatch.passes(mean).norm_finalize(own, *others, pooling)


def _norm_finalize_backward(sums: Tensor, *rest: Any) -> Tensor:
    *others, kind, groups = rest
    return dispatch.passes(sums).norm_finalize_backward(sums, *others, Pooling(kind, groups))


def _fake_conv_fprop(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    w, walk, name = rest[8], rest[10:13], rest[-3]
    size = _geometry(*walk).size_of(x.shape[2:], w.shape[2:])
    y = layout.empty((x.shape[0], w.shape[0], *size), w.dtype, x.device)
    return y, *((layout.tables(y), layout.tables(y)) if name else (_no_table(y), _no_table(y)))


def _fake_conv_dgrad(g: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    size, x = rest[3], rest[4]
    dz = layout.empty((g.shape[0], w.shape[1], *size), g.dtype, g.device)
    return dz, _no_table(g) if x is None else layout.tables(dz, 2)


def _fake_conv_wgrad(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    dtype = torch.promote_types(g.dtype, torch.float32)
    return g.new_empty((g.shape[1], x.shape[1], *rest[8]), dtype=dtype)


def _fake_conv_transposed(x: Tensor, *rest: Any) -> Tensor:
    w, stride = rest[8], rest[10]
    size = (n * s for n, s in zip(x.shape[2:], stride, strict=True))
    return layout.empty((x.shape[0], w.shape[1], *size), w.dtype, x.device)


def _no_table(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_max_pool_dgrad(g: Tensor, where: Tensor, window: list[int], size: list[int]) -> Tensor:
    return layout.sized(where, tuple(size), g.dtype)


def _fake_materialize(x: Tensor, *rest: Any) -> Tensor:
    dtype, words = rest[-2:]
    return layout.empty(tuple(x.shape), dtype, x.device) if words else layout.like(x, dtype)


def _fake_materialize_moments(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return layout.like(x, rest[-1]), layout.tables(x), layout.tables(x)


def _fake_resize(x: Tensor, size: list[int]) -> Tensor:
    return layout.sized(x, tuple(size), x.dtype)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "an operator of cassetta was called outside of its autograd.Function and has no gradient: "
        "export a network that is to be trained within `with cassetta.use_backend('reference'):`"
    )


_IMPLEMENTATIONS = {
    "conv_fprop": (_conv_fprop, _fake_conv_fprop),
    "conv_dgrad": (_conv_dgrad, _fake_conv_dgrad),
    "conv_wgrad": (_conv_wgrad, _fake_conv_wgrad),
    "conv_transposed": (_conv_transposed, _fake_conv_transposed),
    "max_pool": (_max_pool, lambda x, *rest: layout.pooled(x, rest[-1])),
    "max_pool_dgrad": (_max_pool_dgrad, _fake_max_pool_dgrad),
    "moments": (_moments, lambda x, *rest: (layout.tables(x), layout.tables(x))),
    "materialize": (_materialize, _fake_materialize),
    "concatenate": (_concatenate, lambda x, *rest: layout.wider(x, rest[8].shape[1], rest[-1])),
    "materialize_moments": (_materialize_moments, _fake_materialize_moments),
    "prologue_sums": (_prologue_sums, lambda g, x, *rest: layout.tables(x, 3)),
    "prologue_dgrad": (_prologue_dgrad, lambda g, x, *rest: layout.like(x, x.dtype)),
    "resize": (_resize, lambda x, *rest: _fake_resize(x, rest[8])),
    "resize_dgrad": (_resize_dgrad, lambda g, size, *grid: _fake_resize(g, size)),
    "norm_finalize": (_norm_finalize, lambda mean, *rest: layout.tables(mean, 5)),
    "norm_finalize_backward": (
        _norm_finalize_backward, lambda sums, mean, *rest: layout.tables(mean, 4),
    ),
}  # fmt: skip

_library = Library("cassetta", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    _library.define(_name + _schema)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    register_fake(f"cassetta::{_name}", _fake, lib=_library)
    register_autograd(f"cassetta::{_name}", _refuse, lib=_library)
