"""The nodes of autograd that compute z from what stands for it, whose gradient is that of z."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.recording import recordings


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


class Materialize(Function):
    """z (+ residual) from what stands for it; the gradients of all three are the same."""

    @staticmethod
    def forward(ctx: Any, held: Any, x: Tensor, *rest: Any) -> Tensor:
        *prologue, residual, dtype = rest
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        return recordings.transform(held, "materialize", x, prologue, [residual], dtype)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # and so theirs, to any order
        return None, g, *[None] * ctx.nb_others, g if ctx.has_residual else None, None


class MaterializeMoments(Function):
    """`Materialize`, and the moments of z, whose gradient is the affair of the norm."""

    @staticmethod
    def forward(ctx: Any, held: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *prologue, residual, dtype = rest
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        name, others = "materialize_moments", [residual]
        z, mean, var = recordings.transform(held, name, x, prologue, others, dtype)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, g: Tensor, *moments: Any) -> tuple:
        return Materialize.backward(ctx, g)
