"""Ways down and up a level: strided convolution, pooling, interpolation.

None has an activation, a norm or dropout. Where pooling or interpolation changes the number of
channels, a 1x1 convolution sees to it at the coarse end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cassetta.core import check
from cassetta.core.typing import BoundType, InterpolationType, OneOrSeveral
from cassetta.layers.interpol import Resize
from cassetta.layers.simple import DoNothing

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_UNPOOL = {1: nn.MaxUnpool1d, 2: nn.MaxUnpool2d, 3: nn.MaxUnpool3d}


class Level(nn.Module):
    """What every way down or up knows of itself."""

    inp_channels: int
    out_channels: int
    factor: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.factor)

    def _describe(self, ndim: Any, inp: Any, out: Any, factor: Any) -> None:
        """Check and store the arguments that all share."""
        ndim = check.dimensions(ndim)
        self.inp_channels = check.whole("inp_channels", inp)
        self.out_channels = check.whole("out_channels", inp if out is None else out)
        self.factor = check.per_dimension("factor", factor, ndim)

    def _check(self, inp: Tensor, down: bool) -> None:
        check.image(inp, len(self.factor), self.inp_channels)
        if down and any(n < f for n, f in zip(inp.shape[2:], self.factor, strict=True)):
            raise ValueError(
                f"inp has size {tuple(inp.shape[2:])}, too small to be divided by {self.factor}"
            )

    def _pointwise(self) -> list[nn.Module]:
        """A 1x1 convolution, if the number of channels changes."""
        if self.inp_channels == self.out_channels:
            return []
        return [_CONV[len(self.factor)](self.inp_channels, self.out_channels, kernel_size=1)]


class DownConv(Level):
    """Downsample by a convolution whose stride is its kernel size."""

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
        self.conv = _CONV[self.ndim](
            self.inp_channels, self.out_channels, kernel_size=self.factor, stride=self.factor
        )

    def __repr__(self) -> str:
        return repr(self.conv)

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *(size // factor))"""
        self._check(inp, down=True)
        return self.conv(inp)


class UpConv(Level):
    """Upsample by a transposed convolution whose stride is its kernel size."""

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
        self.conv = _CONV_TRANSPOSED[self.ndim](
            self.inp_channels, self.out_channels, kernel_size=self.factor, stride=self.factor
        )

    def __repr__(self) -> str:
        return repr(self.conv)

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *(size * factor))"""
        self._check(inp, down=False)
        return self.conv(inp)


class DownPool(Level, nn.Sequential):
    """Downsample by max pooling, then change channels by a 1x1 convolution."""

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
        return bool(self[0].return_indices)

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
        self._check(x, down=True)
        pool, conv = self
        if self.return_indices:
            out, indices = pool(x)
            return conv(out), indices
        return conv(pool(x))


class UpPool(Level, nn.Sequential):
    """Change channels by a 1x1 convolution, then put each voxel where a maximum was found."""

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
        self._check(inp, down=False)
        expected = (inp.shape[0], self.out_channels, *inp.shape[2:])
        check.tensor(indices, "indices")
        if indices.shape != expected or indices.dtype != torch.int64:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}, "
                f"but {expected} and torch.int64 are expected"
            )
        conv, unpool = self
        return unpool(conv(inp), indices, None if out_size is None else list(out_size))


class DownInterpol(Level, nn.Sequential):
    """Downsample by spline interpolation, then change channels by a 1x1 convolution.

    The numbers are those of torch-interpol: see `Resize`.
    """

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

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *(size // factor))"""
        self._check(inp, down=True)
        resize, *conv = self
        # the size itself, because n * (1 / f) may round to just below a whole number
        out = resize(inp, shape=[n // f for n, f in zip(inp.shape[2:], self.factor, strict=True)])
        return conv[0](out) if conv else out


class UpInterpol(Level, nn.Sequential):
    """Change channels by a 1x1 convolution, then upsample by spline interpolation.

    The numbers are those of torch-interpol: see `Resize`. With the default boundary condition the
    **edges darken**, because they mix with the zeros around the image.
    """

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

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *(size * factor))"""
        self._check(inp, down=False)
        return super().forward(inp)
