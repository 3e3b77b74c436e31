"""What is asked of CUDA: nothing for work on the CPU, and of a GPU everything once."""

import os
import subprocess
import sys
import types

import pytest
import torch

import cassetta
from cassetta.kernels import BackendError, dispatch, machine

FORBIDDEN = """
import sys, types
import torch

def forbid(module, name):
    known = getattr(module, name)
    def refuse(*args, **kwargs):
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "torch":
            return known(*args, **kwargs)  # torch does so itself, whoever calls it
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    setattr(module, name, refuse)

for module, prefix in ((torch.cuda, ""), (torch._C, "_cuda_")):
    for name in dir(module):
        one = getattr(module, name)
        if callable(one) and name.startswith(prefix) and not name.startswith("__"):
            forbid(module, name)
"""
"""Whatever of CUDA is asked by anyone but torch, is an error: as in a worker that was forked."""

WORK = """
import cassetta
from cassetta.backbones import UNet

net = UNet(2, 8, nb_levels=2, norm="instance")
cassetta.set_backend(None)
assert cassetta.explain(net, torch.randn(1, 8, 8, 8))[0].reason == "the image is on the CPU"
for training in (True, False):
    net.train(training)(torch.randn(1, 8, 8, 8)).sum().backward()
with torch.autocast("cpu", torch.bfloat16):
    net(torch.randn(1, 8, 8, 8))
print("done")
"""

WORKER = """
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return net(torch.randn(1, 8, 8, 8))

for batch in torch.utils.data.DataLoader(Images(), num_workers=1, multiprocessing_context="fork"):
    print(tuple(batch.shape))
"""


def said(code):
    """What a process of its own prints."""
    line = [sys.executable, "-c", code]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\n")


def test_work_on_the_cpu_asks_nothing_of_cuda():
    """Nor does the import. So it is done in forked workers, too, and beside a GPU in use."""
    worker = WORKER if hasattr(os, "fork") else ""
    out = said(FORBIDDEN + WORK + worker)
    assert out[0] == "done"
    assert out.count("(1, 1, 8, 8, 8)") == (2 if worker else 0)


@pytest.fixture
def properties(monkeypatch):
    """Of the GPUs that CUDA tells of; or what it raises; and of which it was asked."""
    asked = []

    def answer(index):
        asked.append(index)
        if isinstance(found[index], Exception):
            raise found[index]
        return found[index]

    old, new = (
        types.SimpleNamespace(
            name=f"sm_{major}{minor}", major=major, minor=minor, total_memory=2**34,
            L2_cache_size=2**22, shared_memory_per_block_optin=shared,
        )
        for major, minor, shared in ((7, 5, 65_536), (9, 0, 232_448))
    )  # fmt: skip
    found = [old, new]
    monkeypatch.setattr(torch.cuda, "get_device_properties", answer)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    machine._gpu.cache_clear()
    yield found, asked
    machine._gpu.cache_clear()


def test_a_gpu_is_asked_once(properties):
    _, asked = properties
    for _ in range(3):
        assert machine.gpu(torch.device("cuda", 1)).name == "sm_90"
        assert machine.capability(torch.device("cuda")) == (9, 0)  # the current one
        assert machine.known(torch.device("cuda:1")).shared == 232_448
        assert dispatch.why_not_on(torch.device("cuda", 1)) is None
    assert asked == [1]
    assert [one.capability for one in machine.gpus()] == [(7, 5), (9, 0)]
    assert asked == [1, 0]


def test_each_gpu_is_judged_by_itself(properties):
    """An image on the older of two is none for kernels, though they could run on the other."""
    pytest.importorskip("triton")
    found, _ = properties
    assert "compute capability 7.5, and 8.0 is" in dispatch.why_not_on(torch.device("cuda", 0))
    assert dispatch.why_no_triton() is None
    found.pop()
    assert "no GPU here" in dispatch.why_no_triton()
    found.pop()
    assert "torch finds no NVIDIA GPU" in dispatch.why_no_triton()


def test_a_query_that_fails_is_a_reason_and_is_asked_again(properties):
    pytest.importorskip("triton")
    found, asked = properties
    known, found[1] = found[1], RuntimeError("CUDA is busy\nwith much else")
    for _ in range(2):
        why = dispatch.why_not_on(torch.device("cuda", 1))
        assert why == "CUDA does not tell what this GPU is (CUDA is busy)"
    with pytest.raises(BackendError, match=r"CUDA does not tell .* \(CUDA is busy\)"):
        cassetta.set_backend("triton")
    assert asked.count(1) == 3
    found[1] = known
    assert dispatch.why_not_on(torch.device("cuda", 1)) is None
    with cassetta.use_backend("triton"):
        pass


def test_the_driver(monkeypatch):
    """By a name that is the library's, not torch's, which has none for it."""

    def tell(version):
        version._obj.value = 13000
        return 0

    answers = {"13000": tell, "unknown": lambda version: 1}
    for expected, answer in answers.items():
        machine.driver.cache_clear()
        library = types.SimpleNamespace(cuDriverGetVersion=answer)
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name, library=library: library)
        assert machine.driver() == expected
    machine.driver.cache_clear()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert machine.driver() == "unknown"
    machine.driver.cache_clear()


def test_the_cpu_stands_in_for_a_gpu(monkeypatch):
    """As `bench/host.py` has it: kernels are chosen, and CUDA is asked nothing."""
    x, cpu, gpu = torch.ones(1, 8, 4, 4), torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv(machine.INTERPRET, raising=False)
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_not_importable", lambda: None)
    assert (machine.kernels_on(), machine.is_gpu(cpu)) == ("cuda", False)
    assert machine.known(cpu) is machine.known(torch.device("meta")) is None
    assert dispatch.why_reference(x) == "the image is on the CPU"
    old, new = (machine.Gpu("null", version, 2**34, 2**22, 2**17) for version in ((7, 5), (9, 0)))
    monkeypatch.setattr(machine, "stand_in", new)
    assert machine.kernels_on() == "cpu"
    assert machine.is_gpu(cpu)
    assert machine.known(cpu) is new
    assert machine.capability(cpu) == (9, 0)
    assert dispatch.why_reference(x) is None
    assert dispatch.why_not_on(gpu)
    monkeypatch.setattr(machine, "stand_in", old)
    assert dispatch.why_reference(x) == "this GPU has compute capability 7.5, and 8.0 is needed"
