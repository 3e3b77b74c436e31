"""Every kernel against plain PyTorch, on the machine at hand, by the rule of `agreement`.

By every plan that a launch may take: they are different kernels, and what one computes says nothing
of another. A kernel is also run again, and must give the same bits: no pass has atomics, so that
what changes from run to run is a race.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.explanation import explain
from cassetta.kernels import activations, configs, dispatch, plans, precision, reference
from cassetta.kernels.types import Activation, Geometry
from cassetta.layers import ConvBlock, ConvGroup
from cassetta.measure import agreement

SHAPES = ((2, 21, 9, 10, 11), (2, 8, 33, 40), (1, 5, 3000), (3, 64, 8, 8, 8))
_SAME = Geometry((1,) * 3, ((1, 1),) * 3, (1,) * 3)
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], Geometry]] = {
    "wide": ((1, 128, 12, 11, 10), 128, (3, 3, 3), _SAME),  # tiles are as large as they become
    "dilated": ((2, 21, 9, 10, 11), 21, (3, 3, 3), Geometry((1,) * 3, ((2, 2),) * 3, (2,) * 3)),
    "even": ((2, 8, 33, 40), 40, (2, 4), Geometry((1, 1), ((0, 1), (1, 2)), (1, 1))),
    "strided": ((1, 64, 8, 9, 8), 128, (2,) * 3, Geometry((2,) * 3, ((0, 0),) * 3, (1,) * 3)),
    "one tap": ((1, 5, 3000), 30, (1,), Geometry((1,), ((0, 0),), (1,))),
}
DECISIVE = ("wide", "dilated")
"""Those that `cassetta check` begins with."""

ALIKE = ("even",)
"""Those whose kernels are those of others: computed by the first plan and the first boxes. The rest
are other kernels: they scatter, or apply what is pending as they read."""

REPEATED = 3
"""How often a kernel is run again on a GPU; it takes microseconds, once it is compiled."""

TRANSPOSED = ("conv_transposed",)
"""Computed by the plans of conv_dgrad, where it strides."""

PARTS = ("first plans", "networks", "other plans", "other cases")
"""Of all comparisons, the most decisive first."""

_CONSTANTS = {"leaky_relu": (0.1, 0.0), "elu": (1.3, 0.0), "softplus": (2.0, 5.0)}


class Comparison(NamedTuple):
    """A pass by a plan, or a network, that is to be compared."""

    part: str  # one of `PARTS`
    what: str
    plan: str  # "" of a network, and of passes that have no plans
    case: str
    run: Callable[[], str | None]  # says what is wrong; None if nothing is


def comparisons(device: torch.device) -> list[Comparison]:
    """List all comparisons, the most decisive first; nothing is computed yet.

    Dtypes are float32 (full and TF32), float16 and bfloat16. The interpreter leaves out bfloat16,
    which it computes wrongly, and boxes and the widest convolution, which take it long.
    """
    found = [*_of_passes(device), *_of_products(device), *_of_networks(device)]
    return sorted(found, key=lambda one: PARTS.index(one.part))  # of equals, the order stays


def _dtypes() -> tuple[torch.dtype, ...]:
    return configs.dtypes()[: 2 if dispatch.is_interpreted() else 3]


def _of_passes(device: torch.device) -> Iterator[Comparison]:
    """Each by every plan, in every dtype and layout; and with every activation."""
    for plan, dtype, last in itertools.product(plans.PLANS, _dtypes(), (True, False)):
        is_first = plan == plans.PLANS[0]
        judged = _Judged(_drawn("silu", dtype, SHAPES[0], last, device))
        case = f"{_case(dtype, SHAPES[0], last)}, silu"
        for name in agreement.PASSES if is_first else agreement.PLANNED:
            yield judged.by(plan, PARTS[0] if is_first else PARTS[2], name, case)
    for n, (activation, dtype) in enumerate(itertools.product(activations.NAMES, _dtypes())):
        shape, last = SHAPES[n % len(SHAPES)], n % 3 == 0
        plan = plans.PLANS[n // len(SHAPES) % len(plans.PLANS)]
        judged = _Judged(_drawn(activation, dtype, shape, last, device))
        for name in agreement.PASSES:
            yield judged.by(plan, PARTS[3], name, f"{_case(dtype, shape, last)}, {activation}")


def _of_products(device: torch.device) -> Iterator[Comparison]:
    """Those of most convolutions by every plan, with what may be fused and without."""
    kept = {k: v for k, v in CONVOLUTIONS.items() if k != "wide" or not dispatch.is_interpreted()}
    exactly = [(dtype, "tf32") for dtype in _dtypes()]
    exactly += [(dtype, "ieee") for dtype in _dtypes() if dtype == torch.float32]
    for (kind, sizes), (dtype, exact) in itertools.product(kept.items(), exactly):
        shown = f"{kind}{', in full' * (exact == 'ieee')}: "
        for pass_, names in agreement.PRODUCTS.items():
            product = plans.Product(pass_, *sizes, dtype)
            drawn = functools.partial(agreement.ProductWork.drawn, product, device)
            judged = _Judged(drawn, exact)
            with precision.use(exact):
                tried = plans.candidates(product, device)
            if dispatch.is_interpreted():
                tried = [plan for plan in tried if not plan.boxes]
            if kind in ALIKE:
                tried = [*tried[:1], *[plan for plan in tried if plan.boxes][:1]]
            strided = kind == "strided" and pass_ == "conv_dgrad"
            for plan, name in itertools.product(tried, (*names, *TRANSPOSED[:strided])):
                part = PARTS[0] if plan == tried[0] else PARTS[2]
                part = part if kind in DECISIVE else PARTS[3]
                yield judged.by(plan, part, name, shown + product.key)


def _of_networks(device: torch.device) -> Iterator[Comparison]:
    """Small ones, forward and backward, by each engine; float32 in full."""
    deep = _networks()
    nets = {**_blocks(), **deep}
    all_of_it = itertools.product(nets.items(), _dtypes(), dispatch.ENGINES)
    for (name, (net, shape)), dtype, engine in all_of_it:
        run = functools.partial(_wrong, net, shape, dtype, device, name in deep, engine)
        yield Comparison(PARTS[1], name, "", f"{_case(dtype, shape, False)}, {engine}", run)


class _Judged:
    """Inputs of a pass, and its results by plain PyTorch; both are computed when first used."""

    def __init__(self, draw: Callable[[], Any], exact: str = "tf32") -> None:
        self.work = functools.cache(draw)
        self.truth = functools.cache(self._truth)
        self.exact = exact

    def by(self, plan: Any, part: str, name: str, case: str) -> Comparison:
        """Make the comparison of the pass `name` by `plan`, or without a plan if it has none."""
        chosen = () if name in agreement.PASSES and name not in agreement.PLANNED else (plan,)
        run = functools.partial(self._wrong, name, chosen)
        return Comparison(part, name, str(plan) if chosen else "", case, run)

    def _truth(self, name: str) -> tuple[agreement.Step, agreement.Step]:
        """Compute the pass by the reference, in the same precision and in float64."""
        work = self.work()
        return work.step(reference, name), work.to(torch.float64).step(reference, name)

    def _wrong(self, name: str, chosen: tuple[Any, ...]) -> str | None:
        with precision.use(self.exact), plans.use_plan(*chosen):
            work = self.work()
            passes = dispatch.passes(work.x)
            ours = agreement.attempt(lambda: work.step(passes, name))
            if isinstance(ours, str):
                return ours
            same, truth = self.truth(name)
            why = agreement.judge(ours, same, truth, slack=work.slack)
            for _ in range(0 if why or dispatch.is_interpreted() else REPEATED):
                if _differ(ours, work.step(passes, name)):
                    return "it gives other bits when it is run again: its threads race"
            return why


def _differ(one: agreement.Step, other: agreement.Step) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return not all(torch.equal(a, b) for a, b in pairs)


def _drawn(
    activation: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool, device: torch.device
) -> Callable[[], agreement.Work]:
    """Return a function that draws three images, for passes with this activation."""

    def draw() -> agreement.Work:
        images = [_image(shape, dtype, last, device) for _ in range(3)]
        constants = _CONSTANTS.get(activation, (0.0, 0.0))
        return agreement.Work.drawn(images, Activation(activation, *constants))

    return draw


def _wrong(
    net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, deep: bool,
    engine: str,
) -> str | None:  # fmt: skip
    net, image = net.to(device), torch.randn(shape, device=device)
    exact, mixed = precision.use("ieee"), dtype != torch.float32
    with exact, torch.autocast(device.type, dtype, enabled=mixed):
        with dispatch.use_engine(engine):
            rows = agreement.attempt(lambda: explain(net, image))
        if isinstance(rows, str):
            return rows
        if other := [row for row in rows if row.engine != engine]:
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
