"""Whether an engine computes, on a given image, what plain PyTorch computes.

The rule: for the output and every gradient,

    err(engine) <= 2 err(plain PyTorch in the same precision) + slack

both against plain PyTorch in a higher precision, and relative to the largest value: the largest
error counts, so that a single wrong voxel is seen. Gradients of parameters are judged together, on
one scale: of five numbers PyTorch's own error says little, and of one that is zero by theory (that
of a bias before a norm) nothing but rounding is left.

In a deep network the largest error is chance: a value that rounds to the other side of 0, before
a ReLU, changes the gradient of its voxel altogether. There the Euclidean norm of the error counts,
and all gradients are one vector; in float32, where so few values do so that plain PyTorch's own
error may have none, gradients of networks that have such kinks have a slack for some (`FLIPS`).

Where a sample has 2^31 elements or more, plain PyTorch itself convolves in slabs
(`kernels.reference`), because cuDNN is no truth there; and what is compared is so everywhere.
"""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cassetta.kernels import dispatch, layout, ops, precision
from cassetta.kernels.examples import Sample, transform
from cassetta.kernels.plans import Product
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue

SLACK = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
"""On the scale of the largest value. Four roundings to half precision; in float32 a hundred, for
the sums of a convolution in another order."""

SHORT = SLACK[torch.float16]
"""Of float32 whose products are in TF32, whose factors have the digits of float16. cuDNN is free to
take whole ones, and does so, so that what plain PyTorch is off by says nothing there."""

FLIPS = 1.6e-2
"""Of all gradients of a deep network: n of N values before a ReLU on the other side of 0 are
sqrt(n / N); plain PyTorch in float32 has been seen to be off by up to 5.6e-3 on tests' networks
(6 of 8 draws of an ATrousNet, 2 of 8 of a U-Net), for 1.5e-6 without any."""

EXACT = 2**24
"""Images of up to so many elements are judged by float64, larger ones by float32: it is no more
exact than the sums that it judges, but those of a large image are not judged in its last digits."""

SLAB = 2**27
"""Elements that are compared at a time, along the first spatial axis."""

IMAGE = "gradient of the image"


Images = Tensor | Sequence[Tensor]
"""What a network is called with: one, or several."""


class Step(NamedTuple):
    """What came of a network: names of what is returned, and the tensors."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


def step(net: nn.Module, images: Images, training: bool, engine: str | None = None) -> Step:
    """The output, and in training the gradients of the images and of the parameters.

    The gradient of the output is drawn; that of an image is asked for. Nothing is accumulated.
    Under autocast weights are rounded anew, as in each step of a training: torch keeps what it has
    rounded until autocast is left, torch 2.8 also when that was without gradients.
    """
    torch.clear_autocast_cache()
    with dispatch.use_engine(engine) if engine else contextlib.nullcontext():
        torch.manual_seed(0)  # the same channels are dropped
        if not training:
            with torch.no_grad():
                return Step(("output",), (net(*_several(images)),))
        images = [image.detach().requires_grad_() for image in _several(images)]
        output = net(*images)
        torch.manual_seed(1)
        cotangent = torch.randn(output.shape, dtype=torch.float32, device=output.device)
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(
            output, [*images, *named.values()], cotangent.to(output.dtype), allow_unused=True
        )
        names = [IMAGE, *[f"{IMAGE} beside it"] * (len(images) - 1)]
        names += [f"gradient of {name}" for name in named]
        found = {"output": output.detach(), **dict(zip(names, grads, strict=True))}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        return Step(tuple(kept), tuple(kept.values()))


def _several(images: Images) -> Sequence[Tensor]:
    return (images,) if isinstance(images, Tensor) else images


def disagreement(
    net: nn.Module, images: Images, training: bool, engine: str, deep: bool = False
) -> str | None:
    """Why the engine is not to be trusted with this network and image; None if it is.

    The network is copied; it, and the random state, stay as they are.

    Parameters
    ----------
    net : Module
        The network, on the device of the image.
    images : [list of] (N, C, *X) tensor
        What it is called with.
    training : bool
        Compare gradients too.
    engine : str
        The engine that is judged; the judge is "reference".
    deep : bool
        Whether it is a deep network, and not a block.
    """
    # float64 draws other channels to drop than the other types do, on a GPU
    images = _several(images)
    dtype = torch.float32 if training and _drops(net) else higher(images[0])
    device = images[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        ours = attempt(lambda: step(copy.deepcopy(net), images, training, engine))
        if isinstance(ours, str):
            return ours
        same = step(copy.deepcopy(net), images, training, "reference")
        with _exactly(device.type):
            precise = copy.deepcopy(net).to(dtype)
            exact = [image.to(dtype) for image in images]
            truth = step(precise, exact, training, "reference")
    return judge(ours, same, truth, deep, kinked=has_kinks(net))


def has_kinks(net: nn.Module) -> bool:
    """Tell whether a slope in the network jumps, so that rounding may change it altogether."""
    return any(isinstance(module, _KINKED) for module in net.modules())


_KINKED = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip


def attempt(run: Callable[[], Any]) -> Any | str:
    """What comes of a run, or how it fails, as a sentence; want of memory is not its fault."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is wrong with it
        return f"it fails ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"


def _drops(net: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) and module.training for module in net.modules())


def higher(image: Tensor) -> torch.dtype:
    """The precision that judges what is computed of this image."""
    return torch.float64 if image.numel() <= EXACT else torch.float32


class Work:
    """What the passes work on: an image, and what the record of each pass makes of such images."""

    def __init__(self, x: Tensor, draw: Callable[[str], list[Any]]) -> None:
        self.x = x
        self.arguments = functools.cache(draw)  # by the name of a pass, for each of its examples

    @classmethod
    def drawn(cls, images: Sequence[Tensor], activation: Activation) -> "Work":
        """Of these images in turn, which are of one kind; of others, and tables, that are drawn."""
        x, turns = images[0], itertools.cycle(images)

        def image(shape: tuple[int, ...]) -> Tensor:
            if shape == tuple(x.shape):
                return next(turns)
            out = torch.randn(shape, device=x.device).to(x.dtype)
            return out.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else out

        def table(*shape: int) -> Tensor:
            return torch.rand(shape, device=x.device) + 0.5

        def pending(channels: int) -> Prologue:
            return transform(table(x.shape[0], channels), activation)

        is_last = x.stride(1) == 1  # of the two ways that a pass may go, each in one layout
        sample = Sample(tuple(x.shape), image, table, pending, True, is_last, x.shape[1])
        return cls(x, lambda name: [*ops.PASSES[name].examples(sample)])

    def to(self, dtype: torch.dtype) -> "Work":
        """All of it in another precision."""
        return Work(
            self.x.to(dtype), lambda name: [cast(one, dtype) for one in self.arguments(name)]
        )

    @property
    def slack(self) -> float:
        """Of what passes make of it: none multiplies by matrices."""
        return SLACK[self.x.dtype]

    def step(self, passes: Any, name: str) -> Step:
        """What a pass makes of it, and what it changes."""
        found: list[Tensor] = []
        changes = [*map(ops.PASSES[name].names().index, ops.PASSES[name].changes)]
        for given in self.arguments(name):
            arguments = [x.clone() if n in changes else x for n, x in enumerate(given)]
            out = getattr(passes, name)(*arguments)
            kept = [arguments[n].reshape(-1) for n in changes]
            found += [one if one.is_floating_point() else one.to(self.x.dtype) for one in kept]
            if name == "max_pool":
                out = out[0]  # rounding decides where it is
            elif name == "prologue_sums" and arguments[2].slope is None:
                out = out[:2]  # the third is for a slope
            found += [out] if isinstance(out, Tensor) else out
        return Step(tuple(f"result {n}" for n in range(len(found))), tuple(found))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a pass in another precision."""
    if isinstance(value, tuple):
        parts = [cast(one, dtype) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return dtype if isinstance(value, torch.dtype) else value


class ProductWork(NamedTuple):
    """What a pass of a convolution works on."""

    x: Tensor
    g: Tensor
    w: Tensor
    b: Tensor
    table: Tensor
    geometry: Geometry

    @classmethod
    def drawn(cls, product: Product, device: torch.device) -> "ProductWork":
        """Drawn for a convolution."""
        n, c, *size = product.shape
        k, taps, dtype = product.channels, product.taps, product.dtype
        out = product.geometry.size_of(size, taps)
        x, g = (layout.empty(s, dtype, device).normal_() for s in ((n, c, *size), (n, k, *out)))
        w = torch.randn(k, c, *taps, device=device) * (c * math.prod(taps)) ** -0.5
        b, table = torch.randn(k, device=device), torch.rand(n, c, device=device) + 0.5
        return cls(x, g, w.to(dtype), b.to(dtype), table, product.geometry)

    def to(self, dtype: torch.dtype) -> "ProductWork":
        """All of it in another precision."""
        x, g, w, b, table = (t.to(dtype) for t in self[:5])
        return ProductWork(x, g, w, b, table, self.geometry)

    @property
    def slack(self) -> float:
        """Of what products make of it."""
        return slack_of(self.x)

    def step(self, passes: Any, name: str) -> Step:
        """What a pass makes of it: as most blocks ask for it, or by another of its names in
        `PRODUCTS`, with what else may be fused with it, or without.
        """
        x, g, w, b, one, geometry = self
        silu, relu = Activation("silu"), Activation("relu")
        p, after = Prologue(one, one, silu, None, one, one), Prologue(activation=silu)
        taps, size = tuple(w.shape[2:]), tuple(x.shape[2:])
        found = {
            "conv_fprop": lambda: passes.conv_fprop(x, NOTHING, w, b, geometry, moments_of=relu),
            "conv_fprop, fused": lambda: passes.conv_fprop(
                x, p, w, b, geometry, epilogue=after, residual=g
            )[:1],
            "conv_fprop, of two images": lambda: passes.conv_fprop(
                x, NOTHING, torch.cat((w, w), 1), b, geometry, -x
            )[:1],
            "conv_dgrad": lambda: passes.conv_dgrad(g, w, geometry, size, x, p, one),
            "conv_dgrad, alone": lambda: passes.conv_dgrad(g, w, geometry, size)[:1],
            "conv_transposed": lambda: (passes.conv_transposed(g, NOTHING, w, None, geometry),),
            "conv_wgrad": lambda: (passes.conv_wgrad(g, x, NOTHING, taps, geometry),),
            "conv_wgrad, fused": lambda: (passes.conv_wgrad(g, x, p, taps, geometry),),
        }[name]()
        return Step(tuple(f"result {n}" for n in range(len(found))), tuple(found))


PLANNED = tuple(name for name, record in ops.PASSES.items() if record.planned)
"""Passes over an image that the tuner may plan."""

PASSES = tuple(name for name, record in ops.PASSES.items() if record.of != "products")
"""Those that `Work.step` computes."""

PRODUCTS = {
    "conv_fprop": ("conv_fprop", "conv_fprop, fused", "conv_fprop, of two images"),
    "conv_dgrad": ("conv_dgrad", "conv_dgrad, alone"),
    "conv_wgrad": ("conv_wgrad", "conv_wgrad, fused"),
}
"""What `ProductWork.step` computes by a plan of each."""


def judge(
    ours: Step, same: Step, truth: Step, deep: bool = False, slack: float | None = None,
    kinked: bool = False,
) -> str | None:  # fmt: skip
    """Why `ours` is not as good as `same`, by the rule above; None if it is.

    `slack` is that of a network, or of a product, in the dtype of `ours`, if nothing else is said;
    `kinked` tells of a network that `has_kinks`.
    """
    if ours.names != truth.names:
        missing = set(truth.names) ^ set(ours.names)
        return f"there is no {' and no '.join(sorted(missing))} on one side"
    for name, one, other in zip(ours.names, ours.tensors, same.tensors, strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"its {name} is {_kind(one)}, and should be {_kind(other)}"
    if slack is None:  # under autocast gradients of parameters are in float32
        slack = slack_of(ours.tensors[0])
    errors = _summed if deep else _each
    for name, (off, usual) in errors(ours, same, truth).items():
        is_chance = deep and kinked and name != "output" and slack >= SLACK[torch.float32]
        flips = FLIPS if is_chance else 0.0
        allowed = 2 * usual + max(slack, flips)
        if not off <= allowed:  # nor is NaN
            return f"its {name} is off by {off:.2g} of its size, where {allowed:.2g} is allowed"
    return None


def slack_of(result: Tensor) -> float:
    """Return the slack of what convolutions make, in the dtype and on the device of a result."""
    is_short = result.is_cuda and result.dtype == torch.float32
    return SHORT if is_short and precision.of_convolutions() == "tf32" else SLACK[result.dtype]


def _each(ours: Step, same: Step, truth: Step) -> dict[str, tuple[float, float]]:
    """Relative errors of both, tensor by tensor, by the largest; of parameters, on one scale."""
    shared = [_of_parameter(name) for name in truth.names]
    sizes = [_largest(t) for t in truth.tensors]
    offs, usual = (_apart(one, truth, _largest) for one in (ours, same))
    size, error = (
        max((x for x, many in zip(values, shared, strict=True) if many), default=0.0)
        for values in (sizes, usual)
    )
    found = {}
    for name, many, *own, off in zip(truth.names, shared, sizes, usual, offs, strict=True):
        scale, known = (size, error) if many else own
        found[name] = off / (scale or 1.0), known / (scale or 1.0)
    return found


def _summed(ours: Step, same: Step, truth: Step) -> dict[str, tuple[float, float]]:
    """Relative errors of both, of the output and of all gradients, by their lengths."""
    sizes = [_length(t) for t in truth.tensors]
    offs, usual = (_apart(one, truth, _length) for one in (ours, same))
    rows = {"output": slice(0, 1), "gradient": slice(1, None)}
    return {
        name: (math.hypot(*offs[k]) / scale, math.hypot(*usual[k]) / scale)
        for name, k in rows.items()
        if (scale := math.hypot(*sizes[k]))
    }


def _apart(one: Step, truth: Step, size: Callable[[Tensor], float]) -> list[float]:
    """How far each tensor is from the truth, in slabs: no copy of the whole."""
    found = []
    for tensor, expected in zip(one.tensors, truth.tensors, strict=True):
        axis, pieces = (2 if tensor.ndim > 2 else 0), max(1, -(-tensor.numel() // SLAB))
        pairs = zip(tensor.chunk(pieces, axis), expected.chunk(pieces, axis), strict=True)
        parts = [size(a.to(b.dtype) - b) for a, b in pairs]
        found.append(size(torch.tensor(parts, dtype=torch.float64)))
    return found


def _of_parameter(name: str) -> bool:
    return name.startswith("gradient of ") and not name.startswith(IMAGE)


def _largest(one: Tensor) -> float:
    return torch.linalg.vector_norm(one, float("inf")).item() if one.numel() else 0.0


def _length(one: Tensor) -> float:
    return torch.linalg.vector_norm(one, dtype=torch.float64).item()


def _kind(one: Tensor) -> str:
    return f"{tuple(one.shape)} in {str(one.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def _exactly(device: str) -> Iterator[None]:
    """Without autocast and without shortened products."""
    with precision.use("ieee"), torch.autocast(device, enabled=False):
        yield
