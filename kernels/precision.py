"""How products of float32 are rounded: in full ("ieee"), or their factors to 10 bits ("tf32").

As torch lets cuDNN do it, whichever of its two switches said so: `torch.backends.cudnn.allow_tf32`,
or, since torch 2.9, `torch.backends.cudnn.conv.fp32_precision`, after which the former cannot be
read any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def of(dtype: torch.dtype) -> str:
    """How products of this dtype are rounded; of half precision the answer says nothing."""
    return of_convolutions() if dtype is torch.float32 else "tf32"


def of_convolutions() -> str:
    """Of float32, as torch was told."""
    return "tf32" if _switches()[0] in ("tf32", True) else "ieee"


@contextmanager
def use(how: str) -> Iterator[None]:
    """Convolutions and matrix products rounded so in a `with` block, whatever was said before."""
    before, both = _switches(), how if _is_new() else how == "tf32"
    _switch(both, both)
    try:
        yield
    finally:
        _switch(*before)


def _is_new() -> bool:
    return hasattr(torch.backends.cudnn, "conv")


def _switches() -> tuple[Any, Any]:
    """Of convolutions and of matrix products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if _is_new():
        return cudnn.conv.fp32_precision, matmul.fp32_precision
    return cudnn.allow_tf32, matmul.allow_tf32


def _switch(convolutions: Any, products: Any) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if _is_new():
        cudnn.conv.fp32_precision, matmul.fp32_precision = convolutions, products
    else:
        cudnn.allow_tf32, matmul.allow_tf32 = convolutions, products
