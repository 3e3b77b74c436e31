"""Linear layers over channels."""

import pytest
import torch
from torch import nn

from cassetta.layers import LazyLinear, Linear

from compare import assert_gradients, assert_near, image


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 6, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_along_channels(shape, bias):
    """Upstream passes the builtin `input` to `F.linear`."""
    ours, theirs = Linear(4, 3, bias=bias).double(), nn.Linear(4, 3, bias=bias).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inp = image(*shape)
    assert_near(ours(inp), theirs(inp.movedim(1, -1)).movedim(-1, 1))
    assert_gradients(ours, inp)


def test_along_any_dimension():
    inp = image(2, 5, 4, dtype=torch.float32)
    assert Linear(4, 3, dim=-1)(inp).shape == (2, 5, 3)
    assert Linear(4)(inp.movedim(-1, 1)).shape == (2, 4, 5)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("out_channels", "expected"), [(3, 3), (None, 4), (lambda c: 2 * c, 8)])
def test_lazy_linear(out_channels, expected):
    layer = LazyLinear(out_channels)
    assert layer(torch.randn(2, 4, 5)).shape == (2, expected, 5)
    assert type(layer) is Linear
    assert layer.weight.shape == (expected, 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*4 channels.*dim=1"):
        Linear(4, 3)(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="out_channels=0"):
        Linear(4, 0)
