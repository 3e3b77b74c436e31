"""Sites of a program that are one node give the bits that they give one by one."""

import contextlib
import copy
import itertools
from functools import partial

import interpol  # noqa: F401 (with an old torch it compiles itself: before a test changes torch)
import pytest
import torch
from test_programs import nothing_but_programs
from test_recordings import assert_same, general, step
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cassetta.backbones import MeshNet, UNet
from cassetta.functional import chains, sites
from cassetta.layers import ConvGroup

from compare import assert_near, nodes_before

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ROUNDS = 4
"""By the general path, traced, by the program, by its replays."""


def nodes(last):
    """What the nodes of ours before a tensor do: a `Chain`, or a `Site` alone."""
    return sorted(type(one.work).__name__ for one in nodes_before(last) if hasattr(one, "work"))


@pytest.mark.parametrize("nb", [1, 2, chains.LENGTH, chains.LENGTH + 1])
def test_how_many_blocks_are_a_node(nb, kernels, engine):
    net = ConvGroup(1, 4, nb_conv=nb, norm="batch", order="cndax").to(kernels)
    for _ in range(ROUNDS):
        out = net(torch.randn(2, 4, 12, device=kernels))
    chained, alone = divmod(nb, chains.LENGTH)
    expected = ["Chain"] * (chained + (alone > 1)) + ["Site"] * (alone == 1)
    assert nodes(out) == expected


def test_large_images_release_what_they_keep_block_by_block(kernels, monkeypatch):
    monkeypatch.setattr(sites, "SMALL", 2 * 4 * 12 - 1)
    net = ConvGroup(1, 4, nb_conv=3, norm="batch", order="cndax").to(kernels)
    for _ in range(ROUNDS):
        out = net(torch.randn(2, 4, 12, device=kernels))
    assert nodes(out) == ["Site"] * 3


@pytest.mark.parametrize("order", ["cndax", "caxnd"])
def test_autocast_interrupts_no_chain(order, kernels, engine):
    """Weights are rounded by the sites themselves, and may change before the backward."""
    torch.manual_seed(0)
    net = ConvGroup(1, 8, nb_conv=3, norm="instance", order=order).to(kernels)
    twin = copy.deepcopy(net)
    for n in range(ROUNDS):
        image = torch.randn(2, 8, 12, device=kernels).half()
        found = step(net, image, torch.float16)
        with general():
            assert_same(found, step(twin, image, torch.float16))
        with torch.autocast(kernels.type, torch.float16):
            out = net(image)
        assert nodes(out) == (["Chain"] if n > 1 else ["Site"] * 3)
        total = out.float().sum()
        (before,) = torch.autograd.grad(total, net[0].norm.weight, retain_graph=True)
        with torch.no_grad():
            net[1].conv.weight.mul_(2)
        (after,) = torch.autograd.grad(total, net[0].norm.weight)
        with torch.no_grad():
            net[1].conv.weight.div_(2)
        assert_same([after], [before])


def asked(net, image, wanted):
    """The gradients of some tensors alone."""
    torch.manual_seed(1)
    out = net(image)
    return torch.autograd.grad(out, wanted(net, image), torch.cos(out.detach()))


WANTED = {
    "image": lambda net, image: [image],
    "first weights": lambda net, image: [net[0].conv.weight],
    "last weights": lambda net, image: [net[-1].conv.weight],
    "a norm within": lambda net, image: [net[1].norm.weight, net[1].norm.bias],
    "a bias and the image": lambda net, image: [net[2].conv.bias, image],
}


@pytest.mark.parametrize(("name", "order"), [*zip(WANTED, itertools.cycle(["cndax", "caxnd"]))])
def test_what_is_asked_for_alone(name, order, kernels, engine):
    """Also in turns with all of it; what precedes the first site that is asked for does nothing."""
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=3, norm="batch", order=order).to(kernels)
    twin = copy.deepcopy(net)
    for n in range(ROUNDS + 2):
        image = torch.randn(2, 4, 12, device=kernels, requires_grad=True)
        wanted = WANTED[name] if n != 2 else lambda net, image: [image, *net.parameters()]
        found = asked(net, image, wanted)
        with general():
            expected = asked(twin, image, wanted)
        assert_same(found, expected)


def again(net, image):
    return checkpoint(net, image, use_reentrant=False)


def selectively(net, image):
    """A checkpoint that holds what convolutions return, for it to be there again."""

    def policy(context, operator, *arguments, **options):
        keeps = operator == torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(net, image, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("norm", [None, "instance"])
def test_selective_checkpoints(norm, kernels, engine):
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=3, norm=norm).to(kernels)
    image = torch.randn(2, 4, 12, device=kernels)
    cotangent, parameters = torch.randn_like(image), [*net.parameters()]
    expected = torch.autograd.grad(net(image), parameters, cotangent)
    for _ in range(ROUNDS):
        out = selectively(net, image.clone().requires_grad_())
        assert_same(torch.autograd.grad(out, parameters, cotangent), expected)


def offloaded(net, image):
    with torch.autograd.graph.save_on_cpu():
        return net(image)


@pytest.mark.parametrize("run", [again, offloaded])
@pytest.mark.parametrize("name", ["batch", "unet"])
def test_what_hooks_save_is_that_of_the_general_path(name, run, kernels, engine, monkeypatch):
    """Programs have no chains there: what is saved is counted when it is computed again."""
    torch.manual_seed(0)
    net = {
        "batch": lambda: ConvGroup(1, 4, nb_conv=3, norm="batch", dropout=0.5),
        "unet": lambda: UNet(1, [4, 4], nb_levels=2, norm="instance"),
    }[name]().to(kernels)
    twin = copy.deepcopy(net)
    inp = torch.randn(2, 4, 12, device=kernels)

    def trained(one):
        one.zero_grad()
        torch.manual_seed(1)
        out = run(one, inp.clone().requires_grad_())
        found = nodes(out)
        out.backward(out.detach().cos())
        return found, [out.detach(), *(p.grad for p in one.parameters()), *one.buffers()]

    for n in range(ROUNDS + 1):
        with nothing_but_programs(monkeypatch) if n == ROUNDS else contextlib.nullcontext():
            kinds, found = trained(net)
        assert "Chain" not in kinds
        with general():
            assert_same(found, trained(twin)[1])
    for _ in range(3):
        out = net(inp)
    assert ("Chain" in nodes(out)) == (name == "unet")  # without hooks, where nothing is dropped


def test_users_may_give_a_saved_image_other_data(kernels, engine):
    torch.manual_seed(0)
    net = ConvGroup(2, 4, nb_conv=2, norm="instance").to(kernels)
    twin, image = copy.deepcopy(net), torch.randn(2, 4, 3, 5, device=kernels)
    cotangent = torch.randn_like(image)

    def gradients(one, changes):
        inp = image.clone().requires_grad_()
        out = one(inp)
        if changes:
            inp.data = inp.data.contiguous(memory_format=torch.channels_last)
        return torch.autograd.grad(out, [inp, *one.parameters()], cotangent)

    for n in range(ROUNDS + 3):
        found = gradients(net, n > ROUNDS)
        with general():
            expected = gradients(twin, n > ROUNDS)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, 1e-5)  # (another layout, another rounding)


def test_hooks_may_return_another_layout_than_before(kernels, engine):
    """As `save_on_cpu` does, whose pinned memory is contiguous."""
    torch.manual_seed(0)
    net = ConvGroup(2, 4, nb_conv=2, norm="instance").to(kernels)
    twin = copy.deepcopy(net)
    inp = torch.randn(2, 4, 3, 5, device=kernels).contiguous(memory_format=torch.channels_last)
    for n in range(ROUNDS + 3):
        unpack = (lambda x: x.contiguous()) if n > ROUNDS else (lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            found = step(net, inp.clone().requires_grad_())
            with general():
                assert_same(found, step(twin, inp.clone().requires_grad_()))


@pytest.mark.parametrize("frozen", [[0, 1], [2]], ids=str)
def test_frozen_blocks(frozen, kernels, engine):
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=3, norm="instance").to(kernels)
    for n in frozen:
        net[n].requires_grad_(False)
    twin = copy.deepcopy(net)
    for _ in range(ROUNDS):
        image = torch.randn(2, 4, 12, device=kernels)
        found = step(net, image)
        with general():
            assert_same(found, step(twin, image))


def test_blocks_that_share_weights_are_no_chain(kernels, engine):
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=3, norm="instance", recurrent=True).to(kernels)
    twin = copy.deepcopy(net)
    for _ in range(ROUNDS):
        image = torch.randn(2, 4, 12, device=kernels, requires_grad=True)
        found = step(net, image)
        with general():
            assert_same(found, step(twin, image))
    assert "Chain" not in nodes(net(image))


def test_what_others_read_ends_a_chain(kernels, engine):
    """What leaves each block is returned, or added to what leaves the next."""
    torch.manual_seed(0)
    for options in ({"return_all": True}, {}):
        net = ConvGroup(1, 4, nb_conv=3, norm="batch", residual=not options).to(kernels)
        twin = copy.deepcopy(net)
        for _ in range(ROUNDS):
            image = torch.randn(2, 4, 12, device=kernels, requires_grad=True)
            found = net(image, **options)
            with general():
                expected = twin(image, **options)
            assert_same(found, expected)


def test_backward_twice(kernels, engine):
    """With what is retained, the same; without, torch's own error; and no second derivative."""
    net = MeshNet(1, 4, nb_layers=3, norm="batch").to(kernels)
    for _ in range(ROUNDS):
        image = torch.randn(1, 4, 12, device=kernels, requires_grad=True)
        out = net(image)
        (first,) = torch.autograd.grad(out.sum(), image, retain_graph=True)
        (again,) = torch.autograd.grad(out.sum(), image, retain_graph=True)
        assert_same([first], [again])
        (slope,) = torch.autograd.grad(out.sum(), image, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            slope.sum().backward()
        torch.autograd.grad(net(image).sum(), image)
        out = net(image)
        torch.autograd.grad(out.sum(), image)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out.sum(), image)


def test_weights_that_change_before_the_backward_are_noticed(kernels, engine):
    net = ConvGroup(1, 4, nb_conv=3, norm="batch").to(kernels)
    for _ in range(ROUNDS):
        out = net(torch.randn(2, 4, 12, device=kernels))
        with torch.no_grad():
            net[1].conv.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
