"""What a norm makes of its moments, and of the sums in its gradient: (N, C) tables in one launch.

`reference` says what each computes. A program has a tile (BLOCK_P, BLOCK_M) of pools by members,
and walks twice through the members: for what they share, then for what each gets of it. The tables
are small; what counts is that it is one launch, where PyTorch would need some twenty.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, tile
from cassetta.kernels.types import Moments, Pooling

_ONE_KERNEL_FOR_ALL = ["C", "pools", "members", "pool_step", "member_step", "size"]


@triton.jit
def entry(ptr, at, inside, DEFAULT: tl.constexpr):
    """Entries of a table; DEFAULT where there is no table."""
    if ptr is None:
        values = tl.full(at.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _approach(ptr, new, momentum, inside):
    """Move what is kept towards what is new, by this fraction of the way."""
    old = tl.load(ptr, mask=inside, other=0.0)
    tl.store(ptr, old + momentum * (new - old), mask=inside)


@triton.jit
def store_tables(
    out, size, inside, own, mean, var, before, gamma, beta, eps, unbiased
):  # fmt: skip
    """What a norm amounts to, where each of these is a block of the shape of `out`."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = rstd * gamma
    tl.store(out, mean, mask=inside)
    tl.store(out + size, var * unbiased, mask=inside)
    tl.store(out + 2 * size, rstd, mask=inside)
    tl.store(out + 3 * size, scale * before, mask=inside)
    tl.store(out + 4 * size, beta - mean * scale, mask=inside)
    tl.store(out + 5 * size, own, mask=inside)


@triton.jit
def update_running(
    mean_ptr, var_ptr, batches_ptr, channel, inside, mean, var, momentum
):  # fmt: skip
    """Take in the statistics of a batch; one program counts it."""
    _approach(mean_ptr + channel, mean, momentum, inside)
    _approach(var_ptr + channel, var, momentum, inside)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def store_statistics(
    own, var, before_ptr, gamma_ptr, beta_ptr, out_ptr, running_mean_ptr, running_var_ptr,
    batches_ptr, eps, unbiased, momentum, size, n, c, C,
):  # fmt: skip
    """Store what a norm makes of the moments of channels c of sample n, each of them a pool."""
    at, inside = n * C + c, c < C
    before = entry(before_ptr, at, inside, 1.0)
    mean, var = before * own, before * before * var
    if batches_ptr is not None:
        update_running(
            running_mean_ptr, running_var_ptr, batches_ptr, c, inside, mean, var * unbiased,
            momentum,
        )  # fmt: skip
    store_tables(
        out_ptr + at, size, inside, own, mean, var, before, entry(gamma_ptr, c, inside, 1.0),
        entry(beta_ptr, c, inside, 0.0), eps, unbiased,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ONE_KERNEL_FOR_ALL)
def _norm_finalize_kernel(
    mean_ptr, var_ptr, before_ptr, gamma_ptr, beta_ptr, out_ptr, eps, unbiased,
    running_mean_ptr, running_var_ptr, batches_ptr, momentum,
    C, pools, members, pool_step, member_step, size,
    FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    pool = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P,), tl.float32)
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        own = entry(mean_ptr, at, inside, 0.0)
        if not FIXED:
            own *= entry(before_ptr, at, inside, 1.0)
        total += tl.sum(own, 1)
        start += BLOCK_M
    mean = (total / members)[:, None]
    total = tl.zeros((BLOCK_P,), tl.float32)
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        own, var = entry(mean_ptr, at, inside, 0.0), entry(var_ptr, at, inside, 0.0)
        if not FIXED:
            before = entry(before_ptr, at, inside, 1.0)
            own *= before
            var *= before * before
        apart = own - mean
        total += tl.sum(tl.where(inside, var + apart * apart, 0.0), 1)
        start += BLOCK_M
    var = (total / members)[:, None]
    if batches_ptr is not None:
        update_running(
            running_mean_ptr, running_var_ptr, batches_ptr, pool[:, None], (pool < pools)[:, None],
            mean, var * unbiased, momentum,
        )  # fmt: skip
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        store_tables(
            out_ptr + at, size, inside, entry(mean_ptr, at, inside, 0.0),
            tl.broadcast_to(mean, at.shape), tl.broadcast_to(var, at.shape),
            entry(before_ptr, at, inside, 1.0), entry(gamma_ptr, at % C, inside, 1.0),
            entry(beta_ptr, at % C, inside, 0.0), eps, unbiased,
        )  # fmt: skip
        start += BLOCK_M


def norm_finalize(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    return _finalized(own, before, gamma, beta, eps, voxels, pooling, None, None, None, 0.0)


def norm_finalize_running(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    voxels: int, mean: Tensor, var: Tensor, batches: Tensor, momentum: float,
) -> Tensor:  # fmt: skip
    running = mean, var, batches, momentum
    return _finalized(own, before, gamma, beta, eps, voxels, Pooling("batch"), *running)


def _finalized(
    own: Moments, before: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    voxels: int, pooling: Pooling, *running: Any,
) -> Tensor:  # fmt: skip
    n, c = own.mean.shape
    pools, members, *steps = pooling.pools(n, c)
    out = torch.empty(6, n, c, dtype=torch.float32, device=own.mean.device)
    tile.launch(
        _norm_finalize_kernel, out, configs.over_pools(pools, members),
        *map(dense, (own.mean, own.var, before, gamma, beta)), out, eps,
        pooling.unbiased(n, c, voxels), *running, c, pools, members, *steps, n * c,
        FIXED=pooling.kind == "fixed",
    )  # fmt: skip
    return out


@triton.jit
def shares(
    g, gb, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, at, inside
):  # fmt: skip
    """Shares in the gradients of gamma and beta; and 1/std, what the centre is off, the factor."""
    rstd, before = entry(rstd_ptr, at, inside, 0.0), entry(before_ptr, at, inside, 1.0)
    apart = before * entry(centre_ptr, at, inside, 0.0) - entry(mean_ptr, at, inside, 0.0)
    after = entry(after_ptr, at, inside, 1.0)
    return after * rstd * (before * gb + apart * g), after * g, rstd, apart, before


@triton.jit
def store_fold(
    out, size, inside, dbeta, gamma, m0, m1, rstd, apart, before, voxels, FIXED: tl.constexpr
):  # fmt: skip
    """The sums of the gradient of b, a and k, from the means m0 and m1 of a pool."""
    a = -before * rstd * (m0 + rstd * m1 * apart)
    k = -before * before * rstd * rstd * m1
    if FIXED:
        a, k = tl.zeros_like(rstd), tl.zeros_like(rstd)
    tl.store(out, before * rstd * gamma * dbeta + voxels * a, mask=inside)
    tl.store(out + size, a, mask=inside)
    tl.store(out + 2 * size, k, mask=inside)


@triton.jit
def store_gradient(
    g, gb, out_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, gamma_ptr, size,
    n, c, C, voxels, FIXED: tl.constexpr,
):  # fmt: skip
    """Store what its gradient makes of the sums over channels c of sample n, each a pool."""
    at, inside = n * C + c, c < C
    dgamma, dbeta, rstd, apart, before = shares(
        g, gb, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, at, inside
    )
    gamma = entry(gamma_ptr, c, inside, 1.0)
    tl.store(out_ptr + at, dgamma, mask=inside)
    tl.store(out_ptr + size + at, dbeta, mask=inside)
    store_fold(
        out_ptr + 2 * size + at, size, inside, dbeta, gamma, dbeta * gamma / voxels,
        dgamma * gamma / voxels, rstd, apart, before, voxels * 1.0, FIXED,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ONE_KERNEL_FOR_ALL)
def _norm_finalize_backward_kernel(
    g_ptr, gb_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, gamma_ptr, out_ptr, share,
    voxels, C, pools, members, pool_step, member_step, size,
    FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    pool = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m0 = tl.zeros((BLOCK_P,), tl.float32)
    m1 = tl.zeros((BLOCK_P,), tl.float32)
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        dgamma, dbeta, _, _, _ = shares(
            entry(g_ptr, at, inside, 0.0), entry(gb_ptr, at, inside, 0.0), mean_ptr, rstd_ptr,
            centre_ptr, before_ptr, after_ptr, at, inside,
        )  # fmt: skip
        gamma = entry(gamma_ptr, at % C, inside, 1.0)
        m0 += tl.sum(tl.where(inside, dbeta * gamma, 0.0), 1)
        m1 += tl.sum(tl.where(inside, dgamma * gamma, 0.0), 1)
        tl.store(out_ptr + at, dgamma, mask=inside)
        tl.store(out_ptr + size + at, dbeta, mask=inside)
        start += BLOCK_M
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        _, dbeta, rstd, apart, before = shares(
            entry(g_ptr, at, inside, 0.0), entry(gb_ptr, at, inside, 0.0), mean_ptr, rstd_ptr,
            centre_ptr, before_ptr, after_ptr, at, inside,
        )  # fmt: skip
        gamma = entry(gamma_ptr, at % C, inside, 1.0)
        store_fold(
            out_ptr + 2 * size + at, size, inside, dbeta, gamma, (share * m0)[:, None],
            (share * m1)[:, None], rstd, apart, before, voxels, FIXED,
        )  # fmt: skip
        start += BLOCK_M


def norm_finalize_backward(
    sums: Tensor, mean: Tensor, rstd: Tensor, centre: Tensor, before: Tensor | None,
    after: Tensor | None, gamma: Tensor | None, voxels: int, pooling: Pooling,
) -> Tensor:  # fmt: skip
    n, c = mean.shape
    pools, members, *steps = pooling.pools(n, c)
    out = torch.empty(5, n, c, dtype=torch.float32, device=mean.device)
    share = 1 / (members * voxels) if members * voxels else 0.0
    tile.launch(
        _norm_finalize_backward_kernel, out, configs.over_pools(pools, members),
        *map(dense, (sums[0], sums[1], mean, rstd, centre, before, after, gamma)), out, share,
        float(voxels), c, pools, members, *steps, n * c, FIXED=pooling.kind == "fixed",
    )  # fmt: skip
    return out


def dense(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()
