"""Who runs a pass: the one place that chooses, and that can be asked why.

The request comes from `set_backend`, `use_backend` or the environment variable CASSETTA_BACKEND:

    auto        the fastest implementation that is right; falls back, and says why when asked
    triton      Triton kernels wherever one exists; an error where Triton cannot run at all
    reference   plain PyTorch, everywhere

This release holds the reference only, so "auto" means "reference" and "triton" is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from cassetta.kernels import reference

BACKENDS = ("auto", "triton", "reference")
ENVIRONMENT = "CASSETTA_BACKEND"


class BackendError(RuntimeError):
    """The requested backend cannot run here; the message says why and what to do."""


# one value for the process, not one per thread: autograd and DataParallel run in threads of theirs
_requested: str | None = None


def backend() -> str:
    """The backend asked for: "auto", "triton" or "reference".

    Raises
    ------
    ValueError
        If CASSETTA_BACKEND holds any other word.
    """
    if _requested is not None:
        return _requested
    return _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def set_backend(name: str | None) -> None:
    """Ask for a backend from now on; None gives the choice back to CASSETTA_BACKEND.

    Raises
    ------
    ValueError
        If `name` is not "auto", "triton", "reference" or None.
    BackendError
        If `name` is "triton" and Triton cannot run here.
    """
    global _requested
    if name is not None:
        _feasible(_known(name, "name"))
    _requested = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """`set_backend(name)` for the length of a `with` block; raises what it raises."""
    global _requested
    before = _requested
    set_backend(name)
    try:
        yield
    finally:
        _requested = before


def why_no_triton() -> str | None:
    """Why no Triton kernel can run in this process, as a sentence; None if one can."""
    return "this release of cassetta has no Triton kernels yet"


def why_reference() -> str | None:
    """Why the passes run in plain PyTorch, as a sentence; None if they do not."""
    if backend() == "reference":
        return "the backend 'reference' was asked for"
    return why_no_triton()


def implementation() -> ModuleType:
    """The module whose passes run.

    Raises
    ------
    BackendError
        If the backend "triton" was asked for and cannot run here.
    """
    _feasible(backend())
    return reference


def _known(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend: use one of {', '.join(BACKENDS)}")
    return str(name)


def _feasible(name: str) -> None:
    why = why_no_triton()
    if name == "triton" and why:
        raise BackendError(
            f"the backend 'triton' cannot run: {why}. Ask for 'auto' or 'reference' "
            f"({ENVIRONMENT} or cassetta.set_backend)"
        )
