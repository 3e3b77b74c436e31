"""Ways down and up a level: strided convolution, pooling, interpolation.

None has an activation, a norm or dropout of its own; what is pending before it is applied while it
reads. Where pooling or interpolation changes the number of channels, a 1x1 convolution sees to it
at the coarse end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import BoundType, InterpolationType, OneOrSeveral
from cassetta.functional import Deferred
from cassetta.layers import fusing
from cassetta.layers.interpol import Resize
from cassetta.layers.simple import DoNothing, listed
from cassetta.layers.ways import (
    CONV,
    CONV_TRANSPOSED,
    Level,
    convolved,
    interpolated,
    why_other,
    why_other_interpolation,
)

_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_UNPOOL = {1: nn.MaxUnpool1d, 2: nn.MaxUnpool2d, 3: nn.MaxUnpool3d}


class DownConv(Level):
    """Downsample by a convolution whose stride is its kernel size."""

    is_down = True

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
    ) -> None:
        """
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
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        self.conv = CONV[self.ndim](
            self.inp_channels, self.out_channels, kernel_size=self.factor, stride=self.factor
        )

    def __repr__(self) -> str:
        return repr(self.conv)

    def _plain(self, inp: Tensor) -> Tensor:
        return self.conv(inp)

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        return convolved(self, x, self.conv, engine)

    def _why_plain(self) -> str | None:
        return why_other(self.conv, CONV[self.ndim], self.factor)


class UpConv(Level):
    """Upsample by a transposed convolution whose stride is its kernel size."""

    is_down = False

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
    ) -> None:
        """
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
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        self.conv = CONV_TRANSPOSED[self.ndim](
            self.inp_channels, self.out_channels, kernel_size=self.factor, stride=self.factor
        )

    def __repr__(self) -> str:
        return repr(self.conv)

    def _plain(self, inp: Tensor) -> Tensor:
        return self.conv(inp)

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        return convolved(self, x, self.conv, engine)

    def _why_plain(self) -> str | None:
        return why_other(self.conv, CONV_TRANSPOSED[self.ndim], self.factor)


@fusing.fuses
class DownPool(Level, nn.Sequential):
    """Downsample by max pooling, then change channels by a 1x1 convolution."""

    is_down = True

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
        return_indices: bool = False,
    ) -> None:
        """
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
        return_indices : bool
            Also return where the maxima were, for `UpPool`.
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        self.append(_POOL[self.ndim](self.factor, self.factor, return_indices=return_indices))
        self.extend(self._pointwise() or [DoNothing()])

    @property
    def return_indices(self) -> bool:
        return bool(getattr(self[0], "return_indices", False))

    def forward(self, x: Tensor) -> Any:
        """
        Parameters
        ----------
        x : (B, inp_channels, *size) tensor
            Image.

        Returns
        -------
        out : (B, out_channels, *(size // factor)) tensor
        indices : (B, inp_channels, *(size // factor)) tensor[long]
            Where in the image each maximum was. Only if `return_indices`.
        """
        if not self.return_indices:
            return super().forward(x)
        self._check(x)
        pool, conv = listed(self)
        out, indices = pool(x)
        return conv(out), indices

    def defer(self, x: Deferred) -> Any:
        """`forward` of what x stands for, which need not be computed on the way."""
        return self.forward(x.z()) if self.return_indices else super().defer(x)

    def _plain(self, inp: Tensor) -> Tensor:
        pool, conv = listed(self)
        return conv(pool(inp))

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        out = Deferred(functional.max_pool(x, self.factor), promoted=x.promoted)
        return convolved(self, out, self[1], engine) if self._changes_channels else out

    def _why_plain(self) -> str | None:
        pool, conv = listed(self)
        if type(pool) is not _POOL[self.ndim] or not self._is_usual(pool):
            return f"its pooling is {pool}"
        if not self._changes_channels:
            return None if type(conv) is DoNothing else f"its last layer is {conv}"
        return why_other(conv, CONV[self.ndim], (1,) * self.ndim)

    def _is_usual(self, pool: Any) -> bool:
        """Whether the windows of a pooling are those that were built."""
        edges = (pool.padding, pool.dilation, pool.ceil_mode)
        return pool.kernel_size == pool.stride == self.factor and edges == (0, 1, False)


class UpPool(Level, nn.Sequential):
    """Change channels by a 1x1 convolution, then put each voxel where a maximum was found."""

    is_down = False

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
    ) -> None:
        """
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
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        self.extend(self._pointwise() or [DoNothing()])
        self.append(_UNPOOL[self.ndim](self.factor, self.factor))

    def forward(
        self, inp: Tensor, *, indices: Tensor, out_size: Sequence[int] | None = None
    ) -> Tensor:
        """
        Parameters
        ----------
        inp : (B, inp_channels, *size) tensor
            Image.
        indices : (B, out_channels, *size) tensor[long]
            What `DownPool(return_indices=True)` returned.
        out_size : sequence of int, default=size * factor
            Size of the image that was pooled; needed where `factor` does not divide it.

        Returns
        -------
        out : (B, out_channels, *out_size) tensor
        """
        self._check(inp)
        expected = (inp.shape[0], self.out_channels, *inp.shape[2:])
        check.tensor(indices, "indices")
        if indices.shape != expected or indices.dtype != torch.int64:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}, "
                f"but {expected} and torch.int64 are expected"
            )
        conv, unpool = listed(self)
        return unpool(conv(inp), indices, None if out_size is None else list(out_size))


class DownInterpol(Level, nn.Sequential):
    """Downsample by spline interpolation, then change channels by a 1x1 convolution.

    The numbers are those of torch-interpol: see `Resize`.
    """

    is_down = True

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
        prefilter: bool = True,
    ) -> None:
        """
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
        interpolation, bound, prefilter
            See `Resize`.
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        factors = [1 / f for f in self.factor]
        self.append(Resize(factors, interpolation=interpolation, bound=bound, prefilter=prefilter))
        self.extend(self._pointwise())

    def _plain(self, inp: Tensor) -> Tensor:
        resize, *conv = listed(self)
        # the size itself, because n * (1 / f) may round to just below a whole number
        out = resize(inp, shape=[n // f for n, f in zip(inp.shape[2:], self.factor, strict=True)])
        return conv[0](out) if conv else out

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        size = [n // f for n, f in zip(x.shape[2:], self.factor, strict=True)]
        out = interpolated(x, size)
        return convolved(self, out, self[1], engine) if self._changes_channels else out

    def _why_plain(self) -> str | None:
        return why_other_interpolation(self, listed(self))


class UpInterpol(Level, nn.Sequential):
    """Change channels by a 1x1 convolution, then upsample by spline interpolation.

    The numbers are those of torch-interpol: see `Resize`. With the default boundary condition the
    **edges darken**, because they mix with the zeros around the image.
    """

    is_down = False

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        factor: OneOrSeveral[int] = 2,
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
        prefilter: bool = True,
    ) -> None:
        """
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
        interpolation, bound, prefilter
            See `Resize`.
        """
        super().__init__()
        self._describe(ndim, inp_channels, out_channels, factor)
        self.extend(self._pointwise())
        self.append(
            Resize(self.factor, interpolation=interpolation, bound=bound, prefilter=prefilter)
        )

    def _plain(self, inp: Tensor) -> Tensor:
        return nn.Sequential.forward(self, inp)

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        # what is pending is applied to the coarse image: on load, each voxel would be met 8 times
        out = convolved(self, x, self[0], engine) if self._changes_channels else Deferred(x.z())
        return interpolated(out, [n * f for n, f in zip(x.shape[2:], self.factor, strict=True)])

    def _why_plain(self) -> str | None:
        return why_other_interpolation(self, listed(self)[::-1])
