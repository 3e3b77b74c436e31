"""The tuner: the fastest engine that is right is chosen, kept, and told of; a wrong one never."""

import contextlib
import copy
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cassetta
from cassetta.backbones import MeshNet
from cassetta.kernels import configs, dispatch, engines, evidence, library, plans, tile
from cassetta.layers import ConvBlock, fusing
from cassetta.measure import agreement, tuning
from cassetta.measure.timing import Timing
from cassetta.measure.tuning import tune


@pytest.fixture
def open_choice(monkeypatch):
    """On this CPU too there is a choice, between plain PyTorch and the fused blocks on it."""
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "SMALL", 0)


def add_engine(monkeypatch, name, **functions):
    """Add an engine, which is that of torch but for these functions."""
    engine = SimpleNamespace(**{**vars(engines.library), **functions})
    monkeypatch.setitem(engines.ENGINES, name, engine)


def times(monkeypatch, **ms):
    """Pretend that the engines take so long."""
    monkeypatch.setattr(
        tuning,
        "interleaved",
        lambda runs, *rest, **options: {n: Timing(*[ms.get(n, 9.0)] * 3) for n in runs},
    )


def net_and_image():
    return MeshNet(2, 4, nb_layers=2, nb_conv_per_layer=1), torch.randn(2, 4, 9, 8)


def chosen(net, image):
    return {row.engine for row in cassetta.explain(net, image)}


def test_the_fastest_is_chosen_kept_and_told_of(monkeypatch, open_choice):
    net, image = net_and_image()
    assert chosen(net, image) == {"library"}
    times(monkeypatch, library=2.0, reference=1.5)
    found = tune(net, image)
    assert [row.choice for row in found] == ["reference"] * 2
    assert found.is_complete
    assert "library 2 ms" in str(found)
    evidence.forget()  # what follows is read from disk
    for row in cassetta.explain(net, image):
        assert row.engine == "reference"
        assert row.reason == "measured to be the fastest"
        assert row.evidence == "measured here: reference 1.5 ms, library 2 ms, gemm 9 ms"
    assert {row.is_new for row in tune(net, image)} == {False}
    times(monkeypatch, library=1.0, reference=1.5)
    assert {row.choice for row in tune(net, image, again=True)} == {"library"}
    assert chosen(net, image) == {"library"}
    monkeypatch.undo()
    with dispatch.use_backend("reference"):
        assert chosen(net, image) == {"reference"}


WRONG = {
    "one voxel": ("fprop", lambda y: y.index_put((torch.tensor(0),) * 4, torch.tensor(9.0))),
    "a percent": ("fprop", lambda y: y * 1.01),
    "its gradient": ("bprop", lambda dz: 0 * dz),
    "NaN": ("fprop", lambda y: y * float("nan")),
    "its shape": ("fprop", lambda y: y[..., :1]),
    "its dtype": ("fprop", lambda y: y.double()),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_engine_is_refused_however_fast(monkeypatch, open_choice, what):
    function, change = WRONG[what]
    right = getattr(engines.library, function)

    def wrong(*args, **options):
        first, *others = right(*args, **options)
        return change(first), *others

    add_engine(monkeypatch, "wrong", **{function: wrong})
    times(monkeypatch, wrong=0.001)
    net, image = net_and_image()
    for row in tune(net, image):
        assert row.choice != "wrong"
        assert "wrong refused: it" in row.evidence
    assert "wrong" not in chosen(net, image)


def test_an_engine_that_fails_is_refused(monkeypatch, open_choice):
    def fails(*args):
        raise RuntimeError("a private API changed")

    add_engine(monkeypatch, "fails", fprop=fails)
    net, image = net_and_image()
    assert "it fails (RuntimeError: a private API changed)" in tune(net, image)[0].evidence
    assert "fails" not in chosen(net, image)


def test_an_error_without_words_is_told_too(monkeypatch, open_choice):
    def fails(*args):
        raise AssertionError

    add_engine(monkeypatch, "fails", fprop=fails)
    assert "it fails (AssertionError:)" in tune(*net_and_image())[0].evidence


def test_an_engine_that_comes_later_is_measured_too(monkeypatch, open_choice):
    """What was measured without it no longer answers the question."""
    times(monkeypatch, library=2.0, reference=1.5)
    net, image = net_and_image()
    assert {row.choice for row in tune(net, image)} == {"reference"}
    add_engine(monkeypatch, "halo")
    times(monkeypatch, library=2.0, reference=1.5, halo=1.0)
    assert {(row.choice, row.is_new) for row in tune(net, image)} == {("halo", True)}
    assert chosen(net, image) == {"halo"}
    assert {row.is_new for row in tune(net, image)} == {False}


def zeros_where_large(conv):
    """As cuDNN did: nothing is computed of a sample that 32 bits do not count."""

    def convolved(x, w, *rest):
        out = conv(x, w, *rest)
        return out if x[0].numel() < library.LARGEST else 0 * out

    return convolved


def test_samples_too_large_for_cudnn_are_judged_in_slabs(monkeypatch, open_choice):
    """As if 2^31 were 200, and 2^27 were 50: an engine that trusts cuDNN there is refused."""

    def whole(x, p, x2, p2, w, b, geometry, *rest):
        padding = [before for before, _ in geometry.padding]
        return library._CONV[2](x, w, b, 1, padding), None

    pieces = []
    largest = agreement._largest
    monkeypatch.setattr(library, "LARGEST", 200)
    monkeypatch.setitem(library._CONV, 2, zeros_where_large(library._CONV[2]))
    monkeypatch.setattr(agreement, "SLAB", 50)
    monkeypatch.setattr(
        agreement, "_largest", lambda one: pieces.append(one.numel()) or largest(one)
    )
    add_engine(monkeypatch, "whole", fprop=whole)
    times(monkeypatch, whole=0.001, library=0.5)
    block = ConvBlock(2, 4, 4, activation="SiLU")
    found = {size: tune(block, torch.randn(2, 4, size, 9)) for size in (5, 20)}
    assert [row.choice for row in found[5]] == ["whole"]
    assert [row.choice for row in found[20]] == ["library"]
    assert "whole refused: its output is off by 1 of its size" in found[20][0].evidence
    # one row at a time, of which there are 20: output and gradient, of the engine and its judge
    assert pieces.count(2 * 4 * 9) >= 20 * 2 * 2


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 3, 19, 8)])
def test_no_voxel_escapes_the_slabs(monkeypatch, place):
    monkeypatch.setattr(agreement, "SLAB", 50)
    right = torch.randn(2, 4, 20, 9)
    wrong = right.clone()
    wrong[place] += 9
    steps = [agreement.Step(("output",), (one,)) for one in (wrong, right, right)]
    for deep in (False, True):
        assert "its output is off by" in agreement.judge(*steps, deep=deep)
        assert agreement.judge(*steps[1:], steps[1], deep=deep) is None


def test_a_right_engine_is_really_timed(monkeypatch, open_choice):
    """No pretended times: one that sleeps loses, and one that does less wins."""

    def slow(*args):
        time.sleep(0.02)
        return engines.library.fprop(*args)

    add_engine(monkeypatch, "slow", fprop=slow)
    net, image = net_and_image()
    for row in tune(net, image):
        record = evidence.table(image.device).find(row.key)
        assert record.ms["slow"] > 20
        assert record.choice != "slow"


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_network_changes(monkeypatch, open_choice, train):
    net, image = net_and_image()
    net.train(train)
    net(image).sum().backward()
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    random = torch.get_rng_state()
    tune(net, image)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training == train
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)
        assert parameter.requires_grad


def test_training_and_inference_autocast_and_layout_are_apart(monkeypatch, open_choice):
    times(monkeypatch)
    net, image = net_and_image()
    keys = {row.key for row in tune(net, image)}
    last = image.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = {row.key for row in tune(net, image)}
    others = [
        {row.key for row in tune(net, last)},
        {row.key for row in tune(net.eval(), image)},
        {row.key for row in tune(net, torch.randn(2, 4, 9, 9))},
        rounded,
    ]
    assert all(keys.isdisjoint(other) for other in others)
    assert any("first float32 bfloat16, conv 4 k(3, 3) d(1, 1) bias" in key for key in rounded)


@pytest.mark.parametrize("engine", ["reference", "library"])
def test_under_autocast_each_step_rounds_its_weights(engine):
    """As those of a training do, although what is tuned stays within one autocast."""
    block = ConvBlock(2, 4, 4, norm="instance")
    image = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        run = tuning._run(tuning._Block(block), [(image,)], True, engine)
        steps = [sum(one.shape == block.conv.weight.shape for one in cast(run)) for _ in "abc"]
    assert steps[0] > 0
    assert steps == steps[:1] * 3


def cast(run):
    """What is made another dtype."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                seen.append(args[0])
            return function(*args, **kwargs or {})

    seen = []
    with Casts():
        run(0)
    return seen


@pytest.mark.parametrize("look", [cassetta.explain, tune])
def test_a_network_that_was_looked_at_under_autocast_can_be_trained_there(open_choice, look):
    """Torch 2.8 keeps weights that were rounded without gradients, and takes them for others."""
    net, image = net_and_image()
    with torch.autocast("cpu", torch.bfloat16):
        look(net, image)
        net(image).float().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_budget_stops_and_a_later_call_goes_on(monkeypatch, open_choice):
    times(monkeypatch)
    net, image = net_and_image()
    stopped = tune(net, image, budget=-1)
    assert (len(stopped), stopped.left, stopped.is_complete) == (0, 2, False)
    assert "2 blocks are left" in str(stopped)
    done = tune(net, image, budget=60)
    assert done.is_complete
    assert {"check", "timing"} <= {what for _, what in done.budget.spent}
    assert {"library", "reference"} <= {whom for whom, _ in done.budget.spent}


def test_where_nothing_can_be_chosen_the_reason_is_told():
    found = tune(*net_and_image())
    assert not len(found)
    assert str(found) == "there is nothing to choose: the image is on the CPU"
    assert "it has no blocks" in str(tune(torch.nn.Conv2d(1, 1, 1), torch.randn(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="inputs=.. is empty"):
        tune(torch.nn.Identity())


def test_out_of_memory_is_told_and_nothing_is_kept(monkeypatch, open_choice):
    def full(*rest, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(tuning, "interleaved", full)
    net, image = net_and_image()
    row = tune(net, image)[-1]
    assert row.choice == ""
    assert "out of memory" in row.evidence
    assert chosen(net, image) == {"library"}


def test_without_memory_for_an_engine_it_is_not_called_wrong(monkeypatch, open_choice):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    add_engine(monkeypatch, "full", fprop=full)
    net, image = net_and_image()
    for row in tune(net, image):
        assert (row.choice, row.is_new) == ("", False)
        assert evidence.table(image.device).find(row.key) is None


STOPS = {
    "Ctrl-C": KeyboardInterrupt,
    "an error": RuntimeError,
    "out of memory": torch.OutOfMemoryError,
}


@pytest.mark.parametrize("where", ["the model", "an engine", "the judge", "the clock"])
@pytest.mark.parametrize("what", STOPS)
def test_nothing_of_the_network_changes_when_it_stops_midway(monkeypatch, open_choice, what, where):
    def stops(real, at):
        calls = iter(range(10**9))

        def run(*args, **options):
            if next(calls) == at:
                raise STOPS[what]("stopped")
            return real(*args, **options)

        return run

    net = MeshNet(2, 4, nb_layers=3, nb_conv_per_layer=1, norm="batch", dropout=0.3)
    image = torch.randn(2, 4, 9, 8)
    net(image).sum().backward()
    net[1].eval().requires_grad_(False)
    before, random = everything(net), torch.get_rng_state()
    if where == "the model":
        norm = net[2][0].norm
        monkeypatch.setattr(norm, "forward", stops(norm.forward, 0))
    elif where == "an engine":
        monkeypatch.setattr(engines.library, "fprop", stops(engines.library.fprop, 4))
    elif where == "the judge":
        monkeypatch.setattr(agreement, "judge", stops(agreement.judge, 1))
    else:
        monkeypatch.setattr(tuning, "interleaved", stops(tuning.interleaved, 1))
    with contextlib.suppress(*STOPS.values()):
        tune(net, image)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert (dispatch._forced, plans._asked, fusing._listener.log) == (None, None, None)
    for one, other in zip(everything(net), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def everything(net):
    """What a network holds, as tensors: numbers, gradients, modes, what asks for a gradient."""
    tensors = [tensor.clone() for tensor in net.state_dict().values()]
    tensors += [p.grad.clone() for p in net.parameters()]
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    return [*tensors, *map(torch.tensor, flags)]


def test_a_pass_without_a_right_plan_refuses_its_engine(monkeypatch, kernels):
    """Each plan fails or is wrong: plain PyTorch is left, and the tuning goes on."""
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    times(monkeypatch, library=0.1)
    right = dispatch._triton_passes()

    def moments(x, p):
        if plans._forced.get("pass") == plans.PLANS[0]:
            raise RuntimeError("out of shared memory")
        mean, var = right.moments(x, p)
        return (mean + 1, var) if "pass" in plans._forced else (mean, var)

    wrong = SimpleNamespace(**{**vars(right), "moments": moments})
    monkeypatch.setattr(dispatch, "_triton_passes", lambda: wrong)
    block = ConvBlock(2, 4, 4, norm="instance", order="cndax").to(kernels)
    row = tune(block, torch.randn(1, 4, 6, 5, device=kernels))[-1]
    assert row.choice == "reference"
    assert "library refused: no plan of moments is right" in row.evidence
    assert "it fails (RuntimeError: out of shared memory)" in row.evidence


def test_plans_of_passes_are_measured_and_used(monkeypatch, kernels):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    fast = plans.PLANS[1]
    times(monkeypatch, **{str(fast): 0.1}, library=0.1)
    block = ConvBlock(2, 4, 4, norm="instance", order="cndax").to(kernels)
    image = torch.randn(1, 4, 6, 5, device=kernels)
    found = {row.key.split()[0]: row for row in tune(block, image)}
    assert {"moments", "materialize", "prologue_sums", "prologue_dgrad"} <= set(found)
    for name in ("moments", "materialize", "prologue_sums", "prologue_dgrad"):
        assert found[name].choice == str(fast)
        assert plans.chosen(plans.Pass(name, image, False), image.device) == fast
    used = []
    over = configs.over_voxels
    monkeypatch.setattr(configs, "over_voxels", lambda *a: used.append(a[-1]) or over(*a))
    block(image)
    assert used
    assert set(used) == {fast}


def test_plans_of_our_own_convolutions_are_measured_and_used(monkeypatch, kernels):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    product = plans.Product(
        "conv_wgrad", (1,), 1, (1,), ConvBlock(1, 1, 1).conv.geometry, torch.float32
    )
    fast = {
        "conv_fprop": product._replace(name="conv_fprop").plans[1],
        "conv_wgrad": product.plans[1],
    }
    times(monkeypatch, **{str(plan): 0.1 for plan in fast.values()}, gemm=0.1)
    block = ConvBlock(2, 4, 4, norm="instance", order="cndax").to(kernels)
    image = torch.randn(1, 4, 6, 5, device=kernels)
    *rows, row = tune(block, image)
    assert row.choice == "gemm"
    found = {one.key.split()[0]: one.choice for one in rows}
    assert found["conv_fprop"] == found["conv_dgrad"] == str(fast["conv_fprop"])
    assert found["conv_wgrad"] == str(fast["conv_wgrad"])
    used = []
    launch = tile.launch
    monkeypatch.setattr(
        tile, "launch", lambda k, x, c, *a, **o: used.append(c) or launch(k, x, c, *a, **o)
    )
    (chosen,) = cassetta.explain(block, image)
    assert chosen.engine == "gemm"
    assert "measured here: " in chosen.evidence
    block(image).sum().backward()
    stages = {(type(one), one.stages) for one in used if hasattr(one, "stages")}
    assert stages == {
        (configs.GemmConfig, fast["conv_fprop"].stages),
        (configs.WgradConfig, fast["conv_wgrad"].stages),
    }
    blocks = {one.block_m for one in used if isinstance(one, configs.GemmConfig)}
    assert blocks == {fast["conv_fprop"].block_m}


def test_an_engine_without_a_kernel_for_a_block_is_not_timed(monkeypatch, kernels):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    times(monkeypatch, gemm=0.1)
    block = ConvBlock(2, 4, 4, norm="instance", optc={"groups": 2}).to(kernels)
    row = tune(block, torch.randn(1, 4, 6, 5, device=kernels))[-1]
    assert row.choice != "gemm"
    assert "gemm refused: our own convolutions have no groups, and this one has 2" in row.evidence


@pytest.mark.parametrize(("activation", "kinked"), [("ReLU", True), ("SiLU", False)])
def test_only_kinks_excuse_gradients_of_a_deep_network(activation, kinked):
    """And no more than what rounding to the other side of 0 makes of some; never an output."""
    assert agreement.has_kinks(MeshNet(1, 2, nb_layers=2, activation=activation)) is kinked
    one = torch.ones(100)

    def judged(output, gradient):
        steps = [
            agreement.Step(("output", agreement.IMAGE), pair)
            for pair in ((output, gradient), (one, one), (one, one))
        ]
        return agreement.judge(*steps, deep=True, kinked=kinked)

    assert (judged(one, 1.01 * one) is None) is kinked
    assert "its gradient is off by 0.02" in judged(one, 1.02 * one)
    assert "its output is off by 0.01" in judged(1.01 * one, one)
