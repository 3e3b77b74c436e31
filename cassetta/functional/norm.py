"""Normalization as algebra on the moments of each channel of each sample.

A norm standardizes with statistics that are pooled over groups of the (N, C) channels: over
samples (batch), over nothing (instance), over groups of channels (group). With b the value whose
moments are known, f a factor before (dropout), h a factor after,

    v = f b        w = gamma (v - mean) / std + beta        out = h w = scale b + shift

and the gradient of b, given that of `out`, G, and the sums of G and G (b - centre),

    scale G + a + k (b - centre)

so that a norm costs one pass for its moments, one for those sums, and nothing else.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed as dist

from cassetta.kernels.types import Fold, Moments


class Pool(NamedTuple):
    """Which channels share their statistics."""

    kind: str  # "batch", "instance" or "group"
    groups: int = 1
    process_group: object = None  # for a batch that is spread over processes

    def means(self, *tables: Tensor, weight: float) -> list[Tensor]:
        """The mean of each pool, at each of its members (N, C); a member counts `weight` times."""
        n, c = tables[0].shape
        if self.kind == "instance":
            return list(tables)
        if self.kind == "group":
            pools = (n, self.groups, c // self.groups)
            return [t.reshape(pools).mean(-1, True).expand(pools).reshape(n, c) for t in tables]
        if self.process_group is None:
            return [t.mean(0, keepdim=True).expand(n, c) for t in tables]
        total = torch.cat([t.sum(0) for t in tables] + [tables[0].new_full((1,), n)]) * weight
        dist.all_reduce(total, group=self.process_group)  # type: ignore[arg-type]
        return [one.expand(n, c) for one in (total[:-1] / total[-1]).chunk(len(tables))]

    def statistics(self, moments: Moments, voxels: int) -> tuple[Moments, int]:
        """Mean and variance of each pool, at each of its members, and how many values it holds.

        By the formula of Chan et al. (1979), within a process and between processes.
        """
        n, c = moments.mean.shape
        alone = self._replace(process_group=None)
        (mean,) = alone.means(moments.mean, weight=voxels)
        (var,) = alone.means(moments.var + (moments.mean - mean).square(), weight=voxels)
        count = voxels * {"instance": 1, "group": c // self.groups, "batch": n}[self.kind]
        if self.process_group is None:
            return Moments(mean, var), count
        own = torch.cat([mean[0], var[0], mean.new_full((1,), count)])
        group: Any = self.process_group
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        means, variances, counts = torch.stack(every).split([c, c, 1], dim=1)
        weights = counts / counts.sum()
        mean = (weights * means).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        return Moments(mean.expand(n, c), var.expand(n, c)), int(counts.sum())


class Norm(NamedTuple):
    """A norm in a chain, and what its gradient needs: tables (N, C), parameters (C,) or None."""

    mean: Tensor
    rstd: Tensor
    centre: Tensor  # around which the sums of the gradient are taken, so that they do not cancel
    before: Tensor | None  # f
    after: Tensor | None  # h
    pool: Pool | None  # None: the statistics are fixed, and no gradient flows through them
    outer: bool  # after the activation

    def affine(self, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift of b."""
        w = self.rstd if gamma is None else self.rstd * gamma.to(self.rstd.dtype)
        shift = -self.mean * w if beta is None else beta.to(w.dtype) - self.mean * w
        scale = w if self.before is None else w * self.before
        return (scale, shift) if self.after is None else (scale * self.after, shift * self.after)

    def gradients(
        self, gamma: Tensor | None, sum_g: Tensor, sum_gb: Tensor, voxels: int
    ) -> tuple[Tensor, Tensor, Fold | None]:
        """Gradients of gamma and beta (C,), and what flows through the statistics.

        Parameters
        ----------
        sum_g, sum_gb : (N, C) tensor
            Sums of G and of G (b - centre).
        voxels : int
            Number of voxels of a channel of a sample.
        """
        apart = self.centre - self.mean  # of the centre of v = f b from the mean
        spread = sum_gb
        if self.before is not None:
            apart = self.before * self.centre - self.mean
            spread = self.before * sum_gb
        dbeta, dgamma = sum_g, self.rstd * (spread + apart * sum_g)
        if self.after is not None:
            dbeta, dgamma = self.after * dbeta, self.after * dgamma
        fold = None
        if self.pool is not None:
            k = 1.0 if gamma is None else gamma.to(dbeta.dtype)
            m0, m1 = self.pool.means(dbeta * k / voxels, dgamma * k / voxels, weight=voxels)
            a = -self.rstd * (m0 + self.rstd * m1 * apart)
            slope = -self.rstd.square() * m1
            if self.before is not None:
                a, slope = self.before * a, self.before.square() * slope
            fold = Fold(a, slope, self.centre)
        return dgamma.sum(0), dbeta.sum(0), fold
