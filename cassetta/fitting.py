"""The largest batch or volume that fits into a given memory."""

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import nn

from cassetta.core import check
from cassetta.rehearsal import Rehearsal

_MOST = 2**50
"""No memory has so many bytes; sizes beyond would overflow what torch counts with."""


def largest(
    model: nn.Module,
    shape: Sequence[int],
    memory: float,
    vary: str = "batch",
    step: int = 16,
    fused: bool = True,
    inference: bool = False,
    autocast: torch.dtype | None = None,
) -> tuple[int, ...]:
    """The largest shape of an image whose training fits into so much memory.

    Every answer is a prediction for exactly this shape, as `summary` makes it, and the next larger
    one was seen not to fit. What `summary` does not count needs room too.

    ```python
    cassetta.largest(net, (1, 1, 128, 128, 128), 24 * 2**30)               # how many of them
    cassetta.largest(net, (2, 1, 128, 128, 128), 24 * 2**30, vary="size")  # how large a cube
    ```

    Parameters
    ----------
    model : Module
        The network, in training mode if it is to be trained.
    shape : (batch, channels, *size)
        An image that the network takes.
    memory : int
        Number of bytes.
    vary : {"batch", "size"}
        What may change: the batch, or the size, which then becomes a cube.
    step : int
        The edge of the cube is a multiple of it.
    fused : bool
        With blocks fused, or in plain PyTorch.
    inference : bool
        Evaluation without gradients, rather than a training step: forward, backward, and what Adam
        holds.
    autocast : {None, torch.bfloat16, torch.float16}
        In mixed precision of this dtype.

    Returns
    -------
    shape : (batch, channels, *size)

    Raises
    ------
    ValueError
        If not even the smallest fits, the network refuses `shape`, or an argument is not as above.
    """
    batch, channels, *size = check.several("shape", shape)
    if not size:
        raise ValueError(f"shape={tuple(shape)} has no size: give (batch, channels, *size)")
    step = check.whole("step", step)
    check.one_of("vary", vary, ["batch", "size"])
    if isinstance(memory, bool) or not isinstance(memory, Real):
        raise TypeError(f"memory={memory!r} ({type(memory).__name__}) is not a number of bytes")
    if not 0 < memory < _MOST:
        raise ValueError(f"memory={memory} must be a number of bytes above 0 and below 2**50")
    rehearsal = Rehearsal(model, autocast)
    peak = rehearsal.inference_peak if inference else rehearsal.training_peak
    always = 0 if inference else rehearsal.optimizer_bytes

    def nth(n: int) -> tuple[int, ...]:
        if vary == "batch":
            return (n, channels, *size)
        return (batch, channels, *[n * step] * len(size))

    def need(n: int) -> int:
        return peak(nth(n), fused=fused) + always

    peak((batch, channels, *size), fused=fused)  # which raises if the network refuses it
    first, least = _first(need, batch if vary == "batch" else -(-max(size) // step))
    if least > memory:
        raise ValueError(
            f"memory={memory} is too small: {nth(first)} already needs {least} bytes "
            f"({least / 2**30:.3g} GiB): use a smaller network, or more memory"
        )
    return nth(_last(lambda n: need(n) <= memory, first))


def _first(need: Callable[[int], int], given: int) -> tuple[int, int]:
    """The smallest n that the network does not refuse, as it does not `given`; and its need."""
    for n in range(1, given):
        try:
            return n, need(n)
        except (ValueError, RuntimeError):  # too few voxels for its levels, or for its norm
            continue
    return given, need(given)


def _last(fits: Callable[[int], bool], n: int) -> int:
    """The largest number that fits, n being one: by doubling, and then halving the interval."""
    beyond = 2 * n
    while fits(beyond):
        n, beyond = beyond, 2 * beyond
    while beyond - n > 1:
        middle = (n + beyond) // 2
        n, beyond = (middle, beyond) if fits(middle) else (n, middle)
    return n
