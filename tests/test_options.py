"""Any documented combination of options builds, runs forward and backward, and keeps its shapes."""

import math
from functools import partial

import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from cassetta.backbones import ATrousNet, ConvDecoder, ConvEncoder, MeshNet, UNet
from cassetta.layers import (
    ConvBlock,
    ConvGroup,
    DownConvGroup,
    InstanceNorm,
    SqzEx,
    UpConvGroup,
)
from cassetta.models import SegNet

# derandomized: the same examples on every run, so that a red suite is a change of the code
combinations = settings(max_examples=60, deadline=None, derandomize=True)

ACTIVATIONS = ["ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "PReLU", "Softplus", "SymLog", None]
NORMS = ["batch", "instance", "layer", 1, None]
ATTENTIONS = [None, None, None, "sqzex", "cbam", "sdp", "mha"]
MODES = ["interpolate", "conv", "pool"]

ndims = st.integers(1, 3)
numbers = st.one_of(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=1))
words = st.permutations("ncdax").flatmap(
    lambda letters: st.integers(0, 5).map(lambda n: "".join(letters[:n]))
)
common = {
    "kernel_size": numbers,
    "residual": st.booleans(),
    "activation": st.sampled_from([*ACTIVATIONS, nn.Hardswish, partial(nn.LeakyReLU, 0.2)]),
    "norm": st.sampled_from([*NORMS, 2, InstanceNorm, partial(nn.GroupNorm, 1)]),
    "dropout": st.sampled_from([None, False, 0, 0.2, 0.5, nn.Dropout, partial(nn.Dropout, 0.1)]),
    "attention": st.sampled_from([*ATTENTIONS, False, True, SqzEx]),
    "order": words,
}
block = {
    **{name: value for name, value in common.items() if name != "residual"},
    "dilation": numbers,
    "bias": st.booleans(),
    "compression": st.integers(1, 16),
    "separable": st.sampled_from([False, False, True, "crosshair", "cross"]),
}
group = {**block, "residual": st.booleans(), "recurrent": st.booleans()}
features = st.integers(1, 3).map(lambda n: 2 * n)  # even: two groups divide them
several = st.one_of(features, st.lists(features, min_size=1, max_size=4))
levels = st.integers(1, 3)


def options(**own):
    return st.fixed_dictionaries({**common, **own})


def check_that_it_trains(net, *inputs, shape):
    inputs = [inp.requires_grad_() for inp in inputs]
    out = net(*inputs)
    assert out.shape == shape
    assert out.isfinite().all()
    out.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(inp.grad.isfinite().all() for inp in inputs)
    evaluated = net.eval()(*inputs)
    assert evaluated.shape == shape
    torch.testing.assert_close(net(*inputs), evaluated)


def per_axis(data, chosen, ndim):
    """Exchange some of the numbers for one per axis."""
    for name in ("kernel_size", "dilation"):
        if data.draw(st.booleans()):
            chosen[name] = data.draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))


def noise(ndim, channels, sizes):
    # two samples, so that a norm over a single voxel still has two values
    return torch.randn(2, channels, *sizes[:ndim])


sizes = st.tuples(*[st.integers(8, 11)] * 3)
PADDINGS = ["zeros", "replicate", "mirror", "reflect", "circular", "antireflect"]


@combinations
@given(ndims, sizes, st.data(), st.fixed_dictionaries(block), features, st.sampled_from(PADDINGS))
def test_block(ndim, size, data, chosen, out_channels, padding_mode):
    per_axis(data, chosen, ndim)
    # instances, and the options of each layer
    if data.draw(st.booleans()):
        chosen["activation"] = nn.ELU(0.5)
    given_options = {"optc": {"padding_mode": padding_mode}}
    if chosen["norm"] in ("batch", "instance", 1):
        given_options["optn"] = {"eps": 1e-3}
    net = ConvBlock(ndim, 4, out_channels, **chosen, **given_options)
    inp = noise(ndim, 4, size)
    check_that_it_trains(net, inp, shape=(2, out_channels, *inp.shape[2:]))


@combinations
@given(ndims, sizes, st.data(), st.fixed_dictionaries(group), st.integers(1, 3), st.integers(0, 3))
def test_group(ndim, size, data, chosen, nb_conv, skip):
    per_axis(data, chosen, ndim)
    if chosen["norm"] == 2 or chosen["order"].find("n") < chosen["order"].find("c"):
        skip *= 2  # the norm of the first block then sees an even number of channels
    net = ConvGroup(ndim, 4, nb_conv, skip=skip, **chosen)
    inp = noise(ndim, 4 + skip, size)
    check_that_it_trains(net, inp, shape=(2, 4, *inp.shape[2:]))


@combinations
@given(ndims, sizes, st.data(), st.fixed_dictionaries(group), st.sampled_from(MODES))
def test_down_group(ndim, size, data, chosen, mode):
    per_axis(data, chosen, ndim)
    factor = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=ndim))
    net = DownConvGroup(ndim, 3, 4, factor, mode, **chosen)
    inp = noise(ndim, 3, size)
    factor += factor[-1:] * (ndim - len(factor))
    out = [n // f for n, f in zip(inp.shape[2:], factor, strict=True)]
    check_that_it_trains(net, inp, shape=(2, 4, *out))


@combinations
@given(ndims, st.data(), st.fixed_dictionaries(group), st.sampled_from(["interpol", "conv"]))
def test_up_group(ndim, data, chosen, mode):
    per_axis(data, chosen, ndim)
    factor = data.draw(st.integers(1, 3))
    skip = data.draw(st.sampled_from([0, 2, 4]))
    size = [data.draw(st.integers(2, 4)) for _ in range(ndim)]
    fine = [n * factor + data.draw(st.integers(0, factor - 1)) for n in size]
    net = UpConvGroup(ndim, 6, 4, factor, skip, mode, **chosen)
    inputs = torch.randn(2, 6, *size), torch.randn(2, skip or 4, *fine)
    check_that_it_trains(net, *inputs, shape=(2, 4, *fine))


@combinations
@given(ndims, sizes, options(
    nb_features=several, nb_layers=levels, nb_conv_per_layer=st.integers(1, 2),
    bias=st.booleans(),
    dilation=st.one_of(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4)),
    mul_dilation=st.integers(1, 3),
))  # fmt: skip
def test_meshnet(ndim, size, chosen):
    chosen["residual"] = chosen["residual"] and not isinstance(chosen["nb_features"], list)
    net = MeshNet(ndim, **chosen)
    inp = noise(ndim, net.inp_channels, size)
    check_that_it_trains(net, inp, shape=(2, net.out_channels, *inp.shape[2:]))


@combinations
@given(ndims, sizes, options(
    nb_features=several, nb_levels=levels, nb_conv_per_level=st.integers(1, 2),
    bias=st.booleans(),
    dilation=st.one_of(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4)),
    mul_dilation=st.integers(1, 3),
))  # fmt: skip
def test_atrousnet(ndim, size, chosen):
    chosen["residual"] = chosen["residual"] and not isinstance(chosen["nb_features"], list)
    net = ATrousNet(ndim, **chosen)
    inp = noise(ndim, net.inp_channels, size)
    check_that_it_trains(net, inp, shape=(2, net.out_channels, *inp.shape[2:]))


@combinations
@given(ndims, sizes, options(
    nb_features=st.one_of(features, st.lists(features, min_size=1, max_size=3)),
    mul_features=st.integers(1, 2), nb_levels=levels, nb_conv_per_level=st.integers(1, 2),
    pool_factor=st.integers(1, 2), pool_mode=st.sampled_from(MODES),
))  # fmt: skip
def test_encoder(ndim, size, chosen):
    net = ConvEncoder(ndim, **chosen)
    inp = noise(ndim, net.inp_channels, size)
    depth = len(net) - 1
    coarse = inp.shape[2:]
    for _ in range(depth):
        coarse = [n // chosen["pool_factor"] for n in coarse]
    check_that_it_trains(net, inp, shape=(2, net.out_channels, *coarse))


@combinations
@given(ndims, st.data(), options(
    nb_features=st.one_of(st.just(8), st.lists(features, min_size=2, max_size=3)),
    nb_levels=st.integers(2, 3), nb_conv_per_level=st.integers(1, 2), norm=st.sampled_from(NORMS),
    skip=st.one_of(st.booleans(), st.sampled_from([0, 2, [2], [0]])),
    unpool_factor=st.integers(1, 2), unpool_mode=st.sampled_from(MODES),
))  # fmt: skip
def test_decoder(ndim, data, chosen):
    net = ConvDecoder(ndim, **chosen)
    size = [data.draw(st.integers(2, 4)) for _ in range(ndim)]
    inputs = [torch.randn(2, net.inp_channels, *size)]
    for level in net:
        size = [n * chosen["unpool_factor"] for n in size]
        channels = level.skip or level[0].out_channels
        inputs.append(torch.randn(2, channels, *size))
    check_that_it_trains(net, *inputs, shape=(2, net.out_channels, *size))


@combinations
@given(ndims, sizes, options(
    nb_features=st.one_of(features, st.lists(features, min_size=1, max_size=4)),
    mul_features=st.integers(1, 2), nb_levels=levels,
    nb_levels_decoder=st.one_of(st.none(), st.integers(2, 3)), nb_conv_per_level=st.integers(1, 2),
    pool_factor=st.integers(1, 2), pool_mode=st.sampled_from(MODES),
    unpool_mode=st.sampled_from([*MODES, None]), skip=st.sampled_from([True, False, "+"]),
    norm=st.sampled_from(NORMS),
))  # fmt: skip
def test_unet(ndim, size, chosen):
    net = UNet(ndim, **chosen)
    chosen_levels, decoder = chosen["nb_levels"], chosen["nb_levels_decoder"]
    decoder = decoder or chosen_levels
    factor = chosen["pool_factor"]
    inp = noise(ndim, net.inp_channels, size)
    shape = [list(inp.shape[2:])]
    for _ in range(chosen_levels - 1):
        shape.append([n // factor for n in shape[-1]])
    out = shape[-1]
    for up in range(1, decoder):
        met = chosen["skip"] and up < chosen_levels
        out = shape[-1 - up] if met else [n * factor for n in out]
    check_that_it_trains(net, inp, shape=(2, net.out_channels, *out))


@combinations
@given(ndims, sizes, st.sampled_from(["UNet", "MeshNet", "ATrousNet"]), st.integers(1, 3),
       st.integers(1, 4), st.sampled_from(["Softmax", "Sigmoid", None]),
       st.integers(1, 5))  # fmt: skip
def test_segnet(ndim, size, backbone, inp_channels, out_channels, activation, kernel_size):
    depth = "nb_layers" if backbone == "MeshNet" else "nb_levels"
    net = SegNet(
        ndim, inp_channels, out_channels, kernel_size, activation, backbone,
        {"nb_features": 2, depth: 2},
    )  # fmt: skip
    inp = noise(ndim, inp_channels, size)
    if activation == "Softmax" and out_channels == 1:
        assert math.isclose(net(inp).mean().item(), 1, rel_tol=1e-5)  # and so without a gradient
    else:
        check_that_it_trains(net, inp, shape=(2, out_channels, *inp.shape[2:]))
