"""The choice of a backend, and its reasons."""

import pytest
import torch

import cassetta
from cassetta.kernels import BackendError, backend, dispatch, reference, why_reference
from cassetta.layers import Conv


def test_the_default_is_auto_and_says_why_it_runs_the_reference():
    assert backend() == "auto"
    assert dispatch.implementation() is reference
    assert "no NVIDIA GPU" in why_reference()


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("CASSETTA_BACKEND", "reference")
    assert backend() == "reference"
    assert "was asked for" in why_reference()
    monkeypatch.setenv("CASSETTA_BACKEND", "")
    assert backend() == "auto"
    monkeypatch.setenv("CASSETTA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CASSETTA_BACKEND='cuda'.*auto, triton, reference"):
        backend()


def test_a_request_that_cannot_be_met_is_never_ignored(monkeypatch):
    monkeypatch.setenv("CASSETTA_BACKEND", "triton")
    conv = Conv(1, 2, padding="same")
    with pytest.raises(BackendError, match="'triton' cannot run: .*Ask for 'auto' or 'reference'"):
        conv(torch.randn(1, 2, 4))
    with cassetta.use_backend("reference"):
        assert conv(torch.randn(1, 2, 4)).shape == (1, 2, 4)


def test_use_backend_and_set_backend():
    with cassetta.use_backend("reference"):
        assert backend() == "reference"
        with cassetta.use_backend("auto"):
            assert backend() == "auto"
        assert backend() == "reference"
    assert backend() == "auto"
    cassetta.set_backend("reference")
    assert backend() == "reference"
    cassetta.set_backend(None)
    assert backend() == "auto"


@pytest.mark.parametrize("name", ["Triton", "cuda", 3, True])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="is not a backend: use one of auto, triton, reference"):
        cassetta.set_backend(name)


def test_a_refused_backend_changes_nothing():
    cassetta.set_backend("reference")
    with pytest.raises(BackendError):
        cassetta.set_backend("triton")
    with pytest.raises(BackendError), cassetta.use_backend("triton"):
        pass
    assert backend() == "reference"
