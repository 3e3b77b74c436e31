"""SegNet."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cassetta.backbones import ATrousNet, MeshNet
from cassetta.layers import ConvGroup, ModuleSum
from cassetta.models import SegNet

from compare import assert_near, image

SMALL = {
    "UNet": {"nb_features": 4, "nb_levels": 2},
    "MeshNet": {"nb_features": 4, "nb_layers": 2},
    "ATrousNet": {"nb_features": 4, "nb_levels": 2},
    "ConvEncoder": {"nb_features": 4, "nb_levels": 2},
    "ConvDecoder": {"nb_features": 4, "nb_levels": 2},
}


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_backbone_by_name(ndim, backbone):
    net = SegNet(ndim, 2, 3, backbone=backbone, opt_backbone=SMALL[backbone]).eval()
    out = net(torch.randn(1, 2, *[8] * ndim))
    assert out.shape[:2] == (1, 3)
    torch.testing.assert_close(out.sum(1), torch.ones_like(out[:, 0]))
    assert (net.inp_channels, net.out_channels) == (2, 3)


def test_it_is_features_backbone_and_classes():
    net = SegNet(2, 1, 3, opt_backbone=SMALL["UNet"]).double()
    inp = image(1, 1, 8, 8)
    features, backbone, head = net
    assert features.activation is None
    logits = head.conv(backbone(features(inp)))
    assert_near(net.predict_logits(inp), logits)
    assert_near(net(inp), logits.softmax(1))
    raw = SegNet(2, 1, 3, activation=None, opt_backbone=SMALL["UNet"]).double()
    raw.load_state_dict(net.state_dict())
    assert_near(raw(inp), logits)
    assert_near(raw.predict_logits(inp), logits)


@pytest.mark.parametrize(
    "backbone",
    [
        MeshNet(2, 4, nb_layers=2),
        ATrousNet(2, 4, nb_levels=2),
        ModuleSum([ConvGroup(2, 4), ConvGroup(2, 4)]),
        MeshNet,
    ],
    ids=["MeshNet", "ATrousNet", "ModuleSum", "class"],
)
def test_any_backbone(backbone):
    """Upstream cannot tell how many channels an ATrousNet, or any ModuleSum, takes."""
    net = SegNet(2, 1, 3, backbone=backbone)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 3, 8, 8)


def test_options_of_the_backbone_stay_as_they_are():
    options = {"nb_features": 4, "nb_levels": 2}
    net = SegNet(2, 1, 3, opt_backbone=options)
    assert options == {"nb_features": 4, "nb_levels": 2}
    options["nb_features"] = 7
    assert net.serialize()["kwargs"]["opt_backbone"]["nb_features"] == 4


def test_copies_and_pickles():
    net = SegNet(2, 1, 3, backbone="MeshNet", opt_backbone=SMALL["MeshNet"]).eval()
    inp = torch.randn(1, 1, 8, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_near(twin(inp), net(inp))


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"backbone": "Unett"}, "backbone='Unett'.*'UNet'"),
        (ValueError, {"backbone": "os"}, "backbone='os'"),
        (TypeError, {"backbone": 3}, "backbone=3"),
        (TypeError, {"backbone": nn.Identity()}, "backbone=Identity.*inp_channels"),
        (ValueError, {"backbone": ConvGroup(2, 4), "opt_backbone": {"norm": 1}}, "opt_backbone"),
        (TypeError, {"opt_backbone": {"nb_featurs": 4}}, "nb_featurs"),
        (ValueError, {"activation": "Softmaxx"}, "activation='Softmaxx'"),
        (ValueError, {"out_channels": 0}, "out_channels=0"),
        (ValueError, {"inp_channels": -1}, "inp_channels=-1"),
        (ValueError, {"ndim": 4}, "ndim=4"),
    ],
    ids=str,
)
def test_bad_arguments(error, options, message):
    with pytest.raises(error, match=message):
        SegNet(**{"ndim": 2, "inp_channels": 1, "out_channels": 3, **options})


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8\).*\(batch, 1, W, H\)"):
        SegNet(2, 1, 3, opt_backbone=SMALL["UNet"])(torch.ones(1, 2, 8, 8))


def test_parts_may_be_exchanged_for_any_module():
    inp = torch.randn(2, 1, 8, 8)
    net = SegNet(2, 1, 2, backbone="MeshNet")
    net[0] = nn.Conv2d(1, 21, 3, padding=1)
    assert net(inp).shape == (2, 2, 8, 8)
    net[2] = nn.Conv2d(21, 5, 1)
    assert net(inp).shape == net.predict_logits(inp).shape == (2, 5, 8, 8)


def test_a_small_image_is_refused_before_the_features_are_counted():
    net = SegNet(2, 1, 2, opt_features={"norm": "batch"})
    with pytest.raises(ValueError, match="levels need"):
        net(torch.ones(2, 1, 3, 3))
    assert net[0].norm.num_batches_tracked == 0
