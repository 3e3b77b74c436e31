"""What upstream documents and does not do, works here: the list of DESIGN.md, in its order.

Each of these raised, or could not be imported, in the original. The details are tested where the
code is; here every item trains for a step, and the name of the test is the name of the item.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import cassetta
from cassetta.backbones import ATrousNet, ConvDecoder, ConvEncoder, MeshNet, UNet
from cassetta.layers import (
    Conv,
    ConvBlock,
    ConvGroup,
    InstanceNorm,
    LayerNorm,
    LazyConv,
    LazyConvTransposed,
    LazyLinear,
    UpInterpol,
)
from cassetta.models import SegNet

PACKAGE = Path(cassetta.__file__).parent


def train_a_step(net, *inputs):
    """Forward, backward, and a finite gradient for every parameter."""
    out = net(*inputs)
    out.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return out


def noise(channels, *size):
    return torch.randn(2, channels, *size)


def test_import_on_python_3_10_and_3_11():
    """Upstream imports a name of Python 3.12. (The suite itself runs on any Python from 3.10.)"""
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    assert len(sources) > 30
    for source in sources:
        ast.parse(source.read_text(), str(source), feature_version=(3, 10))


def test_norm_instance():
    net = UNet(2, 4, nb_levels=2, norm="instance")
    assert any(isinstance(module, InstanceNorm) for module in net.modules())
    train_a_step(net, noise(4, 8, 8))


@pytest.mark.parametrize("attention", ["sqzex", "cbam", "dp", "sdp", "mha"])
def test_attention_by_name(attention):
    train_a_step(MeshNet(2, 4, nb_layers=2, attention=attention), noise(4, 6, 6))


def test_residual_with_relu_last():
    train_a_step(ConvGroup(2, 4, nb_conv=2, residual=True, activation="ReLU"), noise(4, 6, 6))
    train_a_step(UNet(2, 4, nb_levels=2, residual=True), noise(4, 8, 8))


def test_skip_plus_with_interpolation():
    net = UNet(2, 4, nb_levels=3, skip="+", unpool_mode="interpolate")
    assert train_a_step(net, noise(4, 8, 8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("separable", [True, "crosshair"])
def test_separable(separable):
    train_a_step(ConvGroup(3, 4, nb_conv=2, separable=separable), noise(4, 5, 5, 5))


def test_feature_and_dilation_lists_shorter_than_the_depth():
    net = UNet(2, [4, 6], nb_levels=4)
    assert net.encoder.all_out_channels == [4, 6, 12, 24]
    train_a_step(net, noise(4, 8, 8))
    assert ConvEncoder(2, [4, 6], nb_levels=3).all_out_channels == [4, 6, 12]
    assert ConvDecoder(2, [12, 6], nb_levels=3).all_out_channels == [6, 3]
    net = MeshNet(2, 4, nb_layers=4, nb_conv_per_layer=1, dilation=[1, 3])
    assert [layer[0].conv.dilation[0] for layer in net] == [1, 3, 6, 12]
    train_a_step(net, noise(4, 8, 8))


def test_more_decoder_than_encoder_levels():
    net = UNet(2, 4, nb_levels=2, nb_levels_decoder=4)
    assert train_a_step(net, noise(4, 8, 8)).shape == (2, 1, 32, 32)


def test_atrousnet_with_a_list_of_dilations():
    net = ATrousNet(2, 4, nb_levels=3, dilation=[1, 2, 5])
    assert [branch[0].conv.dilation[0] for branch in net[2]] == [1, 2, 5]
    train_a_step(net, noise(4, 8, 8))


def test_atrousnet_and_modulesum_inside_segnet():
    net = SegNet(2, 1, 3, backbone="ATrousNet", opt_backbone={"nb_features": 4, "nb_levels": 2})
    train_a_step(net, noise(1, 8, 8))
    assert net[1][0].inp_channels == 4


def test_order_strings_that_omit_letters():
    block = ConvBlock(2, 3, 4, norm="batch", order="ca")
    assert block.order == "candx"
    train_a_step(block, noise(3, 6, 6))


def test_integer_dropout_probabilities():
    net = ConvGroup(2, 4, nb_conv=2, dropout=0)
    assert net[0].dropout is None
    assert ConvGroup(2, 4, dropout=1)[0].dropout.p == 1
    train_a_step(ConvGroup(2, 4, nb_conv=1, dropout=1), noise(4, 6, 6))


def test_convdecoder_with_an_integer_skip():
    net = ConvDecoder(2, 8, nb_levels=3, skip=3)
    out = train_a_step(net, noise(8, 2, 2), noise(3, 4, 4), noise(3, 8, 8))
    assert out.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("mode", ["replicate", "mirror", "reflect", "circular", "dst1", "dst2"])
def test_padding_modes_other_than_zeros(mode):
    train_a_step(Conv(2, 3, 4, padding="same", padding_mode=mode), noise(3, 6, 6))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [LazyConv, LazyConvTransposed, LazyLinear])
def test_lazy_layers(kind):
    layer = kind(4)
    layer(noise(3, 6, 6))
    assert type(layer) is kind.cls_to_become
    train_a_step(layer, noise(3, 6, 6))


@pytest.mark.parametrize("skip", [True, "+"])
@pytest.mark.parametrize("size", [(9, 11), (13, 7)])
def test_odd_sizes_with_skips(size, skip):
    net = UNet(2, 4, nb_levels=3, skip=skip)
    assert train_a_step(net, noise(4, *size)).shape == (2, 4, *size)


# what is kept on purpose, and said in the documentation


def test_norm_layer_is_per_channel_group_norm():
    norm = LayerNorm(6)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == norm.num_channels == 6
    assert "checkpoints depend on it" in LayerNorm.__doc__


def test_atrousnet_has_2l_minus_1_stages():
    assert len(ATrousNet(1, 2, nb_levels=4)) == 7
    assert "2L - 1 stages" in ATrousNet.__doc__


def test_meshnet_defaults_to_dilations_1_to_32_with_two_convolutions_each():
    net = MeshNet(1)
    assert [block.conv.dilation[0] for layer in net for block in layer] == [
        d for d in (1, 2, 4, 8, 16, 32) for _ in range(2)
    ]
    assert "1, 2, 4, 8, 16, 32 with **two**" in MeshNet.__doc__


def test_interpolation_darkens_edges():
    assert UpInterpol(1, 1)(torch.ones(1, 1, 3)).flatten().tolist() == [0.75, 1, 1, 1, 1, 0.75]
    assert "edges darken" in UpInterpol.__doc__


def test_unpool_mode_pool_means_interpolation():
    net = UNet(2, 4, nb_levels=2, unpool_mode="pool")
    assert isinstance(net.decoder[0][0], UpInterpol)
    assert '"pool" means "interpolate"' in UNet.__init__.__doc__


def test_fedorovs_meshnet_is_seven_single_convolutions():
    net = MeshNet.preset("fedorov")
    assert [len(layer) for layer in net] == [1] * 7
    assert [layer[0].conv.dilation[0] for layer in net] == [1, 1, 2, 4, 8, 16, 1]
    assert "nb_layers=7, nb_conv_per_layer=1" in MeshNet.__doc__


def test_a_callers_dictionary_is_never_changed():
    options = {"padding_mode": "replicate"}
    ConvBlock(2, 3, 4, optc=options)
    backbone = {"nb_features": 4, "nb_levels": 2}
    SegNet(2, 1, 3, opt_backbone=backbone)
    assert options == {"padding_mode": "replicate"}
    assert backbone == {"nb_features": 4, "nb_levels": 2}
