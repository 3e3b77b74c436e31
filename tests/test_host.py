"""`make bench-host`: what the host does for a block, without a GPU."""

import csv
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ["block", "engine", "forward_us", "step_us", "eager_forward_us", "eager_step_us"]


def ran(*line, **env):
    """A process in the checkout, in which kernels are not interpreted."""
    env = {"PYTHONPATH": "", **os.environ, **env}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no cc, to build the null driver")
def test_a_part_of_it(tmp_path):
    """As make runs it, in an environment that is there: this one."""
    pytest.importorskip("triton")
    (tmp_path / "bin").mkdir()
    python, out = tmp_path / "bin" / "python", tmp_path / "new" / "host.csv"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".bench").touch()
    asked = f"--block 'caxnd none' MeshNet --rounds 1 --out {shlex.quote(str(out))}"
    done = ran("make", "bench-host", f"VENV={tmp_path}", f"HOST={asked}")
    assert done.returncode == 0
    found = list(csv.reader(out.read_text().splitlines()))
    assert found[0] == COLUMNS
    engines = ("auto", "library", "gemm")
    assert [tuple(row[:2]) for row in found[1:]] == [
        (block, engine) for block in ("caxnd none", "MeshNet") for engine in engines
    ]
    assert all(float(number) > 0 for row in found[1:] for number in row[2:])
    launches = [float(line.split()[-1]) for line in done.stdout.splitlines() if "auto" in line]
    assert len(launches) == 2
    assert launches[0] == 0 < launches[1]  # without a norm it is torch that computes
    assert "a loop of 1000 additions takes" in done.stdout


def test_what_is_missing_is_said(tmp_path):
    line = [sys.executable, "bench/host.py", "--out", str(tmp_path / "host.csv")]
    done = ran(*line, PATH=str(tmp_path), CC="")
    assert done.returncode == 1
    assert done.stderr.startswith("bench-host: there is no C compiler")
    assert not list(tmp_path.iterdir())


def test_small_images_are_timed(tmp_path):
    """On a GPU; here, that the script runs: one row, of every rival in both layouts."""
    out = tmp_path / "small.json"
    line = [sys.executable, "bench/small.py", "--device", "cpu", "--budget", "0", "--out", str(out)]
    line += ["--case", "1 x instance, 32 channels, 2 x 8^3", "4 x batch, 32 channels, 2 x 8^3"]
    assert ran(*line).returncode == 0
    (row,) = json.loads(out.read_text())["rows"]
    rivals = itertools.product(("eager", "library", "gemm"), ("first", "last"))
    names = {f"{name} {layout}" for name, layout in rivals}
    assert {*row} == {"case", *names}
    assert all(ms > 0 for name in names for ms in row[name])
