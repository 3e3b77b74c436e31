"""What a network costs in plain PyTorch: parameters, operations, memory kept, block by block."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cassetta.kernels import dispatch
from cassetta.layers import ConvBlock
from cassetta.layers.updown import Level


class Row(NamedTuple):
    """One block of a network."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of what leaves it
    parameters: int
    flops: int  # forward; a multiplication and an addition are two
    kept_bytes: int  # for backward, beyond what earlier blocks and the parameters hold


class Summary(Sequence[Row]):
    """The rows of a network, in the order of execution; prints as a table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

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

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False)
        for name in ("block", "kind", "shape"):
            table.add_column(name)
        for name in ("parameters", "GFLOP", "kept MiB"):
            table.add_column(name, justify="right")
        total = Row("total", "", (), self.parameters, self.flops, self.kept_bytes)
        for row in [*self.rows, total]:
            shape = " x ".join(map(str, row.shape))
            cost = f"{row.flops / 1e9:.3f}", f"{row.kept_bytes / 2**20:.2f}"
            table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", *cost)
        text = io.StringIO()
        Console(file=text, width=140).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join(
            [*lines, "in plain PyTorch; cassetta.explain tells which blocks are fused"]
        )


def summary(model: nn.Module, *inputs: Tensor | Sequence[int]) -> Summary:
    """Count what a network costs in plain PyTorch. Nothing is computed, allocated or changed.

    Fused blocks compute the same operations, and keep about half the memory.

    ```python
    print(cassetta.summary(net, (1, 1, 128, 128, 128)))
    ```

    Parameters
    ----------
    model : Module
        The network, on any device; in training mode if what training costs is asked for.
    *inputs : tensor or shape
        What it would be called with.

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
    if any(map(is_lazy, model.parameters())):
        raise ValueError("model holds lazy layers without a shape: call it once on an image first")
    twins = {p: p.detach().to("meta").requires_grad_() for p in model.parameters()}
    state: dict[str, Tensor] = {name: b.to("meta") for name, b in model.named_buffers()}
    for place, module in model.named_modules():  # each once, though blocks may be shared
        for name, parameter in module.named_parameters(place, recurse=False):
            state[name] = twins[parameter]
    dtype = next(iter(twins), torch.empty(0)).dtype
    arguments = [
        x.to("meta") if isinstance(x, Tensor) else torch.empty(*x, dtype=dtype, device="meta")
        for x in inputs
    ]
    meter = _Meter(twins.values())
    blocks = {block: name for name, block in reversed([*_blocks(model, "")])}  # the first name
    hooks = [hook for block, name in blocks.items() for hook in meter.attach(name, block)]
    try:
        with meter, dispatch.use_backend("reference"):
            # tie_weights=True would leave shared modules with the tensors of this call
            torch.func.functional_call(model, state, tuple(arguments), tie_weights=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Summary(meter.rows(model))


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, (ConvBlock, Level)) or not children:
        yield name or type(module).__name__, module
    else:
        for child_name, child in children:
            yield from _blocks(child, f"{name}.{child_name}".lstrip("."))


class _Meter:
    """Counts operations and saved tensors, and shares them out among the blocks that run."""

    def __init__(self, parameters: Any) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # which imports triton

        self.flops = FlopCounterMode(display=False)
        self.saving = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        self.held = {p.untyped_storage()._cdata: p for p in parameters}
        self.kept = 0
        self.found: dict[nn.Module, Row] = {}
        self.before = (0, 0)

    def __enter__(self) -> None:
        self.flops.__enter__()
        self.saving.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.saving.__exit__(*error)
        self.flops.__exit__(*error)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:  # holding it, so that no other takes its address
            self.held[storage._cdata] = tensor
            self.kept += storage.nbytes()
        return tensor

    def _now(self) -> tuple[int, int]:
        return self.flops.get_total_flops(), self.kept

    def attach(self, name: str, block: nn.Module) -> list[Any]:
        """Hooks that fill the row of a block, each time that it runs."""

        def start(module: nn.Module, args: Any) -> None:
            self.before = self._now()

        def stop(module: nn.Module, args: Any, out: Any) -> None:
            flops, kept = (now - then for now, then in zip(self._now(), self.before, strict=True))
            earlier = self.found.get(block)  # a block that is shared runs several times
            if earlier:
                flops, kept = flops + earlier.flops, kept + earlier.kept_bytes
            shape = tuple((out[0] if isinstance(out, tuple) else out).shape)
            self.found[block] = Row(name, type(module).__name__, shape, 0, flops, kept)

        return [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]

    def rows(self, model: nn.Module) -> list[Row]:
        """A row per block that ran, and one for what is left. A parameter is counted once."""
        left = set(model.parameters())
        rows = []
        for block, row in self.found.items():
            own = left & set(block.parameters())
            left -= own
            rows.append(row._replace(parameters=_count(own)))
        flops, kept = self._now()
        flops -= sum(row.flops for row in rows)
        kept -= sum(row.kept_bytes for row in rows)
        if left or flops or kept:
            rows.append(Row("(between blocks)", "", (), _count(left), flops, kept))
        return rows


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(p.shape) for p in parameters)
