"""Networks on images of one fixed size, whose work on a GPU is captured once and then replayed.

A CUDA graph holds kernels and the addresses that they read and write, so a replay starts all of
them at once, and nothing of Python, autograd or dispatch is repeated. What is not a kernel is not
in it: whatever the host decides was decided while it was captured.

`torch.cuda.make_graphed_callables` does so too, but hands out the memory that the next replay
overwrites: outputs, and gradients, which are then added to themselves where they accumulate
(pytorch#181723). It leaves buffers as its warm-up changed them, takes the example for its own
memory, and computes wrong gradients of a call that is not the latest. Here all that leaves is a
copy, and what cannot be replayed rightly is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from cassetta import capturable
from cassetta.core import check
from cassetta.kernels import machine

WARMUP = 3
"""Calls before the capture: in the first, kernels are compiled and cuDNN chooses; the last is
watched."""


def graphed(model: nn.Module, *inputs: Tensor) -> "Graphed":
    """Capture a network on a GPU in CUDA graphs, for inputs of the size that these have.

    With its gradients if they are recorded here, and without under `torch.no_grad()`; in the mode
    of each module, under the autocast and the backend of this moment. Parameters, buffers,
    gradients and the state of random generators stay as they are, also if an error is raised.

    ```python
    step = cassetta.graphed(net.train(), patch)  # for training
    with torch.no_grad():
        predict = cassetta.graphed(net.eval(), patch)  # for inference
    ```

    Parameters
    ----------
    model : Module
        The network, on a GPU. It stays what it is, and shares its parameters with the result.
    *inputs : tensor
        Examples of what it is called with: their values do not matter, their shapes, dtypes,
        device and `requires_grad` do.

    Returns
    -------
    graphed : Graphed
        A module that is called as the network is, with inputs like these, and replays.

    Raises
    ------
    TypeError
        If `model` is no module, or something that is given or returned is no tensor.
    ValueError
        If something is not on the GPU of the first input, or asks for gradients in vain.
    RuntimeError
        If something in the network forbids the capture: the message says what, and what to do.
    """
    capturable.check_inputs(model, inputs)
    capturable.check_modules(model)
    if any(isinstance(one, Graphed) for one in model.modules()):
        raise RuntimeError("it is graphed already: graph the network that it was made of, `.model`")
    asked = torch.is_grad_enabled()
    # a tensor of inference mode could not be overwritten outside it; to leave it turns gradients on
    with torch.inference_mode(False), torch.set_grad_enabled(asked):
        return Graphed(model, inputs)


class Graphed(nn.Module):
    """A network whose forward, and backward if it was captured, replay CUDA graphs.

    What it returns, and the gradients of its parameters, are copies that no later call touches.
    Its parameters and the keys of its `state_dict` are the network's, which is its `model`. One
    call is under way at a time: backward follows its forward before the next one, once.

    It refuses to be called with other inputs, in another mode, under another autocast, or with
    other parameters in place of those that were captured. Values may change, by `optimizer.step()`
    or `load_state_dict`. Hooks that the network gets later are not called.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Use `cassetta.graphed`, which checks what is given.

        Parameters
        ----------
        model : Module
            The network.
        inputs : sequence of tensors
            Examples of what it is called with.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        self.register_load_state_dict_pre_hook(_with_the_prefix)
        self._every = list(model.modules())
        places = [(m._parameters, m._buffers) for m in self._every]
        self._places = [
            (own, name) for pair in places for own in pair for name in own if own[name] is not None
        ]
        self._graphs = _Graphs(model, inputs)
        self._given = [_facts(x) for x in inputs]
        self._modes = [m.training for m in self._every]
        self._held = self._holds()
        self._autocast = _autocast(inputs[0].device.type)

    def forward(self, *inputs: Tensor) -> Any:
        """Replay the network on inputs like those it was captured with."""
        self._check(inputs)
        graphs = self._graphs
        outputs = _Replay.apply(graphs, *inputs, *graphs.parameters)
        return tree_unflatten(outputs, graphs.structure)  # type: ignore[arg-type]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's own, with its own keys."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what the network loads: values are copied, and the graphs read them."""
        return self.model.load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> Any:
        raise TypeError("a graphed network cannot be copied or saved: copy or save its `.model`")

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        """Refuse what would be replayed wrongly."""
        given = [_facts(x) for x in inputs]
        if given != self._given:
            raise ValueError(
                f"the graph was captured for {_words(self._given)}, and is called with "
                f"{_words(given)}: call its `.model`, or graph it for these inputs too"
            )
        if [m.training for m in self._every] != self._modes:
            before = dict(zip(self._every, self._modes, strict=True))
            name, now = next(
                (name or "the network", one.training)
                for name, one in self.model.named_modules()
                if one.training != before[one]
            )
            raise RuntimeError(
                f"{name} was captured in {_mode(not now)} mode, and is in {_mode(now)} mode now: "
                "change it back, or graph the network once for each mode"
            )
        kind = inputs[0].device.type
        if _autocast(kind) != self._autocast:
            raise RuntimeError(
                f"the graph was captured under {_precision(self._autocast)}, and is called under "
                f"{_precision(_autocast(kind))}: graph it for that too"
            )
        if self._holds() != self._held:
            raise RuntimeError(
                "a parameter or buffer was moved, exchanged, frozen or unfrozen since the graph, "
                "which reads it where it was, was captured: graph the network again"
            )
        if torch.is_grad_enabled() and not self._graphs.records and any(h[2] for h in self._held):
            raise RuntimeError(
                "the graph was captured under torch.no_grad(), and is called where gradients are "
                "recorded: call it under torch.no_grad(), or graph the network here"
            )

    def _holds(self) -> list[tuple[int, int, bool]]:
        """What identifies each parameter and buffer, its memory, and whether it is trained."""
        found = [own[name] for own, name in self._places]
        return [(id(one), one.data_ptr(), one.requires_grad) for one in found]  # type: ignore


class _Graphs:
    """The graphs of a network, and the memory that they read and write."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.model = model
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        parameters = tuple(model.parameters())
        surface = (*self.inputs, *parameters)
        self.records = torch.is_grad_enabled() and any(one.requires_grad for one in surface)
        self.parameters = parameters if self.records else ()
        self.calls = 0
        self.has_backward = False  # of the latest call, and not yet used up
        device = inputs[0].device
        with (
            machine.guard(inputs[0]), _preserved(model, device), _uncached(device.type),
            torch.set_grad_enabled(self.records),
        ):  # fmt: skip
            self._warm_up()
            self._capture()

    def _warm_up(self) -> None:
        """Run what will be captured, in a stream of its own, and watch the last time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for n in range(WARMUP):
                with capturable.Watch() if n == WARMUP - 1 else nullcontext():
                    found, surface = self._call()
                    outputs = tree_leaves(found)
                    capturable.check_outputs(outputs, self.records)
                    if self.records:
                        _gradients(outputs, surface, _like(outputs))
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self) -> None:
        """Capture forward and backward, in memory that the two share."""
        stream = torch.cuda.Stream()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.forward, stream=stream):
                found, surface = self._call()
                outputs, self.structure = tree_flatten(found)
            self.cotangents = _like(outputs) if self.records else []
            self.gradients: list[Tensor | None] = []
            if self.records:
                with torch.cuda.graph(self.backward, pool=self.forward.pool(), stream=stream):
                    self.gradients = _gradients(outputs, surface, self.cotangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _release_generator(self.inputs[0].device)
            raise RuntimeError(
                f"the network cannot be captured in a CUDA graph ({str(error).splitlines()[0]}): "
                "call it as it is, or graph the part of it that can be"
            ) from error
        self.outputs = [(one.detach(), one.requires_grad) for one in outputs]

    def _call(self) -> tuple[Any, list[Tensor]]:
        """Call the network; with the inputs and parameters that its gradients are of.

        These are not its own parameters, but leaves that share their memory: where an output of an
        earlier call is alive, gradients of its own add up in the stream of that call, and no
        capture can wait for that.
        """
        if not self.records:
            return self.model(*self.inputs), []
        leaves = {
            name: one.detach().requires_grad_(one.requires_grad)
            for name, one in self.model.named_parameters()
        }
        found = functional_call(self.model, leaves, tuple(self.inputs))
        return found, [*self.inputs, *leaves.values()]

    def use_up(self, call: int) -> None:
        """Let the backward of a call begin, if what it needs is still there."""
        if call != self.calls:
            raise RuntimeError(
                "backward of an earlier call: a graph keeps what backward needs of its latest call "
                "only. Call backward before the next forward, or `.model` for one of the two"
            )
        if not self.has_backward:
            raise RuntimeError(
                "backward a second time: the first has used up what the graph kept. Add losses up, "
                "and call backward once, or call `.model`"
            )
        self.has_backward = False


class _Replay(Function):
    """A call of the graphs; all that leaves is a copy of their memory."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *surface: Tensor) -> tuple[Tensor, ...]:
        graphs.calls += 1
        graphs.has_backward = True
        ctx.graphs, ctx.call = graphs, graphs.calls
        for own, given in zip(graphs.inputs, surface[: len(graphs.inputs)], strict=True):
            own.copy_(given)
        graphs.forward.replay()
        outputs = tuple(own.clone() for own, _ in graphs.outputs)
        pairs = zip(outputs, graphs.outputs, strict=True)
        ctx.mark_non_differentiable(*(one for one, (_, recorded) in pairs if not recorded))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a graph has first derivatives only: do without create_graph, or call `.model`"
            )
        graphs.use_up(ctx.call)
        given = [g for g, (_, recorded) in zip(grads, graphs.outputs, strict=True) if recorded]
        for own, grad in zip(graphs.cotangents, given, strict=True):
            own.copy_(grad)
        graphs.backward.replay()
        there = [own for own in graphs.gradients if own is not None]
        copies = [torch.empty_like(own) for own in there]
        # in few launches, however many parameters there are
        torch._foreach_copy_(copies, there)  # pyright: ignore[reportPrivateImportUsage]
        left = iter(copies)
        return None, *(None if own is None else next(left) for own in graphs.gradients)


def _release_generator(device: torch.device) -> None:
    """Let random numbers be drawn again: after a capture that failed, torch's generator waits for
    its end, and refuses. It gets a state like its own, which waits for nothing."""
    if torch.cuda.is_initialized():
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _preserved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers and random generators as they are found, where they are found."""
    every = [(own, name) for own, name in _places(model) if own[name] is not None]
    kept = [(own, name, own[name], own[name].detach().clone()) for own, name in every]
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        try:
            yield
            exchanged = [name for own, name, buffer, _ in kept if own[name] is not buffer]
        finally:
            with torch.no_grad():
                for own, name, buffer, twin in kept:
                    own[name] = buffer.copy_(twin)
    if exchanged:
        raise RuntimeError(
            f"the network exchanges its buffer {exchanged[0]} in each call, which no replay would "
            "do: let it write into the buffer"
        )


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the modules of a network hold their buffers."""
    return ((m._buffers, name) for m in model.modules() for name in m._buffers)


def _uncached(kind: str) -> torch.autocast:
    """The autocast that is on, if one is, but for its cache: it would outlive the capture."""
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _gradients(
    outputs: list[Any], surface: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of all of a surface; of what asks for none, or takes no part, None."""
    roots = [one for one in outputs if one.requires_grad]
    wanted = [one for one in surface if one.requires_grad]
    found = iter(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True))
    return [next(found) if one.requires_grad else None for one in surface]


def _like(outputs: list[Any]) -> list[Tensor]:
    """Memory for the gradients of outputs."""
    return [torch.zeros_like(one) for one in outputs if one.requires_grad]


def _with_the_prefix(module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    """Find the network's keys, when a module that holds a graphed one is loaded."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _facts(x: Any) -> tuple[Any, ...]:
    check.tensor(x, "an input")
    return x.shape, x.dtype, x.device, x.requires_grad


def _words(given: list[tuple[Any, ...]]) -> str:
    found = [
        f"{tuple(shape)} {dtype} on {device}{' with a gradient' * asks}".replace("torch.", "")
        for shape, dtype, device, asks in given
    ]
    return ", ".join(found) or "nothing"


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _precision(autocast: torch.dtype | None) -> str:
    return "no autocast" if autocast is None else f"autocast to {autocast}"
