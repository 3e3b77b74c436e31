"""Parsing of arguments that come in several forms."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from cassetta.core.typing import DataType


def to_torch_dtype(dtype: DataType) -> torch.dtype | None:
    """A torch dtype from a torch or numpy dtype, a Python type, or the name of any of them."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    name = name or getattr(dtype, "__name__", str(dtype))
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r} names no torch dtype: use, say, 'float32' or 'bfloat16'")
    return found


def extrapolate(values: list[int], length: int, step: Callable[[int, int], float]) -> list[int]:
    """`values` cut to `length`, or continued by `step(last, 1)`, `step(last, 2)`, ..."""
    missing = range(1, length - len(values) + 1)
    return (values + [max(1, int(step(values[-1], n))) for n in missing])[:length]


def build(what: str, factory: Callable[..., Any], *args: Any, offered: dict, **asked: Any) -> Any:
    """Call `factory(*args, **asked)`, adding those keywords `offered` that it takes.

    Constructors of layers differ in what they want to know (a norm may or may not take `affine`,
    an attention `ndim`): what the caller did not ask for is only passed where it is understood.
    """
    bound = getattr(factory, "keywords", {}) if isinstance(factory, functools.partial) else {}
    try:
        takes = inspect.signature(factory).parameters
    except ValueError:  # a function written in C need not say
        takes = {}
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    taken = {k: v for k, v in offered.items() if (anything or k in takes) and k not in bound}
    try:
        return factory(*args, **{**taken, **asked})
    except TypeError as error:
        given = ", ".join(
            [*map(repr, args), *(f"{k}={v!r}" for k, v in {**taken, **asked}.items())]
        )
        raise TypeError(f"{what}={factory!r} cannot be called as ({given}): {error}") from error
