"""U-Nets."""

import pytest
import torch

from cassetta.backbones import UNet
from cassetta.layers import ModuleGroup

from compare import assert_gradients, assert_near, image

SIZES = {1: (12,), 2: (8, 12), 3: (4, 8, 4)}


@pytest.mark.parametrize("skip", [True, False, "+"])
@pytest.mark.parametrize("pool_mode", ["interpolate", "conv", "pool"])
@pytest.mark.parametrize("unpool_mode", ["interpolate", "conv", "pool", None])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_way_down_and_up(ndim, unpool_mode, pool_mode, skip):
    net = UNet(ndim, 2, nb_levels=3, nb_conv_per_level=1, activation="ELU",
               pool_mode=pool_mode, unpool_mode=unpool_mode, skip=skip)  # fmt: skip
    inp = image(1, 2, *SIZES[ndim])
    assert net.double()(inp).shape == inp.shape
    assert_gradients(net, inp)


def test_it_is_its_encoder_and_decoder():
    net = UNet(2, 4, nb_levels=3, norm="instance").double()
    inp = image(2, 4, 12, 8)
    levels = net.encoder(inp, return_all=True)
    assert_near(net(inp), net.decoder(*levels[::-1]))
    every = net(inp, return_all=True)
    assert [out.shape[1] for out in every] == net.all_out_channels == [8, 4]
    assert_near(every[-1], net(inp))
    assert (net.inp_channels, net.out_channels) == (4, 4)


@pytest.mark.parametrize("skip", [True, "+"])
@pytest.mark.parametrize("unpool_mode", ["interpolate", "conv"])
@pytest.mark.parametrize("size", [(21,), (13, 15), (9, 11, 7)])
def test_odd_sizes(size, unpool_mode, skip):
    """Upstream concatenates tensors of different sizes, and fails."""
    net = UNet(len(size), 2, nb_levels=3, unpool_mode=unpool_mode, skip=skip)
    inp = torch.randn(1, 2, *size)
    assert net(inp).shape == inp.shape


def test_odd_sizes_repeat_the_last_voxel():
    net = UNet(1, 2, nb_levels=2, nb_conv_per_level=1, activation=None).double()
    inp = image(1, 2, 7)
    fine, coarse = net.encoder(inp, return_all=True)
    up = net.decoder[0][0](coarse)
    fitted = torch.cat([up, up[..., -1:]], dim=-1)
    assert_near(net(inp), net.decoder[0][1](torch.cat([fitted, fine], dim=1)))


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({"nb_features": 4, "nb_levels": 3}, [4, 8, 16]),
        ({"nb_features": [4, 6], "nb_levels": 4}, [4, 6, 12, 24]),
        ({"nb_features": [4, 6], "nb_levels": 4, "mul_features": 1.5}, [4, 6, 9, 13]),
        ({"nb_features": [4, 6, 8], "nb_levels": 2}, [4, 6]),
        ({"nb_features": [3]}, [3, 6, 12, 24, 48]),
    ],
    ids=str,
)
def test_features(options, features):
    """Upstream fails on a list that is shorter than the number of levels."""
    net = UNet(1, nb_conv_per_level=1, **options)
    assert net.encoder.all_out_channels == features
    assert net.all_out_channels == features[-2::-1]


@pytest.mark.parametrize("skip", [True, False, "+"])
@pytest.mark.parametrize(("levels", "size", "channels"), [(1, 4, 16), (2, 8, 8), (3, 16, 4),
                                                          (4, 32, 2), (6, 128, 1)])  # fmt: skip
def test_any_number_of_decoder_levels(levels, size, channels, skip):
    """Upstream fails where the decoder has more levels than the encoder."""
    net = UNet(2, 4, nb_levels=3, nb_levels_decoder=levels, skip=skip)
    assert net(torch.randn(1, 4, 16, 16)).shape == (1, channels, size, size)
    assert net.out_channels == channels


def test_one_level():
    net = UNet(2, 4, nb_levels=1)
    assert net(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def test_anisotropic():
    net = UNet(3, 4, nb_levels=3, kernel_size=[3, 3, 1], pool_factor=[2, 2, 1])
    assert net(torch.randn(1, 4, 8, 8, 3)).shape == (1, 4, 8, 8, 3)
    assert net.encoder[0][0].conv.kernel_size == (3, 3, 1)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"skip": "cat"}, "skip='cat'"),
        (ValueError, {"skip": 2}, "skip=2"),
        (ValueError, {"nb_levels": 0}, "nb_levels=0"),
        (ValueError, {"nb_levels_decoder": 0}, "nb_levels_decoder=0"),
        (ValueError, {"nb_levels_decoder": -1}, "nb_levels_decoder=-1"),
        (ValueError, {"mul_features": -2}, "mul_features=-2"),
        (ValueError, {"pool_mode": "max"}, "pool_mode='max'"),
        (ValueError, {"unpool_mode": "nearest"}, "unpool_mode='nearest'"),
        (ValueError, {"norm": "bach"}, "norm='bach'"),
        (ValueError, {"order": "abc"}, "order='abc'"),
        (ValueError, {"ndim": 4}, "ndim=4"),
        (ValueError, {"pool_factor": [2, 2, 2]}, r"factor=\[2, 2, 2\].*ndim=2"),
    ],
    ids=str,
)
def test_bad_arguments(error, options, message):
    with pytest.raises(error, match=message):
        UNet(**{"ndim": 2, "nb_features": 4, **options})


def test_bad_input():
    net = UNet(2, 4, nb_levels=4, norm="batch")
    with pytest.raises(ValueError, match=r"\(8, 7\).*4 levels need \(8, 8\)"):
        net(torch.ones(1, 4, 8, 7))
    with pytest.raises(ValueError, match=r"\(1, 4, 8\)"):
        net(torch.ones(1, 4, 8))
    assert net.encoder[0][0].norm.num_batches_tracked == 0


def test_an_encoder_that_was_exchanged_for_a_group():
    net = UNet(2, [3, 4], nb_levels=2)
    inp = image(2, 3, 8, 8)
    expected = net.double()(inp)
    net.encoder = ModuleGroup(list(net.encoder))
    assert_near(net(inp), expected)
