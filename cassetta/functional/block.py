"""A convolution and the transform of its result that is pending, as one node of autograd.

In the graph the node's result stands for z; in memory it is y, the result of the convolution, with
the tables of the transform that makes it z (`steps`). All who read it return the gradient of z, and
the node turns the sum of these into the gradients of the image, of the weights and of the norm. So
of each block one image is kept. Without a convolution, the node is a transform alone.

Readers may return the sums that the norm asks for together with the gradient of z: they are linear
in it, so those of several readers add up as it does, as the gradient of a second result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional import recordings
from cassetta.functional.nodes import first_order
from cassetta.functional.norm import Normalization, Pool
from cassetta.functional.steps import (
    Steps,
    Tables,
    completed,
    gradient_by_result,
    gradients,
    normalized,
)
from cassetta.kernels import layout, ops
from cassetta.kernels.engines import ENGINES
from cassetta.kernels.operands import built, summed
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Prologue, together


class Image(NamedTuple):
    """An image as it is read: x, and the transform that makes it z."""

    x: Tensor  # which stands for z in the graph
    prologue: Prologue = NOTHING
    sums: Tensor | None = None  # which stands for the sums of the gradient of z, if a norm asks
    centre: Tensor | None = None  # of these sums
    outer: bool = False  # they are of the value after the activation
    is_summed: list[bool] = [False]  # noqa: RUF012 (replaced): whether all readers return sums

    def alone(self) -> Tensor:
        """Return x for a reader that returns no sums."""
        if self.is_summed[0]:
            self.is_summed[0] = False
        return self.x


class Product(NamedTuple):
    """A convolution, but for its operands."""

    engine: str
    geometry: Geometry
    transposed: bool = False


class Plan(NamedTuple):
    """All that a node does, but for the tensors it does it to."""

    product: Product | None
    outer: tuple[bool, bool]  # whether the sums of either image are of the value after activation
    activations: tuple[str, ...]  # on either image, in the epilogue, of the steps, of the moments
    word: str  # the steps
    norm: tuple[Pool, bool] | None  # and whether its statistics are fixed
    moments: bool  # that the product leaves its moments
    by_result: bool  # the activation is applied, and its result is kept
    leaves: bool  # that activation leaves with the product
    is_summed: bool  # readers may return sums

    def activation(self, which: int, numbers: Sequence[float]) -> Activation:
        """Return one of the activations, with its constants."""
        return Activation(self.activations[which], *numbers[2 * which : 2 * which + 2])

    def steps(
        self, gamma: Any, beta: Any, weight: Any, factors: Sequence[Any], numbers: Sequence[float]
    ) -> Steps:
        """Return the steps, with their tensors; fixed statistics are not among these."""
        norm = None
        if self.norm is not None:
            pool, is_fixed = self.norm
            fixed = _KNOWN if is_fixed else None
            norm = Normalization(gamma, beta, numbers[10], pool, fixed)
        return Steps(self.word, self.activation(3, numbers), weight, norm, tuple(factors))


_KNOWN: Any = ()
"""Statistics that went into the tables already."""


class Given(NamedTuple):
    """What a node is given beside what it may differentiate."""

    tables: tuple[Tensor | None, ...]  # of the image that is read: s1, t1, slope, s2, t2, centre
    tables2: tuple[Tensor | None, ...]
    epilogue: tuple[Tensor | None, ...]  # s1, t1, slope, s2, t2
    prepared: Tables
    factors: tuple[Tensor | None, ...]
    own: tuple[Tensor | None, ...]  # moments of x, where they are known
    numbers: tuple[float, ...]  # of the activations, and eps: a compiler may have them open


def flat(given: Given) -> list[Any]:
    """Return it as arguments of a node: as it is, or in parts, which a compiler asks for."""
    if not torch.compiler.is_compiling():
        return [given]
    return [one for part in given for one in part]


def unflat(flat: Sequence[Any]) -> Given:
    """Return what `flat` was given."""
    if len(flat) == 1:
        return flat[0]
    n = 17 + len(Tables._fields)
    one, two, epilogue, found = flat[:6], flat[6:12], flat[12:17], flat[17:n]
    factors, own, numbers = flat[n : n + 3], flat[n + 3 : n + 5], flat[n + 5 :]
    last = tuple(factors), tuple(own), tuple(numbers)
    return Given(tuple(one), tuple(two), tuple(epilogue), Tables(*found), *last)


def evaluate(
    plan: Plan, inputs: Sequence[Tensor | None], given: Given
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`compute`, by its recording if there is one."""

    def again(*tensors: Any) -> Any:
        x, x2, w, b, r, gamma, beta, weight, *rest = tensors
        own = unflat([*rest, *given.numbers])
        y, found = compute(plan, x, x2, w, b, r, gamma, beta, weight, own)
        return y, *found

    if torch.compiler.is_compiling() or _is_shared(plan):
        return compute(plan, *inputs, given)  # type: ignore[arg-type]
    tensors = *inputs, *(one for part in given[:-1] for one in part)
    y, *found = recordings.run(("forward", plan, given.numbers), again, tensors)
    return y, tuple(found)  # type: ignore[return-value]


def _is_shared(plan: Plan) -> bool:
    """Tell whether other processes share the statistics: a collective is part of no recording."""
    return plan.norm is not None and plan.norm[0].process_group is not None


def compute(
    plan: Plan, x: Tensor, x2: Tensor | None, w: Tensor | None, b: Tensor | None,
    r: Tensor | None, gamma: Any, beta: Any, weight: Any, given: Given,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """Compute y, and what its norm amounts to, if that depends on y; or y, and its moments."""
    numbers = given.numbers
    steps = plan.steps(gamma, beta, weight, given.factors, numbers)
    y, own = x, None if given.own[0] is None else Moments(*given.own)  # type: ignore[arg-type]
    if plan.product is not None:
        assert w is not None
        p, p2, epilogue = (
            together(tables[:5], plan.activation(which, numbers))
            for which, tables in enumerate((given.tables, given.tables2, given.epilogue))
        )
        engine, geometry, transposed = plan.product
        run = ENGINES[engine]
        with recordings.unrounded(x):
            if transposed:
                y = run.transposed(x, p, w, b, geometry, epilogue, r)
            else:
                of = plan.activation(4, numbers) if plan.moments else None
                y, own = run.fprop(x, p, x2, p2, w, b, geometry, epilogue, r, of)
    if plan.by_result and not plan.leaves:
        f0 = steps.factors[0]
        shift = None if f0 is None else torch.zeros_like(f0)
        y = ops.materialize(y, Prologue(f0, shift, steps.activation), None, y.dtype)
    if steps.are_known():
        return y, (*((None, None) if own is None else own), *(None,) * 7)
    return y, normalized(y, steps, given.prepared, own)


class Block(Function):
    """The node: (plan, is_summed, x, its sums, x2, its sums, w, b, residual, gamma, beta, weight,
    *flat(tensors)) to (y, its sums, *what its norm amounts to)."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, is_summed: list[bool], x: Tensor, sums: Any, x2: Any, sums2: Any,
        w: Any, b: Any, r: Any, gamma: Any, beta: Any, weight: Any, *rest: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        given = unflat(rest)
        ctx.plan, ctx.is_summed, ctx.nb_others = plan, is_summed, len(rest)
        ctx.numbers = given.numbers
        ctx.reads_sums = sums is not None, sums2 is not None
        learned = w, b, gamma, beta, weight
        ctx.dtypes = tuple([None if one is None else one.dtype for one in learned])
        y, found = evaluate(plan, (x, x2, w, b, r, gamma, beta, weight), given)
        tables = given.prepared
        if plan.norm is not None and not plan.norm[1]:
            tables = completed(tables, plan.word, found)
        # a mere factor asks for no image
        kept = y if plan.word else None
        ctx.save_for_backward(
            None if plan.product is None else x, x2, w, b, kept, gamma, beta, weight,
            *given.tables, *given.tables2, *tables, *given.factors,
        )  # fmt: skip
        ctx.mark_non_differentiable(*(one for one in found if one is not None))
        ctx.set_materialize_grads(False)
        out = layout.tables(y, 2) if plan.is_summed else None
        return y.view_as(y) if plan.product is None else y, out, *found

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None = None, *found: Any) -> tuple:
        sums = sums if ctx.is_summed[0] else None
        back = Backward(
            ctx.plan, ctx.numbers, tuple(ctx.needs_input_grad[2:12]), ctx.reads_sums, ctx.dtypes
        )
        tensors = g, sums, *ctx.saved_tensors
        if torch.compiler.is_compiling() or _is_shared(ctx.plan):
            grads = back.compute(*tensors)
        else:
            grads = recordings.run(("backward", back), back.compute, tensors)
        return None, None, *grads, *[None] * ctx.nb_others


class Backward(NamedTuple):
    """All that the backward of a node does, but for the tensors it does it to."""

    plan: Plan
    numbers: tuple[float, ...]
    needs: tuple[bool, ...]  # of x, its sums, x2, its sums, w, b, residual, gamma, beta, weight
    reads_sums: tuple[bool, bool]
    dtypes: tuple[torch.dtype | None, ...]  # of w, b, gamma, beta, weight

    def compute(
        self, g: Tensor, sums: Tensor | None, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed, given that of y, of its sums, and what was saved.

        In the order of `needs`.
        """
        plan, numbers, needs, reads_sums, dtypes = self
        x, x2, w, b, kept, gamma, beta, weight, *rest = saved
        n = 12 + len(Tables._fields)
        one, two, tables, factors = rest[:6], rest[6:12], Tables(*rest[12:n]), tuple(rest[n:])
        steps = plan.steps(gamma, beta, weight, factors, numbers)
        p, p2 = (together(one[:5], plan.activation(n, numbers)) for n, one in enumerate((one, two)))
        to_y = needs[0] if plan.product is None else any(needs[:7])
        dy: Any = g
        grads: list[Tensor | None] = [None] * 10
        if plan.by_result:
            assert kept is not None
            dy = gradient_by_result(g, kept, steps) if to_y else None
        elif not steps.are_none():
            image = g if kept is None else kept
            wanted = to_y, needs[7], needs[8], needs[9]
            dy, *grads[7:] = gradients(g, sums, image, steps, tables, wanted)
        if plan.product is None:
            grads[0] = dy
        elif to_y:
            assert x is not None
            assert w is not None
            images = [(x, p, one[5] if reads_sums[0] else None)]
            if x2 is not None:
                images.append((x2, p2, two[5] if reads_sums[1] else None))
            asked = (needs[0] or needs[1], needs[2] or needs[3], *needs[4:6])
            grads[:6] = _through_product(plan, dy, images, w, b, asked)
            grads[6] = dy
        for place, dtype in zip((4, 5, 7, 8, 9), dtypes, strict=True):
            grad = grads[place]
            grads[place] = None if grad is None or not needs[place] else grad.to(dtype)
        grads[6] = grads[6] if needs[6] else None
        return tuple(grads)


def _through_product(
    plan: Plan, g: Tensor, images: Sequence[tuple[Tensor, Prologue, Tensor | None]], w: Tensor,
    b: Tensor | None, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of either image and of its sums, of w and b, as far as they are needed.

    An image comes with its pending transform, and with a centre if sums of its gradient are asked
    for. Two are read one after the other, so that no operand is as large as both.
    """
    engine, geometry, transposed = plan.product  # type: ignore[misc]
    run, (x, p, _) = ENGINES[engine], images[0]
    to_w, to_b = needs[2:]
    grads: list[Tensor | None] = [None] * 6
    with recordings.unrounded(g):
        if transposed:  # as of the convolution whose image is g, and whose gradient z
            if to_w:
                z = built(x, p, w.dtype)
                grads[4], _ = run.wgrad(z, g, NOTHING, w, None, geometry, (True, False))
            if to_b:
                grads[5] = summed(g)
            if needs[0]:
                grads[0], _ = run.fprop(g, NOTHING, None, NOTHING, w, None, geometry)
            return grads
        start, shares = 0, []
        for n, (x, p, centre) in enumerate(images):
            part = w if len(images) == 1 else w[:, start : start + x.shape[1]]
            start += x.shape[1]
            asked = needs[n], to_w, to_b and n == 0
            if not any(asked):
                continue
            *found, dw, db = run.bprop(g, x, p, part, b, geometry, asked, centre, plan.outer[n])
            grads[2 * n : 2 * n + 2] = found
            shares.append(dw)
            grads[5] = db if n == 0 else grads[5]
        grads[4] = shares[0] if len(shares) == 1 or not to_w else torch.cat(shares, 1)
    return grads
