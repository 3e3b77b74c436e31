"""Transposed convolution of a `Deferred`, whose stride is its size, by torch or by our own kernels.

It is the adjoint of a strided convolution, so the gradient of its image is that convolution, and
the gradient of its weights that of the convolution's, with image and gradient exchanged.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.deferred import Deferred, Launch
from cassetta.functional.nodes import first_order
from cassetta.functional.operands import built, refuse_other, rounded, summed
from cassetta.kernels import library, ops
from cassetta.kernels.types import NOTHING, Geometry, apart, flat, together, unflat


def conv_transposed_deferred(
    x: Deferred, weight: Tensor, bias: Tensor | None, geometry: Geometry, engine: str
) -> Deferred:
    """The adjoint of `conv` of what x (B, K, *Y) stands for: (B, C, *(Y stride)).

    Under autocast x and the parameters are rounded to its dtype, as torch has it. A residual that
    is added next leaves with the product, if our kernels compute it.
    """
    x = x.settled()
    raw = x.handle()
    dtype, weight, bias = rounded(raw, weight, bias)
    raw = raw.to(dtype) if x.prologue.is_identity() else raw

    def run(residual) -> Tensor:  # (torch 2.8 traces no union of types here)
        return _ConvTransposed.apply(
            raw, weight, bias, residual, *flat(x.prologue), geometry, dtype, engine
        )  # type: ignore[return-value]

    if engine != "gemm":
        return Deferred(run(None))
    refuse_other(dtype, weight)
    size = (n * s for n, s in zip(x.shape[2:], geometry.stride, strict=True))
    like = weight.new_empty(()).expand(x.shape[0], weight.shape[1], *size)
    return Deferred(Launch(run, like, torch.is_grad_enabled()))


class _ConvTransposed(Function):
    """y = z * w + b + r, transposed, z being built of x when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Any, r: Any, *rest: Any) -> Tensor:
        kept, ctx.inner = apart(rest[:8])
        ctx.geometry, ctx.dtype, ctx.engine = rest[8:]
        ctx.nb_others = len(rest)
        ctx.save_for_backward(x, w, *kept)
        p = unflat(rest[:8])
        if ctx.engine == "gemm":
            return ops.conv_transposed(x, p, w, b, ctx.geometry, residual=r)
        with torch.autocast(x.device.type, enabled=False):
            z = built(x, p, ctx.dtype)
            return library.conv_transposed(z, w, b, ctx.geometry, (0,) * (x.ndim - 2))

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, w, *kept = ctx.saved_tensors
        p, (to_x, to_w, to_b, to_r) = together(kept, ctx.inner), ctx.needs_input_grad[:4]
        z = built(x, p, ctx.dtype) if to_w else x
        dz, dw, taps = None, None, tuple(w.shape[2:])
        with torch.autocast(g.device.type, enabled=False):
            if ctx.engine == "gemm":
                dz = ops.conv_fprop(g, NOTHING, w, None, ctx.geometry)[0] if to_x else None
                dw = ops.conv_wgrad(z, g, NOTHING, taps, ctx.geometry) if to_w else None
            else:
                dz = library.conv(g, w, None, ctx.geometry) if to_x else None
                if to_w:
                    needs = (False, True, False)
                    _, dw, _ = library.conv_backward(z, g, w, None, ctx.geometry, needs)
        dw = None if dw is None else dw.to(w.dtype)
        db = summed(g).to(w.dtype) if to_b else None
        return dz, dw, db, g if to_r else None, *[None] * ctx.nb_others
