"""Convolution in 1 to 3 dimensions in plain PyTorch, with boundary conditions of torch-bounds."""

import torch
from bounds import BoundType as Bound, indexing, to_enum, to_fourier
from torch import Tensor
from torch.nn import functional as F

from cassetta.core.typing import BoundType
from cassetta.kernels import dispatch
from cassetta.kernels.types import Geometry

Pairs = tuple[tuple[int, int], ...]


def same_padding(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Pairs:
    """Padding (before, after) per axis that keeps the size; an even kernel pads more after."""
    spans = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((span // 2, span - span // 2) for span in spans)


def pad(inp: Tensor, padding: Pairs, mode: BoundType) -> Tensor:
    """Extend each spatial axis by (before, after) voxels that follow the boundary condition `mode`.

    inp : (B, C, *size) -> (B, C, *(before + size + after)). Any amount of padding is allowed.
    The names are those of torch-bounds: `"reflect"` repeats the voxel at the edge (dct2), and what
    `torch.nn` calls "reflect" is `"mirror"` (dct1).
    """
    if to_enum(mode) == Bound.zero:
        return F.pad(inp, [amount for pair in reversed(padding) for amount in pair])
    index_of = getattr(indexing, str(to_fourier(mode)))
    for axis, (before, after) in enumerate(padding, start=2):
        if before or after:
            size = inp.shape[axis]
            outside = torch.arange(-before, size + after, device=inp.device)
            index, sign = index_of(outside, size)
            inp = inp.index_select(axis, index)
            if isinstance(sign, Tensor):
                inp = inp * sign.to(inp.dtype).reshape([-1] + [1] * (inp.ndim - axis - 1))
    return inp


def conv(
    inp: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    padding_mode: BoundType = "zeros",
) -> Tensor:
    """Cross-correlate inp (B, C, *size) with weight (K, C/groups, *kernel_size): (B, K, *out)."""
    if padding_mode != "zeros" and to_enum(padding_mode) != Bound.zero:  # the word is quick to tell
        inp = pad(inp, geometry.padding, padding_mode)
        stride, padding, dilation, groups = geometry
        geometry = Geometry(stride, ((0, 0),) * len(padding), dilation, groups)
    return dispatch.implementation().conv(inp, weight, bias, geometry)


def conv_transposed(
    inp: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: tuple[int, ...],
) -> Tensor:
    """The adjoint of `conv`: inp (B, K, *size), weight (K, C/groups, *kernel): (B, C, *out)."""
    passes = dispatch.implementation()
    return passes.conv_transposed(inp, weight, bias, geometry, output_padding)
