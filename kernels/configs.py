"""How large a tile is and how many voxels a program visits: by the shape, and what was measured."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import evidence


class Config(NamedTuple):
    """The launch of a pass over an image (N, C, V voxels)."""

    block_v: int  # voxels of a tile
    block_c: int  # channels of a tile
    loops: int  # tiles that a program visits, one after the other along the voxels
    chunks: int  # programs along the voxels
    c_blocks: int  # programs along the channels
    programs: int
    warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_V": self.block_v, "BLOCK_C": self.block_c}


class PoolConfig(NamedTuple):
    """The launch of a pass over the pools of a table (N, C)."""

    block_p: int  # pools of a tile
    block_m: int  # members of each
    programs: int
    warps: int = 4

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_P": self.block_p, "BLOCK_M": self.block_m}


class Plan(NamedTuple):
    """What may be tuned of a launch."""

    tile: int = 2048  # elements
    warps: int = 8

    def __str__(self) -> str:
        return f"{self.tile} elements, {self.warps} warps"


PLANS = (Plan(), Plan(1024, 4), Plan(1024, 8), Plan(4096, 16))
"""The first by rule, all to be tried by the tuner. 8 elements for a thread, a 16-byte access in 16
bits, or 4; 16 made the compiler for sm_100 spill."""

REDUCED = 64
"""Tiles that a program of a reduction visits at most. The partial results that it leaves are then
at most 1/2^16 of the image, and the second stage reads them in no time."""


_forced: Plan | None = None
_asked: dict[str, tuple[str, Tensor]] | None = None


def of(name: str, x: Tensor, strides: tuple[int, int, int], reduce: bool) -> Config:
    """The launch of a pass over an image of these strides (of samples, channels, voxels)."""
    n, c, *size = x.shape
    last = strides[1] == 1 and c > 1
    plan = _forced or (PLANS[0] if x.device.type == "meta" else _measured(name, x, last))
    return over_voxels(n, c, math.prod(size), last, reduce, plan)


def key(name: str, x: Tensor, last: bool) -> str:
    """The name of a pass over an image, in the table of what was measured."""
    shape, dtype = "x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
    return f"{name} {shape} {'last' if last else 'first'} {dtype}"


def _measured(name: str, x: Tensor, last: bool) -> Plan:
    """The plan that was the fastest for this pass and image; the first where none was measured."""
    if _asked is not None:
        image = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        _asked[key(name, x, last)] = name, image
    table = evidence.table(x.device)
    if not table.records:
        return PLANS[0]
    record = table.find(key(name, x, last))
    by_name = {str(plan): plan for plan in PLANS}
    return PLANS[0] if record is None else by_name.get(record.choice, PLANS[0])


@contextmanager
def use_plan(plan: Plan) -> Iterator[None]:
    """Every pass by this plan."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


@contextmanager
def listening() -> Iterator[dict[str, tuple[str, Tensor]]]:
    """Which passes are planned in this block of code: name and image (without data) by key."""
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


def over_chunks(n: int, c: int) -> Config:
    """The launch of the second stage of a reduction: a program per sample and block of channels."""
    block_c = min(_power(c), 16)
    c_blocks = -(-c // block_c)
    return Config(64, block_c, 1, 1, c_blocks, n * c_blocks, 4)


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
