"""The GPUs of this machine: the only queries of what a GPU is, made once for each.

CUDA is queried where an image lies on a GPU, or where a command reports on the machine, as
`cassetta doctor` does; never at import, and never for work on the CPU. A query starts CUDA, which
fails in a process that was forked from one that uses CUDA, and while another process holds the GPU
exclusively.
"""

import ctypes
import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Facts of one GPU."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    cache: int  # bytes of the L2 cache
    shared: int  # bytes of shared memory that one program may use


def gpu(device: torch.device) -> Gpu:
    """Describe the GPU of `device`. What CUDA raises is raised, and the next call queries again."""
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


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use on the GPU of `device`."""
    return gpu(device).shared


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
