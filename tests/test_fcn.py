"""Encoders and decoders."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from cassetta.backbones import ConvDecoder, ConvEncoder, UNet

from compare import assert_gradients, assert_near, image


@pytest.mark.parametrize("pool_mode", ["interpolate", "conv", "pool"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_encoder(ndim, pool_mode):
    net = ConvEncoder(ndim, 2, nb_levels=3, pool_mode=pool_mode, activation="ELU").double()
    inp = image(1, 2, *(9, 8, 7)[:ndim])
    sizes = [tuple(n // 2**level for n in (9, 8, 7)[:ndim]) for level in range(3)]
    every = net(inp, return_all=True)
    assert [tuple(out.shape) for out in every] == [
        (1, c, *size) for c, size in zip([2, 4, 8], sizes, strict=True)
    ]
    assert_near(net(inp), every[-1])
    assert (net.inp_channels, net.out_channels, net.all_out_channels) == (2, 8, [2, 4, 8])
    assert_gradients(net, inp)


@pytest.mark.parametrize("unpool_mode", ["interpolate", "conv", "pool"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_decoder(ndim, unpool_mode, skip):
    net = ConvDecoder(ndim, 8, nb_levels=3, skip=skip, unpool_mode=unpool_mode, activation="ELU")
    inputs = [image(1, 8 // 2**n, *[2 * 2**n] * ndim) for n in range(3)]
    every = net.double()(*inputs, return_all=True)
    assert [tuple(out.shape) for out in every] == [(1, 4, *[4] * ndim), (1, 2, *[8] * ndim)]
    assert_near(net(*inputs), every[-1])
    assert (net.inp_channels, net.out_channels, net.all_out_channels) == (8, 2, [4, 2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nb_features": 5}, [5, 10, 20]),
        ({"nb_features": 5, "mul_features": 1.5, "nb_levels": 4}, [5, 7, 11, 16]),
        ({"nb_features": [4, 6]}, [4, 6]),  # upstream: the list says how many levels there are
        ({"nb_features": [4, 6, 7, 9]}, [4, 6, 7, 9]),
        ({"nb_features": [4, 6, 7, 9], "nb_levels": 2}, [4, 6, 7, 9]),
        ({"nb_features": [4, 6], "nb_levels": 4}, [4, 6, 12, 24]),
        ({"nb_features": [4], "nb_levels": 3, "mul_features": 3}, [4, 12, 36]),
        ({"nb_features": (4, 5), "nb_levels": 3}, [4, 5, 10]),
    ],
    ids=str,
)
def test_encoder_features(options, expected):
    """Upstream never reaches the line that continues a list, which fails."""
    assert ConvEncoder(1, nb_conv_per_level=1, **options).all_out_channels == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nb_features": 16}, [16, 8, 4]),
        ({"nb_features": 5, "nb_levels": 5}, [5, 2, 1, 1, 1]),
        ({"nb_features": [9, 5]}, [9, 5]),
        ({"nb_features": [9, 6], "nb_levels": 4}, [9, 6, 3, 1]),
    ],
    ids=str,
)
def test_decoder_features(options, expected):
    net = ConvDecoder(1, nb_conv_per_level=1, **options)
    assert [net.inp_channels, *net.all_out_channels] == expected


@pytest.mark.parametrize("skip", [3, [3, 1], (3,), [0, 2], True])
def test_decoder_concatenates_any_number_of_channels(skip):
    net = ConvDecoder(2, 8, nb_levels=3, skip=skip)
    channels = {"3": [3, 3], "[3, 1]": [3, 1], "(3,)": [3, 2], "[0, 2]": [4, 2], "True": [4, 2]}
    skips = [torch.randn(1, c, 8 * 2**n, 8 * 2**n) for n, c in enumerate(channels[str(skip)])]
    assert net(torch.randn(1, 8, 4, 4), *skips).shape == (1, 2, 16, 16)


def test_decoder_ignores_skips_beyond_its_finest_level():
    net = ConvDecoder(2, 8, nb_levels=2, skip=True)
    inputs = [torch.randn(1, 8 // 2**n, 4 * 2**n, 4 * 2**n) for n in range(4)]
    assert net(*inputs).shape == (1, 4, 8, 8)


def test_one_level():
    assert ConvEncoder(2, 4, nb_levels=1)(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)
    net = ConvDecoder(2, 4, nb_levels=1)
    assert (net.inp_channels, net.out_channels) == (4, 4)
    assert net(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)


def test_factors_per_dimension():
    net = ConvEncoder(3, 2, pool_factor=[2, 2, 1], pool_mode="conv")
    assert net(torch.randn(1, 2, 8, 8, 3)).shape == (1, 8, 2, 2, 3)
    net = ConvDecoder(3, 8, unpool_factor=[2, 2, 1])
    assert net(torch.randn(1, 8, 2, 2, 3)).shape == (1, 2, 8, 8, 3)


def test_slices_are_the_first_levels():
    net = ConvEncoder(2, 4)
    assert list(net[:2]) == [net[0], net[1]]
    assert net[:2](torch.randn(1, 4, 8, 8)).shape == (1, 8, 4, 4)


def test_documented_defaults():
    for kind in (ConvEncoder, ConvDecoder):
        assert inspect.signature(kind).parameters["nb_levels"].default == 3
        assert "nb_levels: int = 3" in str(inspect.signature(kind))


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"ndim": 0}, "ndim=0"),
        (ValueError, {"nb_features": 0}, "nb_features=0"),
        (ValueError, {"nb_features": [4, -2]}, r"nb_features\[1\]=-2"),
        (ValueError, {"nb_features": []}, r"nb_features=\[\]"),
        (TypeError, {"nb_features": 4.5}, "nb_features=4.5"),
        (TypeError, {"nb_features": True}, "nb_features=True"),
        (ValueError, {"nb_levels": 0}, "nb_levels=0"),
        (ValueError, {"nb_conv_per_level": 0}, "nb_conv=0"),
        (ValueError, {"kernel_size": 0}, "kernel_size=0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [ConvEncoder, ConvDecoder])
def test_bad_arguments(kind, error, options, message):
    with pytest.raises(error, match=message):
        kind(**{"ndim": 2, "nb_features": 4, **options})


def test_bad_arguments_of_one():
    with pytest.raises(ValueError, match="mul_features=0"):
        ConvEncoder(2, mul_features=0)
    with pytest.raises(ValueError, match="pool_mode='average'"):
        ConvEncoder(2, pool_mode="average")
    with pytest.raises(ValueError, match="pool_factor=-2|factor=-2"):
        ConvEncoder(2, pool_factor=-2)
    with pytest.raises(TypeError, match="div_features='2'"):
        ConvDecoder(2, div_features="2")
    with pytest.raises(ValueError, match="unpool_mode='linear'"):
        ConvDecoder(2, unpool_mode="linear")
    with pytest.raises(ValueError, match=r"skip=\[1, 2, 3\].*2 levels"):
        ConvDecoder(2, skip=[1, 2, 3])
    with pytest.raises(ValueError, match="skip=-1"):
        ConvDecoder(2, skip=-1)


def test_bad_input_is_refused_before_anything_is_computed():
    net = ConvEncoder(2, 4, norm="batch")
    with pytest.raises(ValueError, match=r"\(8, 3\).*3 levels need \(4, 4\)"):
        net(torch.ones(1, 4, 8, 3))
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*\(batch, 4, W, H\)"):
        net(torch.ones(1, 3, 8, 8))
    assert net[0][0].norm.num_batches_tracked == 0
    net = ConvDecoder(2, 8, skip=True, norm="batch")
    with pytest.raises(ValueError, match=r"skips have \[\] channels, but 2"):
        net(torch.ones(1, 8, 2, 2), torch.ones(1, 4, 4, 4))
    with pytest.raises(ValueError, match="empty"):
        net()
    assert net[0][1][0].norm.num_batches_tracked == 0


def test_feature_lists_may_be_arrays():
    """Arrays have `__index__`, which made them look like one number."""
    for features in (np.array([4, 8]), torch.tensor([4, 8]), (4, 8)):
        assert ConvEncoder(1, features).all_out_channels == [4, 8]
        assert len(ConvDecoder(1, features)) == 1
    decoder = ConvDecoder(1, [8, 4, 2], skip=np.array([3, 1]))
    assert [level.skip for level in decoder] == [3, 1]
    assert ConvEncoder(1, np.int64(4)).all_out_channels == [4, 8, 16]


def test_levels_may_be_exchanged_for_any_module():
    inp = torch.randn(2, 4, 8, 8)
    changes = [
        lambda u: u.encoder.__setitem__(0, nn.Conv2d(4, 4, 3, padding=1)),
        lambda u: u.encoder[1].__setitem__(0, nn.Conv2d(4, 8, 2, stride=2)),
        lambda u: u.encoder.__setitem__(1, nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 1))),
        lambda u: u.decoder[0].__setitem__(0, nn.ConvTranspose2d(8, 4, 2, 2)),
        lambda u: u.decoder[0].__setitem__(1, nn.Sequential(nn.Conv2d(8, 4, 1))),
        lambda u: u.decoder[0].__setitem__(1, nn.Conv2d(8, 4, 1)),
        lambda u: u.decoder.append(nn.Identity()),
        lambda u: u.encoder.append(nn.Identity()),
    ]
    for change in changes:
        net = UNet(2, [4, 8], nb_levels=2)
        change(net)
        if len(net.encoder) == 2:
            assert net(inp).shape == (2, 4, 8, 8)
        else:
            assert net.encoder(inp).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("norm", ["batch", "instance", "layer"])
def test_an_image_that_leaves_a_norm_one_value_changes_nothing(norm):
    net = UNet(2, 2, nb_levels=3, norm=norm)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(ValueError, match=r"size \(1, 1\) at level 2 of 3, where a .*Norm"):
        net(torch.randn(1, 2, 4, 4))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])
    assert net(torch.randn(1, 2, 8, 4)).shape == (1, 2, 8, 4)
    if norm == "batch":
        assert net.eval()(torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)
