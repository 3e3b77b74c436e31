"""Concatenation, sums, groups of modules, global pooling."""

import pytest
import torch
from torch import nn

from cassetta.layers import (
    Add,
    Cat,
    Conv,
    ConvBlock,
    DoNothing,
    GlobalPool,
    Hadamard,
    ModuleGroup,
    ModuleSum,
    MoveDim,
    Split,
)

from compare import assert_gradients, assert_near, image


def test_cat_add_split_movedim_nothing():
    x, y, z = image(2, 3, 4), image(2, 3, 4), image(2, 5, 4)
    assert_near(Cat()(x, z), torch.cat([x, z], 1))
    assert_near(Cat(dim=0)(x, y), torch.cat([x, y], 0))
    assert_near(Add()(x, y, x), x + y + x)
    assert [part.shape[1] for part in Split(2)(z)] == [3, 2]
    assert MoveDim(1, -1)(x).shape == (2, 4, 3)
    assert DoNothing()(x, y, some="thing") is x
    with pytest.raises(ValueError, match="inputs"):
        Add()()
    with pytest.raises(ValueError, match="nb_chunks=0"):
        Split(0)


def test_hadamard():
    x, y = image(2, 3, 4), image(2, 3, 4)
    plus, minus = Hadamard()(x, y)
    assert_near(plus, x + y)
    assert_near(minus, x - y)
    assert_near(Hadamard()(torch.cat([x, y], 1)), torch.cat([x + y, x - y], 1))
    with pytest.raises(ValueError, match="3 channels"):
        Hadamard()(x)


def test_module_sum():
    """Upstream's has no `inp_channels`, so no `SegNet` can hold an `ATrousNet`."""
    branches = [Conv(1, 2, 3, padding="same").double() for _ in range(3)]
    total = ModuleSum(branches)
    assert (total.inp_channels, total.out_channels) == (2, 3)
    inp = image(1, 2, 6)
    assert_near(total(inp), sum(branch(inp) for branch in branches))
    assert next(iter(total.state_dict())) == "0.weight"
    with pytest.raises(ValueError, match="no modules"):
        ModuleSum()(inp)


def test_module_group_residual_and_skip():
    first, second = Conv(1, 5, 3, padding="same").double(), Conv(1, 3, padding="same").double()
    inp = image(2, 5, 7)
    group = ModuleGroup([first, second], residual=True, skip=2)
    middle = first(inp) + inp[:, :3]
    assert_near(group(inp), second(middle) + middle)
    every = group(inp, return_all=True)
    assert_near(every[0], middle)
    assert_near(every[1], group(inp))
    assert group.all_out_channels == [3, 3]


def test_module_group_residual_does_not_write_into_what_a_module_saved():
    """Upstream adds in place, which breaks the gradient of a ReLU that comes last."""
    group = ModuleGroup([nn.Sequential(Conv(1, 3, padding="same"), nn.ReLU())], residual=True)
    assert_gradients(group, image(2, 3, 7))


def test_module_group_slices():
    modules = [Conv(1, 3, padding="same") for _ in range(4)]
    group = ModuleGroup(modules, residual=True, skip=0)
    assert list(group[1:3]) == modules[1:3]
    assert type(group[1:3]) is ModuleGroup
    assert group[1:3].residual
    assert ModuleGroup(modules, skip=2)[:2].skip == 2
    assert ModuleGroup(modules, skip=2)[1:].skip == 0


def test_module_group_refuses_residuals_that_would_broadcast():
    group = ModuleGroup([Conv(1, 1, 4, padding="same")], residual=True)
    with pytest.raises(ValueError, match=r"residual=True.*\(2, 1, 7\).*\(2, 4, 7\)"):
        group(torch.ones(2, 1, 7))


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(
    ("options", "dims", "shape"),
    [
        ({}, (2, 3), (2, 3, 1, 1)),
        ({"keepdim": False}, (2, 3), (2, 3)),
        ({"dim": 1}, (1,), (2, 1, 4, 5)),
        ({"dim": [1, 3], "keepdim": False}, (1, 3), (2, 4)),
    ],
    ids=str,
)
def test_global_pool(reduction, options, dims, shape):
    inp = image(2, 3, 4, 5)
    out = GlobalPool(reduction, **options)(inp)
    keepdim = options.get("keepdim", True)
    reduce = torch.mean if reduction == "mean" else torch.amax
    assert out.shape == shape
    assert_near(out, reduce(inp, dims, keepdim=keepdim))


def test_global_pool_bad_arguments():
    with pytest.raises(ValueError, match="reduction='sum'.*'mean'"):
        GlobalPool("sum")
    with pytest.raises(ValueError, match="dim='channel'"):
        GlobalPool(dim="channel")


def test_a_sum_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match="different shapes"):
        ModuleSum([nn.Identity(), nn.AvgPool1d(2)])(torch.ones(1, 2, 4))


def test_a_module_that_returns_several_tensors_is_named():
    class Twice(nn.Module):
        def forward(self, inp):
            return inp, inp

    net = ModuleGroup([ConvBlock(1, 4, 4), Twice(), ConvBlock(1, 4, 4)])
    with pytest.raises(TypeError, match="Twice returns a tuple: within a group"):
        net(torch.zeros(1, 4, 6))
