"""What the host does for a block and for a network, in microseconds: measured without a GPU.

    make bench-host                                            # all of it
    make bench-host HOST='--block "cndax batch" --rounds 3'    # a part

Python, autograd and launches are real, by a CUDA driver that does nothing (`libcuda.c`); tensors of
the CPU pass for those of a GPU of capability 9.0 (`machine.stand_in`), and no kernel runs. In turns
with plain torch modules (eager) on the same parameters. Their operators run on the CPU, on few
voxels, as do the convolutions of the engine `library`; so there is some arithmetic in these
figures, and what a GPU adds is not: the host's time of its allocator, of cuDNN and of the driver,
and backward in a thread of its own. Denormal numbers are flushed: what no kernel wrote is full of
them, and arithmetic with them is slow.

A figure is CPU time of this thread, the 20th percentile of all rounds. That of a block is a quarter
of what a chain of 6 takes beyond a chain of 2; that of a network is a whole one.
"""

import argparse
import contextlib
import csv
import gc
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch, engines, evidence, machine
from cassetta.layers import ConvGroup
from cassetta.measure import rows, twins

import libcuda

COLUMNS = ("block", "engine", "forward_us", "step_us", "eager_forward_us", "eager_step_us")
ENGINES = ("auto", *engines.ENGINES)
REPEATED = 8
"""How often in a row the same is run in a round; and once before, which does not count."""
LONG, SHORT = 6, 2
H100 = machine.Gpu("null", (9, 0), 80 * 2**30, 50 * 2**20, 232_448)
Key = tuple[str, str, int]


class Case(NamedTuple):
    """What is measured: a network; or chains of blocks, by what the longer takes beyond."""

    build: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    first: bool  # whether the image is that of a first layer, which needs no gradient
    plain: bool = False  # torch's own operators may be all there is to do
    rounds: bool = False  # under autocast to bfloat16


def _chain(order: str, norm: str | None) -> Case:
    lengths = (LONG, SHORT)
    return Case(
        lambda: [ConvGroup(3, 16, nb_conv=n, order=order, norm=norm) for n in lengths],
        (1, 16, 2, 2, 2), False, plain=norm is None,
    )  # fmt: skip


CASES = {
    f"{order} {norm or 'none'}": _chain(order, norm)
    for norm in ("instance", "batch", None)
    for order in ("cndax", "caxnd")
} | {
    "UNet": Case(lambda: [UNet(2, [8] * 5, norm="instance")], (1, 8, 32, 32), True),
    "MeshNet": Case(lambda: [MeshNet(2, nb_features=16, norm="batch")], (1, 16, 2, 2), True),
}
CASES |= {
    f"{name} bf16": CASES[name]._replace(rounds=True)
    for name in ("cndax instance", "cndax batch", "UNet", "MeshNet")
}


class Clock:
    """Times of calls in us, and what the last one launched, by (who, what, which network)."""

    def __init__(self, launches: Callable[[], int], rounds: bool) -> None:
        self._rounds = rounds  # by autocast
        self.times: dict[Key, list[float]] = defaultdict(list)
        self.launched: dict[Key, int] = {}
        self._launches = launches

    def run(self, key: Key, net: nn.Module, x: Tensor, g: Tensor) -> None:
        """Run a network so often; the first run does not count."""
        for repeat in range(REPEATED + 1):
            net.zero_grad()
            x.grad = None
            launched, start = self._launches(), time.thread_time_ns()
            with torch.autocast("cpu", torch.bfloat16, enabled=self._rounds):
                y = net(x)
            if key[1] == "step":
                y.backward(g)
            del y  # which is freed at once, and that counts too
            microseconds = (time.thread_time_ns() - start) / 1e3
            self.launched[key] = self._launches() - launched
            if repeat:
                self.times[key].append(microseconds)


def measure(case: Case, engines: list[str], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Time eager and engines in turns: us of forward and of a step, launches of a step, by who.

    Raises
    ------
    RuntimeError
        If an engine launches nothing that should, so that what was timed is not what it does.
    """
    nets = case.build()
    who = {"eager": [twins.plain(net) for net in nets], **dict.fromkeys(engines, nets)}
    x = torch.randn(case.shape, requires_grad=not case.first)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.rounds):
        g = torch.ones_like(who["eager"][0](x))
    for n in range(rounds + 1):
        for name, several in who.items():
            with _by(name):
                for what in ("forward", "step"):
                    for which, net in enumerate(several):
                        clock.run((name, what, which), net, x, g)
        if n == 0:  # in which all was compiled
            clock.times.clear()
        gc.collect()
    typical = {key: percentile(times) for key, times in clock.times.items()}
    found = {}
    for name in who:
        launches = _share(clock.launched, name, "step")
        if launches if name == "eager" else not (launches or case.plain):
            raise RuntimeError(f"{name} launched {launches} kernels for a step of {case}")
        found[name] = [_share(typical, name, what) for what in ("forward", "step")] + [launches]
    return found


def _by(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which an engine runs all blocks; of "eager" and "auto", none."""
    return dispatch.use_engine(name) if name in ENGINES[1:] else contextlib.nullcontext()


def _share(values: Mapping[Key, float], name: str, what: str) -> float:
    """Return the value of a network; of chains, that of one block."""
    value = values[name, what, 0]
    shorter = values.get((name, what, 1))
    return value if shorter is None else (value - shorter) / (LONG - SHORT)


def percentile(times: list[float]) -> float:
    """Return the 20th: as near to an undisturbed machine as a shared one gets."""
    return sorted(times)[len(times) // 5]


def calibrated() -> float:
    """Time a loop of 1000 additions, in us, which tells how fast this machine is just now."""
    times = []
    for _ in range(50):
        start, total = time.thread_time_ns(), 0
        for n in range(1000):
            total += n
        times.append((time.thread_time_ns() - start) / 1e3)
    return percentile(times)


def conditions() -> str:
    """Say on what machine, and with which versions, this is measured."""
    known = rows.facts(torch.device("cpu"))
    return (
        f"{known['gpu']}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {known['triton']}, commit {known['commit']}, {known['date']}\n"
        f"a loop of 1000 additions takes {calibrated():.1f} us; all figures are us of CPU time"
    )


def main() -> None:
    """Measure what the command line asks for; print it, and write it as CSV."""
    parser = argparse.ArgumentParser(description="Measure what the host does, in us.")
    add = parser.add_argument
    add("--block", nargs="+", choices=CASES, default=[*CASES], metavar="BLOCK", help=str([*CASES]))
    add("--engine", nargs="+", choices=ENGINES, default=[*ENGINES])
    add("--rounds", type=int, default=20, help=f"of {REPEATED} runs each (20)")
    add("--out", type=Path, default=Path("build/host.csv"), help="the file (build/host.csv)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if machine.is_interpreted():
                raise libcuda.Missing(f"{machine.INTERPRET} is set: interpreters launch nothing")
            driver = libcuda.activate(Path(folder))
        except libcuda.Missing as error:
            sys.exit(f"bench-host: {error}")
        os.environ[evidence.CACHE] = folder  # so that what was measured elsewhere chooses nothing
        machine.stand_in, dispatch.SMALL = H100, 0
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        gc.disable()
        print(conditions())
        names = ("block", "engine", "forward", "step", "eager forward", "eager step", "launches")
        form = "{:20} {:8}" + " {:>13}" * 5
        print(form.format(*names))
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for block in asked.block:
                clock = Clock(driver.null_launches, CASES[block].rounds)
                found = measure(CASES[block], asked.engine, asked.rounds, clock)
                *eager, _ = found.pop("eager")
                for engine, (*own, launches) in found.items():
                    figures = [f"{number:.1f}" for number in [*own, *eager]]
                    table.writerow([block, engine, *figures])
                    print(form.format(block, engine, *figures, f"{launches:g}"), flush=True)
        print(f"at the end the loop takes {calibrated():.1f} us; {asked.out} holds the figures")


if __name__ == "__main__":
    main()
