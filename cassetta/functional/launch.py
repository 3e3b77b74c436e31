"""How a convolution and the steps that follow it are computed, once it is known what they are.

What of the steps leaves with the product depends on its engine, and on whether a gradient is asked
for: in inference all that is known beforehand, in training an activation whose result tells its
slope, and the moments that a norm asks for. The rest is pending.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.functional import sites
from cassetta.functional.block import Compiled, Image, Plan, Product, beside, compute
from cassetta.functional.steps import Steps, completed, prepared
from cassetta.kernels import activations
from cassetta.kernels.engines import ENGINES
from cassetta.kernels.types import NOTHING, Activation, Moments, Prologue, apart
from cassetta.recording import recordings

APART = 2**24
"""Elements of an image from which on a convolution and the steps after it are two nodes.

One node is quicker for the host. Two release the gradient of z, and what the steps keep, before the
gradients of the convolution are computed, so that the peak of memory is lower; and on so large an
image the host has time. A compiler sees one: it knows by itself what is alive.
"""


class Launch(NamedTuple):
    """A convolution that waits until it is known what follows it."""

    product: Product
    first: Image
    second: Image | None  # whose channels are further ones
    weight: Tensor
    bias: Tensor | None
    like: Tensor  # of the shape and kind of its result, without values: weights are rounded to that
    differentiable: bool  # as the caller asked for it, whatever is asked for when it is computed
    by_result: bool  # of an activation that is told by its result, that alone is kept
    owner: Any  # the module that convolves
    epilogue: Prologue = NOTHING  # of the product, before the residual
    residual: Tensor | None = None

    def takes(self, residual: Tensor, steps: Steps) -> bool:
        """Tell whether the product adds a residual after these steps, as torch would.

        The gradient of what it is added to is then its own: in training, nothing comes before it.
        """
        kinds = [(type(x), x.shape, x.dtype, x.device) for x in (residual, self.like)]
        early = steps.are_none() or (not self.differentiable and steps.are_known())
        return self._fuses() and early and self.residual is None and kinds[0] == kinds[1]

    def plus(self, residual: Tensor | None, steps: Steps) -> Launch:
        """Return it with steps that leave with the product, and a residual that is added then."""
        epilogue = prepared(self.like, steps).prologue(steps.activation)
        return self._with(epilogue, residual, self.bias)

    def run(self, steps: Steps, sums: bool) -> Image:
        """Compute it, and what the steps that follow amount to; `sums`: as `Deferred.read`."""
        if self.differentiable != torch.is_grad_enabled():
            with torch.set_grad_enabled(self.differentiable):
                return self.run(steps, sums)
        launch, steps = self._folded(steps)
        by_result, is_transposed = launch.by_result and steps.are_told(), launch.product.transposed
        leaves = by_result and launch._fuses() and not is_transposed
        leaves = leaves and steps.factors[0] is None and launch.residual is None
        of = None if is_transposed else steps.moments_of()
        is_one = torch.compiler.is_compiling() or launch.like.numel() < APART
        if is_one and (by_result or steps.are_none()) and launch._is_plain(steps):
            return launch._plain(steps)
        if leaves:
            launch = launch._with(Prologue(activation=steps.activation), None, launch.bias)
        bias, flags = launch.bias, (by_result, leaves, sums)
        # to torch's convolutions, a bias is a pass
        is_lost = bias is not None and ENGINES[self.product.engine].IS_TORCH and steps.take_out()
        if is_one or steps.are_none():
            return _node(launch, launch.first, steps, None, of, flags, None, is_lost)[0]
        if bias is not None and steps.word[:1] == "n" and not steps.are_known():
            # its gradient follows from what the norm asks for
            added = None if is_lost else bias.detach()
            launch = launch._with(launch.epilogue, launch.residual, added)
        else:
            bias = None
        y, own = _node(launch, launch.first, Steps(), None, of, (False, False, False))
        return _node(None, y, steps, own, None, flags, bias, is_lost)[0]

    def _is_plain(self, steps: Steps) -> bool:
        """Tell whether nodes of torch keep no more than ours, which is slower for the host."""
        f0, f1, _ = steps.factors
        is_whole = self.second is None and self.first.prologue.is_identity()
        return ENGINES[self.product.engine].IS_TORCH and is_whole and f0 is None and f1 is None

    def _plain(self, steps: Steps) -> Image:
        """Compute it by nodes of torch; an activation is told by its result, or there is none."""
        (engine, geometry, transposed), x = self.product, self.first.alone()
        run, given = ENGINES[engine], (*self._rounded(), geometry)
        with recordings.unrounded(x):
            if transposed:
                y = run.transposed(x, NOTHING, *given)
            else:
                y, _ = run.fprop(x, NOTHING, None, NOTHING, *given)
            if steps.word:  # (a selective checkpoint may hold what the convolution returns)
                is_held = recordings.are_results_held()
                apply = activations.apply if is_held else activations.apply_
                y = apply(y, steps.activation)
        return Image(y)

    def parameters(self, traces: bool) -> tuple[Tensor, Tensor | None, Any]:
        """Return the weights, the bias, and between which dtypes the node is to round them.

        Within the node, so that none of torch's is between it and the one before it; a compiler,
        which needs no chains, rounds them itself.
        """
        kinds = self.weight.dtype, self.like.dtype
        if traces or kinds[0] == kinds[1]:
            return *self._rounded(), None
        return self.weight, self.bias, kinds

    def _rounded(self) -> tuple[Tensor, Tensor | None]:
        """Return the parameters in the dtype of the product; `to` would be a call of a program."""
        dtype, bias = self.like.dtype, self.bias
        if self.weight.dtype == dtype:
            return self.weight, bias
        return self.weight.to(dtype), None if bias is None else bias.to(dtype)

    def _fuses(self) -> bool:
        return ENGINES[self.product.engine].FUSES

    def _with(self, epilogue: Prologue, residual: Tensor | None, bias: Tensor | None) -> Launch:
        product, first, second, weight, _, like, differentiable, by_result, owner, _, _ = self
        kind = like, differentiable, by_result, owner
        return Launch(product, first, second, weight, bias, *kind, epilogue, residual)

    def _folded(self, steps: Steps) -> tuple[Launch, Steps]:
        """Return what leaves with the product in inference, and the steps that are left."""
        if self.differentiable or self.residual is not None or not self._fuses():
            return self, steps
        if steps.are_known():
            return self.plus(None, steps), Steps()
        f0, f1, f2 = steps.factors
        if steps.word == "an":
            early = Steps("a", steps.activation, steps.weight, None, (f0, None, None))
            late = Steps("n", norm=steps.norm, factors=(f1, f2, None))
        else:
            early = Steps(factors=(f0, None, None))
            word, activation, weight, norm, _ = steps
            late = Steps(word, activation, weight, norm, (None, f1, f2))
        if early.are_none():
            return self, steps
        return self.plus(None, early), late


def transformed(x: Tensor, steps: Steps, own: Moments | None, sums: bool) -> Image:
    """Compute what steps on an image amount to; `own` are its moments, where they are known."""
    if steps.are_none():
        return Image(x)
    own = own if steps.word[:1] == "n" else None
    return _node(None, Image(x), steps, own, None, (False, False, sums))[0]


def _node(
    launch: Launch | None, x: Image, steps: Steps, own: Moments | None, of: Activation | None,
    flags: tuple[bool, bool, bool], b: Tensor | None = None, is_lost: bool = False,
) -> tuple[Image, Moments | None]:  # fmt: skip
    """Run the node of autograd, or what it computes, where nothing asks for a gradient.

    Returns moments of y if they are asked for, by `of`, and no step takes them. The flags are those
    of a plan: `by_result`, `leaves`, and `is_summed` as far as readers are concerned. Without a
    launch, x may be a sum with a bias b, of which it is no function in the graph. If `is_lost`, the
    bias is not added, for the norm takes it out.
    """
    by_result, leaves, is_summed = flags
    product = second = w = r = rounds = None
    epilogue, like, traces = NOTHING, x.x, torch.compiler.is_compiling()
    if launch is not None:
        product, second, r = launch.product, launch.second, launch.residual
        epilogue, like, (w, b, rounds) = launch.epilogue, launch.like, launch.parameters(traces)
    inputs = (x.x, None if second is None else second.x, w, b, r, *steps.parameters())
    wanted = [one for one in inputs if one is not None and one.requires_grad]
    is_node, norm = torch.is_grad_enabled() and len(wanted) > 0, steps.norm
    told: list[Any] = [is_summed and is_node and norm is not None and not traces]
    tables = prepared(like, steps)
    flags = by_result, leaves, told[0]
    plan, numbers = _plan(product, x, second, epilogue, steps, of, flags, (rounds, is_lost))
    tensors = beside(
        _tables(x),
        _tables(second),
        apart(epilogue),
        tables,
        steps.factors,
        (None, None) if own is None else own,
    )
    out = running = None
    sums = _sums(x, product), _sums(second, product)
    if not traces:
        if norm is not None and norm.pool.process_group is None:
            running = norm.running
        asked = told if is_node else None
        z, out, *found = sites.run(plan, numbers, asked, inputs, sums, tensors, running)
    elif is_node:
        z, *found = Compiled.apply(plan, *inputs, *tensors, *numbers)  # type: ignore[misc]
    else:
        with torch.no_grad():
            z, _, *found, _ = compute(plan, numbers, inputs, tensors)
    if norm is None or norm.fixed is not None:
        own = None if found[0] is None else Moments(*found[:2])  # type: ignore[arg-type]
    else:
        tables = completed(tables, steps.word, found)
        if running is None and norm.running is not None:
            with torch.no_grad():
                norm.running.update(found)
                if b is not None and is_lost:
                    norm.running.move(b.to(z.dtype))
    if by_result:
        return Image(z, _rest(steps)), None
    outer = steps.word == "an"
    image = Image(z, tables.prologue(steps.activation), out, tables.centre, outer, told)
    return image, own


def _plan(
    product: Product | None, x: Image, second: Image | None, epilogue: Prologue, steps: Steps,
    of: Activation | None, flags: tuple[bool, bool, bool],
    weights: tuple[tuple[torch.dtype, torch.dtype] | None, bool],
) -> tuple[Plan, tuple[float, ...]]:  # fmt: skip
    """Return what a node does, and the numbers that it needs (`block.compute`)."""
    p2, outer2 = (NOTHING, False) if second is None else (second.prologue, second.outer)
    own = Activation() if of is None else of
    activations = (
        x.prologue.activation, p2.activation, epilogue.activation, steps.activation, own,
    )  # fmt: skip
    # as `flat` of a prologue has them
    numbers = [float(n) for activation in activations for n in (activation.p, activation.q)]
    norm, names = steps.norm, tuple([activation.name for activation in activations])
    pooled = None if norm is None else (norm.pool, norm.fixed is not None)
    plan = Plan(
        product, (x.outer, outer2), names, steps.word, pooled, of is not None, *flags, *weights
    )
    return plan, (*numbers, 0.0 if norm is None else float(norm.eps))


def _rest(steps: Steps) -> Prologue:
    """Return what is pending on the result of an activation that was applied: a factor after it."""
    factor = steps.factors[1]
    return Prologue(factor, None if factor is None else torch.zeros_like(factor))


def _sums(image: Image | None, product: Product | None) -> Tensor | None:
    """Return what stands for the sums of an image, if the engine that reads it returns them."""
    if image is None or product is None:
        return None
    if product.transposed or not ENGINES[product.engine].FUSES:
        image.alone()
        return None
    return image.sums


def _tables(image: Image | None) -> tuple[Tensor | None, ...]:
    if image is None:
        return (None,) * 6
    return *apart(image.prologue), image.centre
