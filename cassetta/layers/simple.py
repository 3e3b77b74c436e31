"""Small pieces: concatenation, sums, groups of modules, global pooling."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cassetta.core import check
from cassetta.core.typing import OneOrSeveral
from cassetta.functional import Deferred, defer, materialize
from cassetta.layers import fusing
from cassetta.layers.decisions import recalled
from cassetta.layers.repeated import repeated


class Cat(nn.Module):
    """Concatenate tensors along `dim` (by default, channels)."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tensors of equal shape, except along `dim` -> one tensor"""
        return torch.cat(inputs, self.dim)


class Add(nn.Module):
    """Sum tensors, whose shapes may broadcast."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """One or more tensors -> their sum"""
        if not inputs:
            raise ValueError("inputs=() is empty: give at least one tensor")
        return functools.reduce(torch.add, inputs)


class Split(nn.Module):
    """Split a tensor into `nb_chunks` parts along `dim`; the first ones take what is left over."""

    def __init__(self, nb_chunks: int = 2, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.nb_chunks = check.whole("nb_chunks", nb_chunks)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """One tensor -> `nb_chunks` tensors"""
        return torch.tensor_split(input, self.nb_chunks, dim=self.dim)


class DoNothing(nn.Module):
    """Return the first argument, whatever the others."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class MoveDim(nn.Module):
    """Move a dimension of a tensor from `src` to `dst`."""

    def __init__(self, src: int, dst: int) -> None:
        super().__init__()
        self.src = src
        self.dst = dst

    def forward(self, inp: Tensor) -> Tensor:
        return inp.movedim(self.src, self.dst)


class Hadamard(nn.Module):
    """Replace two tensors by their sum and their difference: (x, y) -> (x + y, x - y).

    A single tensor is split in two along its channels, and the results are concatenated.
    """

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Two tensors of equal shape -> two tensors; or (B, 2C, *size) -> (B, 2C, *size)"""
        if y is not None:
            return x + y, x - y
        if x.shape[1] % 2:
            raise ValueError(f"x has {x.shape[1]} channels: an even number is needed to split it")
        return torch.cat(self(*x.chunk(2, dim=1)), dim=1)


@fusing.fuses
class ModuleSum(nn.ModuleList):
    """Apply modules side by side to the same input and sum their outputs, of the same shape."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index)

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self[0].ndim

    @property
    def inp_channels(self) -> int:
        """Number of input channels."""
        return self[0].inp_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self[-1].out_channels

    @repeated
    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size)"""
        if not len(self):
            raise ValueError("ModuleSum holds no modules: there is nothing to sum")
        return materialize(self.defer(defer(inp)))

    def defer(self, x: Deferred) -> Deferred:
        """`forward` of what x stands for; each module's output is added as it is computed."""
        total: Deferred | None = None
        x = x.kept() if len(self) > 1 else x
        for module in self:
            # before the next module works, which may change its input in place
            before = None if total is None else total.z()
            total = defer(fusing.deferred_call(module)(x))
            if before is not None and before.shape != total.shape:
                raise ValueError(
                    f"the modules return different shapes, {tuple(before.shape)} and "
                    f"{tuple(total.shape)}: no sum has one"
                )
            total = total if before is None else total.plus(before)
        assert total is not None
        return total


class Stack(nn.Sequential):
    """A sequence whose slices are plain sequences, whatever its own constructor takes."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return self._modules[list(self._modules)[index]]  # (torch 2.8 does not export its own)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()


def listed(modules: nn.Sequential) -> list[Any]:
    """Modules as a list, made in a way that torch 2.8 traces: neither `list` nor `enumerate` is."""
    return [modules[n] for n in range(len(modules))]


class Chain(Stack):
    """A sequence that takes what its first module takes, and gives what its last one gives."""

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self[0].ndim

    @property
    def inp_channels(self) -> int:
        """Number of input channels."""
        return self[0].inp_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self[-1].out_channels

    @property
    def all_out_channels(self) -> list[int]:
        """Number of channels that leave each module."""
        return [module.out_channels for module in self]


@fusing.fuses
class ModuleGroup(Chain):
    """Modules one after the other, perhaps with residual connections around each.

    With residual connections, the modules preserve the number of channels and the spatial size;
    where the first one takes `skip` additional channels, its residual drops the last `skip`.
    """

    def __init__(self, blocks: Iterable[nn.Module], residual: bool = False, skip: int = 0) -> None:
        """
        Parameters
        ----------
        blocks : sequence of Module
            The modules.
        residual : bool
            Add the input of each module to its output.
        skip : int
            Number of additional channels in the input of the first module.
        """
        super().__init__(*blocks)
        self.residual = residual
        self.skip = skip

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            skip = self.skip if index.indices(len(self))[0] == 0 else 0
            return ModuleGroup(list(self)[index], residual=self.residual, skip=skip)
        return super().__getitem__(index)

    @repeated
    def forward(self, inp: Tensor, *, return_all: bool = False) -> Any:
        """
        Parameters
        ----------
        inp : (B, channels [+ skip], *size) tensor
            Image.
        return_all : bool
            Return what leaves each module, not only the last.

        Returns
        -------
        out : [tuple of] (B, channels, *size) tensor
        """
        if not return_all:
            return materialize(self.defer(defer(inp)))
        outputs: list[Tensor] = []
        self.defer(defer(inp), outputs)
        return tuple(outputs)

    def defer(self, x: Deferred, outputs: list[Tensor] | None = None) -> Deferred:
        """`forward` of what x stands for; what leaves each module is also put into the list."""
        # of each module, its steps: they are known once it has come to it
        known: dict[int, fusing.Steps] = {} if outputs is not None else recalled(self, x, _no_steps)
        for n, module in enumerate(listed(self)):
            steps = known.get(n)
            if steps is None:
                steps = known[n] = fusing.steps(module, x)
            before = x.kept() if self.residual else x
            for step in steps:
                x = defer(step(x))
            if self.residual:
                x = x.plus(_matching(before, x, 0 if n else self.skip))
            if outputs is not None:
                outputs.append(x.z())
                x = defer(outputs[-1])
        return x


def _no_steps(x: Deferred) -> dict[int, fusing.Steps]:
    return {}


def _matching(x: Deferred, out: Deferred, skip: int) -> Tensor:
    """The part of a module's input that is added to its output."""
    before = x.leading(out.shape[1]) if skip else x.z()
    if before.shape != out.shape:
        raise ValueError(
            f"residual=True needs modules that preserve the shape, but one turned "
            f"{tuple(before.shape)} into {tuple(out.shape)}"
        )
    return before


class GlobalPool(nn.Module):
    """Mean or maximum over whole dimensions; by default, over space."""

    def __init__(
        self,
        reduction: Literal["mean", "max"] = "mean",
        keepdim: bool = True,
        dim: OneOrSeveral[int] | Literal["spatial"] = "spatial",
    ) -> None:
        """
        Parameters
        ----------
        reduction : {"mean", "max"}
            What to compute.
        keepdim : bool
            Keep the pooled dimensions, with size one.
        dim : [list of] int or "spatial"
            Dimensions to pool; "spatial" means all but the first two.
        """
        super().__init__()
        self.reduction = check.one_of("reduction", str(reduction).lower(), ["mean", "max"])
        self.keepdim = keepdim
        self.dim: Any = dim
        if isinstance(dim, str):
            check.one_of("dim", dim, ["spatial"])

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *ones), or (B, C) without `keepdim`, for `dim="spatial"`"""
        check.tensor(inp)
        dim = tuple(range(2, inp.ndim)) if self.dim == "spatial" else self.dim
        reduce = torch.amax if self.reduction == "max" else torch.mean
        return reduce(inp, dim, keepdim=self.keepdim)
