"""Max pooling of a `Deferred`: the norm and activation before it are applied while it reads.

What is pending need not be computed on the fine image, nor is that kept: for backward, a byte per
window says where the maximum was.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cassetta.functional.deferred import Deferred
from cassetta.functional.nodes import first_order
from cassetta.kernels import ops
from cassetta.kernels.types import flat
from cassetta.recording import recordings
from cassetta.recording.programs import applied


def max_pool(x: Deferred, window: tuple[int, ...]) -> Tensor:
    """The maximum of what x stands for over windows that do not overlap: (B, C, *(size // window)).

    Voxels that a size leaves over at the end are dropped, as `torch.nn.MaxPool3d(window)` does.
    """
    image = x.settled().read()
    return applied(_MaxPool, image.alone(), *flat(image.prologue), window)


class _MaxPool(Function):
    """The maximum over windows of z, being built of x while it is read; keeps where it was."""

    @staticmethod
    def forward(ctx: Any, held: Any, x: Tensor, *rest: Any) -> Tensor:
        *prologue, window = rest
        y, where = recordings.transform(held, "max_pool", x, prologue, (), window)
        ctx.save_for_backward(where)
        ctx.window, ctx.size, ctx.nb_others = window, tuple(x.shape[2:]), len(rest)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:
        window, size = ctx.window, ctx.size
        again = lambda g, where: (ops.max_pool_dgrad(g, where, window, size),)  # noqa: E731
        key = "max_pool_dgrad", window, size
        (dz,) = recordings.run(key, again, (g, *ctx.saved_tensors))
        return None, dz, *[None] * ctx.nb_others
