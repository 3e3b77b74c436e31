"""Levels: a way down or up, and the block of layers that follows."""

import pytest
import torch
from torch import nn

from cassetta.layers import (
    Conv,
    ConvBlock,
    DownConv,
    DownConvGroup,
    DownGroup,
    DownInterpol,
    DownPool,
    UpConv,
    UpConvGroup,
    UpGroup,
    UpInterpol,
    UpPool,
)

from compare import assert_gradients, assert_near, image


@pytest.mark.parametrize(
    ("mode", "down", "up"),
    [
        ("conv", DownConv, UpConv),
        ("interpol", DownInterpol, UpInterpol),
        ("interpolate", DownInterpol, UpInterpol),
        ("Interpolation", DownInterpol, UpInterpol),
        ("i", DownInterpol, UpInterpol),
        ("pool", DownPool, UpPool),
        ("unpool", DownPool, UpPool),
    ],
)
def test_modes(mode, down, up):
    assert type(DownConvGroup(2, 3, 5, mode=mode)[0]) is down
    assert type(UpConvGroup(2, 5, 3, mode=mode)[0]) is up


@pytest.mark.parametrize("mode", ["conv", "interpol", "pool"])
def test_down_group(mode):
    level = DownConvGroup(2, 3, 5, factor=[2, 3], mode=mode, nb_conv=2, norm="batch").double()
    inp = image(2, 3, 7, 9)
    assert_near(level(inp), level[1](level[0](inp)))
    assert level(inp).shape == (2, 5, 3, 3)
    assert (level.inp_channels, level.out_channels) == (3, 5)
    assert DownConvGroup(2, 3).out_channels == 3


def test_down_group_returns_indices():
    """Upstream unpacks the layer instead of what it returns."""
    level = DownConvGroup(2, 3, 5, mode="pool", return_indices=True)
    assert level.return_indices
    out, indices = level(torch.randn(1, 3, 8, 8))
    assert out.shape == (1, 5, 4, 4)
    assert (indices.shape, indices.dtype) == ((1, 3, 4, 4), torch.int64)


def test_up_group_unpools_to_the_size_of_its_skip():
    down = DownConvGroup(2, 3, mode="pool", return_indices=True)
    up = UpConvGroup(2, 3, mode="pool", skip=3)
    fine = torch.randn(1, 3, 9, 7)
    coarse, indices = down(fine)
    assert up(coarse, fine, indices=indices).shape == (1, 3, 9, 7)


@pytest.mark.parametrize("mode", ["conv", "interpol"])
def test_up_group_concatenates_and_adds(mode):
    inp, one, two = image(1, 4, 3, 3), image(1, 2, 6, 6), image(1, 1, 6, 6)
    cat = UpConvGroup(2, 4, 2, skip=3, mode=mode, activation="ELU").double()
    assert_near(cat(inp, one, two), cat[1](torch.cat([cat[0](inp), one, two], dim=1)))
    add = UpConvGroup(2, 4, 2, mode=mode, activation="ELU").double()
    assert_near(add(inp, one, one), add[1](add[0](inp) + one + one))
    assert_near(add(inp), add[1](add[0](inp)))


def test_up_group_added_skips_leave_what_was_saved():
    """Upstream adds in place to what interpolation returned."""

    class AddOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = UpConvGroup(2, 3, mode="interpol", activation="ELU")

        def forward(self, inp):
            return self.up(inp, inp.repeat(1, 1, 2, 2))

    assert_gradients(AddOne(), image(1, 3, 3, 3))


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (7, 7), (5, 6)])
def test_up_group_fits_the_size_of_its_skip(size):
    level = UpConvGroup(2, 4, 2, skip=2, mode="conv").double()
    inp, skip = image(1, 4, 3, 3), image(1, 2, *size)
    assert level(inp, skip).shape == (1, 2, *size)
    up = level[0](inp)
    index = [torch.arange(n).clamp(max=5) for n in size]
    fitted = up[:, :, index[0]][:, :, :, index[1]]
    assert_near(level(inp, skip), level[1](torch.cat([fitted, skip], dim=1)))


def test_groups_of_any_modules():
    down = DownGroup(DownPool(2, 3), ConvBlock(2, 3, 5))
    assert down(torch.randn(1, 3, 8, 8)).shape == (1, 5, 4, 4)
    up = UpGroup(UpInterpol(2, 5), ConvBlock(2, 8, 4), skip=True)
    assert up(torch.randn(1, 5, 4, 4), torch.randn(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    assert list(up[:1]) == [up[0]]


@pytest.mark.parametrize(
    ("skip", "inputs", "message"),
    [
        (2, [], "skips have \\[\\] channels, but 2 are to be concatenated"),
        (2, [(1, 3, 6, 6)], "skips have \\[3\\] channels, but 2 are to be concatenated"),
        (0, [(1, 3, 6, 6)], "skips have \\[3\\] channels, but 2 are to be added"),
        (2, [(1, 2, 12, 6)], r"skip has shape \(1, 2, 12, 6\).*\(1, 2, 6, 6\)"),
        (2, [(2, 2, 6, 6)], r"skip has shape \(2, 2, 6, 6\)"),
        (2, [(1, 1, 6, 6), (1, 1, 7, 6)], r"skip has shape \(1, 1, 7, 6\)"),
    ],
)
def test_bad_skips(skip, inputs, message):
    level = UpConvGroup(2, 4, 2, skip=skip, mode="conv")
    with pytest.raises(ValueError, match=message):
        level(torch.ones(1, 4, 3, 3), *(torch.ones(shape) for shape in inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cubic"}, "mode='cubic'"),
        ({"mode": 3}, "mode=3"),
        ({"factor": 0}, "factor=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"nb_conv": 0}, "nb_conv=0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [DownConvGroup, UpConvGroup])
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"ndim": 2, "inp_channels": 4, **options})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="color"):
        DownConvGroup(2, 4, color="red")
    with pytest.raises(ValueError, match="skip=-1"):
        UpConvGroup(2, 4, skip=-1)
    assert isinstance(UpGroup(nn.Identity(), Conv(2, 3)), nn.Sequential)
