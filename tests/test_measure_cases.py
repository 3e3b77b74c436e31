"""The cases: what is built is what was published, and the plain twin computes the same."""

import pytest
import torch
from torch import nn

import cassetta
from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch
from cassetta.layers import ConvBlock
from cassetta.measure import cases, timing, twins

NETWORKS = [case.name for case in cases.select(["network"])]
PARAMETERS = {
    "fedorov": 72_516,
    "model5_gw_ae": 5_598,
    "mindgrab": 146_237,
    "meshnet26": 147_474,
    "model30chan18cls": 196_038,
    "monai-basicunet": 5_749_410,  # monai 1.6.1
    # dynamic-network-architectures 0.4.4 without the four heads of deep supervision
    "nnunet-plain": 31_195_594 - 2 * (320 + 256 + 128 + 64 + 4),
}


def steps(case):
    """A network that has done a step on its small image, the image, and the output."""
    net = case.make()
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    image = torch.randn(case.small, requires_grad=case.inner)
    out = net(image)
    out.backward(torch.randn_like(out))
    return net, image, out


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_and_its_twin(name):
    case = cases.find(name)
    net, image, out = steps(case)
    assert all(p.grad is not None for p in net.parameters())
    assert (image.grad is not None) == case.inner
    if name in PARAMETERS:
        assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    twin = twins.plain(net)
    assert {*twin.parameters()} == {*net.parameters()}
    assert not any(type(m).__module__.startswith("cassetta.layers") for m in twin.modules())
    with torch.no_grad():
        torch.testing.assert_close(twin(image), out, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_predicted_to_be_kept_is_what_bench_measures(name):
    """To the byte: `kept_mib` of every case, in plain PyTorch and fused."""
    case = cases.find(name)
    net, image = case.make(), torch.randn(case.small)
    predicted = cassetta.summary(net, case.small)
    plain = timing.kept_bytes(lambda: net(image), net.parameters())
    with dispatch.fused_on_reference():
        fused = timing.kept_bytes(lambda: net(image), net.parameters())
    assert (predicted.kept_bytes, predicted.fused_bytes) == (plain, fused)


def test_blocks_and_their_twins():
    blocks = cases.select(["block"])
    assert len(blocks) == 8 * 6
    for case in blocks:
        net, image, out = steps(case)
        torch.testing.assert_close(twins.plain(net)(image), out, rtol=0, atol=0)


def test_the_gradients_of_a_twin():
    net, image, out = steps(cases.find("meshnet"))
    seed, gradients = torch.randn_like(out), []
    for module in (net, twins.plain(net)):
        net.zero_grad()
        module(image).backward(seed)
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_twin_is_in_the_mode_of_its_network():
    net = cases.find("fedorov").make().eval()
    assert not any(module.training for module in twins.plain(net).modules())


@pytest.mark.parametrize(
    "net",
    [
        UNet(3, 2, nb_levels=2, skip="+"),
        ConvBlock(2, 4, 4, attention="sqzex"),
        ConvBlock(2, 4, 4, optc={"padding_mode": "mirror"}),
        MeshNet(2, [4, 6], nb_layers=2, nb_conv_per_layer=1).append(nn.Conv2d(6, 6, 1)),
    ],
    ids=lambda net: type(net).__name__,
)
def test_what_has_no_twin_is_refused(net):
    with pytest.raises(TypeError, match="has no plain twin: add it to measure/twins.py"):
        twins.plain(net)


def test_the_most_decisive_come_first():
    assert cases.NAMES[:3] == ("meshnet", "unet3d-instance", "block-32-d1")
    assert len(set(cases.NAMES)) == len(cases.NAMES)
    assert {cases.find(name).group for name in cases.NAMES} == set(cases.GROUPS)


def test_cases_are_selected_by_name_and_by_group():
    chosen = cases.select(["pass", "unet2d", "meshnet", "meshnet"])
    assert [case.name for case in chosen] == ["meshnet", "passes-32", "passes-21", "unet2d"]
    with pytest.raises(ValueError, match="name='mesnet' is no case: 'meshnet' is one"):
        cases.select(["mesnet"])
