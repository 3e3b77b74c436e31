"""What a CUDA graph can hold of a network: all else is refused before anything is captured."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from cassetta.core import check
from cassetta.kernels import machine


def check_inputs(model: Any, inputs: tuple[Any, ...]) -> None:
    """Refuse what is no network and tensors, all on one GPU."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not inputs:
        raise ValueError("inputs=() is empty: give what the network is called with")
    for n, x in enumerate(inputs):
        check.tensor(x, f"inputs[{n}]")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("the network has lazy layers without a shape: call it once before")
    device = inputs[0].device
    if not machine.is_gpu(device):
        raise ValueError(
            f"inputs[0] is on {device}: CUDA graphs need a network and inputs on a GPU"
        )
    named = [(f"inputs[{n}]", x) for n, x in enumerate(inputs)]
    for name, one in (*named, *model.named_parameters(), *model.named_buffers()):
        if one.device != device:
            raise ValueError(
                f"{name} is on {one.device}, and inputs[0] on {device}: move all to one GPU"
            )
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise ValueError(f"the buffer {name} asks for a gradient: make it a parameter")


def check_modules(model: nn.Module) -> None:
    """Refuse modules that do more than start kernels."""
    if torch_module._has_any_global_hook():
        raise RuntimeError("a global hook is on all modules, and no replay calls it: remove it")
    for name, one in model.named_modules():
        what = f"{name or 'the network'} ({type(one).__name__})"
        if isinstance(one, (DataParallel, DistributedDataParallel)):
            raise RuntimeError(
                f"{what} talks to other processes or GPUs: graph the network inside it before it "
                "is wrapped"
            )
        if isinstance(one, nn.SyncBatchNorm) and one.training:
            raise RuntimeError(
                f"{what} waits for other processes in training: use BatchNorm, or its eval mode"
            )
        hooks = (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks)
        if any((*hooks, one._backward_pre_hooks)):
            raise RuntimeError(f"{what} has a hook, and no replay calls it: remove it")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise RuntimeError(
                f"a hook is on the gradient of {name}, and it would be applied twice: remove it, "
                "and register it afterwards"
            )


def check_outputs(outputs: list[Any], records: bool) -> None:
    """Refuse what a replay would not update, or could not derive."""
    for one in outputs:
        if not isinstance(one, Tensor):
            raise TypeError(
                f"the network returns a {type(one).__name__}, which no replay would update: let it "
                "return tensors only"
            )
    if records and not any(one.requires_grad for one in outputs):
        raise ValueError("no output depends on what asks for a gradient: use torch.no_grad()")


class Watch(TorchDispatchMode):
    """Refuses, before it is captured, what would break a capture, in the line that does it."""

    refused = ""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if self.refused and self.refused not in str(error):  # TorchScript has words of its own
            raise RuntimeError(self.refused) from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(func, args):
            self._refuse("the host reads a value of the GPU", func)
        out = func(*args, **(kwargs or {}))
        if func.name().startswith(("aten::copy_", "aten::_to_copy")):
            moved = [one for one in (*args, out) if isinstance(one, Tensor)]
            if len({one.device.type for one in moved}) > 1:
                self._refuse("a tensor is copied from or to the CPU", func)
        return out

    def _refuse(self, why: str, func: Any) -> None:
        self.refused = (
            f"the network cannot be captured in a CUDA graph: {why} ({func}), where the host would "
            "wait. Keep values and tensors on the GPU, or graph the part that does"
        )
        raise RuntimeError(self.refused)


_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _reads(func: Any, args: Any) -> bool:
    """Whether an operator needs values on the host; an index does where it is a mask."""
    if func.name().startswith(("aten::index.", "aten::index_put", "aten::_index_put_impl_")):
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return not _READS.isdisjoint(func.tags) or func.name() == "aten::is_nonzero"
