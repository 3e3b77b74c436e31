"""Images that are still to be computed: what is read, a convolution perhaps, and steps after it.

Between two convolutions, every chain of norm, channel dropout and activation amounts to

    z = s2 act(s1 x + t1) + t2          scales and shifts per sample and channel

so a `Deferred` is a tensor x or a convolution, and the steps that make it z. It is computed when it
is first read, for then it is known what of the steps leaves with the product (`launch`). What is
read is x, with tables: a reader applies the transform while it reads, and only x is kept for
backward. In the graph of autograd x stands for z: all readers return the gradient of z (`block`).

A chain holds one activation and one norm; a second one finds the first applied. Sums and
concatenations are pending, too: whoever reads next computes them, if it must.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.functional.block import Image, Product
from cassetta.functional.launch import Launch, transformed
from cassetta.functional.nodes import Materialize, MaterializeMoments
from cassetta.functional.norm import Normalization
from cassetta.functional.steps import Steps
from cassetta.kernels import layout
from cassetta.kernels.engines import ENGINES
from cassetta.kernels.types import Activation, Moments, flat
from cassetta.recording.programs import applied


class Sum(NamedTuple):
    """A sum that is still to be computed."""

    x: Deferred
    residual: Tensor


class Join(NamedTuple):
    """Two images of one size, whose channels are still to be concatenated."""

    first: Deferred
    second: Deferred


NO_STEPS = Steps()


class Deferred:
    """An image z (N, C, *X) that is still to be computed; never seen outside the package."""

    def __init__(
        self,
        source: Tensor | Launch | Sum | Join,
        steps: Steps = NO_STEPS,
        own: Moments | None = None,
        promoted: bool = False,
    ) -> None:
        self.source = source
        self.steps = steps  # none, of a sum or of two images
        self.own = own  # the moments of the source, where they are known
        self.promoted = promoted  # autocast has torch compute z in float32
        self._image: Image | None = None
        self._z: Tensor | None = None
        self._own_of_z: Moments | None = None

    @property
    def image(self) -> Tensor:
        """A tensor of its shape and kind, whose values are not to be read."""
        source = self.source
        if isinstance(source, Launch):
            return source.like
        if isinstance(source, Sum):
            return source.x.image
        if isinstance(source, Join):
            first, second = (part.image for part in source)
            n, c, *size = first.shape
            return first.new_empty(()).expand(n, c + second.shape[1], *size)
        return source

    @property
    def parts(self) -> tuple[Deferred, ...]:
        """The images that it is of: itself, or two."""
        return tuple(self.source) if isinstance(self.source, Join) else (self,)

    @property
    def shape(self) -> torch.Size:
        return self.image.shape

    @property
    def is_last(self) -> bool:
        """Whether it will be channels last."""
        source = self.source
        if isinstance(source, Launch):
            engine = ENGINES[source.product.engine]
            return engine.is_last(_is_last(source.first.x), source.weight)
        if isinstance(source, (Sum, Join)):
            return source[0].is_last  # type: ignore[union-attr]
        return _is_last(source)

    def like(self) -> Tensor:
        """Return a tensor of its shape and layout on the device "meta"."""
        source = self.source
        if isinstance(source, Tensor):
            return torch.empty_strided(
                source.shape, source.stride(), dtype=source.dtype, device="meta"
            )
        image = self.image
        if self.is_last:
            return layout.empty(tuple(image.shape), image.dtype, "meta")
        return torch.empty(image.shape, dtype=image.dtype, device="meta")

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to be added or concatenated first."""
        return not isinstance(self.source, (Sum, Join))

    def settled(self) -> Deferred:
        """Return it with nothing to be added or concatenated."""
        return self if self.is_settled else Deferred(self.z())

    def kept(self) -> Deferred:
        """Return it, computed with the steps it has now, because several modules will read it."""
        if self.is_settled:
            self.read(sums=True)
        return self

    def leading(self, channels: int) -> Tensor:
        """Return the first channels of z; of two images, the first one, if it has so many."""
        first = self.parts[0]
        return first.z() if first.shape[1] == channels else self.z()[:, :channels]

    def plus(self, residual: Tensor) -> Deferred:
        """Return the sum with a tensor of the same shape; computed with what is read next."""
        x = self.settled()
        source, is_waiting = x.source, x._image is None
        if isinstance(source, Launch) and is_waiting and source.takes(residual, x.steps):
            return Deferred(source.plus(residual, x.steps), promoted=x.promoted)
        return Deferred(Sum(x, residual), promoted=x.promoted)

    def scaled(self, factor: Tensor) -> Deferred:
        """Multiply channels by a factor (N, C) that needs no gradient, as dropout does."""
        x = self._open("")
        return Deferred(x.source, x.steps.scaled(factor), x.own, self.promoted)

    def activated(
        self, activation: Activation, weight: Tensor | None = None, promotes: bool = False
    ) -> Deferred:
        """Apply an activation; `weight` (C,) or (1,) is what PReLU learns.

        `promotes`: autocast has torch compute it in float32, and z is what torch would return.
        """
        if activation.name == "identity":
            return self
        x = self._open("a")
        steps = x.steps.activated(activation, weight)
        return Deferred(x.source, steps, x.own, self.promoted or promotes)

    def normalized(self, norm: Normalization, promotes: bool = False) -> Deferred:
        """Apply a norm, with the statistics of z, or with fixed ones; `promotes` as above."""
        if norm.fixed is None and ("n" in self.steps.word or isinstance(self.source, Sum)):
            x = self._with_moments()
        else:
            x = self._open("n")
        steps = x.steps.normalized(norm)
        return Deferred(x.source, steps, x.own, self.promoted or promotes)

    def _open(self, letter: str) -> Deferred:
        """Return what a step can be added to: it has none of that kind, and nobody has read it."""
        if not self.is_settled or (letter and letter in self.steps.word):
            return Deferred(self.z())
        if self._image is None or isinstance(self.source, Tensor):
            return self
        return Deferred(self.z())

    def read(self, sums: bool = False) -> Image:
        """Return what is to be read; computed now, if it has waited.

        Parameters
        ----------
        sums : bool
            Whether readers may return sums with their gradient (`block`).
        """
        if self._image is None:
            source = self.source
            assert isinstance(source, (Tensor, Launch)), "settle it first"
            if isinstance(source, Tensor):
                self._image = transformed(source, self.steps, self.own, sums)
            else:
                self._image = source.run(self.steps, sums)
        return self._image

    def z(self) -> Tensor:
        """Return z itself, computed once."""
        if self._z is None:
            source, residual = self.source, None
            if isinstance(source, Join):
                self._z = torch.cat([part.z() for part in source], 1)
                return self._z
            if isinstance(source, Sum):
                if source.x._z is not None:
                    self._z = source.x._z + source.residual
                    return self._z
                source, residual = source
            image = (source if isinstance(source, Deferred) else self).read()
            x, prologue = image.alone(), image.prologue
            dtype = self._dtype(x, residual)
            if not prologue.is_identity():
                self._z = applied(Materialize, x, *flat(prologue), residual, dtype)
            else:
                self._z = x.to(dtype) if residual is None else x.to(dtype) + residual
        return self._z  # type: ignore[return-value]

    def _dtype(self, x: Tensor, residual: Tensor | None) -> torch.dtype:
        """Return the dtype of z (+ residual), made of x."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.promoted else x.dtype
        return dtype if residual is None else torch.promote_types(dtype, residual.dtype)

    def _with_moments(self) -> Deferred:
        """Return z, and its moments from the same pass, if it has not been computed yet."""
        if self._z is not None or isinstance(self.source, Join):
            return Deferred(self.z(), own=self._own_of_z)
        of, residual = self.source if isinstance(self.source, Sum) else (self, None)
        image = of.read()
        x = image.alone()
        given = (x, *flat(image.prologue), residual, self._dtype(x, residual))
        z, *own = applied(MaterializeMoments, *given)
        self._z, self._own_of_z = z, Moments(*own)
        return Deferred(z, own=self._own_of_z)


def _is_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _rounded(image: Image, dtype: torch.dtype) -> Image:
    """Return what is read in the dtype of the product; a pending transform rounds what it makes."""
    if image.prologue.is_identity() and image.x.dtype != dtype:
        return Image(image.alone().to(dtype))
    return image


def convolved(
    x: Deferred, product: Product, weight: Tensor, bias: Tensor | None, by_result: bool = False,
    owner: Any = None,
) -> Deferred:  # fmt: skip
    """Convolve what x (N, C, *X) stands for, or apply the adjoint of that, by an engine.

    Under autocast x and the parameters are rounded to its dtype, as `torch.conv3d` has it.

    Parameters
    ----------
    by_result : bool
        Apply an activation that follows at once, if its result tells its slope; that result is then
        kept instead of what it is applied to.
    owner : Module
        The module that convolves, for those who count what each costs.

    Raises
    ------
    ValueError
        If the engine has no kernel for this geometry.
    TypeError
        If the weights are not in the dtype of the image.
    """
    engine, geometry, transposed = product
    out, _, *taps = weight.shape
    if (why := ENGINES[engine].supports(geometry, tuple(taps))) is not None:
        raise ValueError(why)
    first, second, source = x, None, x.source
    if isinstance(source, Join) and geometry.groups == 1 and not transposed:
        first, second = source
    elif isinstance(source, (Join, Sum)):
        first = x.settled()
    image = x.image
    device, dtype = image.device.type, image.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if bias is not None and weight.dtype == dtype != bias.dtype:  # the weights round both
            bias = bias.to(dtype)
    elif weight.dtype != dtype:
        raise TypeError(
            f"inp is in {dtype}, but the weights are in {weight.dtype}: convert one of them, "
            "or use torch.autocast"
        )
    n, _, *size = image.shape
    if transposed:
        out, size = weight.shape[1], [k * s for k, s in zip(size, geometry.stride, strict=True)]
    else:
        size = geometry.size_of(size, taps)
    shape = n, out, *size
    like = weight.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)
    sums = ENGINES[engine].FUSES and not transposed
    others = None if second is None else _rounded(second.read(sums), dtype)
    images = _rounded(first.read(sums), dtype), others
    grad = torch.is_grad_enabled()
    return Deferred(Launch(product, *images, weight, bias, like, grad, by_result, owner))


def defer(x: Tensor | Deferred) -> Deferred:
    """Return a tensor with nothing pending; a `Deferred` as it is."""
    return x if isinstance(x, Deferred) else Deferred(x)


def materialize(x: Tensor | Deferred, residual: Tensor | None = None) -> Tensor:
    """Return z, perhaps with a residual added in the same pass; a tensor as it is."""
    if residual is not None:
        return defer(x).plus(residual).z()
    return x if isinstance(x, Tensor) else x.z()


def join(first: Deferred, *others: Deferred) -> Deferred:
    """Return images of one size as one, whose channels are still to be concatenated.

    Torch concatenates what differs in dtype, device or kind, and all others but the first.
    """
    second = others[0] if len(others) == 1 else Deferred(torch.cat([x.z() for x in others], 1))
    parts = first.settled(), second.settled()
    kinds = [(type(x.image), x.image.dtype, x.image.device) for x in parts]
    if kinds[0] != kinds[1]:
        return Deferred(torch.cat([x.z() for x in parts], 1))
    return Deferred(Join(*parts))
