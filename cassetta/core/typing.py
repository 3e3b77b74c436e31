"""The types that public signatures speak of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from bounds.types import BoundLike
from torch import nn

T = TypeVar("T")

OneOrSeveral = T | Sequence[T]
"""One value for all, or one per spatial dimension (the last one is repeated)."""

ModuleLike = nn.Module | type[nn.Module] | Callable[..., nn.Module]
"""A module (shared by all who get it), its class, or a function that makes one."""

ActivationType = str | ModuleLike | None
"""Name of an activation in `torch.nn` or `cassetta.layers` (any case), `ModuleLike`, or None."""

NormType = str | int | ModuleLike | None
"""`"batch"`, `"instance"`, `"layer"`, a number of groups, `ModuleLike`, or None."""

DropoutType = float | int | ModuleLike | None
"""Probability in [0, 1] that a channel is dropped, `ModuleLike`, or None."""

AttentionType = str | bool | ModuleLike | None
"""`"sqzex"`, `"cbam"`, `"dp"`, `"sdp"`, `"mha"`, True (`"sqzex"`), `ModuleLike`, or None."""

SeparableType = bool | Literal["crosshair", "cross"]
"""Whether, and how, a convolution is split into one-dimensional ones."""

BoundType = BoundLike
"""A boundary condition in the names of torch-bounds, e.g. `"zeros"`, `"replicate"`, `"dct2"`."""

InterpolationType = int | str
"""Order of a B-spline, 0 to 7, or its name: `"nearest"`, `"linear"`, ..., `"seventh"`."""

DeviceType = str | torch.device
"""A device, or its name: `"cpu"`, `"cuda:0"`."""

DataType = Any
"""A torch or numpy floating-point type, or its name: `torch.float16`, `np.float32`, `"double"`."""
