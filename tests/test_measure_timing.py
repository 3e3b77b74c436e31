"""The clock, the memory and the roofs that figures rest on."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cassetta
from cassetta.backbones import UNet
from cassetta.measure import cases, passes, roofs, timing, twins
from cassetta.measure.timing import interleaved, kept_bytes, nb_inputs, peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.passes` moves."""

    class Clock:
        now = 0.0

        def passes(self, seconds):
            self.now += seconds

    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


def test_rivals_take_turns_and_the_median_counts(clock):
    order = []

    def run(name, milliseconds):
        def once(k):
            order.append((name, k))
            clock.passes(milliseconds(k) / 1000)

        return once

    # 1, 2, 3, 4 and 100 ms, in any order: one slow round is no matter
    runs = {"slow": run("slow", lambda k: [4, 100, 1, 3, 2][k]), "fast": run("fast", lambda k: 2)}
    found = interleaved(runs, CPU, rounds=5, warmup=2)
    assert found["slow"] == pytest.approx((3.0, 1.8, 23.2))
    assert found["fast"] == pytest.approx((2.0, 2.0, 2.0))
    warm, timed = order[:4], order[4:]
    assert warm == [("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1)]
    assert timed == [(name, k) for k in range(5) for name in ("slow", "fast")]


def test_a_budget_ends_the_rounds_but_not_before_the_third(clock):
    rounds = []
    interleaved({"one": lambda k: (rounds.append(k), clock.passes(1))}, CPU, 100, 0, budget=10)
    assert rounds == list(range(11))
    rounds.clear()
    interleaved({"one": lambda k: (rounds.append(k), clock.passes(99))}, CPU, 100, 1, budget=10)
    assert rounds == [0, 0, 1, 2]


def test_inputs_take_turns():
    assert nb_inputs(2**30, CPU) == 3
    assert nb_inputs(0, CPU) == 3


def test_kept_bytes_are_those_of_the_summary():
    net = UNet(2, 4, nb_levels=3, norm="instance")
    image = torch.randn(1, 4, 16, 16)
    kept = kept_bytes(lambda: net(image), net.parameters())
    assert kept == pytest.approx(cassetta.summary(net, image.shape).kept_bytes, rel=0.01)


def test_a_storage_is_kept_once():
    x = torch.randn(10, requires_grad=True)
    assert kept_bytes(lambda: (x.view(2, 5).square(), x.square()), []) == 40
    assert kept_bytes(lambda: x.square(), [x]) == 0


def test_there_is_no_peak_on_a_cpu():
    assert peak_bytes(lambda k: pytest.fail("it ran"), CPU) is None


def test_roofs_are_measured_once():
    found = roofs.roofs(CPU, torch.float32)
    assert found.bandwidth > 1e8
    assert found.rate > 1e8
    assert roofs.roofs(CPU, torch.float32) is found


@pytest.mark.parametrize("what", ["inference", "step"])
@pytest.mark.parametrize("name", ["meshnet", "model5_gw_ae", "monai-basicunet"])
def test_operations_are_those_of_a_run(name, what):
    case = cases.find(name)
    net = case.make()
    image = torch.randn(case.small, requires_grad=case.inner)
    with FlopCounterMode(display=False) as counter:
        out = net(image)
        if what == "step":
            out.sum().backward()
    assert roofs.flops(net, case.small, what, case.inner) == counter.get_total_flops()
    assert roofs.flops(twins.plain(net), case.small, what, case.inner) == counter.get_total_flops()


def test_the_floor_of_a_convolution_by_hand():
    net = cassetta.layers.ConvBlock(2, 4, 4, activation=None)
    shape = (1, 4, 10, 10)
    flops, numbers = 2 * 100 * 9 * 16, 400
    fast, wide = roofs.Roofs(1e30, 1e9), roofs.Roofs(1e9, 1e30)
    for what, repeated, touched in (("inference", 1, 2), ("forward+backward", 3, 5)):
        computing = roofs.floor(net, shape, what, torch.bfloat16, fast)
        moving = roofs.floor(net, shape, what, torch.bfloat16, wide)
        assert computing == pytest.approx(1e3 * repeated * flops / 1e9)
        assert moving == pytest.approx(1e3 * touched * 2 * numbers / 1e9)
        assert roofs.moved(net, shape, what, torch.bfloat16) == touched * 2 * numbers


def test_the_bytes_of_a_pass():
    """Of images alone: moments read one, and leave tables."""
    images = {"moments": 1, "materialize": 2, "prologue_sums": 2, "prologue_dgrad": 3}
    work = passes.work((1, 2, 8), "last", torch.bfloat16, 1, CPU)
    for name, count in images.items():
        for engine, expected in (("reference", count), ("copy", 2)):
            found = work.moved(name, engine, work.run(name, engine)(0))
            assert found == expected * 32


def test_the_clock_sees_a_real_run():
    found = timing.interleaved({"net": lambda k: nn.Linear(2, 2)(torch.ones(2))}, CPU, 3)
    assert 0 < found["net"].p20 <= found["net"].ms <= found["net"].p80
