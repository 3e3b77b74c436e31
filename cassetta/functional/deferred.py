"""Tensors whose norm, dropout and activation are still to be applied.

Between two convolutions, every chain of norm, channel dropout and activation amounts to

    z = s2 act(s1 x + t1) + t2          scales and shifts per sample and channel

so x travels as it left the convolution, together with what is pending, and whoever reads it applies
the rest while it reads. Only x is kept for backward.

In the graph of autograd a `Deferred` stands for z: all who read it return the gradient of z, which
for most is at hand (that of a sum is the gradient itself, that of a convolution is what cuDNN
returns). Where they meet, one node, `_Pending`, turns the gradient of z into that of x, of gamma
and beta, and, through the statistics of the norm, of every voxel that they were computed from. In
memory that node returns x itself: what stands for z in the graph is x in memory.

A chain holds one activation and one norm; a second one finds the first applied (`materialize`).
Sums and concatenations are pending, too: whoever reads next computes them, if it must.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.norm import Norm, Pool, standardize
from cassetta.kernels import ops
from cassetta.kernels.types import NOTHING, Activation, Moments, Prologue, flat, unflat


class Deferred:
    """A tensor x (N, C, *X) and the transform that makes it z; never seen outside the package."""

    def __init__(
        self,
        raw: Tensor,
        prologue: Prologue = NOTHING,
        norm: Norm | None = None,
        affine: tuple[Tensor | None, Tensor | None] = (None, None),
        weight: Tensor | None = None,
        residual: Tensor | None = None,
        own: Moments | None = None,
        own_of: Activation = NOTHING.activation,
        parts: tuple[Deferred, Deferred] | None = None,
    ) -> None:
        self.raw = raw
        self.prologue = prologue
        self.norm = norm
        self.affine = affine  # gamma and beta of the norm
        self.weight = weight  # of PReLU
        self.residual = residual  # still to be added, and then nothing else is applied before it is
        self.own = own  # the moments of raw, or of `own_of` it, where they are known
        self.own_of = own_of
        self.parts = parts  # of its channels; then raw is that of the first, and nothing is pending
        is_z = prologue.is_identity and residual is None and parts is None
        self._z: Tensor | None = raw if is_z else None
        self._own_of_z: Moments | None = None
        self._stand_in = _StandIn(raw) if prologue.is_identity else None

    @property
    def shape(self) -> torch.Size:
        n, c, *size = self.raw.shape
        return torch.Size((n, c + (self.parts[1].shape[1] if self.parts else 0), *size))

    @property
    def image(self) -> Tensor:
        """A tensor of its shape and kind, whose values are not to be read."""
        return self.raw if self.parts is None else self.raw.new_empty(()).expand(self.shape)

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

    def leading(self, channels: int) -> Tensor:
        """The first channels of z; of two images, that is the first one, if it has so many."""
        if self.parts is not None and self.parts[0].shape[1] == channels:
            return self.parts[0].z()
        return self.z()[:, :channels]

    def plus(self, residual: Tensor) -> Deferred:
        """The sum with a tensor of the same shape; computed with what is read next."""
        x = self.settled()
        if x._z is not None:
            return Deferred(x._z, residual=residual)
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
            norm = norm._replace(after=factor if norm.after is None else norm.after * factor)
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
            slope = weight.detach().to(_table_dtype(self.raw)).expand(n, c).contiguous()
        prologue = self.prologue._replace(activation=activation, slope=slope)
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
                n, table = self.raw.shape[0], _table_dtype(self.raw)
                own = Moments(*(one.to(table).repeat(n, 1) for one in fixed))
                pool = Pool("fixed")
            elif self.own is not None and self._is_own_of_what_is_pending():
                own = self.own
            else:
                inner = self.prologue if self.has_activation else Prologue()
                own = ops.moments(self.raw, inner._replace(s2=None, t2=None))
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

    def _standing_in(self) -> _StandIn:
        if self._stand_in is None:
            gamma, beta = self.affine
            given = (self.raw, gamma, beta, self.weight)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
                norm = (None,) * len(Norm._fields) if self.norm is None else self.norm
                is_summed = [self.norm is not None and not torch.compiler.is_compiling()]
                z, sums = _Pending.apply(*given, *flat(self.prologue), *norm, is_summed)  # type: ignore[misc]
                self._stand_in = _StandIn(z, sums if is_summed[0] else None, is_summed)
            else:
                self._stand_in = _StandIn(self.raw)
        return self._stand_in

    def _is_own_of_what_is_pending(self) -> bool:
        """Whether the known moments are of the value that a norm would now look at."""
        s1, _, activation, slope, _, _ = self.prologue
        if activation != self.own_of:
            return False
        return not self.has_activation or (s1 is None and slope is None)

    def z(self) -> Tensor:
        """z itself, computed once."""
        if self._z is None and self.prologue.is_identity and self.residual is not None:
            self._z = self.raw + self.residual
        elif self._z is None and self.parts is not None:
            self._z = torch.cat([part.z() for part in self.parts], 1)
        elif self._z is None:
            self._z = _Materialize.apply(self.handle(), *flat(self.prologue), self.residual)
        return self._z  # type: ignore[return-value]

    def _with_moments(self) -> Deferred:
        """z, and its moments from the same pass, if it has not been computed yet."""
        if self._z is None and self.parts is None:
            given = (self.handle(), *flat(self.prologue), self.residual)
            self._z, *own = _MaterializeMoments.apply(*given)  # type: ignore[misc]
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


class _Refused(Function):
    """Its first input as it is; to differentiate it, with respect to any of the others, raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Any) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the kernels of cassetta have first derivatives only: compute second derivatives "
            "within `with cassetta.use_backend('reference'):`"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a Function: what it returns cannot be differentiated, and says so.

    What it returns depends on the incoming gradients and on all that was saved, so those are what
    refuses is connected to. (`once_differentiable` looks at the incoming gradients only, and that
    of a sum is part of no graph.)
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor)]
        return tuple(_Refused.apply(g, *depends_on) if isinstance(g, Tensor) else g for g in out)

    return guarded


class _StandIn(NamedTuple):
    """What stands for z in the graph."""

    z: Tensor
    sums: Tensor | None = None  # for the sums of its gradient
    is_summed: list[bool] = [False]  # noqa: RUF012 (one value): whether all readers return them


class _Pending(Function):
    """x as it is, standing for z; backward, the gradient of z becomes that of x and parameters.

    Readers may return the sums that the norm asks for together with the gradient of z: they are
    linear in it, so those of several readers add up as it does. `is_summed` [bool] tells whether
    all of them do.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Any, beta: Any, weight: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        rest, ctx.is_summed = rest[:-1], rest[-1]
        s1, t1, name, p, q, slope, s2, t2, mean, rstd, centre, before, after, pool, outer = rest
        tables = (s1, t1, slope, s2, t2, mean, rstd, centre, before, after)
        needs_x = mean is not None or name != "identity"  # a mere factor does not
        ctx.save_for_backward(x if needs_x else None, gamma, beta, weight, *tables)
        ctx.activation = (name, p, q)
        ctx.pool, ctx.outer, ctx.nb_others = pool, bool(outer), len(rest) + 1
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_empty(2, *x.shape[:2], dtype=_table_dtype(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None) -> tuple:
        x, gamma, beta, weight, s1, t1, slope, s2, t2, mean, rstd, centre, before, after = (
            ctx.saved_tensors
        )
        x = g if x is None else x
        prologue = unflat((s1, t1, *ctx.activation, slope, s2, t2))
        to_x, to_gamma, to_beta, to_weight = ctx.needs_input_grad[:4]
        dx = dgamma = dbeta = dweight = fold = None
        voxels = math.prod(x.shape[2:])
        if mean is not None and (ctx.pool.kind != "fixed" or to_gamma or to_beta):
            norm = Norm(mean, rstd, centre, before, after, ctx.pool, ctx.outer)
            if sums is None or not ctx.is_summed[0]:
                sums = ops.prologue_sums(g, x, prologue, centre, None, ctx.outer)
            dgamma, dbeta, fold = norm.gradients(gamma, sums, voxels)
        if to_weight:  # after the norm, which has its share in the gradient of what precedes it
            outer_fold = fold if ctx.outer else None
            around = torch.zeros(x.shape[:2], dtype=_table_dtype(x), device=x.device)
            _, _, dslope = ops.prologue_sums(g, x, prologue, around, outer_fold, ctx.outer)
            dweight = dslope.sum(0) if weight.numel() > 1 else dslope.sum().reshape(1)
            dweight = dweight.to(weight.dtype)
        if to_x:
            dx = ops.prologue_dgrad(g, x, prologue, fold, ctx.outer)
        dgamma = dgamma.to(gamma.dtype) if to_gamma and dgamma is not None else None
        dbeta = dbeta.to(beta.dtype) if to_beta and dbeta is not None else None
        return dx, dgamma, dbeta, dweight, *[None] * ctx.nb_others


class _Materialize(Function):
    """z (+ residual) from what stands for it; the gradients of all three are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *prologue, residual = rest
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        return ops.materialize(x, unflat(prologue), residual, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # and so theirs, to any order
        return g, *[None] * ctx.nb_others, g if ctx.has_residual else None


class _MaterializeMoments(Function):
    """`_Materialize`, and the moments of z, whose gradient is the affair of the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *prologue, residual = rest
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        ctx.has_residual, ctx.nb_others = residual is not None, len(prologue)
        z, mean, var = ops.materialize_moments(x, unflat(prologue), residual, dtype)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, g: Tensor, *moments: Any) -> tuple:
        return _Materialize.backward(ctx, g)


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
