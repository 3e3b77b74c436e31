"""The GPUs of this machine, and the device that kernels run on: all that is asked of CUDA.

CUDA is queried where an image lies on a GPU, or where a command reports on the machine, as
`cassetta doctor` does; never at import, and never for work on the CPU. A query starts CUDA, which
fails in a process that was forked from one that uses CUDA, and while another process holds the GPU
exclusively. What a GPU is, is asked once for each.
"""

import ctypes
import functools
import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRET = "TRITON_INTERPRET"


class Gpu(NamedTuple):
    """Facts of one GPU."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    cache: int  # bytes of the L2 cache
    shared: int  # bytes of shared memory that one program may use


stand_in: Gpu | None = None
"""For measurements of the host (`bench/host.py`): the GPU that the CPU passes for."""


target: Gpu | None = None
"""The GPU that is compiled for by launches on tensors of the device "meta" (`aot`)."""


def is_interpreted() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter."""
    return os.environ.get(INTERPRET, "") in ("1", "true", "True", "on")


def kernels_on() -> str:
    """Return the type of device that kernels run on: "cpu" if they are interpreted, or stood in."""
    return "cpu" if stand_in or is_interpreted() else "cuda"


def is_gpu(device: torch.device) -> bool:
    """Tell whether `device` is a GPU, or passes for one."""
    return device.type == "cuda" or (stand_in is not None and device.type == "cpu")


def is_current(device: torch.device) -> bool:
    """Tell whether kernels start on this device as things are: it is no GPU, or the current one."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def is_capturing(device: torch.device) -> bool:
    """Tell whether what is started on this device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def guard(x: Tensor) -> torch.cuda.device:
    """Return a context in which the GPU of x is the current one; elsewhere it does nothing."""
    return torch.cuda.device_of(x)


def gpu(device: torch.device) -> Gpu:
    """Describe the GPU of `device`. What CUDA raises is raised, and the next call queries again."""
    if stand_in is not None:
        return stand_in
    index = device.index
    return _gpu(torch.cuda.current_device() if index is None else index)


def gpus() -> list[Gpu]:
    """Describe all GPUs that this process sees. What CUDA raises is raised."""
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of the GPU of `device`; works while torch.compile traces."""
    if torch.compiler.is_compiling():  # a constant to them, and they cannot read a cache
        return torch.cuda.get_device_capability(device)
    return gpu(device).capability


def known(device: torch.device) -> Gpu | None:
    """Return the GPU that `device` is, or that is compiled for; None of a CPU."""
    if device.type == "meta":
        return target
    return gpu(device) if is_gpu(device) else None


@functools.cache
def driver() -> str:
    """Return the newest CUDA that the driver supports, "13000" for 13.0; torch has no query."""
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


def stream_reader() -> Any:
    """Return Triton's function of the index of a GPU that returns its current stream."""
    return importlib.import_module("triton.runtime").driver.active.get_current_stream
