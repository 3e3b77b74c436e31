"""U-Nets: an encoder and a decoder joined by skip connections."""

from typing import Any, Literal

from torch import Tensor, nn

from cassetta.backbones.fcn import ConvDecoder, ConvEncoder
from cassetta.core import check
from cassetta.core.typing import (
    ActivationType,
    AttentionType,
    DropoutType,
    NormType,
    OneOrSeveral,
)
from cassetta.core.utils import extrapolate
from cassetta.functional import Deferred, defer, materialize
from cassetta.io.loadable import LoadableMixin
from cassetta.layers import fusing
from cassetta.layers.repeated import repeated


@fusing.fuses
class UNet(LoadableMixin, nn.Module):
    """A U-Net.

    Ronneberger, Fischer & Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation"
    (2015) [arXiv:1505.04597], whose sizes are the defaults. One thing differs: where they expand
    the channels by a 3x3 convolution with its ReLU, a 1x1 convolution without one comes first
    (after the pooling), and all 3x3 convolutions of the encoder preserve the channels. That costs
    a few free parameters, and lets pooling be exchanged for interpolation or a strided
    convolution (`pool_mode`).

    Images may have any size that reaches the coarsest level: an upsampled image that misses a
    voxel of its skip connection repeats its last one.
    """

    def __init__(
        self,
        ndim: int,
        nb_features: OneOrSeveral[int] = 64,
        mul_features: int = 2,
        nb_levels: int = 5,
        nb_levels_decoder: int | None = None,
        nb_conv_per_level: int = 2,
        kernel_size: OneOrSeveral[int] = 3,
        residual: bool = False,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        order: str = "cndax",
        pool_factor: OneOrSeveral[int] = 2,
        pool_mode: str = "pool",
        unpool_mode: str | None = "conv",
        skip: bool | Literal["+"] = True,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        nb_features : [list of] int
            Number of features at the finest level. If a list, at each level; a list that is
            shorter than `nb_levels` is continued by multiplying by `mul_features`.
        mul_features : int
            Multiply the number of features by this when going down a level.
        nb_levels : int
            Number of levels of the encoder.
        nb_levels_decoder : int, default=`nb_levels`
            Number of levels of the decoder. If fewer, the output is coarser than the input; if
            more, it is finer: levels above the input have no skip connection.
        nb_conv_per_level : int
            Number of convolutions at each level.
        kernel_size, residual, activation, norm, dropout, attention, order
            See `ConvGroup`.
        pool_factor : [list of] int
            Down- and upsampling factor, per dimension.
        pool_mode : {"interpolate", "conv", "pool"}
            Go down by linear interpolation, strided convolution, or max pooling.
        unpool_mode : {"interpolate", "conv"}, default=`pool_mode`
            Go up by linear interpolation or transposed convolution. "pool" means "interpolate".
        skip : bool or {"+"}
            Concatenate skip connections (True), add them ("+"), or have none (False).
        """
        skip = check.one_of("skip", bool(skip) if skip in (0, 1) else skip, [True, False, "+"])
        factor = check.positive("mul_features", mul_features)
        nb_levels = check.whole("nb_levels", nb_levels)
        if nb_levels_decoder is None:
            nb_levels_decoder = nb_levels
        nb_levels_decoder = check.whole("nb_levels_decoder", nb_levels_decoder)
        features = check.several("nb_features", nb_features)
        features = extrapolate(features, nb_levels, lambda last, n: last * factor**n)
        decoded = extrapolate(features[::-1], nb_levels_decoder, lambda last, n: last // factor**n)
        skipped = features[-2::-1][: nb_levels_decoder - 1]
        options: dict[str, Any] = {
            "nb_conv_per_level": nb_conv_per_level, "kernel_size": kernel_size,
            "residual": residual, "activation": activation, "norm": norm, "dropout": dropout,
            "attention": attention, "order": order,
        }  # fmt: skip
        super().__init__()
        self.encoder = ConvEncoder(
            ndim, features, nb_levels=nb_levels, pool_factor=pool_factor, pool_mode=pool_mode,
            **options,
        )  # fmt: skip
        self.decoder = ConvDecoder(
            ndim, decoded, nb_levels=nb_levels_decoder, skip=skipped if skip is True else False,
            unpool_factor=pool_factor, unpool_mode=unpool_mode or pool_mode, **options,
        )  # fmt: skip
        self.skip = skip

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.encoder.ndim

    @property
    def inp_channels(self) -> int:
        """Number of input channels."""
        return self.encoder.inp_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels, those of the finest level of the decoder."""
        return self.decoder.out_channels

    @property
    def all_out_channels(self) -> list[int]:
        """Number of channels that leave each level of the decoder."""
        return self.decoder.all_out_channels

    def check_image(self, inp: Tensor) -> None:
        """Refuse an image that the encoder could not work with: see `ConvEncoder.check_image`."""
        self.encoder.check_image(inp)

    @repeated
    def forward(self, inp: Tensor, *, return_all: bool = False) -> Any:
        """
        Parameters
        ----------
        inp : (B, inp_channels, *size) tensor
            Features.
        return_all : bool
            Return what leaves each level of the decoder, from coarsest to finest.

        Returns
        -------
        out : [tuple of] (B, out_channels, *out_size) tensor

        Raises
        ------
        ValueError
            If the image is too small to be divided by `pool_factor` at every level.
        """
        out = self.defer(defer(inp), return_all)
        return out if return_all else materialize(out)

    def defer(self, x: Deferred, return_all: bool = False) -> Any:
        """`forward` of what x stands for; no skip connection need be computed on the way."""
        encoder, levels = self.encoder, []  # what the decoder takes, the finest first
        if not self.skip:
            levels.append(defer(fusing.deferred_call(encoder)(x)))
        elif isinstance(encoder, ConvEncoder) and fusing.defers(encoder):
            encoder.defer(x, levels)
        else:
            levels.extend(map(defer, encoder(x.z(), return_all=True)))
        if return_all:
            return self.decoder(*map(materialize, levels[::-1]), return_all=True)
        return fusing.deferred_call(self.decoder)(*levels[::-1])
