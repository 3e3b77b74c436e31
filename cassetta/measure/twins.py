"""The same network as plain `torch.nn` modules, as one would write it without this package.

The twin holds the very parameters and buffers of the network, so that gradients meet in one place,
and nothing of its code: no checks, no pending transforms, no choice of a backend.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cassetta.backbones import UNet
from cassetta.layers import BatchNorm, Conv, ConvBlock, DownConv, DownPool, InstanceNorm, UpConv
from cassetta.layers.dropout import ChannelDropout
from cassetta.layers.norm import LayerNorm
from cassetta.layers.simple import Chain, DoNothing, ModuleGroup, ModuleSum

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


def plain(module: nn.Module) -> nn.Module:
    """The twin of a network, of a level or of a block, in the same mode.

    Raises
    ------
    TypeError
        If the module holds something that has no twin here.
    """
    return _plain(module).train(module.training)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, UNet) and module.skip is True:
        return _UNet(module)
    if isinstance(module, (UpConv, DownConv)):
        return module.conv
    if isinstance(module, DownPool):
        return nn.Sequential(*(one for one in module.children() if type(one) is not DoNothing))
    if isinstance(module, ConvBlock):
        block: Any = module
        return nn.Sequential(*(_layer(layer, block.ndim) for layer in block.in_order()))
    parts = module.children()
    if isinstance(module, ModuleSum):
        return _Sum(map(plain, parts))
    if isinstance(module, ModuleGroup) and module.residual and not module.skip:
        return nn.Sequential(*(_Residual(plain(part)) for part in parts))
    if isinstance(module, Chain) and not getattr(module, "residual", False):
        return nn.Sequential(*map(plain, parts))
    raise TypeError(f"module={type(module).__name__} has no plain twin: add it to measure/twins.py")


def _layer(layer: Any, ndim: int) -> nn.Module:
    """The layer of torch that computes the same."""
    if isinstance(layer, Conv) and layer.padding_mode == "zeros":
        padding = [before for before, after in layer.geometry.padding if before == after]
        twin = _CONV[ndim](
            layer.inp_channels, layer.out_channels, layer.kernel_size, layer.stride,
            tuple(padding), layer.dilation, layer.groups, layer.bias is not None, device="meta",
        )  # fmt: skip
    elif isinstance(layer, (BatchNorm, InstanceNorm)):
        kinds = _BATCH if isinstance(layer, BatchNorm) else _INSTANCE
        twin = kinds[ndim](
            layer.num_features, layer.eps, layer.momentum, layer.affine,
            layer.track_running_stats, device="meta",
        )  # fmt: skip
    elif isinstance(layer, LayerNorm):
        twin = nn.GroupNorm(
            layer.num_groups, layer.num_channels, layer.eps, layer.affine, device="meta"
        )
    elif isinstance(layer, ChannelDropout):
        return _DROPOUT[ndim](layer.p)
    elif type(layer).__module__.startswith("torch.nn."):
        return layer
    else:
        raise TypeError(f"layer={layer} has no plain twin: add it to measure/twins.py")
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(twin, name, parameter)
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    return twin


class _Sum(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        first, *others = self
        total = first(x)
        for module in others:
            total = total + module(x)
        return total


class _Residual(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + x


class _UNet(nn.Module):
    """Skip connections are concatenated; sizes must be divisible by two at every level."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(plain, net.encoder))
        self.ways = nn.ModuleList(plain(level[0]) for level in net.decoder)
        self.blocks = nn.ModuleList(plain(level[1]) for level in net.decoder)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        for way, block in zip(self.ways, self.blocks, strict=True):
            x = block(torch.cat([way(x), skips.pop()], 1))
        return x
