"""Recordings of what nodes do (`replay`), by all that they depend on.

What a node does to its tensors is a function of its plan, of the shapes, strides and dtypes of the
tensors, and of a few settings: these are the key of its recording. It is recorded when it is done
the second time, and replayed from then on, so that sizes that come once leave nothing but a key.

The general path stays: it is what runs where somebody looks at operators (modes of dispatch and
functions, hooks of Triton's launches) or nothing can be recorded, and what a recording is made of.
"""

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from cassetta.kernels import (
    dispatch,
    evidence,
    layout,
    machine,
    ops,
    plans,
    precision,
)
from cassetta.kernels.types import Activation, together
from cassetta.recording import replay, tape

ENVIRONMENT = "CASSETTA_RECORDINGS"
"""Set to 0, it leaves everything to the general path: to find out whether a recording is wrong."""

LIMIT = 2048
"""How many keys are known at a time; the one that has been known for the longest gives way."""

SEEN: Any = "seen"
NEVER: Any = "never"
_enabled = os.environ.get(ENVIRONMENT, "1") != "0"
_known: dict[Any, Any] = {}  # SEEN, NEVER, or what replays
_changed: set[Any] = set()  # keys whose recording was found to hold no more
_gone = 0
_one_at_a_time = threading.Lock()


def run(
    what: Any, function: tape.Function, tensors: Sequence[Tensor | None],
    keep: Callable[[Any], None] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return function(*tensors), by its recording if it has one.

    Parameters
    ----------
    what : hashable
        All that the function does depends on, beside the tensors and the settings.
    function : callable
        What it changes among the tensors, it changes at its end, so that it can begin anew.
    keep : callable, optional
        Is given its recording, which takes the tensors that are not None.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or first is None or not may_replay(first):
        return function(*tensors)
    facts: list[Any] = []
    for x in tensors:
        if x is None:
            facts.append(None)
        elif type(x) in dispatch.PLAIN:
            facts += form(x)
        else:
            return function(*tensors)
    key = what, tuple(facts), first.data_ptr() % 16, settings(first)
    found = _known.get(key)
    with unrounded(first):
        if found is None:
            _keep(key, SEEN)
        elif found is not NEVER and not (found is SEEN and machine.is_capturing(first.device)):
            try:  # (a graph that is captured would keep the memory of a tape)
                if found is SEEN:
                    again, out = replay.record(function, *tensors)
                    _keep(key, NEVER if again is None else again)
                else:
                    again, out = found, found(*_present(tensors))
                if keep is not None and again is not None:
                    keep(again)
                return out
            except tape.Changed:  # recorded anew, once
                _keep(key, NEVER if key in _changed else SEEN)
                _changed.add(key)
            except (tape.Unrecordable, torch.OutOfMemoryError):
                if found is not SEEN:  # a tape frees nothing before its end
                    raise
                _keep(key, NEVER)
        return function(*tensors)


def form(x: Tensor) -> tuple[Any, ...]:
    """Return all of the kind of a tensor that its passes depend on."""
    shape = x.shape
    known = shape, x.stride(), x.dtype, x.device
    if len(shape) > 2 and shape[1] % layout.WORD:  # channels that fill no words
        return *known, layout.is_in_words(x)
    return known


class Held:
    """What a call keeps from one time to the next, for tensors of one kind."""

    again: Callable[..., Any] | None = None  # its recording

    def keep(self, again: Callable[..., Any]) -> None:
        """Keep its recording."""
        self.again = again


def replayed(again: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return again(*tensors), where autocast rounds nothing; a context would cost the host more."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return again(*tensors)
    torch.set_autocast_enabled(device, False)
    try:
        return again(*tensors)
    finally:
        torch.set_autocast_enabled(device, True)


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def unrounded(x: Tensor) -> AbstractContextManager:
    """Return a context in which autocast rounds nothing: operands have their dtype already."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def transform(
    held: Held | None, name: str, x: Tensor, prologue: Sequence[Any],
    others: Sequence[Tensor | None], *numbers: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Return what a pass makes of what is pending on x: of `prologue`, as `types.flat` has it.

    Parameters
    ----------
    held : Held
        Of a program that calls this.
    name : str
        Of the pass, which is called with x, the prologue, the other tensors, and the numbers.
    """
    s1, t1, act, p, q, slope, s2, t2 = prologue
    tensors = x, s1, t1, slope, s2, t2, *others
    if held is not None and held.again is not None:
        try:
            return replayed(held.again, _present(tensors))
        except tape.Changed:
            held.again = None

    def again(x: Tensor, *given: Any) -> Any:
        pending = together(given[:5], Activation(act, p, q))
        made = getattr(ops, name)(x, pending, *given[5:], *numbers)
        return (made,) if isinstance(made, Tensor) else made

    keep = None if held is None else held.keep
    return run((name, act, p, q, numbers), again, tensors, keep)


def may_replay(x: Tensor) -> bool:
    """Tell whether nobody looks at what is done on the way, and kernels do it."""
    return (
        x.numel() > 0
        and x.device.type == machine.kernels_on()
        and not dispatch.on_reference(x)
        and is_unseen(x)
    )


def is_unseen(x: Tensor) -> bool:
    """Tell whether nobody looks at what is done to a tensor."""
    return not (
        _nb_modes()
        or _nb_function_modes()
        or _level() is not None
        or not _has_storage(x)  # a batched tensor has none
        or _are_hooked()
        or not _enabled
        or plans.is_listening()
        or not machine.is_current(x.device)
    )


def are_results_held() -> bool:
    """Tell whether a selective checkpoint may hold what operators return, by a mode of its own."""
    if torch.compiler.is_compiling() or not _nb_modes():
        return False
    kinds = map(type, _get_current_dispatch_mode_stack())
    return any(kind.__module__ == "torch.utils.checkpoint" for kind in kinds)


_nb_modes: Any = torch._C._len_torch_dispatch_stack
_nb_function_modes: Any = torch._C._len_torch_function_stack
_level: Any = torch._C._functorch.maybe_current_level  # pyright: ignore
_has_storage: Any = torch._C._has_storage


def are_saved_by_hooks() -> bool:
    """Tell whether hooks take what nodes save, and may return another kind (checkpointing, say)."""
    return _saving(False) is not None


_saving: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that tells of as many tensors whether they are of the kinds of these.

    Class, shape, strides, dtype, device, `requires_grad`, and what dispatches operators on them,
    as `torch.compile` compares them; a tensor that comes twice is never of the kind.
    """
    shapes, strides = [[*x.shape] for x in tensors], [[*x.stride()] for x in tensors]
    sizes = {"dynamic_dims_sizes": shapes, "dynamic_dims_strides": strides}
    try:
        return torch._C._dynamo.guards.TensorGuards(*tensors, **sizes).check  # pyright: ignore
    except (AttributeError, TypeError):  # which is no public function of torch
        known = [*map(_kind, tensors)]
        return lambda *others: (
            [*map(_kind, others)] == known and len({*map(id, others)}) == len(known)
        )


def _kind(x: Tensor) -> tuple[Any, ...]:
    dispatched = x.is_inference(), torch.is_inference_mode_enabled()
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, *dispatched


def settings(x: Tensor) -> tuple[Any, ...]:
    """What else the passes over such an image depend on."""
    exact = precision.of_convolutions() if x.dtype is torch.float32 else ""
    return evidence.changes, plans.forced(), exact


def _keep(key: Any, value: Any) -> None:
    """Keep a key; the oldest one gives way, and where that happens often it is said."""
    global _gone
    if len(_known) >= LIMIT and key not in _known:
        with _one_at_a_time:
            oldest = next(iter(_known))
            del _known[oldest]
        _changed.discard(oldest)
        _gone += 1
        if _gone == 4 * LIMIT:
            warnings.warn(
                f"blocks met more than {_gone} kinds of images, more than {LIMIT} of which are "
                "known at a time: the host is slower than it need be. Pad or crop images to fewer "
                "sizes",
                stacklevel=2,
            )
    with _one_at_a_time:
        _known[key] = value


def _are_hooked() -> bool:
    """Tell whether somebody is told of Triton's launches."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _runtime() -> Any:
    global _knobs
    if _knobs is None:
        _knobs = importlib.import_module("triton").knobs.runtime
    return _knobs


_knobs: Any = None
