"""Boxes of an image, which GPUs of compute capability 9.0 copy as a whole (TMA).

A tile of a convolution is then a box of voxels, not voxels that follow one another: what it reads
for a tap is a box too, however large the dilation. The copy fills with zeros what lies outside the
image or beyond its channels, so nobody asks where an operand ends; and one thread starts it, where
a gather takes an address and a mask per voxel.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from cassetta.kernels import layout, machine

Box = tuple[int, int, int]
NO_BOX: Box = (0, 0, 0)
LONGEST = 256
"""Voxels along a side of a box that is copied at once."""


def are_copied(device: torch.device) -> bool:
    """Whether what runs there copies boxes: newer GPUs, and what stands for one in tests."""
    return device.type != "cuda" or are_copied_by(machine.capability(device))


def are_copied_by(capability: tuple[int, int]) -> bool:
    """Tell whether boxes are used on GPUs of this compute capability.

    Of 9.x. For 10.x, triton before 3.6 reads wrong boxes of images that are not dense
    (triton#10442), and triton 3.6 transposes weights in TF32 into a single buffer, while a product
    may still read it. GPUs of 12.0 multiply from registers, as 8.0 does, and there kernels with
    boxes spill.
    """
    return capability[0] == 9


@functools.lru_cache(4096)
def fitting(voxels: int, size: tuple[int, int, int]) -> Box:
    """The box of `voxels`, a power of two, of which the fewest cover an image of this size.

    Of several, the one nearest to a cube, whose surroundings are the smallest.
    """
    sides = [1 << power for power in range(min(voxels, LONGEST).bit_length())]
    found = [box for box in itertools.product(sides, repeat=3) if math.prod(box) == voxels]
    return min(found, key=lambda box: (covering(box, size), sum(box), box))


def covering(box: Box, size: tuple[int, int, int]) -> int:
    """How many boxes cover an image of this size."""
    return math.prod(-(-n // side) for n, side in zip(size, box, strict=True))


def strides(x: Tensor) -> tuple[int, ...] | None:
    """Those of samples, three axes, and channels, as a copy of boxes takes them; or None.

    Of an image in words. Each is a multiple of the next, as CUDA's driver wants it of a tensor map,
    and neither 0, as where a gradient of a sum was expanded, nor 2^40 bytes.
    """
    n, c, *size = x.shape
    steps = layout.strides(x)
    if steps is None or not x.numel() or x.data_ptr() % 16:
        return None
    voxel = steps[2] if math.prod(size) > 1 else layout.padded(c)
    *_, a, b = (1, 1, *size)
    sample = steps[0] if n > 1 else voxel * math.prod(size)
    if sample <= 0 or sample % (voxel * a * b) or sample * x.itemsize >= 2**40:
        return None
    return sample, voxel * a * b, voxel * b, voxel, 1
