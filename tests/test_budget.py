"""Runs of tests that stop and go on, alone and under pytest-xdist; and `make test-gpu`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HAS_XDIST = importlib.util.find_spec("xdist") is not None

TORCH = """
import os

__version__ = os.environ["VERSION"]

class cuda:
    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    lost = ""

    @classmethod
    def synchronize(cls):
        if cls.lost == "kernel":
            raise RuntimeError("an illegal memory access was encountered")

def rand(*size, device):
    if cuda.lost == "capture":
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
"""
TESTS = """
import pytest

@pytest.fixture(autouse=True)
def _order(request):
    with open("order", "a") as file:
        print(request.node.name, file=file)
"""
FIRST = (
    TESTS
    + """
def test_one(): pass

@pytest.mark.parametrize("n", range(3))
def test_wrong(n): assert not n, "this is\\nwhy"
"""
)
SECOND = (
    TESTS
    + """
@pytest.fixture
def broken(): raise ValueError("no such thing")

def test_set_up(broken): pass
def test_skipped(): pytest.skip("not here")
def test_other(): pass
"""
)
LONG = """
import time

import budget
import pytest

budget.GRACE = 0.1

@pytest.fixture(autouse=True)
def _the_end_comes(request):
    for one in request.config.pluginmanager.get_plugins():
        if isinstance(one, budget.Share):
            one.end = time.time()

def test_long(): time.sleep(60)
"""
LOST = """
import torch

def test_breaks():
    torch.cuda.lost = "{by}"
    assert False

def test_after(): assert not torch.cuda.lost
"""
WORKERS = [0, pytest.param(2, marks=pytest.mark.skipif(not HAS_XDIST, reason="needs xdist"))]


@pytest.fixture(params=WORKERS, ids=["alone", "workers"])
def run(request, tmp_path):
    """Run pytest over small files in a folder of its own: exit code, output, order of tests."""
    (tmp_path / "torch.py").write_text(TORCH)
    line = [sys.executable, "-m", "pytest", "-p", "budget", "-q", "-rN", "--log", "out/log"]
    if request.param:
        line += ["-p", "xdist", "-n", str(request.param), "--dist", "load", "--maxschedchunk=1"]

    def run(*words, version="1"):
        environment = {
            **os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "VERSION": version,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }  # fmt: skip
        (tmp_path / "order").write_text("")
        done = subprocess.run(
            [*line, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout, (tmp_path / "order").read_text().split()

    run.folder, run.workers = tmp_path, request.param
    return run


def test_a_run_stops_tells_of_failures_and_goes_on(run):
    (run.folder / "test_second.py").write_text(SECOND)
    (run.folder / "test_first.py").write_text(FIRST)
    words = ["test_second.py", "test_first.py", "--resume"]

    code, out, order = run(*words, "--budget", "1e-3")
    assert (code, order) == (pytest.ExitCode.INTERRUPTED, [])
    assert "the budget of 0.001 s is spent, 7 tests are left: --resume goes on" in out

    code, out, order = run(*words, "--budget", "1000")
    assert (code, len(order)) == (pytest.ExitCode.TESTS_FAILED, 7)
    told = (
        "3 tests failed; out/log has their tracebacks\n"
        "test_second.py\n"
        "  test_set_up: ValueError: no such thing\n"
        "test_first.py\n"
        r"  test_wrong\[[12]\] and 1 more of its cases: AssertionError: this is why assert not [12]"
        "\n2 failed, 3 passed, 1 skipped, 1 error in"
    )
    assert re.search(told, out)
    assert "test_first.py::test_wrong[2]" in (run.folder / "out" / "log").read_text()

    (kept,) = run.folder.rglob("outcomes.txt")
    with kept.open("a") as file:
        file.write(kept.read_text().split()[0] + " passed test_first.py::test_wr")  # cut off
    code, out, order = run(*words)
    assert (code, {*order}) == (
        pytest.ExitCode.TESTS_FAILED,
        {"test_set_up", "test_wrong[1]", "test_wrong[2]", "test_skipped"},
    )
    assert "3 tests passed before, and are left out" in out

    for name in ("test_second.py", "test_first.py"):  # another version: all, the failed ones first
        (run.folder / name).write_text(TESTS + "def test_one(): pass\ndef test_set_up(): pass\n")
    code, out, order = run(*words, version="2")
    assert (code, len(order)) == (pytest.ExitCode.OK, 4)
    assert run.workers or order[0] == "test_set_up"
    code, out, order = run(*words, version="2")
    assert (code, order) == (pytest.ExitCode.OK, [])
    assert "4 tests passed before, and are left out" in out


def test_a_test_that_outlasts_the_budget_is_left(run):
    """So that what is known is told, where somebody else ends the run soon after."""
    (run.folder / "test_long.py").write_text(LONG)
    code, out, _ = run("test_long.py", "--budget", "1000")
    assert code == pytest.ExitCode.INTERRUPTED
    assert "1 skipped" in out
    assert "the budget of 1000 s is spent, 1 tests are left: --resume goes on" in out


@pytest.mark.parametrize("by", ["kernel", "capture"])
def test_a_gpu_that_is_lost_is_not_used_again(run, by):
    """Whatever follows such an error in a process fails by it, and would hide what was wrong."""
    (run.folder / "test_lost.py").write_text(LOST.format(by=by))
    code, out, _ = run("test_lost.py")
    assert code == 1
    assert "1 tests failed" in out
    assert ("the GPU is lost by an error" in out) == (not run.workers)
    assert ("1 passed" in out) == bool(run.workers)


def test_names_of_tests_are_the_same_in_every_process(request):
    """Of all that run beside this one: xdist refuses what differs between its workers."""
    assert not [one.nodeid for one in request.session.items if " at 0x" in one.nodeid]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_runs_the_tests(tmp_path):
    """With the plugins that are installed; what needs a GPU is skipped where there is none."""
    words = [f"PYTHON={sys.executable}", "GPU_TESTS=tests/test_dropout.py tests/test_gpu.py"]
    words += [f"LOG={tmp_path / 'log'}", "WORKERS=1", "BUDGET=600"]
    done = subprocess.run(
        ["make", "test-gpu", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTEST_ADDOPTS": f"-o cache_dir={tmp_path} -k 'dropout or memory'"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
    assert ("-n 1" in done.stdout) == HAS_XDIST
    assert next(tmp_path.rglob("outcomes.txt")).read_text()
