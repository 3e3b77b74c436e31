"""Networks that run on stand-ins: nothing is computed or allocated, and memory can be followed.

The stand-ins are the fake tensors with which torch itself traces networks. They say they are on a
CPU, whatever the device of the network, because autocast knows no device "meta".
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cassetta.core import check
from cassetta.kernels import dispatch

Input = Tensor | Sequence[int]
"""An input of a network, or its shape."""


class Live(TorchDispatchMode):
    """Follows the bytes that are alive: those of given tensors, and of all that operations return.

    A storage counts from when it is first seen until it dies, however many tensors look at it. What
    an operation allocates for itself and frees before it returns is not seen.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in given:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                self._follow(one)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # the same object, as long as any tensor has it
        if storage not in self._storages:
            self._storages.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, by: int) -> None:
        self.now += by
        self.peak = max(self.peak, self.now)


class Rehearsal:
    """A network with stand-ins for its parameters and buffers.

    Parameters
    ----------
    model : Module
        The network, on any device; stays as it is.
    autocast : {None, torch.bfloat16, torch.float16}
        Run under `torch.autocast` of this dtype.

    Raises
    ------
    ValueError
        If the shape of a parameter is not known yet, or `autocast` is another dtype.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast={autocast!r} is unknown: use torch.bfloat16, torch.float16 or None"
            )
        if any(map(is_lazy, model.parameters())):
            raise ValueError(
                "model holds lazy layers without a shape: call it once on an image first"
            )
        self.model, self.autocast = model, autocast
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._twins = {p: self._twin(p) for p in model.parameters()}
        self._state = {name: self._twin(b) for name, b in model.named_buffers()}
        for place, module in model.named_modules():  # each once, though blocks may be shared
            for name, parameter in module.named_parameters(place, recurse=False):
                self._state[name] = self._twins[parameter]

    @property
    def parameters(self) -> list[Tensor]:
        """The stand-ins, each once."""
        return list(self._twins.values())

    @property
    def optimizer_bytes(self) -> int:
        """What Adam and its like hold from their first step on: two numbers per parameter."""
        return sum(2 * twin.nbytes for twin in self.parameters if twin.requires_grad)

    def __call__(self, *inputs: Input, fused: bool = False) -> Any:
        """What the network makes of them: plain, or with every block fused that can be."""
        return self._run(self._inputs(inputs), fused)

    def training_peak(self, *inputs: Input, fused: bool = False) -> int:
        """The most bytes alive in a step: parameters, buffers, inputs, and all that comes of them.

        The loss is not in it, but for the gradient of the output that it hands back.
        """
        arguments = self._inputs(inputs)
        with Live([*self._state.values(), *arguments]) as live, self._fake:
            out = self._run(arguments, fused)
            given = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.requires_grad]
            if given:
                torch.autograd.backward(given, [torch.empty_like(t) for t in given])
        for twin in self.parameters:
            twin.grad = None
        return live.peak

    def inference_peak(self, *inputs: Input, fused: bool = False) -> int:
        """The most bytes alive in evaluation, without gradients."""
        arguments = self._inputs(inputs)
        with _evaluation(self.model), Live([*self._state.values(), *arguments]) as live:
            self._run(arguments, fused, training=False)
        return live.peak

    def _run(self, arguments: Sequence[Tensor], fused: bool, training: bool = True) -> Any:
        engine = dispatch.fused_on_reference() if fused else nullcontext()
        rounding = torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)
        backend = dispatch.use_backend("reference")
        with self._fake, backend, engine, rounding, torch.set_grad_enabled(training):
            # tie_weights=True would leave shared modules with the tensors of this call
            return torch.func.functional_call(
                self.model, self._state, tuple(arguments), tie_weights=False
            )

    def _inputs(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Stand-ins; of shapes, in the dtype of the network."""
        dtype = next(iter(self._twins), torch.empty(0)).dtype
        arguments = []
        for n, one in enumerate(inputs):
            if not isinstance(one, Tensor):
                shape = check.several(f"inputs[{n}]", one, least=0)
                one = torch.empty(shape, dtype=dtype, device="meta")
            arguments.append(self._twin(one))
        return arguments

    def _twin(self, tensor: Tensor) -> Tensor:
        with self._fake:
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
        return twin.requires_grad_(tensor.requires_grad)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The mode of evaluation; afterwards each module has its own again."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
