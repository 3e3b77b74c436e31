"""How large a tile is and how many voxels a program visits: by the shape, and what was measured."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import boxes, plans, precision
from cassetta.kernels.boxes import NO_BOX, Box
from cassetta.kernels.plans import Pass, Plan, Product
from cassetta.kernels.types import Geometry

REGISTERS = 250
"""Of a thread of a convolution, at most. Said so, or the compiler keeps to fewer, and spills. The
most that there are, 255, does not assemble for sm_100 with triton 3.5 (triton#8488)."""


class Config(NamedTuple):
    """The launch of a pass over an image (N, C, V voxels)."""

    block_v: int  # voxels of a tile
    block_c: int  # channels of a tile
    loops: int  # tiles that a program visits, one after the other along the voxels
    chunks: int  # programs along the voxels
    c_blocks: int  # programs along the channels
    programs: int
    warps: int
    registers: int = 0  # of a thread, at most; 0 leaves it to the compiler

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_V": self.block_v, "BLOCK_C": self.block_c}

    @property
    def options(self) -> dict[str, int]:
        more = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, **more}


class PoolConfig(NamedTuple):
    """The launch of a pass over the pools of a table (N, C)."""

    block_p: int  # pools of a tile
    block_m: int  # members of each
    programs: int
    warps: int = 4

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_P": self.block_p, "BLOCK_M": self.block_m}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


class GemmConfig(NamedTuple):
    """The launch of a convolution: a product of (voxels, depth) and (depth, channels)."""

    block_m: int  # voxels of a tile
    block_n: int  # channels of a tile
    block_k: int  # channels that are multiplied in a step
    tiles: int  # programs along the voxels
    k_blocks: int  # programs along the channels
    programs: int
    warps: int
    stages: int  # steps whose operands are under way
    box: Box = NO_BOX  # of voxels of a tile; else they follow one another in memory

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "STAGES": self.stages, **_named(self.box),
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": REGISTERS}


class WgradConfig(NamedTuple):
    """The launch of the gradient of weights: rows of taps x channels, summed over voxels."""

    block_t: int  # taps of a tile
    block_c: int  # their channels
    block_n: int  # channels of a tile
    block_v: int  # voxels that are multiplied in a step
    steps: int  # along the voxels of a sample
    part: int  # steps of a program
    splits: int  # programs along the voxels of a sample
    c_blocks: int
    k_blocks: int
    programs: int
    warps: int
    stages: int
    box: Box = NO_BOX  # of voxels of a step

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "BLOCK_T": self.block_t, "BLOCK_C": self.block_c, "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v, "STAGES": self.stages, **_named(self.box),
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": REGISTERS}


VOXELS = 2**31 - 2**16
"""A channel has fewer: kernels count them in 31 bits, and a tile may end outside the image. (A box
may end farther outside; what lies there is masked, whatever its number.)"""

REDUCED = 64
"""Tiles that a program of a reduction visits at most. The partial results that it leaves are then
at most 1/2^16 of the image, and the second stage reads them in no time."""


def of(name: str, x: Tensor, strides: tuple[int, int, int], reduce: bool) -> Config:
    """The launch of a pass over an image of these strides (of samples, channels, voxels)."""
    n, c, *size = x.shape
    last = strides[1] == 1 and c > 1
    plan = plans.chosen(Pass(name, x, last), x.device)
    return over_voxels(n, c, math.prod(size), last, reduce, plan)


def gemm(
    product: Product, samples: int, size: tuple[int, int, int], device: torch.device, heavy: bool,
    readable: Callable[[], bool],
) -> GemmConfig:  # fmt: skip
    """The launch of a product whose rows are the voxels of so many images of this size.

    `heavy` if much is fused with it; `readable` tells whether its operands can be read in boxes.
    """
    k, c = product.channels, product.shape[1]
    if product.name == "conv_dgrad":
        k, c = c, k
    plan = plans.chosen(product, device)
    block_n = max(16, min(_power(k), plan.block_n))
    block_k = max(16, min(_power(c), plan.block_k))
    exact = precision.of(product.dtype) == "ieee"
    if heavy or exact:
        block_n, block_k = min(block_n, 64), min(block_k, 16 if exact else 32)
    warps = _warps(16 if exact or heavy else 64, plan.block_m * max(block_n, block_k))
    box, tiles = NO_BOX, -(-math.prod(size) // plan.block_m)
    if _is_boxed(plan, product, device, readable):
        box = boxes.fitting(plan.block_m, size)
        tiles = boxes.covering(box, size)
    k_blocks = -(-k // block_n)
    return GemmConfig(
        plan.block_m, block_n, block_k, tiles, k_blocks, samples * tiles * k_blocks, warps,
        plan.stages, box,
    )  # fmt: skip


def wgrad(
    product: Product, size: tuple[int, int, int], device: torch.device, heavy: bool,
    readable: Callable[[], bool],
) -> WgradConfig:  # fmt: skip
    """The launch of a product over the voxels of images of this size, as `gemm`.

    As many splits as fill a large GPU, of 512 voxels at least, so that adding their shares is
    nothing beside computing them.
    """
    samples, c = product.shape[:2]
    taps, voxels = math.prod(product.taps), math.prod(size)
    plan = plans.chosen(product, device)
    boxed = _is_boxed(plan, product, device, readable)
    block_n = max(16, min(_power(product.channels), plan.block_n))
    block_c = max(16, min(_power(c), plan.rows))
    block_t = 1 if boxed else min(_power(taps), max(1, plan.rows // block_c))
    exact = precision.of(product.dtype) == "ieee"
    block_v = min(plan.block_v, 16) if exact else plan.block_v
    warps = _warps(16 if exact or heavy else 32, block_t * block_c * max(block_n, block_v))
    t_blocks, c_blocks = -(-taps // block_t), -(-c // block_c)
    k_blocks = -(-product.channels // block_n)
    others = samples * t_blocks * c_blocks * k_blocks
    box = boxes.fitting(block_v, size) if boxed else NO_BOX
    steps = boxes.covering(box, size) if boxed else -(-voxels // block_v)
    part = max(1, -(-steps // max(1, min(2048 // max(others, 1), voxels // 512))))
    splits = max(1, -(-steps // part))
    return WgradConfig(
        block_t, block_c, block_n, block_v, steps, part, splits, c_blocks, k_blocks,
        others * splits, warps, plan.stages, box,
    )  # fmt: skip


def _is_boxed(
    plan: Any, product: Product, device: torch.device, readable: Callable[[], bool]
) -> bool:
    return plan.boxes and product.reads_boxes and boxes.are_copied(device) and readable()


def _named(box: Box) -> dict[str, int]:
    return {f"BOX{axis}": side for axis, side in enumerate(box)}


def _warps(most: int, tile: int) -> int:
    """Enough that a thread holds no more than so much of a tile, and its registers do not spill."""
    return 4 if tile <= 4 * 32 * most else 8


def why_no_product(geometry: Geometry, taps: Sequence[int]) -> str | None:
    """Why our own convolutions do not cover one of this geometry, as a sentence."""
    stride, padding, dilation, groups = geometry
    if groups != 1:
        return f"our own convolutions have no groups, and this one has {groups}"
    if max(stride) > 1 and not geometry.tiles(taps):
        return (
            f"our own convolutions have a stride of 1, or of their size without padding; this one "
            f"of size {tuple(taps)} has stride {stride}, padding {padding} and dilation {dilation}"
        )
    return None


def over_voxels(n: int, c: int, v: int, last: bool, reduce: bool, plan: Plan) -> Config:
    """The launch of an elementwise pass, or of the first stage of a reduction."""
    block_c = min(_power(c), 64) if last else 1
    block_v = plan.tile // block_c
    if v < block_v:
        block_v = max(16, _power(v))
    tiles = -(-v // block_v)
    c_blocks = -(-c // block_c)
    loops = 1
    if reduce:  # enough programs to fill a large GPU come first, then few partial results
        loops = max(1, min(REDUCED, tiles * n * c_blocks // 2048, tiles))
    chunks = -(-tiles // loops)
    programs = n * c_blocks * chunks
    return Config(block_v, block_c, loops, chunks, c_blocks, programs, plan.warps)


def over_chunks(n: int, chunks: int, c: int) -> Config:
    """The launch of the second stage of a reduction, and, of many chunks, of stages between."""
    block_v, block_c = 64, min(_power(c), 16)
    c_blocks = -(-c // block_c)
    loops = max(1, min(-(-chunks // block_v), REDUCED // 2))
    outs = -(-chunks // (loops * block_v))
    return Config(block_v, block_c, loops, outs, c_blocks, n * c_blocks * outs, 4)


def over_pools(pools: int, members: int) -> PoolConfig:
    """The launch over pools that are walked through, or, of a single member, side by side."""
    block_p, block_m = (128, 1) if members == 1 else (8, 16)
    return PoolConfig(block_p, block_m, -(-pools // block_p))


def dtypes() -> tuple[torch.dtype, ...]:
    """The types that kernels read and write; all compute in float32."""
    return torch.float32, torch.float16, torch.bfloat16


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
