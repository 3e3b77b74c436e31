"""Activations by name, class, instance and factory."""

from functools import partial

import pytest
import torch
from torch import nn

from cassetta.layers import SymExp, SymLog, make_activation

from compare import assert_gradients, assert_near, image, named

NAMES = ["ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus",
         "Hardswish", "PReLU", "Identity"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_by_name_in_any_case(name):
    for spelling in (name, name.lower(), name.upper()):
        assert type(make_activation(spelling)) is getattr(nn, name)


def test_every_form():
    assert make_activation("LeakyReLU", negative_slope=0.3).negative_slope == 0.3
    assert type(make_activation(nn.ELU)) is nn.ELU
    assert make_activation(partial(nn.ELU, 0.5)).alpha == 0.5
    assert make_activation(lambda: nn.ELU(0.5)).alpha == 0.5
    shared = nn.PReLU()
    assert make_activation(shared) is shared
    assert all(make_activation(none) is None for none in (None, False, ""))


@pytest.mark.parametrize("name", ["Softmax", "Softmin", "LogSoftmax", "GLU"])
def test_softmax_and_kin_act_on_channels(name):
    assert make_activation(name).dim == 1
    assert make_activation(name, dim=2).dim == 2


def test_symmetric_exponential_and_logarithm():
    """Upstream looks for its own activations among the local variables, and finds none."""
    inp = image(2, 3, 4)
    exp, log = make_activation("SymExp"), make_activation("symlog")
    assert (type(exp), type(log)) == (SymExp, SymLog)
    assert_near(exp(inp), inp.sign() * (inp.abs().exp() - 1))
    assert_near(log(exp(inp)), inp)
    assert_gradients(exp, inp)
    assert_gradients(log, inp)
    unchanged = torch.full((1, 1, 2), -2.0)
    exp(unchanged)
    assert (unchanged == -2).all()


@pytest.mark.parametrize(
    ("error", "activation", "message"),
    [
        (ValueError, "relo", "activation='relo'.*'ReLU'"),
        (ValueError, "Conv2d", "activation='Conv2d'"),
        (ValueError, "MultiheadAttention", "activation='MultiheadAttention'"),
        (TypeError, 3, "activation=3"),
        (TypeError, True, "activation=True"),
        (TypeError, torch.relu, "activation="),
        (TypeError, int, "made a int"),
    ],
    ids=named,
)
def test_bad_activations(error, activation, message):
    with pytest.raises(error, match=message):
        make_activation(activation)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="activation=.*slope"):
        make_activation("ReLU", slope=3)
