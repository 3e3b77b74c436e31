"""Which engine runs each block of a network on given inputs, and if it is not fused, why not.

A block is a `ConvBlock`, or a way down or up a level.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.layers import fusing


class Engine(NamedTuple):
    """Who ran one block."""

    name: str
    kind: str
    engine: str  # "library": torch convolves, kernels do the rest; "gemm": all kernels; "reference"
    reason: str  # why the block is not fused; "" if it is
    evidence: str  # by what the engine was chosen


class Explanation(Sequence[Engine]):
    """A row per block, in the order of execution; prints as a table."""

    def __init__(self, rows: list[Engine]) -> None:
        self.rows = rows

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
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


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
        Rows with `.name`, `.kind`, `.engine` (see `Engine`), `.reason` and `.evidence`.
    """
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    seen: dict[nn.Module, Engine] = {}
    for block, choice, *_ in watch(model, *inputs):
        name = names.get(block, type(block).__name__)
        seen.setdefault(block, Engine(name, type(block).__name__, *choice[:3]))
    return Explanation(list(seen.values()))


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
