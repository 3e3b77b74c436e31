"""Apply the pending transform, and its gradient: one element in, one element out.

    u = s1 x + t1        v = act(u)        z = s2 v + t2 (+ residual)

`reference` says what each pass computes. Each element of x (and of the gradient, the residual) is
read once, each result written once; 6 to 30 operations per element, far below what the bandwidth
leaves time for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cassetta.kernels import configs, layout, tile
from cassetta.kernels.types import Fold, Prologue


@triton.jit
def _materialize_kernel(
    x_ptr, r_ptr, z_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, C, V,
    x_n, x_c, x_v, r_n, r_c, r_v, z_n, z_c, z_v, chunks, c_blocks,
    ACT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
    x = tl.load(tile.at(x_ptr, n, v, c, x_n, x_c, x_v, WIDE, WORDS), mask=inside, other=0.0)
    z = tile.transformed(
        x.to(tl.float32), n, c, C, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, ACT
    )  # fmt: skip
    if r_ptr is not None:
        r = tl.load(tile.at(r_ptr, n, v, c, r_n, r_c, r_v, WIDE, WORDS), mask=inside, other=0.0)
        z += r.to(tl.float32)
    z_at = tile.at(z_ptr, n, v, c, z_n, z_c, z_v, WIDE, WORDS)
    tl.store(z_at, z.to(z_ptr.dtype.element_ty), mask=inside)


def materialize(
    x: Tensor, p: Prologue, residual: Tensor | None, dtype: torch.dtype, words: bool = False
) -> Tensor:
    x, _ = tile.strided(x)
    z = layout.empty(tuple(x.shape), dtype, x.device) if words else layout.like(x, dtype)
    return _filled(z, x, p, residual, True)


def concatenate(x: Tensor, p: Prologue, x2: Tensor, p2: Prologue, dtype: torch.dtype) -> Tensor:
    c = x.shape[1]
    z = layout.wider(x, x2.shape[1], dtype)
    for part, image, pending in ((z[:, :c], x, p), (z[:, c:], x2, p2)):
        # the last word of a part, if it is not full, holds channels of its neighbour
        _filled(part, image, pending, None, image.shape[1] % layout.WORD == 0)
    return z


def _filled(z: Tensor, x: Tensor, p: Prologue, residual: Tensor | None, words: bool) -> Tensor:
    """z, with what x stands for in it; `words` says whether the last word may be written whole."""
    x, x_strides = tile.strided(x)
    z, z_strides = tile.strided(z)
    r_strides = (0, 0, 0)
    if residual is not None:
        residual, r_strides = tile.strided(residual)
    images = [one for one in (x, residual, z) if one is not None]
    config = configs.of("materialize", x, x_strides, reduce=False)
    tile.launch(
        _materialize_kernel, x, config,
        x, residual, z, p.s1, p.t1, p.slope, p.s2, p.t2, p.activation.p, p.activation.q,
        x.shape[1], tile.voxels(x), *x_strides, *r_strides, *z_strides,
        config.chunks, config.c_blocks, ACT=p.activation.name,
        WIDE=tile.is_wide(*images), WORDS=words and tile.in_words(*images),
    )  # fmt: skip
    return z


@triton.jit
def _prologue_dgrad_kernel(
    g_ptr, x_ptr, dx_ptr, s1_ptr, t1_ptr, slope_ptr, s2_ptr, a_ptr, k_ptr, centre_ptr, p, q, C, V,
    g_n, g_c, g_v, x_n, x_c, x_v, d_n, d_c, d_v, chunks, c_blocks,
    ACT: tl.constexpr, AFTER: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    chunk, n, c = tile.place(chunks, c_blocks, BLOCK_C)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < V)[:, None] & (c < tile.edge(C, WORDS))[None, :]
    x = tl.load(tile.at(x_ptr, n, v, c, x_n, x_c, x_v, WIDE, WORDS), mask=inside, other=0.0)
    x = x.to(tl.float32)
    g = tl.load(tile.at(g_ptr, n, v, c, g_n, g_c, g_v, WIDE, WORDS), mask=inside, other=0.0)
    e = tile.row(s2_ptr, n, c, C, 1.0) * g.to(tl.float32)
    u = tile.row(s1_ptr, n, c, C, 1.0) * x + tile.row(t1_ptr, n, c, C, 0.0)
    slope = tile.row(slope_ptr, n, c, C, 0.0)
    if a_ptr is not None:
        b = x
        if AFTER:
            b = tile.activation(u, p, q, slope, ACT)
        b = b - tile.row(centre_ptr, n, c, C, 0.0)
        fold = tile.row(a_ptr, n, c, C, 0.0) + tile.row(k_ptr, n, c, C, 0.0) * b
        if AFTER:
            e += fold
    dx = tile.row(s1_ptr, n, c, C, 1.0) * e * tile.derivative(u, p, q, slope, ACT)
    if a_ptr is not None and not AFTER:
        dx += fold
    dx_at = tile.at(dx_ptr, n, v, c, d_n, d_c, d_v, WIDE, WORDS)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def prologue_dgrad(g: Tensor, x: Tensor, p: Prologue, fold: Fold | None, after: bool) -> Tensor:
    g, g_strides = tile.strided(g)
    x, x_strides = tile.strided(x)
    dx, d_strides = tile.strided(layout.like(x, x.dtype))
    config = configs.of("prologue_dgrad", x, x_strides, reduce=False)
    tile.launch(
        _prologue_dgrad_kernel, x, config,
        g, x, dx, p.s1, p.t1, p.slope, p.s2, *((None,) * 3 if fold is None else fold),
        p.activation.p, p.activation.q, x.shape[1], tile.voxels(x),
        *g_strides, *x_strides, *d_strides, config.chunks, config.c_blocks,
        ACT=p.activation.name, AFTER=after, WIDE=tile.is_wide(g, x, dx),
        WORDS=tile.in_words(g, x, dx),
    )  # fmt: skip
    return dx
