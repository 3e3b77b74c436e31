"""Fixtures: PTX written by hand, and the target of kernels that Triton compiles."""

import importlib.util
import struct

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({params})
.reqntid {threads}
{{
.reg .pred %p<99>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
{loads}
mov.u32 %r90, %tid.x;
{body}
ret;
}}
"""


@pytest.fixture
def arch(request):
    """The one that this process simulates."""
    return request.config.getoption("--simulate")


@pytest.fixture
def hopper(arch):
    """For what only sm_90 has."""
    if arch < 90:
        pytest.skip("begins with sm_90")


@pytest.fixture
def run():
    """Run the body of a kernel: %rd1, %rd2, ... are the arrays, %r90 the thread."""
    import ptxsim  # not before ../../conftest.py has told triton who runs kernels
    from ptxsim.memory import Global

    def run(body, *arrays, threads=32, grid=(1, 1, 1), shared=1024, **options):
        params = ", ".join(f".param .u64 kernel_param_{k}" for k in range(len(arrays)))
        loads = "".join(
            f"ld.param.b64 %rd{k + 1}, [kernel_param_{k}];\n" for k in range(len(arrays))
        )
        text = HEAD.format(params=params, threads=threads, loads=loads, body=body)
        memory, arguments = Global(), {}
        for k, array in enumerate(arrays):
            memory.add(array.ctypes.data, array.nbytes, f"array {k}")
            arguments[f"kernel_param_{k}"] = struct.pack("<Q", array.ctypes.data)
        launch = ptxsim.Launch(
            ptxsim.Program(text), grid, threads, arguments, memory, shared, **options
        )
        launch.run()
        return launch

    return run


@pytest.fixture
def zeros():
    """Arrays that begin at a multiple of 64 bytes."""

    def zeros(n, dtype=np.float32):
        raw = np.zeros(n * np.dtype(dtype).itemsize + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + n * np.dtype(dtype).itemsize].view(dtype)

    return zeros
