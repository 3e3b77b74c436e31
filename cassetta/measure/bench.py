"""The benchmark: case by case, rivals in turns, rows written as soon as a case is measured."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cassetta.measure import correct, passes, peers, roofs, rows
from cassetta.measure.cases import Case
from cassetta.measure.rows import Row
from cassetta.measure.spending import Budget, OutOfTime
from cassetta.measure.stages import PASSES, NetworkStage, PassStage, Ready, Task, Wrong
from cassetta.measure.timing import interleaved

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECONDS = 30.0
"""After which no further round of a case begins."""


class Plan(NamedTuple):
    """What is to be measured, and where to."""

    cases: Sequence[Case]
    device: torch.device
    out: Path
    passes: Sequence[str] = PASSES
    dtypes: Sequence[str] = ("bf16",)
    modes: Sequence[str] = ("eager",)
    layouts: Sequence[str] = peers.LAYOUTS
    small: bool = False
    again: bool = False
    budget: float = 500.0
    rounds: int = 20


class Group(NamedTuple):
    """The rows that are measured together."""

    case: Case
    what: str
    dtype: str
    mode: str

    @property
    def title(self) -> str:
        """What it is called in words."""
        return f"{self.case.name}, {self.what}, {self.dtype}, {self.mode}"

    @property
    def kind(self) -> str:
        """Groups of which kind take about as long."""
        return f"{self.case.group}, {self.mode}"


def groups(plan: Plan) -> Iterator[Group]:
    """All that a plan asks for, in the order of its modes, cases, dtypes and passes."""
    for mode in plan.modes:
        for case in plan.cases:
            for dtype in plan.dtypes:
                if case.group != "pass":
                    yield from (Group(case, what, dtype, mode) for what in plan.passes)
                elif mode == "eager":
                    yield from (Group(case, what, dtype, mode) for what in passes.NAMES)


def run(
    plan: Plan, report: Callable[[Group, list[Row]], None], budget: Budget | None = None
) -> bool:
    """Measure what has not been measured yet; whether there was time for all of it.

    What would not end in time, by what its kind has taken so far, is not begun; what is shorter and
    comes later is.

    Parameters
    ----------
    plan : Plan
        What to measure. Rows that its folder has for this machine, these versions and this commit
        are not measured again, unless it says so.
    report : callable
        Called with the rows of each group, once they are written.
    budget : Budget, optional
        Where seconds are counted; by default, those of the plan from now on.
    """
    budget, complete = budget or Budget(plan.budget), True
    known = rows.facts(plan.device)
    with correct.searching(True):  # for every rival, as trainers have it
        for group in groups(plan):
            path = rows.path_of(plan.out, group.case.group, known)
            have = set() if plan.again else rows.done(rows.read([path]), known)
            asked = {rows.key(_empty(group, plan, one)) for one in _rivals(group, plan)}
            if asked <= have:
                continue
            try:
                with budget.part(group.kind):
                    measured = measure(group, plan, budget)
            except OutOfTime:
                complete = False
                continue
            found = [rows.rounded({**row, **known}) for row in measured]
            rows.append(path, found)
            report(group, found)
    return complete


def measure(group: Group, plan: Plan, budget: Budget) -> list[Row]:
    """A row for every rival of a group; who cannot run, or is wrong, has an error and no number."""
    torch.manual_seed(0)
    rivals = _rivals(group, plan)
    found = {rival: _empty(group, plan, rival) for rival in rivals}
    try:
        with _recording(list(found.values()), "before any rival ran: "):
            _fill(group, plan, found, budget)
    finally:
        if group.mode != "eager":
            torch.compiler.reset()
        _free()
    ours, theirs = ([found[r] for r in rivals if r.role == role] for role in ("ours", "peer"))
    rows.compare(ours, theirs)
    return list(found.values())


def _fill(group: Group, plan: Plan, found: dict[peers.Rival, Row], budget: Budget) -> None:
    """Fill in the rows of rivals, who are in memory no longer than this takes."""
    task = Task(group.case, group.what, DTYPES[group.dtype], plan.device, plan.small)
    layouts = list(dict.fromkeys(rival.layout for rival in found))
    with budget.spending("roofs"):
        best = roofs.roofs(plan.device, task.dtype)
    with budget.part(f"truth, {group.kind}"), budget.spending("truth"):
        kind = PassStage if group.case.group == "pass" else NetworkStage
        stage = kind(task, layouts, best, budget)
    ready: dict[peers.Rival, Ready] = {}
    for rival, row in found.items():
        with _recording([row]), budget.part(f"a rival, {group.kind}"):
            ready[rival] = stage.prepare(rival)
    with _recording([found[rival] for rival in ready]):
        _time(ready, found, plan, budget)


def _time(
    ready: dict[peers.Rival, Ready], found: dict[peers.Rival, Row], plan: Plan, budget: Budget
) -> None:
    """Fill in the rows of those who are ready."""
    warmup = 3 if plan.device.type == "cuda" else 1
    runs = {rival.label: one.run for rival, one in ready.items()}
    start = time.monotonic()
    most = min(SECONDS, budget.left)
    times = interleaved(runs, plan.device, plan.rounds, warmup, budget=most)
    seconds = time.monotonic() - start
    budget.share("timing", seconds, [(one.engine, times[one.label].ms) for one in ready])
    for rival, one in ready.items():
        timing = times[rival.label]
        found[rival].update(timing._asdict(), **one.columns, roof_fraction=one.floor / timing.ms)


def _rivals(group: Group, plan: Plan) -> list[peers.Rival]:
    if group.case.group == "pass":
        return passes.rivals(plan.device, plan.layouts)
    return peers.rivals(group.case, plan.device, group.mode, plan.layouts)


def _empty(group: Group, plan: Plan, rival: peers.Rival) -> Row:
    """The row of a rival, before anything is measured."""
    row: Row = dict.fromkeys(rows.COLUMNS, "")
    row["case"] = f"{group.case.name} (small)" if plan.small else group.case.name
    row["pass"], row["dtype"] = group.what, group.dtype
    row["engine"], row["layout"] = rival.engine, rival.layout
    return row


@contextlib.contextmanager
def _recording(into: list[Row], when: str = "") -> Iterator[None]:
    """What goes wrong is a result too: it is written into these rows, and the others go on."""
    why = ""
    try:
        yield
    except OutOfTime:
        raise
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Wrong as error:
        why = f"wrong: {error}"
    except Exception as error:  # a compiler or another package may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if why:
        for row in into:
            row["error"] = when + why
        _free()


def _free() -> None:
    """Give back what was held, so that who comes next finds the memory it needs.

    A GPU that an earlier error has broken says so here, and ends the benchmark: what would follow
    are errors of nobody.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
