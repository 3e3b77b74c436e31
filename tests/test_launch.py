"""Convolutions that wait until they are read: computed once, in one node or two."""

import copy
import functools
import importlib
import re
import traceback
from pathlib import Path

import pytest
import torch

import cassetta
from cassetta.backbones import ATrousNet, ConvDecoder, ConvEncoder, MeshNet, UNet
from cassetta.functional import Deferred, Normalization, Pool, Product, Running, convolved, defer
from cassetta.functional.steps import Steps
from cassetta.kernels import dispatch, engines, library
from cassetta.kernels.types import Activation, Geometry
from cassetta.layers import ConvBlock, ConvGroup, ModuleSum

from compare import Counted, assert_near, graph

NETS = {
    "unet": lambda: (UNet(2, 4, nb_levels=3, norm="batch"), (2, 4, 8, 8)),
    "unet, residual": lambda: (UNet(2, 4, nb_levels=2, norm=2, residual=True), (2, 4, 8, 8)),
    "unet, summed": lambda: (UNet(2, 4, nb_levels=2, skip="+"), (2, 4, 8, 8)),
    "unet, interpolated": lambda: (
        UNet(2, 4, nb_levels=2, norm="instance", pool_mode="interpolate", unpool_mode=None),
        (2, 4, 8, 8),
    ),
    "meshnet": lambda: (MeshNet(2, 4, nb_layers=3, residual=True), (2, 4, 9, 9)),
    "atrous": lambda: (ATrousNet(2, 4, nb_levels=2, residual=True), (2, 4, 9, 9)),
    "group": lambda: (ConvGroup(2, 4, nb_conv=3, residual=True, norm="batch"), (2, 4, 9, 9)),
    "branches": lambda: (
        ModuleSum([ConvBlock(2, 4, 4, norm="instance") for _ in range(3)]), (2, 4, 9, 9),
    ),
}  # fmt: skip

FORWARD = {
    "library": ("aten.convolution",),
    "gemm": ("cassetta.conv_fprop", "cassetta.conv_transposed"),
}


def convolutions(net):
    """How many there are."""
    return sum(type(m).__name__.startswith(("Conv1", "Conv2", "Conv3", "ConvT")) or
               type(m).__name__ == "Conv" for m in net.modules())  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_each_convolution_is_computed_once(name, training, engine):
    """Whoever reads an image twice says so: nothing is computed again, statistics tracked once."""
    make, shape = NETS[name]()
    net, inp = make.train(training), torch.randn(shape)
    with dispatch.fused_on_reference(), torch.set_grad_enabled(training), Counted() as counted:
        out = net(inp)
    assert sum(counted.count(operator) for operator in FORWARD[engine]) == convolutions(net)
    for module in net.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            assert module.num_batches_tracked == (1 if training else 0)
    if training and engine == "library":
        with Counted() as counted:
            out.sum().backward()
        assert counted.count("aten.convolution_backward") == convolutions(net)
        assert counted.count("aten.convolution.default") == 0


def test_encoder_and_decoder_apart(engine):
    encoder, decoder = ConvEncoder(2, [4, 8], norm="batch"), ConvDecoder(2, [8, 4], norm="batch")
    with dispatch.fused_on_reference(), Counted() as counted:
        levels = encoder(torch.randn(1, 4, 8, 8), return_all=True)
        decoder(*levels[::-1])
    found = sum(counted.count(operator) for operator in FORWARD[engine])
    assert found == convolutions(encoder) + convolutions(decoder)


@pytest.mark.parametrize("order", ["cndax", "caxnd", "ncdax", "cadnx"])
@pytest.mark.parametrize("norm", ["batch", "instance", None], ids=str)
@pytest.mark.parametrize("activation", ["ReLU", "GELU", "PReLU"])
def test_two_nodes_are_one(order, norm, activation, engine, monkeypatch):
    """Where images are large a convolution and its steps are nodes of their own: the same bits."""
    launch = importlib.import_module("cassetta.functional.launch")
    options = {"norm": norm, "activation": activation, "dropout": 0.2, "order": order}
    net = ConvGroup(2, 4, nb_conv=2, **options).double()
    found, nodes = [], []
    for least in (0, 2**24):
        monkeypatch.setattr(launch, "APART", least)
        one, inp = copy.deepcopy(net), torch.linspace(-1, 1, 200, dtype=torch.float64)
        inp = inp.reshape(2, 4, 5, 5).requires_grad_()
        torch.manual_seed(0)
        with dispatch.fused_on_reference():
            out = one(inp)
        out.backward(out.detach().cos())
        found.append([out.detach(), inp.grad, *(p.grad for p in one.parameters()), *one.buffers()])
        nodes.append(graph(out).count("NodeBackward"))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    before = order == "ncdax" and norm is not None  # a norm of the input, which no convolution has
    assert nodes[0] > nodes[1] == 2 + before


def image(channels=4):
    """An image that a convolution of x leaves, and what x and the weights are."""
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(channels, 3, 3, dtype=torch.float64, requires_grad=True)
    return x, w


@pytest.mark.parametrize("first", ["late", "early"])
def test_a_reader_that_was_not_announced_gets_what_it_asked_for(first, engine):
    """Steps were added to an image that is read without them, too: before or after they are."""
    (x, w), b = image(), torch.randn(4, dtype=torch.float64)
    geometry = Geometry((1,), ((1, 1),), (1,))
    gamma, beta = torch.ones(2, 4, dtype=torch.float64).unbind()
    with dispatch.fused_on_reference():
        early = convolved(defer(x), Product(engine, geometry), w, b)
        running = Running(*torch.zeros(2, 4, dtype=torch.float64), torch.tensor(0), 0.1, False)
        norm = Normalization(gamma, beta, 1e-5, Pool("batch"), running=running)
        late = early.normalized(norm).activated(Activation("silu"))
        order = (late, early) if first == "late" else (early, late)
        found = dict(zip(("late", "early") if first == "late" else ("early", "late"),
                         [one.z() for one in order], strict=True))  # fmt: skip
    y = torch.nn.functional.conv1d(x, w, b, padding=1)
    z = torch.nn.functional.silu(torch.nn.functional.batch_norm(y, None, None, gamma, beta, True))
    assert_near(found["early"].detach().contiguous(), y.detach())
    assert_near(found["late"].detach().contiguous(), z.detach())
    assert running.batches == 1
    assert_near(running.mean, 0.1 * y.detach().mean((0, 2)))
    both = found["early"].sin().sum() + found["late"].cos().sum()
    expected = torch.autograd.grad(y.sin().sum() + z.cos().sum(), [x, w])
    for ours, theirs in zip(torch.autograd.grad(both, [x, w]), expected, strict=True):
        assert_near(ours, theirs)


def test_what_waits_is_of_the_shape_and_layout_that_it_will_have(engine):
    """The table of what was measured is asked before it is computed."""
    for channels in (4, 8):
        for last in (False, True):
            x = torch.randn(2, 3, 6, 6)
            x = x.to(memory_format=torch.channels_last) if last else x
            w = torch.randn(channels, 3, 3, 3)
            with dispatch.fused_on_reference():
                product = Product(engine, Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
                waits = convolved(defer(x), product, w, None)
                like, is_last = waits.like(), waits.is_last
                y = waits.z()
            assert (like.shape, like.dtype) == (y.shape, y.dtype)
            assert is_last == (y.stride(1) == 1)


def test_an_engine_is_a_module_with_these_functions():
    names = {"FUSES", "supports", "is_last", "fprop", "bprop", "dgrad", "wgrad", "joins"}
    names |= {"transposed", "transposed_bprop"}
    assert dispatch.DEFAULT in engines.ENGINES
    for engine in engines.ENGINES.values():
        public = {name for name in vars(engine) if not name.startswith("_")}
        assert names <= public
        assert all(getattr(engine, name).__doc__ for name in names - {"FUSES"})
        for name in names - {"FUSES"}:  # with the same arguments
            code, other = (one.__code__ for one in (getattr(engine, name),
                                                    getattr(engines.library, name)))  # fmt: skip
            assert code.co_varnames[: code.co_argcount] == other.co_varnames[: other.co_argcount]


def test_a_tensor_is_read_as_it_is():
    x = torch.randn(1, 2, 5)
    assert Deferred(x).read().x is x
    assert Deferred(x).z() is x


def test_a_module_that_changes_its_input_comes_after_those_before_it(engine):
    """What waits has read the image as it was."""
    inplace = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Conv2d(4, 4, 1))
    net = ModuleSum([ConvBlock(2, 4, 4), inplace, ConvBlock(2, 4, 4)])
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = net(x.clone())
        with dispatch.fused_on_reference():
            found = net(x.clone())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("least", [0, 2**24], ids=["apart", "one node"])
@pytest.mark.parametrize("norm", ["batch", "instance", "layer", 2], ids=str)
def test_the_gradient_of_a_bias_before_a_norm_takes_no_pass(norm, least, engine, monkeypatch):
    """It follows from the sums that the norm asks for: no product takes it along, nothing adds."""
    monkeypatch.setattr(importlib.import_module("cassetta.functional.launch"), "APART", least)
    torch.manual_seed(0)
    net = ConvGroup(2, 4, nb_conv=2, norm=norm, activation="GELU", order="cndax").double()
    inp = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    g = torch.randn_like(inp)
    names, parameters = zip(*net.named_parameters(), strict=True)
    with dispatch.use_backend("reference"):
        expected = torch.autograd.grad(net(inp), parameters, g)
    with dispatch.fused_on_reference():
        out = net(inp)
        with Counted() as counted:
            found = torch.autograd.grad(out, parameters, g)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        scale = max(theirs.abs().max(), 1e-3 * max(one.abs().max() for one in expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * float(scale), msg=name)
    assert counted.count("aten.sum") == 0
    masks = [args[-1] for func, args in counted.calls if "convolution_backward" in str(func)]
    assert len(masks) == 2 * (engine == "library")
    assert not any(mask[2] for mask in masks)


def test_processes_that_share_a_norm_may_differ_in_their_biases():
    norm = Normalization(None, None, 1e-5, Pool("batch"))
    assert Steps().normalized(norm).take_out()
    shared = norm._replace(pool=Pool("batch", process_group=object()))
    assert not Steps().normalized(shared).take_out()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("least", [0, 2**24], ids=["apart", "one node"])
@pytest.mark.parametrize(
    ("pool", "order", "momentum", "is_taken"),
    [
        (Pool("batch"), "n", 0.1, True),
        (Pool("batch"), "na", None, True),  # all batches weigh the same
        (Pool("instance"), "n", 0.1, True),
        (Pool("group", 2), "n", None, False),
        (Pool("batch"), "dn", 0.1, False),
        (Pool("batch"), "an", 0.1, False),
    ],
)
def test_a_bias_that_a_norm_takes_out_is_not_added(
    pool, order, momentum, is_taken, least, transposed, monkeypatch
):
    """By torch's convolutions, to which it is a pass; running means are what they would be."""
    monkeypatch.setattr(importlib.import_module("cassetta.functional.launch"), "APART", least)
    name, given = "conv_transposed" if transposed else "conv", []
    run = getattr(library, name)
    monkeypatch.setattr(library, name, lambda x, w, b, *a: given.append(b) or run(x, w, b, *a))
    draw = functools.partial(torch.randn, dtype=torch.float64)
    x, w, b, gamma, beta = draw(3, 4, 10), draw(4, 4, 2), draw(4) + 3.0, draw(4), draw(4)
    every = [one.requires_grad_() for one in (x, w, b, gamma, beta)]
    factor = torch.tensor([0.0, 2.0, 2.0, 0.0], dtype=torch.float64).expand(3, 4)
    geometry = Geometry((2,), ((0, 0),), (1,))
    tables = torch.zeros(2, 4, dtype=torch.float64)
    running = Running(*tables, torch.tensor(3), momentum, pool.kind == "instance")
    norm = Normalization(gamma, beta, 1e-5, pool, None, None if pool.groups > 1 else running)
    steps = {
        "n": lambda one: one.normalized(norm),
        "d": lambda one: one.scaled(factor),
        "a": lambda one: one.activated(Activation("silu")),
    }
    with dispatch.fused_on_reference():
        ours = convolved(defer(x), Product("library", geometry, transposed), w, b)
        for letter in order:
            ours = steps[letter](ours)
        ours = ours.z()
        assert [one is None for one in given] == [is_taken]
    f = torch.nn.functional
    z = (f.conv_transpose1d if transposed else f.conv1d)(x, w, b, stride=2)
    for letter in order:
        if letter == "d":
            z = z * factor[:, :, None]
        elif letter == "a":
            z = f.silu(z)
        else:
            own = z.detach()
            if pool.kind == "batch":
                z = f.batch_norm(z, None, None, gamma, beta, True)
            else:
                z = f.group_norm(z, 2 if pool.kind == "group" else 4, gamma, beta)
    assert_near(ours.detach(), z.detach())
    if pool.groups == 1:
        assert_near(running.mean, own.mean((0, 2)) * (0.25 if momentum is None else momentum))
    for mine, theirs in zip(
        torch.autograd.grad(ours.sin().sum(), every), torch.autograd.grad(z.sin().sum(), every),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("least", [0, 2**24], ids=["apart", "one node"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_autocast_rounds_weights_within_the_node(norm, least, engine, monkeypatch):
    """Gradients come in float32, by no node of torch; weights may change meanwhile."""
    monkeypatch.setattr(importlib.import_module("cassetta.functional.launch"), "APART", least)
    torch.manual_seed(0)
    net = ConvGroup(2, 8, nb_conv=2, norm=norm, activation="GELU", order="cndax")
    inp, found = torch.randn(2, 8, 9, 9).bfloat16(), {}
    for name, context in (
        ("truth", dispatch.use_backend("reference")),
        ("torch", dispatch.use_backend("reference")),
        ("ours", dispatch.fused_on_reference()),
    ):  # fmt: skip
        one = copy.deepcopy(net)
        with context, torch.autocast("cpu", torch.bfloat16, enabled=name != "truth"):
            out = one(inp.float() if name == "truth" else inp)
        assert ("ToCopyBackward0" in graph(out)) == (name == "torch")
        if name == "ours":
            with torch.no_grad():
                for module in one:
                    module.conv.weight.zero_()
        out.backward(torch.cos(out.detach()))
        found[name] = [parameter.grad for parameter in one.parameters()]
    scale = max(float(one.abs().max()) for one in found["truth"])
    for ours, theirs, truth in zip(found["ours"], found["torch"], found["truth"], strict=True):
        assert ours.dtype is torch.float32
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * scale


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_autocast_rounds_parameters_of_two_dtypes(name, engine):
    net = ConvGroup(2, 8, nb_conv=2, norm="instance", order="cndax")
    for module in net:
        one = getattr(module.conv, name)
        setattr(module.conv, name, torch.nn.Parameter(one.detach().bfloat16()))
    inp, found = torch.randn(2, 8, 9, 9), []
    for context in dispatch.use_backend("reference"), dispatch.fused_on_reference():
        with context, torch.autocast("cpu", torch.bfloat16):
            out = net(inp)
        net.zero_grad()
        out.float().sum().backward()
        found.append([out, *(p.grad for p in net.parameters())])
    for theirs, ours in zip(*found, strict=True):  # bfloat16 has 8 bits; biases get about 0
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.05 * theirs.norm() + 0.05


@pytest.mark.parametrize("activation", ["ReLU", "LeakyReLU", "ELU", "Tanh", "Sigmoid", None])
@pytest.mark.parametrize("training", [True, False])
def test_without_a_norm_torch_convolves_and_differentiates(activation, training):
    """Where it keeps no more than a node of ours would: the result of the activation alone."""
    net = ConvGroup(2, 4, nb_conv=2, activation=activation).double()
    inp = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    expected, found = [], []
    for results, context in (
        (expected, dispatch.use_backend("reference")), (found, dispatch.fused_on_reference())
    ):  # fmt: skip
        with context, torch.set_grad_enabled(training), Counted() as counted:
            out = net(inp)
        results.append(out.detach())
        if training:
            results += torch.autograd.grad(out, (inp, *net.parameters()), torch.cos(out.detach()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert counted.count("cassetta") == 0
    if training:
        assert "NodeBackward" not in graph(out)


def test_the_walk_from_a_forward_to_a_launch_is_that_of_design(kernels, monkeypatch):
    """Of its first norm, from the outermost frame of ours."""
    found = []

    def launch(kernel, *args, **constants):
        if not found and kernel.fn.__name__ == "_moments_kernel":
            found.extend(one.name for one in traceback.extract_stack() if is_ours(one.filename))
        return original(kernel, *args, **constants)

    def is_ours(filename):
        return str(Path(cassetta.__file__).parent) in filename or filename.startswith("<cassetta.")

    tile = importlib.import_module("cassetta.kernels.tile")
    original = tile.launch
    monkeypatch.setattr(tile, "launch", launch)
    UNet(1, [4, 4], nb_levels=2, norm="instance").to(kernels)(torch.randn(1, 4, 16, device=kernels))
    text = Path(__file__).parent.parent.joinpath("DESIGN.md").read_text()
    _, _, section = text.partition("### From `UNet.forward` to a launch")
    rows = [row.split("|")[-2] for row in section.partition("\n### ")[0].splitlines() if "|" in row]
    named = [name.rpartition(".")[2] for row in rows for name in re.findall("`([^`]+)`", row)]
    assert found == named
    assert f" {len(named)} frames of ours" in section
