"""Every kernel against plain PyTorch, on the machine at hand, by the rule of `agreement`."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.explanation import explain
from cassetta.kernels import activations, configs, dispatch, plans, reference
from cassetta.kernels.types import Activation, Geometry
from cassetta.layers import ConvBlock, ConvGroup
from cassetta.layers.blocks import ENGINES
from cassetta.measure import agreement

SHAPES = ((2, 21, 9, 10, 11), (2, 8, 33, 40), (1, 5, 3000), (3, 64, 8, 8, 8))
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], Geometry]] = {
    "dilated": ((2, 21, 9, 10, 11), 21, (3, 3, 3), Geometry((1,) * 3, ((2, 2),) * 3, (2,) * 3)),
    "even": ((2, 8, 33, 40), 40, (2, 4), Geometry((1, 1), ((0, 1), (1, 2)), (1, 1))),
    "strided": ((1, 64, 8, 9, 8), 128, (2,) * 3, Geometry((2,) * 3, ((0, 0),) * 3, (1,) * 3)),
    "one tap": ((1, 5, 3000), 30, (1,), Geometry((1,), ((0, 0),), (1,))),
}
_CONSTANTS = {"leaky_relu": (0.1, 0.0), "elu": (1.3, 0.0), "softplus": (2.0, 5.0)}


class Checked(NamedTuple):
    """One comparison."""

    what: str
    case: str
    why: str | None  # what is wrong; None if nothing is


def check(device: torch.device) -> Iterator[Checked]:
    """Compare all passes, and small networks forward and backward, with plain PyTorch.

    In float32, float16 and bfloat16; in the interpreter without bfloat16, which it gets wrong, and
    without boxes, which it takes long for. The random state is set.
    """
    torch.manual_seed(0)
    dtypes = configs.dtypes()[: 2 if dispatch.is_interpreted() else 3]
    for n, (name, dtype) in enumerate(itertools.product(activations.NAMES, dtypes)):
        shape, last = SHAPES[n % len(SHAPES)], n % 3 == 0
        yield from _check_passes(name, dtype, shape, last, device)
    for (kind, sizes), dtype in itertools.product(CONVOLUTIONS.items(), dtypes):
        for pass_ in ("conv_fprop", "conv_dgrad", "conv_wgrad"):
            product = plans.Product(pass_, *sizes, dtype)
            work = agreement.ProductWork.drawn(product, device)
            tried = plans.candidates(product, device)
            boxed = [] if dispatch.is_interpreted() else [one for one in tried if one.boxes]
            for plan in (*tried[:1], *boxed[:1]):
                with plans.use_plan(plan):
                    why = _wrong_pass(work, pass_)
                yield Checked(pass_, f"{kind}: {product.key}, {plan}", why)
    nets = {**_blocks(), **_networks()}
    engines = [engine for engine in ENGINES if engine != "reference"]
    for (name, (net, shape)), dtype, engine in itertools.product(nets.items(), dtypes, engines):
        image = torch.randn(shape, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            why = _wrong(net.to(device), image, name in _networks(), engine)
            yield Checked(name, f"{_case(dtype, shape, False)}, {engine}", why)


def _check_passes(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool, device: torch.device
) -> Iterator[Checked]:
    """Every pass with this activation."""
    images = [_image(shape, dtype, last, device) for _ in range(3)]
    work = agreement.Work.drawn(images, Activation(name, *_CONSTANTS.get(name, (0.0, 0.0))))
    for one in agreement.PASSES:
        case = f"{_case(dtype, shape, last)}, {name}"
        yield Checked(one, case, _wrong_pass(work, one))


def _wrong_pass(work: agreement.Work | agreement.ProductWork, name: str) -> str | None:
    ours = agreement.attempt(lambda: work.step(dispatch.passes(work.x), name))
    if isinstance(ours, str):
        return ours
    truth = work.to(torch.float64).step(reference, name)
    return agreement.judge(ours, work.step(reference, name), truth)


def _wrong(net: nn.Module, image: Tensor, deep: bool, engine: str) -> str | None:
    with dispatch.use_engine(engine):
        other = [row for row in explain(net, image) if row.engine != engine]
    if other:
        row = other[0]
        kind = "plain PyTorch" if row.engine == "reference" else row.engine
        return f"{row.name} runs as {kind}: {row.reason or row.evidence}"
    return agreement.disagreement(net, image, True, engine, deep)


def _blocks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """One for each norm, on enough voxels that rounding evens out."""
    return {
        f"block, {norm or 'no'} norm": (
            ConvBlock(3, 6, 6, norm=norm, order="cndax", dropout=0.2), (2, 6, 17, 16, 15),
        )
        for norm in ("batch", "instance", "layer", 2, None)
    }  # fmt: skip


def _networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """One for each norm and backbone, on images that are no multiple of anything.

    Smooth ones: at the kink of a ReLU, or where two voxels are the largest, the rounding of one
    value decides over a whole path.
    """
    smooth: dict[str, Any] = {"activation": "SiLU"}
    strided: dict[str, Any] = {"activation": "SiLU", "pool_mode": "conv"}
    return {
        "MeshNet": (MeshNet(3, 5, nb_layers=3, dropout=0.2, **smooth), (2, 5, 9, 10, 11)),
        "U-Net, instance norm": (
            UNet(3, 4, nb_levels=3, norm="instance", **strided), (2, 4, 11, 9, 10),
        ),
        "U-Net, batch norm": (UNet(2, 8, nb_levels=3, norm="batch", **strided), (2, 8, 21, 18)),
        "U-Net, group norm, summed": (
            UNet(1, 8, nb_levels=2, norm=2, skip="+", residual=True, **strided), (2, 8, 50),
        ),
        "U-Net, no norm": (UNet(2, 8, nb_levels=2, **strided), (2, 8, 13, 18)),
        "ATrousNet": (ATrousNet(3, 4, nb_levels=3, **smooth), (1, 4, 8, 9, 10)),
        "norm first": (
            ConvGroup(3, 6, nb_conv=3, norm="layer", residual=True, **smooth), (2, 6, 7, 8, 9),
        ),
    }  # fmt: skip


def _image(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device
) -> Tensor:  # fmt: skip
    x = torch.randn(shape, device=device).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def _case(dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> str:
    layout = "last" if last else "first"
    return f"{'x'.join(map(str, shape))} {layout} {str(dtype).removeprefix('torch.')}"
