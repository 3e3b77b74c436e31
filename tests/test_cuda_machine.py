"""What the host does on a machine with GPUs, where there is none: see `nulldriver/standin.py`.

In a process of its own, since it changes torch for good; its tests are `nulldriver/gpu_tests.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libcuda

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: no need to pretend"
)
HERE = Path(__file__).parent / "nulldriver"
TORCH = Path(torch.__file__).parent
COMPILERS = {"cc": "C", "c++": "C++"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of a libcuda that does nothing, and of what torch asks of its devices."""
    for name, language in COMPILERS.items():
        if not shutil.which(name):
            pytest.skip(
                f"there is no `{name}`, the compiler of {language}, to build the null driver"
            )
    folder = tmp_path_factory.mktemp("driver")
    libcuda.build(folder)
    include, lib = f"-I{TORCH / 'include'}", TORCH / "lib"
    linked = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
    guard = ["-std=c++20", include, HERE / "guard.cpp", *linked]
    subprocess.run(["c++", "-shared", "-fPIC", "-o", folder / "guard.so", *guard], check=True)
    return folder


def run(driver, *words):
    """A pytest on the stand-in, which must end well."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": path, "TRITON_LIBCUDA_PATH": str(driver)}
    line = [sys.executable, "-m", "pytest", "-p", "standin", *words, "-q", "-p", "no:cacheprovider"]
    line += ["--show-capture=no", "--tb=short", "--durations=8"]
    done = subprocess.run(line, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("part", ["compiled or exported", "not (compiled or exported)"])
def test_a_machine_with_gpus(driver, part):
    """All of `gpu_tests`, of which each tries one way into the package."""
    run(driver, str(HERE / "gpu_tests.py"), "-k", part)


@pytest.mark.parametrize(("part", "skipped"), [("compiled", 0), ("not compiled", 9)])
def test_rehearsal(driver, part, skipped):
    """The tests of a GPU, before there is one: with the results of the reference, none may fail.

    Skipped are those that count memory (3), want 40 GiB of it, two GPUs, or NVIDIA's sanitizer (4).
    """
    words = ["-p", "as_reference", "tests/test_gpu.py", "-k", part, "-o", "filterwarnings=default"]
    out = run(driver, *words)
    assert re.search(r"\d+ passed", out)
    assert sum(map(int, re.findall(r"(\d+) skipped", out))) == skipped
