"""How products of float32 are rounded: in full ("ieee"), or of factors of 10 bits ("tf32").

Tensor cores cut factors to 10 bits where kernels do not round them, and ours do not: a factor is
off by less than 2^-10 of itself, a product by less than 2^-9, twice what rounding would leave.

As torch lets cuDNN do it, whichever of its two switches said so: `torch.backends.cudnn.allow_tf32`,
or, since torch 2.9, `torch.backends.cudnn.conv.fp32_precision`, which is known of both, but after
which the former cannot be read any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_told: Any = getattr(torch._C, "_get_fp32_precision_getter", None)  # since torch 2.9


def of(dtype: torch.dtype) -> str:
    """How products of this dtype are rounded; of half precision the answer says nothing."""
    return of_convolutions() if dtype is torch.float32 else "tf32"


def of_convolutions() -> str:
    """Of float32, as torch was told."""
    how = torch.backends.cudnn.allow_tf32 if _told is None else _told("cuda", "conv")
    return "tf32" if how in ("tf32", True) else "ieee"


@contextmanager
def use(how: str) -> Iterator[None]:
    """Convolutions and matrix products rounded so in a `with` block, whatever was said before.

    By the switch that is in use, so that whatever runs in the block can read it as before.
    """
    before = _switches()
    both = how == "tf32" if isinstance(before[0], bool) else how
    _switch(both, both)
    try:
        yield
    finally:
        _switch(*before)


def _switches() -> tuple[Any, Any]:
    """Of convolutions and of matrix products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        return cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:  # the new switch is in use; what is as above it is inherited
        above = cudnn.fp32_precision
        own = cudnn.conv.fp32_precision, matmul.fp32_precision
        return tuple("none" if one == above else one for one in own)  # type: ignore[return-value]


def _switch(convolutions: Any, products: Any) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if isinstance(convolutions, bool):
        cudnn.allow_tf32, matmul.allow_tf32 = convolutions, products
    else:
        cudnn.conv.fp32_precision, matmul.fp32_precision = convolutions, products
