"""What the GPUs of this machine are: all that is asked of CUDA, and of each GPU once.

It is asked where an image lies on a GPU, or where somebody wants to know of the machine, as
`cassetta doctor` does; never at import, and never for work on the CPU. For to ask is to start CUDA,
which fails in a process that was forked from one that uses it, and beside another that has the GPU
for itself.
"""

import ctypes
import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """One of them."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    cache: int  # bytes of the L2 cache
    shared: int  # bytes of shared memory that one program may use


def gpu(device: torch.device) -> Gpu:
    """The GPU that is this device; raises what CUDA raises, and then asks again next time."""
    index = device.index
    return _gpu(torch.cuda.current_device() if index is None else index)


def gpus() -> list[Gpu]:
    """All that this process sees; raises what CUDA raises."""
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def capability(device: torch.device) -> tuple[int, int]:
    """That of a GPU, for tracers too."""
    if torch.compiler.is_compiling():  # a constant to them, and they cannot read a cache
        return torch.cuda.get_device_capability(device)
    return gpu(device).capability


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on a GPU."""
    return gpu(device).shared


@functools.cache
def driver() -> str:
    """The newest CUDA that the driver knows: "13000" is 13.0. Torch does not tell."""
    try:
        version = ctypes.c_int()
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    return "unknown" if failed else str(version.value)


@functools.cache  # which keeps no exception
def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(
        found.name, (found.major, found.minor), found.total_memory, found.L2_cache_size,
        getattr(found, "shared_memory_per_block_optin", 0),  # which torch for ROCm does not tell
    )  # fmt: skip
