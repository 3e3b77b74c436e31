"""What a network costs, against a run that really happens."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cassetta
from cassetta.backbones import ATrousNet, ConvEncoder, MeshNet, UNet
from cassetta.kernels import dispatch
from cassetta.layers import ConvGroup
from cassetta.models import SegNet

NETS = {
    "unet": lambda: UNet(2, 4, nb_levels=3, norm="instance"),
    "meshnet": lambda: MeshNet(3, 5, nb_layers=2, norm="batch", dropout=0.2),
    "atrous": lambda: ATrousNet(2, 4, nb_levels=2, residual=True),
    "encoder": lambda: ConvEncoder(1, 4, attention="sqzex", activation="GELU"),
    "segnet": lambda: SegNet(2, 3, 2, opt_backbone={"nb_features": 4, "nb_levels": 2}),
    "recurrent": lambda: ConvGroup(2, 4, nb_conv=3, recurrent=True, norm=2),
}


def shape(net):
    return (2, net.inp_channels, *[16] * NDIM[type(net).__name__])


NDIM = {"UNet": 2, "MeshNet": 3, "ATrousNet": 2, "ConvEncoder": 1, "SegNet": 2, "ConvGroup": 2}


def really(net, inp, fused=False, dtype=None):
    """Operations, and bytes kept for backward beyond the parameters, of a run on the CPU."""
    engine = dispatch.fused_on_reference() if fused else contextlib.nullcontext()
    # its hooks on modules would end the fusion
    flops = contextlib.nullcontext() if fused else FlopCounterMode(display=False)
    held = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage
        return tensor

    with (
        flops,
        engine,
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        net(inp)
    operations = None if fused else flops.get_total_flops()
    return operations, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", NETS)
def test_counts_are_those_of_a_run(name):
    net = NETS[name]()
    found = cassetta.summary(net, shape(net))
    flops, kept = really(net, torch.randn(shape(net)))
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.flops == flops
    assert found.kept_bytes == pytest.approx(kept, rel=0.01)


KEEP = {
    "unet": lambda norm: (UNet(2, 4, nb_levels=3, norm=norm), (2, 4, 16, 16)),
    "meshnet": lambda norm: (MeshNet(3, 4, nb_layers=2, norm=norm), (2, 4, 8, 8, 8)),
    "atrous": lambda norm: (ATrousNet(2, 4, nb_levels=2, norm=norm), (2, 4, 16, 16)),
    "group": lambda norm: (
        ConvGroup(2, 4, nb_conv=3, norm=norm, activation="GELU"),
        (2, 4, 16, 16),
    ),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "instance", 2, None], ids=str)
@pytest.mark.parametrize("name", KEEP)
def test_what_is_kept_is_what_hooks_see(name, norm, dtype):
    """To the byte; in mixed precision torch's stand-ins round the statistics of plain norms too."""
    net, shape = KEEP[name](norm)
    inp = torch.randn(shape)
    found = cassetta.summary(net, shape, autocast=dtype)
    _, plain = really(net, inp, dtype=dtype)
    _, fused = really(net, inp, fused=True, dtype=dtype)
    assert found.kept_bytes == (plain if dtype is None else pytest.approx(plain, rel=0.01))
    assert found.fused_bytes == fused
    if norm is not None:
        assert fused < 0.9 * plain


def test_a_fused_convolution_by_hand():
    """Per block what leaves its convolution is kept; and by the first one, its input."""
    net = ConvGroup(3, 8, nb_conv=2, norm="instance", order="cndax")
    one = 8 * 16**3 * 4
    found = cassetta.summary(net, (1, 8, 16, 16, 16))
    assert [row.name for row in found] == ["0", "1"]
    for row, images in zip(found, (2, 1), strict=True):
        assert row.fused_bytes == pytest.approx(images * one, rel=0.03)


def test_a_convolution_by_hand():
    net = nn.Sequential(cassetta.layers.Conv(2, 3, 5, padding="same"))
    (row,) = cassetta.summary(net, (2, 3, 8, 8))
    assert row.shape == (2, 5, 8, 8)
    assert row.parameters == 5 * 3 * 9 + 5
    assert row.flops == 2 * 5 * 3 * 9 * 2 * 64
    assert row.kept_bytes == 2 * 3 * 64 * 4  # its input, for the gradient of the weights


def test_one_row_per_block():
    found = cassetta.summary(NETS["segnet"](), (1, 3, 8, 8))
    assert [row.kind for row in found] == [
        "ConvBlock", "ConvBlock", "ConvBlock", "DownPool", "ConvBlock", "ConvBlock", "UpConv",
        "ConvBlock", "ConvBlock", "ConvBlock",
    ]  # fmt: skip
    assert found[0].name == "0"
    assert found[3].name == "1.encoder.1.0"
    assert len(found) == 10


class Tied(nn.Module):
    """Two parts that share a block, and an operation and a parameter between them."""

    def __init__(self):
        super().__init__()
        block = ConvGroup(2, 4, norm=2)
        self.one, self.two = nn.Sequential(block, nn.PReLU()), nn.Sequential(block)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, inp):
        return torch.einsum("oc,bcxy->boxy", self.scale, self.two(self.one(inp)))


def test_what_is_shared_counts_once_and_what_lies_between_blocks_counts_too():
    net = Tied()
    found = cassetta.summary(net, (2, 4, 8, 8))
    flops, kept = really(net, torch.randn(2, 4, 8, 8))
    assert [row.name for row in found] == ["one.0.0", "one.1", "(between blocks)"]
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert (found.flops, found.kept_bytes) == (flops, kept)
    assert found[0].flops == 2 * 2 * (2 * 4 * 4 * 9 * 64)
    assert found[-1].parameters == 16
    assert found[-1].flops == 2 * 2 * 4 * 4 * 64


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", ["cndax", "nacdx"])
def test_what_a_block_keeps_is_counted_as_its_own(order, residual):
    """Also what its group computes for it, without asking it, as it has decided before."""
    options = {"norm": "batch", "attention": "sqzex", "dropout": 0.2, "residual": residual}
    net = ConvGroup(2, 8, nb_conv=3, order=order, **options)
    found = [[*cassetta.summary(net, (2, 8, 6, 6))] for _ in range(2)]
    assert found[0] == found[1]
    assert [row.name for row in found[0]] == ["0", "1", "2"]


def test_a_layer_without_a_shape_is_refused():
    with pytest.raises(ValueError, match="call it once on an image first"):
        cassetta.summary(nn.Sequential(cassetta.layers.LazyConv(3)), (1, 2, 8, 8))


def test_prints_as_a_table():
    text = str(cassetta.summary(NETS["unet"](), torch.randn(1, 4, 16, 16)))
    assert "encoder.0.0" in text
    assert "total" in text
    assert "fused MiB" in text
    assert "workspaces of cuDNN" in text
    for row in ("training", "inference"):
        assert any(line.startswith(row) for line in text.splitlines())
    assert "cassetta.explain" in text


@pytest.mark.parametrize("name", ["meshnet", "recurrent"])
def test_nothing_is_changed(name):
    net = NETS[name]()
    net[-1].eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    cassetta.summary(net, shape(net))
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert [module.training for module in net.modules()] == modes


def test_an_image_that_does_not_fit_leaves_no_hooks():
    net = NETS["unet"]()
    with pytest.raises(ValueError, match="3 levels need"):
        cassetta.summary(net, (1, 4, 2, 2))
    assert not any(m._forward_hooks for m in net.modules())


def test_a_huge_network_costs_nothing_to_look_at():
    net = SegNet.preset("mindgrab")
    found = cassetta.summary(net, (1, 1, 256, 256, 256))
    assert found.flops == pytest.approx(4.9e12, rel=0.01)


def test_a_frozen_network_keeps_what_it_keeps():
    net = NETS["meshnet"]().requires_grad_(False)
    found = cassetta.summary(net, shape(net))
    assert (found.kept_bytes, found.fused_bytes, found.optimizer_bytes) == (0, 0, 0)
    assert found.parameters == sum(p.numel() for p in net.parameters())


def test_the_peaks_are_in_order():
    """A step holds more than the parameters and what is kept, and inference less."""
    net = NETS["unet"]()
    found = cassetta.summary(net, shape(net))
    weights = 4 * found.parameters
    assert found.optimizer_bytes == 2 * weights
    assert found.peak_bytes > found.kept_bytes + weights
    assert found.fused_peak_bytes > found.fused_bytes + weights
    assert found.fused_peak_bytes < found.peak_bytes
    assert weights < found.inference_peak_bytes < found.kept_bytes + weights
    assert weights < found.fused_inference_peak_bytes < found.fused_bytes + weights
