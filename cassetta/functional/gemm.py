"""Convolution of a `Deferred` by our own kernels: what surrounds a product is computed with it.

Forward, bias and activation, and the moments that the next norm asks for, leave with the product;
backward, the sums that the norm before it asks for. The operand z is built once, channels last in
whole words, and again for the gradient of the weights; where each voxel is read once, the kernel
builds it while it loads. Two images are read as one: nothing is concatenated.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.deferred import Deferred, Launch
from cassetta.functional.nodes import first_order
from cassetta.functional.operands import built, refuse_other, rounded, summed
from cassetta.kernels import configs, ops
from cassetta.kernels.activations import BY_RESULT
from cassetta.kernels.types import (
    NOTHING,
    Activation,
    Geometry,
    Moments,
    Prologue,
    apart,
    flat,
    together,
    unflat,
)


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
    (`activations.BY_RESULT`), or nothing. A residual that is added next leaves with the product,
    too, unless the gradient or the moments are of what it is added to. Under autocast x and the
    parameters are rounded to its dtype.

    Raises
    ------
    ValueError
        If our own convolutions do not cover this geometry; `conv_deferred` takes any.
    """
    if (why := configs.why_no_product(geometry, weight.shape[2:])) is not None:
        raise ValueError(why)
    x, second = x.parts or (x.settled(), None)
    dtype, weight, bias = rounded(x.raw, weight, bias)
    refuse_other(dtype, weight)
    (z, sums, *pending), (z2, sums2, *pending2) = _read(x, dtype), _read(second, dtype)

    def run(residual) -> tuple[Tensor, ...]:  # (torch 2.8 traces no union of types here)
        return _ImplicitGemm.apply(
            z, sums, z2, sums2, weight, bias, residual, *pending, *pending2, geometry,
            *flat(epilogue), *_of(moments_of),
        )  # type: ignore[return-value]  # fmt: skip

    if moments_of is not None:
        y, *own = run(None)
        return Deferred(_activated(y, epilogue), own=Moments(*own), own_of=moments_of)
    if torch.is_grad_enabled() and not epilogue.is_identity():
        return Deferred(_activated(run(None)[0], epilogue))
    size = geometry.size_of(x.shape[2:], weight.shape[2:])
    like = weight.new_empty(()).expand(x.shape[0], weight.shape[0], *size)
    return Deferred(Launch(lambda residual: run(residual)[0], like, torch.is_grad_enabled()))


def _activated(y: Tensor, epilogue: Prologue) -> Tensor:
    """y, which left its convolution activated, with the gradient of that."""
    if epilogue.is_identity() or not torch.is_grad_enabled():
        return y
    return _Activated.apply(y, *_of(epilogue.activation))  # type: ignore[return-value]


def _read(x: Deferred | None, dtype: torch.dtype) -> tuple[Any, ...]:
    """What stands for z and for the sums of its gradient; what is pending, and its norm's centre.

    Whatever is pending, z is rounded when it is built.
    """
    if x is None:
        return None, None, *flat(NOTHING), None, False
    z, sums = x.handles()
    z = z.to(dtype) if x.prologue.is_identity() else z
    norm = (None, False) if x.norm is None or sums is None else (x.norm.centre, x.norm.outer)
    return z, sums, *flat(x.prologue), *norm


def _of(activation: Activation | None) -> tuple[Any, ...]:
    """An activation as arguments; see `flat` for why its numbers are made such."""
    if activation is None:
        return None, 0.0, 0.0
    return activation.name, float(activation.p), float(activation.q)


class _ImplicitGemm(Function):
    """y = act(z * w + b) + r and its moments; z being built of x, or of x and x2, when needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sums: Any, x2: Any, sums2: Any, w: Tensor, b: Any, r: Any, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        pending, pending2, (ctx.geometry, *leaving), of = (
            rest[:10], rest[10:20], rest[20:29], rest[29:],
        )  # fmt: skip
        ctx.nb_others = len(rest)
        ctx.is_summed = sums is not None, sums2 is not None
        kept, ctx.inner = _apart(pending)
        kept2, ctx.inner2 = _apart(pending2)
        ctx.save_for_backward(x, x2, w, *kept, *kept2)
        z, loaded = _operand(x, unflat(pending[:8]), w, ctx.geometry)
        z2 = None if x2 is None else built(x2, unflat(pending2[:8]), w.dtype, words=True)
        y, mean, var = ops.conv_fprop(
            z, loaded, w, b, ctx.geometry, z2, unflat(leaving), r,
            None if of[0] is None else Activation(*of),
        )  # fmt: skip
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *moments: Any) -> tuple:
        x, x2, w, *kept = ctx.saved_tensors
        needs, c = ctx.needs_input_grad, x.shape[1]
        one = _together(x, kept[:6], ctx.inner)
        two = None if x2 is None else _together(x2, kept[6:], ctx.inner2)
        dw = db = None
        dz, dsums = _image_gradient(ctx, g, w[:, :c], one, needs[0], ctx.is_summed[0])
        dz2, dsums2 = _image_gradient(ctx, g, w[:, c:], two, needs[2], ctx.is_summed[1])
        if needs[4]:
            taps = tuple(w.shape[2:])
            dw = ops.conv_wgrad(g, *_operand(x, one.prologue, w, ctx.geometry), taps, ctx.geometry)
            if two is not None:
                z2 = built(two.x, two.prologue, w.dtype, words=True)
                dw = torch.cat([dw, ops.conv_wgrad(g, z2, NOTHING, taps, ctx.geometry)], 1)
            dw = dw.to(w.dtype)
        if needs[5]:
            db = summed(g).to(w.dtype)
        dr = g if needs[6] else None
        return dz, dsums, dz2, dsums2, dw, db, dr, *[None] * ctx.nb_others


class _Image(NamedTuple):
    """An image that was read, as backward finds it."""

    x: Tensor
    prologue: Prologue
    centre: Tensor | None
    outer: bool


def _apart(pending: tuple[Any, ...]) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """What `_read` tells of a pending transform, as tensors and the rest."""
    tensors, inner = apart(pending[:8])
    return [*tensors, pending[8]], (*inner, pending[9])


def _together(x: Tensor, kept: list[Tensor | None], inner: tuple[Any, ...]) -> _Image:
    return _Image(x, together(kept[:5], inner[:3]), kept[5], inner[3])


def _image_gradient(
    ctx: Any, g: Tensor, w: Tensor, image: _Image | None, is_needed: bool, is_summed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of z and, if they are asked for, of its sums."""
    if image is None or not (is_needed or is_summed):
        return None, None
    x, prologue, centre, outer = image
    of, size = (x if is_summed else None), tuple(x.shape[2:])
    dz, sums = ops.conv_dgrad(g, w, ctx.geometry, size, of, prologue, centre, outer)
    return dz, sums if is_summed else None


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


def _operand(
    x: Tensor, prologue: Prologue, w: Tensor, geometry: Geometry
) -> tuple[Tensor, Prologue]:
    """What the kernel reads, and what of the pending transform it applies while it loads.

    All of it, where it reads each voxel once; else that would cost more than the pass it saves.
    """
    if all(t <= s for t, s in zip(w.shape[2:], geometry.stride, strict=True)):
        return x, prologue
    return built(x, prologue, w.dtype, words=True), NOTHING
