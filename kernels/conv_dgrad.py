"""The gradient of the image of a convolution, and transposed convolutions, by the forward kernel.

Where the stride is 1, the gradient is a convolution of dy with the taps mirrored and the channels
exchanged. Where taps do not overlap (the stride is their size), each voxel of dy gives one value to
each of its taps: a product per tap, whose rows are written to where the tap lies; a transposed
convolution is the same.

A convolution that reads a pending transform z of x also needs, for the norm in it, the sums over
the voxels that `reference.prologue_sums` states; they are taken here, from dz while it is at hand.
"""

from torch import Tensor

from cassetta.kernels import configs, layout
from cassetta.kernels.conv_fprop import run
from cassetta.kernels.geometry import Walk, walk
from cassetta.kernels.plans import Product
from cassetta.kernels.types import NOTHING, Geometry, Prologue, Size


def conv_dgrad(
    g: Tensor, w: Tensor, geometry: Geometry, size: Size, x: Tensor | None = None,
    p: Prologue = NOTHING, centre: Tensor | None = None, after: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    taps = tuple(w.shape[2:])
    _refuse_other(geometry, taps)
    dz = layout.empty((g.shape[0], w.shape[1], *size), g.dtype, g.device)
    if max(geometry.stride) > 1:  # by the size of the taps
        covered = tuple(n * s for n, s in zip(g.shape[2:], geometry.stride, strict=True))
        if covered != tuple(size):  # what a stride leaves over at the end
            dz.zero_()
        steps = walk(size, taps, geometry)
        table, scatter = w.flatten(2).permute(2, 0, 1), True
        steps = steps._replace(inp=steps.out)
    else:
        table, scatter = w.flatten(2).flip(2).permute(2, 0, 1), False
        steps = _mirrored(walk(size, taps, geometry))
    p = NOTHING if x is None else p  # which is of x, and no epilogue
    sums, _ = run(
        _product(dz, g, w, geometry), layout.in_words(g), NOTHING, layout.packed(table), None, dz,
        steps, epilogue=p, image=x, centre=centre, after=after, scatter=scatter,
    )  # fmt: skip
    return dz, sums


def conv_transposed(
    x: Tensor, p: Prologue, w: Tensor, b: Tensor | None, geometry: Geometry,
    epilogue: Prologue = NOTHING, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if not geometry.tiles(tuple(w.shape[2:])):
        raise ValueError(
            f"geometry={geometry}: our own transposed convolution strides by its size, here "
            f"{tuple(w.shape[2:])}, without padding or dilation; that of `library` takes any"
        )
    size = tuple(n * s for n, s in zip(x.shape[2:], geometry.stride, strict=True))
    y = layout.empty((x.shape[0], w.shape[1], *size), w.dtype, x.device)
    steps, table = walk(size, w.shape[2:], geometry), w.flatten(2).permute(2, 0, 1)
    run(
        _product(y, x, w, geometry), layout.in_words(x), p, layout.packed(table), b, y,
        steps._replace(inp=steps.out), epilogue=epilogue, image=residual, scatter=True,
    )  # fmt: skip
    return y


def _product(fine: Tensor, coarse: Tensor, w: Tensor, geometry: Geometry) -> Product:
    return Product(
        "conv_dgrad", tuple(fine.shape), coarse.shape[1], tuple(w.shape[2:]), geometry, w.dtype,
    )  # fmt: skip


def _refuse_other(geometry: Geometry, taps: tuple[int, ...]) -> None:
    """Whoever chooses has asked before; nothing is computed that would be wrong."""
    if (why := configs.why_no_product(geometry, taps)) is not None:
        raise ValueError(why)


def _mirrored(steps: Walk) -> Walk:
    """The convolution of dy that the gradient is: what was read is written."""
    inp, out, taps, stride, before, dilation = steps
    a, b, c = (d * (t - 1) - lost for d, t, lost in zip(dilation, taps, before, strict=True))
    return Walk(out, inp, taps, stride, (a, b, c), dilation)
