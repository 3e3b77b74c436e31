"""Who runs a pass: the one place that chooses, and that can be asked why.

The request comes from `set_backend`, `use_backend` or the environment variable CASSETTA_BACKEND:

    auto        the fastest implementation that is right; falls back, and says why when asked
    triton      Triton kernels wherever one exists; an error where Triton cannot run at all
    reference   plain PyTorch, everywhere

With TRITON_INTERPRET=1 in the environment, "triton" runs the kernels on the CPU, slowly, for tests.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import (
    configs,
    evidence,
    layout,
    library,
    machine,
    ops,
    plans,
    records,
    reference,
)
from cassetta.kernels.machine import INTERPRET, is_interpreted
from cassetta.kernels.plans import Product

BACKENDS = ("auto", "triton", "reference")
ENVIRONMENT = "CASSETTA_BACKEND"

SMALL = 2**24
"""Images with fewer elements stay with plain PyTorch in "auto": there the host takes longer to
start our kernels than the GPU to run those of plain PyTorch. On an H200 (bench/results: small.json)
a step of a block of 32 channels with instance norm takes 1.6 ms, and plain PyTorch 1.85, where an
image has 2^24 elements; 1.4 and 1.2 ms where it has 2^22.8."""

ODD, ODD_ON = "gemm", (9, 0)
"""The engine, and on which compute capability, of images whose channels fill no words of 16 bytes,
by convolutions of 27 taps or more: in training where channels are last; and where `conv_march`
covers them, whatever the use and the layout.

On an H200 (bench/results) a step of MeshNet, 21 channels, takes 420 ms by it, 472 by `DEFAULT`, and
455 in plain PyTorch; a single block without dilation 38.8, 38.2 and 99.6. That was without marches:
the prototype of one takes 2.2 ms forward, 256^3, and cuDNN 9.8. Itself has not been measured."""

OLDEST = (8, 0)
"""The compute capability that a GPU needs at least: that of its tensor cores, and of `cp.async`."""


ENGINES: dict[str, Any] = {}
"""What convolves, by name (`engines`), beside "reference", which is plain PyTorch."""

DEFAULT = "library"
"""The engine where nothing was measured and none was asked for."""


class BackendError(RuntimeError):
    """The requested backend cannot run here; the message says why and what to do."""


class Use(NamedTuple):
    """What a rule asks about a convolution, beside its image."""

    taps: int
    is_last: bool  # the channels of the image are last in memory
    training: bool
    product: Callable[[], Product] | None = None  # what our own engine would compute


class Choice(NamedTuple):
    """Who runs a block."""

    engine: str  # of `ENGINES`, or "reference"
    reason: str  # why nothing but plain PyTorch; "" for any other engine
    evidence: str  # by what it was chosen
    is_open: bool = False  # whether a measurement may change it


# one value for the process, not one per thread: autograd and DataParallel run in threads of theirs
_requested: str | None = None
_on_reference_passes = False
_forced: str | None = None


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


@contextmanager
def fused_on_reference() -> Iterator[None]:
    """For tests and rehearsals: the written-out gradients on the passes of `reference`."""
    global _on_reference_passes
    before, _on_reference_passes = _on_reference_passes, True
    try:
        yield
    finally:
        _on_reference_passes = before


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """For measurements: every block that this engine can run is run by it."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(
    x: Tensor, why: str | None, key: Callable[[], str], lacks: Mapping[str, str | None],
    use: Use | None = None,
) -> Choice:  # fmt: skip
    """Who runs a block on the image x.

    Parameters
    ----------
    why : str or None
        Why no kernel covers the block, if none does.
    key : callable
        Names the block and the image, for the table of what was measured.
    lacks : dict
        Why each engine that there is has no kernel for the block, or None if it has.
    use : Use, optional
        How the block convolves, if it does.
    """
    found = _without_measurement(x, why)
    if found is not None and (lack := lacks.get(found.engine, "there is no such engine")):
        found = Choice(DEFAULT, "", f"{found.engine!r} was asked for, but {lack}")
    if found is None and not torch.compiler.is_compiling():
        table = evidence.table(x.device)
        record = table.find(key()) if table.records else None
        if record is not None and lacks.get(record.choice, "") is None:
            reason = "measured to be the fastest" if record.choice == "reference" else ""
            found = Choice(record.choice, reason, record.evidence, True)
    if found is not None:
        return found
    found = _by_rule(x)
    is_odd = use is not None and found.engine == DEFAULT and _is_odd(x, use)
    return Choice(ODD, *found[1:]) if is_odd and lacks.get(ODD, "") is None else found


def settings() -> tuple[Any, ...]:
    """Return all of this process that `choose` depends on, beside the GPU."""
    levels = torch._C._functorch.maybe_current_level(), torch.autograd.forward_ad._current_level
    asked = _forced, backend(), _on_reference_passes, SMALL
    return *asked, evidence.changes, machine.kernels_on(), *levels


def _without_measurement(x: Tensor, why: str | None = None) -> Choice | None:
    """Where there is no choice, or it was made by the caller."""
    why = why or (_why_not_plain(x) if _on_reference_passes else _why_no_kernel(x))
    if why:
        return Choice("reference", why, "nothing else can run it")
    if _forced == "reference":
        return Choice("reference", "the engine 'reference' was asked for", "it was asked for")
    if _forced or _on_reference_passes or backend() == "triton":
        return Choice(_forced or DEFAULT, "", "it was asked for")
    return None


def _by_rule(x: Tensor) -> Choice:
    rule = "a rule: `cassetta tune` measures"
    if x.numel() >= SMALL:
        return Choice(DEFAULT, "", rule, True)
    small = f"so small an image ({tuple(x.shape)}) is no slower in plain PyTorch"
    return Choice("reference", small, rule, True)


def _is_odd(x: Tensor, use: Use) -> bool:
    """Tell whether the rule of `ODD` applies."""
    if use.taps < 27 or not x.shape[1] % layout.WORD or not machine.is_gpu(x.device):
        return False
    is_trained = use.training and use.is_last
    return machine.capability(x.device) == ODD_ON and (is_trained or _marches(use))


def _marches(use: Use) -> bool:
    """Tell whether `conv_march` covers a convolution, on `ODD_ON`; to a tracer, which cannot
    compile, as that takes, it does not."""
    if use.product is None or torch.compiler.is_compiling():
        return False
    product = use.product()
    return product.marches and plans.why_no_march(product, ODD_ON) is None


def why_no_triton() -> str | None:
    """Why no Triton kernel can run in this process, as a sentence; None if one can."""
    interpreted = is_interpreted()
    if (why := _why_never(interpreted)) or interpreted:
        return why
    if not torch.cuda.is_available():
        return f"torch finds no NVIDIA GPU ({INTERPRET}=1 runs the kernels on the CPU, slowly)"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot count GPUs; that of an image is asked of in any case
    try:
        best = max(gpu.capability for gpu in machine.gpus())
    except Exception as error:
        return _unanswered(error)
    if best < OLDEST:
        return f"no GPU here has compute capability 8.0 or newer (the best has {best[0]}.{best[1]})"
    return None


def why_reference(x: Tensor | None = None) -> str | None:
    """Why plain PyTorch runs (on this image), as a sentence; None if it does not.

    For an image by rule; what was measured for a block on it goes before that (`choose`).
    """
    if x is not None:
        return (_without_measurement(x) or _by_rule(x)).reason or None
    if _on_reference_passes:
        return None
    return _why_asked() or why_no_triton()


def _why_asked() -> str | None:
    return "the backend 'reference' was asked for" if backend() == "reference" else None


def _why_no_kernel(x: Tensor) -> str | None:
    return _why_asked() or why_not_on(x.device) or _why_not_plain(x) or _why_not_for(x)


def _why_not_plain(x: Tensor) -> str | None:
    """Why x needs operations that torch can transform and differentiate as it likes."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms need plain operations"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives need plain operations"
    if not torch.compiler.is_compiling() and type(x) not in PLAIN and not _is_fake(x):
        return f"the image is a {type(x).__name__}, not a plain tensor"
    return "the image is complex" if x.is_complex() else None


def _why_not_for(x: Tensor) -> str | None:
    if x.dtype not in configs.dtypes():
        return f"the image is in {str(x.dtype).removeprefix('torch.')}"
    if (why := why_too_large(x.shape[2:])) is not None:
        return why
    if not machine.is_gpu(x.device) and not _forced and backend() != "triton":
        return "the image is on the CPU"  # where a kernel could be interpreted, which nobody wants
    return None


def why_not_on(device: torch.device) -> str | None:
    """Explain in a sentence why no Triton kernel can run on `device`; None if one can.

    CUDA is queried only if the device is a GPU, and then only about that GPU.
    """
    if device.type == machine.kernels_on():
        interpreted = not machine.is_gpu(device)
        return _why_never(interpreted) or (None if interpreted else _why_not_gpu(device))
    if device.type == "cuda":
        return f"{INTERPRET}=1 runs kernels on the CPU only"
    return f"the image is on the {'CPU' if device.type == 'cpu' else device.type + ' device'}"


def _why_not_gpu(device: torch.device) -> str | None:
    try:
        major, minor = machine.capability(device)
    except Exception as error:
        return _unanswered(error)
    if (major, minor) < OLDEST:
        return f"this GPU has compute capability {major}.{minor}, and 8.0 is needed"
    return None


def _unanswered(error: Exception) -> str:
    return f"CUDA does not tell what this GPU is ({str(error).partition(chr(10))[0]})"


def _why_never(interpreted: bool) -> str | None:
    """Explain why no Triton kernel can run in this process, whatever GPU the machine has."""
    if not torch.compiler.is_compiling() and (missing := _why_not_importable()):
        return missing  # (a tracer cannot try; where it finds a GPU, it needs triton itself)
    if torch.version.hip and not interpreted:
        return "this torch is built for ROCm, where the kernels have not been tried"
    return None


def why_too_large(size: Sequence[int]) -> str | None:
    """Why no kernel reads or writes an image of this size, as a sentence."""
    if math.prod(size) >= configs.VOXELS:
        return f"a channel of size {tuple(size)} has more voxels than 31 bits count"
    return None


PLAIN = (Tensor, torch.nn.Parameter)


def _is_fake(x: Tensor) -> bool:
    """Whether x is one of torch's own stand-ins for a plain tensor, which tracing works with."""
    return type(x).__module__.startswith("torch._subclasses.")


@functools.cache
def _why_not_importable() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation is as good as none
        return f"triton cannot be imported ({error}): pip install triton, on Linux"
    return None


def implementation() -> ModuleType:
    """The module whose convolutions run.

    Raises
    ------
    BackendError
        If the backend "triton" was asked for and cannot run here.
    """
    _feasible(backend())
    return library


def on_reference(x: Tensor) -> bool:
    """Tell whether the passes over an image are those of the reference, whatever its device."""
    return _on_reference_passes or x.dtype not in configs.dtypes()


@records.run_by
def passes(x: Tensor) -> Any:
    """Who runs the passes over this image (or table): `moments`, `materialize`, ..."""
    if on_reference(x) or why_not_on(x.device):
        return reference
    return _triton_passes()


@functools.cache
def _triton_passes() -> Any:
    """Which import triton, and so are not imported before they are needed."""
    records.count_operations()
    return SimpleNamespace(**{name: one.launched() for name, one in ops.PASSES.items()})


def _known(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend: use one of {', '.join(BACKENDS)}")
    return str(name)


def _feasible(name: str) -> None:
    why = why_no_triton() if name == "triton" else None
    if why:
        raise BackendError(
            f"the backend 'triton' cannot run: {why}. Ask for 'auto' or 'reference' "
            f"({ENVIRONMENT} or cassetta.set_backend)"
        )
