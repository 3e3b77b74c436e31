"""Convolutions whose number of spatial dimensions is an argument."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from bounds import to_enum
from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import BoundType, DataType, DeviceType, OneOrSeveral, SeparableType
from cassetta.kernels.plans import Product
from cassetta.kernels.types import Geometry
from cassetta.layers.convbase import ConvBase, PaddingType
from cassetta.layers.weighted import Lazy


def make_conv(
    ndim: int,
    inp_channels: int,
    out_channels: int | None = None,
    kernel_size: OneOrSeveral[int] = 3,
    stride: OneOrSeveral[int] = 1,
    padding: PaddingType = 0,
    dilation: OneOrSeveral[int] = 1,
    output_padding: OneOrSeveral[int] = 0,
    groups: int = 1,
    bias: bool = True,
    separable: SeparableType = False,
    transpose: bool = False,
    padding_mode: BoundType = "zeros",
    device: DeviceType | None = None,
    dtype: DataType | None = None,
) -> nn.Module:
    """Make a convolution layer.

    What is not listed is a parameter of `Conv`.

    Parameters
    ----------
    separable : bool or {"crosshair", "cross"}
        True makes a `SeparableConv`, "crosshair" (or "cross") a `CrossHairConv`; neither can be
        strided or transposed.
    transpose : bool
        Make a `ConvTransposed`; only it takes `output_padding`.

    Raises
    ------
    ValueError
        If a separable convolution is asked to be transposed or strided.
    """
    kind = check.one_of("separable", separable, [False, True, "crosshair", "cross"])
    common: dict[str, Any] = {
        "kernel_size": kernel_size, "padding": padding, "dilation": dilation, "groups": groups,
        "bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype,
    }  # fmt: skip
    if not kind:
        layer = ConvTransposed if transpose else Conv
        common.update(stride=stride, output_padding=output_padding)
        return layer(ndim, inp_channels, out_channels, **common)
    if transpose:
        raise ValueError(f"separable={separable!r} convolutions cannot be transposed")
    if any(s != 1 for s in check.several("stride", stride)):
        raise ValueError(f"separable={separable!r} convolutions cannot have stride={stride!r}")
    layer = SeparableConv if kind is True else CrossHairConv
    return layer(ndim, inp_channels, out_channels, **common)


class Conv(ConvBase):
    """Convolution in 1, 2 or 3 dimensions.

    Spatial dimensions come in the order of the tensor's, (B, C, W, H, D), in `kernel_size` and
    all its likes; the batch dimension is not optional.

    Parameters
    ----------
    ndim : {1, 2, 3}
        Number of spatial dimensions.
    inp_channels : int
        Number of input channels.
    out_channels : int, default=`inp_channels`
        Number of output channels.
    kernel_size, stride, dilation : [list of] int
        Size of the kernel, step between its positions, step between its elements.
    padding : {"same", "valid"} or [list of] int
        Voxels added at both ends of each axis. "same" keeps the size (an even kernel pads one
        more at the end), "valid" adds none.
    output_padding : [list of] int
        Only for `ConvTransposed`: voxels added at the end of the output.
    groups : int
        Number of groups of channels that do not see each other.
    bias : bool
        Add a learned bias.
    padding_mode : BoundType
        What the padding holds, in the names of torch-bounds: "zeros", "replicate", "mirror"
        (dct1; "reflect" in `torch.nn`), "reflect" (dct2; repeats the voxel at the edge),
        "antimirror" (dst1), "antireflect" (dst2), "circular" (dft).

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, or the groups do not divide the channels.
    """

    transposed = False

    def check_parameters(self) -> None:
        super().check_parameters()
        if any(self.output_padding):
            raise ValueError(
                f"output_padding={self.output_padding} only has a meaning in ConvTransposed"
            )

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.inp_channels // self.groups, *self.kernel_size

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *out_size)"""
        check.image(inp, self.ndim, self.inp_channels)
        geometry = self.geometry
        if self.padding != "same":
            self._check_size(inp, geometry)
        return functional.conv(inp, self.weight, self.bias, geometry, self.padding_mode)

    def product(self, shape: Sequence[int], dtype: torch.dtype) -> Product:
        """Return what our own engine computes of it: of an image of this shape, in this dtype."""
        return Product(
            "conv_fprop", tuple(shape), self.out_channels, self.kernel_size, self.geometry, dtype
        )

    def _check_size(self, inp: Tensor, geometry: Geometry) -> None:
        for axis, (before, after) in enumerate(geometry.padding):
            have = inp.shape[axis + 2] + before + after
            need = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            if have < need:
                raise ValueError(
                    f"inp has size {tuple(inp.shape[2:])}: with its padding, axis {axis} has "
                    f"{have} voxels, but the dilated kernel spans {need}"
                )


class ConvTransposed(ConvBase):
    """Transposed convolution: the adjoint of a `Conv` that has the same options.

    The parameters are those of `Conv`; `padding` crops the output, and only zeros surround the
    input (`padding_mode="zeros"`).
    """

    transposed = True

    def check_parameters(self) -> None:
        super().check_parameters()
        if to_enum(self.padding_mode) != to_enum("zeros"):
            raise ValueError(
                f"padding_mode={self.padding_mode!r} is impossible in ConvTransposed: use 'zeros'"
            )
        most = map(max, self.stride, self.dilation)
        if any(extra >= m for extra, m in zip(self.output_padding, most, strict=True)):
            raise ValueError(
                f"output_padding={self.output_padding} must be smaller than "
                f"stride={self.stride} or dilation={self.dilation}"
            )

    def _weight_shape(self) -> tuple[int, ...]:
        return self.inp_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(self, inp: Tensor, out_size: OneOrSeveral[int] | None = None) -> Tensor:
        """
        Parameters
        ----------
        inp : (B, inp_channels, *size) tensor
            Image.
        out_size : sequence of int, optional
            Spatial size of the output, where the stride leaves a choice. By default
            `output_padding` decides.

        Returns
        -------
        out : (B, out_channels, *out_size) tensor
        """
        check.image(inp, self.ndim, self.inp_channels)
        geometry, extra = self.geometry, self.output_padding
        least = self._least_size(inp, geometry)
        if out_size is not None:
            extra = self._missing(inp, out_size, least)
        if any(n + e < 1 for n, e in zip(least, extra, strict=True)):
            raise ValueError(f"padding={self.padding!r} crops all that {tuple(inp.shape)} becomes")
        return functional.conv_transposed(inp, self.weight, self.bias, geometry, extra)

    def _least_size(self, inp: Tensor, geometry: Geometry) -> list[int]:
        """The size of the output without output padding."""
        stride, padding, dilation, _ = geometry
        sizes = zip(inp.shape[2:], stride, padding, dilation, self.kernel_size, strict=True)
        return [(n - 1) * s - sum(p) + d * (k - 1) + 1 for n, s, p, d, k in sizes]

    def _missing(
        self, inp: Tensor, out_size: OneOrSeveral[int], least: list[int]
    ) -> tuple[int, ...]:
        """The output padding that leads to `out_size`."""
        last = check.several("out_size", out_size)[-self.ndim :]  # batch and channels may precede
        wanted = check.per_dimension("out_size", last, self.ndim)
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        if any(not a <= n <= b for a, n, b in zip(least, wanted, most, strict=True)):
            raise ValueError(
                f"out_size={wanted} cannot be reached from {tuple(inp.shape[2:])}: "
                f"use {least} to {most}"
            )
        return tuple(n - a for a, n in zip(least, wanted, strict=True))


class _LazyConv(Lazy, ConvBase):
    def __init__(
        self,
        out_channels: int | Callable[[int], int] | None = None,
        kernel_size: OneOrSeveral[int] = 3,
        stride: OneOrSeveral[int] = 1,
        padding: PaddingType = 0,
        dilation: OneOrSeveral[int] = 1,
        output_padding: OneOrSeveral[int] = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: BoundType = "zeros",
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        super().__init__(  # type: ignore[misc]
            0, 0, out_channels, kernel_size, stride, padding, dilation, output_padding, groups,
            bias, padding_mode, device, dtype,
        )  # fmt: skip
        # what can be known is checked now, in the least layer that these options describe
        out = groups if out_channels is None or callable(out_channels) else out_channels
        kind: Any = self.cls_to_become
        kind(
            3, groups, out, kernel_size, stride, padding, dilation, output_padding, groups, bias,
            padding_mode, "meta", dtype,
        )  # fmt: skip

    def _meet(self, inp: Tensor) -> None:
        self.ndim, self.inp_channels = check.any_image(inp), inp.shape[1]


class LazyConv(_LazyConv, Conv):
    """A `Conv` that takes `ndim` and `inp_channels` from its first input.

    `out_channels` may be a number, None (as many as the input has), or a function of the number of
    input channels; the other parameters are those of `Conv`.
    """

    cls_to_become = Conv  # type: ignore[assignment]


class LazyConvTransposed(_LazyConv, ConvTransposed):
    """A `ConvTransposed` that takes `ndim` and `inp_channels` from its first input.

    `out_channels` may be a number, None (as many as the input has), or a function of the number of
    input channels; the other parameters are those of `ConvTransposed`.
    """

    cls_to_become = ConvTransposed  # type: ignore[assignment]


def _only(axis: int, values: tuple[int, ...], elsewhere: int) -> list[int]:
    return [value if n == axis else elsewhere for n, value in enumerate(values)]


class SeparableConv(nn.Sequential):
    """One 1-D convolution per axis, one after the other: (W, 1, 1), (1, H, 1), (1, 1, D).

    All but the last keep max(inp_channels, out_channels) channels, and only the last has a bias.
    The parameters are those of `Conv`, without a stride.
    """

    summed: ClassVar[bool] = False

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        kernel_size: OneOrSeveral[int] = 3,
        dilation: OneOrSeveral[int] = 1,
        bias: bool = True,
        padding: PaddingType = "same",
        padding_mode: BoundType = "zeros",
        groups: int = 1,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        ndim = check.dimensions(ndim)
        out_channels = inp_channels if out_channels is None else out_channels
        sizes = check.per_dimension("kernel_size", kernel_size, ndim)
        steps = check.per_dimension("dilation", dilation, ndim)
        if padding != "same" and self.summed:
            raise ValueError(f"padding={padding!r} must be 'same', for the sum to have one size")
        if not isinstance(padding, str):
            padding = check.per_dimension("padding", padding, ndim, 0)
        layers = []
        for axis in range(ndim):
            here = partial(_only, axis)
            inp, out = self._channels(inp_channels, out_channels, axis, ndim)
            layers += [Conv(
                ndim, inp, out, kernel_size=here(sizes, 1), dilation=here(steps, 1),
                padding=padding if isinstance(padding, str) else here(padding, 0), groups=groups,
                bias=bias and axis == ndim - 1, padding_mode=padding_mode, device=device,
                dtype=dtype,
            )]  # fmt: skip
        super().__init__(*layers)
        self.ndim, self.inp_channels, self.out_channels = ndim, inp_channels, out_channels

    @staticmethod
    def _channels(inp: int, out: int, axis: int, ndim: int) -> tuple[int, int]:
        middle = max(inp, out)
        return (inp if axis == 0 else middle), (out if axis == ndim - 1 else middle)


class CrossHairConv(SeparableConv):
    """One 1-D convolution per axis, side by side, summed: (W, 1, 1) + (1, H, 1) + (1, 1, D).

    Tetteh et al., "DeepVesselNet: Vessel Segmentation, Centerline Prediction, and Bifurcation
    Detection in 3-D Angiographic Volumes" (2020) [10.3389/fnins.2020.592352].

    The parameters are those of `Conv`, without a stride; `padding` must be "same", without which
    the sum has no common size.
    """

    summed = True

    @staticmethod
    def _channels(inp: int, out: int, axis: int, ndim: int) -> tuple[int, int]:
        return inp, out

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size)"""
        return reduce(torch.add, (conv(inp) for conv in self))
