"""What was measured, and what was found wrong, kept on disk: by this GPU, driver and versions.

A table maps a key (a block on an image, or a pass over one) to a `Record`. Tables of GPUs that we
measured lie beside this file (`tuned/*.json`) and hold for that GPU; what is measured here goes to
the cache folder of the platform, or to CASSETTA_CACHE, comes first, and holds only as long as the
GPU, its driver, torch, triton, cuDNN and this package are the same.

A file appears whole or not at all; processes that write at once take turns, and none loses what
another has found. A file that cannot be read or written costs a warning, and what it would hold.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cassetta.kernels import machine

CACHE = "CASSETTA_CACHE"
SHIPPED = Path(__file__).parent / "tuned"

changes = 0
"""How often tables were added to, or forgotten, in this process: what they said may be old."""


class Record(NamedTuple):
    """What was chosen for one key, and why."""

    choice: str
    ms: dict[str, float]  # of each candidate that was right
    refused: dict[str, str]  # why the others were not
    source: str = "measured here"

    @property
    def evidence(self) -> str:
        """In words: `measured here: library 1.20 ms, reference 1.50 ms; wrong refused: ...`"""
        times = sorted(self.ms.items(), key=lambda pair: pair[1])
        words = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times)
        lost = "".join(f"; {name} refused: {why}" for name, why in self.refused.items())
        return f"{self.source}: {words}{lost}"


class Table:
    """Records by key, of one device."""

    def __init__(self, about: dict[str, str]) -> None:
        self.about = about
        self.records = {**_shipped(about), **_read(self.path, about)}

    @property
    def path(self) -> Path:
        """Where what is measured here is kept."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        return folder() / f"{digest[:16]}.json"

    def find(self, key: str) -> Record | None:
        """The record of this key, if there is one."""
        return self.records.get(key)

    def add(self, key: str, record: Record) -> None:
        """Keep a record, here and on disk, beside what other processes have found meanwhile."""
        global changes
        changes += 1
        self.records[key] = record
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.path):
                kept = {**_read(self.path, self.about), key: record}
                _write(self.path, self.about, kept)
        except OSError as error:
            warnings.warn(
                f"what was measured is not kept, because {self.path} cannot be written ({error}): "
                f"set {CACHE} to a folder that can",
                stacklevel=2,
            )


def folder() -> Path:
    """Where tables are kept: CASSETTA_CACHE, or the platform's folder for caches."""
    own = os.environ.get(CACHE)
    if own:
        return Path(own).expanduser()
    platformdirs = importlib.import_module("platformdirs")
    return Path(platformdirs.user_cache_dir("cassetta", appauthor=False))


def table(device: torch.device) -> Table:
    """That of a device, read from disk when it is first asked for."""
    return _table(device.type, device.index, os.environ.get(CACHE))


def forget() -> None:
    """Read the tables again when they are next asked for."""
    global changes
    changes += 1
    _table.cache_clear()


@functools.cache
def _table(kind: str, index: int | None, cache: str | None) -> Table:
    return Table(about(torch.device(kind, index) if index is not None else torch.device(kind)))


def about(device: torch.device) -> dict[str, str]:
    """What a measurement depends on, beside its key."""
    gpu, driver = device.type, "none"
    if device.type == "cuda":
        gpu, driver = machine.gpu(device).name, machine.driver()
    return {
        "gpu": gpu, "driver": driver, "torch": torch.__version__, "triton": _version("triton"),
        "cudnn": str(torch.backends.cudnn.version()), "cassetta": _version("cassetta-triton"),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _shipped(about: dict[str, str]) -> dict[str, Record]:
    """What we measured on such a GPU, whatever the versions."""
    found: dict[str, Record] = {}
    for path in sorted(SHIPPED.glob("*.json")):
        theirs, records = _load(path)
        if theirs["gpu"] == about["gpu"]:
            source = f"measured on {theirs['gpu']}, torch {theirs['torch']}"
            found |= {key: one._replace(source=source) for key, one in records.items()}
    return found


def _read(path: Path, about: dict[str, str]) -> dict[str, Record]:
    """The records of a file, if it is there, whole, and of these versions."""
    try:
        theirs, records = _load(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, because it is not a table of measurements "
            f"({type(error).__name__}: {error}): `cassetta tune` writes a new one",
            stacklevel=2,
        )
        return {}
    if theirs != about:
        warnings.warn(f"{path} is ignored, because it is of {theirs}, not {about}", stacklevel=2)
        return {}
    return records


def _load(path: Path) -> tuple[dict[str, str], dict[str, Record]]:
    content = json.loads(path.read_text())
    return content["about"], {key: _record(**one) for key, one in content["records"].items()}


def _record(choice: str, ms: dict[str, Any], refused: dict[str, Any]) -> Record:
    if not isinstance(choice, str) or choice not in ms:
        raise ValueError(f"choice={choice!r} is none of those that were measured")
    times = {str(name): float(value) for name, value in ms.items()}
    return Record(choice, times, {str(name): str(why) for name, why in refused.items()})


def _write(path: Path, about: dict[str, str], records: dict[str, Record]) -> None:
    rows = {
        key: {"choice": one.choice, "ms": one.ms, "refused": one.refused}
        for key, one in sorted(records.items())
    }
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"about": about, "records": rows}, indent=1) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _lock(path: Path) -> Any:
    filelock = importlib.import_module("filelock")  # torch depends on it
    return filelock.FileLock(f"{path}.lock", timeout=30)
