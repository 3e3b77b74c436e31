"""Fully convolutional encoders and decoders."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

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
from cassetta.layers import ConvGroup, DownConvGroup, DownGroup, UpConvGroup, UpGroup, fusing
from cassetta.layers.levels import resampling
from cassetta.layers.norm import check_statistics
from cassetta.layers.repeated import repeated
from cassetta.layers.simple import Chain, listed
from cassetta.layers.updown import Level


class _Default(int):
    """A default that can be told from the same number given by the caller."""


def _features(nb_features: Any, nb_levels: int, step: Callable[[int, int], float]) -> list[int]:
    """Number of features per level.

    A list has one entry per level, and so says how many there are, as upstream has it; a larger
    `nb_levels` that was given too continues it.
    """
    features = check.several("nb_features", nb_features)
    depth = check.whole("nb_levels", nb_levels)
    if check.is_list(nb_features):
        depth = len(features) if isinstance(nb_levels, _Default) else max(depth, len(features))
    return extrapolate(features, depth, step)


@fusing.fuses
class ConvEncoder(LoadableMixin, Chain):
    """A fully convolutional encoder: a `ConvGroup`, then a `DownConvGroup` per further level."""

    def __init__(
        self,
        ndim: int,
        nb_features: OneOrSeveral[int] = 16,
        mul_features: int = 2,
        nb_levels: int = _Default(3),
        nb_conv_per_level: int = 2,
        kernel_size: OneOrSeveral[int] = 3,
        residual: bool = False,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        order: str = "cndax",
        pool_factor: OneOrSeveral[int] = 2,
        pool_mode: str = "interpolate",
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        nb_features : [list of] int
            Number of features at the finest level. If a list, at each level, and the list says how
            many levels there are; a larger `nb_levels` that is given too continues it.
        mul_features : int
            Multiply the number of features by this when going down a level.
        nb_levels : int
            Number of levels.
        nb_conv_per_level : int
            Number of convolutions at each level.
        kernel_size, residual, activation, norm, dropout, attention, order
            See `ConvGroup`.
        pool_factor : [list of] int
            Downsampling factor, per dimension.
        pool_mode : {"interpolate", "conv", "pool"}
            Go down by linear interpolation, strided convolution, or max pooling.
        """
        factor = check.positive("mul_features", mul_features)
        features = _features(nb_features, nb_levels, lambda last, n: last * factor**n)
        options: dict[str, Any] = {
            "nb_conv": nb_conv_per_level, "kernel_size": kernel_size, "residual": residual,
            "activation": activation, "norm": norm, "dropout": dropout, "attention": attention,
            "order": order,
        }  # fmt: skip
        down = partial(DownConvGroup, factor=pool_factor, mode=resampling("pool_mode", pool_mode))
        super().__init__(
            ConvGroup(ndim, features[0], **options),
            *(down(ndim, fine, coarse, **options) for fine, coarse in pairwise(features)),
        )

    @repeated
    def forward(self, inp: Tensor, *, return_all: bool = False) -> Any:
        """
        Parameters
        ----------
        inp : (B, inp_channels, *size) tensor
            Features.
        return_all : bool
            Return what leaves each level, from finest to coarsest, not only the last.

        Returns
        -------
        out : [tuple of] (B, out_channels, *out_size) tensor

        Raises
        ------
        ValueError, TypeError
            What `check_image` raises.
        """
        check.tensor(inp)
        outputs: list[Any] | None = [] if return_all else None
        out = self.defer(defer(inp), outputs)
        return materialize(out) if outputs is None else tuple(map(materialize, outputs))

    def defer(self, x: Deferred, outputs: list[Any] | None = None) -> Any:
        """`forward` of what x stands for; what leaves each level is also put into the list."""
        self.check_image(x.image)
        for level in self:
            x = defer(fusing.deferred_call(level)(x))
            if outputs is not None:
                outputs.append(x.kept())
        return x

    def check_image(self, inp: Tensor) -> None:
        """Refuse an image that some level could not work with, before the first one has worked.

        A level that was exchanged for a module of another kind ends what can be told beforehand.

        Raises
        ------
        ValueError, TypeError
            If the image has other dimensions or channels than the first level takes, is too small
            to be divided by `pool_factor` at every level, or so small that a norm has one value.
        """
        ndim = getattr(self[0], "ndim", None)
        if ndim is None:
            return
        check.image(inp, ndim, getattr(self[0], "inp_channels", None))
        size, least, sizes = list(inp.shape[2:]), [1] * ndim, []
        for depth, level in enumerate(listed(self)):
            if depth:
                if not isinstance(level, DownGroup) or not isinstance(level[0], Level):
                    return
                factor = level[0].factor
                size = [n // f for n, f in zip(size, factor, strict=True)]
                least = [n * f for n, f in zip(least, factor, strict=True)]
            if 0 in size:
                raise ValueError(
                    f"inp has size {tuple(inp.shape[2:])}, but {depth + 1} levels need "
                    f"{tuple(least)}: pad the image or use fewer levels"
                )
            sizes.append(size)
        for depth, (level, size) in enumerate(zip(listed(self), sizes, strict=True)):
            check_statistics(level, inp.shape[0], size, f"at level {depth} of {len(self)}")


@fusing.fuses
class ConvDecoder(LoadableMixin, Chain):
    """A fully convolutional decoder: an `UpConvGroup` per level but the coarsest."""

    def __init__(
        self,
        ndim: int,
        nb_features: OneOrSeveral[int] = 16,
        div_features: int = 2,
        nb_levels: int = _Default(3),
        nb_conv_per_level: int = 2,
        skip: bool | OneOrSeveral[int] = False,
        kernel_size: OneOrSeveral[int] = 3,
        residual: bool = False,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        order: str = "cndax",
        unpool_factor: OneOrSeveral[int] = 2,
        unpool_mode: str = "interpolate",
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        nb_features : [list of] int
            Number of features at the coarsest level, where the decoder begins. If a list, at each
            level, and the list says how many levels there are; a larger `nb_levels` that is given
            too continues it.
        div_features : int
            Divide the number of features by this when going up a level.
        nb_levels : int
            Number of levels.
        nb_conv_per_level : int
            Number of convolutions at each level.
        skip : bool or [list of] int
            Number of channels of the skip connections to concatenate, at each level but the
            coarsest; True, as many as there are features. Where it is 0 (or False), skip
            connections are added if they are given.
        kernel_size, residual, activation, norm, dropout, attention, order
            See `ConvGroup`.
        unpool_factor : [list of] int
            Upsampling factor, per dimension.
        unpool_mode : {"interpolate", "conv"}
            Go up by linear interpolation or transposed convolution. "pool" means "interpolate".
        """
        factor = check.positive("div_features", div_features)
        features = _features(nb_features, nb_levels, lambda last, n: last // factor**n)
        options: dict[str, Any] = {
            "nb_conv": nb_conv_per_level, "kernel_size": kernel_size, "residual": residual,
            "activation": activation, "norm": norm, "dropout": dropout, "attention": attention,
            "order": order,
        }  # fmt: skip
        mode = resampling("unpool_mode", unpool_mode).replace("p", "i")
        up = partial(UpConvGroup, factor=unpool_factor, mode=mode)
        steps = zip(features[:-1], features[1:], _skips(skip, features), strict=True)
        super().__init__(
            *(up(ndim, coarse, fine, skip=skip, **options) for coarse, fine, skip in steps)
        )
        # a single level has no way up to ask
        self._ndim, self._channels = check.dimensions(ndim), features[0]

    @repeated
    def forward(self, *inp: Tensor, return_all: bool = False) -> Any:
        """
        Parameters
        ----------
        *inp : (B, channels, *size) tensor
            Features at the coarsest level, then skip connections from coarsest to finest. Those
            beyond the finest level are ignored. Where a size is not `unpool_factor` times that of
            the level below, the last voxel is repeated, or what is too much is cropped.
        return_all : bool
            Return what leaves each level, from coarsest to finest, not only the last.

        Returns
        -------
        out : [tuple of] (B, out_channels, *out_size) tensor
        """
        if not inp:
            raise ValueError("inp=() is empty: give at least the features of the coarsest level")
        for one in inp:
            check.tensor(one)
        outputs: list[Any] | None = [] if return_all else None
        out = self.defer(*map(defer, inp), outputs=outputs)
        return materialize(out) if outputs is None else tuple(map(materialize, outputs))

    def defer(self, x: Deferred, *skips: Deferred, outputs: list[Any] | None = None) -> Any:
        """`forward` of what these stand for; what leaves each level is also put into the list."""
        self._check(x, skips)
        for n, level in enumerate(listed(self)):
            x = defer(fusing.deferred_call(level)(x, *skips[n : n + 1]))
            if outputs is not None:
                outputs.append(x)
        return x

    def _check(self, inp: Deferred, skips: Sequence[Deferred]) -> None:
        """Refuse what some level could not work with, before the first one has worked.

        A level that was exchanged for a module of another kind ends what can be told beforehand.
        """
        check.image(inp.image, self.ndim, self._inp_channels())
        shape: Sequence[int] = inp.shape
        for n, level in enumerate(listed(self)):
            if not isinstance(level, UpGroup) or not isinstance(level[0], Level):
                return
            shape = level.fitted_shape(shape, skips[n : n + 1])

    def _inp_channels(self) -> int | None:
        return getattr(self[0], "inp_channels", None) if len(self) else self._channels

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self._ndim

    @property
    def inp_channels(self) -> int:
        """Number of channels at the coarsest level."""
        return self[0].inp_channels if len(self) else self._channels

    @property
    def out_channels(self) -> int:
        """Number of channels at the finest level."""
        return self[-1].out_channels if len(self) else self._channels


def _skips(skip: bool | OneOrSeveral[int], features: list[int]) -> list[int]:
    """Number of concatenated channels at each level but the coarsest."""
    nb_skips = len(features) - 1
    if isinstance(skip, bool):
        return features[1:] if skip else [0] * nb_skips
    if not check.is_list(skip):
        return [check.whole("skip", skip, least=0)] * nb_skips
    channels = check.several("skip", skip, least=0) if len(skip) else []  # type: ignore[arg-type]
    if len(channels) > nb_skips:
        raise ValueError(f"skip={skip!r} has {len(channels)} values for {nb_skips} levels")
    return channels + [0] * (nb_skips - len(channels))
