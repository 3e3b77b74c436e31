"""Shows the simulator to Triton as a driver, so that ordinary launches run on CPU tensors."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.cache import get_cache_manager

from ptxsim import numerics
from ptxsim.hopper import TensorMap
from ptxsim.machine import Launch, Program
from ptxsim.memory import Global
from ptxsim.parse import UnsupportedError

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
_PACK = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


class Options:
    """What may be chosen of all launches."""

    worst = False  # approximations as far off as the PTX ISA allows
    races = True  # find accesses to shared memory without a barrier between them
    factors = False  # find registers of `a` that are set while a wgmma may read them
    copies = False  # what `cp.async` copies nothing from must lie inside a tensor, too
    lanes = 8192  # threads of the CTAs that run at once
    log: list[Any] | None = None  # if a list: (kernel, CTAs, CTA-instructions, seconds) of each


class Utils:
    """What Triton asks of the library that talks to a GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> Any:
        return object(), id(kernel), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED.get(self.arch, 232_448), "max_num_regs": 65_536,
            "multiprocessor_count": 108, "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }  # fmt: skip

    def set_printf_fifo_size(self, size: int) -> None:
        pass

    def fill_tma_descriptor(
        self, address: int, swizzle: int, elem_size: int, elem_type: int, block: list[int],
        shape: list[int], strides: list[int], padding: int,
    ) -> Any:  # fmt: skip
        found = TensorMap(address, swizzle, elem_size, tuple(block), tuple(shape), tuple(strides),
                          bool(padding))  # fmt: skip
        found.check()
        return found


_programs: dict[str, Program] = {}


class Launcher:
    """Starts one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.signature = dict(enumerate(src.signature.values()))
        self.descriptors = getattr(metadata, "tensordesc_meta", None)
        self.launch = nvidia.wrap_handle_tensordesc(self._launch, self.signature, self.descriptors)
        self.text = _ptx(metadata)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        self.launch(x, y, z, stream, function, 0, 0, None, None, *args)

    def _launch(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, packed,
                told, enter, leave, *args) -> None:  # fmt: skip
        if enter is not None:
            enter(told)
        if x * y * z > 0:
            self._run((x, y, z), args)
        if leave is not None:
            leave(told)

    def _run(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        if self.metadata.num_ctas != 1:
            raise NotImplementedError("clusters of several CTAs")
        program = _programs.get(self.text)
        if program is None:
            program = _programs[self.text] = Program(self.text)
        memory, values = Global(), []
        kinds = _expanded(list(self.signature.values()), self.descriptors)
        for number, (kind, value) in enumerate(_flat(kinds, args)):
            if kind == "constexpr":
                continue
            if kind == "nvTmaDesc":
                values.append(value)
                memory.add(value.address, value.bytes, f"argument {number}")
            elif kind[0] == "*":
                values.append(struct.pack("<Q", _pointer(value, memory, number)))
            else:
                values.append(_packed(kind, value))
        kernel = program.kernel
        arguments: dict[str, Any] = {}
        scratch = []
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            block = None
            if size:
                block = torch.empty(size * grid[0] * grid[1] * grid[2] + 256, dtype=torch.uint8)
                memory.add(block.data_ptr(), block.numel(), "scratch")
            scratch.append(block)
            values.append(struct.pack("<Q", -(-block.data_ptr() // 128) * 128 if size else 0))
        if len(values) != len(kernel.params):
            raise RuntimeError(
                f"{kernel.name} takes {len(kernel.params)} values, not {len(values)}"
            )
        for param, value in zip(kernel.params, values, strict=True):
            arguments[param.name] = (
                value.ljust(param.size, b"\0") if isinstance(value, bytes) else value
            )
        launch = Launch(
            program, grid, 32 * self.metadata.num_warps, arguments, memory, self.metadata.shared,
            Options.races, Options.lanes, Options.factors, Options.copies,
        )  # fmt: skip
        numerics.WORST[0] = Options.worst
        start = time.process_time()
        launch.run()
        if Options.log is not None:
            seconds = time.process_time() - start
            Options.log.append((kernel.name, int(np.prod(grid)), int(launch.instructions), seconds))


def _ptx(metadata: Any) -> str:
    """The text that a kernel was compiled to, from Triton's cache."""
    name = f"{metadata.name[:150]}"
    manager = get_cache_manager(metadata.hash)
    group = manager.get_group(f"{name}.json") or {}
    path = group.get(f"{name}.ptx") or manager.get_file(f"{name}.ptx")
    if path is None:
        raise RuntimeError(f"no PTX of {name} in Triton's cache")
    return Path(path).read_text()


def _expanded(signature: list[Any], meta: Any) -> list[Any]:
    """Descriptors as what is passed for them, as Triton's own launcher does it."""
    out: list[Any] = []
    number = 0
    for kind in signature:
        if not (isinstance(kind, str) and kind.startswith("tensordesc")):
            out.append(kind)
            continue
        ndim = kind[kind.index("[") : kind.index("]")].count(",") + 1
        if meta and meta[number] is not None:
            out.append("nvTmaDesc")
        else:
            out += [f"*{kind[11 : kind.index('[')]}", *["i64"] * (2 * ndim), "i1"]
        out += [*["i32"] * ndim, *["i64"] * ndim]
        number += 1
    return out


def _flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        else:
            yield kind, value


def _pointer(value: Any, memory: Global, number: int) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    tensor = getattr(value, "base", value)
    if isinstance(tensor, torch.Tensor):
        whole = tensor.untyped_storage()
        shape = "x".join(map(str, tensor.shape))
        name = f"argument {number} ({shape} {str(tensor.dtype).removeprefix('torch.')})"
        memory.add(whole.data_ptr(), whole.nbytes(), name)
    return tensor.data_ptr()


def _packed(kind: str, value: Any) -> bytes:
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    if kind.startswith(("i", "u")):
        bits = int(kind[1:])
        value = int(value) & ((1 << max(bits, 8)) - 1)
        return struct.pack("<" + _PACK[kind].upper(), value)
    return struct.pack("<" + _PACK[kind], value)


class SimDriver(DriverBase):
    """A driver whose device is the simulator."""

    def __init__(self, target: tuple[str, int, int]) -> None:
        super().__init__()
        self.target = GPUTarget(*target)
        self.utils = Utils(target[1])
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise RuntimeError("the simulator tells nothing of time")

    def assemble_tensormap_to_arg(self, tensormaps_info: Any, args: Any) -> Any:
        return args


def install(target: tuple[str, int, int] = ("cuda", 80, 32), assemble: bool = False) -> SimDriver:
    """Every launch from now on runs in the simulator, compiled for this target.

    Unless `assemble`, ptxas is not run, and Triton's cache keeps such kernels apart from others.

    Raises
    ------
    UnsupportedError
        If this is another triton, whose launchers talk to a driver in another way.
    """
    if not triton.__version__.startswith("3.6."):
        raise UnsupportedError(
            f"the simulator is a driver of triton 3.6, and this is {triton.__version__}"
        )
    driver = SimDriver(target)
    triton.runtime.driver.set_active(driver)
    if not assemble and not hasattr(CUDABackend, "with_ptxas"):
        CUDABackend.with_ptxas = CUDABackend.hash
        CUDABackend.hash = lambda self: f"{self.with_ptxas()}-without-ptxas"
        CUDABackend.make_cubin = lambda self, src, *rest: b"not assembled"
    return driver
