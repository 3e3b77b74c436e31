"""Blocks and networks on pending transforms: equal to plain modules, lighter, and explained."""

import contextlib
import copy
import importlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import cassetta
from cassetta.backbones import ATrousNet, ConvEncoder, MeshNet, UNet
from cassetta.functional import Deferred, defer, materialize
from cassetta.functional.norm import Normalization, Pool
from cassetta.kernels import dispatch, ops
from cassetta.kernels.types import Activation
from cassetta.layers import ChannelDropout, ConvBlock, ConvGroup, ModuleSum, fusing
from cassetta.layers.ways import Level
from cassetta.measure import agreement
from cassetta.models import SegNet
from cassetta.recording import recordings

from compare import Counted, NothingRead, assert_near

ORDERS = ["".join(p) for p in itertools.permutations("ncdax")]
NORMS = ["batch", "instance", "layer", 2, None]


def step(net, inp, fused, seed=1):
    """Output, gradients and buffers of one step, from the same random state."""
    torch.manual_seed(seed)
    net.zero_grad()
    inp = inp.clone().requires_grad_()
    with dispatch.fused_on_reference() if fused else contextlib.nullcontext():
        out = net(inp)
        torch.manual_seed(2)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
    found = {"out": out.detach(), "inp": inp.grad}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | {name: b.clone() for name, b in net.named_buffers()}


def assert_same(net, inp, tolerance=1e-10):
    """Fused equals plain, gradients on the scale of at least 1e-3 of the largest."""
    with torch.no_grad():
        for parameter in net.parameters():  # norms that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = copy.deepcopy(net.state_dict())
    plain = step(net, inp, fused=False)
    net.load_state_dict(state)
    fused = step(net, inp, fused=True)
    largest = max(g.abs().max().item() for g in plain.values() if g.numel())
    for name, expected in plain.items():
        scale = max(expected.abs().max().item(), 1e-3 * largest) if expected.numel() else 1.0
        torch.testing.assert_close(
            fused[name],
            expected,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order, norm, train, engine):
    """Two blocks, so that what one leaves pending meets what the next one begins with."""
    attention = "sqzex" if norm == "batch" else None
    net = ConvGroup(
        2, 6, nb_conv=2, norm=norm, activation="ELU", dropout=0.2, order=order, attention=attention
    ).double().train(train)  # fmt: skip
    assert_same(net, torch.randn(3, 6, 5, 4).double())


@pytest.mark.parametrize("order", ["c", "ca", "nc", "cn", "dnc", "acd", "", "can", "cna"])
@pytest.mark.parametrize(
    "activation", ["ReLU", "PReLU", "GELU", "Softplus", "Mish", "ELU", "Tanh", "Sigmoid"]
)
def test_letters_left_out_and_activations(order, activation, engine):
    net = ConvGroup(2, 6, nb_conv=3, norm="instance", activation=activation, order=order).double()
    assert_same(net, torch.randn(2, 6, 5, 4).double())


PROMOTED = {
    "layer norm": lambda: ConvGroup(2, 6, nb_conv=2, norm="layer", order="cndax"),
    "groups, before": lambda: ConvGroup(2, 6, nb_conv=2, norm=2, order="nacdx"),
    "softplus": lambda: ConvGroup(2, 6, nb_conv=2, norm="batch", activation="Softplus"),
    "residual": lambda: ConvGroup(2, 6, nb_conv=2, norm=2, order="cndax", residual=True),
    "two norms in a row": lambda: nn.Sequential(
        ConvBlock(2, 6, 6, norm=2, activation=None, order="cn"),
        ConvBlock(2, 6, 6, norm=3, activation=None, order="nc"),
    ),
    "unet": lambda: UNet(2, 6, nb_levels=2, norm=2),
    "unet, interpolated": lambda: UNet(
        2, 6, nb_levels=2, norm=2, pool_mode="interpolate", unpool_mode="interpolate"
    ),
    "unet, no norm at the end": lambda: UNet(2, 6, nb_levels=2, order="ndac", norm=2),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", PROMOTED)
def test_what_a_gpu_computes_in_float32_under_autocast(name, train, engine, monkeypatch):
    """Group norms and softplus: what others see of them is in float32, as torch returns it."""
    net = PROMOTED[name]().train(train)
    group_norm, softplus, eager = F.group_norm, F.softplus, []

    def promoted(function):
        def call(x, *rest):
            eager.append(x.dtype)
            return function(x.float(), *rest)

        return call

    monkeypatch.setattr(F, "group_norm", promoted(group_norm))
    monkeypatch.setattr(nn.functional, "softplus", promoted(softplus))
    monkeypatch.setattr(fusing, "_is_promoting", lambda x: True)
    inp = torch.randn(2, 6, 9, 8)

    def step(net, inp, fused=False, rounded=True):
        torch.manual_seed(0)
        image = inp.clone().requires_grad_()
        rounding = torch.autocast("cpu", torch.bfloat16, enabled=rounded)
        with rounding, dispatch.fused_on_reference() if fused else contextlib.nullcontext():
            out = net(image)
        (gradient,) = torch.autograd.grad(out.double().square().sum(), image)
        return agreement.Step(("output", agreement.IMAGE), (out.detach(), gradient))

    same = step(net, inp)
    assert eager
    monkeypatch.undo()
    truth = step(copy.deepcopy(net).double(), inp.double(), rounded=False)
    monkeypatch.setattr(fusing, "_is_promoting", lambda x: True)
    ours = step(net, inp, fused=True)
    assert agreement.judge(ours, same, truth, deep=True) is None


NETS = {
    "unet": lambda: (UNet(2, 4, nb_levels=3, norm="instance"), (2, 4, 13, 11)),
    "unet, summed": lambda: (
        UNet(2, 4, nb_levels=3, norm=2, skip="+", residual=True), (2, 4, 9, 8),
    ),
    "unet, no norm": lambda: (UNet(2, 4, nb_levels=2), (2, 4, 9, 8)),
    "unet, tanh": lambda: (UNet(2, 4, nb_levels=2, activation="Tanh", dropout=0.3), (2, 4, 9, 8)),
    "meshnet": lambda: (MeshNet(3, 5, nb_layers=3, residual=True, dropout=0.2), (2, 5, 6, 7, 5)),
    "meshnet, PReLU": lambda: (MeshNet(1, 5, nb_layers=3, activation="PReLU"), (2, 5, 30)),
    "atrous": lambda: (ATrousNet(2, 4, nb_levels=3, residual=True), (2, 4, 9, 9)),
    "encoder": lambda: (ConvEncoder(2, [4, 8], norm="batch", pool_mode="conv"), (2, 4, 9, 9)),
    "segnet": lambda: (SegNet.preset("model5_gw_ae", 2), (2, 1, 11, 9)),
    "recurrent": lambda: (
        ConvGroup(2, 4, nb_conv=3, recurrent=True, norm="batch", skip=2, residual=True),
        (2, 6, 7, 7),
    ),
    "pre-activation": lambda: (  # whose sums leave with the product in training, too
        ConvGroup(2, 6, nb_conv=3, residual=True, norm="batch", order="nac"), (2, 6, 7, 5),
    ),
    "even kernel": lambda: (
        ConvGroup(2, 4, nb_conv=2, norm="batch", kernel_size=2, dilation=3), (2, 4, 7, 7),
    ),
    "mindgrab": lambda: (MeshNet.preset("mindgrab", 1, nb_layers=4), (2, 15, 40)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_networks(name, engine):
    net, shape = NETS[name]()
    assert_same(net.double(), torch.randn(shape).double())


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norms_of_torch_and_their_running_statistics(kind, momentum, engine):
    if kind is nn.InstanceNorm2d and momentum is None:
        pytest.skip("torch's instance norm has no cumulative average")
    norm = kind(4, momentum=momentum, affine=False, track_running_stats=True)
    net = ConvGroup(2, 4, nb_conv=3, norm=norm, recurrent=True).double()
    assert_same(net, torch.randn(3, 4, 5, 5).double())
    assert_same(net.eval(), torch.randn(3, 4, 5, 5).double())


@pytest.mark.parametrize("frozen", ["weights", "norms", "input"])
def test_what_needs_no_gradient_gets_none(frozen, engine):
    net = ConvGroup(2, 4, nb_conv=2, norm="batch", activation="PReLU").double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(("conv" in name) != (frozen == "weights") or frozen == "input")
    inp = torch.randn(2, 4, 5, 5).double()
    if frozen != "input":
        inp.requires_grad_()
    net(inp).square().sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with dispatch.fused_on_reference():
        net(inp.detach().requires_grad_(inp.requires_grad)).square().sum().backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (grad is None)
        if grad is not None:
            assert_near(parameter.grad, grad, 1e-9)


def test_every_word_of_steps_equals_doing_it_at_once():
    """The algebra: any chain of norm, dropout and activation, in any order, twice over."""
    gamma, beta = torch.randn(2, 4, dtype=torch.float64)
    factor = (torch.rand(3, 4, dtype=torch.float64) > 0.2).double() / 0.8
    steps = {
        "n": lambda x: x.normalized(Normalization(gamma, beta, 1e-5, Pool("group", 2))),
        "d": lambda x: x.scaled(factor),
        "a": lambda x: x.activated(Activation("silu")),
        "r": lambda x: x.activated(Activation("relu")),
    }
    plain = {
        "n": lambda x: torch.nn.functional.group_norm(x, 2, gamma, beta),
        "d": lambda x: x * factor[..., None],
        "a": torch.nn.functional.silu,
        "r": torch.relu,
    }
    raw = torch.randn(3, 4, 7, dtype=torch.float64)
    for length in range(5):
        for word in itertools.product(steps, repeat=length):
            x, z = Deferred(raw), raw
            for letter in word:
                x, z = steps[letter](x), plain[letter](z)
            assert_near(materialize(x), z)


def test_a_norm_costs_a_handful_of_launches():
    """On a small image the time of a step is that of its launches."""
    net = ConvGroup(3, 8, norm="instance", order="cndax")
    inp = torch.randn(2, 8, 4, 4, 4, requires_grad=True)
    with dispatch.fused_on_reference():
        with Counted() as forward:
            out = net(inp)
        with Counted() as backward:
            out.backward(torch.randn(out.shape, dtype=out.dtype))
    views = (
        "view",
        "unbind",
        "select",
        "slice",
        "detach",
        "randn",
        "empty",
        "expand",
        "promote_types",
    )
    launches = [
        [name for name in counted.ran if not any(view in name for view in views)]
        for counted in (forward, backward)
    ]
    assert sorted(name.split(".")[1] for name in launches[0]) == [
        "convolution", "materialize", "norm_statistics",
    ]  # fmt: skip
    assert sorted(name.split(".")[1] for name in launches[1]) == [
        "convolution_backward", "norm_sums", "prologue_dgrad", "sum",
    ]  # fmt: skip


def test_our_convolutions_take_the_sums_along():
    """No pass for the moments; and, where convolutions alone read a norm, none for its sums."""
    net = ConvGroup(2, 8, nb_conv=3, norm="instance", activation="SiLU", order="caxnd")
    inp = torch.randn(2, 8, 5, 5)
    with dispatch.fused_on_reference(), dispatch.use_engine("gemm"):
        with Counted() as forward:
            out = net(inp)
        with Counted() as backward:
            out.sum().backward()
    assert forward.count("cassetta.conv_fprop") == 3
    assert forward.count("cassetta.moments") == 0
    assert forward.count("cassetta.norm_statistics") == 0
    assert backward.count("cassetta.conv_dgrad") == 2  # the image asks for none
    assert backward.count("cassetta.norm_sums") == 1  # of the last norm, which a sum reads
    with dispatch.fused_on_reference(), dispatch.use_engine("gemm"):
        hidden = defer(inp).activated(Activation("relu"))
        gamma, beta = torch.ones(2, 8, requires_grad=True).unbind()
        hidden = hidden.normalized(Normalization(gamma, beta, 1e-5, Pool("batch")))
        with Counted() as counted:
            out = net[0].defer(hidden).z() + materialize(hidden)
            out.sum().backward()
    assert counted.count("cassetta.norm_sums") == 2  # another reader, who takes none along


@pytest.mark.parametrize("order", ["cnda", "cand", "cdna"])
def test_in_inference_a_block_is_one_kernel(order, kernels, monkeypatch):
    """Beside it, the algebra of its norm on (N, C); all launches are counted."""
    net = ConvGroup(2, 6, nb_conv=3, norm="batch", dropout=0.2, order=order).to(kernels).eval()
    tile = importlib.import_module("cassetta.kernels.tile")
    launched, launch = [], tile.launch

    def spy(kernel, *args, **constants):
        launched.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(tile, "launch", spy)
    monkeypatch.setattr(recordings, "_enabled", False)
    with torch.inference_mode(), dispatch.use_engine("gemm"):
        net(torch.randn(2, 6, 5, 5, device=kernels))
    assert launched == ["_norm_finalize_kernel", "_conv_kernel"] * 3


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", [*NORMS, nn.BatchNorm2d(4, momentum=None)], ids=str)
def test_the_host_reads_nothing(norm, train, engine):
    """What a CUDA graph needs, and a GPU that is not to wait."""
    net = ConvGroup(
        2, 4, nb_conv=3, norm=norm, activation="PReLU", dropout=0.2, residual=True, recurrent=True
    ).train(train)  # fmt: skip
    inp = torch.randn(2, 4, 5, 5, requires_grad=True)
    with dispatch.fused_on_reference(), NothingRead():
        net(inp).sum().backward()
    with pytest.raises(AssertionError, match="the host reads a value"), NothingRead():
        inp.sum().item()


def test_dtypes_that_do_not_meet_are_refused(engine):
    block, inp = ConvBlock(2, 4, 4).half(), torch.randn(1, 4, 5, 5)
    refused = pytest.raises((TypeError, RuntimeError), match="type|weights are in")
    with dispatch.fused_on_reference(), refused:
        block(inp)


def test_a_sum_leaves_its_moments_for_the_norm_that_follows():
    net = ConvGroup(2, 4, nb_conv=3, norm="batch", residual=True)  # the norm comes first
    net.append(ModuleSum([ConvBlock(2, 4, 4, norm="instance") for _ in range(2)]))
    with dispatch.fused_on_reference(), Counted() as counted:
        net(torch.randn(2, 4, 5, 5))
    assert counted.count("materialize_moments") == 3
    assert counted.count("cassetta.norm_statistics") == 1  # of the input


def test_torch_counts_the_operations_of_the_plain_network(engine):
    net, shape = NETS["unet"]()
    counts = []
    for context in (contextlib.nullcontext(), dispatch.fused_on_reference()):
        with context, FlopCounterMode(display=False) as counter:
            net(torch.randn(shape)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_every_pass_has_a_formula_once_kernels_ran(kernels):
    ConvBlock(2, 4, 4, norm="batch").to(kernels)(torch.randn(2, 4, 5, 5, device=kernels))
    assert {getattr(torch.ops.cassetta, name) for name in ops.PASSES} <= set(flop_registry)


def test_what_is_pending_is_applied_once():
    x = Deferred(torch.randn(1, 2, 5)).activated(Activation("silu"))
    assert materialize(x) is materialize(x)
    tensor = torch.randn(1, 2, 5)
    assert materialize(defer(tensor)) is tensor
    assert materialize(tensor) is tensor


def kept_bytes(net, inp, fused, **autocast):
    """Bytes of the distinct storages that backward needs, beyond the parameters."""
    held = {p.untyped_storage()._cdata for p in net.parameters()}
    seen = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            seen[storage._cdata] = storage
        return tensor

    context = dispatch.fused_on_reference() if fused else contextlib.nullcontext()
    rounded = torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext()
    saving = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with context, rounded, saving:
        net(inp)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("norm", ["batch", "instance", 4])
@pytest.mark.parametrize(("order", "share"), [("cndax", 0.54), ("caxnd", 0.585)])
def test_the_input_and_one_tensor_per_convolution_are_kept(order, share, norm, engine):
    net = ConvGroup(3, 8, nb_conv=6, norm=norm, order=order)
    inp = torch.randn(1, 8, 24, 24, 24)
    eager, ours = kept_bytes(net, inp, fused=False), kept_bytes(net, inp, fused=True)
    assert ours <= 1.03 * 7 * inp.nbytes
    assert ours <= share * eager


ACTIVATIONS = [
    "ReLU", "LeakyReLU", "ELU", "GELU", nn.GELU("tanh"), "SiLU", "Mish", "Tanh", "Sigmoid",
    "Softplus", "Hardswish", "PReLU", nn.ELU(inplace=True), nn.LeakyReLU(-0.1),
]  # fmt: skip


@pytest.mark.parametrize("dropout", [None, 0.2])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_without_a_norm_no_more_is_kept_than_by_eager(activation, dropout, engine):
    """By a chain of blocks, and by a network where others read what leaves them."""
    options = {"activation": activation, "dropout": dropout}
    chain, unet = ConvGroup(3, 8, nb_conv=6, **options), UNet(3, 8, nb_levels=2, **options)
    inp = torch.randn(1, 8, 16, 16, 16)
    for net in (chain, unet):
        tables = 3 * 4 * 32 * sum(isinstance(m, ConvBlock) for m in net.modules())  # of factors
        for autocast in ({}, {"dtype": torch.bfloat16}):
            eager, ours = (kept_bytes(net, inp, fused, **autocast) for fused in (False, True))
            assert ours <= eager + tables


WHOLE = {
    "unet": (lambda: UNet(2, 16, nb_levels=3, norm="instance"), 0.55),
    "unet, strided": (lambda: UNet(2, 16, nb_levels=3, norm="batch", pool_mode="conv"), 0.58),
    "unet, interpolated": (
        lambda: UNet(
            2, 16, nb_levels=3, norm="instance", pool_mode="interpolate", unpool_mode=None
        ),
        0.58,
    ),
    "unet, no norm": (lambda: UNet(2, 16, nb_levels=3), 0.83),
    "meshnet": (lambda: MeshNet(2, 16), 0.55),
    "meshnet, residual": (lambda: MeshNet(2, 16, residual=True), 1.001),  # keeps each sum too
    "atrous": (lambda: ATrousNet(2, 16, nb_levels=3), 0.70),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_keep_less(name, engine):
    """Beside images of convolutions, sums keep theirs, as in eager; shares measured here, rounded
    up."""
    make, share = WHOLE[name]
    net, inp = make(), torch.randn(1, 16, 96, 96)
    for autocast in ({}, {"dtype": torch.bfloat16}):
        eager, ours = (kept_bytes(net, inp, fused, **autocast) for fused in (False, True))
        assert ours <= share * eager


@pytest.mark.parametrize("residual", [False, True])
def test_dropout_alone_keeps_no_more_than_eager(residual, engine):
    net = ConvGroup(
        3, 8, nb_conv=3, activation=None, dropout=0.3, order="cadnx", residual=residual
    )  # fmt: skip
    inp = torch.randn(1, 8, 24, 24, 24)
    tables = 8 * 4 * 8  # the factors of each channel
    assert kept_bytes(net, inp, fused=True) <= kept_bytes(net, inp, fused=False) + tables


def test_under_autocast_all_that_is_kept_is_in_its_dtype(engine):
    net = ConvGroup(3, 8, nb_conv=6, norm="instance", order="cndax")
    inp = torch.randn(1, 8, 24, 24, 24)
    weights = sum(block.conv.weight.numel() * 2 for block in net)  # rounded once, and kept
    ours = kept_bytes(net, inp, fused=True, dtype=torch.bfloat16)
    assert ours <= 1.03 * 7 * inp.nbytes / 2 + weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["unet", "meshnet", "atrous"])
def test_autocast(name, dtype, engine):
    """As near to float32 as plain PyTorch under the same autocast is, within a factor of two."""
    net, shape = NETS[name]()
    net.eval()
    inp = torch.randn(shape)
    truth = net.double()(inp.double())
    net.float()
    with torch.autocast("cpu", dtype):
        same = net(inp)
        with dispatch.fused_on_reference():
            ours = net(inp)
    assert ours.dtype == same.dtype
    off = (ours.double() - truth).abs().max()
    allowed = 2 * (same.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert off <= allowed


def test_hooks_meet_tensors_and_removing_them_restores_the_fusion():
    net = ConvGroup(2, 4, nb_conv=3, norm="batch").double()
    inp = torch.randn(2, 4, 5, 5).double()
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append((i[0], o))) for m in net.modules()]
    with dispatch.fused_on_reference():
        out = net(inp)
        assert all(type(t) is torch.Tensor for pair in seen for t in pair)
        assert len(seen) == len(list(net.modules()))
        for hook in hooks:
            hook.remove()
        seen.clear()
        assert_near(net(inp), out)
    assert not seen


def test_other_modules_and_subclasses_meet_tensors():
    class Mine(ConvBlock):
        def forward(self, inp):
            assert type(inp) is torch.Tensor
            return super().forward(inp)

    net = ConvGroup(2, 4, nb_conv=3, norm="batch").double()
    net[1] = Mine(2, 4, 4, norm="batch").double()
    net.append(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()).double())
    assert_same(net, torch.randn(2, 4, 5, 5).double())


def scalar(net, inp):
    return net(inp).sin().sum()


SECOND = {
    "grad": lambda f, x, w: torch.autograd.grad(
        torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum(), x
    ),
    "backward": lambda f, x, w: (
        torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum().backward()
    ),
    "inputs": lambda f, x, w: (
        torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum().backward(inputs=[x])
    ),
    "weights": lambda f, x, w: torch.autograd.grad(
        torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum(), w
    ),
    "hessian": lambda f, x, w: torch.autograd.functional.hessian(f, x),
    "hvp": lambda f, x, w: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "jvp": lambda f, x, w: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("parameter", ["conv.weight", "norm.weight", "norm.bias"])
def test_second_derivatives_are_refused_not_wrong(way, parameter):
    """A sum's gradient is no part of a graph, which `once_differentiable` would take for safe."""
    net = ConvGroup(2, 4, nb_conv=2, norm="batch", activation="SiLU", order="cndax").double()
    inp = torch.randn(2, 4, 3, 3).double().requires_grad_()
    weight = net[0].get_parameter(parameter)
    with dispatch.fused_on_reference():
        with pytest.raises(RuntimeError, match="first derivatives only.*use_backend"):
            SECOND[way](lambda x: scalar(net, x), inp, weight)
        (first,) = torch.autograd.grad(scalar(net, inp), inp, create_graph=True)
    assert_near(first.detach(), torch.autograd.grad(scalar(net, inp), inp)[0])


def test_the_callers_gradient_stays_as_it_is():
    net = ConvGroup(2, 4, norm="batch").double()
    inp = torch.randn(2, 4, 3, 3).double().requires_grad_()
    cotangent = torch.ones(2, 4, 3, 3).double()
    with dispatch.fused_on_reference():
        torch.autograd.grad(net(inp), inp, cotangent, create_graph=True)
    assert not cotangent.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of forward mode and dynamo
def test_forward_mode_and_transforms_stay_with_torch():
    net = ConvGroup(2, 4, nb_conv=2, norm="instance").double()
    inp, tangent = torch.randn(2, 1, 4, 3, 3).double()
    with dispatch.fused_on_reference():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inp, tangent)
            out = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        _, expected = torch.func.jvp(net, (inp,), (tangent,))
        assert_near(out.detach(), expected.detach())
        slope = torch.func.grad(lambda x: scalar(net, x))
        torch._dynamo.reset()
        compiled = torch.compile(slope, backend="aot_eager")(inp)
    assert_near(compiled, slope(inp))
    assert compiled.abs().max() > 0


def test_a_program_exported_from_fused_blocks_says_that_it_cannot_be_trained():
    net = ConvGroup(2, 4, norm="instance")
    inp = torch.randn(2, 4, 5, 5)
    with dispatch.fused_on_reference():
        program = torch.export.export(net, (inp,), strict=False).module()
    out = program(inp)
    with pytest.raises(RuntimeError, match="export a network that is to be trained"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_what_users_do_to_blocks_is_never_bypassed(monkeypatch):
    inp = torch.randn(2, 4, 5, 5)
    calls = []

    class Counted(ConvBlock):
        def __call__(self, *args):
            calls.append("call")
            return super().__call__(*args)

    net = ConvGroup(2, 4, nb_conv=2, norm="batch")
    net.append(Counted(2, 4, 4, norm="batch"))
    with dispatch.fused_on_reference():
        net(inp)
        assert calls == ["call"]
        torch._dynamo.reset()
        net[0].compile(backend=lambda graph, _: calls.append("compiled") or graph.forward)
        net.eval()(inp)
        assert "compiled" in calls
        plain = ConvBlock.forward
        monkeypatch.setattr(ConvBlock, "forward", lambda s, x: calls.append("patch") or plain(s, x))
        net(inp)
    assert calls.count("patch") >= 2


def test_layers_may_be_deleted_or_set_to_none():
    block = ConvBlock(2, 4, 4, norm="batch", dropout=0.1, activation="ELU").double().eval()
    inp = torch.randn(2, 4, 5, 5).double()
    del block.dropout
    assert_same(block, inp)
    block.norm = None
    assert_same(block, inp)
    with dispatch.fused_on_reference():
        assert cassetta.explain(block, inp)[0].engine == "library"


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_norm_that_was_told_not_to_track(kind, train):
    norm = kind(4, affine=True, track_running_stats=True)
    norm.running_mean.add_(1)
    norm.track_running_stats = False
    net = ConvGroup(2, 4, nb_conv=2, norm=norm, recurrent=True).double().train(train)
    assert_same(net, torch.randn(3, 4, 5, 5).double())


ODD = {
    "Dropout3d in 2-D": lambda: ConvBlock(2, 4, 4, dropout=nn.Dropout3d),
    "InstanceNorm3d in 2-D": lambda: ConvBlock(2, 4, 4, norm=nn.InstanceNorm3d),
    "a weight or a bias": lambda: _without_weight(ConvBlock(2, 4, 4, norm="batch")),
}


def _without_weight(block):
    block.norm.weight = None
    return block


@pytest.mark.parametrize("reason", ODD)
def test_odd_combinations_are_left_to_torch(reason):
    with dispatch.fused_on_reference(), contextlib.suppress(ValueError):
        (row,) = cassetta.explain(ODD[reason](), torch.randn(2, 4, 5, 5))
        assert row.engine == "reference"
        assert reason in row.reason


def test_evaluation_then_training_before_the_backward():
    """The running statistics that the first pass used are not those that the second one leaves."""
    net = ConvGroup(2, 4, nb_conv=2, norm="batch", order="cndax").double()
    inp = torch.randn(2, 4, 5, 5).double().requires_grad_()
    (expected,) = torch.autograd.grad(net.eval()(inp).sum(), inp)
    with dispatch.fused_on_reference():
        out = net.eval()(inp)
        net.train()(inp)
        assert_near(torch.autograd.grad(out.sum(), inp)[0], expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("name", ["unet", "meshnet", "atrous", "segnet"])
def test_compile_export_checkpoint(name, engine):
    net, shape = NETS[name]()
    for module in net.modules():
        if isinstance(module, ChannelDropout):
            module.p = 0.0
    inp = torch.randn(shape)
    expected = step(net, inp, fused=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        with dispatch.fused_on_reference():
            out = run(inp.clone().requires_grad_())
            torch.manual_seed(2)
            out.backward(torch.randn(out.shape, dtype=out.dtype))
        assert_near(out.detach(), expected["out"], 1e-5)
        largest = max(expected[n].abs().max().item() for n, _ in net.named_parameters())
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-5 * largest)
    with dispatch.fused_on_reference():
        program = torch.export.export(net.eval(), (inp,), strict=False)
        ours = any("cassetta" in str(node.target) for node in program.graph.nodes)
        assert ours != (name == "segnet" and engine == "library")  # that has no norm
        assert_near(program.module()(inp), net(inp), 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mode", ["conv", "interpolate"])
def test_compiled_with_sizes_that_are_odd(mode, dynamic, engine):
    """The second size opens those of the graph; what is upsampled is fitted to its skip."""
    net = UNet(2, 4, nb_levels=2, norm="instance", unpool_mode=mode).double()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", dynamic=dynamic)
    for size in ((9, 7), (11, 5), (13, 9)):
        inp = torch.randn(1, 4, *size, dtype=torch.float64)
        expected = step(net, inp, fused=True)
        found = step(compiled, inp, fused=True)
        assert_near(found["out"].contiguous(), expected["out"].contiguous())
        assert_near(found["inp"].contiguous(), expected["inp"].contiguous())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("order", ["cndax", "caxnd"])
@pytest.mark.parametrize("activation", ["ReLU", "LeakyReLU", "GELU"])
@pytest.mark.parametrize("norm", ["batch", "instance", None], ids=str)
def test_compiled_with_open_sizes_and_numbers(norm, activation, order, engine):
    """`dynamic=True` opens slopes too, which one autograd.Function cannot tell to the next."""
    net = ConvGroup(2, 4, nb_conv=2, norm=norm, activation=activation, order=order).double()
    net.eval()
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        net, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    with dispatch.fused_on_reference():
        for shape in ((2, 4, 7, 5), (3, 4, 9, 8)):
            inp = torch.randn(shape).double().requires_grad_()
            out, expected = compiled(inp), net(inp)
            assert_near(out.detach(), expected.detach())
            g = torch.randn_like(out)
            ours, theirs = (torch.autograd.grad(one, inp, g)[0] for one in (out, expected))
            assert_near(ours, theirs)
    assert len(graphs) == 1


EXPLAINED = {
    "default unet": lambda: (UNet(2, 4, norm="instance"), (1, 4, 32, 32)),
    "default meshnet": lambda: (MeshNet(2, 4), (1, 4, 9, 9)),
    "default atrous": lambda: (ATrousNet(2, 4), (1, 4, 17, 17)),
    "dropout": NETS["meshnet"],  # which draws random numbers
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_shows_every_block_on_a_kernel_engine(name, kernels, engine):
    """Of networks that are upstream's default but for the number of features, too."""
    net, shape = EXPLAINED[name]()
    net = net.to(kernels)
    inp = torch.randn(shape, device=kernels)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    rows = cassetta.explain(net, inp)
    assert {row.engine for row in rows} == {engine}
    blocks = {key for key, module in net.named_modules() if isinstance(module, ConvBlock)}
    assert {row.name for row in rows if row.kind == "ConvBlock"} == blocks
    ways = {key for key, module in net.named_modules() if isinstance(module, Level)}
    assert {row.name for row in rows if row.kind != "ConvBlock"} == ways
    assert torch.equal(torch.get_rng_state(), random)
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert engine in str(rows)


REASONS = {
    "Softmax": lambda: ConvBlock(2, 4, 4, activation="Softmax"),
    "padding_mode='replicate'": lambda: ConvBlock(2, 4, 4, optc={"padding_mode": "replicate"}),
    "SeparableConv": lambda: ConvBlock(2, 4, 4, separable=True),
    "Dropout": lambda: ConvBlock(2, 4, 4, dropout=nn.Dropout),
    "float64": lambda: ConvBlock(2, 4, 4).double(),
    "the norm LocalResponseNorm": lambda: ConvBlock(2, 4, 4, norm=nn.LocalResponseNorm(2)),
    "a hook is attached to its Conv": lambda: _with_hook(ConvBlock(2, 4, 4)),
    "layers were appended": lambda: ConvBlock(2, 4, 4).append(nn.Tanh()),
}


def _with_hook(block):
    block.conv.register_forward_hook(lambda *_: None)
    return block


@pytest.mark.parametrize("reason", REASONS)
def test_a_block_that_no_kernel_covers_says_why_and_runs(reason, kernels):
    block = REASONS[reason]().to(kernels)
    inp = torch.randn(2, 4, 5, 5, device=kernels).to(next(block.parameters()).dtype)
    (row,) = cassetta.explain(block, inp)
    assert row.engine == "reference"
    assert reason in row.reason
    with dispatch.use_backend("reference"):
        expected = block.eval()(inp)
    assert_near(block(inp), expected)


def test_reasons_that_lie_in_the_image(kernels):
    block = ConvBlock(2, 4, 4).to(kernels)
    (row,) = cassetta.explain(block, torch.randn(0, 4, 5, 5, device=kernels))
    assert row.engine == "reference"
    assert row.reason == "the batch is empty"
    huge = torch.empty(1, device=kernels).expand(1, 4, 2**16, 2**15)
    assert "more voxels than 31 bits count" in dispatch.why_reference(huge)
    assert dispatch.why_reference(huge[..., :1, :1].to(torch.complex64)) == "the image is complex"


def test_reasons_that_lie_in_the_request():
    block, inp = ConvBlock(2, 4, 4), torch.randn(2, 4, 5, 5)
    assert cassetta.explain(block, inp)[0].reason == "the image is on the CPU"
    with cassetta.use_backend("reference"):
        assert "'reference' was asked for" in cassetta.explain(block, inp)[0].reason


def test_training_through_the_kernels_ends_where_plain_pytorch_ends(kernels, engine):
    """A small network learns as well either way; the losses differ by rounding, amplified."""
    losses = {}
    target = torch.randn(2, 3, 8, 8).to(kernels)
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = SegNet(
            2, 1, 3, activation=None, backbone="MeshNet",
            opt_backbone={"nb_features": 4, "nb_layers": 2, "nb_conv_per_layer": 1},
        ).to(kernels)  # fmt: skip
        inp = torch.randn(2, 1, 8, 8).to(kernels)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        with dispatch.use_backend(backend):
            for _ in range(8):
                optimizer.zero_grad()
                loss = (net(inp) - target).square().mean()
                loss.backward()
                optimizer.step()
        losses[backend] = loss.item()
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-3)
