"""Convolution blocks and groups, against plain modules."""

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import nn

from cassetta.layers import Conv, ConvBlock, ConvGroup, DoNothing

from compare import assert_gradients, assert_near, image

SIZES = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}
WORDS = {"n": "norm", "c": "conv", "d": "dropout", "a": "activation", "x": "attention"}


@pytest.mark.parametrize("order", ["".join(p) for p in permutations("ncdax")])
def test_every_order_equals_plain_modules(order):
    block = ConvBlock(
        2, 4, 6, norm="batch", dropout=0.5, attention="sqzex", activation="ELU", order=order
    ).double()
    inp = image(3, 4, 5, 6)
    torch.manual_seed(1)
    out = block(inp)
    torch.manual_seed(1)
    step = inp
    for letter in order:
        step = getattr(block, WORDS[letter])(step)
    assert_near(out, step)
    assert list(dict(block.named_children())) == [WORDS[letter] for letter in order]


@pytest.mark.parametrize(
    ("order", "full"),
    [("c", "cndax"), ("", "ncdax"), ("ca", "candx"), ("andc", "andcx"), ("CNA", "cnadx")],
)
def test_letters_left_out_are_appended(order, full):
    """Upstream looks for the missing letters before it appends them."""
    block = ConvBlock(2, 3, 5, norm="batch", dropout=0.5, attention="sqzex", order=order)
    assert block.order == full
    assert list(dict(block.named_children())) == [WORDS[letter] for letter in full]
    assert block(torch.randn(2, 3, 4, 4)).shape == (2, 5, 4, 4)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients(ndim):
    block = ConvBlock(ndim, 3, 4, dilation=2, norm="batch", activation="GELU", order="caxnd")
    assert_gradients(block, image(2, 3, *SIZES[ndim]))


def test_none_where_there_is_no_layer():
    block = ConvBlock(2, 3, 5, activation=None)
    assert list(dict(block.named_children())) == ["conv"]
    assert [block.norm, block.dropout, block.activation, block.attention] == [None] * 4
    assert (block.ndim, block.inp_channels, block.out_channels) == (2, 3, 5)
    assert ConvBlock(2, 3, None).out_channels == 3


def test_options_of_every_layer():
    block = ConvBlock(
        2, 4, 4, norm="batch", dropout=0.1, activation="LeakyReLU", attention="cbam", compression=2,
        optc={"padding_mode": "replicate", "groups": 2}, optn={"eps": 1e-3},
        optd={"inplace": True}, opta={"negative_slope": 0.3}, optx={"kernel_size": 3},
    )  # fmt: skip
    assert (block.conv.padding_mode, block.conv.groups) == ("replicate", 2)
    assert block.norm.eps == 1e-3
    assert block.dropout.inplace
    assert block.activation.negative_slope == 0.3
    assert block.attention[1][2].kernel_size == (3, 3)
    assert block.attention[0][2].out_channels == 2


def test_the_callers_dictionaries_stay_as_they_are():
    options = {name: {} for name in ("optc", "optn", "optd", "opta", "optx")}
    ConvBlock(2, 4, 4, norm="batch", attention="sqzex", **options)
    assert options == {name: {} for name in options}


@pytest.mark.parametrize("separable", [True, "crosshair", "cross"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_separable(separable, ndim):
    """Upstream passes `make_conv` arguments that its separable convolutions refuse."""
    block = ConvBlock(ndim, 3, 5, separable=separable, norm="batch", activation="ELU")
    assert block.ndim == ndim
    assert_gradients(block, image(2, 3, *SIZES[ndim]))


def test_group_is_its_blocks_one_after_the_other():
    group = ConvGroup(2, 4, nb_conv=3, norm="batch", activation="ELU").double()
    inp = step = image(2, 4, 5, 6)
    for block in group:
        step = block(step)
    assert_near(group(inp), step)
    assert_gradients(group, inp)


@pytest.mark.parametrize("activation", ["ReLU", "ELU", partial(nn.ReLU, inplace=True)], ids=str)
def test_residual_group_with_the_activation_last(activation):
    """Upstream adds in place, which breaks the gradient of a ReLU that comes last."""
    group = ConvGroup(2, 4, nb_conv=2, residual=True, skip=2, activation=activation).double()
    inp = image(2, 6, 5, 6)
    one, two = group
    middle = one(inp) + inp[:, :4]
    assert_near(group(inp), two(middle) + middle)
    assert_gradients(group, inp)


def test_recurrent_group_shares_weights():
    group = ConvGroup(2, 4, nb_conv=3, recurrent=True, norm="batch")
    assert group[0] is group[1] is group[2]
    with_skip = ConvGroup(2, 4, nb_conv=3, recurrent=True, skip=2)
    assert with_skip[0] is not with_skip[1]
    assert with_skip[1] is with_skip[2]
    assert with_skip(torch.randn(1, 6, 5, 5)).shape == (1, 4, 5, 5)


def test_group_that_changes_the_number_of_channels():
    assert ConvGroup(2, 4, nb_conv=2, skip=-3)(torch.randn(1, 1, 5, 5)).shape == (1, 4, 5, 5)
    with pytest.raises(ValueError, match="residual=True.*skip=-3"):
        ConvGroup(2, 4, residual=True, skip=-3)


def test_group_returns_all():
    group = ConvGroup(2, 4, nb_conv=3)
    every = group(torch.randn(1, 4, 5, 5), return_all=True)
    assert len(every) == 3
    assert group.all_out_channels == [4, 4, 4]


def test_slices_are_plain_sequences():
    block = ConvBlock(2, 3, 5, norm="batch", order="cnadx")
    assert list(block[:2]) == [block.conv, block.norm]
    group = ConvGroup(2, 4, nb_conv=3, residual=True)
    assert list(group[1:]) == [group[1], group[2]]


def test_modules_given_as_instances_are_shared():
    shared = nn.PReLU()
    group = ConvGroup(2, 4, nb_conv=2, activation=shared)
    assert group[0].activation is group[1].activation is shared
    assert ConvBlock(2, 4, 4, norm=DoNothing()).norm is not None


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"order": "ncdaxz"}, "order='ncdaxz'"),
        (ValueError, {"order": "ncc"}, "order='ncc'"),
        (TypeError, {"order": 3}, "order=3"),
        (ValueError, {"ndim": 5}, "ndim=5"),
        (ValueError, {"inp_channels": 0}, "inp_channels=0"),
        (ValueError, {"out_channels": -1}, "out_channels=-1"),
        (ValueError, {"kernel_size": -3}, "kernel_size=-3"),
        (ValueError, {"dilation": 0}, "dilation=0"),
        (ValueError, {"norm": "bath"}, "norm='bath'"),
        (ValueError, {"norm": 3}, "norm=3"),
        (ValueError, {"dropout": 7}, "dropout=7"),
        (ValueError, {"activation": "Rely"}, "activation='Rely'.*'ReLU'"),
        (ValueError, {"attention": "look"}, "attention='look'"),
        (ValueError, {"attention": "sqzex", "compression": 0}, "compression=0"),
        (TypeError, {"optc": {"color": "red"}}, "color"),
        (TypeError, {"opta": {"color": "red"}}, "color"),
    ],
    ids=str,
)
def test_bad_arguments(error, options, message):
    with pytest.raises(error, match=message):
        ConvBlock(**{"ndim": 2, "inp_channels": 4, "out_channels": 4, **options})


def test_bad_group_arguments_and_inputs():
    with pytest.raises(ValueError, match="nb_conv=0"):
        ConvGroup(2, 4, nb_conv=0)
    with pytest.raises(ValueError, match="skip=-4"):
        ConvGroup(2, 4, skip=-4)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 5\).*\(batch, 6, W, H\)"):
        ConvGroup(2, 4, skip=2)(torch.ones(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"\(1, 4, 5\)"):
        ConvBlock(2, 4, 4, order="ncdax", norm="batch")(torch.ones(1, 4, 5))
    counted = ConvBlock(2, 4, 4, order="nc", norm="batch")
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 5\)"):
        counted(torch.ones(1, 3, 5, 5))
    assert counted.norm.num_batches_tracked == 0


def test_repr_says_what_matters():
    text = repr(Conv(2, 3, 5, 3, stride=2, dilation=2, bias=False, groups=1, padding="valid"))
    assert text == (
        "Conv(3, 5, kernel_size=(3, 3), stride=(2, 2), padding=valid, dilation=(2, 2), bias=False)"
    )
