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

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed as dist

from cassetta.kernels import ops, reference
from cassetta.kernels.types import Fold, Moments, Pooling


class Pool(NamedTuple):
    """Which channels share their statistics, perhaps with those of other processes."""

    kind: str  # of `Pooling`
    groups: int = 1
    process_group: object = None  # for a batch that is spread over processes

    def pooling(self) -> Pooling:  # (torch 2.8 traces no property of a tuple)
        """That within this process."""
        return Pooling(self.kind, self.groups)


class Norm(NamedTuple):
    """A norm in a chain, and what its gradient needs: tables (N, C), parameters (C,) or None."""

    mean: Tensor
    rstd: Tensor
    centre: Tensor  # of the sums that the gradient asks for: near the mean of b
    before: Tensor | None  # f
    after: Tensor | None  # h
    pool: Pool
    outer: bool  # after the activation

    def scaled(self, factor: Tensor) -> "Norm":
        """This norm, whose result is multiplied by a factor (N, C)."""
        mean, rstd, centre, before, after, pool, outer = self
        after = factor if after is None else after * factor
        return Norm(mean, rstd, centre, before, after, pool, outer)

    def gradients(
        self, gamma: Tensor | None, sums: Tensor, voxels: int
    ) -> tuple[Tensor, Tensor, Fold | None]:
        """Gradients of gamma and beta (C,), and what flows through the statistics.

        Parameters
        ----------
        sums : (>= 2, N, C) tensor
            Sums of G and of G (b - centre).
        voxels : int
            Number of voxels of a channel of a sample.
        """
        mean, rstd, centre, before, after, pool, _ = self
        tables = (mean, rstd, centre, before)
        pooling = pool.pooling() if pool.process_group is None else Pooling("fixed")
        shares = ops.norm_finalize_backward(sums, *tables, after, gamma, voxels, pooling)
        dgamma, dbeta = shares[:2].sum(1).unbind()
        if pool.process_group is not None:
            k = 1.0 if gamma is None else gamma.to(dbeta.dtype)
            own = torch.stack([dbeta * k, dgamma * k])
            m0, m1 = _mean_of_all(own, mean.shape[0] * voxels, pool.process_group)
            a, slope = reference.norm_fold(m0, m1, *tables)
            return dgamma, dbeta, Fold(a, slope, centre)
        fold = None if pool.kind == "fixed" else Fold(shares[2], shares[3], centre)
        return dgamma, dbeta, fold


def standardize(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    pool: Pool, voxels: int,
) -> tuple[Tensor, Moments, Any]:  # fmt: skip
    """What `reference.norm_finalize` returns, (5, N, C); the pooled moments, a row for each sample
    (at least one of a batch); and by what their variances are to be multiplied to be unbiased."""
    n, c = own.mean.shape
    count = voxels * {"group": c // pool.groups, "batch": n}.get(pool.kind, 1)
    if pool.process_group is None:
        tables = ops.norm_finalize(own, before, gamma, beta, eps, pool.pooling())
        return tables, Moments(tables[0], tables[1]), count / max(count - 1, 1)
    local = ops.norm_finalize(own, before, None, None, eps, pool.pooling())
    pooled, total = _moments_of_all(Moments(local[0], local[1]), count, pool.process_group)
    fixed = Moments(*(one.repeat(n, 1) for one in pooled))
    tables = ops.norm_finalize(fixed, before, gamma, beta, eps, Pooling("fixed"))
    return tables, pooled, total / (total - 1).clamp(min=1)  # which the host need not know


def _moments_of_all(own: Moments, count: int, group: Any) -> tuple[Moments, Tensor]:
    """Those of a batch that is spread over processes (1, C), by the formula of Chan et al. (1979),
    and of how many values they are. A process may have no sample: its share is zeros."""
    c = own.mean.shape[1]
    mine = (own.mean[:1].sum(0), own.var[:1].sum(0))
    sent = torch.cat([*mine, own.mean.new_full((1,), count)])
    every = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, sent, group=group)
    means, variances, counts = torch.stack(every).split([c, c, 1], dim=1)
    weights = counts / counts.sum()
    mean = (weights * means).sum(0, keepdim=True)
    var = (weights * (variances + (means - mean).square())).sum(0, keepdim=True)
    return Moments(mean, var), counts.sum()


def _mean_of_all(sums: Tensor, count: int, group: Any) -> Tensor:
    """Sums (..., C) over all processes, by the number of values that they are of."""
    total = torch.cat([sums.reshape(-1), sums.new_full((1,), count)])
    dist.all_reduce(total, group=group)
    return (total[:-1] / total[-1]).reshape(sums.shape)
