"""Which engine runs each block of a network on given inputs, and if it is not fused, why not.

A block is a `ConvBlock`, or a way down or up a level.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.kernels import machine, plans
from cassetta.layers import fusing, repeated


class Engine(NamedTuple):
    """Who ran one block."""

    name: str
    kind: str
    engine: str  # "library": torch convolves, kernels do the rest; "gemm": all kernels; "reference"
    reason: str  # why the block is not fused; "" if it is
    evidence: str  # by what the engine was chosen


class Explanation(Sequence[Engine]):
    """A row per block, in the order of execution; prints as a table.

    Where kernels run, `programs` says of each module whose forward may be repeated as a program, by
    its name, why it is not: "" if it is, and then nothing of those within. `plans` says, of each
    plan of our own convolutions that is not offered here, why not.
    """

    def __init__(
        self, rows: list[Engine], programs: dict[str, str], plans: dict[str, str] | None = None
    ) -> None:
        self.rows, self.programs, self.plans = rows, programs, plans or {}

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        from rich.console import Console  # which takes long, and few need
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in Engine._fields:
            table.add_column("block" if name == "name" else name)
        for row in self.rows:
            table.add_row(*row)
        text = io.StringIO()
        Console(file=text, width=160).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        if whole := [name for name, why in self.programs.items() if not why]:
            lines.append(f"repeated as a program, from the third forward on: {', '.join(whole)}")
        for name, why in self.programs.items():
            if why:
                lines.append(f"runs anew each time: {name} ({why})")
        lines += [f"not offered: {plan} ({why})" for plan, why in self.plans.items()]
        return "\n".join(lines)


def explain(model: nn.Module, *inputs: Tensor) -> Explanation:
    """Run a network once, and tell which engine ran each `ConvBlock` and each way down or up.

    Buffers, gradients, the mode and the state of random generators stay as they are.

    ```python
    print(cassetta.explain(net, image))
    ```

    Parameters
    ----------
    model : Module
        The network.
    *inputs : tensor
        What it is called with, on the device where it is to run.

    Returns
    -------
    explanation : Explanation
        Rows with `.name`, `.kind`, `.engine` (see `Engine`), `.reason` and `.evidence`; and
        `.programs` and `.plans`.
    """
    programs: dict[str, str] = {}
    if inputs and inputs[0].device.type == machine.kernels_on():
        programs |= _programs(model, "", inputs[0])
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    seen: dict[nn.Module, Engine] = {}
    with plans.listening() as asked:
        ran = watch(model, *inputs)
    for block, choice, *_ in ran:
        name = names.get(block, type(block).__name__)
        seen.setdefault(block, Engine(name, type(block).__name__, *choice[:3]))
    return Explanation(
        list(seen.values()),
        programs,
        plans.declined(asked.values(), inputs[0].device) if asked else {},
    )


def _programs(module: nn.Module, name: str, image: Tensor) -> Iterator[tuple[str, str]]:
    """Name the outermost modules whose forward may be repeated, and why they are not."""
    if repeated.may_be(module):
        why = repeated.why_not(module, image)
        yield name or type(module).__name__, why or ""
        if why in (None, repeated.LOOKED_AT):
            return
    for child, within in module.named_children():
        yield from _programs(within, f"{name}.{child}" if name else child, image)


def watch(model: nn.Module, *inputs: Tensor) -> list[fusing.Ran]:
    """The blocks of a network as they run, and who runs them; nothing of the network changes."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    twins = {buffer: buffer.clone() for buffer in buffers.values()}
    copies = {name: twins[buffer] for name, buffer in buffers.items()}
    gpus = sorted({x.device.index or 0 for x in inputs if x.device.type == "cuda"})
    random = torch.random.fork_rng(devices=gpus)
    with fusing.listening(model.training) as ran, random, torch.no_grad():
        try:
            torch.func.functional_call(model, copies, inputs, tie_weights=False)
        finally:
            torch.clear_autocast_cache()  # of copies of weights that need no gradient
    return ran
