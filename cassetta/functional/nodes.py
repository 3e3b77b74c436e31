"""The nodes of autograd behind a `Deferred`: what stands for z, and what computes it.

`Pending` returns x itself, and turns the gradient of z into that of x and of the parameters;
`Materialize` computes z, and returns its gradient as it is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.norm import Norm
from cassetta.kernels import ops
from cassetta.kernels.types import unflat


class _Refused(Function):
    """Its first input as it is; to differentiate it, with respect to any of the others, raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Any) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the kernels of cassetta have first derivatives only: compute second derivatives "
            "within `with cassetta.use_backend('reference'):`"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a Function: what it returns cannot be differentiated, and says so.

    What it returns depends on the incoming gradients and on all that was saved, so those are what
    refuses is connected to. (`once_differentiable` looks at the incoming gradients only, and that
    of a sum is part of no graph.)
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor)]
        return tuple(_Refused.apply(g, *depends_on) if isinstance(g, Tensor) else g for g in out)

    return guarded


class StandIn(NamedTuple):
    """What stands for z in the graph."""

    z: Tensor
    sums: Tensor | None = None  # for the sums of its gradient
    is_summed: list[bool] = [False]  # noqa: RUF012 (one value): whether all readers return them


class Pending(Function):
    """x as it is, standing for z; backward, the gradient of z becomes that of x and parameters.

    Readers may return the sums that the norm asks for together with the gradient of z: they are
    linear in it, so those of several readers add up as it does. `is_summed` [bool] tells whether
    all of them do.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Any, beta: Any, weight: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        rest, ctx.is_summed = rest[:-1], rest[-1]
        s1, t1, name, p, q, slope, s2, t2, mean, rstd, centre, before, after, pool, outer = rest
        tables = (s1, t1, slope, s2, t2, mean, rstd, centre, before, after)
        needs_x = mean is not None or name != "identity"  # a mere factor does not
        ctx.save_for_backward(x if needs_x else None, gamma, beta, weight, *tables)
        ctx.activation = (name, p, q)
        ctx.pool, ctx.outer, ctx.nb_others = pool, bool(outer), len(rest) + 1
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_empty(2, *x.shape[:2], dtype=table_dtype(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None) -> tuple:
        x, gamma, beta, weight, s1, t1, slope, s2, t2, mean, rstd, centre, before, after = (
            ctx.saved_tensors
        )
        x = g if x is None else x
        prologue = unflat((s1, t1, *ctx.activation, slope, s2, t2))
        to_x, to_gamma, to_beta, to_weight = ctx.needs_input_grad[:4]
        dx = dgamma = dbeta = dweight = fold = None
        voxels = math.prod(x.shape[2:])
        if mean is not None and (ctx.pool.kind != "fixed" or to_gamma or to_beta):
            norm = Norm(mean, rstd, centre, before, after, ctx.pool, ctx.outer)
            if sums is None or not ctx.is_summed[0]:
                sums = ops.prologue_sums(g, x, prologue, centre, None, ctx.outer)
            dgamma, dbeta, fold = norm.gradients(gamma, sums, voxels)
        if to_weight:  # after the norm, which has its share in the gradient of what precedes it
            outer_fold = fold if ctx.outer else None
            around = torch.zeros(x.shape[:2], dtype=table_dtype(x), device=x.device)
            _, _, dslope = ops.prologue_sums(g, x, prologue, around, outer_fold, ctx.outer)
            dweight = dslope.sum(0) if weight.numel() > 1 else dslope.sum().reshape(1)
            dweight = dweight.to(weight.dtype)
        if to_x:
            dx = ops.prologue_dgrad(g, x, prologue, fold, ctx.outer)
        dgamma = dgamma.to(gamma.dtype) if to_gamma and dgamma is not None else None
        dbeta = dbeta.to(beta.dtype) if to_beta and dbeta is not None else None
        return dx, dgamma, dbeta, dweight, *[None] * ctx.nb_others


class Materialize(Function):
    """z (+ residual) from what stands for it; the gradients of all three are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *prologue, residual = rest
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        return ops.materialize(x, unflat(prologue), residual, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # and so theirs, to any order
        return g, *[None] * ctx.nb_others, g if ctx.has_residual else None


class MaterializeMoments(Function):
    """`Materialize`, and the moments of z, whose gradient is the affair of the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *prologue, residual = rest
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        z, mean, var = ops.materialize_moments(x, unflat(prologue), residual, dtype)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, g: Tensor, *moments: Any) -> tuple:
        return Materialize.backward(ctx, g)


def table_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
