"""Networks on stand-ins, against runs that really happen."""

import contextlib

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cassetta.backbones import ATrousNet, ConvEncoder, MeshNet, UNet
from cassetta.kernels import dispatch
from cassetta.layers import ConvGroup
from cassetta.models import SegNet
from cassetta.rehearsal import Live, Rehearsal

NETS = {
    "unet": lambda: (UNet(2, 4, nb_levels=3, norm="instance"), (2, 4, 16, 14)),
    "unet, summed": lambda: (
        UNet(2, 4, nb_levels=3, norm=2, skip="+", residual=True), (2, 4, 9, 8),
    ),
    "unet, no norm": lambda: (UNet(3, 4, nb_levels=2, unpool_mode="interpolate"), (1, 4, 8, 8, 6)),
    "meshnet": lambda: (MeshNet(3, 5, nb_layers=2, dropout=0.2), (2, 5, 8, 8, 8)),
    "meshnet, PReLU": lambda: (MeshNet(1, 5, nb_layers=3, activation="PReLU"), (2, 5, 30)),
    "atrous": lambda: (ATrousNet(2, 4, nb_levels=2, residual=True), (2, 4, 16, 16)),
    "atrous, no norm": lambda: (ATrousNet(2, 4, nb_levels=2, norm=None), (2, 4, 16, 16)),
    "encoder": lambda: (ConvEncoder(1, 4, attention="sqzex", activation="GELU"), (2, 4, 32)),
    "segnet": lambda: (SegNet.preset("fedorov", 2), (2, 1, 32, 16)),
    "group": lambda: (ConvGroup(2, 4, nb_conv=3, norm="layer", order="caxnd"), (2, 4, 16, 16)),
    "recurrent": lambda: (
        ConvGroup(2, 4, nb_conv=3, recurrent=True, norm="batch", residual=True), (2, 4, 16, 16),
    ),
}  # fmt: skip


def really(net, shape, fused=False, training=True, dtype=None):
    """The most bytes alive in a step that computes, by the same count of storages."""
    inp = torch.randn(shape)
    engine = dispatch.fused_on_reference() if fused else contextlib.nullcontext()
    net.train(training)
    with Live([*net.parameters(), *net.buffers(), inp]) as live, engine:
        with (
            torch.set_grad_enabled(training),
            torch.autocast("cpu", dtype, enabled=dtype is not None),
        ):
            out = net(inp)
        if training:
            torch.autograd.backward([out], [torch.randn_like(out)])
    net.zero_grad()
    return live.peak


WHOLE = {
    "3-D": lambda: (UNet(3, 32, norm="instance"), (2, 32, 128, 128, 128)),
    "3-D, interpolated": lambda: (
        UNet(3, 32, norm="instance", pool_mode="interpolate", unpool_mode=None),
        (2, 32, 128, 128, 128),
    ),
    "2-D": lambda: (UNet(2, 64, norm="batch"), (8, 64, 512, 512)),
}


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_unet_trains_in_seven_tenths_of_the_memory(name, engine):
    """At most 0.70 of eager, in storages that are alive; what cuDNN takes comes on top of both."""
    net, shape = WHOLE[name]()
    with dispatch.use_engine(engine):
        rehearsal = Rehearsal(net)
        ours, eager = (rehearsal.training_peak(shape, fused=fused) for fused in (True, False))
    assert ours <= 0.70 * eager


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_peaks_are_those_of_a_run(name, fused):
    net, shape = NETS[name]()
    rehearsal = Rehearsal(net)
    assert rehearsal.training_peak(shape, fused=fused) == really(net, shape, fused)
    found = rehearsal.inference_peak(shape, fused=fused)
    assert found == really(net, shape, fused, training=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["unet", "meshnet", "atrous", "segnet"])
def test_peaks_in_mixed_precision(name, fused, dtype):
    """Where torch's stand-ins differ from its CPU: statistics of norms in the lower precision."""
    net, shape = NETS[name]()
    rehearsal = Rehearsal(net, dtype)
    found = rehearsal.training_peak(shape, fused=fused)
    assert found == pytest.approx(really(net, shape, fused, dtype=dtype), rel=0.01)
    assert found < 0.9 * Rehearsal(net).training_peak(shape, fused=fused)


def test_a_chain_by_hand():
    """Each sigmoid keeps what it returns. The image, the output and its gradient live to the end.

    So when the second one to be differentiated is, nothing has died, and two gradients have come.
    """
    net = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid())
    rehearsal = Rehearsal(net)
    image = torch.zeros(2, 3, 50, requires_grad=True)
    one = image.nbytes
    assert rehearsal.inference_peak((2, 3, 50)) == 3 * one  # the image, an input and an output
    assert rehearsal.training_peak((2, 3, 50)) == 3 * one  # nobody asked for a gradient
    assert rehearsal.training_peak(image) == (1 + 3 + 3) * one
    assert image.grad is None


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11
def test_the_allocator_agrees_where_operations_need_no_workspace():
    net = nn.Sequential(*[layer for _ in range(4) for layer in (nn.PReLU(8), nn.GroupNorm(2, 8))])
    inp = torch.randn(4, 8, 5000)
    given = sum(t.nbytes for t in (inp, *net.parameters(), *net.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = net(inp)
        torch.autograd.backward([out], [torch.empty_like(out)])
    peak = now = given
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert Rehearsal(net).training_peak(inp) == pytest.approx(peak, rel=0.01)


def test_a_storage_counts_once_and_until_it_dies():
    held = torch.zeros(10)
    with Live([held, held[2:]]) as live:
        assert live.now == 40
        view = (held + 1)[3:].reshape(7, 1)
        assert live.now == 80
        del view
        assert (live.now, live.peak) == (40, 80)
        held.add_(1)
        assert (live.now, live.peak) == (40, 80)


class Frozen(nn.Sequential):
    """A network whose first part is in evaluation for good."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def test_nothing_is_changed():
    net = Frozen(MeshNet(2, 4, nb_layers=2, dropout=0.2), MeshNet(2, 4, nb_layers=2)).train()
    net[1][0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    rehearsal = Rehearsal(net, torch.bfloat16)
    for fused in (False, True):
        rehearsal.training_peak((2, 4, 8, 8), fused=fused)
        rehearsal.inference_peak((2, 4, 8, 8), fused=fused)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    assert dispatch.why_reference() is not None


def test_what_is_refused_leaves_the_mode_as_it_was():
    net = UNet(2, 4, nb_levels=3)
    rehearsal = Rehearsal(net)
    for peak in (rehearsal.training_peak, rehearsal.inference_peak):
        with pytest.raises(ValueError, match="3 levels need"):
            peak((1, 4, 2, 2))
        assert net.training
    with pytest.raises(ValueError, match=r"inputs\[0\]\[1\]=-4 is too small"):
        rehearsal((1, -4, 2, 2))
    with pytest.raises(ValueError, match="autocast=torch.float64 is unknown"):
        Rehearsal(net, torch.float64)


def test_frozen_parameters_have_no_gradient_and_no_optimizer():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    weights = 4 * 4 * 9 * 4
    assert Rehearsal(net).optimizer_bytes == 2 * 2 * weights
    net[0].requires_grad_(False)
    assert Rehearsal(net).optimizer_bytes == 2 * weights
    assert Rehearsal(net).training_peak((1, 4, 8, 8)) == really(net, (1, 4, 8, 8))


def test_within_no_grad_the_step_has_its_gradients():
    net, shape = NETS["meshnet"]()
    rehearsal = Rehearsal(net)
    expected = rehearsal.training_peak(shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert rehearsal.training_peak(shape) == expected
