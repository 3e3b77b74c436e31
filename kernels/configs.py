"""How large a tile is and how many voxels a program visits: by the shape, and what was measured."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import boxes, layout, plans, precision
from cassetta.kernels.boxes import NO_BOX, Box
from cassetta.kernels.geometry import Walk
from cassetta.kernels.plans import GemmPlan, Pass, Plan, Product
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
    """The launch of the gradient of weights: a table of rows and columns, summed over voxels."""

    along: bool  # whether taps along W are columns, not rows
    apart: bool  # whether rows see a row of W at places of their own
    block_r: int  # rows of a tile
    block_n: int  # columns of a tile: of a first product,
    block_n2: int  # and of a second one, or 0
    block_v: int  # voxels that are multiplied in a step
    start: int  # the first place along W, as the first tap of a row of z sees it
    stop: int
    width: int  # places of a row in a step, which has several rows if there are fewer than block_v
    across: int  # steps along W
    lines: int  # steps along the axis before it
    steps: int  # of a sample
    part: int  # steps of a program
    splits: int  # programs along the voxels of a sample
    r_blocks: int
    q_blocks: int  # programs along the columns
    programs: int
    warps: int
    stages: int

    @property
    def walk(self) -> tuple[int, ...]:
        """The arguments of the kernel that say how it walks."""
        return (
            self.start, self.stop, self.width, self.across, self.lines, self.steps, self.part,
            self.splits, self.r_blocks, self.q_blocks,
        )  # fmt: skip

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "ALONG": self.along, "APART": self.apart, "BLOCK_R": self.block_r,
            "BLOCK_N": self.block_n, "BLOCK_N2": self.block_n2, "BLOCK_V": self.block_v,
            "STAGES": self.stages,
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


PROGRAMS = 528
"""Of a gradient of weights, unless it has more tiles: 4 for each SM of a large GPU, which end
together. Each leaves its share of a table as large as the weights, in float32. A march along D has
as many, unless its parts were short."""


def of(name: str, x: Tensor, strides: tuple[int, int, int], reduce: bool) -> Config:
    """The launch of a pass over an image of these strides (of samples, channels, voxels)."""
    n, c, *size = x.shape
    last = strides[1] == 1 and c > 1
    plan = plans.chosen(Pass(name, x, last), x.device)
    return over_voxels(n, c, math.prod(size), last, reduce, plan)


def gemm(
    plan: GemmPlan, product: Product, samples: int, size: tuple[int, int, int],
    device: torch.device, heavy: bool, readable: Callable[[], bool],
) -> GemmConfig:  # fmt: skip
    """The launch by this plan of a product whose rows are the voxels of images of this size.

    `heavy` if much is fused with it; `readable` tells whether its operands can be read in boxes.
    """
    k, c = product.channels, product.shape[1]
    if product.name == "conv_dgrad":
        k, c = c, k
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


def wgrad(product: Product, steps: Walk, device: torch.device, heavy: bool) -> WgradConfig:
    """The launch of a product over the voxels that a convolution walks over.

    `heavy` if a pending transform is fused with it. A place along W is a voxel of g, as the first
    tap sees it; to other taps, the same voxel of z is at a place before.
    """
    samples, plan = product.shape[0], plans.chosen(product, device)
    channels, results = layout.padded(product.shape[1]), layout.padded(product.channels)
    (deep, high, wide), (t0, t1, t2), far = steps.out, steps.taps, steps.dilation[2]
    length, pad, is_strided = steps.inp[2], steps.before[2], steps.stride[2] > 1
    # (no tap sees some voxels between taps that are farther apart than g is wide)
    along = not (is_strided or heavy) and (t2 == 1 or wide >= far)
    start, stop = 0, wide
    if along:
        start, stop = pad, min(length + pad, wide + (t2 - 1) * far)
    exact = precision.of(product.dtype) == "ieee"
    rows, columns = t0 * t1 * channels * (1 if along else t2), results * (t2 if along else 1)
    most = min(plan.columns, 64) if exact or heavy else plan.columns
    block_n, block_n2, q_blocks = _columns(columns, most, not (exact or heavy))
    if exact or heavy:
        block_r = _rows(rows, min(plan.rows, 64 if exact else 128))
    else:
        block_r = _rows(rows, plan.tallest(block_n + block_n2))
    block_v, width = _places(high, stop - start, 16 if exact else plan.block_v)
    across, lines = -(-(stop - start) // width), -(-high // (block_v // width))
    others, visited = samples * -(-rows // block_r) * q_blocks, deep * lines * across
    part = max(1, -(-visited // max(1, min(PROGRAMS // max(others, 1), visited // 4))))
    splits = max(1, -(-visited // part))
    # what a row sees of W, all see: taps are columns, or tile W, or there is one, without padding
    is_shared = along or is_strided or (t2 == 1 and pad == 0 and wide <= length)
    # results of a thread, so many that none spill
    held = 16 if exact or heavy else 96 if product.dtype.itemsize == 2 else 32
    return WgradConfig(
        along, width < block_v or not is_shared, block_r, block_n, block_n2, block_v, start, stop,
        width, across, lines, visited, part, splits, -(-rows // block_r), q_blocks,
        others * splits,
        _warps(held, block_r * max(block_n + block_n2, block_v)), plan.stages,
    )  # fmt: skip


@functools.lru_cache(4096)
def _places(high: int, wide: int, most: int) -> tuple[int, int]:
    """Return how many places a step visits, and of a row at most: the fewest steps, of which each
    costs as much as 32 places more, and 1.15 times as much where it visits several rows: guessed,
    by the instructions of loops."""
    powers = [1 << power for power in range(most.bit_length())]
    found = [(v, w) for v in powers if v >= 16 for w in powers if w <= v]

    def cost(pair: tuple[int, int]) -> tuple[float, int]:
        v, w = pair
        steps = -(-wide // w) * -(-high // (v // w))
        return steps * (v + 32) * (1.15 if w < v else 1.0), -w

    return min(found, key=cost)


@functools.lru_cache(4096)
def _columns(columns: int, most: int, two: bool) -> tuple[int, int, int]:
    """Return a tile's columns for a first product, for a second, and the tiles that cover all.

    A single one has 64 at most: of 128, ptxas for sm_90 makes each wait for the one before.
    """
    tiles = -(-columns // most)
    one = -(-columns // (8 * tiles)) * 8  # in whole words
    block = _power(one)
    first, second = block // 2, max(16, _power(one - block // 2))
    if not two or (block <= 64 and first + second >= block):
        first, second = max(16, block), 0
    return first, second, -(-columns // (first + second))


@functools.lru_cache(4096)
def _rows(rows: int, tallest: int) -> int:
    """Return the height of a tile. It costs what its rows do, and 144 more for its columns: by this
    guess 288 rows are two tiles of 256, which has the lowest bound on an H100."""
    heights = [1 << power for power in range(4, tallest.bit_length())]
    return min(heights, key=lambda height: (-(-rows // height) * (height + 144), height))


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
