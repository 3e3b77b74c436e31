"""What all ways down and up a level share: how one is run, and what its parts are when it is."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.functional import Deferred, Product, defer, materialize
from cassetta.kernels import dispatch
from cassetta.kernels.types import Geometry
from cassetta.layers import fusing
from cassetta.layers.decisions import recalled
from cassetta.layers.interpol import Resize
from cassetta.layers.repeated import repeated

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
TRANSPOSED = tuple(CONV_TRANSPOSED.values())


@fusing.fuses
class Level(nn.Module):
    """What every way down or up knows of itself, and how it is run."""

    inp_channels: int
    out_channels: int
    factor: tuple[int, ...]
    is_down: bool

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

    @repeated
    def forward(self, inp: Tensor) -> Any:
        """(B, inp_channels, *size) -> (B, out_channels, *(size // factor, or size * factor))"""
        return materialize(self.defer(defer(inp)))

    def defer(self, x: Deferred, size: Sequence[int] | None = None) -> Any:
        """`forward` of what x stands for, which need not be computed on the way.

        Perhaps cropped to a size, or with the last voxels repeated.
        """
        engine = recalled(self, x, self._engine)
        is_plain = engine == "reference"
        out = Deferred(self._plain(x.z())) if is_plain else self._fused(x, engine)
        if size is None or out.shape[2:] == size:
            return out
        return Deferred((functional.fit if is_plain else functional.fit_at_once)(out.z(), size))

    def _engine(self, x: Deferred) -> str:
        """Choose what runs this on x, once x is known to be what it takes."""
        self._check(x.image)
        convolves = self._changes_channels or hasattr(self, "conv")
        what = lambda: f"{type(self).__name__} {self.factor} to {self.out_channels}"  # noqa: E731
        why = "the batch is empty" if x.shape[0] == 0 else fusing.why_hooked(self.children())
        if not self.is_down:
            larger = [n * f for n, f in zip(x.shape[2:], self.factor, strict=True)]
            why = why or dispatch.why_too_large(larger)
        lacks = fusing.lacks(None, convolves)
        return fusing.choose_for(self, x, what, why or self._why_plain(), lacks).engine

    def _plain(self, inp: Tensor) -> Tensor:
        """What torch makes of an image."""
        raise NotImplementedError

    def _fused(self, x: Deferred, engine: str) -> Deferred:
        """The same of what x stands for; its convolution is run by this engine."""
        raise NotImplementedError

    def _why_plain(self) -> str | None:
        """Why kernels do something else, as a sentence: its parts were exchanged."""
        raise NotImplementedError

    def _check(self, inp: Tensor) -> None:
        check.image(inp, len(self.factor), self.inp_channels)
        if self.is_down and any(n < f for n, f in zip(inp.shape[2:], self.factor, strict=True)):
            raise ValueError(
                f"inp has size {tuple(inp.shape[2:])}, too small to be divided by {self.factor}"
            )

    @property
    def _changes_channels(self) -> bool:
        return self.inp_channels != self.out_channels

    def _pointwise(self) -> list[nn.Module]:
        """A 1x1 convolution, if the number of channels changes."""
        if not self._changes_channels:
            return []
        return [CONV[len(self.factor)](self.inp_channels, self.out_channels, kernel_size=1)]


def convolved(owner: Level, x: Deferred, conv: Any, engine: str) -> Deferred:
    """A convolution without padding, of what x stands for, by an engine."""
    product = Product(engine, unpadded(conv.stride), isinstance(conv, TRANSPOSED))
    return functional.convolved(x, product, conv.weight, conv.bias, owner=owner)


def unpadded(stride: tuple[int, ...]) -> Geometry:
    return Geometry(stride, ((0, 0),) * len(stride), (1,) * len(stride))


def interpolated(x: Deferred, size: list[int]) -> Deferred:
    """What x stands for, interpolated to a size; the outer edges coincide."""
    zooms = [new / old for new, old in zip(size, x.shape[2:], strict=True)]
    grid = functional.linear_grid(x.shape[2:], size, zooms, "edge")
    out = functional.resize_deferred(x, tuple(size), grid)
    return Deferred(out, promoted=x.promoted)


def why_other(conv: Any, kind: type, size: tuple[int, ...]) -> str | None:
    """Why a convolution is not the one that was built there, as a sentence."""
    known = (
        type(conv) is kind
        and conv.kernel_size == conv.stride == size
        and not any(conv.padding)
        and not any(conv.output_padding)
        and (conv.groups, conv.padding_mode, {*conv.dilation}) == (1, "zeros", {1})
    )
    return None if known else f"its convolution is {conv}"


def why_other_interpolation(level: Level, parts: list[Any]) -> str | None:
    """Why kernels do not interpolate like this, as a sentence; the convolution comes last."""
    resize, *conv = parts
    if len(conv) != (level.inp_channels != level.out_channels) or type(resize) is not Resize:
        return "its layers were exchanged"
    for axis in range(level.ndim):
        order, bound, anchor = (
            functional.nth(one, axis) for one in (resize.interpolation, resize.bound, resize.anchor)
        )
        if (
            not functional.is_linear(order, bound, bool(resize.extrapolate))
            or anchor[0].lower() != "e"
        ):
            return f"no kernel interpolates with {resize.extra_repr()}"
    return None if not conv else why_other(conv[0], CONV[level.ndim], (1,) * level.ndim)
