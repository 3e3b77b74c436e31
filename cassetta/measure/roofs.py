"""What a machine could do at best, measured on the spot, and what a case must do at least.

The floor of a network is the sum over its blocks of the longer of two times: that of its
multiplications at the rate of a large matrix product, and that of its bytes at the rate of a copy.
Fewest bytes: forward, a block's output is written once and read once; backward, the image and the
gradient that arrives are read, and the one that leaves is written.
"""

import copy
import functools
import math
from typing import NamedTuple

import torch
from torch import nn

from cassetta.costs import Row, summary
from cassetta.kernels import precision
from cassetta.measure.timing import interleaved

_TOUCHED = {"inference": 2, "forward+backward": 5, "step": 5}  # images that a block moves
_REPEATED = {"inference": 1, "forward+backward": 3, "step": 3}  # convolutions of the same size


class Roofs(NamedTuple):
    """The two ceilings of a machine."""

    bandwidth: float  # bytes per second, read and written
    rate: float  # operations per second


@functools.cache
def roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """Copy bandwidth, and the rate of a matrix product in this dtype, measured once per process.

    The fastest fifth of the rounds counts: a ceiling is what the machine can do undisturbed.

    In float32 the product may round as torch lets convolutions round (TF32).
    """
    big = device.type == "cuda"
    n, edge = (2**28, 8192) if big else (2**24, 2048)
    source = [torch.randn(n, device=device) for _ in range(3)]
    target = torch.empty_like(source[0])
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    runs = {"copy": lambda k: target.copy_(source[k % 3]), "product": lambda k: a @ b}
    with precision.use(precision.of_convolutions()):
        found = interleaved(runs, device)
    seconds = {name: timing.p20 / 1000 for name, timing in found.items()}
    return Roofs(2 * target.nbytes / seconds["copy"], 2 * edge**3 / seconds["product"])


def flops(net: nn.Module, shape: tuple[int, ...], what: str, inner: bool = True) -> int:
    """Operations of a network, as torch counts them; a multiplication and an addition are two.

    Parameters
    ----------
    net : Module
        The network, whose twin on the device "meta" is asked.
    shape : tuple of int
        Of its image.
    what : {"inference", "forward+backward", "step"}
        What is counted; no optimizer is.
    inner : bool
        Whether the gradient of the image is asked for.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    twin = copy.deepcopy(net).to("meta")
    image = torch.empty(shape, device="meta", requires_grad=inner)
    with FlopCounterMode(display=False) as counter:
        out = twin(image)
        if what != "inference":
            out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def floor(
    net: nn.Module, shape: tuple[int, ...], what: str, dtype: torch.dtype, best: Roofs
) -> float:
    """Milliseconds below which no run of this network can come, but by skipping work."""
    total = 0.0
    for row in summary(net, shape):
        computing = _REPEATED[what] * row.flops / best.rate
        total += max(computing, _moved(row, what, dtype) / best.bandwidth)
    return 1000 * total


def moved(net: nn.Module, shape: tuple[int, ...], what: str, dtype: torch.dtype) -> int:
    """The fewest bytes that a run of this network reads and writes, block by block."""
    return sum(_moved(row, what, dtype) for row in summary(net, shape))


def _moved(row: Row, what: str, dtype: torch.dtype) -> int:
    return _TOUCHED[what] * math.prod(row.shape) * dtype.itemsize if row.shape else 0
