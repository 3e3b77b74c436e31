"""The passes as registered operators of torch, so that compilers and exporters see one call each.

Each has a fake implementation (shapes without data), and counts as nothing in `FlopCounterMode`, as
torch's own elementwise operations do (`flops`). They have no gradient of their own, and say so;
the `torch.autograd.Function`s of `cassetta.functional` call them, forward and backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from cassetta.kernels import dispatch
from cassetta.kernels.types import Fold, Moments, Pooling, Prologue, flat, unflat

_PROLOGUE = (
    "Tensor? s1, Tensor? t1, str act, float p, float q, Tensor? slope, Tensor? s2, Tensor? t2"
)
_SCHEMAS = {
    "moments": f"(Tensor x, {_PROLOGUE}) -> (Tensor, Tensor)",
    "materialize": f"(Tensor x, {_PROLOGUE}, Tensor? residual, ScalarType dtype) -> Tensor",
    "materialize_moments": f"(Tensor x, {_PROLOGUE}, Tensor? residual, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "prologue_sums": f"(Tensor g, Tensor x, {_PROLOGUE}, Tensor around, Tensor? a, Tensor? k,"
    " Tensor? centre, bool after) -> Tensor",
    "prologue_dgrad": f"(Tensor g, Tensor x, {_PROLOGUE}, Tensor? a, Tensor? k, Tensor? centre,"
    " bool after) -> Tensor",
    "norm_finalize": "(Tensor mean, Tensor var, Tensor? before, Tensor? gamma, Tensor? beta,"
    " float eps, str kind, int groups) -> Tensor",
    "norm_finalize_backward": "(Tensor sums, Tensor mean, Tensor rstd, Tensor centre,"
    " Tensor? before, Tensor? after, Tensor? gamma, SymInt voxels, str kind, int groups) -> Tensor",
}

NAMES = tuple(_SCHEMAS)


def moments(x: Tensor, p: Prologue) -> Moments:
    """`reference.moments`, by whoever runs it."""
    return Moments(*torch.ops.cassetta.moments(x, *flat(p)))


def materialize(x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.materialize`, by whoever runs it."""
    return torch.ops.cassetta.materialize(x, *flat(p), residual, dtype)


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


def _moments(x: Tensor, *prologue: Any) -> tuple[Tensor, Tensor]:
    mean, var = dispatch.passes(x).moments(x, unflat(prologue))
    return mean, var


def _materialize(x: Tensor, *rest: Any) -> Tensor:
    *prologue, residual, dtype = rest
    z = dispatch.passes(x).materialize(x, unflat(prologue), residual, dtype)
    return _laid_out(z, x)


def _materialize_moments(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *prologue, residual, dtype = rest
    z, *own = dispatch.passes(x).materialize_moments(x, unflat(prologue), residual, dtype)
    return _laid_out(z, x), *own


def _prologue_sums(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *prologue, around, a, k, centre, after = rest
    fold = None if a is None else Fold(a, k, centre)
    return dispatch.passes(x).prologue_sums(g, x, unflat(prologue), around, fold, after)


def _prologue_dgrad(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *prologue, a, k, centre, after = rest
    fold = None if a is None else Fold(a, k, centre)
    return _laid_out(dispatch.passes(x).prologue_dgrad(g, x, unflat(prologue), fold, after), x)


def _norm_finalize(mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
    *others, kind, groups = rest
    own, pooling = Moments(mean, var), Pooling(kind, groups)
    return dispatch.passes(mean).norm_finalize(own, *others, pooling)


def _norm_finalize_backward(sums: Tensor, *rest: Any) -> Tensor:
    *others, kind, groups = rest
    return dispatch.passes(sums).norm_finalize_backward(sums, *others, Pooling(kind, groups))


def _laid_out(out: Tensor, x: Tensor) -> Tensor:
    """An image in the layout that compilers are told of: that of `torch.empty_like(x)`."""
    if out.stride() == x.stride() or out.stride() == torch.empty_like(x, device="meta").stride():
        return out
    return torch.empty_like(x, dtype=out.dtype).copy_(out)


def _tables(x: Tensor, *count: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*count, *x.shape[:2]), dtype=dtype)


def _fake_materialize(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=rest[-1])


def _fake_materialize_moments(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=rest[-1]), _tables(x), _tables(x)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "an operator of cassetta was called outside of its autograd.Function and has no gradient: "
        "export a network that is to be trained within `with cassetta.use_backend('reference'):`"
    )


_IMPLEMENTATIONS = {
    "moments": (_moments, lambda x, *rest: (_tables(x), _tables(x))),
    "materialize": (_materialize, _fake_materialize),
    "materialize_moments": (_materialize_moments, _fake_materialize_moments),
    "prologue_sums": (_prologue_sums, lambda g, x, *rest: _tables(x, 3)),
    "prologue_dgrad": (_prologue_dgrad, lambda g, x, *rest: torch.empty_like(x)),
    "norm_finalize": (_norm_finalize, lambda mean, *rest: _tables(mean, 5)),
    "norm_finalize_backward": (
        _norm_finalize_backward, lambda sums, mean, *rest: _tables(mean, 4),
    ),
}  # fmt: skip

_library = Library("cassetta", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    _library.define(_name + _schema)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    register_fake(f"cassetta::{_name}", _fake, lib=_library)
    register_autograd(f"cassetta::{_name}", _refuse, lib=_library)
