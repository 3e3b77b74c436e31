"""How a convolution walks over an image, in three axes; 1-D and 2-D images have axes of size 1."""

from collections.abc import Sequence
from typing import NamedTuple

from cassetta.kernels.types import Geometry

Three = tuple[int, int, int]


class Walk(NamedTuple):
    """How the rows of a product walk over an image, one number per axis."""

    inp: Three  # voxels of what is read
    out: Three  # voxels of what is written
    taps: Three
    stride: Three
    before: Three  # voxels of padding
    dilation: Three


def walk(inp: Sequence[int], taps: Sequence[int], geometry: Geometry) -> Walk:
    """Return that of a convolution of an image of this size."""
    stride, padding, dilation, _ = geometry
    out, before = geometry.size_of(inp, taps), [pair[0] for pair in padding]
    return Walk(
        lifted(inp, 1), lifted(out, 1), lifted(taps, 1), lifted(stride, 1), lifted(before, 0),
        lifted(dilation, 1),
    )  # fmt: skip


def lifted(sizes: Sequence[int], one: int) -> Three:
    """Return three numbers, from those of 1 to 3 axes."""
    a, b, c = (*[one] * (3 - len(sizes)), *sizes)
    return a, b, c


def along_depth(steps: Walk) -> Walk:
    """Return the same walk with the first axis that there is as D: of two axes, H is marched along.

    An image of one line per plane and one of one plane lie in memory alike.
    """
    if steps.inp[0] > 1 or steps.taps[0] > 1:
        return steps
    return Walk(*((b, a, c) for a, b, c in steps))
