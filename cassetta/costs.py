"""What a network costs: parameters, operations and memory, block by block, and at the peak.

What is kept for backward, and what is alive at the peak, is told for plain PyTorch and for fused
blocks. The network runs on stand-ins (`cassetta.rehearsal`), so nothing is computed.
"""

import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cassetta.functional.launch import Launch
from cassetta.layers import ConvBlock, fusing
from cassetta.layers.updown import Level
from cassetta.rehearsal import Input, Rehearsal

if TYPE_CHECKING:
    from rich.table import Table

FOOTER = """\
kept: for backward, in plain PyTorch; fused: where all blocks that can be are (backend 'triton')
peak: parameters, gradients, buffers, inputs, and all else alive at the worst moment; not in it are
the loss, workspaces of cuDNN, fragmentation, and what a GPU needs for itself: leave room for them
cassetta.explain tells which blocks are fused"""


class Row(NamedTuple):
    """One block of a network."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of what leaves it
    parameters: int
    flops: int  # forward; a multiplication and an addition are two
    kept_bytes: int  # for backward, beyond what earlier blocks and the parameters hold
    fused_bytes: int  # the same, where blocks are fused


class Summary(Sequence[Row]):
    """The rows of a network, in the order of execution; prints as a table.

    Attributes
    ----------
    parameters, flops, kept_bytes, fused_bytes : int
        Sums over the rows.
    peak_bytes, fused_peak_bytes : int
        The most that is alive during forward and backward, gradients and parameters included, in
        plain PyTorch and with fused blocks.
    inference_peak_bytes, fused_inference_peak_bytes : int
        The same in evaluation, without gradients.
    optimizer_bytes : int
        What Adam would add to a training step: two numbers per parameter.
    """

    def __init__(
        self,
        rows: list[Row],
        training: tuple[int, int],
        inference: tuple[int, int],
        optimizer_bytes: int,
    ) -> None:
        self.rows = rows
        self.peak_bytes, self.fused_peak_bytes = training
        self.inference_peak_bytes, self.fused_inference_peak_bytes = inference
        self.optimizer_bytes = optimizer_bytes

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        return sum(row.kept_bytes for row in self.rows)

    @property
    def fused_bytes(self) -> int:
        return sum(row.fused_bytes for row in self.rows)

    def __str__(self) -> str:
        from rich.console import Console  # which takes long, and few need

        sums = self.parameters, self.flops, self.kept_bytes, self.fused_bytes
        blocks = _table("block", "kind", "shape", "parameters", "GFLOP", "kept MiB", "fused MiB")
        for row in [*self.rows, Row("total", "", (), *sums)]:
            shape = " x ".join(map(str, row.shape))
            cost = f"{row.flops / 1e9:.3f}", _mib(row.kept_bytes), _mib(row.fused_bytes)
            blocks.add_row(row.name, row.kind, shape, f"{row.parameters:,}", *cost)
        peaks = _table("peak MiB", "", "", "plain", "fused")
        adam = f"and {_mib(self.optimizer_bytes)} more for Adam"
        training = _mib(self.peak_bytes), _mib(self.fused_peak_bytes)
        inference = _mib(self.inference_peak_bytes), _mib(self.fused_inference_peak_bytes)
        peaks.add_row("training", adam, "", *training)
        peaks.add_row("inference", "", "", *inference)
        text = io.StringIO()
        console = Console(file=text, width=140)
        console.print(blocks)
        console.print()
        console.print(peaks)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*lines, "", FOOTER])


def _table(*columns: str) -> "Table":
    """An empty one; three columns of words, and numbers from there on."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(name, justify="left" if n < 3 else "right")
    return table


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def summary(model: nn.Module, *inputs: Input, autocast: torch.dtype | None = None) -> Summary:
    """Count what a network costs. Nothing is computed, allocated or changed.

    Fused blocks compute the same operations and keep less for backward; how much is told for each.
    What the next block adds to what a block leaves pending, such as its norm, is kept by the first.

    ```python
    print(cassetta.summary(net, (1, 1, 128, 128, 128)))
    ```

    The peaks count tensors. Not in them are the loss (but for the gradient of the output, which it
    hands back), the workspaces of cuDNN, the fragmentation of memory, and what a GPU needs for
    itself. Mixed precision is that of `torch.autocast` on a CPU; on a GPU group norms and softmax
    return float32, so plain PyTorch may keep more there.

    Parameters
    ----------
    model : Module
        The network, on any device; in training mode if what training costs is asked for.
    *inputs : tensor or shape
        What it would be called with.
    autocast : {None, torch.bfloat16, torch.float16}
        In mixed precision of this dtype.

    Returns
    -------
    summary : Summary
        One row per block: a `ConvBlock`, a way down or up, or a module without children; and one
        for what happens between blocks, if that costs anything.

    Raises
    ------
    ValueError
        If the shape of a parameter is not known yet, or the network refuses the inputs.
    """
    rehearsal = Rehearsal(model, autocast)
    return Summary(
        _rows(model, rehearsal, inputs),
        (rehearsal.training_peak(*inputs), rehearsal.training_peak(*inputs, fused=True)),
        (rehearsal.inference_peak(*inputs), rehearsal.inference_peak(*inputs, fused=True)),
        rehearsal.optimizer_bytes,
    )


def _rows(model: nn.Module, rehearsal: Rehearsal, inputs: Sequence[Input]) -> list[Row]:
    """A row per block that ran, and one for what is left. A parameter is counted once."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    names = {block: name for name, block in reversed([*_blocks(model, "")])}  # the first name
    plain, fused = (_Kept(names, rehearsal.parameters) for _ in range(2))
    meter = _Meter(FlopCounterMode(display=False))
    hooks = [hook for block in names for hook in meter.attach(block)]
    try:
        with meter.flops, plain:
            rehearsal(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    with fused, fusing.listening(training=True):  # so that each block is among the callers
        rehearsal(*inputs, fused=True)
    left, rows = set(model.parameters()), []
    for block, shape in meter.shapes.items():
        own = left & set(block.parameters())
        left -= own
        kept = meter.counts[block], plain.counts[block], fused.counts[block]
        rows.append(Row(names[block], type(block).__name__, shape, _count(own), *kept))
    flops = meter.flops.get_total_flops() - meter.counts.total()
    if left or flops or plain.counts[None] or fused.counts[None]:
        kept = plain.counts[None], fused.counts[None]
        rows.append(Row("(between blocks)", "", (), _count(left), flops, *kept))
    return rows


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, (ConvBlock, Level)) or not children:
        yield name or type(module).__name__, module
    else:
        for child_name, child in children:
            yield from _blocks(child, f"{name}.{child_name}".lstrip("."))


class _Meter:
    """Shares operations out among the blocks that run."""

    def __init__(self, flops: Any) -> None:
        self.flops = flops  # a FlopCounterMode
        self.counts: Counter[nn.Module] = Counter()
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}

    def attach(self, block: nn.Module) -> list[Any]:
        """Hooks that count what the block does, each time that it runs."""

        def start(module: nn.Module, args: Any) -> None:
            self.counts[block] -= self.flops.get_total_flops()

        def stop(module: nn.Module, args: Any, out: Any) -> None:
            self.counts[block] += self.flops.get_total_flops()
            self.shapes[block] = tuple((out[0] if isinstance(out, tuple) else out).shape)

        return [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that are saved for backward, beyond parameters, by the block that saves."""

    def __init__(self, blocks: Iterable[nn.Module], parameters: Iterable[Tensor]) -> None:
        super().__init__(self._save, lambda tensor: tensor)
        self.counts: Counter[nn.Module | None] = Counter()
        self._blocks = set(blocks)
        self._held = {p.untyped_storage()._cdata: p for p in parameters}

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:  # holding it, so that no other takes its address
            self._held[storage._cdata] = tensor
            self.counts[self._running()] += storage.nbytes()
        return tensor

    def _running(self) -> nn.Module | None:
        """The block that is running, by the stack of calls: a hook on it would end its fusion."""
        frame: Any = sys._getframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Launch):  # which waited until another block asked for it
                owner = owner.owner
            if isinstance(owner, nn.Module) and owner in self._blocks:
                return owner
            frame = frame.f_back
        return None


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(p.shape) for p in parameters)
