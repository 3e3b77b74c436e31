"""Every test begins at the same random state, and leaves the requested backend as it found it.

Without a GPU, kernels are interpreted on the CPU. Triton decides that when it is imported, so it is
imported here; afterwards the environment is as users have it, and the fixture `kernels` asks again.
"""

import importlib.util
import os

import pytest
import torch

from cassetta.kernels import dispatch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if HAS_TRITON and DEVICE == "cpu":
    os.environ[dispatch.INTERPRET] = "1"
    dispatch._triton_passes()
    del os.environ[dispatch.INTERPRET]


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(dispatch, "_requested", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.delenv(dispatch.INTERPRET, raising=False)


@pytest.fixture
def kernels(monkeypatch):
    """The device on which kernels run in this test: a GPU, or the CPU, interpreted.

    What `torch.empty` returns holds NaN, so that an element that nobody writes is seen.
    """
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv(dispatch.INTERPRET, "1")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    with dispatch.use_backend("triton"):
        yield torch.device(DEVICE)


def _poisoned(make):
    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return poisoned
