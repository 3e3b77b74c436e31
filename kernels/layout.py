"""How images lie in memory where convolutions read them: channels last, in words of 8 channels.

Every voxel begins at a multiple of 8 channels, so that accesses are of 16 bytes: 21 channels are
stored as 24. What is in the rest of the last word is undefined: whoever reads it drops it, and
whoever writes it writes anything.
"""

import math

import torch
from torch import Tensor

WORD = 8


def padded(channels: int) -> int:
    """The number of channels that are stored."""
    return -(-channels // WORD) * WORD


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialized image (N, C, *X), channels last in whole words."""
    n, c, *size = shape
    strides = _last(shape, padded(c))
    if c % WORD == 0:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if torch.compiler.is_compiling():  # dynamo knows no `set_`
        return torch.empty(n, *size, padded(c), dtype=dtype, device=device)[..., :c].movedim(-1, 1)
    # no view of anything, so that users may change what a block returns in place
    room = torch.empty(n * strides[0], dtype=dtype, device=device)
    return room.new_empty(0).set_(room.untyped_storage(), 0, shape, strides)


def _last(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Strides of an image (N, C, *X) whose voxels are so many channels apart."""
    strides, step = [], channels
    for n in reversed(shape[2:]):
        strides.append(step)
        step *= max(n, 1)
    return step, 1, *reversed(strides)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate an image of the shape of x, laid out as results of x are (`sized`)."""
    return sized(x, tuple(x.shape[2:]), dtype)


def likened(out: Tensor, x: Tensor) -> Tensor:
    """Return `out`, computed from x and of its shape, laid out as `like(x)`: itself, or a copy.

    It is never x itself, which no operator may return.
    """
    shadow = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if out is not x and out.stride() == like(shadow, out.dtype).stride():
        return out
    return like(x, out.dtype).copy_(out)


def wider(x: Tensor, more: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized, dense image of so many more channels, channels last if x is."""
    return _dense(x, x.shape[1] + more, tuple(x.shape[2:]), dtype)


def pooled(x: Tensor, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Uninitialized images for the maximum of x over windows, and for where in its window it is."""
    size = tuple(n // t for n, t in zip(x.shape[2:], window, strict=True))
    numbers = torch.uint8 if math.prod(window) <= 256 else torch.int32
    return sized(x, size, x.dtype), sized(x, size, numbers)


def sized(x: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an image of another size, with the channels of x, laid out as results of x are.

    That is in whole words if x is, channels last if x is, or else channels first; always dense,
    whatever gaps or transposed axes x has. Kernels, references and fake implementations all lay
    out their results by this function, so that they agree. It gives the same answer for x and for
    a copy of x by `like`.
    """
    if is_padded(x):
        return empty((*x.shape[:2], *size), dtype, x.device)
    return _dense(x, x.shape[1], size, dtype)


def _dense(x: Tensor, channels: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized image as large as said, channels last if x is."""
    n, c = x.shape[:2]
    if c > 1 and x.stride(1) == 1:
        shape = (n, channels, *size)
        return torch.empty_strided(shape, _last(shape, channels), dtype=dtype, device=x.device)
    return torch.empty(n, channels, *size, dtype=dtype, device=x.device)


def is_padded(x: Tensor) -> bool:
    """Whether x is channels last with words that are not full."""
    c = x.shape[1]
    steps = strides(x) if c % WORD and x.stride(1) == 1 else None
    return steps is not None and steps[2] == padded(c)


def strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of samples, channels and voxels; None if the voxels have no common stride."""
    step = reach = None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1:
            if reach is not None and stride != reach:
                return None
            step = stride if step is None else step  # 0 for what was expanded, a gradient of a sum
            reach = stride * size
    return x.stride(0), x.stride(1), 1 if step is None else step


def is_in_words(x: Tensor) -> bool:
    """Whether each voxel's channels can be read in whole words, the last one included."""
    n, c, *size = x.shape
    steps = strides(x)
    if steps is None or (c > 1 and steps[1] != 1) or x.data_ptr() % 16:
        return False
    sample, _, voxel = steps
    many, voxels = n > 1, math.prod(size)
    if (many and sample % WORD) or (voxels > 1 and (voxel % WORD or voxel < padded(c))):
        return False
    last = x.storage_offset() + many * (n - 1) * sample + (voxels - 1) * voxel * (voxels > 1)
    return (last + padded(c)) * x.itemsize <= x.untyped_storage().nbytes()


def in_words(x: Tensor) -> Tensor:
    """The image itself if it can be read in whole words, or a copy that can."""
    return x if is_in_words(x) else empty(tuple(x.shape), x.dtype, x.device).copy_(x)


def packed(table: Tensor) -> Tensor:
    """Weights (T, C, K) in whole words, with zeros around: (T, padded(C), padded(K))."""
    t, c, k = table.shape
    if c % WORD == 0 and k % WORD == 0:
        return table.contiguous()
    out = table.new_zeros(t, padded(c), padded(k))
    out[:, :c, :k] = table
    return out


def tables(x: Tensor, *count: int) -> Tensor:
    """Allocate tables (*count, N, C) for an image or a table, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty((*count, *x.shape[:2]), dtype=dtype, device=x.device)
