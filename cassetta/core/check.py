"""Arguments are refused here, before anything is computed.

Every message names the argument, the value received and what is accepted; a value of the wrong
kind raises TypeError, a wrong value of the right kind ValueError.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from bounds import to_enum
from torch import Tensor

T = TypeVar("T")

_BOUNDS = [to_enum(name) for name in ["zero", "replicate", "dct1", "dct2", "dst1", "dst2", "dft"]]


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; numpy integers are welcome, booleans are not."""
    if isinstance(value, torch.SymInt):  # a size that torch.export leaves open
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r} ({type(value).__name__}) is not a whole number"
        ) from None
    if number < least:
        raise ValueError(f"{name}={number} is too small: it must be at least {least}")
    if number >= 2**31:
        raise ValueError(f"{name}={number} is too large: it must be below 2**31")
    return number


def is_list(value: Any) -> bool:
    """Whether `value` is several numbers, in a list, an array or the like, rather than one."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def flag(name: str, value: Any) -> bool:
    """True or False; 0 and 1 will do, but no word does."""
    if isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be True or False")


def options(name: str, value: Any) -> dict[str, Any]:
    """A dictionary of options, or None for none; a fresh one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r} must be a dictionary of options, or None")
    return dict(value)


def several(name: str, value: Any, least: int = 1) -> list[int]:
    """`value`, a whole number or a sequence of them, as a list of at least one."""
    if isinstance(value, (str, bytes, set, frozenset, dict)) or not is_list(value):
        return [whole(name, value, least)]
    numbers = [whole(f"{name}[{i}]", v, least) for i, v in enumerate(value)]
    if not numbers:
        raise ValueError(f"{name}={value!r} is empty: give at least one number")
    return numbers


def positive(name: str, value: Any) -> float:
    """`value` if it is a number above zero."""
    if isinstance(value, bool) or not isinstance(value, (float, int, np.number)):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) is not a number")
    if not 0 < value < 2**31:
        raise ValueError(f"{name}={value} must be positive and finite, below 2**31")
    return float(value)


def per_dimension(name: str, value: Any, ndim: int, least: int = 1) -> tuple[int, ...]:
    """`value` with one entry per spatial dimension; the last one given is repeated."""
    numbers = several(name, value, least)
    if len(numbers) > ndim:
        raise ValueError(f"{name}={value!r} has {len(numbers)} values for ndim={ndim} dimensions")
    return tuple(numbers + numbers[-1:] * (ndim - len(numbers)))


def dimensions(ndim: Any) -> int:
    """The number of spatial dimensions: 1, 2 or 3."""
    if whole("ndim", ndim) > 3:
        raise ValueError(f"ndim={ndim} is too large: images have 1, 2 or 3 spatial dimensions")
    return operator.index(ndim)


def one_of(name: str, value: Any, choices: Sequence[T]) -> T:
    """`value` if it is among `choices`, which the error lists, nearest word first."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ValueError(f"{name}={value!r} is unknown: use {_listed(value, choices)}")


def named(
    name: str, value: str, table: Mapping[str, T], spell: Callable[[str], str] = str.lower
) -> T:
    """The entry of `table` that `value` names, once `spell` has brought both to one spelling."""
    keys = {spell(key): key for key in table}
    if not isinstance(value, str) or spell(value) not in keys:
        near = keys.get(next(iter(difflib.get_close_matches(spell(str(value)), keys, n=1)), ""))
        raise ValueError(f"{name}={value!r} is unknown: use {_listed(near, list(table))}")
    return table[keys[spell(value)]]


def bound(name: str, value: Any) -> None:
    """A boundary condition in the names of torch-bounds."""
    try:
        if isinstance(value, bool) or to_enum(value) not in _BOUNDS:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        words = "zeros, replicate, mirror (dct1), reflect (dct2), antimirror (dst1), antireflect"
        raise ValueError(
            f"{name}={value!r} is unknown: use {words} (dst2) or circular (dft)"
        ) from None


def tensor(inp: Any, name: str = "inp") -> None:
    """A tensor of any shape."""
    if not isinstance(inp, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(inp).__name__}")


def image(
    inp: Any, ndim: int, channels: int | None = None, name: str = "inp", labels: bool = False
) -> None:
    """A tensor (B, channels, *size) with `ndim` non-empty spatial dimensions.

    It holds floating-point numbers; or, if it may be `labels`, integers.
    """
    tensor(inp, name)
    fits = inp.ndim == ndim + 2 and (channels is None or inp.shape[1] == channels)
    if not fits or 0 in inp.shape[2:]:
        sizes = ", ".join("WHD"[:ndim])
        raise ValueError(
            f"{name} has shape {tuple(inp.shape)}, but a {ndim}-D image of shape "
            f"(batch, {channels or 'channels'}, {sizes}), no size zero, is expected"
        )
    if not (labels or inp.is_floating_point() or inp.is_complex()):
        raise TypeError(f"{name} has dtype {inp.dtype}: convert it to floating point first")


def any_image(inp: Any, name: str = "inp", labels: bool = False) -> int:
    """The number of spatial dimensions of an image that `image` accepts with 1, 2 or 3."""
    ndim = min(3, max(1, inp.ndim - 2)) if isinstance(inp, Tensor) else 1
    image(inp, ndim, name=name, labels=labels)
    return ndim


def _listed(value: Any, choices: Sequence[Any]) -> str:
    near = []
    if isinstance(value, str):
        words = [c for c in choices if isinstance(c, str)]
        near = difflib.get_close_matches(value, words, n=1)
    rest = [c for c in choices if c not in near]
    return " or ".join([", ".join(map(repr, [*near, *rest[:-1]])), *map(repr, rest[-1:])])
