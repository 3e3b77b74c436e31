"""What is timed: a network or a pass on its images, for one rival after the other.

A stage prepares each rival: it builds what is to run, refuses ours if it computes the wrong thing,
and measures the memory of one run. What it returns can be timed.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.measure import correct, passes, roofs, twins
from cassetta.measure.agreement import has_kinks
from cassetta.measure.cases import Case
from cassetta.measure.passes import in_memory, tensors
from cassetta.measure.peers import Rival, in_layout, mode_of
from cassetta.measure.spending import Budget
from cassetta.measure.timing import Run, kept_bytes, nb_inputs, peak_bytes

PASSES = ("forward+backward", "inference", "step")
"""Of a network or a block; a step is forward, backward and optimizer."""

FIRST = "first run"
"""On which seconds are spent where something is compiled."""

MIB = 2**20


class Wrong(Exception):
    """A rival of ours that does not compute what it should."""


class Ready(NamedTuple):
    """A rival that can be timed, and the columns of its row that are known before."""

    run: Run
    floor: float  # milliseconds below which it cannot come
    columns: dict[str, Any]


class Task(NamedTuple):
    """One case, in one pass and one dtype: rivals in it are compared."""

    case: Case
    what: str  # "inference", "forward+backward" or "step"; or the name of a pass
    dtype: torch.dtype
    device: torch.device
    small: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the image."""
        return self.case.small if self.small else self.case.shape


class NetworkStage:
    """A network on several images in turn, each in the layouts asked for."""

    def __init__(
        self, task: Task, layouts: Sequence[str], best: roofs.Roofs, budget: Budget | None = None
    ) -> None:
        self.task = task
        self.budget = budget or Budget()
        self.backward = task.what != "inference"
        self.net = task.case.make().to(task.device).train(self.backward)
        dtype = task.case.image_dtype(task.dtype)
        nb = nb_inputs(math.prod(task.shape) * dtype.itemsize, task.device)
        images = [torch.randn(task.shape, device=task.device).to(dtype) for _ in range(nb)]
        wanted = self.backward and task.case.inner
        self.images = {
            layout: [in_memory(x, layout).requires_grad_(wanted) for x in images]
            for layout in layouts
        }
        self.floor = roofs.floor(self.net, task.shape, task.what, task.dtype, best)
        self.flops = roofs.flops(self.net, task.shape, task.what, task.case.inner)
        self.moved = roofs.moved(self.net, task.shape, task.what, task.dtype)
        self.seed = self._seed(images[0]) if self.backward else None
        self.seeds: dict[tuple[torch.dtype, str], Tensor] = {}
        self.known = self._expected(layouts)

    def prepare(self, rival: Rival) -> Ready:
        """The rival, once it is known to compute the right thing and what memory it takes.

        Raises
        ------
        Wrong
            If it is one of ours and does not.
        """
        own = in_layout(copy.deepcopy(self.net), rival.layout, self.task.case.ndim)
        module = rival.build(own).train(self.backward)
        ours = rival.role == "ours"
        parameters = [*(own if ours else module).parameters()]
        images, spending = self.images[rival.layout], self.budget.spending
        with rival.asked():
            if ours:
                with spending(FIRST, rival.engine):
                    found = correct.results(
                        module, parameters, images[0], self.seed, self.task.dtype
                    )
                with spending("check", rival.engine):
                    if why := correct.agrees(found, self.known[rival.layout]):
                        raise Wrong(why)
            run = self._runner(rival, module, parameters)
            with spending(FIRST, rival.engine):
                run(0)
            with spending("memory", rival.engine):
                return Ready(run, self.floor, self._columns(rival, run, module, parameters))

    def _columns(
        self, rival: Rival, run: Run, module: nn.Module, parameters: list[Any]
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {"gflop": self.flops / 1e9, "moved_mib": self.moved / MIB}
        self._forget(rival, parameters)
        mode = mode_of(rival.engine)
        peak = peak_bytes(run, self.task.device)
        if peak is not None and mode != "max-autotune":  # whose graph took its memory before
            columns["peak_mib"] = peak / MIB
        if self.backward and mode == "eager":
            image = self.images[rival.layout][0]

            def forward() -> Tensor:
                with correct.rounding(image.device, self.task.dtype):
                    return module(image)

            columns["kept_mib"] = kept_bytes(forward, parameters) / MIB
        self._forget(rival, parameters)
        return columns

    def _runner(self, rival: Rival, module: nn.Module, parameters: list[Any]) -> Run:
        images, what, dtype = self.images[rival.layout], self.task.what, self.task.dtype
        graphs = mode_of(rival.engine) == "max-autotune"
        optimizer = torch.optim.Adam(parameters, lr=1e-4) if what == "step" else None

        def run(k: int) -> None:
            image = images[k % len(images)]
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with rival.asked():
                if not self.backward:
                    with torch.no_grad(), correct.rounding(image.device, dtype):
                        module(image)
                    return
                image.grad = None
                for parameter in parameters:
                    parameter.grad = None
                with correct.rounding(image.device, dtype):
                    out = module(image)
                out.backward(self._seed_like(out, rival.layout))
                if optimizer is not None:
                    optimizer.step()

        return run

    def _expected(self, layouts: Sequence[str]) -> dict[str, correct.Expected]:
        """What plain PyTorch computes in each layout, and the truth, which is one for all."""
        known: dict[str, correct.Expected] = {}
        for layout in layouts:
            own = in_layout(copy.deepcopy(self.net), layout, self.task.case.ndim)
            what = twins.plain(own), [*own.parameters()], self.images[layout][0], self.seed
            truth = known[layouts[0]].truth if known else correct.truth(*what)
            same, kinked = correct.results(*what, self.task.dtype), has_kinks(own)
            known[layout] = correct.Expected(truth, same, kinked=kinked)
        return known

    def _seed(self, image: Tensor) -> Tensor:
        """A random gradient of the output, whose sums over voxels stay far from fp16's limits."""
        with torch.no_grad(), correct.searching(False):
            out = twins.plain(self.net)(image.float())
        return torch.randn_like(out, dtype=torch.float32) / math.sqrt(math.prod(out.shape[2:]))

    def _seed_like(self, out: Tensor, layout: str) -> Tensor:
        key = out.dtype, layout
        if key not in self.seeds:
            assert self.seed is not None
            self.seeds[key] = in_memory(self.seed.to(out.dtype), layout)
        return self.seeds[key]

    def _forget(self, rival: Rival, parameters: list[Any]) -> None:
        for tensor in (*self.images[rival.layout], *parameters):
            tensor.grad = None


class PassStage:
    """A pass over several images in turn, each in the layouts asked for."""

    def __init__(
        self, task: Task, layouts: Sequence[str], best: roofs.Roofs, budget: Budget | None = None
    ) -> None:
        self.task = task
        self.budget = budget or Budget()
        self.best = best
        nbytes = math.prod(task.shape) * task.dtype.itemsize
        nb = nb_inputs(nbytes, task.device)
        self.work = {
            layout: passes.work(task.shape, layout, task.dtype, nb, task.device)
            for layout in layouts
        }

    def prepare(self, rival: Rival) -> Ready:
        """The rival, once it is known to compute the right thing and what memory it takes.

        Raises
        ------
        Wrong
            If it is one of ours and does not.
        """
        work, what = self.work[rival.layout], self.task.what
        run, spending = work.run(what, rival.engine), self.budget.spending
        with rival.asked(), spending(FIRST, rival.engine):  # which says so where it cannot run
            found = run(0)
        if rival.role == "ours":
            with spending("check", rival.engine):
                why = correct.agrees(tensors(found), work.expected(what))
            if why:
                raise Wrong(why)
        moved = work.moved(what, rival.engine, found)
        columns = {"gflop": 0.0, "moved_mib": moved / MIB}  # torch counts no elementwise operation
        with spending("memory", rival.engine):
            peak = peak_bytes(run, self.task.device)
        if peak is not None:
            columns["peak_mib"] = peak / MIB
        return Ready(run, 1000 * moved / self.best.bandwidth, columns)
