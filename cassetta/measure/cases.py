"""Named cases from real work, the most decisive first: for benchmarks, tuning and tests."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import nn

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.layers import Conv, ConvBlock, ConvGroup, DownConv, DownPool, UpConvGroup
from cassetta.layers.levels import DownGroup
from cassetta.layers.simple import Chain, ModuleGroup
from cassetta.models import SegNet


class Case(NamedTuple):
    """A module, and the image it works on."""

    name: str
    group: str  # one of `GROUPS`
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # (N, C, *X)
    small: tuple[int, ...]  # a shape of the same case that a CPU can bear
    about: str
    inner: bool = True  # whether the image left a layer, so that its gradient is asked for

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.shape) - 2

    def image_dtype(self, rounded: torch.dtype) -> torch.dtype:
        """That of the image under autocast to `rounded`; an image from a file is in float32."""
        return rounded if self.inner else torch.float32


GROUPS = ("network", "block", "pass")

_NNUNET = (32, 64, 128, 256, 320, 320)


def find(name: str) -> Case:
    """The case of this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name not in _CASES:
        near = difflib.get_close_matches(name, _CASES, n=1) or NAMES[:1]
        raise ValueError(
            f"name={name!r} is no case: {near[0]!r} is one, and `cassetta bench --list` has all"
        )
    return _CASES[name]


def select(words: Sequence[str]) -> list[Case]:
    """The cases that are named, or belong to a group that is, the most decisive first.

    Raises
    ------
    ValueError
        If a word is neither a name nor a group.
    """
    chosen = [word if word in GROUPS else find(word).name for word in words]
    return [case for case in _CASES.values() if case.name in chosen or case.group in chosen]


def _all() -> Iterator[Case]:
    decisive = ("meshnet", "unet3d-instance")
    networks = {case.name: case for case in _networks()}
    blocks = list(_blocks())
    yield from (networks.pop(name) for name in decisive)
    yield from blocks
    yield from (_pass(channels) for channels in (32, 21))
    yield from networks.values()


def _networks() -> Iterator[Case]:
    """Backbones take features; whole networks, `inner=False`, take an image of one channel."""
    chain, tiny = (1, 21, 256, 256, 256), (1, 21, 12, 12, 12)
    text = "upstream's default MeshNet: 12 convolutions of 21 channels, dilations 1 to 32"
    yield Case("meshnet", "network", partial(MeshNet, 3), chain, tiny, text)
    for norm in ("instance", "batch", None):
        make = partial(UNet, 3, 32, norm=norm)
        text = f"3-D U-Net, 32 to 512 channels, {norm or 'no'} norm"
        shapes = (2, 32, 128, 128, 128), (1, 32, 32, 16, 16)
        yield Case(f"unet3d-{norm or 'plain'}", "network", make, *shapes, text)
    for name, text in _PUBLISHED.items():
        make = partial(SegNet.preset, name, activation=None)
        shapes = (1, 1, 256, 256, 256), (1, 1, 12, 12, 12)
        yield Case(name, "network", make, *shapes, text, inner=False)
    patches = (2, 1, 128, 128, 128), (1, 1, 64, 32, 32)
    text = "nnU-Net's PlainConvUNet, 6 stages, instance norm: the same network"
    yield Case("nnunet-plain", "network", _strided_unet, *patches, text, inner=False)
    text = "nnU-Net's ResEnc M, nearly: 2x2x2 convolutions lead down, blocks activate, then add"
    yield Case("nnunet-resenc", "network", _resenc, *patches, text, inner=False)
    text = "MONAI's DynUNet, nnU-Net's layout without biases before norms: the same network"
    make = partial(_strided_unet, bias=False)
    yield Case("monai-dynunet", "network", make, *patches, text, inner=False)
    text = "MONAI's BasicUNet with its default features: the same but for the order of skips"
    shapes = (4, 1, 96, 96, 96), (1, 1, 32, 16, 16)
    yield Case("monai-basicunet", "network", _pooled_unet, *shapes, text, inner=False)
    shapes = (8, 64, 512, 512), (1, 64, 32, 32)
    text = "2-D U-Net, 64 to 1024 channels, batch norm"
    yield Case("unet2d", "network", partial(UNet, 2, 64, norm="batch"), *shapes, text)
    shapes = (64, 32, 16384), (2, 32, 64)
    text = "1-D U-Net, 32 to 512 channels, batch norm"
    yield Case("unet1d", "network", partial(UNet, 1, 32, norm="batch"), *shapes, text)
    shapes = (1, 21, 128, 128, 128), (1, 21, 8, 8, 8)
    text = "upstream's default ATrousNet: 9 stages of up to 5 branches"
    yield Case("atrousnet", "network", partial(ATrousNet, 3), *shapes, text)


_PUBLISHED = {
    "fedorov": "MeshNet of Fedorov et al.: 7 x 21 channels, dropout",
    "model5_gw_ae": "Brainchop's MeshNet of 5,598 parameters: 9 x 5 channels, no norm",
    "mindgrab": "MindGrab: 25 x 15 channels, norm per channel, GELU",
    "meshnet26": "MeshNet-26 for stroke lesions: 9 x 26 channels",
    "model30chan18cls": "Brainchop's MeshNet of 30 channels: 9 x 30, ELU, no norm",
}


def _blocks() -> Iterator[Case]:
    """One convolution, instance norm and ReLU: 256³ voxels up to 32 channels, 128³ above."""
    for dilation, channels in product((1, 2, 4, 8, 16, 32), (32, 21, 16, 64, 128, 5, 30, 256)):
        edge = 256 if channels <= 32 else 128
        yield Case(
            f"block-{channels}-d{dilation}",
            "block",
            partial(
                ConvBlock, 3, channels, channels, dilation=dilation, norm="instance",
                order="cndax",
            ),
            (1, channels, edge, edge, edge),
            (1, channels, *[edge // 16] * 3),
            f"convolution of {channels} channels, dilation {dilation}, instance norm, ReLU",
        )  # fmt: skip


def _pass(channels: int) -> Case:
    """The module is not what runs: it is what its passes amount to, forward and backward."""
    make = partial(ConvBlock, 3, channels, channels, kernel_size=1, norm="instance", order="cndax")
    shapes = (1, channels, 256, 256, 256), (1, channels, 8, 8, 8)
    return Case(f"passes-{channels}", "pass", make, *shapes, f"each pass over {channels} channels")


def _strided_unet(bias: bool = True) -> nn.Module:
    """nnU-Net's layout: the first convolution of a stage has the stride, and changes channels."""
    options: dict[str, Any] = {
        "norm": "instance", "activation": "LeakyReLU", "order": "cndax", "bias": bias
    }  # fmt: skip
    first = ModuleGroup([ConvBlock(3, 1, 32, **options), ConvBlock(3, 32, 32, **options)])
    stages: list[nn.Module] = [first]
    for fine, coarse in pairwise(_NNUNET):
        down = ConvBlock(3, fine, coarse, **options)
        down.conv = Conv(3, fine, coarse, 3, stride=2, padding=1, bias=bias)
        stages.append(ModuleGroup([down, ConvBlock(3, coarse, coarse, **options)]))
    ups = [
        UpConvGroup(3, coarse, fine, skip=fine, mode="conv", nb_conv=2, **options)
        for fine, coarse in pairwise(_NNUNET)
    ]
    return _segmenting(stages, ups[::-1])


def _pooled_unet() -> nn.Module:
    """MONAI's layout: max pooling, then a convolution that changes channels."""
    features = (32, 32, 64, 128, 256)
    options: dict[str, Any] = {
        "norm": "instance", "activation": nn.LeakyReLU(0.1), "order": "cndax"
    }  # fmt: skip
    stages: list[nn.Module] = []
    for fine, coarse in pairwise((1, *features)):
        block = ModuleGroup([
            ConvBlock(3, fine, coarse, **options), ConvBlock(3, coarse, coarse, **options)
        ])  # fmt: skip
        stages.append(DownGroup(DownPool(3, fine), block) if stages else block)
    ups = [
        UpConvGroup(3, coarse, fine, skip=fine, mode="conv", nb_conv=2, **options)
        for fine, coarse in pairwise(features)
    ]
    return _segmenting(stages, ups[::-1])


def _resenc() -> nn.Module:
    """nnU-Net's ResEnc M, as near as residual groups come to it."""
    options: dict[str, Any] = {"norm": "instance", "activation": "LeakyReLU", "order": "cndax"}
    stages: list[nn.Module] = []
    for level, (channels, nb_blocks) in enumerate(zip(_NNUNET, (1, 3, 4, 6, 6, 6), strict=True)):
        pairs = [ConvGroup(3, channels, nb_conv=2, **options) for _ in range(nb_blocks)]
        blocks = ModuleGroup(pairs, residual=True)
        if level:
            stages.append(DownGroup(DownConv(3, _NNUNET[level - 1], channels), blocks))
        else:
            stages.append(Chain(ConvBlock(3, 1, channels, **options), blocks))
    ups = [
        UpConvGroup(3, coarse, fine, skip=fine, mode="conv", **options)
        for fine, coarse in pairwise(_NNUNET)
    ]
    return _segmenting(stages, ups[::-1])


def _segmenting(stages: Sequence[nn.Module], ups: Sequence[nn.Module]) -> nn.Module:
    """A U-Net of these levels, from finest to coarsest and back, and a convolution to 2 classes."""
    net = UNet(3, 1, nb_levels=len(stages))
    for n, stage in enumerate(stages):
        net.encoder[n] = stage
    for n, up in enumerate(ups):
        net.decoder[n] = up
    return Chain(net, ConvBlock(3, net.out_channels, 2, kernel_size=1, activation=None))


_CASES = {case.name: case for case in _all()}
NAMES = tuple(_CASES)
"""The names of all cases, the most decisive first."""
