"""Convolution in 1 to 3 dimensions, with the boundary conditions of torch-bounds.

`conv` is plain PyTorch. `conv_deferred` reads a `Deferred`, and keeps for backward what that holds,
not what it is made into: the operand z is built again for the gradient of the weights.
"""

from typing import Any

import torch
from bounds import BoundType as Bound, indexing, to_enum, to_fourier
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from cassetta.core.typing import BoundType
from cassetta.functional.deferred import Deferred
from cassetta.functional.nodes import first_order
from cassetta.functional.operands import built, rounded
from cassetta.kernels import dispatch, library, ops
from cassetta.kernels.activations import BY_RESULT
from cassetta.kernels.types import (
    NOTHING,
    Activation,
    Geometry,
    Prologue,
    apart,
    flat,
    together,
    unflat,
)

Pairs = tuple[tuple[int, int], ...]


def same_padding(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Pairs:
    """Padding (before, after) per axis that keeps the size; an even kernel pads more after."""
    spans = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((span // 2, span - span // 2) for span in spans)


def pad(inp: Tensor, padding: Pairs, mode: BoundType) -> Tensor:
    """Extend each spatial axis by (before, after) voxels that follow the boundary condition `mode`.

    inp : (B, C, *size) -> (B, C, *(before + size + after)). Any amount of padding is allowed.
    The names are those of torch-bounds: `"reflect"` repeats the voxel at the edge (dct2), and what
    `torch.nn` calls "reflect" is `"mirror"` (dct1).
    """
    if to_enum(mode) == Bound.zero:
        return F.pad(inp, [amount for pair in reversed(padding) for amount in pair])
    index_of = getattr(indexing, str(to_fourier(mode)))
    for axis, (before, after) in enumerate(padding, start=2):
        if before or after:
            size = inp.shape[axis]
            outside = torch.arange(-before, size + after, device=inp.device)
            index, sign = index_of(outside, size)
            inp = inp.index_select(axis, index)
            if isinstance(sign, Tensor):
                inp = inp * sign.to(inp.dtype).reshape([-1] + [1] * (inp.ndim - axis - 1))
    return inp


def conv(
    inp: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    padding_mode: BoundType = "zeros",
) -> Tensor:
    """Cross-correlate inp (B, C, *size) with weight (K, C/groups, *kernel_size): (B, K, *out)."""
    if padding_mode != "zeros" and to_enum(padding_mode) != Bound.zero:  # the word is quick to tell
        inp = pad(inp, geometry.padding, padding_mode)
        stride, padding, dilation, groups = geometry
        geometry = Geometry(stride, ((0, 0),) * len(padding), dilation, groups)
    return dispatch.implementation().conv(inp, weight, bias, geometry)


def conv_transposed(
    inp: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: tuple[int, ...],
) -> Tensor:
    """The adjoint of `conv`: inp (B, K, *size), weight (K, C/groups, *kernel): (B, C, *out)."""
    passes = dispatch.implementation()
    return passes.conv_transposed(inp, weight, bias, geometry, output_padding)


def conv_deferred(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: Activation | None = None,
) -> Deferred:
    """`conv` of what x stands for; perhaps with an activation, and then what leaves it is kept.

    Under autocast x and the parameters are rounded to its dtype, as `torch.conv3d` has it.
    """
    x, second = x.parts or (x.settled(), None)
    raw = x.handle()
    dtype, weight, bias = rounded(raw, weight, bias)
    if x.prologue.is_identity() and second is None:  # else z is rounded when it is built
        raw = raw.to(dtype)
    other = None if second is None else second.handle()
    pending = *flat(x.prologue), *flat(NOTHING if second is None else second.prologue)
    y = _Convolution.apply(raw, other, weight, bias, *pending, *geometry, dtype)
    out = Deferred(y)  # type: ignore[arg-type]
    return out if activation is None else activated_at_once(out, activation)


def activated_at_once(x: Deferred, activation: Activation) -> Deferred:
    """The activation applied, for one whose result tells its slope: that is all that is kept.

    Of x nothing but a factor may be pending, as dropout leaves it.
    """
    name, p, q = activation
    s1, t1, *_ = x.prologue
    y = _Activate.apply(x.raw, s1, t1, name, float(p), float(q))  # see `flat`
    return Deferred(y)  # type: ignore[arg-type]


class _Convolution(Function):
    """y = z * w + b, z being built when it is needed: of x, or of x and x2, side by side."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x2: Tensor | None, w: Tensor, b: Tensor | None, *rest: Any
    ) -> Tensor:
        pending, pending2, (*geometry, ctx.dtype) = rest[:8], rest[8:16], rest[16:]
        ctx.nb_others, ctx.geometry = len(rest), Geometry(*geometry)
        kept, ctx.inner = apart(pending)
        kept2, ctx.inner2 = apart(pending2)
        ctx.save_for_backward(x, x2, w, b, *kept, *kept2)
        z = _operand(x, x2, unflat(pending), unflat(pending2), ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return library.conv(z, w, b, ctx.geometry)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, x2, w, b, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        p, p2 = together(kept[:5], ctx.inner), together(kept[5:], ctx.inner2)
        if x2 is None or ctx.geometry.groups != 1:
            dz, dw, db = _gradients(ctx, g, x, x2, p, p2, w, b, (needs[0] or needs[1], *needs[2:4]))
            if x2 is None or dz is None:
                return dz, None, dw, db, *[None] * ctx.nb_others
            c = x.shape[1]
            return dz[:, :c], dz[:, c:], dw, db, *[None] * ctx.nb_others
        # one image after the other, so that no operand or gradient is ever as large as both
        w1, w2 = w[:, : x.shape[1]], w[:, x.shape[1] :]
        dx, dw, db = _gradients(ctx, g, x, None, p, p, w1, b, (needs[0], *needs[2:4]))
        dx2, dw2, _ = _gradients(ctx, g, x2, None, p2, p2, w2, None, (*needs[1:3], False))
        dw = None if dw is None or dw2 is None else torch.cat([dw, dw2], 1)
        return dx, dx2, dw, db, *[None] * ctx.nb_others


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, x2: Tensor | None, p: Prologue, p2: Prologue, w: Tensor,
    b: Tensor | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Those of z, w and b that are needed."""
    if not any(needs):
        return None, None, None
    if not needs[1] and x2 is None:  # only its shape and layout matter
        p = NOTHING
    z = _operand(x, x2, p, p2, ctx.dtype)
    return library.conv_backward(g, z, w, b, ctx.geometry, needs)


class _Activate(Function):
    """An activation of a multiple of y, whose result is kept, because it tells the slope; a node of
    its own, so that the gradient of the result is gone when that of the convolution is computed."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, s: Tensor | None, t: Tensor | None, *activation: Any
    ) -> Tensor:
        inner = Activation(*activation)
        ctx.activation = Activation(BY_RESULT[inner.name], inner.p, inner.q)
        out = ops.materialize(y, Prologue(s, t, inner), None, y.dtype)
        ctx.save_for_backward(out, s, t)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        out, s, t = ctx.saved_tensors
        prologue = Prologue(activation=ctx.activation, s2=s, t2=t)
        return ops.prologue_dgrad(g, out, prologue, None, False), *[None] * 5


def _operand(x: Tensor, x2: Tensor | None, p: Prologue, p2: Prologue, dtype: torch.dtype) -> Tensor:
    if x2 is not None:
        return ops.concatenate(x, p, x2, p2, dtype)
    return built(x, p, dtype)
