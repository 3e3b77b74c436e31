"""The tuner: the fastest engine that is right is chosen, kept, and told of; a wrong one never."""

import copy
import time

import pytest
import torch

import cassetta
from cassetta.backbones import MeshNet
from cassetta.kernels import configs, dispatch, evidence
from cassetta.layers import ConvBlock, blocks
from cassetta.measure import tuning
from cassetta.measure.timing import Timing
from cassetta.measure.tuning import tune


@pytest.fixture
def open_choice(monkeypatch):
    """On this CPU too there is a choice, between plain PyTorch and the fused blocks on it."""
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "SMALL", 0)


def add_engine(monkeypatch, name, run):
    monkeypatch.setitem(blocks.ENGINES, name, run)


def times(monkeypatch, **ms):
    """Pretend that the engines take so long."""
    monkeypatch.setattr(
        tuning,
        "interleaved",
        lambda runs, *rest, **options: {n: Timing(*[ms.get(n, 1.0)] * 3) for n in runs},
    )


def net_and_image():
    return MeshNet(2, 4, nb_layers=2, nb_conv_per_layer=1), torch.randn(2, 4, 9, 8)


def engines(net, image):
    return {row.engine for row in cassetta.explain(net, image)}


def test_the_fastest_is_chosen_kept_and_told_of(monkeypatch, open_choice):
    net, image = net_and_image()
    assert engines(net, image) == {"library"}
    times(monkeypatch, library=2.0, reference=1.5)
    found = tune(net, image)
    assert [row.choice for row in found] == ["reference"] * 2
    assert found.is_complete
    assert "library 2 ms" in str(found)
    evidence.forget()  # what follows is read from disk
    for row in cassetta.explain(net, image):
        assert row.engine == "reference"
        assert row.reason == "measured to be the fastest"
        assert row.evidence == "measured here: reference 1.5 ms, library 2 ms"
    assert {row.is_new for row in tune(net, image)} == {False}
    times(monkeypatch, library=1.0, reference=1.5)
    assert {row.choice for row in tune(net, image, again=True)} == {"library"}
    assert engines(net, image) == {"library"}
    monkeypatch.undo()
    with dispatch.use_backend("reference"):
        assert engines(net, image) == {"reference"}


WRONG = {
    "one voxel": lambda out: out.raw.index_put((torch.tensor(0),) * 4, torch.tensor(9.0)),
    "a percent": lambda out: out.raw * 1.01,
    "its gradient": lambda out: out.raw.detach() + 0 * out.raw,
    "NaN": lambda out: out.raw * float("nan"),
    "its shape": lambda out: out.raw[..., :1],
    "its dtype": lambda out: out.raw.double(),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_engine_is_refused_however_fast(monkeypatch, open_choice, what):
    def wrong(block, x, layers):
        return blocks.Deferred(WRONG[what](blocks.Deferred(block._plain(x, layers).z())))

    add_engine(monkeypatch, "wrong", wrong)
    times(monkeypatch, wrong=0.001)
    net, image = net_and_image()
    for row in tune(net, image):
        assert row.choice != "wrong"
        assert "wrong refused: its" in row.evidence
    assert "wrong" not in engines(net, image)


def test_an_engine_that_fails_is_refused(monkeypatch, open_choice):
    def fails(block, x, layers):
        raise RuntimeError("a private API changed")

    add_engine(monkeypatch, "fails", fails)
    net, image = net_and_image()
    assert "it fails (RuntimeError: a private API changed)" in tune(net, image)[0].evidence
    assert "fails" not in engines(net, image)


def test_a_right_engine_is_really_timed(monkeypatch, open_choice):
    """No pretended times: one that sleeps loses, and one that does less wins."""

    def slow(block, x, layers):
        time.sleep(0.02)
        return block._plain(x, layers)

    add_engine(monkeypatch, "slow", slow)
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


def test_a_budget_stops_and_a_later_call_goes_on(monkeypatch, open_choice):
    times(monkeypatch)
    net, image = net_and_image()
    stopped = tune(net, image, budget=-1)
    assert (len(stopped), stopped.left, stopped.is_complete) == (0, 2, False)
    assert "2 blocks are left" in str(stopped)
    assert tune(net, image, budget=60).is_complete


def test_where_nothing_can_be_chosen_the_reason_is_told():
    found = tune(*net_and_image())
    if not torch.cuda.is_available():
        assert not len(found)
        assert "there is nothing to choose: torch finds no NVIDIA GPU" in str(found)
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
    assert engines(net, image) == {"library"}


def test_plans_of_passes_are_measured_and_used(monkeypatch, kernels):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    monkeypatch.setattr(dispatch, "_requested", None)
    fast = configs.PLANS[1]
    times(monkeypatch, **{str(fast): 0.1}, library=0.1)
    block = ConvBlock(2, 4, 4, norm="instance", order="cndax").to(kernels)
    image = torch.randn(1, 4, 6, 5, device=kernels)
    found = {row.key.split()[0]: row for row in tune(block, image)}
    assert {"moments", "materialize", "prologue_sums", "prologue_dgrad"} <= set(found)
    for name in ("moments", "materialize", "prologue_sums", "prologue_dgrad"):
        assert found[name].choice == str(fast)
        assert configs._measured(name, image, False) == fast
    used = []
    over = configs.over_voxels
    monkeypatch.setattr(configs, "over_voxels", lambda *a: used.append(a[-1]) or over(*a))
    block(image)
    assert used
    assert set(used) == {fast}
