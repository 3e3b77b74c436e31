"""Result files: what a row holds, on which machine and with which versions it was measured."""

import csv
import functools
import hashlib
import importlib.metadata
import io
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import cassetta
from cassetta.kernels import machine

COLUMNS = (
    "case", "pass", "engine", "dtype", "layout", "ms", "p20", "p80", "peak_mib", "kept_mib",
    "gflop", "moved_mib", "roof_fraction", "best_peer", "ratio_to_best_peer", "error", "gpu",
    "driver", "torch", "triton", "cudnn", "commit", "date",
)  # fmt: skip

_SAME = ("gpu", "torch", "triton", "cudnn", "commit")  # for a row to be of use again

Row = dict[str, Any]


@functools.cache
def facts(device: torch.device) -> Row:
    """What figures depend on, beside the case: machine, versions, commit, date."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": machine.gpu(device).name if on_gpu else f"cpu: {_processor()}",
        "driver": _driver() if on_gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version() or "",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def path_of(folder: Path, name: str, known: Row) -> Path:
    """The file of this name for this machine, in a folder of results."""
    return folder / "-".join(re.findall(r"[\w.]+", known["gpu"])) / f"{name}.csv"


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of result files, oldest first; a file that is not there has none.

    A row that was being written when the machine went down is no row.

    Raises
    ------
    ValueError
        If a file has other columns.
    """
    rows: list[Row] = []
    for path in paths:
        if not path.exists():
            continue
        reader = csv.DictReader(io.StringIO(_whole(path)))
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version: move it away")
        rows.extend(reader)
    return rows


def _whole(path: Path) -> str:
    """The lines of a file that were written to their end."""
    lines, end, _ = path.read_bytes().decode().rpartition("\n")
    return lines + end


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a result file, which is begun if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _whole(path) if path.exists() else ""
    with path.open("a", newline="") as file:
        file.truncate(len(before.encode()))
        writer = csv.writer(file, lineterminator="\n")
        if not before:
            writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)


def key(row: Row) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("case", "pass", "engine", "dtype", "layout"))


def done(rows: Iterable[Row], known: Row) -> set[tuple[str, ...]]:
    """What has been measured on this machine, with these versions."""
    return {key(r) for r in rows if all(str(r[name]) == str(known[name]) for name in _SAME)}


def compare(ours: Iterable[Row], peers: Iterable[Row]) -> None:
    """Fill in how our rows compare with the fastest peer, where both have numbers."""
    best = min((r for r in peers if r["ms"] != ""), key=lambda r: r["ms"], default=None)
    for row in ours:
        if best is not None and row["ms"] != "":
            row["best_peer"] = f"{best['engine']} {best['layout']}"
            row["ratio_to_best_peer"] = best["ms"] / row["ms"]


def rounded(row: Row) -> Row:
    """The row with five digits of every number, and nothing where there is none."""
    return {
        name: f"{value:.5g}" if isinstance(value, float) else value
        for name, value in ((name, row.get(name, "")) for name in COLUMNS)
    }


def _processor() -> str:
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def _driver() -> str:
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _said(line).split("\n")[0]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit that last touched the package, or else a fingerprint of its source.

    The last one of all would change whenever results are committed, and they would be measured
    anew.
    """
    package = Path(cassetta.__file__).parent
    folders = [str(package), str((package / "kernels").resolve())]
    git = ["git", "-C", str(package)]
    commit = _said([*git, "log", "-1", "--format=%h", "--", *folders])
    if commit:
        changed = _said([*git, "status", "--porcelain", "--", *folders])
        return commit + ("-dirty" if changed else "")
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{cassetta.__version__}-{digest.hexdigest()[:7]}"


def _said(line: list[str]) -> str:
    """What a command prints, or nothing if there is no such command or it fails."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
