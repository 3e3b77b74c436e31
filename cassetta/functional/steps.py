"""Steps between two convolutions, norm, channel dropout and activation, as one transform.

Every chain of at most one norm and one activation, with dropout anywhere, amounts to

    z = s2 act(s1 x + t1) + t2          scales and shifts (N, C)

`Steps` says what is to be done to an image, `prepared` and `normalized` find those tables, and
`gradients` turns the gradient of z into those of x and of the parameters, in two passes over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cassetta.functional.norm import Normalization, norm_gradients, standardize
from cassetta.kernels import ops
from cassetta.kernels.activations import BY_RESULT, told_by_result
from cassetta.kernels.types import NOTHING, Activation, Moments, Prologue


class Steps(NamedTuple):
    """What is to be done to an image."""

    word: str = ""  # in which order: n, a norm, and a, an activation
    activation: Activation = Activation()  # immutable
    weight: Tensor | None = None  # (C,) or (1,), of PReLU
    norm: Normalization | None = None
    factors: tuple[Tensor | None, ...] = (None, None, None)  # (N, C), after so many letters

    def are_none(self) -> bool:
        """Tell whether nothing is to be done."""
        return not self.word and self.factors[0] is None

    def scaled(self, factor: Tensor) -> Steps:
        """Add a multiplication of channels by a factor (N, C) without gradient, as dropout does."""
        n, found = len(self.word), list(self.factors)
        before = found[n]
        found[n] = factor if before is None else before * factor
        word, activation, weight, norm, _ = self  # (torch 2.8 traces no `_replace`)
        return Steps(word, activation, weight, norm, tuple(found))

    def activated(self, activation: Activation, weight: Tensor | None) -> Steps:
        """Add an activation."""
        return Steps(self.word + "a", activation, weight, self.norm, self.factors)

    def normalized(self, norm: Normalization) -> Steps:
        """Add a norm."""
        return Steps(self.word + "n", self.activation, self.weight, norm, self.factors)

    def are_known(self) -> bool:
        """Tell whether no statistics are to be computed first."""
        return self.norm is None or self.norm.fixed is not None

    def are_told(self) -> bool:
        """Tell whether the result of the activation is all that its gradient needs."""
        return self.word == "a" and told_by_result(self.activation)

    def take_out(self) -> bool:
        """Tell whether they take out what is added to each channel: by a norm of whole channels, to
        whose values nothing is done before; of this process alone, for others may add another."""
        norm = self.norm
        if norm is None or norm.fixed is not None or self.factors[0] is not None:
            return False
        kind, _, group = norm.pool
        return self.word[0] == "n" and kind in ("batch", "instance") and group is None

    def moments_of(self) -> Activation | None:
        """Name the function of an image whose moments its norm needs; None for none.

        A factor before an activation, and what PReLU learns, are not known to a product.
        """
        if self.are_known():
            return None
        if self.word[0] == "n":
            return Activation()
        is_plain = self.factors[0] is None and self.activation.name != "prelu"
        return self.activation if is_plain else None

    def inner(self, tables: Tables) -> Prologue:
        """Return what precedes the norm."""
        return NOTHING if self.word[0] == "n" else tables.prologue(self.activation)

    def parameters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return gamma, beta and the weight of PReLU, which may need gradients."""
        norm = self.norm
        return (None, None, self.weight) if norm is None else (norm.gamma, norm.beta, self.weight)


class Tables(NamedTuple):
    """What steps amount to: tables (N, C), each of which may be absent."""

    s1: Tensor | None = None
    t1: Tensor | None = None
    slope: Tensor | None = None
    s2: Tensor | None = None
    t2: Tensor | None = None
    mean: Tensor | None = None  # of the norm, as it is pooled
    rstd: Tensor | None = None
    centre: Tensor | None = None  # of the sums that its gradient asks for
    before: Tensor | None = None  # a factor before the norm
    after: Tensor | None = None  # a factor after it

    def prologue(self, activation: Activation) -> Prologue:
        """Return the transform that makes z."""
        return Prologue(self.s1, self.t1, activation, self.slope, self.s2, self.t2)


_NO_TABLES = Tables()


def prepared(x: Tensor, steps: Steps) -> Tables:
    """Find what steps on an image x (N, C, *X) amount to, but for what depends on its values."""
    _, _, weight, norm, (f0, f1, f2) = steps
    is_open = norm is None or norm.fixed is None
    if is_open and weight is None and f0 is None and f1 is None and f2 is None:
        return _NO_TABLES
    with torch.no_grad():
        return _prepared(x, steps)


def _prepared(x: Tensor, steps: Steps) -> Tables:
    word, _, weight, norm, factors = steps
    n, c = x.shape[:2]
    slope = before = after = None
    if weight is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        slope = weight.detach().to(dtype).expand(n, c).contiguous()
    place = word.find("n")
    if norm is not None:
        before, after = factors[place : place + 2]
    s1, t1 = _affine(None if place == 0 else factors[0])
    s2, t2 = _affine(factors[2] if word == "na" else factors[1] if word == "a" else None)
    tables = Tables(s1, t1, slope, s2, t2, before=before, after=after)
    if norm is None or norm.fixed is None:
        return tables
    return completed(tables, word, normalized(x, steps, tables, None))


def _affine(factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return factor, None if factor is None else torch.zeros_like(factor)


def normalized(
    x: Tensor, steps: Steps, tables: Tables, own: Moments | None, every: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Find what the norm amounts to, on an image x; `own` are the moments it needs, if known.

    Returns what `standardize` does, a factor after the norm included.
    """
    norm, after = steps.norm, tables.after
    assert norm is not None
    gamma, beta, eps, pool, fixed, running = norm
    if after is not None:  # nothing is changed before the end
        norm = Normalization(gamma, beta, eps, pool, fixed)
    found = standardize(x, steps.inner(tables), own, tables.before, norm, every)
    if after is not None:
        table, *others = found
        assert table is not None
        found = torch.cat([table[:3], after * table[3:5], table[5:]]), *others
    if running is not None and not norm.updates():
        running.update(found)
    return found


def completed(tables: Tables, word: str, found: Sequence[Tensor | None]) -> Tables:
    """Return tables with what `normalized` found."""
    s1, t1, slope, s2, t2, *_ = tables
    table, *_ = found
    assert table is not None
    if word[0] == "n":
        mean, _, rstd, s1, t1, centre = table.unbind()
    else:
        mean, _, rstd, s2, t2, centre = table.unbind()
    return Tables(s1, t1, slope, s2, t2, mean, rstd, centre, tables.before, tables.after)


def gradients(
    g: Tensor, sums: Tensor | None, x: Tensor, steps: Steps, tables: Tables,
    needs: tuple[bool, bool, bool, bool], total: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of x, gamma, beta and PReLU's weight that are needed.

    And, if it takes no pass over an image, the sums (C,) of the gradient of x, which are that of a
    bias. Where processes share statistics, what `norm_gradients` returns at first, until the total
    of all is given.

    Parameters
    ----------
    g : (N, C, *X) tensor
        The gradient of z.
    sums : (2, N, C) tensor, optional
        The first two `prologue_sums` of g, where its readers computed them all.
    x : (N, C, *X) tensor
        The image that the steps are done to; g itself will do where only its shape matters.
    """
    dx = dgamma = dbeta = dweight = dbias = fold = None
    prologue, norm = tables.prologue(steps.activation), steps.norm
    outer = steps.word == "an"
    if norm is not None and (norm.fixed is None or needs[1] or needs[2]):
        found = norm_gradients(norm, tables, sums, g, x, prologue, outer, total)
        if norm.pool.process_group is not None and total is None:
            return found
        dgamma, dbeta, dbias, fold = found
    if needs[3]:  # after the norm, which has its share in the gradient of what precedes it
        weight = steps.weight
        assert weight is not None
        assert tables.slope is not None
        around = torch.zeros_like(tables.slope)
        dslope = ops.prologue_sums(g, x, prologue, around, fold if outer else None, outer)[2]
        dweight = dslope.sum(0) if weight.numel() > 1 else dslope.sum().reshape(1)
    if needs[0]:
        dx = ops.prologue_dgrad(g, x, prologue, fold, outer)
    return dx, dgamma, dbeta, dweight, None if outer else dbias


def gradient_by_result(g: Tensor, z: Tensor, steps: Steps) -> Tensor:
    """Return the gradient of x where z = f1 act(f0 x) alone is kept, with factors f, as f1 is not.

    z is act(f0 x), and g the gradient of f1 times that.
    """
    f0, f1, _ = steps.factors
    factor = f1 if f0 is None else f0 if f1 is None else f0 * f1
    shift = None if factor is None else torch.zeros_like(factor)
    name, p, q = steps.activation
    prologue = Prologue(activation=Activation(BY_RESULT[name], p, q), s2=factor, t2=shift)
    return ops.prologue_dgrad(g, z, prologue, None, False)
