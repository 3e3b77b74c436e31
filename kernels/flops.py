"""What torch's `FlopCounterMode` counts of the passes: nothing.

It counts multiplications of matrices, and no elementwise operation; so a fused network has the
count of the plain one, that of its convolutions.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula  # imports triton

from cassetta.kernels import ops


def register() -> None:
    """Tell the counters that are made from now on."""
    passes = [getattr(torch.ops.cassetta, name) for name in ops.NAMES]
    new = [one for one in passes if one not in flop_registry]
    if new:
        register_flop_formula(new)(_nothing)


def _nothing(*args: Any, **options: Any) -> int:
    return 0
