"""Attention: squeeze & excitation, convolutional block attention, attention between voxels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import ActivationType, AttentionType, DataType, DeviceType, OneOrSeveral
from cassetta.core.utils import build, to_torch_dtype
from cassetta.layers.activations import make_activation
from cassetta.layers.conv import Conv
from cassetta.layers.linear import Linear
from cassetta.layers.simple import DoNothing, GlobalPool, listed


def make_attention(
    attention: AttentionType, channels: int, ndim: int | None = None, **kwargs: Any
) -> nn.Module | None:
    """Make an attention layer, which preserves the shape of an image.

    Parameters
    ----------
    attention : str, bool, Module, type, callable or None
        - `"sqzex"` (or True): squeeze & excitation, `SqzEx`;
        - `"cbam"`: convolutional block attention, `BlockAttention`;
        - `"dp"`, `"sdp"`: dot-product attention between all voxels, plain or scaled,
          `DotProductAttention` with its own projections;
        - `"mha"`: the same with several heads, `MultiHeadAttention`;
        - a module, returned as it is, so that several layers share it;
        - a `Module` class, or a function that returns a module, called with `kwargs` and, where
          it takes them, `channels` (or `inp_channels`), `ndim` and `compression`;
        - None (or False): no attention.
    channels : int
        Number of channels.
    ndim : int
        Number of spatial dimensions; only `"cbam"` needs to know.
    **kwargs
        Options of the constructor.

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, or what is made is not a module.
    """
    if attention is None or attention is False or attention == "":
        return None
    if attention is True:
        attention = "sqzex"
    if isinstance(attention, str):
        if attention.lower() in ("dp", "sdp"):
            kwargs.setdefault("scaled", attention.lower() == "sdp")
        attention = check.named("attention", attention, _BY_NAME)
    offered: dict[str, Any] = {"channels": channels, "inp_channels": channels, "ndim": ndim}
    if "compression" in kwargs:
        offered["compression"] = kwargs.pop("compression")
    return build("attention", attention, "a name", offered=offered, **kwargs)


class ChannelSqzEx(nn.Sequential):
    """Squeeze space, excite channels: each channel is scaled by what its mean says.

    Hu et al., "Squeeze-and-Excitation Networks" (2018) [arXiv:1709.01507].
    """

    def __init__(
        self,
        channels: int,
        compression: int = 16,
        activation: ActivationType = "ReLU",
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        channels : int
            Number of channels.
        compression : int
            Number of channels per channel of the bottleneck.
        activation : ActivationType
            Activation of the bottleneck.
        """
        middle = _bottleneck(channels, compression)
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": to_torch_dtype(dtype)}
        super().__init__(
            GlobalPool(reduction="mean", keepdim=True),
            Linear(channels, middle, **options),
            make_activation(activation) or DoNothing(),
            Linear(middle, channels, **options),
            nn.Sigmoid(),
        )

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        return inp * super().forward(inp)


class SpatialSqzEx(nn.Sequential):
    """Squeeze channels, excite space: each voxel is scaled by what its channels say.

    Roy et al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional
    Networks" (2018) [arXiv:1803.02579].
    """

    def __init__(
        self, channels: int, device: DeviceType | None = None, dtype: DataType | None = None
    ) -> None:
        dtype = to_torch_dtype(dtype)
        super().__init__(Linear(channels, 1, bias=False, device=device, dtype=dtype), nn.Sigmoid())

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        return inp * super().forward(inp)


class _Modes(nn.Sequential):
    """A channel attention c and a spatial attention s: one, both in turn, or both side by side."""

    mode: str

    def __init__(self, mode: str, c: Callable[[], nn.Module], s: Callable[[], nn.Module]) -> None:
        mode = check.one_of("mode", str(mode).lower(), ["c", "s", "cs", "sc", "+"])
        makers = {"s": s, "c": c}
        letters = "sc" if mode == "+" else mode
        made = {n: makers[n]() for n in "sc" if n in letters}  # the weights are drawn in this order
        super().__init__(*(made[n] for n in letters))
        self.mode = mode

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        check.any_image(inp)
        if self.mode != "+":
            return super().forward(inp)
        one, other = listed(self)
        return one(inp) + other(inp)


class SqzEx(_Modes):
    """Squeeze & excitation of channels and space.

    Hu et al., "Squeeze-and-Excitation Networks" (2018) [arXiv:1709.01507];
    Roy et al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional
    Networks" (2018) [arXiv:1803.02579].
    """

    def __init__(
        self,
        channels: int,
        mode: str = "+",
        compression: int = 16,
        activation: ActivationType = "ReLU",
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        channels, compression, activation
            As in `ChannelSqzEx`.
        mode : {"+", "c", "s", "cs", "sc"}
            Channel and spatial excitation summed; one of them; or one after the other.
        """
        super().__init__(
            mode,
            lambda: ChannelSqzEx(channels, compression, activation, device, dtype),
            lambda: SpatialSqzEx(channels, device, dtype),
        )


class ChannelBlockAttention(nn.Sequential):
    """Each channel is scaled by what its mean and its maximum say, through one bottleneck.

    Woo et al., "CBAM: Convolutional Block Attention Module" (2018) [arXiv:1807.06521].
    """

    def __init__(
        self,
        channels: int,
        compression: int = 16,
        activation: ActivationType = "ReLU",
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """Parameters as in `ChannelSqzEx`."""
        middle = _bottleneck(channels, compression)
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": to_torch_dtype(dtype)}
        super().__init__(
            GlobalPool(reduction="mean", keepdim=True),
            GlobalPool(reduction="max", keepdim=True),
            Linear(channels, middle, **options),
            make_activation(activation) or DoNothing(),
            Linear(middle, channels, **options),
            nn.Sigmoid(),
        )

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        mean, maximum, squeeze, activation, excite, sigmoid = listed(self)
        votes = [excite(activation(squeeze(pool(inp)))) for pool in (mean, maximum)]
        return inp * sigmoid(votes[0] + votes[1])


class SpatialBlockAttention(nn.Sequential):
    """Each voxel is scaled by what the mean and maximum over channels say in its neighbourhood.

    Woo et al., "CBAM: Convolutional Block Attention Module" (2018) [arXiv:1807.06521].
    """

    def __init__(
        self,
        ndim: int,
        kernel_size: OneOrSeveral[int] = 7,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        kernel_size : [list of] int
            Size of the neighbourhood.
        """
        super().__init__(
            GlobalPool(reduction="mean", keepdim=True, dim=1),
            GlobalPool(reduction="max", keepdim=True, dim=1),
            Conv(
                ndim, 2, 1, kernel_size=kernel_size, padding="same", bias=False,
                device=device, dtype=dtype,
            ),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        mean, maximum, conv, sigmoid = listed(self)
        return inp * sigmoid(conv(torch.cat([mean(inp), maximum(inp)], dim=1)))


class BlockAttention(_Modes):
    """Convolutional block attention of channels and space.

    Woo et al., "CBAM: Convolutional Block Attention Module" (2018) [arXiv:1807.06521].
    """

    def __init__(
        self,
        ndim: int,
        channels: int,
        mode: str = "cs",
        compression: int = 16,
        activation: ActivationType = "ReLU",
        kernel_size: OneOrSeveral[int] = 7,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        ndim, kernel_size
            As in `SpatialBlockAttention`.
        channels, compression, activation
            As in `ChannelSqzEx`.
        mode : {"cs", "sc", "c", "s", "+"}
            Channel and spatial attention one after the other; one of them; or their sum.
        """
        super().__init__(
            mode,
            lambda: ChannelBlockAttention(channels, compression, activation, device, dtype),
            lambda: SpatialBlockAttention(ndim, kernel_size, device, dtype),
        )


class DotProductAttention(nn.Module):
    """Every voxel gathers values from all voxels, weighted by softmax(query . key).

    Vaswani et al., "Attention Is All You Need" (2017) [arXiv:1706.03762];
    Wang et al., "Non-local Neural Networks" (2018) [arXiv:1711.07971].

    Without `channels`, the layer has no weights, and its input holds the queries (K channels), the
    keys (K) and the values (V). With `channels`, it computes them from an image of that many
    channels, and projects the result back: the shape is preserved. (Upstream's layer of this name
    never ran, and its documented input of K + K V + V channels attended within a voxel.)

    Time grows with the square of the number of voxels: place it at a coarse level.
    """

    def __init__(
        self,
        key_channels: int | None = None,
        val_channels: int | None = None,
        scaled: bool = True,
        channels: int | None = None,
        nb_heads: int = 1,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        key_channels : int, default=`channels` / `nb_heads`, at least 1
            Number of channels of each query and key, K.
        val_channels : int, default=`key_channels`
            Number of channels of each value, V.
        scaled : bool
            Divide the products by the square root of K.
        channels : int, optional
            Number of channels of the image.
        nb_heads : int
            Number of sets of queries, keys and values, that are concatenated in this order.
        """
        super().__init__()
        self.nb_heads = check.whole("nb_heads", nb_heads)
        if key_channels is None:
            if channels is None:
                raise ValueError("key_channels=None needs to know the channels of the image")
            key_channels = max(1, check.whole("channels", channels) // self.nb_heads)
        self.key_channels = check.whole("key_channels", key_channels)
        val_channels = self.key_channels if val_channels is None else val_channels
        self.val_channels = check.whole("val_channels", val_channels)
        self.scaled = scaled
        self.stacked_channels = self.nb_heads * (2 * self.key_channels + self.val_channels)
        self.project = self.combine = None
        if channels is not None:
            options: dict[str, Any] = {"device": device, "dtype": dtype}
            self.project = Linear(channels, self.stacked_channels, bias=False, **options)
            self.combine = Linear(self.nb_heads * self.val_channels, channels, **options)

    def forward(self, inp: Tensor) -> Tensor:
        """(B, heads (2K + V), *size) -> (B, heads V, *size); with `channels`, shape preserved"""
        ndim = check.any_image(inp)
        qkv = self.project(inp) if self.project else inp
        check.image(qkv, ndim, self.stacked_channels)
        out = functional.dot_product_attention(
            qkv, self.key_channels, self.val_channels, self.nb_heads, self.scaled
        )
        return self.combine(out) if self.combine else out


class MultiHeadAttention(DotProductAttention):
    """`DotProductAttention` with several heads and its own projections.

    Vaswani et al., "Attention Is All You Need" (2017) [arXiv:1706.03762].
    """

    def __init__(
        self,
        inp_channels: int,
        key_channels: int | None = None,
        val_channels: int | None = None,
        nb_heads: int = 4,
        scaled: bool = True,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        inp_channels : int
            Number of channels of the image.
        key_channels : int, default=`inp_channels` / `nb_heads`, at least 1
            Number of channels of each query and key.
        val_channels : int, default=`key_channels`
            Number of channels of each value.
        nb_heads : int
            Number of heads.
        scaled : bool
            Divide the products by the square root of `key_channels`.
        """
        super().__init__(key_channels, val_channels, scaled, inp_channels, nb_heads, device, dtype)


def _bottleneck(channels: int, compression: int) -> int:
    channels = check.whole("channels", channels)
    return max(1, channels // check.whole("compression", compression))


_BY_NAME: dict[str, type[nn.Module]] = {
    "sqzex": SqzEx,
    "cbam": BlockAttention,
    "bcam": BlockAttention,  # as upstream's documentation of ConvBlock spells it
    "dp": DotProductAttention,
    "sdp": DotProductAttention,
    "mha": MultiHeadAttention,
}
