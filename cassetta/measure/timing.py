"""Rivals in turns, and medians; what memory a run takes, and what it keeps for backward."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import machine

Run = Callable[[int], object]
"""What is timed; it is told its round, so that it can take another input every time."""


class Timing(NamedTuple):
    """Milliseconds of a run: the median, and between which the middle three fifths lie."""

    ms: float
    p20: float
    p80: float


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    budget: float | None = None,
) -> dict[str, Timing]:
    """Time rivals in turns, so that whatever the machine does meanwhile, it does to all of them.

    Parameters
    ----------
    runs : dict of callables
        What to time, by name; each is told its round.
    device : torch.device
        Where they run: on a GPU, its own events are read, and elsewhere the clock.
    rounds : int
        How often each runs, once warm.
    warmup : int
        How often each runs before that.
    budget : float, optional
        Seconds after which no further round begins; three rounds are run in any case.
    """
    start = time.perf_counter()
    for k in range(warmup):
        for run in runs.values():
            run(k)
    once = _by_events if device.type == "cuda" else _by_clock
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds):
        if k >= 3 and budget is not None and time.perf_counter() - start > budget:
            break
        for name, run in runs.items():
            times[name].append(once(run, k, device))
    return {name: _timing(ms) for name, ms in times.items()}


def nb_inputs(nbytes: int, device: torch.device) -> int:
    """How many inputs of so many bytes must take turns, so that no cache holds them: 3 to 64."""
    cache = machine.gpu(device).cache if device.type == "cuda" else 0
    return max(3, min(64, 2 * cache // max(nbytes, 1)))


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that a run takes beyond what was taken before; None but on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward run keeps for backward, beyond the parameters; shared ones once."""
    held: dict[int, Any] = {
        storage._cdata: None for storage in (p.untyped_storage() for p in parameters)
    }
    kept = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in held:  # held, so that no other takes its address
            held[storage._cdata] = storage
            kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    return kept


def _by_events(run: Run, k: int, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)  # so that what it takes to launch counts, for every rival
    start.record(torch.cuda.current_stream(device))
    run(k)
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _by_clock(run: Run, k: int, device: torch.device) -> float:
    start = time.perf_counter()
    run(k)
    return 1000 * (time.perf_counter() - start)


def _timing(ms: list[float]) -> Timing:
    if len(ms) == 1:
        return Timing(ms[0], ms[0], ms[0])
    fifths = statistics.quantiles(ms, n=5, method="inclusive")
    return Timing(statistics.median(ms), fifths[0], fifths[3])
