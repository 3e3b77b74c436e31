"""What tests share: comparisons, which assert and are never called for their value; watchers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` relative to the largest expected value; same shape and dtype.

    1e-10 leaves room for float64 sums of up to a million terms taken in another order, and for
    nothing else: a wrong tap or weight is off by more than 1e-3.
    """
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


def named(value: Any) -> str:
    """A name for a test of it: the same in every process, where `str` may tell an address."""
    return getattr(value, "__name__", str(value))


def image(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """Normal noise (B, C, *size) that asks for its gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def assert_gradients(module: nn.Module, inp: Tensor) -> None:
    """The gradients of input and parameters agree with finite differences, in float64.

    In fast mode: along one random direction, which a wrong gradient fails with probability one.
    """
    module = module.double()
    names = [name for name, _ in module.named_parameters()]

    def run(inp: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (inp,))

    inputs = (inp, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def nodes_before(last: Tensor) -> set[Any]:
    """Return the nodes of autograd before a tensor."""
    seen: set[Any] = set()
    left = [last.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return seen


def graph(last: Tensor) -> list[str]:
    """List the nodes of autograd before a tensor, by the names of their classes."""
    return sorted(type(node).__name__ for node in nodes_before(last))


class Counted(TorchDispatchMode):
    """The operators that run, with their arguments."""

    def __enter__(self) -> "Counted":
        self.calls: list[tuple[Any, Any]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def ran(self) -> list[str]:
        return [str(func) for func, _ in self.calls]

    def count(self, word: str) -> int:
        return sum(word in name for name in self.ran)


def assert_registered(name: str, run: Callable[[], Any]) -> None:
    """The operator that `run` calls is registered as torch wants it, for what it is given."""
    operator = getattr(torch.ops.cassetta, name).default
    with Counted() as counted:
        run()
    arguments = [args for func, args in counted.calls if func is operator]
    torch.library.opcheck(operator, arguments[0])


class AsTold(TorchDispatchMode):
    """Asserts that each operator of ours returns what compilers are told: to the stride, since they
    index by it, and no tensor that it was given."""

    def __enter__(self) -> "AsTold":
        self.names: set[str] = set()
        self.mode = FakeTensorMode()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "cassetta":
            fake = lambda t: self.mode.from_tensor(t.detach())  # noqa: E731
            given = tree_map_only(Tensor, fake, args)
            with self.mode:
                told = func(*given)
            found, expected = ([_lies(t) for t in tree_leaves(one)] for one in (out, told))
            assert found == expected, f"{func}: {found}, but compilers are told of {expected}"
            places = [t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)]
            own = [t.untyped_storage().data_ptr() for t in tree_leaves(out) if t.numel()]
            assert {*places}.isdisjoint(own), f"{func} returns what it was given"
            assert len({*own}) == len(own), f"{func} returns views of one tensor"
            self.names.add(func.name().removeprefix("cassetta::"))
        return out


def _lies(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.storage_offset(), t.dtype


class NothingRead(TorchDispatchMode):
    """Raises where the host reads a value: a GPU would wait, and no graph could be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"):
            raise AssertionError(f"the host reads a value by {name}")
        return func(*args, **(kwargs or {}))
