"""Blocks whose convolution was exchanged for another, and what users do with what a block returns:
each engine equals torch, or leaves it to one that does and says why."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import cassetta
from cassetta.backbones import UNet
from cassetta.functional import Product, convolved, defer
from cassetta.kernels import configs, dispatch, evidence, ops, precision
from cassetta.kernels.types import NOTHING, Geometry
from cassetta.layers import BatchNorm, Conv, ConvBlock, ConvGroup, DownConv, UpConv, fusing

STRIDED = {
    "stride 2 of size 3": {"kernel_size": 3, "stride": 2, "padding": 1},
    "stride 2 of size 2, padded": {"kernel_size": 2, "stride": 2, "padding": 1},
    "stride 2 of size 2, dilated": {"kernel_size": 2, "stride": 2, "dilation": 2},
    "stride 3 of size 2": {"kernel_size": 2, "stride": 3},
    "stride 2 of size 1": {"kernel_size": 1, "stride": 2},
    "a stride along one axis": {"kernel_size": [3, 2], "stride": [1, 2], "padding": [1, 0]},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
}
COVERED = {
    "stride 2 of size 2": {"kernel_size": 2, "stride": 2},
    "size 2, stride along one axis": {"kernel_size": [1, 2], "stride": [1, 2]},
    "padded by more than it reads": {"kernel_size": 3, "padding": 4},
    "unpadded": {"kernel_size": [3, 1], "dilation": [2, 5]},
}


def block_of(options, **more):
    block = ConvBlock(2, 4, 4, **more)
    block.conv = Conv(2, 4, 4, **options)
    return block


def step(net, inp):
    """Output and all gradients."""
    inp = inp.detach().requires_grad_()
    out = net(inp)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    grads = torch.autograd.grad(out, [inp, *net.parameters()], cotangent.to(out.dtype))
    return [out.detach(), *grads]


def assert_as_torch(net, device, engine):
    net, inp = net.to(device), torch.randn(2, 4, 9, 8, device=device)
    with dispatch.use_backend("reference"):
        expected = step(copy.deepcopy(net).double(), inp.double())
    with dispatch.use_engine(engine):
        found = step(net, inp)
    assert_close(found, expected)


def assert_close(found, expected):
    """To rounding of sums in float32; what is zero by theory, on the scale of the others."""
    largest = max(one.abs().max().item() for one in expected)
    for ours, truth in zip(found, expected, strict=True):
        scale = max(truth.abs().max().item(), 0.1 * largest)
        torch.testing.assert_close(ours.to(truth.dtype), truth, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("name", [*STRIDED, *COVERED])
def test_convolutions_that_were_exchanged(name, engine, kernels):
    block = block_of({**STRIDED, **COVERED}[name], norm="batch", activation="SiLU").to(kernels)
    with dispatch.use_engine(engine):
        (row,) = cassetta.explain(block, torch.randn(2, 4, 9, 8, device=kernels))
    assert row.engine == ("library" if name in STRIDED else engine)
    if name in STRIDED and engine == "gemm":
        assert "'gemm' was asked for, but our own convolutions have" in row.evidence
    assert_as_torch(block, kernels, engine)


def test_the_table_tells_how_a_convolution_walks():
    """So that what was measured of one is not taken for another."""
    x = defer(torch.randn(1, 4, 8, 8))
    options = [{"kernel_size": 3, "padding": "same"}, {"kernel_size": 3, "padding": 1}]
    options += [{"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 3, "padding": 2}]
    options += [{"kernel_size": 3, "padding": 1, "dilation": 2}, STRIDED["groups"]]
    blocks = [block_of(one) for one in options]
    keys = {fusing.key(", ".join(fusing.words({"c": one.conv})), x) for one in blocks}
    assert len(keys) == len(options)


def test_what_was_measured_is_not_taken_where_it_cannot_run(kernels, monkeypatch):
    """A record of an engine that has no kernel for this geometry, from wherever it comes."""
    block, inp = block_of(STRIDED["stride 2 of size 3"]).to(kernels), torch.randn(1, 4, 8, 8)
    record = evidence.Record("gemm", {"gemm": 1.0}, {})
    monkeypatch.setattr(evidence.Table, "find", lambda self, key: record)
    monkeypatch.setattr(dispatch, "_without_measurement", lambda x, why=None: None)
    (row,) = cassetta.explain(block, inp.to(kernels))
    assert row.engine != "gemm"


@pytest.mark.parametrize("name", STRIDED)
def test_whoever_asks_for_our_own_convolution_is_refused(name):
    """Before anything is computed, forward; and no operator forgets that there are groups."""
    conv, x = Conv(2, 4, 4, **STRIDED[name]), torch.randn(1, 4, 9, 8)
    with dispatch.fused_on_reference(), pytest.raises(ValueError, match="convolutions have"):
        convolved(defer(x), Product("gemm", conv.geometry), conv.weight, None)
    if name == "groups":
        with pytest.raises(ValueError, match="groups=2"):
            ops.conv_fprop(x, NOTHING, conv.weight, None, conv.geometry)
        with pytest.raises(ValueError, match="groups=2"):
            ops.conv_wgrad(conv(x), x, NOTHING, conv.kernel_size, conv.geometry)


@pytest.mark.parametrize("name", STRIDED)
def test_kernels_refuse_what_they_would_compute_wrongly(name, kernels):
    conv_dgrad = importlib.import_module("cassetta.kernels.conv_dgrad")
    conv = Conv(2, 4, 4, **STRIDED[name])
    geometry, taps, x = conv.geometry, conv.kernel_size, torch.randn(1, 4, 9, 8)
    assert configs.why_no_product(geometry, taps)
    with pytest.raises(ValueError, match="our own convolutions have"):
        conv_dgrad.conv_dgrad(conv(x), conv.weight.detach(), geometry, (9, 8))
    if name != "groups":
        with pytest.raises(ValueError, match="transposed convolution strides by its size"):
            conv_dgrad.conv_transposed(x, NOTHING, conv.weight.detach(), None, geometry)


def test_a_padded_tap_is_no_transposed_convolution(kernels):
    conv_dgrad = importlib.import_module("cassetta.kernels.conv_dgrad")
    geometry = Geometry((1,), ((5, 0),), (1,))
    with pytest.raises(ValueError, match="strides by its size"):
        conv_dgrad.conv_transposed(
            torch.randn(1, 4, 8), NOTHING, torch.randn(4, 4, 1), None, geometry
        )


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("kind", ["strided", "expanded", "of a matrix"])
@pytest.mark.parametrize("layer", ["block", "up", "down", "norm", "prelu"])
def test_parameters_that_are_no_dense_vectors(layer, kind, engine, kernels):
    make = {
        "strided": lambda: torch.randn(8, device=kernels)[::2],
        "expanded": lambda: torch.randn(1, device=kernels).expand(4),
        "of a matrix": lambda: torch.randn(4, 3, device=kernels)[:, 1],
    }[kind]
    net = {
        "block": lambda: ConvBlock(2, 4, 4, norm="batch", activation="SiLU"),
        "norm": lambda: ConvGroup(2, 4, nb_conv=2, norm="batch"),
        "prelu": lambda: ConvBlock(2, 4, 4, activation=nn.PReLU(4)),
        "up": lambda: UpConv(2, 4, 4),
        "down": lambda: DownConv(2, 4, 4),
    }[layer]().to(kernels)
    for module in net.modules():
        if layer == "prelu" and isinstance(module, nn.PReLU):
            module.weight = nn.Parameter(make())
        elif layer == "norm" and isinstance(module, BatchNorm):
            module.weight, module.bias = nn.Parameter(make()), nn.Parameter(make())
        elif getattr(module, "bias", None) is not None and layer not in ("prelu", "norm"):
            module.bias = nn.Parameter(make())
    assert any(not p.is_contiguous() or 0 in p.stride() for p in net.parameters())
    assert_as_torch(net, kernels, engine)


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("name", ["block", "no norm", "up", "down", "pool", "interpolation"])
def test_what_a_module_returns_may_be_changed_in_place(name, channels, last, engine, kernels):
    c = channels
    net = {
        "block": lambda: ConvBlock(2, 4, c, norm="batch", activation="ELU"),
        "no norm": lambda: ConvBlock(2, 4, c, activation="SiLU"),
        "up": lambda: UpConv(2, 4, c),
        "down": lambda: DownConv(2, 4, c),
        "pool": lambda: cassetta.layers.DownPool(2, 4, c),
        "interpolation": lambda: cassetta.layers.UpInterpol(2, 4, c),
    }[name]()
    net, inp = nn.Sequential(net, nn.ReLU(inplace=True)).to(kernels), torch.randn(2, 4, 6, 6)
    inp = (inp.movedim(1, -1).contiguous().movedim(-1, 1) if last else inp).to(kernels)
    expected = nn.Sequential(net[0], nn.ReLU())
    with dispatch.use_backend("reference"):
        truth = step(expected, inp)
    with dispatch.use_engine(engine):
        found = step(net, inp)
    assert_close(found, truth)


@pytest.mark.parametrize("engine", ["library", "gemm"])
def test_a_result_that_backward_needs_is_not_changed_unseen(engine, kernels):
    """An activation that is told by its result keeps that: torch says so, as of its own ReLU."""
    block = ConvBlock(2, 4, 4, activation="LeakyReLU").to(kernels)
    with dispatch.use_engine(engine), pytest.raises(RuntimeError, match="in-?place"):
        block(torch.randn(1, 4, 5, 5, device=kernels)).add_(1).sum().backward()


def test_a_result_that_is_too_large_stays_with_torch():
    nets = UpConv(2, 4, 4), block_of({"kernel_size": 1, "padding": 2**14})
    with FakeTensorMode(allow_non_fake_inputs=True), dispatch.fused_on_reference():
        inp = torch.empty(1).expand(1, 4, 2**15, 2**15)
        for net in nets:
            with fusing.listening(False) as log:
                net(inp)
            assert "more voxels than 31 bits count" in log[0].choice.reason


@pytest.fixture
def switches():
    """Left as they were found."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):
        pytest.skip("this torch has the old switch only")
    places = [cudnn.conv, cudnn.rnn, matmul, cudnn, torch.backends]
    before = [place.fp32_precision for place in places]
    yield cudnn, matmul
    for place, how in zip(places, before, strict=True):
        place.fp32_precision = how


def test_the_new_switch_of_precision(kernels, switches):
    """torch 2.9 and newer; then its old one cannot be read any more."""
    cudnn, _ = switches
    cudnn.conv.fp32_precision = "ieee"
    assert_as_torch(UNet(2, 4, nb_levels=2, norm="instance"), kernels, "gemm")
    cudnn.conv.fp32_precision = "tf32"
    assert precision.of(torch.float32) == "tf32"
    with precision.use("ieee"):
        assert precision.of(torch.float32) == "ieee"
    assert precision.of(torch.float32) == "tf32"


def test_a_precision_for_a_while_leaves_the_switches_as_they_were(switches):
    cudnn, matmul = switches
    cudnn.allow_tf32, matmul.allow_tf32 = True, False
    with precision.use("ieee"):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)  # which can be read
        with cudnn.flags(allow_tf32=True):
            pass
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, False)
    torch.backends.fp32_precision = "ieee"
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = matmul.fp32_precision = "none"
    cudnn.rnn.fp32_precision = "tf32"  # after which the old switch cannot be read
    with precision.use("tf32"):
        assert cudnn.conv.fp32_precision == matmul.fp32_precision == "tf32"
    assert cudnn.conv.fp32_precision == matmul.fp32_precision == "ieee"
    torch.backends.fp32_precision = "tf32"  # is still inherited
    assert cudnn.conv.fp32_precision == matmul.fp32_precision == "tf32"
