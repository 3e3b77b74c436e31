"""The tuner: time what could run each block of a network, and keep the fastest that is right.

For every block that a network meets, on the very image, in the very precision and layout:

1. Each engine is compared with plain PyTorch, output and gradients (`agreement`); one that
   disagrees is refused, and the table says so.
2. Each pass of the fused block is timed by every plan that is right (`plans.PLANS`).
3. The engines that are left, plain PyTorch among them, are timed in turns, forward and backward;
   the fastest median is chosen.

What is found is kept on disk when it is found (`kernels.evidence`), so that a tuning that was
stopped goes on where it stopped.
"""

import copy
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta import functional
from cassetta.explanation import watch
from cassetta.kernels import dispatch, evidence, plans, reference
from cassetta.kernels.evidence import Record
from cassetta.kernels.types import Activation
from cassetta.layers import fusing
from cassetta.measure import agreement
from cassetta.measure.spending import Budget, OutOfTime
from cassetta.measure.timing import interleaved, nb_inputs

ROUNDS = 15
SECONDS = 20.0
"""After which no further round of what is timed begins."""


class _NoPlan(Exception):
    """A pass of which no plan is right."""


class Found(NamedTuple):
    """What became of one block, or of one pass, on one image."""

    key: str
    choice: str  # "" if none could be made
    evidence: str  # the times; or why there are none
    is_new: bool


class Tuning(Sequence[Found]):
    """What was found, the largest image first; prints as a table."""

    def __init__(self, rows: list[Found], left: int, budget: Budget, reason: str = "") -> None:
        self.rows = rows
        self.left = left
        self.budget = budget  # and where it went
        self.reason = reason

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_complete(self) -> bool:
        """Whether the budget sufficed."""
        return not self.left

    def __str__(self) -> str:
        from rich.console import Console  # which takes long, and few need
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("block or pass", "fastest", "evidence"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(row.key, row.choice or "-", row.evidence)
        if not self.rows and self.reason:
            return self.reason
        text = io.StringIO()
        Console(file=text, width=160).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        if self.left:
            lines.append(f"the budget is spent, {self.left} blocks are left: tune again, to go on")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    *inputs: Tensor,
    budget: float | None = None,
    again: bool = False,
    progress: bool = False,
) -> Tuning:
    """Find out which engine runs each block of a network fastest, here, and keep it on disk.

    As for training if the network is in training mode, and for inference if it is not; under
    autocast, for that. Parameters, buffers, gradients, the mode and the state of random generators
    stay as they are. `cassetta.explain` then tells what was chosen, and by which evidence.

    ```python
    with torch.autocast("cuda", torch.bfloat16):
        print(cassetta.tune(net, image))
    ```

    Parameters
    ----------
    model : Module
        The network.
    *inputs : tensor
        What it is called with, on the device where it is to run.
    budget : float, optional
        Seconds within which all ends: what would take longer, by what its kind has taken so far, is
        not begun. A later call goes on from there.
    again : bool
        Measure what has been measured before.
    progress : bool
        Show a progress bar.

    Returns
    -------
    tuning : Tuning
        Rows with `.key`, `.choice`, `.evidence` and `.is_new`; `.is_complete`, `.left`;
        `.budget.table()`, which tells where the time went; and `.reason` if there was nothing to
        choose.
    """
    from rich.progress import Progress  # which takes long, and few need

    if not inputs:
        raise ValueError("inputs=() is empty: give what the network is called with")
    seconds, device = Budget(budget), inputs[0].device
    ran = watch(model, *inputs)
    blocks = {one.key: one for one in ran if one.choice.is_open}
    if not blocks:
        reasons = [one.choice.reason or one.choice.evidence for one in ran] or ["it has no blocks"]
        return Tuning(
            [], 0, seconds, f"there is nothing to choose: {max(reasons, key=reasons.count)}"
        )
    rows: list[Found] = []
    todo = sorted(blocks.values(), key=lambda one: -sum(image.numel() for image in one.images))
    gpus = [device.index or 0] if device.type == "cuda" else []
    with Progress(disable=not progress, transient=True) as bar, torch.random.fork_rng(devices=gpus):
        for n, one in enumerate(bar.track(todo, description="tuning")):
            try:
                rows.extend(_tune_block(one, device, model.training, again, seconds))
            except OutOfTime:
                return Tuning(rows, len(todo) - n, seconds)
    return Tuning(rows, 0, seconds)


def _tune_block(
    ran: fusing.Ran, device: torch.device, training: bool, again: bool, budget: Budget
) -> Iterator[Found]:
    """The block's passes, and then its engines."""
    table, names = evidence.table(device), ("reference", *dispatch.ENGINES)
    known = table.find(ran.key)
    tried = set() if known is None else {*known.ms, *known.refused}
    if known is not None and not again and tried >= {*names}:  # one may have come since
        yield Found(ran.key, known.choice, known.evidence, False)
        return
    net = _Block(copy.deepcopy(ran.block)).requires_grad_(training)
    try:
        images = _images(ran.images, device)
        refused: dict[str, str] = {}
        for name in names:
            why = ran.engines.get(name, "it has no kernel")
            if name != "reference" and why is None:
                with budget.part("check"), budget.spending("check", name):
                    why = agreement.disagreement(net, images[0], training, name)
            try:
                if name != "reference" and why is None:
                    yield from _tune_passes(net, images[0], training, again, name, budget)
            except _NoPlan as error:
                why = str(error)
            if why is not None:
                refused[name] = why
        runs = {name: _run(net, images, training, name) for name in names if name not in refused}
        with budget.part("timing"):
            record = _fastest(runs, refused, device, budget)
    except torch.OutOfMemoryError as error:
        yield Found(ran.key, "", f"out of memory ({str(error).splitlines()[0]})", False)
        return
    table.add(ran.key, record)
    yield Found(ran.key, record.choice, record.evidence, True)


class _Block(nn.Module):
    """A block, called with the images that it reads side by side."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *images: Tensor) -> Tensor:
        """(N, C, *X) each -> (N, K, *X)"""
        x = functional.defer(images[0])
        if len(images) > 1:
            x = functional.join(x, *map(functional.defer, images[1:]))
        return functional.materialize(fusing.deferred_call(self.block)(x))


def _tune_passes(
    net: nn.Module, images: Sequence[Tensor], training: bool, again: bool, engine: str,
    budget: Budget,
) -> Iterator[Found]:  # fmt: skip
    """The plan of each pass that the block asks for, run by this engine."""
    table = evidence.table(images[0].device)
    with plans.listening() as asked:
        agreement.step(net, images, training, engine)
    for key, one in asked.items():
        if again or table.find(key) is None:
            with budget.part(one.name):
                record = _fastest_plan(one, images[0].device, budget)
            table.add(key, record)
            yield Found(key, record.choice, record.evidence, True)


def _run(
    net: nn.Module, images: list[tuple[Tensor, ...]], training: bool, engine: str
) -> Callable[[int], Any]:
    """What is timed: forward, and in training backward."""
    parameters = list(net.parameters())
    cotangent = torch.randn_like(agreement.step(net, images[0], False, engine).tensors[0])

    def run(k: int) -> object:
        torch.clear_autocast_cache()  # so that a step rounds its weights, as one of a training does
        given = [one.detach().requires_grad_(training) for one in images[k % len(images)]]
        with dispatch.use_engine(engine), torch.set_grad_enabled(training):
            out = net(*given)
            return torch.autograd.grad(out, [*given, *parameters], cotangent) if training else out

    return run


def _fastest(
    runs: dict[str, Callable], refused: dict[str, str], device: torch.device, budget: Budget,
    whom: str = "",
) -> Record:  # fmt: skip
    """What came of timing these in turns: each for itself, or all of them for somebody."""
    start = time.monotonic()
    times = interleaved(runs, device, ROUNDS, budget=min(SECONDS, budget.left))
    seconds, ms = time.monotonic() - start, {name: time.ms for name, time in times.items()}
    budget.share("timing", seconds, [(whom or name, one) for name, one in ms.items()])
    return Record(min(ms, key=lambda name: ms[name]), ms, refused)


def _fastest_plan(what: plans.Pass | plans.Product, device: torch.device, budget: Budget) -> Record:
    """The fastest plan of a pass among those that compute what the reference computes."""
    name = what.name
    if isinstance(what, plans.Product):
        work = agreement.ProductWork.drawn(what, device)
    else:
        drawn = [one for (one,) in _images((what.image,), device, 3)]
        work = agreement.Work.drawn(drawn, Activation("silu"))
    with budget.spending("check", name):
        same = work.step(reference, name)
        truth = work.to(agreement.higher(work.x)).step(reference, name)
    refused, runs = {}, {}
    for plan in plans.candidates(what, device):
        with plans.use_plan(plan), budget.spending("first run", name):
            ours = agreement.attempt(lambda: work.step(dispatch.passes(work.x), name))
        with budget.spending("check", name):
            why = ours
            if not isinstance(ours, str):
                why = agreement.judge(ours, same, truth, slack=work.slack)
        if why is None:
            runs[str(plan)] = _planned(plan, name, work)
        else:
            refused[str(plan)] = why
    if not runs:
        raise _NoPlan(f"no plan of {name} is right on {tuple(work.x.shape)}: {refused}")
    return _fastest(runs, refused, device, budget, name)


def _planned(plan: Any, name: str, work: Any) -> Callable[[int], Any]:
    def run(k: int) -> None:
        with plans.use_plan(plan):
            work.step(dispatch.passes(work.x), name)

    return run


def _images(
    like: tuple[Tensor, ...], device: torch.device, count: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Random images like these, so often that no cache holds them all."""
    count = nb_inputs(sum(one.nbytes for one in like), device) if count is None else count
    return [
        tuple(torch.empty_like(one, device=device).normal_() for one in like) for _ in range(count)
    ]
