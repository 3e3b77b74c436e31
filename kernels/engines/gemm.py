"""Our own convolutions, as implicit products: what surrounds a product is computed with it.

Forward, bias, activation and residual, and the moments that the next norm asks for, leave with the
product; backward, the sums that the norm before it asks for. The operand z is built once, channels
last in whole words, and again for the gradient of the weights; where each voxel is read once, the
kernel builds it while it loads. Two images are read as one: nothing is concatenated.
"""

from torch import Tensor

from cassetta.kernels import configs, ops
from cassetta.kernels.operands import built, summed
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Prologue

FUSES = True
IS_TORCH = False


def supports(geometry: Geometry, taps: tuple[int, ...]) -> str | None:
    """Explain in a sentence why a convolution cannot be computed; None if it can."""
    return configs.why_no_product(geometry, taps)


def is_last(x_is_last: bool, w: Tensor) -> bool:
    """Tell whether a result is channels last: it is."""
    return True


def fprop(
    x: Tensor, p: Prologue, x2: Tensor | None, p2: Prologue, w: Tensor, b: Tensor | None,
    geometry: Geometry, epilogue: Prologue = NOTHING, residual: Tensor | None = None,
    moments_of: Activation | None = None,
) -> tuple[Tensor, Moments | None]:  # fmt: skip
    """Convolve z, and z2 as further channels: y (N, K, *Y), and its moments, if asked for."""
    z, loaded = _operand(x, p, w, geometry)
    z2 = None if x2 is None else built(x2, p2, w.dtype, words=True)
    y, *own = ops.conv_fprop(z, loaded, w, b, geometry, z2, epilogue, residual, moments_of)
    return y, None if moments_of is None else Moments(*own)


def bprop(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry,
    needs: tuple[bool, bool, bool], centre: Tensor | None = None, outer: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of z (and its sums, with a centre), w and b that are needed."""
    dw, db = wgrad(g, x, p, w, geometry, needs[1:])
    dz, sums = dgrad(g, w, geometry, x, p, centre, outer) if needs[0] else (None, None)
    return dz, sums, dw, db


def dgrad(
    g: Tensor, w: Tensor, geometry: Geometry, x: Tensor, p: Prologue = NOTHING,
    centre: Tensor | None = None, outer: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradient of z, given that of y, g (N, K, *Y); with a centre, also its sums."""
    of = None if centre is None else x
    dz, sums = ops.conv_dgrad(g, w, geometry, tuple(x.shape[2:]), of, p, centre, outer)
    return dz, None if centre is None else sums


def wgrad(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of w and of a bias that are needed, in float32 at least.

    The sum for a bias is a pass of its own, as no product can take it along (`conv_wgrad`).
    """
    dw = db = None
    if needs[0]:
        dw = ops.conv_wgrad(g, *_operand(x, p, w, geometry), tuple(w.shape[2:]), geometry)
    if needs[1]:
        db = summed(g)
    return dw, db


def transposed(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    epilogue: Prologue = NOTHING, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve z (N, K, *Y) by the adjoint: (N, C, *(Y stride))."""
    return ops.conv_transposed(x, p, w, b, geometry, epilogue, residual)


def transposed_bprop(
    g: Tensor, x: Tensor, p: Prologue, w: Tensor, geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of z, w and b in `transposed` that are needed.

    As of the convolution whose image is g, and the gradient of whose result is z.
    """
    dz = dw = db = None
    if needs[1]:
        dw, _ = wgrad(built(x, p, w.dtype), g, NOTHING, w, geometry, (True, False))
    if needs[2]:
        db = summed(g)
    if needs[0]:
        dz, _ = fprop(g, NOTHING, None, NOTHING, w, None, geometry)
    return dz, dw, db


def joins(g: Tensor) -> bool:
    """Tell whether two images are read as one in the backward: they are not."""
    return False


def _operand(x: Tensor, p: Prologue, w: Tensor, geometry: Geometry) -> tuple[Tensor, Prologue]:
    """Return what the kernel reads, and what it applies while it loads.

    All of it, where it reads each voxel once; else that would cost more than the pass it saves.
    """
    if all(t <= s for t, s in zip(w.shape[2:], geometry.stride, strict=True)):
        return x, p
    return built(x, p, w.dtype, words=True), NOTHING
