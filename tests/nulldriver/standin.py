"""A machine that says it has GPUs: tensors of the CPU pass for theirs, and no kernel is run.

Real are all of cassetta, the Python of `torch.cuda`, Triton's compiler and its compiled launcher.
Stand-ins are libcuda (`bench/libcuda.c`); of torch's C++, what asks a GPU (`guard.cpp`, and
functions here); the device that a tensor names, and the one on which it is made. So what a kernel
would have written is not initialized, and nothing may be said of it but its shape.

A plugin of pytest, which changes the process for good: `tests/test_cuda_machine.py` starts one.
"""

import ctypes
import os
import time
import types
import warnings
from pathlib import Path

FOLDER = Path(os.environ["TRITON_LIBCUDA_PATH"])  # where Triton looks for libcuda, too
DRIVER = ctypes.CDLL(str(FOLDER / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
GUARD = ctypes.CDLL(str(FOLDER / "guard.so"))  # before torch

import bounds  # noqa: E402, F401  (TorchScript compiles these two, and takes torch as it is)
import interpol  # noqa: E402, F401
import torch  # noqa: E402

capabilities = [(9, 0)]
"""Of the GPUs that the machine has now."""

place = 0
"""The GPU that the tensors are on; None: they are on the CPU."""

current = 0
"""The GPU on which kernels are started."""

launched = []
"""The GPU on which each kernel was."""


def _exchange(index):
    global current
    before = current
    current = index if index >= 0 else current
    return before


def _stream(index):
    """Which Triton asks for once for each launch."""
    launched.append(index)
    return 0


def _properties(index):
    major, minor = capabilities[index]
    return types.SimpleNamespace(
        name=f"NVIDIA Null {major}.{minor}", major=major, minor=minor, total_memory=80 * 2**30,
        L2_cache_size=2**20, shared_memory_per_block_optin=232_448, gcnArchName="",
        multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65_536,
    )  # fmt: skip


_ANSWERS = {
    "_cuda_init": lambda: None,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDeviceCount": lambda: len(capabilities),
    "_cuda_getDevice": lambda: current,
    "_cuda_setDevice": lambda index: _exchange(index),
    "_cuda_exchangeDevice": lambda index: _exchange(index),
    "_cuda_maybeExchangeDevice": lambda index: _exchange(index),
    "_cuda_getCurrentRawStream": _stream,
    "_cuda_synchronize": lambda: None,
    "_cuda_emptyCache": lambda: None,
    "_cuda_memoryStats": lambda index: {},
    "_cuda_resetPeakMemoryStats": lambda index: None,
}
"""By names that a torch built for CUDA has: to answer others would hide that there are none."""


class Event:
    """By the clock of the host."""

    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


def _allocated(make):
    """Make a function that allocates on the CPU, whatever device it is asked for."""

    def allocated(*args, device=None, layout=None, pin_memory=None, **options):
        return make(
            *args, device="cpu", **{k: one for k, one in options.items() if one is not None}
        )

    return allocated


_ATEN = torch.library.Library("aten", "IMPL")  # as long as the process


def _install():
    assert not torch.version.cuda or not _ANSWERS.keys() - {*dir(torch._C)}
    GUARD.null_guard()
    for name, answer in _ANSWERS.items():
        setattr(torch._C, name, answer)
    cuda = torch.cuda
    cuda._initialized = True
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda._get_device_properties = _properties
    cuda.Event = Event
    cuda.current_stream = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    cuda.manual_seed_all = lambda seed: None
    real = torch._C.TensorBase.device.__get__

    def device(x):
        found = real(x)
        is_ours = found.type == "cpu" and place is not None
        return torch.device("cuda", place) if is_ours else found

    torch.Tensor.device = property(device)
    torch.Tensor.is_cuda = property(lambda x: device(x).type == "cuda")
    torch.Tensor.get_device = lambda x: -1 if device(x).index is None else device(x).index
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torch that has its own
        _ATEN.impl("empty.memory_format", _allocated(torch.empty), "CUDA")
        _ATEN.impl("empty_strided", _allocated(torch.empty_strided), "CUDA")


_install()
