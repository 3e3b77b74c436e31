"""Every test begins at the same random state, and leaves the requested backend as it found it."""

import pytest
import torch

from cassetta.kernels import dispatch


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(dispatch, "_requested", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
