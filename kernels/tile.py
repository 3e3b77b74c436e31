"""What the Triton passes share: where a program works, the pending transform, the activations.

A program works on a tile (BLOCK_V, BLOCK_C) of voxels by channels of one sample. An image is three
strides: of samples, channels and voxels; so one kernel serves channels-first (the voxel stride is
1), channels-last (the channel stride is 1), and any mixture among its operands.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cassetta.kernels import boxes, layout, machine, records
from cassetta.kernels.boxes import Box
from cassetta.kernels.configs import Config, GemmConfig, PoolConfig, WgradConfig
from cassetta.kernels.lines import MarchConfig

AnyConfig = Config | PoolConfig | GemmConfig | MarchConfig | WgradConfig

OPTIONS = {"enable_fp_fusion": True}
"""Of every compilation: a multiplication and the addition that follows are rounded once. Said,
because the default of triton 3.10 will be another."""


def on_hopper(_semantic: Any = None) -> tl.constexpr:
    """Within a kernel: whether it is compiled for sm_90; of one that is interpreted, it is not."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.arch == "sm90")


on_hopper.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def place(chunks, c_blocks, BLOCK_C: tl.constexpr):
    """Chunk of voxels, sample, and channels (BLOCK_C,) of this program."""
    program = tl.program_id(0)
    chunk = program % chunks
    rest = program // chunks
    return chunk, rest // c_blocks, (rest % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def box_of(index, Y1, Y2, BOX0: tl.constexpr, BOX1: tl.constexpr, BOX2: tl.constexpr):
    """Which box of those that cover an image it is, along each axis; BOX0 = 0: none."""
    e0, e1, e2 = 0, 0, 0
    if BOX0 > 0:
        deep, across = tl.cdiv(Y1, BOX1), tl.cdiv(Y2, BOX2)
        e0, e1, e2 = index // across // deep, index // across % deep, index % across
    return e0, e1, e2


@triton.jit
def voxels_of(
    index, e0, e1, e2, V, Y0, Y1, Y2,
    BLOCK: tl.constexpr, BOX0: tl.constexpr, BOX1: tl.constexpr, BOX2: tl.constexpr,
):  # fmt: skip
    """The voxels (BLOCK,) of a tile of an image, where each is, and whether it is inside.

    Those of a box e0, e1, e2; or, BOX0 = 0, that follow one another in memory.
    """
    v = tl.arange(0, BLOCK)
    if BOX0 > 0:
        y0, y1 = e0 * BOX0 + v // (BOX1 * BOX2), e1 * BOX1 + v // BOX2 % BOX1
        y2 = e2 * BOX2 + v % BOX2
        inside = (y0 < Y0) & (y1 < Y1) & (y2 < Y2)
        v = (y0 * Y1 + y1) * Y2 + y2
    else:
        v += index * BLOCK
        inside = v < V
        y0, y1, y2 = v // Y2 // Y1, v // Y2 % Y1, v % Y2
    return v, y0, y1, y2, inside


@triton.jit
def edge(C, WORDS: tl.constexpr):
    """How many channels a program may touch: those of the last word, where they come in words."""
    last = C
    if WORDS:
        last = tl.cdiv(C, 8) * 8
    return last


@triton.jit
def carried(digit, size):
    """Return a digit that starts again at `size`, and 1 if it does: the next one's share.

    So steps over several axes are counted, not divided.
    """
    wrap = (digit == size).to(tl.int32)
    return digit * (1 - wrap), wrap


@triton.jit
def whole(start, lane, wanted):
    """Return channels start + lane, in words of 8; those of the first word where not wanted.

    The compiler is told of the words: triton 3.9 does not see them, and would copy nothing ahead.
    """
    c = tl.where(wanted, start + lane // 8 * 8, 0) + lane % 8
    return tl.max_contiguous(tl.multiple_of(c, 8), 8)


@triton.jit
def at(ptr, n, v, c, stride_n, stride_c, stride_v, WIDE: tl.constexpr, WORDS: tl.constexpr):
    """Where the voxels v and channels c of sample n are: pointers (BLOCK_V, BLOCK_C).

    The offsets inside a sample are in 64 bits where one needs them. In words, strides are multiples
    of 8, and the compiler is shown so.
    """
    if WORDS:
        stride_n = stride_n // 8 * 8
        stride_v = stride_v // 8 * 8
        stride_c = 1
    if WIDE:
        v = v.to(tl.int64)
        c = c.to(tl.int64)
    return ptr + n.to(tl.int64) * stride_n + (v[:, None] * stride_v + c[None, :] * stride_c)


@triton.jit
def row(ptr, n, c, C, DEFAULT: tl.constexpr):
    """The entries (1, BLOCK_C) of a table (N, C); DEFAULT where there is no table."""
    if ptr is None:
        values = (c * 0 + DEFAULT).to(tl.float32)[None, :]  # (in the layout of c, for Gluon)
    else:
        values = tl.load(ptr + n * C + c, mask=c < C, other=DEFAULT)[None, :]
    return values


@triton.jit
def tanh(u):
    """Without cancellation near 0: an odd series there."""
    w = u * u
    rest = w * (0.1333333333 - w * (0.0539682540 - w * 0.0218694885))
    series = u * (1 - w * (0.3333333333 - rest))
    return tl.where(tl.abs(u) < 0.25, series, 2 * tl.sigmoid(2 * u) - 1)


@triton.jit
def expm1(u):
    """exp(u) - 1 for u <= 0, and NaN for NaN."""
    tail = u * (0.1666666667 + u * (0.0416666667 + u * (0.0083333333 + u * 0.0013888889)))
    return tl.where(tl.abs(u) < 0.1, u * (1 + u * (0.5 + tail)), tl.exp(u) - 1)


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0, and NaN for NaN."""
    tail = e * (0.25 - e * (0.2 - e * (0.1666666667 - e * 0.1428571429)))
    return tl.where(e < 0.1, e * (1 - e * (0.5 - e * (0.3333333333 - tail))), tl.log(1 + e))


@triton.jit
def below(u, most):
    """The smaller of two numbers; NaN for NaN, which tl.minimum would take for the larger."""
    return tl.where(u > most, most, u)


@triton.jit
def activation(u, p, q, slope, ACT: tl.constexpr):
    """act(u), and NaN for NaN; see `activations` for the constants."""
    if ACT == "relu":
        u = tl.where(u < 0, 0.0, u)
    elif ACT == "leaky_relu":
        u = tl.where(u > 0, u, p * u)
    elif ACT == "prelu":
        u = tl.where(u > 0, u, slope * u)
    elif ACT == "elu":
        u = tl.where(u > 0, u, p * expm1(below(u, 0.0)))
    elif ACT == "gelu":
        u = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        u = 0.5 * u * (1 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    elif ACT == "silu":
        u = u * tl.sigmoid(u)
    elif ACT == "mish":
        e = tl.exp(below(u, 20.0))  # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
        u = u * (e * (e + 2) / (e * (e + 2) + 2))
    elif ACT == "tanh":
        u = tanh(u)
    elif ACT == "sigmoid":
        u = tl.sigmoid(u)
    elif ACT == "softplus":
        u = tl.where(u * p > q, u, log1p(tl.exp(below(u * p, q))) / p)
    elif ACT == "hardswish":
        u = tl.where(u <= -3, 0.0, tl.where(u >= 3, u, u * (u + 3) / 6))
    return u


@triton.jit
def transformed(
    x, n, c, C, s1_ptr, t1_ptr, slope_ptr, s2_ptr, t2_ptr, p, q, ACT: tl.constexpr
):  # fmt: skip
    """s2 act(s1 x + t1) + t2, of a tile in float32; without tables, x to the bit, -0.0 included."""
    if s1_ptr is not None:
        x = row(s1_ptr, n, c, C, 1.0) * x + row(t1_ptr, n, c, C, 0.0)
    x = activation(x, p, q, row(slope_ptr, n, c, C, 0.0), ACT)
    if s2_ptr is not None:
        x = row(s2_ptr, n, c, C, 1.0) * x + row(t2_ptr, n, c, C, 0.0)
    return x


@triton.jit
def derivative(u, p, q, slope, ACT: tl.constexpr):
    """act'(u)."""
    d = tl.full(u.shape, 1.0, tl.float32)
    if ACT == "relu":
        d = tl.where(u <= 0, 0.0, 1.0)
    elif ACT == "leaky_relu":
        d = tl.where(u > 0, 1.0, p)
    elif ACT == "prelu":
        d = tl.where(u > 0, 1.0, slope)
    elif ACT == "elu":
        d = tl.where(u > 0, 1.0, p * tl.exp(below(u, 0.0)))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        d = 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * density
    elif ACT == "gelu_tanh":
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        slope_t = (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * u * u)
        d = 0.5 * (1 + t) + 0.5 * u * slope_t
    elif ACT == "silu":
        s = tl.sigmoid(u)
        d = s * (1 + u * (1 - s))
    elif ACT == "mish":
        e = tl.exp(below(u, 20.0))
        t = e * (e + 2) / (e * (e + 2) + 2)
        d = t + u * tl.sigmoid(u) * (1 - t * t)
    elif ACT == "tanh":
        d = 4 * tl.sigmoid(2 * u) * tl.sigmoid(-2 * u)  # 1 - tanh^2, without cancellation
    elif ACT == "sigmoid":
        d = tl.sigmoid(u) * tl.sigmoid(-u)
    elif ACT == "elu_by_result":
        d = tl.where(u > 0, 1.0, u + p)
    elif ACT == "tanh_by_result":
        d = 1 - u * u
    elif ACT == "sigmoid_by_result":
        d = u * (1 - u)
    elif ACT == "softplus":
        d = tl.where(u * p > q, 1.0, tl.sigmoid(u * p))
    elif ACT == "hardswish":
        d = tl.where(u <= -3, 0.0, tl.where(u < 3, u / 3 + 0.5, 1.0))
    return d


def strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The tensor and its three strides; copied if the voxels have no common stride.

    Results are laid out alike, be they made of the tensor or of the copy (`layout.sized`).
    """
    steps = layout.strides(x)
    if steps is None:
        x = layout.like(x, x.dtype).copy_(x)
        steps = layout.strides(x)
        assert steps is not None
    return x, steps


def image_in_boxes(x: Tensor | None, box: Box, channels: int) -> TensorDescriptor | None:
    """An image in words, as what copies boxes of so many channels takes it: (N, X0, X1, X2, C)."""
    if x is None:
        return None
    steps = boxes.strides(x)
    assert steps is not None, "whoever chose boxes has asked whether this image can be read so"
    n, c, *size = x.shape
    shape = [n, *(1,) * (3 - len(size)), *size, c]
    return TensorDescriptor(x, shape, list(steps), [1, *box, channels])


def table_in_boxes(w: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """Weights (T, C, K) in words, likewise."""
    if w is None:
        return None
    _, c, k = w.shape
    return TensorDescriptor(w, list(w.shape), [c * k, k, 1], [1, rows, columns])


def voxels(x: Tensor) -> int:
    """How many there are in one channel of one sample."""
    return math.prod(x.shape[2:])


def is_wide(*images: Tensor) -> bool:
    """Whether offsets inside a sample of any of these may exceed 31 bits."""
    return any(_reach(x) >= 2**31 for x in images)


def _reach(x: Tensor) -> int:
    last = (s * (n - 1) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True))
    return sum(last) + 2**16  # a tile may begin inside and end outside


def in_words(*images: Tensor) -> bool:
    """Whether a pass over these images touches whole words of 8 channels.

    Where the number of channels is a multiple of 16, the compiler sees that by itself.
    """
    return images[0].shape[1] % 16 != 0 and all(map(layout.is_in_words, images))


def launch(kernel: Any, x: Tensor, config: AnyConfig, *args: Any, **constants: Any) -> None:
    """Start the kernel on the device of x, which need not be the current one."""
    if config.programs:
        constants |= {**config.blocks, **config.options, **OPTIONS}
        tape = records.here.tape
        with machine.guard(x):
            if tape is not None:
                tape.launch(kernel, config.programs, args, constants)
            else:
                kernel[(config.programs,)](*args, **constants)
