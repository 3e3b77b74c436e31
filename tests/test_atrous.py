"""Networks of dilated convolutions, and the published ones."""

import pytest
import torch

from cassetta.backbones import ATrousNet, MeshNet
from cassetta.backbones.presets import PRESETS
from cassetta.models import SegNet

from compare import assert_gradients, assert_near, image

SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}


def dilations(net):
    return [block.conv.dilation[0] for layer in net for block in layer]


def nb_parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", [MeshNet, ATrousNet])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients(ndim, kind, residual):
    depth = {MeshNet: "nb_layers", ATrousNet: "nb_levels"}[kind]
    net = kind(ndim, 3, residual=residual, activation="ELU", **{depth: 2})
    inp = image(2, 3, *SIZES[ndim])
    assert net.double()(inp).shape == inp.shape
    assert_gradients(net, inp)


def test_meshnet_is_a_chain():
    net = MeshNet(2, 4, nb_layers=3, residual=True).double()
    inp = step = image(2, 4, 9, 8)
    every = net(inp, return_all=True)
    for layer, out in zip(net, every, strict=True):
        step = layer(step) + step
        assert_near(out, step)
    assert net.all_out_channels == [4, 4, 4]


def test_atrousnet_sums_branches():
    net = ATrousNet(2, 4, nb_levels=2).double().eval()
    inp = image(1, 4, 9, 8)
    (one,), (two, three), (four,) = net
    middle = one(inp)
    assert_near(net(inp), four(two(middle) + three(middle)))
    assert len(net(inp, return_all=True)) == 3


def test_meshnet_defaults_are_upstreams():
    net = MeshNet(3)
    assert dilations(net) == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32]
    assert nb_parameters(net) == 143_640
    assert net[0][0].order == "caxnd"
    assert (net.inp_channels, net.out_channels) == (21, 21)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_atrousnet_has_twice_its_levels_minus_one_stages(levels):
    net = ATrousNet(1, 2, nb_levels=levels, nb_conv_per_level=1)
    counts = [*range(1, levels + 1), *range(levels - 1, 0, -1)]
    assert [len(stage) for stage in net] == counts
    assert [dilations(stage) for stage in net] == [[2**n for n in range(c)] for c in counts]
    assert "2L - 1 stages" in ATrousNet.__doc__


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dilation": [1, 2], "nb_layers": 5}, [1, 2, 4, 8, 16]),
        ({"dilation": [1, 2, 5], "nb_layers": 5, "mul_dilation": 3}, [1, 2, 5, 15, 45]),
        ({"dilation": [1, 2, 5, 9], "nb_layers": 3}, [1, 2, 5]),
        ({"dilation": 3, "nb_layers": 3}, [3, 6, 12]),
        ({"dilation": 2, "nb_layers": 4, "mul_dilation": 1.5}, [2, 3, 4, 6]),
        ({"dilation": [1, 1, 2, 4, 8, 16, 1], "nb_layers": 7}, [1, 1, 2, 4, 8, 16, 1]),
    ],
    ids=str,
)
def test_dilations_of_meshnet(options, expected):
    """Upstream fails on a list that is shorter than the number of layers."""
    assert dilations(MeshNet(1, 2, nb_conv_per_layer=1, **options)) == expected


@pytest.mark.parametrize("dilation", [[1, 2, 4], [1, 2], [3]])
def test_dilations_of_atrousnet(dilation):
    """Upstream's ATrousNet fails on any list of dilations."""
    net = ATrousNet(1, 2, nb_levels=3, nb_conv_per_level=1, dilation=dilation)
    expected = {"[1, 2, 4]": [1, 2, 4], "[1, 2]": [1, 2, 4], "[3]": [3, 6, 12]}[str(dilation)]
    assert dilations(net[2]) == expected


@pytest.mark.parametrize("kind", [MeshNet, ATrousNet])
def test_features_of_each_layer(kind):
    depth = {MeshNet: "nb_layers", ATrousNet: "nb_levels"}[kind]
    net = kind(2, [2, 4, 3], **{depth: 4})
    assert (net.inp_channels, net.all_out_channels[:4]) == (2, [2, 4, 3, 3])
    assert net(torch.randn(2, 2, 7, 7)).shape == (2, net.out_channels, 7, 7)
    with pytest.raises(ValueError, match=r"residual=True.*\[2, 4, 3\]"):
        kind(2, [2, 4, 3], residual=True, **{depth: 4})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_published_number_of_parameters(name):
    preset = PRESETS[name]
    net = SegNet.preset(name)
    assert nb_parameters(net) == preset.nb_parameters
    published = [net[0].conv.dilation[0], *dilations(net[1])]
    assert published == list(preset.dilation)
    backbone = MeshNet.preset(name)
    assert dilations(backbone) == list(preset.dilation)
    assert backbone.inp_channels == backbone.out_channels == preset.nb_features


def test_fedorov_as_the_design_states_it():
    stated = MeshNet(3, nb_layers=7, nb_conv_per_layer=1, dilation=[1, 1, 2, 4, 8, 16, 1])
    assert nb_parameters(stated) == nb_parameters(MeshNet.preset("fedorov")) == 83_790


def test_hdc_deep_without_its_norms_has_the_stated_size():
    net = SegNet.preset("hdc_deep16")
    assert sum(p.numel() for n, p in net.named_parameters() if ".norm." not in n) == 83_682


@pytest.mark.parametrize("name", ["mindgrab", "fedorov", "model5_gw_ae"])
def test_presets_run_and_are_saved(name, tmp_path):
    net = SegNet.preset(name, ndim=2).eval()
    inp = torch.randn(1, 1, 12, 12)
    net.save(tmp_path / "net.pt")
    assert_near(SegNet.load_from(tmp_path / "net.pt").eval()(inp), net(inp))
    assert net[0].norm is None or net[0].norm is not net[1][0][0].norm


def test_presets_can_be_changed():
    net = MeshNet.preset("MindGrab", ndim=2, nb_features=4, norm="batch")
    assert net(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8)
    assert SegNet.preset("meshnet-26", out_channels=7, inp_channels=2).out_channels == 7
    with pytest.raises(ValueError, match="name='mindgrap'.*'mindgrab'"):
        MeshNet.preset("mindgrap")


@pytest.mark.parametrize(
    ("error", "kind", "options", "message"),
    [
        (ValueError, MeshNet, {"nb_layers": 0}, "nb_layers=0"),
        (ValueError, MeshNet, {"dilation": 0}, "dilation=0"),
        (ValueError, MeshNet, {"dilation": [1, -1]}, r"dilation\[1\]=-1"),
        (ValueError, MeshNet, {"mul_dilation": 0}, "mul_dilation=0"),
        (ValueError, MeshNet, {"nb_features": -5}, "nb_features=-5"),
        (ValueError, MeshNet, {"nb_conv_per_layer": 0}, "nb_conv=0"),
        (TypeError, ATrousNet, {"nb_levels": 2.5}, "nb_levels=2.5"),
        (ValueError, ATrousNet, {"norm": 4}, "norm=4"),
    ],
    ids=str,
)
def test_bad_arguments(error, kind, options, message):
    with pytest.raises(error, match=message):
        kind(2, **options)


@pytest.mark.parametrize("kind", [MeshNet, ATrousNet])
def test_bad_input(kind):
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\).*\(batch, 21, W, H\)"):
        kind(2)(torch.ones(1, 4, 8, 8))
