"""Levels of an encoder or a decoder: a way down or up, and the block of layers that follows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import (
    ActivationType,
    AttentionType,
    DropoutType,
    NormType,
    OneOrSeveral,
    SeparableType,
)
from cassetta.functional import Deferred, defer, materialize
from cassetta.layers import fusing
from cassetta.layers.blocks import ConvGroup
from cassetta.layers.repeated import repeated
from cassetta.layers.simple import Chain, listed
from cassetta.layers.updown import (
    DownConv,
    DownInterpol,
    DownPool,
    Level,
    UpConv,
    UpInterpol,
    UpPool,
)


@fusing.fuses
class DownGroup(Chain):
    """A way down, such as `DownPool`, followed by a block of layers."""

    def __init__(self, module_down: nn.Module, module_block: nn.Module) -> None:
        """
        Parameters
        ----------
        module_down : Module
            `DownConv`, `DownPool`, `DownInterpol` or the like.
        module_block : Module
            `ConvBlock`, `ConvGroup` or the like.
        """
        super().__init__(module_down, module_block)

    @property
    def return_indices(self) -> bool:
        """Whether `forward` also returns the indices of the pooled maxima."""
        return getattr(self[0], "return_indices", False)

    @repeated
    def forward(self, inp: Tensor) -> Any:
        """(B, inp_channels, *size) -> (B, out_channels, *(size // factor)) [, indices]"""
        if self.return_indices:
            down, block = listed(self)
            out, indices = down(inp)
            return block(out), indices
        return materialize(self.defer(defer(inp)))

    def defer(self, x: Deferred) -> Any:
        """`forward` of what x stands for, which need not be computed on the way."""
        if self.return_indices:
            return self.forward(x.z())
        down, block = listed(self)
        x = defer(fusing.deferred_call(down)(x))
        return defer(fusing.deferred_call(block)(x))


class DownConvGroup(DownGroup):
    """A way down followed by a `ConvGroup`."""

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
        mode: str = "interpol",
        nb_conv: int = 1,
        kernel_size: OneOrSeveral[int] = 3,
        dilation: OneOrSeveral[int] = 1,
        recurrent: bool = False,
        residual: bool = False,
        bias: bool = True,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        compression: int = 16,
        order: str = "ncdax",
        separable: SeparableType = False,
        **down_options: Any,
    ) -> None:
        """
        What is not listed is a parameter of `ConvGroup`.

        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        inp_channels : int
            Number of input channels.
        out_channels : int, default=`inp_channels`
            Number of output channels.
        factor : [list of] int
            Downsampling factor.
        mode : {"interpol", "conv", "pool"}
            Make a `DownInterpol`, `DownConv` or `DownPool`; "interpolate" and initials will do.
        **down_options
            Its further options: `interpolation`, `bound`, `prefilter`, or `return_indices`.
        """
        kinds = {"c": DownConv, "p": DownPool, "i": DownInterpol}
        down = kinds[resampling("mode", mode)]
        module_down = down(ndim, inp_channels, out_channels, factor, **down_options)
        group = ConvGroup(
            ndim, module_down.out_channels, nb_conv, recurrent, residual, kernel_size, dilation,
            bias, activation, norm, dropout, attention, compression, order, separable,
        )  # fmt: skip
        super().__init__(module_down, group)


@fusing.fuses
class UpGroup(Chain):
    """A way up, such as `UpConv`, that meets skip connections, followed by a block of layers."""

    def __init__(
        self, module_up: nn.Module, module_block: nn.Module, skip: bool | int = False
    ) -> None:
        """
        Parameters
        ----------
        module_up : Module
            `UpConv`, `UpPool`, `UpInterpol` or the like.
        module_block : Module
            `ConvBlock`, `ConvGroup` or the like.
        skip : bool or int
            Concatenate skip connections (True, or their number of channels) or add them (False).
        """
        super().__init__(module_up, module_block)
        self.skip = skip

    @repeated
    def forward(self, inp: Tensor, *skips: Tensor, indices: Tensor | None = None) -> Tensor:
        """
        Parameters
        ----------
        inp : (B, inp_channels, *size) tensor
            Image at the coarse level.
        *skips : (B, skip_channels, *out_size) tensor
            Images at the fine level. If `out_size` is odd, the enlarged image lacks a voxel at its
            end: the last one is repeated.
        indices : (B, out_channels, *size) tensor[long]
            Where `UpPool` puts the voxels.

        Returns
        -------
        out : (B, out_channels, *out_size) tensor
        """
        check.any_image(inp)
        for skip in skips:
            check.image(skip, inp.ndim - 2, name="skip")
        options: dict[str, Any] = {} if indices is None else {"indices": indices}
        return materialize(self.defer(defer(inp), *map(defer, skips), **options))

    def defer(self, x: Deferred, *skips: Deferred, **options: Any) -> Deferred:
        """`forward` of what x and the skip connections stand for."""
        up, block = listed(self)
        if isinstance(up, Level):  # which tells before it works what it will return
            self.fitted_shape(x.shape, skips)
        if skips and isinstance(up, UpPool):
            options["out_size"] = skips[0].shape[2:]
        if options:
            out = defer(up(x.z(), **options))
        elif skips and isinstance(up, Level) and fusing.defers(up):
            out = up.defer(x, skips[0].shape[2:])
        else:
            out = defer(fusing.deferred_call(up)(x))
        if skips:
            if not isinstance(up, Level):
                self._check_skips(skips, out.shape, (2,) * (len(out.shape) - 2))
            out = self._met(out, skips)
        return defer(fusing.deferred_call(block)(out))

    def _met(self, out: Deferred, skips: Sequence[Deferred]) -> Deferred:
        """The upsampled image and the skip connections, side by side or added."""
        size = skips[0].shape[2:]
        if out.shape[2:] != size:
            out = Deferred(functional.fit(out.z(), size))
        if self.skip:
            return functional.join(out, *skips)
        for skip in skips:
            out = out.plus(skip.z())
        return out

    def fitted_shape(
        self, shape: Sequence[int], skips: Sequence[Tensor | Deferred]
    ) -> tuple[int, ...]:
        """The shape that leaves the group; refuses skip connections that do not fit.

        Parameters
        ----------
        shape : (B, inp_channels, *size)
            Shape of the input.
        skips : sequence of (B, skip_channels, *out_size) tensor
            Skip connections.

        Returns
        -------
        out_shape : (B, out_channels, *out_size)

        Raises
        ------
        ValueError
            If the skip connections have other channels, batches or sizes than are expected.
        """
        up, block = listed(self)
        batch, _, *size = shape
        size = [n * f for n, f in zip(size, up.factor, strict=True)]
        self._check_skips(skips, (batch, up.out_channels, *size), up.factor)
        channels = getattr(block, "out_channels", up.out_channels)  # a user's block need not say
        return batch, channels, *(skips[0].shape[2:] if skips else size)

    def _check_skips(
        self, skips: Sequence[Tensor | Deferred], shape: Sequence[int], factor: Sequence[int]
    ) -> None:
        """Refuse skip connections that do not fit an upsampled image of this shape."""
        batch, channels, *size = shape
        for skip in skips:
            check.image(defer(skip).image, len(size), name="skip")
        have = [skip.shape[1] for skip in skips]
        taken = getattr(self[1], "inp_channels", None)  # a user's block may not say
        if self.skip and taken not in (None, channels + sum(have)):
            raise ValueError(
                f"skips have {have} channels, but {taken - channels} are to be concatenated"
            )
        if not self.skip and any(c != channels for c in have):
            raise ValueError(f"skips have {have} channels, but {channels} are to be added")
        for skip in skips:
            off = [abs(n - m) for n, m in zip(skip.shape[2:], size, strict=True)]
            near = all(n < f for n, f in zip(off, factor, strict=True))
            if not near or skip.shape[2:] != skips[0].shape[2:] or skip.shape[0] != batch:
                raise ValueError(
                    f"skip has shape {tuple(skip.shape)}, but the upsampled image has "
                    f"{tuple(shape)}: at most the last voxel of an axis can be missing"
                )


class UpConvGroup(UpGroup):
    """A way up that meets skip connections, followed by a `ConvGroup`."""

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
        skip: int = 0,
        mode: str = "interpol",
        nb_conv: int = 1,
        kernel_size: OneOrSeveral[int] = 3,
        dilation: OneOrSeveral[int] = 1,
        recurrent: bool = False,
        residual: bool = False,
        bias: bool = True,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = False,
        attention: AttentionType = None,
        compression: int = 16,
        order: str = "ncdax",
        separable: SeparableType = False,
        **up_options: Any,
    ) -> None:
        """
        What is not listed is a parameter of `ConvGroup`.

        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        inp_channels : int
            Number of input channels.
        out_channels : int, default=`inp_channels`
            Number of output channels.
        factor : [list of] int
            Upsampling factor.
        skip : int
            Number of channels of the skip connections to concatenate. If 0, those given are added.
        mode : {"interpol", "conv", "pool"}
            Make an `UpInterpol`, `UpConv` or `UpPool`; "interpolate", "unpool" and initials will
            do.
        **up_options
            Its further options: `interpolation`, `bound`, `prefilter`.
        """
        kinds = {"c": UpConv, "p": UpPool, "i": UpInterpol}
        up = kinds[resampling("mode", mode)]
        module_up = up(ndim, inp_channels, out_channels, factor, **up_options)
        skip = check.whole("skip", skip, least=0)
        group = ConvGroup(
            ndim, module_up.out_channels, nb_conv, recurrent, residual, kernel_size, dilation,
            bias, activation, norm, dropout, attention, compression, order, separable, skip,
        )  # fmt: skip
        super().__init__(module_up, group, skip=skip)


def resampling(name: str, mode: str) -> str:
    """The initial, "c", "p" or "i", of a way down or up that is called by any of its names."""
    words = {
        "c": ("conv", "convolution", "c"),
        "p": ("pool", "pooling", "unpool", "p", "u"),
        "i": ("interpol", "interpolate", "interpolation", "i"),
    }
    for initial, synonyms in words.items():
        if isinstance(mode, str) and mode.lower() in synonyms:
            return initial
    raise ValueError(f"{name}={mode!r} is unknown: use 'interpolate', 'conv' or 'pool'")
