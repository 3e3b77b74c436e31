"""What passes are called with by whoever calls all of them: compilers, comparisons, tests.

A record makes of a `Sample` the arguments of its pass; who makes the sample decides on devices,
layouts and values, or on tensors without any.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cassetta.kernels.types import Activation, Fold, Geometry, Grid, Prologue


class Sample(NamedTuple):
    """An image (N, C, *X), and makers of whatever else there is."""

    shape: tuple[int, ...]
    image: Callable[[tuple[int, ...]], Tensor]  # of a shape, all in one dtype and layout
    table: Callable[..., Tensor]  # of numbers above 0, in float32; takes the length of each axis
    pending: Callable[[int], Prologue]  # of so many channels
    full: bool  # whether all is there that may be absent
    other: bool  # whether a pass goes the other way, where it has two
    more: int  # channels of a second image, or of what a convolution returns

    @property
    def x(self) -> Tensor:
        """The image, or another of its kind."""
        return self.image(self.shape)

    @property
    def p(self) -> Prologue:
        """Its pending transform."""
        return self.pending(self.shape[1])

    @property
    def one(self) -> Tensor:
        """A number for each channel of each sample."""
        return self.table(*self.shape[:2])

    @property
    def counter(self) -> Tensor:
        """Make a number of batches."""
        return self.one.new_zeros((), dtype=torch.int64)

    @property
    def fold(self) -> Fold | None:
        """What is folded into a gradient, which may be absent."""
        return Fold(self.one, self.one, self.one) if self.full else None

    def of(self, channels: int, size: tuple[int, ...] = ()) -> Tensor:
        """Make another image, of the same size if no other is given."""
        return self.image((self.shape[0], channels, *(size or self.shape[2:])))

    def weights(self, *shape: int) -> Tensor:
        """Make parameters, in the dtype of the image."""
        return self.table(*shape).to(self.image((1,) * len(self.shape)).dtype)

    def window(self, side: int = 2) -> tuple[int, ...]:
        """Voxels of a window along each axis."""
        return tuple(min(side, n) for n in self.shape[2:])

    def kept(self, side: int) -> tuple[Geometry, tuple[int, ...], tuple[int, ...]]:
        """A convolution that keeps the size of the image, its taps, and that size."""
        axes = len(self.shape[2:])
        around = ((side // 2, side // 2),) * axes
        return Geometry((1,) * axes, around, (1,) * axes), (side,) * axes, self.shape[2:]

    def halved(self) -> tuple[Geometry, tuple[int, ...], tuple[int, ...]]:
        """The convolution that strides by its size, its taps, and the size of what it returns."""
        taps = self.window()
        geometry = Geometry(taps, ((0, 0),) * len(taps), (1,) * len(taps))
        return geometry, taps, geometry.size_of(self.shape[2:], taps)

    def grid(self) -> tuple[tuple[int, ...], Grid]:
        """The size of the image doubled, or halved if it is large; and where its voxels lie."""
        step, axes = 2.0 if math.prod(self.shape) > 2**31 else 0.5, len(self.shape[2:])
        size = tuple(math.ceil(n / step) for n in self.shape[2:])
        return size, Grid((0.5,) * axes, (step,) * axes, (-0.5,) * axes)


def transform(one: Tensor, activation: Activation, full: bool = True) -> Prologue:
    """A transform with this activation, whose tables are all `one`; with all else if `full`."""
    affine = (one, one) if full else (None, None)
    return Prologue(*affine, activation, one if activation.name == "prelu" else None, *affine)
