"""Who runs a case: our engines, and their rivals, like with like.

In the mode "eager", our network under each engine meets plain PyTorch (`twins`) and other packages
where these have the same network; in the modes "compiled" and "max-autotune" (`torch.compile`, the
latter with CUDA graphs), our network compiled meets its plain twin compiled.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cassetta.kernels import dispatch
from cassetta.measure import roofs, twins
from cassetta.measure.cases import Case

MODES = ("eager", "compiled", "max-autotune")
LAYOUTS = ("first", "last")  # of the channels
_COMPILE = {"compiled": "default", "max-autotune": "max-autotune"}


class Rival(NamedTuple):
    """Somebody who runs a case."""

    engine: str
    layout: str
    role: str  # "ours", "peer"; or "roof", which computes something else
    backend: str  # that our modules are to ask for
    build: Callable[[nn.Module], nn.Module]  # from a copy of our network
    forced: str | None = None  # the engine of every block that it can run

    @property
    def label(self) -> str:
        """How it is called in words."""
        return f"{self.engine}, channels {self.layout}"

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """What runs in this block of code is run as this rival would."""
        forced = dispatch.use_engine(self.forced) if self.forced else contextlib.nullcontext()
        with dispatch.use_backend(self.backend), forced:
            yield


def rivals(case: Case, device: torch.device, mode: str, layouts: Sequence[str]) -> list[Rival]:
    """Who runs this case in this mode; a 1-D image has its channels first."""
    layouts = [layout for layout in layouts if layout == "first" or case.ndim > 1]
    return [one for layout in layouts for one in _rivals(case, device, mode, layout)]


def _rivals(case: Case, device: torch.device, mode: str, layout: str) -> Iterator[Rival]:
    if mode != "eager":

        def compiled(net: nn.Module) -> Any:
            return torch.compile(net, mode=_COMPILE[mode], dynamic=False)

        yield Rival(f"auto {mode}", layout, "ours", "auto", compiled)
        yield Rival(mode, layout, "peer", "reference", lambda net: compiled(twins.plain(net)))
        return
    yield from _engines(layout, device.type == "cuda")
    yield Rival("eager", layout, "peer", "reference", twins.plain)
    for engine, build in _OTHERS.get(case.name, {}).items():
        yield Rival(engine, layout, "peer", "reference", _same_work(build, case, layout))


def _engines(layout: str, on_gpu: bool) -> Iterator[Rival]:
    """Our network by the engine that is chosen for each block, and by each one that there is."""
    if on_gpu:
        yield Rival("auto", layout, "ours", "auto", as_it_is)
        for engine in dispatch.ENGINES:
            yield Rival(engine, layout, "ours", "triton", as_it_is, engine)
    yield Rival("reference", layout, "ours", "reference", as_it_is)


def as_it_is(net: nn.Module) -> nn.Module:
    """The network itself."""
    return net


def mode_of(engine: str) -> str:
    """The mode that an engine belongs to, by its name."""
    return next((mode for mode in MODES if engine.endswith(mode) and mode != "eager"), "eager")


def in_layout(net: Any, layout: str, ndim: int) -> Any:
    """The network with its weights in this layout, as torch advises for its convolutions."""
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    return net.to(memory_format=formats[ndim]) if layout == "last" and ndim in formats else net


def _same_work(
    build: Callable[[], nn.Module], case: Case, layout: str
) -> Callable[[nn.Module], nn.Module]:
    """Another package's network, refused unless it does the operations that ours does."""

    def checked(net: nn.Module) -> nn.Module:
        other = build()
        one, two = (roofs.flops(n, case.small, "step", case.inner) for n in (net, other))
        if one != two:
            raise ValueError(f"not the same network: {two:,} operations, not {one:,}")
        return in_layout(other.to(next(net.parameters()).device), layout, case.ndim)

    return checked


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"skipped: {error} (pip install {package})") from error


_FILTERS = [32, 64, 128, 256, 320, 320]
_STRIDES = [1, 2, 2, 2, 2, 2]


def _plain_conv_unet() -> nn.Module:
    name = "dynamic_network_architectures.architectures.unet"
    return _imported(name, "dynamic-network-architectures").PlainConvUNet(
        1, 6, _FILTERS, nn.Conv3d, 3, _STRIDES, 2, 2, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def _dynunet() -> nn.Module:
    return _imported("monai.networks.nets", "monai").DynUNet(
        3, 1, 2, kernel_size=[3] * 6, strides=_STRIDES, upsample_kernel_size=[2] * 5,
        filters=_FILTERS, norm_name=("INSTANCE", {"affine": True}), trans_bias=True,
    )  # fmt: skip


def _basic_unet() -> nn.Module:
    return _imported("monai.networks.nets", "monai").BasicUNet(3, 1, 2)


_OTHERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "nnunet-plain": {"nnunet": _plain_conv_unet},
    "monai-dynunet": {"monai": _dynunet},
    "monai-basicunet": {"monai": _basic_unet},
}
