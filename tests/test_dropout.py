"""Dropout of whole channels."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cassetta.layers import ChannelDropout, make_dropout


@pytest.mark.parametrize(
    ("ndim", "torch_dropout"), [(1, F.dropout1d), (2, F.dropout2d), (3, F.dropout3d)]
)
def test_drops_whole_channels_as_torch_does(ndim, torch_dropout):
    inp = torch.ones(8, 16, *[3] * ndim)
    torch.manual_seed(1)
    out = ChannelDropout(0.3)(inp)
    torch.manual_seed(1)
    torch.testing.assert_close(out, torch_dropout(inp, 0.3), rtol=0, atol=0)
    values = out.flatten(2)
    assert (values == values[..., :1]).all()
    assert set(values.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}


def test_does_nothing_in_evaluation():
    inp = torch.randn(2, 4, 5)
    torch.testing.assert_close(ChannelDropout(0.5).eval()(inp), inp, rtol=0, atol=0)


def test_every_form():
    assert make_dropout(0.25).p == 0.25
    assert make_dropout(np.float32(0.25)).p == 0.25
    assert type(make_dropout(nn.Dropout)) is nn.Dropout
    assert make_dropout(lambda: nn.Dropout(0.1)).p == 0.1
    shared = nn.Dropout3d(0.1)
    assert make_dropout(shared) is shared
    assert all(make_dropout(none) is None for none in (None, False, 0, 0.0))


def test_integer_probabilities():
    """Upstream takes `dropout=1` for a class and calls it."""
    assert make_dropout(1).p == 1
    assert (make_dropout(1)(torch.ones(2, 3, 4)) == 0).all()


@pytest.mark.parametrize(
    ("error", "dropout", "message"),
    [
        (ValueError, 1.5, "dropout=1.5"),
        (ValueError, -1, "dropout=-1"),
        (TypeError, True, "dropout=True"),
        (TypeError, "half", "dropout='half'"),
        (TypeError, int, "made a int"),
    ],
    ids=str,
)
def test_bad_dropouts(error, dropout, message):
    with pytest.raises(error, match=message):
        make_dropout(dropout)
