"""Tensors whose norm, dropout and activation are still to be applied.

Between two convolutions, every chain of norm, channel dropout and activation amounts to

    z = s2 act(s1 x + t1) + t2          scales and shifts per sample and channel

so x travels as it left the convolution, together with what is pending, and whoever reads it applies
the rest while it reads. Only x is kept for backward.

In the graph of autograd a `Deferred` stands for z: all who read it return the gradient of z, which
for most is at hand (that of a sum is the gradient itself, that of a convolution is what cuDNN
returns). Where they meet, one node, `nodes.Pending`, turns the gradient of z into that of x, of
gamma and beta, and, through the statistics of the norm, of every voxel that they were computed
from. In memory that node returns x itself: what stands for z in the graph is x in memory.

A chain holds one activation and one norm; a second one finds the first applied (`materialize`).
Sums and concatenations are pending, too: whoever reads next computes them, if it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.functional.nodes import (
    Materialize,
    MaterializeMoments,
    Pending,
    StandIn,
    table_dtype,
)
from cassetta.functional.norm import Norm, Pool, standardize
from cassetta.kernels import ops
from cassetta.kernels.types import NOTHING, Activation, Moments, Prologue, flat


class Launch(NamedTuple):
    """A tensor that waits to be computed, because a residual may be added where that happens."""

    compute: Callable[[Tensor | None], Tensor]
    like: Tensor  # of its shape and kind, without values
    differentiable: bool  # as the caller asked for it, whatever is asked for when it is computed

    def run(self, residual: Tensor | None) -> Tensor:
        """Itself, or the sum with a residual."""
        with torch.set_grad_enabled(self.differentiable):
            return self.compute(residual)

    def takes(self, residual: Tensor) -> bool:
        """Whether the sum is what torch would make of it."""
        kinds = [(type(x), x.shape, x.dtype, x.device) for x in (residual, self.like)]
        return kinds[0] == kinds[1]


class Deferred:
    """A tensor x (N, C, *X) and the transform that makes it z; never seen outside the package."""

    def __init__(
        self,
        raw: Tensor | Launch,
        prologue: Prologue = NOTHING,
        norm: Norm | None = None,
        affine: tuple[Tensor | None, Tensor | None] = (None, None),
        weight: Tensor | None = None,
        residual: Tensor | None = None,
        own: Moments | None = None,
        own_of: Activation = NOTHING.activation,
        parts: tuple[Deferred, Deferred] | None = None,
    ) -> None:
        self._raw = raw
        self.prologue = prologue
        self.norm = norm
        self.affine = affine  # gamma and beta of the norm
        self.weight = weight  # of PReLU
        self.residual = residual  # still to be added, and then nothing else is applied before it is
        self.own = own  # the moments of raw, or of `own_of` it, where they are known
        self.own_of = own_of
        self.parts = parts  # of its channels; then raw is that of the first, and nothing is pending
        self._z: Tensor | None = None
        self._own_of_z: Moments | None = None
        self._stand_in: StandIn | None = None

    @property
    def raw(self) -> Tensor:
        """x; computed now, if it has waited."""
        if isinstance(self._raw, Launch):
            self._raw = self._raw.run(None)
        return self._raw

    @property
    def image(self) -> Tensor:
        """A tensor of its shape and kind, whose values are not to be read."""
        if isinstance(self._raw, Launch):
            return self._raw.like
        if self.parts is None:
            return self._raw
        n, c, *size = self._raw.shape
        return self._raw.new_empty(()).expand(n, c + self.parts[1].shape[1], *size)

    @property
    def shape(self) -> torch.Size:
        return self.image.shape

    @property
    def voxels(self) -> int:
        """How many there are in a channel of a sample."""
        return math.prod(self.raw.shape[2:])

    @property
    def has_activation(self) -> bool:
        return self.prologue.activation.name != "identity"

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to be added or concatenated first."""
        return self.residual is None and self.parts is None

    @property
    def _is_raw(self) -> bool:
        """Whether z is x."""
        return self.prologue.is_identity() and self.is_settled

    def leading(self, channels: int) -> Tensor:
        """The first channels of z; of two images, that is the first one, if it has so many."""
        if self.parts is not None and self.parts[0].shape[1] == channels:
            return self.parts[0].z()
        return self.z()[:, :channels]

    def plus(self, residual: Tensor) -> Deferred:
        """The sum with a tensor of the same shape; computed with what is read next."""
        x = self.settled()
        if isinstance(x._raw, Launch) and x.prologue.is_identity() and x._raw.takes(residual):
            return Deferred(x._raw.run(residual))
        if x._z is not None or x._is_raw:
            return Deferred(x.z(), residual=residual)
        out = Deferred(x.raw, x.prologue, x.norm, x.affine, x.weight, residual)
        out._stand_in = x._standing_in()  # one node, whoever reads
        return out

    def settled(self) -> Deferred:
        """Itself, with nothing to be added or concatenated."""
        return self if self.is_settled else Deferred(self.z())

    def scaled(self, factor: Tensor) -> Deferred:
        """Channels multiplied by a factor (N, C) that needs no gradient, as dropout does."""
        if not self.is_settled:
            return self.settled().scaled(factor)
        s1, t1, act, slope, s2, t2 = self.prologue
        norm = self.norm
        if norm is not None and norm.outer == self.has_activation:  # and so comes last
            norm = norm.scaled(factor)
        zero = torch.zeros_like(factor)
        if self.has_activation:
            s2, t2 = (factor, zero) if s2 is None or t2 is None else (s2 * factor, t2 * factor)
        else:
            s1, t1 = (factor, zero) if s1 is None or t1 is None else (s1 * factor, t1 * factor)
        return self._next(Prologue(s1, t1, act, slope, s2, t2), norm)

    def activated(self, activation: Activation, weight: Tensor | None = None) -> Deferred:
        """The activation applied; `weight` (C,) or (1,) is what PReLU learns."""
        if activation.name == "identity":
            return self
        if self.has_activation or not self.is_settled:
            return Deferred(self.z()).activated(activation, weight)
        slope = None
        if weight is not None:
            n, c = self.raw.shape[:2]
            slope = weight.detach().to(table_dtype(self.raw)).expand(n, c).contiguous()
        s1, t1, *_, s2, t2 = self.prologue
        prologue = Prologue(s1, t1, activation, slope, s2, t2)
        return self._next(prologue, self.norm, weight=weight)

    def normalized(
        self,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        pool: Pool,
        fixed: Moments | None = None,
        track: Callable[[Moments, Any], None] | None = None,
    ) -> Deferred:
        """The norm applied, with the statistics of z pooled by `pool`, or with `fixed` ones (C,).

        `track` is told the pooled statistics, and the factor that makes their variances unbiased.
        """
        if self.norm is not None or not self.is_settled:
            x = self._with_moments() if fixed is None else Deferred(self.z())
            return x.normalized(gamma, beta, eps, pool, fixed, track)
        s1, t1, act, slope, s2, _ = self.prologue
        before = s2 if self.has_activation else s1
        with torch.no_grad():
            if fixed is not None:
                n, table = self.raw.shape[0], table_dtype(self.raw)
                own = Moments(*(one.to(table).repeat(n, 1) for one in fixed))
                pool = Pool("fixed")
            elif self.own is not None and self._is_own_of_what_is_pending():
                own = self.own
            else:
                inner = Prologue(s1, t1, act, slope) if self.has_activation else NOTHING
                own = ops.moments(self.raw, inner)
            tables, found, unbiased = standardize(own, before, gamma, beta, eps, pool, self.voxels)
            mean, _, rstd, scale, shift = tables.unbind()
            if track is not None:
                track(found, unbiased)
            norm = Norm(mean, rstd, own.mean, before, None, pool, self.has_activation)
        if self.has_activation:
            prologue = Prologue(s1, t1, act, slope, scale, shift)
        else:
            prologue = Prologue(scale, shift)
        return self._next(prologue, norm, affine=(gamma, beta))

    def handle(self) -> Tensor:
        """What stands for z in the graph, and is x in memory."""
        stand_in = self._standing_in()
        stand_in.is_summed[0] = False
        return stand_in.z

    def handles(self) -> tuple[Tensor, Tensor | None]:
        """`handle`, for a reader that also returns what `reference.prologue_sums` makes of its
        gradient of z: as that of the second tensor, of which the first two are wanted (2, N, C).

        There is none where nobody wants sums.
        """
        stand_in = self._standing_in()
        return stand_in.z, stand_in.sums

    def _standing_in(self) -> StandIn:
        if self._stand_in is None:
            gamma, beta = self.affine
            given = (self.raw, gamma, beta, self.weight)
            needs = torch.is_grad_enabled() and not self.prologue.is_identity()
            if needs and any(t is not None and t.requires_grad for t in given):
                norm = (None,) * len(Norm._fields) if self.norm is None else self.norm
                is_summed = [self.norm is not None and not torch.compiler.is_compiling()]
                z, sums = Pending.apply(*given, *flat(self.prologue), *norm, is_summed)  # type: ignore[misc]
                self._stand_in = StandIn(z, sums if is_summed[0] else None, is_summed)
            else:
                self._stand_in = StandIn(self.raw)
        return self._stand_in

    def _is_own_of_what_is_pending(self) -> bool:
        """Whether the known moments are of the value that a norm would now look at."""
        s1, _, activation, slope, _, _ = self.prologue
        if activation != self.own_of:
            return False
        return not self.has_activation or (s1 is None and slope is None)

    def z(self) -> Tensor:
        """z itself, computed once."""
        if self._is_raw:
            return self.raw
        if self._z is not None:
            return self._z
        if self.parts is not None:
            self._z = torch.cat([part.z() for part in self.parts], 1)
        elif self.prologue.is_identity():
            self._z = self.raw + self.residual  # type: ignore[operator]
        else:
            self._z = Materialize.apply(self.handle(), *flat(self.prologue), self.residual)
        return self._z  # type: ignore[return-value]

    def _with_moments(self) -> Deferred:
        """z, and its moments from the same pass, if it has not been computed yet."""
        if self._z is None and self.parts is None:
            given = (self.handle(), *flat(self.prologue), self.residual)
            self._z, *own = MaterializeMoments.apply(*given)  # type: ignore[misc]
            self._own_of_z = Moments(*own)
        return Deferred(self.z(), own=self._own_of_z)

    def _next(self, prologue: Prologue, norm: Norm | None, **changes: Any) -> Deferred:
        now = {"affine": self.affine, "weight": self.weight, **changes}
        now |= {"own": self.own, "own_of": self.own_of}
        return Deferred(self.raw, prologue, norm, **now)


def defer(x: Tensor | Deferred) -> Deferred:
    """A tensor with nothing pending; a `Deferred` as it is."""
    return x if isinstance(x, Deferred) else Deferred(x)


def materialize(x: Tensor | Deferred, residual: Tensor | None = None) -> Tensor:
    """z, perhaps with a residual added in the same pass; a tensor as it is."""
    if residual is not None:
        return defer(x).plus(residual).z()
    return x if isinstance(x, Tensor) else x.z()


def join(first: Deferred, *others: Deferred) -> Deferred:
    """Images of one size whose channels are still to be concatenated, where two can be read as one.

    Torch concatenates what differs in dtype, device or kind, and all others but the first.
    """
    second = others[0] if len(others) == 1 else Deferred(torch.cat([x.z() for x in others], 1))
    parts = first.settled(), second.settled()
    if len({(type(x.raw), x.raw.dtype, x.raw.device) for x in parts}) > 1:
        return Deferred(torch.cat([x.z() for x in parts], 1))
    return Deferred(parts[0].raw, parts=parts)
