"""Convolution of a `Deferred` by our own kernels: what surrounds a product is computed with it.

Forward, bias and activation, and the moments that the next norm asks for, leave with the product;
backward, the sums that the norm before it asks for. The operand z is built once, channels last in
whole words, and again for the gradient of the weights; where there is one tap, the kernel builds it
while it loads.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.deferred import Deferred, first_order
from cassetta.kernels import ops
from cassetta.kernels.activations import BY_RESULT
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Prologue, flat, unflat


def conv_gemm(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Prologue = NOTHING,
    moments_of: Activation | None = None,
) -> Deferred:
    """`conv` of what x stands for, with an epilogue, and the moments of what leaves it.

    Where a gradient is asked for, the epilogue is an activation that is told by its result
    (`activations.BY_RESULT`), or nothing. Under autocast x and the parameters are rounded
    to its dtype.
    """
    x = x.settled()
    dtype = x.raw.dtype
    if torch.is_autocast_enabled(x.raw.device.type):
        dtype = torch.get_autocast_dtype(x.raw.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != dtype:  # which torch's convolutions refuse, too
        raise TypeError(
            f"inp is in {dtype}, but the weights are in {weight.dtype}: convert one of them, "
            "or use torch.autocast"
        )
    z, sums = x.handles()
    if x.prologue.is_identity:  # else z is rounded when it is built
        z = z.to(dtype)
    norm = (None, False) if x.norm is None or sums is None else (x.norm.centre, x.norm.outer)
    y, *own = _ImplicitGemm.apply(
        z, sums, weight, bias, *flat(x.prologue), *norm, geometry, *flat(epilogue), *_of(moments_of)
    )  # type: ignore[misc]
    if torch.is_grad_enabled() and not epilogue.is_identity:
        y = _Activated.apply(y, *_of(epilogue.activation))
    if moments_of is None:
        return Deferred(y)
    return Deferred(y, own=Moments(*own), own_of=moments_of)


def _of(activation: Activation | None) -> tuple[Any, ...]:
    """An activation as arguments; see `flat` for why its numbers are made such."""
    if activation is None:
        return None, 0.0, 0.0
    return activation.name, float(activation.p), float(activation.q)


class _ImplicitGemm(Function):
    """y = act(z * w + b) and its moments; z being built of x when it is needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sums: Any, w: Tensor, b: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        pending, (centre, ctx.outer, ctx.geometry), leaving, of = (
            rest[:8], rest[8:11], rest[11:19], rest[19:],
        )  # fmt: skip
        s1, t1, *ctx.inner, slope, s2, t2 = pending
        ctx.nb_others = len(rest)
        ctx.is_summed = sums is not None
        z, loaded = _operand(x, unflat(pending), w)
        y, mean, var = ops.conv_fprop(
            z, loaded, w, b, ctx.geometry, epilogue=unflat(leaving),
            moments_of=None if of[0] is None else Activation(*of),
        )  # fmt: skip
        ctx.save_for_backward(x, w, s1, t1, slope, s2, t2, centre)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *moments: Any) -> tuple:
        x, w, s1, t1, slope, s2, t2, centre = ctx.saved_tensors
        prologue = unflat((s1, t1, *ctx.inner, slope, s2, t2))
        dz = dsums = dw = db = None
        if ctx.needs_input_grad[0] or ctx.is_summed:
            of = x if ctx.is_summed else None
            dz, dsums = ops.conv_dgrad(
                g, w, ctx.geometry, tuple(x.shape[2:]), of, prologue, centre, ctx.outer
            )
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            z, loaded = _operand(x, prologue, w)
            dw, db = ops.conv_wgrad(g, z, loaded, tuple(w.shape[2:]), ctx.geometry)
            dw = dw.to(w.dtype) if ctx.needs_input_grad[2] else None
            db = db.to(w.dtype) if ctx.needs_input_grad[3] else None
        return dz, dsums if ctx.is_summed else None, dw, db, *[None] * ctx.nb_others


class _Activated(Function):
    """What left its convolution activated, for which this makes the difference in the graph alone:
    the result tells the slope. A node of its own, so that the gradient of the result is gone when
    that of the convolution is computed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, name: str, p: float, q: float) -> Tensor:
        ctx.activation = Activation(BY_RESULT[name], p, q)
        out = y.view_as(y)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        (out,) = ctx.saved_tensors
        dy = ops.prologue_dgrad(g, out, Prologue(activation=ctx.activation), None, False)
        return dy, None, None, None


def _operand(x: Tensor, prologue: Prologue, w: Tensor) -> tuple[Tensor, Prologue]:
    """What the kernel reads, and what of the pending transform it applies while it loads."""
    if prologue.is_identity or math.prod(w.shape[2:]) == 1:
        return x, prologue
    return ops.materialize(x, prologue, None, w.dtype, words=True), NOTHING
