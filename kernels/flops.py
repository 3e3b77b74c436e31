"""What torch's `FlopCounterMode` counts of the passes: products of matrices, nothing elementwise.

So a fused network has the count of the plain one, that of its convolutions.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula  # imports triton

from cassetta.kernels import ops


def register() -> None:
    """Tell the counters that are made from now on."""
    formulas = {
        "conv_fprop": lambda x, *rest, out_shape: _products(rest[8], out_shape[0]),
        "conv_dgrad": lambda g, w, *rest, **options: _products(w, g),
        "conv_wgrad": lambda g, x, *rest, out_shape: _products(out_shape, g),
        "conv_transposed": lambda x, *rest, **options: _products(rest[8], x),
    }
    for name in ops.NAMES:
        one = getattr(torch.ops.cassetta, name)
        if one not in flop_registry:
            register_flop_formula(one)(formulas.get(name, _nothing))


def _products(w: Any, y: Any) -> int:
    """Every weight meets every voxel of y: a multiplication and an addition."""
    return 2 * math.prod(w) * y[0] * math.prod(y[2:])


def _nothing(*args: Any, **options: Any) -> int:
    return 0
