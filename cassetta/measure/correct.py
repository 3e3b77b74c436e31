"""Whether a rival of ours computes the right thing, on the very input it is timed on.

By the rule of `agreement`, for the output and for the gradients of the image and all parameters,
against plain PyTorch in float32.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cassetta.kernels import precision
from cassetta.measure import agreement
from cassetta.measure.agreement import Step


class Expected(NamedTuple):
    """What plain PyTorch computes."""

    truth: list[Tensor]  # in float32
    same: list[Tensor]  # in the dtype and the layout that are timed
    slack: float | None = None  # as `agreement.judge` takes it; None of a network
    kinked: bool = False  # that its network `has_kinks`


def results(
    module: nn.Module, parameters: Sequence[Tensor], image: Tensor, seed: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The output; and with the gradient of it, `seed`, those of image and parameters.

    Without dropout, whose draws depend on the dtype.
    """
    for parameter in parameters:
        parameter.grad = None
    image = image.detach().requires_grad_(seed is not None and image.requires_grad)
    with (
        _undropped(module),
        rounding(image.device, dtype),
        torch.set_grad_enabled(seed is not None),
    ):
        out = module(image)
    found = [out.detach().clone()]
    if seed is not None:
        out.backward(seed.to(out.dtype))
        gradients = [p.grad for p in (image, *parameters) if p.requires_grad]
        found += [torch.zeros(1) if g is None else g.detach().clone() for g in gradients]
        for parameter in parameters:
            parameter.grad = None
    return found


def truth(
    plain: nn.Module, parameters: Sequence[Tensor], image: Tensor, seed: Tensor | None
) -> list[Tensor]:
    """`results` of plain PyTorch in float32, without TF32."""
    image = image.detach().float().requires_grad_(image.requires_grad)
    with precision.use("ieee"), searching(False):  # what is computed once
        return results(plain, parameters, image, seed, torch.float32)


@contextlib.contextmanager
def searching(tries: bool) -> Iterator[None]:
    """Let cuDNN try all its algorithms for each convolution, or take one by rule, in a block."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, tries
    try:
        yield
    finally:
        cudnn.benchmark = before


def agrees(ours: Sequence[Tensor], known: Expected) -> str | None:
    """Why these results are not as good as those of plain PyTorch, as a sentence; None if they are.

    Parameters
    ----------
    ours : list of tensor
        Output and gradients, in the order of `results`.
    known : Expected
        What plain PyTorch computes.
    """
    names = ("output", *(f"gradient {n}" for n in range(1, len(ours))))
    steps = (Step(names, tuple(one)) for one in (ours, known.same, known.truth))
    return agreement.judge(*steps, deep=True, slack=known.slack, kinked=known.kinked)


@contextlib.contextmanager
def rounding(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to this dtype, or nothing at all in float32."""
    if dtype is torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield


@contextlib.contextmanager
def _undropped(module: nn.Module) -> Iterator[None]:
    dropouts = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training]
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train()
