"""A CUDA driver that does nothing, `libcuda.c`: built, loaded, and given to Triton.

All else of a launch is then real: Triton's compiler, its launcher, and what they ask of a driver.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")


class Missing(RuntimeError):
    """What this machine lacks, as a sentence."""


def build(folder: Path) -> Path:
    """Build the driver in a folder, which is then where Triton looks for a libcuda.

    Raises
    ------
    Missing
        If there is no C compiler, or it fails.
    """
    named = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in named if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise Missing("there is no C compiler (cc, gcc, clang, or what CC names): install one")
    library = folder / "libcuda.so.1"
    line = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{compiler} cannot build {SOURCE.name}: {done.stderr.strip()}")
    (folder / "libcuda.so").symlink_to(library)  # by which Triton's launcher is linked
    return library


def activate(folder: Path) -> ctypes.CDLL:
    """Build the driver in a folder and let Triton launch by it, in this process, from now on.

    It must not have a driver yet. Returned is the library, which counts (`null_launches`).

    Raises
    ------
    Missing
        If there is no C compiler, no triton, or not what its launcher is compiled with.
    """
    library = build(folder)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise Missing("there is no Python.h, with which Triton's launcher is compiled: install it")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # and so it is what others find
    warnings.filterwarnings("ignore", "CUDA initialization")  # by a torch that is built for CUDA
    try:
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver
    except ImportError as error:
        raise Missing(
            f"triton cannot be imported ({error}): pip install triton, on Linux"
        ) from error
    null: Any = CudaDriver()
    null.get_current_device = lambda: 0  # what it would ask torch, which has no GPU
    null.get_current_stream = lambda index: 0
    null.get_device_capability = lambda index: (9, 0)
    driver.set_active(null)
    return loaded
