"""How large a tile is and how many voxels a program visits: by the shape, and what was measured."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import evidence
from cassetta.kernels.types import Geometry

REGISTERS = 255
"""Of a thread of a convolution, at most. Said so, or the compiler keeps to fewer, and spills."""


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

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "STAGES": self.stages,
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
    part: int  # voxels that a program visits
    splits: int  # programs along the voxels of a sample
    c_blocks: int
    k_blocks: int
    programs: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "BLOCK_T": self.block_t, "BLOCK_C": self.block_c, "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v, "STAGES": self.stages,
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": REGISTERS}


class Plan(NamedTuple):
    """What may be tuned of the launch of a pass over an image."""

    tile: int = 2048  # elements
    warps: int = 8

    def __str__(self) -> str:
        return f"{self.tile} elements, {self.warps} warps"


class GemmPlan(NamedTuple):
    """What may be tuned of the launch of a convolution, or of the gradient of its image."""

    block_m: int = 128  # voxels of a tile
    block_n: int = 128  # channels of a tile, at most
    block_k: int = 64  # channels that are multiplied in a step, at most
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n} x {self.block_k}, {self.stages} stages"


class WgradPlan(NamedTuple):
    """What may be tuned of the launch of the gradient of weights."""

    rows: int = 64  # taps x channels of a tile
    block_n: int = 64  # channels of a tile, at most
    block_v: int = 32  # voxels that are multiplied in a step
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.rows} x {self.block_n} x {self.block_v}, {self.stages} stages"


PLANS = (Plan(), Plan(1024, 4), Plan(1024, 8), Plan(4096, 16))
"""The first by rule, all to be tried by the tuner. 8 elements for a thread, a 16-byte access in 16
bits, or 4; 16 made the compiler for sm_100 spill."""

GEMM_PLANS = (
    GemmPlan(), GemmPlan(128, 64, 64), GemmPlan(128, 128, 32, 4), GemmPlan(64, 64, 64, 4),
    GemmPlan(64, 128, 64),
)  # fmt: skip
WGRAD_PLANS = (
    WgradPlan(), WgradPlan(128, 64, 32), WgradPlan(64, 128, 32), WgradPlan(64, 64, 64),
)  # fmt: skip
_GEMM_PLANS_32 = (GemmPlan(64, 64, 32), GemmPlan(64, 64, 16), GemmPlan(64, 32, 32))
_WGRAD_PLANS_32 = (WgradPlan(64, 64, 32), WgradPlan(64, 32, 32))
"""Of float32, whose operands are twice as large."""

VOXELS = 2**31 - 2**16
"""A channel has fewer: kernels count them in 31 bits, and a tile may end outside the image."""

REDUCED = 64
"""Tiles that a program of a reduction visits at most. The partial results that it leaves are then
at most 1/2^16 of the image, and the second stage reads them in no time."""


class Pass(NamedTuple):
    """A pass over an image, as it is named in the table of what was measured."""

    name: str
    image: Tensor
    last: bool  # whether channels come last
    plans: tuple[Plan, ...] = PLANS

    @property
    def key(self) -> str:
        """In words."""
        shape, dtype = "x".join(map(str, self.image.shape)), str(self.image.dtype)[6:]
        return f"{self.name} {shape} {'last' if self.last else 'first'} {dtype}"

    def without_data(self) -> "Pass":
        """The same, of an image that holds no memory."""
        x = self.image
        return self._replace(
            image=torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        )


class Product(NamedTuple):
    """A pass of a convolution, as it is named in the table of what was measured."""

    name: str  # "conv_fprop", "conv_dgrad" or "conv_wgrad"
    shape: tuple[int, ...]  # of the image that the convolution reads
    channels: int  # of what it returns
    taps: tuple[int, ...]
    geometry: Geometry
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """In words."""
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        stride, padding, dilation, _ = self.geometry
        how = f"k{self.taps} s{stride} p{padding} d{dilation}"
        return f"{self.name} {shape} to {self.channels}, {how}, {dtype}"

    @property
    def plans(self) -> tuple[GemmPlan, ...] | tuple[WgradPlan, ...]:
        """The plans that may run it, the first by rule."""
        if self.dtype.itemsize == 2:
            return WGRAD_PLANS if self.name == "conv_wgrad" else GEMM_PLANS
        return _WGRAD_PLANS_32 if self.name == "conv_wgrad" else _GEMM_PLANS_32

    def without_data(self) -> "Product":
        """Itself."""
        return self


_forced: dict[type, Any] = {}
_asked: dict[str, Pass | Product] | None = None


def of(name: str, x: Tensor, strides: tuple[int, int, int], reduce: bool) -> Config:
    """The launch of a pass over an image of these strides (of samples, channels, voxels)."""
    n, c, *size = x.shape
    last = strides[1] == 1 and c > 1
    plan = _plan(Pass(name, x, last), x.device)
    return over_voxels(n, c, math.prod(size), last, reduce, plan)


def gemm(
    product: Product, samples: int, voxels: int, device: torch.device, heavy: bool
) -> GemmConfig:
    """The launch of a product of `voxels` rows per sample; `heavy` if much is fused with it."""
    k, c = product.channels, product.shape[1]
    if product.name == "conv_dgrad":
        k, c = c, k
    plan = _plan(product, device)
    block_n = max(16, min(_power(k), plan.block_n))
    block_k = max(16, min(_power(c), plan.block_k))
    exact = precision(product.dtype) == "ieee"
    if heavy or exact:
        block_n, block_k = min(block_n, 64), min(block_k, 16 if exact else 32)
    warps = _warps(16 if exact or heavy else 64, plan.block_m * max(block_n, block_k))
    tiles, k_blocks = -(-voxels // plan.block_m), -(-k // block_n)
    programs = samples * tiles * k_blocks
    return GemmConfig(plan.block_m, block_n, block_k, tiles, k_blocks, programs, warps, plan.stages)


def wgrad(product: Product, voxels: int, device: torch.device, heavy: bool) -> WgradConfig:
    """The launch of a product over `voxels` of each sample; `heavy` if much is fused with it.

    As many splits as fill a large GPU, of 512 voxels at least, so that adding their shares is
    nothing beside computing them.
    """
    samples, c = product.shape[:2]
    taps = math.prod(product.taps)
    plan = _plan(product, device)
    block_n = max(16, min(_power(product.channels), plan.block_n))
    block_c = max(16, min(_power(c), plan.rows))
    block_t = min(_power(taps), max(1, plan.rows // block_c))
    exact = precision(product.dtype) == "ieee"
    block_v = min(plan.block_v, 16) if exact else plan.block_v
    warps = _warps(16 if exact or heavy else 32, block_t * block_c * max(block_n, block_v))
    t_blocks, c_blocks = -(-taps // block_t), -(-c // block_c)
    k_blocks = -(-product.channels // block_n)
    others = samples * t_blocks * c_blocks * k_blocks
    splits = max(1, min(2048 // max(others, 1), voxels // 512))
    part = -(-voxels // (splits * block_v)) * block_v
    splits = max(1, -(-voxels // part))
    return WgradConfig(
        block_t, block_c, block_n, block_v, part, splits, c_blocks, k_blocks,
        others * splits, warps, plan.stages,
    )  # fmt: skip


def _warps(most: int, tile: int) -> int:
    """Enough that a thread holds no more than so much of a tile, and its registers do not spill."""
    return 4 if tile <= 4 * 32 * most else 8


def _plan(what: Pass | Product, device: torch.device) -> Any:
    """The plan that was the fastest by measurement; the first where none was measured."""
    plans = what.plans
    forced = _forced.get(type(plans[0]))
    if forced is not None or device.type == "meta":
        return forced or plans[0]
    if _asked is not None:
        _asked[what.key] = what.without_data()
    table = evidence.table(device)
    record = table.find(what.key) if table.records else None
    by_name = {str(plan): plan for plan in plans} if record else {}
    return by_name.get(record.choice, plans[0]) if record else plans[0]


@contextmanager
def use_plan(*plans: Any) -> Iterator[None]:
    """Every launch by these plans, each for those of its kind."""
    global _forced
    before, _forced = _forced, {**_forced, **{type(plan): plan for plan in plans}}
    try:
        yield
    finally:
        _forced = before


@contextmanager
def listening() -> Iterator[dict[str, Pass | Product]]:
    """What is planned in this block of code, by key."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


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


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are rounded: as torch lets cuDNN do it."""
    exact = dtype is torch.float32 and not torch.backends.cudnn.allow_tf32
    return "ieee" if exact else "tf32"  # which says nothing of half precision


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
