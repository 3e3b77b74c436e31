"""Normalization as algebra on the moments of each channel of each sample.

A norm standardizes with statistics that are pooled over groups of the (N, C) channels: over
samples (batch), over nothing (instance), over groups of channels (group). With b the value whose
moments are known, f a factor before (dropout), h a factor after,

    v = f b        w = (v - mean) / std        out = h (gamma w + beta) = scale b + shift

and the gradient of b, given that of `out`, G, and the sums of G and G (b - centre),

    scale G + a + k (b - centre)

so that a norm costs one pass for its moments, one for those sums, and nothing else. The algebra is
that of `reference.norm_finalize` and its backward; here is what a batch that is spread over
processes adds to it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed as dist

from cassetta.kernels import ops, reference
from cassetta.kernels.operands import added
from cassetta.kernels.types import Fold, Moments, Pooling, Prologue


class Pool(NamedTuple):
    """Which channels share their statistics, perhaps with those of other processes."""

    kind: str  # of `Pooling`
    groups: int = 1
    process_group: object = None  # for a batch that is spread over processes

    def pooling(self) -> Pooling:  # (torch 2.8 traces no property of a tuple)
        """That within this process."""
        return Pooling(self.kind, self.groups)


FIXED = Pooling("fixed")


class Running(NamedTuple):
    """Statistics (C,) that a norm keeps for evaluation, and how it updates them."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None  # how many there have been
    momentum: float | None  # None: all batches weigh the same
    averaged: bool  # over samples, which have statistics of their own

    def are_plain(self) -> bool:
        """Tell whether `norm_finalize_running` updates such."""
        kept = self.mean, self.var
        are_dense = all(one.dtype is torch.float32 and one.is_contiguous() for one in kept)
        return are_dense and self.batches is not None and self.momentum is not None

    def update(self, found: Sequence[Tensor | None]) -> None:
        """Take in what `standardize` found; all is computed before anything is changed."""
        mean, var, batches, _, averaged = self
        tables, new_mean, new_var = found
        if new_mean is None:
            assert tables is not None
            new_mean, new_var = tables[0], tables[1]
        newest: Any = (new_mean, mean), (new_var, var)
        new = [(one.mean(0) if averaged else one[0]).to(kept.dtype) for one, kept in newest]
        if batches is not None:
            batches.add_(1)
        weight = self._weight()
        mean.lerp_(new[0], weight)
        var.lerp_(new[1], weight)

    def move(self, shift: Tensor) -> None:
        """Add to the mean its share of a shift (C,) that the values of the newest batch lacked."""
        weight = self._weight()
        if isinstance(weight, Tensor):
            self.mean.addcmul_(shift.to(self.mean.dtype), weight)
        else:
            self.mean.add_(shift, alpha=weight)

    def _weight(self) -> Any:
        """Return that of the newest batch, which is counted already."""
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.batches is None else 1.0 / self.batches.to(self.mean.dtype)


class Normalization(NamedTuple):
    """A norm, with the statistics of what it is applied to, or with fixed ones (C,)."""

    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    pool: Pool
    fixed: Moments | None = None
    running: Running | None = None  # is told the pooled statistics

    def updates(self) -> bool:
        """Tell whether its pass also updates the running statistics."""
        running, (kind, _, group) = self.running, self.pool
        return running is not None and kind == "batch" and group is None and running.are_plain()


def standardize(
    x: Tensor, p: Prologue, own: Moments | None, before: Tensor | None, norm: Normalization,
    every: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Find what a norm of b = act(s1 x + t1) amounts to; `own` are the moments of b, if known.

    Returns what `norm_finalize` does (6, N, C). And, where other processes share the statistics,
    given what they sent (`gathered`), their mean and unbiased variance (1, C); else none. Running
    statistics are updated by that pass, if it can (`norm.updates`).
    """
    n, pooling = x.shape[0], norm.pool.pooling()
    given = before, norm.gamma, norm.beta, norm.eps
    if own is None and norm.fixed is None:
        if norm.updates():
            tables = ops.norm_statistics_running(x, p, *given, *norm.running[:4])  # type: ignore
        else:
            tables = ops.norm_statistics(x, p, *given, pooling)
        return tables, None, None
    if norm.fixed is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        own, pooling = Moments(*(one.to(dtype).repeat(n, 1) for one in norm.fixed)), FIXED
    assert own is not None
    found, of_all, voxels = own, (None, None), math.prod(x.shape[2:])
    if every is not None:
        mean, var, unbiased = _of_all(every)
        of_all = mean, unbiased
        found, pooling = Moments(mean.expand(n, -1), var.expand(n, -1)), FIXED
    if norm.updates():
        kept: Any = norm.running[:4]  # type: ignore[index]
        return ops.norm_finalize_running(found, *given, voxels, *kept), None, None
    tables = ops.norm_finalize(found, *given, voxels, pooling)
    if of_all[0] is not None:  # what is summed is centred at the mean of what is here
        tables = torch.cat([tables[:5], own.mean[None]])
    return tables, *of_all


def norm_gradients(
    norm: Normalization,
    tables: Any,
    sums: Tensor | None,
    g: Tensor,
    x: Tensor,
    p: Prologue,
    outer: bool,
    total: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of gamma and beta (C,), of a bias before, what flows through statistics.

    The bias is added to b: its gradient needs no pass over an image. Where other processes share
    the statistics, two tensors are returned at first: sums (3, C), and what all are to add up.

    Parameters
    ----------
    tables : Tables
        What `standardize` found, by name, and the factors before and after the norm.
    sums : (>= 2, N, C) tensor, optional
        Sums of G and of G (b - centre), if they are known; with a total, those returned at first.
    g, x : (N, C, *X) tensor
        The gradient of z, and the image, with the transform p; `outer`: as for `ops.norm_sums`.
    """
    mean, centre, group = tables.mean, tables.centre, norm.pool.process_group
    given = (mean, tables.rstd, centre, tables.before)
    pooling = FIXED if norm.fixed is not None or group is not None else norm.pool.pooling()
    gamma, voxels = norm.gamma, math.prod(x.shape[2:])
    if total is not None:
        assert sums is not None
        dgamma, dbeta, dbias = sums.unbind()
        m1, m0 = (total[:-1] / total[-1]).reshape(2, -1).unbind()
        a, slope = reference.norm_fold(m0, m1, *given)
        return dgamma, dbeta, dbias + voxels * a.sum(0), Fold(a, slope, centre)
    if sums is None:
        shares = ops.norm_sums(g, x, p, *given, tables.after, gamma, outer, pooling)
    else:
        shares = ops.norm_finalize_backward(sums, *given, tables.after, gamma, voxels, pooling)
    own = added(shares[:3], 1)
    if group is not None:
        k = 1.0 if gamma is None else gamma.to(own.dtype)
        return own, _counted(own[:2] * k, mean.shape[0] * voxels)
    return *own.unbind(), None if norm.fixed is not None else Fold(shares[3], shares[4], centre)


def statistics(
    x: Tensor, p: Prologue, own: Moments | None, before: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the moments of b; and mean, variance and count in this process, to be sent."""
    own = ops.moments(x, p) if own is None else own
    local = ops.norm_finalize(own, before, None, None, 1.0, 0, Pooling("batch"))
    mine = local[:2, :1].sum(1)  # zeros, where there is no sample
    return *own, _counted(mine, x.shape[0] * math.prod(x.shape[2:]))


def gathered(sent: Tensor, group: Any) -> Tensor:
    """Return what the processes of a group have sent, each of them a row."""
    every = sent.new_empty((dist.get_world_size(group), *sent.shape))
    dist.all_gather([*every.unbind()], sent, group=group)
    return every


def _counted(values: Tensor, count: int) -> Tensor:
    return torch.cat([values.reshape(-1), values.new_full((1,), count)])


def _of_all(every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and unbiased variance (1, C), by the formula of Chan et al. (1979)."""
    c = every.shape[1] // 2
    means, variances, counts = every.split([c, c, 1], dim=1)
    total = counts.sum()
    weights = counts / total
    mean = (weights * means).sum(0, keepdim=True)
    apart = means - mean
    var = (weights * torch.addcmul(variances, apart, apart)).sum(0, keepdim=True)
    return mean, var, var * (total / (total - 1).clamp(min=1))
