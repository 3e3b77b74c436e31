"""Tables of measurements on disk: whole, shared, of these versions, or ignored with a warning."""

import json
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import torch

from cassetta.kernels import evidence
from cassetta.kernels.evidence import Record

CPU = torch.device("cpu")
GOOD = Record("library", {"library": 1.25, "reference": 2.0}, {"halo": "its output is off by 1"})


def test_what_is_added_is_found_again_by_another_process():
    evidence.table(CPU).add("a block", GOOD)
    evidence.forget()
    assert evidence.table(CPU).find("a block") == GOOD
    assert evidence.table(CPU).find("another") is None
    words = "measured here: library 1.25 ms, reference 2 ms; halo refused: its output is off by 1"
    assert GOOD.evidence == words


def spoil(path, **changes):
    content = json.loads(path.read_text())
    content["about"] |= changes
    path.write_text(json.dumps(content))


BAD = {
    "cut off": lambda path: path.write_text(path.read_text()[:50]),
    "empty": lambda path: path.write_text(""),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "no records": lambda path: path.write_text('{"about": {}}'),
    "a record is a word": lambda path: path.write_text('{"about": {}, "records": {"a": "b"}}'),
    "a choice that was not measured": lambda path: path.write_text(
        '{"about": {}, "records": {"a": {"choice": "x", "ms": {"y": 1}, "refused": {}}}}'
    ),
    "another GPU": lambda path: spoil(path, gpu="NVIDIA H1"),
    "another driver": lambda path: spoil(path, driver="1"),
    "another cuDNN": lambda path: spoil(path, cudnn="1"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_corrupt_or_foreign_file_is_ignored_with_a_warning_and_replaced(how):
    table = evidence.table(CPU)
    table.add("a block", GOOD)
    BAD[how](table.path)
    evidence.forget()
    with pytest.warns(UserWarning, match=r"\.json is ignored, because it is"):
        spoiled = evidence.table(CPU)
    assert spoiled.find("a block") is None
    with pytest.warns(UserWarning, match="is ignored"):
        spoiled.add("another", GOOD)
    evidence.forget()
    assert set(evidence.table(CPU).records) == {"another"}


def test_versions_have_files_of_their_own():
    paths = {
        evidence.Table({**evidence.about(CPU), name: "other"}).path
        for name in ("gpu", "driver", "torch", "triton", "cudnn", "cassetta")
    }
    assert len(paths | {evidence.table(CPU).path}) == 7


def write(folder, words):
    os.environ[evidence.CACHE] = folder
    table = evidence.Table({"gpu": "pretended"})
    for word in words:
        table.add(word, GOOD)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    words = [[f"{n} {k}" for k in range(25)] for n in range(4)]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=write, args=(str(tmp_path), some)) for some in words]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["records"]) == {w for some in words for w in some}
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".lock")]


def test_a_folder_that_cannot_be_written_costs_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(evidence.CACHE, str(tmp_path / "file" / "cache"))
    table = evidence.table(CPU)
    with pytest.warns(UserWarning, match="cannot be written.*set CASSETTA_CACHE to a folder"):
        table.add("a block", GOOD)
    assert table.find("a block") == GOOD  # for this process


def test_a_read_only_folder_costs_a_warning(monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    monkeypatch.setenv(evidence.CACHE, str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be written"):
        evidence.table(CPU).add("a block", GOOD)


def test_a_full_disk_leaves_the_file_as_it_was(monkeypatch):
    table = evidence.table(CPU)
    table.add("a block", GOOD)
    before = table.path.read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="No space left"):
            table.add("another", GOOD)
    assert table.path.read_text() == before
    assert {path.suffix for path in table.path.parent.iterdir()} <= {".json", ".lock"}


def test_shipped_tables_hold_for_their_gpu_whatever_the_versions(monkeypatch, tmp_path):
    about = {**evidence.about(CPU), "torch": "2.9.0"}
    rows = {key: {"choice": "library", "ms": {"library": 1.0}, "refused": {}} for key in ("a", "b")}
    (tmp_path / "cpu.json").write_text(json.dumps({"about": about, "records": rows}))
    foreign = {"about": {**about, "gpu": "NVIDIA H1"}, "records": {"c": rows["a"]}}
    (tmp_path / "other.json").write_text(json.dumps(foreign))
    monkeypatch.setattr(evidence, "SHIPPED", tmp_path)
    evidence.forget()
    table = evidence.table(CPU)
    assert set(table.records) == {"a", "b"}
    assert table.find("a").evidence == "measured on cpu, torch 2.9.0: library 1 ms"
    table.add("a", GOOD)
    evidence.forget()
    assert evidence.table(CPU).find("a") == GOOD  # what is measured here comes first
    evidence.forget()


def test_what_is_shipped_can_be_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in evidence.SHIPPED.glob("*.json"):
            evidence._load(path)


def test_the_folder_is_that_of_the_platform_or_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv(evidence.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert evidence.folder().name == "cassetta"
    monkeypatch.setenv(evidence.CACHE, "~/mine")
    assert evidence.folder() == Path.home() / "mine"
