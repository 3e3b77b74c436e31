"""What the passes speak in, beside tensors: named tuples of integers, without behaviour."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """How a convolution walks over its input; every field has one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after): an even kernel pads asymmetrically
    dilation: tuple[int, ...]
    groups: int = 1  # of the channels, not per axis
