"""Torch's convolutions (cuDNN's, on a GPU), in any geometry; passes build what they read.

Two images are concatenated for the product, and nothing of that is kept. Backward, large ones are
read one after the other, so that no operand is ever as large as both.
"""

import torch
from torch import Tensor

from cassetta.kernels import library, ops
from cassetta.kernels.operands import built
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Prologue

FUSES = False
IS_TORCH = True

LARGE = 2**24
"""Elements of an image from which on its memory counts more than a call of the host."""


def supports(geometry: Geometry, taps: tuple[int, ...]) -> str | None:
    """Explain why a convolution cannot be computed; None, for all can."""
    return None


def is_last(x_is_last: bool, w: Tensor) -> bool:
    """Tell whether a result is channels last: cuDNN's is where the image or the weights are."""
    return x_is_last or (w.shape[1] > 1 and w.stride(1) == 1 and w[0, 0].numel() > 1)


def fprop(
    x: Tensor, p: Prologue, x2: Tensor | None, p2: Prologue, w: Tensor, b: Tensor | None,
    geometry: Geometry, epilogue: Prologue = NOTHING, residual: Tensor | None = None,
    moments_of: Activation | None = None,
) -> tuple[Tensor, Moments | None]:  # fmt: skip
    """Convolve z, and z2 as further channels: y (N, K, *Y), and no moments."""
    z = built(x, p, w.dtype) if x2 is None else ops.concatenate(x, p, x2, p2, w.dtype)
    return library.conv(z, w, b, geometry), None


def bprop(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry,
    needs: tuple[bool, bool, bool], centre: Tensor | None = None, outer: bool = False,
) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of z, w and a bias that are needed, and, in the second place, no sums.

    By one call, which is quicker for the host; or, where images are large, by two, so that z is
    gone before its gradient is there.
    """
    if needs[0] and any(needs[1:]) and _is_large(g):
        dw, db = wgrad(g, x, p, w, geometry, needs[1:])
        return *dgrad(g, w, geometry, x), dw, db
    z = built(x, p if needs[1] else NOTHING, w.dtype)  # else for its shape and layout
    dz, dw, db = library.conv_backward(g, z, w, geometry, needs)
    return dz, None, dw, db


def _is_large(g: Tensor) -> bool:
    return not torch.compiler.is_compiling() and g.numel() >= LARGE


def dgrad(
    g: Tensor, w: Tensor, geometry: Geometry, x: Tensor, p: Prologue = NOTHING,
    centre: Tensor | None = None, outer: bool = False,
) -> tuple[Tensor | None, None]:  # fmt: skip
    """Return the gradient of z, given that of y, g (N, K, *Y); and no sums."""
    like = x.to(w.dtype)
    return library.conv_backward(g, like, w, geometry, (True, False, False))[0], None


def wgrad(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of w and of a bias that are needed."""
    z = built(x, p if needs[0] else NOTHING, w.dtype)
    return library.conv_backward(g, z, w, geometry, (False, *needs))[1:]


def joins(g: Tensor) -> bool:
    """Tell whether two images are read as one in the backward: it is quicker, if they are small."""
    return not (torch.compiler.is_compiling() or _is_large(g))


def joined_bprop(
    g: Tensor, x: Tensor, p: Prologue, x2: Tensor, p2: Prologue, w: Tensor, geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of z, z2 (those of both, or none), w and b that are needed."""
    z = ops.concatenate(x, p, x2, p2, w.dtype)
    dz, dw, db = library.conv_backward(g, z, w, geometry, needs)
    one, two = (None, None) if dz is None else dz.split([x.shape[1], x2.shape[1]], 1)
    return one, two, dw, db


def transposed(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    epilogue: Prologue = NOTHING, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve z (N, K, *Y) by the adjoint: (N, C, *(Y stride))."""
    return library.conv_transposed(built(x, p, w.dtype), w, b, geometry, (0,) * (x.ndim - 2))


def transposed_bprop(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of z, w and b in `transposed` that are needed."""
    z = built(x, p if needs[1] else NOTHING, w.dtype)  # else for its shape and layout
    return library.conv_transposed_backward(g, z, w, geometry, needs)
