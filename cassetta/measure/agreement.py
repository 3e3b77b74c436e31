"""Whether an engine computes, on a given image, what plain PyTorch computes.

The rule: for the output and every gradient,

    err(engine) <= 2 err(plain PyTorch in the same precision) + slack

both against plain PyTorch in a higher precision. The largest error counts, on the scale of the
largest value, so that a single wrong voxel is seen. A gradient that is zero by theory (that of a
bias before a norm) is judged on the scale of the others.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cassetta.kernels import dispatch

SLACK = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
"""On the scale of the largest value. Four roundings to half precision; in float32 a hundred, for
the sums of a convolution in another order."""

EXACT = 2**24
"""Images of up to so many elements are judged by float64, larger ones by float32: it is no more
exact than the sums that it judges, but those of a large image are not judged in its last digits."""


class Step(NamedTuple):
    """What came of a network: names of what is returned, and the tensors."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


def step(net: nn.Module, image: Tensor, training: bool, engine: str | None = None) -> Step:
    """The output, and in training the gradients of the image and of the parameters.

    The gradient of the output is drawn; that of the image is asked for. Nothing is accumulated.
    """
    with dispatch.use_engine(engine) if engine else contextlib.nullcontext():
        torch.manual_seed(0)  # the same channels are dropped
        if not training:
            with torch.no_grad():
                return Step(("output",), (net(image),))
        image = image.detach().requires_grad_()
        output = net(image)
        torch.manual_seed(1)
        cotangent = torch.randn(output.shape, dtype=torch.float32, device=output.device)
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(
            output, [image, *named.values()], cotangent.to(output.dtype), allow_unused=True
        )
        found = {"output": output.detach(), "gradient of the image": grads[0]}
        found |= {f"gradient of {n}": g for n, g in zip(named, grads[1:], strict=True)}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        return Step(tuple(kept), tuple(kept.values()))


def disagreement(net: nn.Module, image: Tensor, training: bool, engine: str) -> str | None:
    """Why the engine is not to be trusted with this network and image; None if it is.

    The network is copied; it, and the random state, stay as they are.

    Parameters
    ----------
    net : Module
        The network, on the device of the image.
    image : (N, C, *X) tensor
        What it is called with.
    training : bool
        Compare gradients too.
    engine : str
        The engine that is judged; the judge is "reference".
    """
    higher = torch.float64 if image.numel() <= EXACT else torch.float32
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            ours = step(copy.deepcopy(net), image, training, engine)
        except Exception as error:  # whatever is wrong with it
            return f"it fails ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        same = step(copy.deepcopy(net), image, training, "reference")
        with _exactly(image.device.type):
            precise = copy.deepcopy(net).to(higher)
            truth = step(precise, image.to(higher), training, "reference")
    return judge(ours, same, truth)


def judge(ours: Step, same: Step, truth: Step) -> str | None:
    """Why `ours` is not as good as `same`, by the rule above; None if it is."""
    if ours.names != truth.names:
        missing = set(truth.names) ^ set(ours.names)
        return f"there is no {' and no '.join(sorted(missing))} on one side"
    gradients = [t for n, t in zip(*truth, strict=True) if n != "output"]
    largest = max((_largest(t) for t in gradients), default=0.0)
    rows = zip(truth.names, ours.tensors, same.tensors, truth.tensors, strict=True)
    for name, one, other, expected in rows:
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"its {name} is {_kind(one)}, and should be {_kind(other)}"
        off, usual = _apart(one, expected), _apart(other, expected)
        scale = max(_largest(expected), 1e-3 * largest if name != "output" else 0.0)
        allowed = 2 * usual + SLACK[one.dtype] * scale
        if not off <= allowed:  # nor is NaN
            return f"its {name} is off by {off:.2g} of {scale:.2g}, where {allowed:.2g} is allowed"
    return None


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in slices along the first spatial axis: no copy of the whole."""
    axis = 2 if one.ndim > 2 else 0
    pieces = max(1, one.numel() // 2**27)
    pairs = zip(one.chunk(pieces, axis), other.chunk(pieces, axis), strict=True)
    worst = [(a.to(b.dtype) - b).abs().max() for a, b in pairs if a.numel()]
    return torch.stack(worst).max().item() if worst else 0.0


def _largest(one: Tensor) -> float:
    return torch.linalg.vector_norm(one, float("inf")).item() if one.numel() else 0.0


def _kind(one: Tensor) -> str:
    return f"{tuple(one.shape)} in {str(one.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def _exactly(device: str) -> Iterator[None]:
    """Without autocast and without shortened products."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
