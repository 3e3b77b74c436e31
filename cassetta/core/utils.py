"""Parsing of arguments that come in several forms."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
    further = [max(1, int(min(step(values[-1], n), 2.0**31))) for n in missing]
    return (values + further)[:length]  # too large a number is refused by whoever takes it


def build(
    what: str, given: Any, accepted: str, *args: Any, offered: dict[str, Any], **asked: Any
) -> nn.Module:
    """The module that `given` is (shared by all who get it), or that it makes.

    A class or function is called as `given(*args, **asked)`, with those keywords `offered` that it
    takes: constructors differ in what they want to know (a norm may or may not take `affine`, an
    attention `ndim`), and what the caller did not ask for is only passed where it is understood.

    Raises
    ------
    TypeError
        If `given` is neither, cannot be called so, or makes no module.
    ValueError
        If options are `asked` of a module that is there already.
    """
    if isinstance(given, nn.Module):
        if asked:
            raise ValueError(
                f"{what}={given!r} is built already: its options {asked} come too late"
            )
        return given
    if not callable(given):
        raise TypeError(
            f"{what}={given!r} is neither {accepted}, a Module, a Module class, a function that "
            "returns a Module, nor None"
        )
    bound = given.keywords if isinstance(given, functools.partial) else {}
    try:
        takes = inspect.signature(given).parameters
    except ValueError:  # a function written in C need not say
        takes = {}
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    taken = {k: v for k, v in offered.items() if (anything or k in takes) and k not in bound}
    try:
        module = given(*args, **{**taken, **asked})
    except TypeError as error:
        words = [*map(repr, args), *(f"{k}={v!r}" for k, v in {**taken, **asked}.items())]
        call = f"({', '.join(words)})"
        raise TypeError(f"{what}={given!r} cannot be called as {call}: {error}") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{what}={given!r} made a {type(module).__name__}, not a Module")
    return module
