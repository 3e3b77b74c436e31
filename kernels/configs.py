"""How large a tile is and how many voxels a program visits: a pure function of the shape."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """The launch of a pass over an image (N, C, V voxels)."""

    block_v: int  # voxels of a tile
    block_c: int  # channels of a tile
    loops: int  # tiles that a program visits, one after the other along the voxels
    chunks: int  # programs along the voxels
    c_blocks: int  # programs along the channels
    programs: int
    warps: int = 8

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


TILE = 2048
"""Elements of a tile: with eight warps, 8 for each thread, a 16-byte access in 16 bits. (Twice as
many made the compiler for sm_100 spill.)"""

REDUCED = 64
"""Tiles that a program of a reduction visits at most. The partial results that it leaves are then
at most 1/2^16 of the image, and the second stage reads them in no time."""


def of(x: Tensor, strides: tuple[int, int, int], reduce: bool) -> Config:
    """The launch over an image of these strides (of samples, channels, voxels)."""
    n, c, *size = x.shape
    return over_voxels(n, c, math.prod(size), strides[1] == 1 and c > 1, reduce)


def over_voxels(n: int, c: int, v: int, channels_last: bool, reduce: bool) -> Config:
    """The launch of an elementwise pass, or of the first stage of a reduction."""
    block_c = min(_power(c), 64) if channels_last else 1
    block_v = TILE // block_c
    if v < block_v:
        block_v = max(16, _power(v))
    tiles = -(-v // block_v)
    c_blocks = -(-c // block_c)
    loops = 1
    if reduce:  # enough programs to fill a large GPU come first, then few partial results
        loops = max(1, min(REDUCED, tiles * n * c_blocks // 2048, tiles))
    chunks = -(-tiles // loops)
    return Config(block_v, block_c, loops, chunks, c_blocks, n * c_blocks * chunks)


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
