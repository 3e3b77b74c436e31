"""A forward that is repeated as a program does what it does without: to the bit, or not at all."""

import contextlib
import copy
import gc
import weakref

import interpol  # noqa: F401 (with an old torch it compiles itself: before a test changes torch)
import pytest
import torch
from test_recordings import NETS, assert_same, general, step
from torch import nn

import cassetta
from cassetta.backbones import ConvDecoder, ConvEncoder, MeshNet, UNet
from cassetta.functional import sites
from cassetta.kernels import dispatch, machine
from cassetta.layers import ConvBlock, ConvGroup, DownPool, ModuleGroup, Resize, fusing, repeated
from cassetta.models import SegNet
from cassetta.recording import programs, recordings

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


class Trace(programs.Trace):
    """A trace that tells which there were, and the reason why one led to no program."""

    made: list["Trace"]

    def program(self, *args):
        self.made.append(self)
        return super().program(*args)


@pytest.fixture
def traces(monkeypatch):
    """All traces of this test, in order."""
    monkeypatch.setattr(Trace, "made", [], raising=False)
    monkeypatch.setattr(programs, "Trace", Trace)
    return Trace.made


@contextlib.contextmanager
def nothing_but_programs(monkeypatch):
    """The general path raises in a `with` block."""

    def forbidden(*arguments):
        raise AssertionError("the general path runs")

    with monkeypatch.context() as patch:
        patch.setattr(ModuleGroup, "defer", forbidden)
        yield


def networks():
    group = lambda **options: ConvGroup(1, 4, nb_conv=2, **options)  # noqa: E731
    return {
        **NETS,
        "segmentation": lambda: (SegNet(1, 1, 3, backbone="UNet", opt_backbone={
            "nb_features": 4, "nb_levels": 2}), (1, 1, 16)),
        "all levels": lambda: (ConvEncoder(1, 4, nb_levels=2), (2, 4, 12)),
        "a way down": lambda: (DownPool(1, 4, 6), (2, 4, 12)),
        "no norm, dropout": lambda: (group(dropout=0.3), (2, 4, 12)),
        "attention, in two ways": lambda: (group(norm="batch", attention="cbam"), (2, 4, 12)),
    }  # fmt: skip


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("train", [True, False])
def test_a_forward_is_traced_once(name, train, kernels, engine, traces):
    """The second one; after that, neither layers nor decisions have a part in it."""
    torch.manual_seed(0)
    net, shape = networks()[name]()
    net = net.to(kernels).train(train)
    options = {"return_all": True} if name == "all levels" else {}
    with torch.set_grad_enabled(train):
        for n in range(4):
            net(torch.randn(shape, device=kernels), **options)
            assert [trace.why for trace in traces] == [""] * (n > 0)


@pytest.mark.parametrize("name", ["segmentation", "a way down", "attention, in two ways"])
def test_a_program_gives_the_same_bits(name, kernels, engine):
    torch.manual_seed(0)
    net, shape = networks()[name]()
    net = net.to(kernels)
    twin = copy.deepcopy(net)
    for _ in range(4):
        image = torch.randn(shape, device=kernels, requires_grad=True)
        found = step(net, image)
        with general():
            assert_same(found, step(twin, image))


def test_several_images_and_results(kernels, traces):
    """A decoder takes skip connections, and returns what leaves each level, if it is asked to."""
    torch.manual_seed(0)
    net = ConvDecoder(1, [6, 4]).to(kernels)
    shapes = (2, 6, 5), (2, 4, 10)
    for return_all in (False, True):
        for _ in range(4):
            images = [torch.randn(shape, device=kernels) for shape in shapes]
            found = net(*images, return_all=return_all)
            with general():
                torch.testing.assert_close(found, net(*images, return_all=return_all))
            assert isinstance(found, tuple) == return_all
    assert [trace.why for trace in traces] == ["", ""]


def test_plain_layers_are_repeated_too(kernels, traces):
    """Of blocks that no kernel runs, with random numbers and statistics as torch has them."""
    torch.manual_seed(0)
    net = UNet(1, 4, nb_levels=2, norm="batch", dropout=0.5).to(kernels)
    twin = copy.deepcopy(net)
    with dispatch.use_engine("reference"):
        for _ in range(4):
            image = torch.randn(2, 4, 16, device=kernels, requires_grad=True)
            found = step(net, image)
            with general():
                assert_same(found, step(twin, image))
    assert [trace.why for trace in traces] == [""]


def test_frozen_parameters_in_turns(kernels, traces):
    """As in adversarial training: both kinds have a program."""
    net = MeshNet(1, 3, nb_layers=2).to(kernels)
    for n in range(8):
        net.requires_grad_(n % 2 == 0)
        out = net(torch.randn(1, 3, 9, device=kernels))
        assert out.requires_grad == (n % 2 == 0)
    assert [trace.why for trace in traces] == ["", ""]


def relaid(net):
    """Parameters have other strides, and are no other tensors."""
    for one in net.parameters():
        if one.ndim == 3:
            one.data = one.data.transpose(0, 1).contiguous().transpose(0, 1)


def test_data_that_is_exchanged_between_forward_and_backward(kernels, engine):
    """Of a parameter, for some in another layout: torch does not notice, and kernels read it."""
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=2, norm="batch", order="cndax").to(kernels)
    twin, image = copy.deepcopy(net), torch.randn(2, 4, 9, device=kernels)
    found = []
    for one, path in ((net, contextlib.nullcontext), (twin, general)):
        for n in range(5):
            with path():
                out = one(image)
                if n == 4:
                    relaid(one)
                one.zero_grad()
                out.square().sum().backward()
        found.append([p.grad for p in one.parameters()])
    assert_same(*found)


class Doubled(nn.Module):
    """A layer of a user's, whose factor is a number of Python."""

    factor = 2.0

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("place", ["layer", "block", "network", "method"])
def test_what_a_user_has_written_is_called_each_time(place, kernels, monkeypatch, traces):
    """For nobody knows what it depends on."""
    net = ConvGroup(1, 2, nb_conv=2).to(kernels)
    if place == "layer":
        net[0].activation = Doubled()
    elif place == "block":
        net[1] = Doubled()
    elif place == "network":
        net = type("Mine", (ConvGroup,), {"defer": lambda self, x: super(type(self), self).defer(x)
                                          .scaled(x.image.new_full(x.shape[:2], Doubled.factor))})(
            1, 2, nb_conv=2).to(kernels)  # fmt: skip
    else:
        relu = lambda self, x: x * Doubled.factor  # noqa: E731
        monkeypatch.setattr(nn.ReLU, "forward", relu)
        net[1].append(nn.ReLU())
    image = torch.randn(1, 2, 9, device=kernels)
    with torch.no_grad():
        for n in range(4):
            monkeypatch.setattr(Doubled, "factor", float(n))
            with general():
                expected = net(image)
            assert_same([net(image)], [expected])
    assert traces == []


def test_hooks_within_are_called_each_time(kernels):
    net = ConvGroup(1, 2, nb_conv=2).to(kernels)
    image, seen = torch.randn(1, 2, 9, device=kernels), []
    for _ in range(4):
        net(image)
    net[0].register_forward_hook(lambda *_: seen.append("block"))
    net[1].conv.register_forward_pre_hook(lambda *_: seen.append("conv"))
    for n in range(4):
        net(image)
        assert seen == ["block", "conv"] * (n + 1)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any")):
        net(image)
    assert "any" in seen


def observed(net, image):
    with fusing.listening(training=True) as ran:
        net(image)
    return bool(ran)


def moded(net, image):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        net(image)
    return bool(seen)


def replicated(net, image):
    other = net._replicate_for_data_parallel()
    for name, child in net.named_children():
        setattr(other, name, child)
    return other(image).shape == image.shape


@pytest.mark.parametrize("look", [observed, moded, replicated])
def test_where_somebody_looks_there_is_no_program(look, kernels, monkeypatch):
    net = ConvGroup(1, 2, nb_conv=2).to(kernels)
    image = torch.randn(1, 2, 9, device=kernels)
    for _ in range(4):
        net(image)
    with nothing_but_programs(monkeypatch):
        net(image)
        with pytest.raises(AssertionError, match="the general path runs"):
            look(net, image)
    assert look(net, image)


def test_an_image_given_twice_is_two(kernels, traces):
    """No program is made of tensors of which nobody knows which of two places is meant."""
    net = ConvDecoder(1, [4, 4], unpool_factor=1).to(kernels)
    with torch.no_grad():
        for n in range(4):
            image = torch.randn(1, 4, 8, device=kernels)
            net(image, image) if n < 3 else None
    assert [trace.why for trace in traces] == ["a tensor is of another kind, or in two places"]


def test_parameters_that_are_tied_and_untied(kernels, traces):
    net = ConvGroup(1, 2, nb_conv=2).to(kernels)
    net[1].conv.weight = net[0].conv.weight
    image = torch.randn(1, 2, 9, device=kernels)
    for n in range(6):
        if n == 3:
            net[1].conv.weight = nn.Parameter(-net[0].conv.weight.detach())
        found = net(image)
        with general():
            assert_same([found], [net(image)])


def traced(function, *tensors):
    with programs.Trace(tensors, ()) as trace:
        out = function(*tensors)
    return trace.program(out, lambda calls, out: calls), trace.why


def told(x):
    return x * x.sum().item()


def chosen(x):
    return x + 1 if x.sum() > 0 else x - 1


def from_elsewhere(x, elsewhere=torch.ones(3)):  # noqa: B008
    return x + elsewhere


def changed_unseen(x):
    y = x.clone()
    with torch._C.DisableTorchFunction():
        y.add_(1)
    return y * 2


def made_unseen(x):
    with torch._C.DisableTorchFunction():
        y = x + 1
    return y * 2


def by_a_generator(x):
    return x + torch.rand(3, generator=torch.Generator().manual_seed(1))


def sliced_by_a_tensor(x):
    return x[x.argmax() :]


@pytest.mark.parametrize(
    "function",
    [told, chosen, from_elsewhere, changed_unseen, made_unseen, by_a_generator, sliced_by_a_tensor,
     lambda x: {"out": x}, lambda x: x.tolist()],
)  # fmt: skip
def test_what_no_program_repeats_is_refused(function):
    program, why = traced(function, torch.randn(3))
    assert program is None
    assert why


def test_programs_repeat_functions_of_torch():
    """Random numbers, changes in place, views, results in tuples, and gradients where asked for."""

    def function(x, y):
        a, b = torch.nn.functional.dropout(x, 0.5).split([1, 2])
        y.mul_(2)
        with torch.no_grad():
            c = torch.cat([a, b[:1]], dim=0) + y[..., :1]
            c[:].add_(1.0)
        return [c, (x * y).unsqueeze(0), None, y]

    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    torch.manual_seed(0)
    program, why = traced(function, x, y.clone())
    assert why == ""
    for _ in range(2):
        one, other = y.clone(), y.clone()
        torch.manual_seed(3)
        expected = function(x, one)
        torch.manual_seed(3)
        found = program((x, other), ())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert [r is not None and r.requires_grad for r in found] == [False, True, False, False]
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_program_frees_what_nobody_reads_any_more():
    """Each result is gone before the next but one is made, whatever came beside it."""
    alive = []

    def made(x, *others):
        alive.append(sum(one() is not None for one in known))
        both = x + 1, x - 1
        known.extend(map(weakref.ref, both))
        return both

    def function(x):
        for _ in range(4):
            x, _unused = programs.calling(made)(x)
        return x

    known = []
    program, _ = traced(function, torch.zeros(2))
    known, alive = [], []
    torch.testing.assert_close(program((torch.zeros(2),), ()), torch.full((2,), 4.0))
    assert alive == [0, 1, 1, 1]


def test_the_graph_goes_with_the_result(kernels):
    """A node of a program is in no cycle; nor does the program hold a network."""
    net = ConvGroup(1, 2, nb_conv=2, norm="batch").to(kernels)
    known = [weakref.ref(one) for one in (*net.modules(), *net.parameters())]
    image = torch.randn(1, 2, 9, device=kernels, requires_grad=True)
    for _ in range(4):
        net(image).sum().backward()
    gc.collect()
    gc.disable()
    try:
        out = net(image)
        node = weakref.ref(out.grad_fn)
        del out
        assert node() is None
        del net
        assert not [one() for one in known if one() is not None]
    finally:
        gc.enable()


def test_backward_twice_and_a_second_derivative(kernels):
    """Are refused, or not, as by the general path."""
    net = ConvGroup(1, 2, nb_conv=2, norm="batch").to(kernels)
    for _ in range(4):
        image = torch.randn(1, 2, 9, device=kernels, requires_grad=True)
        out = net(image).square().sum()
        (once,) = torch.autograd.grad(out, image, retain_graph=True)
        (again,) = torch.autograd.grad(out, image)
        assert_same([once], [again])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, image)
        (first,) = torch.autograd.grad(net(image).square().sum(), image, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            first.sum().backward()


def test_another_layout_of_the_gradient(kernels, engine):
    """A site asks what the gradient of its result is like, which no forward knows."""
    torch.manual_seed(0)
    net = ConvGroup(1, 4, nb_conv=2, norm="batch", order="cndax").to(kernels)
    image = torch.randn(2, 4, 9, device=kernels, requires_grad=True)
    layouts = [torch.Tensor.contiguous, lambda g: g.movedim(1, -1).contiguous().movedim(-1, 1),
               lambda g: g[:1].expand(g.shape)]  # fmt: skip
    for n in range(12):
        g = layouts[n % 3](torch.randn(2, 4, 9, device=kernels))
        (found,) = torch.autograd.grad(net(image), image, g)
        with general():
            (expected,) = torch.autograd.grad(net(image), image, g)
        assert_same([found], [expected])


def test_no_program_on_the_cpu(traces):
    """There, nothing but plain PyTorch runs."""
    if machine.kernels_on() == "cpu":
        pytest.skip("kernels are interpreted on the CPU")
    net = ConvGroup(1, 2)
    for _ in range(4):
        net(torch.randn(1, 2, 9))
    assert traces == []


def test_layers_of_other_libraries_are_called_each_time(kernels, traces):
    """A cubic interpolation is that of torch-interpol, of which a trace sees too little."""
    net = ConvEncoder(1, [2, 2], pool_mode="interpolate").to(kernels)
    net[1][0][0] = Resize([0.5], interpolation="cubic")
    image = torch.randn(1, 2, 8, device=kernels)
    with torch.no_grad():
        for _ in range(4):
            found = net(image)
            with general():
                torch.testing.assert_close(found, net(image))
    assert [bool(trace.why) for trace in traces] == [True]


def test_many_kinds_of_parameters_are_not_kept_for_ever(kernels, traces):
    net = ConvBlock(1, 2, 2).to(kernels)
    image = torch.randn(1, 2, 9, device=kernels)
    for n in range(3 * repeated.VARIANTS):
        for _ in range(2):
            net.conv.weight.data = torch.randn(2, 2, 3 + n, device=kernels)[..., :3]
            net(image)
    kinds = repeated._key((image,), {})
    assert len(repeated.decisions.of(net).found[kinds]) == repeated.VARIANTS


def test_a_site_without_a_recording(kernels, monkeypatch):
    """What cannot be recorded is computed by the general path, each time, in its place."""
    monkeypatch.setattr(sites.recordings.replay, "record", _refused)
    net = ConvGroup(1, 4, nb_conv=2, norm="batch").to(kernels)
    twin = copy.deepcopy(net)
    for _ in range(4):
        image = torch.randn(2, 4, 9, device=kernels, requires_grad=True)
        found = step(net, image)
        with general():
            assert_same(found, step(twin, image))


def _refused(function, *given):
    raise sites.tape.Unrecordable("by this test")


def test_explain_tells_what_is_repeated(kernels, traces):
    """And of what is not, why; of what others wrote, by the modules within."""
    net = UNet(1, 4, nb_levels=2).to(kernels)
    image = torch.randn(2, 4, 16, device=kernels)
    table = cassetta.explain(net, image)
    assert table.programs == {"UNet": ""}
    assert "repeated as a program, from the third forward on: UNet" in str(table)
    both = nn.Sequential(net, ConvGroup(1, 4).to(kernels))
    assert cassetta.explain(both, image).programs == {"0": "", "1": ""}
    hook = net.encoder[1][0].register_forward_hook(lambda *arguments: None)
    table = cassetta.explain(net, image)
    why = "a hook is attached to its DownPool"
    assert {name: found for name, found in table.programs.items() if found} == dict.fromkeys(
        ("UNet", "encoder", "encoder.1"), why
    )
    assert table.programs["decoder"] == ""
    assert f"runs anew each time: encoder.1 ({why})" in str(table)
    hook.remove()
    assert cassetta.explain(net, image).programs == {"UNet": ""}
    assert traces == []


def test_explain_tells_what_a_trace_found(kernels):
    net = ConvEncoder(1, [2, 2], pool_mode="interpolate").to(kernels)
    net[1][0][0] = Resize([0.5], interpolation="cubic")
    image = torch.randn(1, 2, 8, device=kernels)
    with torch.no_grad():
        for n in range(3):
            (why, *_) = cassetta.explain(net, image).programs.values()
            assert (why == "") == (n < 2)
            net(image)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_explain_tells_what_cannot_be_repeated(kernels):
    image = torch.randn(2, 4, 12, device=kernels)
    tied = ConvGroup(1, 4, nb_conv=2).to(kernels)
    tied[1].conv.weight = tied[0].conv.weight
    assert cassetta.explain(tied, image).programs["ConvGroup"] == (
        "a parameter or buffer is in two places"
    )
    scripted = torch.jit.script(nn.Sequential(nn.Identity()))
    beside = nn.Sequential(ConvGroup(1, 4), scripted).to(kernels)
    assert cassetta.explain(beside, image).programs == {"0": ""}
    within = ConvGroup(1, 4).to(kernels)
    within.append(scripted)
    assert (
        "unknown what its RecursiveScriptModule"
        in (cassetta.explain(within, image).programs["ConvGroup"])
    )


def test_explain_tells_of_the_image_that_is_asked_about(kernels):
    """Not of another kind, which was refused later, or alone was traced."""
    group = ConvGroup(1, 4).to(kernels)
    good, bad = (torch.randn(n, 4, 8, device=kernels) for n in (1, 2))
    for _ in range(3):
        group(good)
    refused = repeated._Variants([(lambda *tensors: True, repeated._Refused("it was so"))])
    repeated.decisions.of(group).found[repeated._key((bad,), {})] = refused
    assert cassetta.explain(group, good).programs == {"ConvGroup": ""}
    assert cassetta.explain(group, bad).programs["ConvGroup"] == "it was so"


def test_explain_tells_who_looks(kernels, monkeypatch):
    net, image = ConvGroup(1, 2), torch.randn(1, 2, 8, device=kernels)
    monkeypatch.setattr(recordings, "_enabled", False)
    (why,) = cassetta.explain(net.to(kernels), image).programs.values()
    assert "forbids replays" in why


def test_on_the_cpu_nothing_is_repeated():
    if machine.kernels_on() == "cpu":
        pytest.skip("kernels are interpreted on the CPU")
    assert cassetta.explain(ConvGroup(1, 2), torch.randn(1, 2, 8)).programs == {}
