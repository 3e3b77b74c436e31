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
def _entry(ptr, at, inside, DEFAULT: tl.constexpr):
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
        own = _entry(mean_ptr, at, inside, 0.0)
        if not FIXED:
            own *= _entry(before_ptr, at, inside, 1.0)
        total += tl.sum(own, 1)
        start += BLOCK_M
    mean = (total / members)[:, None]
    total = tl.zeros((BLOCK_P,), tl.float32)
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        own, var = _entry(mean_ptr, at, inside, 0.0), _entry(var_ptr, at, inside, 0.0)
        if not FIXED:
            before = _entry(before_ptr, at, inside, 1.0)
            own *= before
            var *= before * before
        apart = own - mean
        total += tl.sum(tl.where(inside, var + apart * apart, 0.0), 1)
        start += BLOCK_M
    var = (total / members)[:, None]
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    if batches_ptr is not None:
        channel, is_one = pool[:, None], (pool < pools)[:, None]
        _approach(running_mean_ptr + channel, mean, momentum, is_one)
        _approach(running_var_ptr + channel, var * unbiased, momentum, is_one)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    start = 0
    while start < members:
        m = start + tl.arange(0, BLOCK_M)
        inside = (pool < pools)[:, None] & (m < members)[None, :]
        at = pool[:, None] * pool_step + m[None, :] * member_step
        scale = rstd * _entry(gamma_ptr, at % C, inside, 1.0)
        shift = _entry(beta_ptr, at % C, inside, 0.0) - mean * scale
        out = out_ptr + at
        tl.store(out, tl.broadcast_to(mean, at.shape), mask=inside)
        tl.store(out + size, tl.broadcast_to(var * unbiased, at.shape), mask=inside)
        tl.store(out + 2 * size, tl.broadcast_to(rstd, at.shape), mask=inside)
        tl.store(out + 3 * size, scale * _entry(before_ptr, at, inside, 1.0), mask=inside)
        tl.store(out + 4 * size, shift, mask=inside)
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
    out = torch.empty(5, n, c, dtype=torch.float32, device=own.mean.device)
    tile.launch(
        _norm_finalize_kernel, out, configs.over_pools(pools, members),
        *map(_dense, (own.mean, own.var, before, gamma, beta)), out, eps,
        pooling.unbiased(n, c, voxels), *running, c, pools, members, *steps, n * c,
        FIXED=pooling.kind == "fixed",
    )  # fmt: skip
    return out


@triton.jit
def _shares(
    g_ptr, gb_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, at, inside
):  # fmt: skip
    """Shares in the gradients of gamma and beta; and 1/std, what the centre is off, the factor."""
    g, gb = _entry(g_ptr, at, inside, 0.0), _entry(gb_ptr, at, inside, 0.0)
    rstd, before = _entry(rstd_ptr, at, inside, 0.0), _entry(before_ptr, at, inside, 1.0)
    apart = before * _entry(centre_ptr, at, inside, 0.0) - _entry(mean_ptr, at, inside, 0.0)
    after = _entry(after_ptr, at, inside, 1.0)
    return after * rstd * (before * gb + apart * g), after * g, rstd, apart, before


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
        dgamma, dbeta, _, _, _ = _shares(
            g_ptr, gb_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, at, inside
        )
        gamma = _entry(gamma_ptr, at % C, inside, 1.0)
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
        _, dbeta, rstd, apart, before = _shares(
            g_ptr, gb_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, after_ptr, at, inside
        )
        mean_1 = (share * m1)[:, None]
        a = -before * rstd * ((share * m0)[:, None] + rstd * mean_1 * apart)
        k = -before * before * rstd * rstd * mean_1
        if FIXED:
            a, k = tl.zeros_like(rstd), tl.zeros_like(rstd)
        direct = before * rstd * _entry(gamma_ptr, at % C, inside, 1.0) * dbeta
        tl.store(out_ptr + 2 * size + at, direct + voxels * a, mask=inside)
        tl.store(out_ptr + 3 * size + at, a, mask=inside)
        tl.store(out_ptr + 4 * size + at, k, mask=inside)
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
        *map(_dense, (sums[0], sums[1], mean, rstd, centre, before, after, gamma)), out, share,
        float(voxels), c, pools, members, *steps, n * c, FIXED=pooling.kind == "fixed",
    )  # fmt: skip
    return out


def _dense(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()
