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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed as dist
from torch.autograd import Function

from cassetta.functional.nodes import first_order
from cassetta.functional.norm import Normalization, Pool, Running, gathered, statistics
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
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Prologue, together
from cassetta.recording import recordings


class Image(NamedTuple):
    """An image as it is read: x, and the transform that makes it z."""

    x: Tensor  # which stands for z in the graph
    prologue: Prologue = NOTHING
    sums: Tensor | None = None  # which stands for the sums of the gradient of z, if a norm asks
    centre: Tensor | None = None  # of these sums
    outer: bool = False  # they are of the value after the activation
    told: list[Any] = [False]  # noqa: RUF012 (replaced): whether all readers return sums

    def alone(self) -> Tensor:
        """Return x for a reader that returns no sums."""
        if self.told[0]:
            self.told[0] = False
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
    rounds: tuple[torch.dtype, torch.dtype] | None = None  # the weights, from and to these
    is_lost: bool = False  # the bias is not added, for the norm takes it out

    def group(self) -> Any:
        """Return the group of processes that share the statistics, if any do."""
        return None if self.norm is None else self.norm[0].process_group

    def alone(self) -> tuple[Any, ...]:
        """Return all fields but the norm: a key that held its group would keep it alive."""
        return tuple([one for one in self if one is not self.norm])

    def rounded(self, x: Any) -> Any:
        """Return a parameter of the product in the dtype in which it is multiplied."""
        return x if x is None or self.rounds is None else x.to(self.rounds[1])

    def activation(self, which: int, numbers: Sequence[float]) -> Activation:
        """Return one of the activations, with its constants."""
        return Activation(self.activations[which], *numbers[2 * which : 2 * which + 2])

    def steps(
        self, gamma: Any, beta: Any, weight: Any, factors: Sequence[Any],
        numbers: Sequence[float], running: Running | None = None,
    ) -> Steps:  # fmt: skip
        """Return the steps, with their tensors; fixed statistics are not among these."""
        norm = None
        if self.norm is not None:
            pool, is_fixed = self.norm
            fixed = _KNOWN if is_fixed else None
            norm = Normalization(gamma, beta, numbers[10], pool, fixed, running)
        return Steps(self.word, self.activation(3, numbers), weight, norm, tuple(factors))


_KNOWN: Any = ()
"""Statistics that went into the tables already."""


def beside(
    tables: tuple[Tensor | None, ...], tables2: tuple[Tensor | None, ...],
    epilogue: tuple[Tensor | None, ...], prepared: Tables, factors: tuple[Tensor | None, ...],
    own: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """List the tables that a node is given beside what it may differentiate.

    Parameters
    ----------
    tables, tables2 : tuple
        Of the images that are read: s1, t1, slope, s2, t2, and the centre of the sums.
    epilogue : tuple
        s1, t1, slope, s2, t2 of what leaves with the product.
    own : tuple
        The moments of x, where they are known.
    """
    return (*tables, *tables2, *epilogue, *prepared, *factors, *own)


_TABLES, _FACTORS = 17, 17 + len(Tables._fields)  # where they begin among these
_BESIDE = _FACTORS + 5


def compute(
    plan: Plan, numbers: tuple[float, ...], inputs: Sequence[Any], tensors: Sequence[Any],
    running: Running | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Compute y, room that stands for its sums, and what its norm amounts to, or else its moments.

    What a norm amounts to is returned if it depends on y: `standardize` says what that is. Last
    come the rounded weights, if they are rounded here. Running statistics are updated in the end:
    what is raised before has changed nothing. What processes share is exchanged between two
    recordings, so that whatever becomes of these, it is exchanged once.

    Parameters
    ----------
    numbers : tuple
        Those of the activations, and eps: a compiler may have them open.
    inputs : sequence
        x, x2, w, b, residual, gamma, beta, weight, as far as they are there.
    tensors : sequence
        As `beside` lists them.
    """
    begin, end = partial(_begun, plan, numbers), partial(_ended, plan, numbers, running)
    group, rest = plan.group(), (inputs[3], *inputs[5:], *tensors[_TABLES:])
    if group is None:
        y, out, w, *own = begin(*inputs, *tensors)
        return y, out, *end(y, *own, None, *rest), w
    run, key = recordings.run, (plan.alone(), numbers)
    y, out, w, *own, sent = run(("begun", key), begin, (*inputs, *tensors))
    found = run(("ended", key), end, (y, *own, gathered(sent, group), *rest))
    return y, out, *found, w


def _begun(plan: Plan, numbers: tuple[float, ...], *given: Any) -> tuple[Any, ...]:
    """Compute y, room for its sums, rounded weights, its moments, and what other processes get."""
    x, x2, w, b, r, gamma, beta, weight, *tensors = given
    prepared, own = Tables(*tensors[_TABLES:_FACTORS]), None
    steps = plan.steps(gamma, beta, weight, tensors[_FACTORS : _FACTORS + 3], numbers)
    if tensors[-1] is not None:
        own = Moments(*tensors[-2:])  # type: ignore[arg-type]
    y, w, b = x, plan.rounded(w), None if plan.is_lost else plan.rounded(b)
    if plan.product is not None:
        assert w is not None
        p, p2, epilogue = (
            together(tensors[start : start + 5], plan.activation(which, numbers))
            for which, start in enumerate((0, 6, 12))
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
    out = layout.tables(y, 2) if plan.is_summed else None
    kept = None if plan.rounds is None else w
    if plan.group() is not None:
        own = statistics(y, steps.inner(prepared), own, prepared.before)
    return y, out, kept, *((None, None) if own is None else own)


def _ended(
    plan: Plan, numbers: tuple[float, ...], running: Running | None, y: Tensor, mean: Any, var: Any,
    every: Any, b: Any, gamma: Any, beta: Any, weight: Any, *tables: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Compute what the norm amounts to; or else return the moments."""
    n = len(Tables._fields)
    steps = plan.steps(gamma, beta, weight, tables[n : n + 3], numbers, running)
    if steps.are_known():
        return mean, var, None
    own = None if mean is None else Moments(mean, var)
    found = normalized(y, steps, Tables(*tables[:n]), own, every)
    if plan.is_lost and running is not None:
        running.move(b.to(y.dtype))
    return found


def saved(
    plan: Plan, inputs: Sequence[Any], tensors: Sequence[Any], y: Any, found: Sequence[Any]
) -> tuple[Any, ...]:
    """List what a node keeps for its backward, tables last; some of it is None.

    Parameters
    ----------
    inputs : sequence
        Those of `compute`, with the rounded weights in the place of the weights.
    found : sequence
        What `compute`, of the same inputs and tensors, has found beside y and its sums.
    """
    x, x2, w, _, _, gamma, _, weight = inputs
    tables = Tables(*tensors[_TABLES:_FACTORS])
    if plan.norm is not None and not plan.norm[1]:
        tables = completed(tables, plan.word, found)
    return (
        None if plan.product is None else x, x2, w,
        y if plan.word else None,  # a mere factor asks for no image
        gamma, weight, *tensors[:12], *tables, *tensors[_FACTORS : _FACTORS + 3],
    )  # fmt: skip


class Compiled(Function):
    """The node as compilers see it: (plan, inputs of `compute`, tensors, numbers) to (y, *found).

    All that it returns is a result of it, and no reader returns sums; weights come rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, x2: Any, w: Any, b: Any, r: Any, gamma: Any, beta: Any,
        weight: Any, *rest: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        inputs = x, x2, w, b, r, gamma, beta, weight
        tensors, numbers = rest[:_BESIDE], rest[_BESIDE:]
        y, _, *found, _ = compute(plan, numbers, inputs, tensors)
        ctx.save_for_backward(*saved(plan, inputs, tensors, y, found))
        ctx.given = plan, numbers
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(one for one in found if one is not None))
        return y.view_as(y) if plan.product is None else y, *found

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *found: Any) -> tuple:
        plan, numbers = ctx.given
        x, x2, *others = ctx.needs_input_grad[1:9]
        back = Backward(plan, numbers, (x, False, x2, False, *others), (False, False))
        dx, _, dx2, _, *grads = back.compute(g, None, *ctx.saved_tensors)
        return None, dx, dx2, *grads, *[None] * (_BESIDE + len(numbers))


class Backward(NamedTuple):
    """All that the backward of a node does, but for the tensors it does it to."""

    plan: Plan
    numbers: tuple[float, ...]
    needs: tuple[bool, ...]  # of x, its sums, x2, its sums, w, b, residual, gamma, beta, weight
    reads_sums: tuple[bool, bool]

    def compute(
        self, g: Tensor, sums: Tensor | None, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed, given that of y, of its sums, and what was saved.

        In the order of `needs`. Autograd rounds those of a bias and beta, which were not saved.
        """
        group = self.plan.group()
        if group is None:
            return self._compute(g, sums, None, *saved)
        key = "shared", self.plan.alone(), self.numbers, self.needs, self.reads_sums
        own, total = recordings.run(key, self._compute, (g, sums, None, *saved))
        dist.all_reduce(total, group=group)
        return recordings.run(key, self._compute, (g, own, total, *saved))

    def _compute(
        self, g: Tensor, sums: Tensor | None, total: Tensor | None, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients; or, of a shared norm without `total`, what is to be added up."""
        plan, numbers, needs, reads_sums = self
        x, x2, w, kept, gamma, weight, *rest = saved
        n = 12 + len(Tables._fields)
        one, two, tables, factors = rest[:6], rest[6:12], Tables(*rest[12:n]), tuple(rest[n:])
        steps = plan.steps(gamma, None, weight, factors, numbers)
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
            found = gradients(g, sums, image, steps, tables, wanted, total)
            if plan.group() is not None and total is None:
                return found
            dy, *grads[7:], grads[5] = found
        if plan.product is None:
            grads[0] = dy
        elif to_y:
            assert x is not None
            assert w is not None
            images = [(x, p, one[5] if reads_sums[0] else None)]
            if x2 is not None:
                images.append((x2, p2, two[5] if reads_sums[1] else None))
            dbias = grads[5]
            to_b = needs[5] and dbias is None
            asked = (needs[0] or needs[1], needs[2] or needs[3], needs[4], to_b)
            if any(asked):
                grads[:6] = _through_product(plan, dy, images, w, asked)
            grads[5] = grads[5] if to_b else dbias
            grads[6] = dy
        dtypes = [None if one is None else one.dtype for one in (w, None, gamma, weight)]
        if plan.rounds is not None:
            dtypes[:2] = plan.rounds[0], plan.rounds[0]
        for place, dtype in zip((4, 5, 7, 9), dtypes, strict=True):
            grad = grads[place]
            if grad is not None and dtype is not None:
                grads[place] = grad.to(dtype)
        return tuple([grad if needs[n] else None for n, grad in enumerate(grads)])


def _through_product(
    plan: Plan, g: Tensor, images: Sequence[tuple[Tensor, Prologue, Tensor | None]], w: Tensor,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of either image and its sums, of w and a bias, as far as needed.

    An image comes with its pending transform, and with a centre if sums of its gradient are asked
    for. Two are read one after the other, so that no operand is as large as both; or as one, where
    the engine says that this is quicker.
    """
    engine, geometry, transposed = plan.product  # type: ignore[misc]
    run, (x, p, _) = ENGINES[engine], images[0]
    to_w, to_b = needs[2:]
    grads: list[Tensor | None] = [None] * 6
    with recordings.unrounded(g):
        if transposed:
            asked = needs[0], to_w, to_b
            grads[0], *grads[4:] = run.transposed_bprop(g, x, p, w, geometry, asked)
            return grads
        if len(images) == 2 and needs[0] == needs[1] and run.joins(g):
            x2, p2, _ = images[1]
            grads[0], grads[2], *grads[4:] = run.joined_bprop(
                g, x, p, x2, p2, w, geometry, (needs[0], to_w, to_b)
            )
            return grads
        start, shares = 0, []
        for n, (x, p, centre) in enumerate(images):
            part = w if len(images) == 1 else w[:, start : start + x.shape[1]]
            start += x.shape[1]
            asked = needs[n], to_w, to_b and n == 0
            if not any(asked):
                continue
            *found, dw, db = run.bprop(g, x, p, part, geometry, asked, centre, plan.outer[n])
            grads[2 * n : 2 * n + 2] = found
            shares.append(dw)
            grads[5] = db if n == 0 else grads[5]
        grads[4] = shares[0] if len(shares) == 1 or not to_w else torch.cat(shares, 1)
    return grads
