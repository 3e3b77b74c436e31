"""SyncBatchNorm in our modules: two processes with uneven batches equal one with all samples."""

import copy
import datetime
import os
import socket

import pytest
import torch
from test_recordings import TILES, assert_same, general, step as seeded
from torch import distributed as dist, multiprocessing, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from cassetta.backbones import MeshNet
from cassetta.kernels import dispatch, plans, records
from cassetta.layers import ConvGroup
from cassetta.recording import recordings, replay, tape

from compare import NothingRead, assert_near


def network():
    torch.manual_seed(0)
    return MeshNet(2, 4, nb_layers=2, nb_conv_per_layer=1).double()


def step(net, inp):
    out = net(inp)
    out.square().sum().backward()
    return {
        "out": out.detach(), **{f"grad {name}": p.grad for name, p in net.named_parameters()},
        **{f"buffer {name}": buffer.clone() for name, buffer in net.named_buffers()},
    }  # fmt: skip


def begin(rank, port):
    """Begin a process of two; one that waits in vain for the other raises."""
    torch.set_num_threads(1)
    address, long = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=long)


def in_two(function, *args):
    """Return what two processes leave in (rank, port, *args, results)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(function, (port, *args, results), nprocs=2)
        return [copy.deepcopy(results[rank]) for rank in range(2)]


def work(rank, port, inp, sizes, backend, results):
    begin(rank, port)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with dispatch.use_backend(backend), NothingRead():
        found = step(net, inp.split(sizes)[rank])
    results[rank] = {name: tensor.numpy() for name, tensor in found.items()}
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "space", "backend"),
    [
        ([3, 1], (5, 6), "auto"),
        ([2, 2], (5, 6), "reference"),
        ([0, 4], (5, 6), "auto"),  # a process without a sample, which the other waits for
        ([3, 1], (1, 1), "auto"),  # a single value for the second process, which has four in all
    ],
    ids=str,
)
def test_two_processes_equal_one(sizes, space, backend):
    inp = torch.randn(4, 4, *space).double()
    expected = step(network(), inp)
    ranks = [
        {name: torch.from_numpy(array) for name, array in found.items()}
        for found in in_two(work, inp, sizes, backend)
    ]
    assert_near(torch.cat([rank["out"] for rank in ranks]), expected["out"])
    largest = max(t.abs().max().item() for name, t in expected.items() if name.startswith("grad"))
    for name, tensor in expected.items():
        if name.startswith("grad"):  # each process has the share of its samples
            total = ranks[0][name] + ranks[1][name]
            torch.testing.assert_close(total, tensor, rtol=0, atol=1e-10 * largest)
        elif name.startswith("buffer"):
            for rank in ranks:
                assert_near(rank[name], tensor)


GROUPS = {
    "cndax": lambda: ConvGroup(1, 4, nb_conv=2, norm="batch", order="cndax", dropout=0.3),
    "caxnd": lambda: ConvGroup(1, 5, nb_conv=2, norm="batch", order="caxnd", dropout=0.3),
    "PReLU": lambda: ConvGroup(1, 4, nb_conv=2, norm="batch", activation="PReLU", order="cdnax"),
    "PReLU first": lambda: ConvGroup(
        1, 4, nb_conv=2, norm="batch", activation="PReLU", order="cdaxn", dropout=0.3,
    ),
    "pre-activation": lambda: ConvGroup(
        1, 6, nb_conv=2, norm="batch", order="nacdx", residual=True
    ),
}  # fmt: skip


@pytest.fixture
def exchanges(monkeypatch):
    """What is exchanged with another process, by name; it is told what this one tells it."""
    done = []

    def all_gather(every, sent, group):
        assert records.here.tape is None
        done.append("gather")
        for one in every:
            one.copy_(sent)

    def all_reduce(total, group):
        assert records.here.tape is None
        done.append("reduce")
        total.mul_(2)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(recordings, "_changed", set())
    yield done
    dist.destroy_process_group()


def converted(name, device):
    torch.manual_seed(0)
    return nn.SyncBatchNorm.convert_sync_batchnorm(GROUPS[name]().to(device))


def parts():
    """How many of each part of nodes are replayed."""
    found = [key[0][0] for key, value in recordings._known.items() if callable(value)]
    return {name: found.count(name) for name in ("begun", "ended", "shared")}


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["", "rounded"])
@pytest.mark.parametrize("name", GROUPS)
def test_parts_of_nodes_are_replayed(name, dtype, kernels, engine, exchanges):
    """To the bit; no exchange is a part."""
    net = converted(name, kernels)
    twin = copy.deepcopy(net)
    for _ in range(4):
        image = torch.randn(2, net[0].conv.weight.shape[1], 13, device=kernels, requires_grad=True)
        found = seeded(net, image, dtype)
        assert exchanges == ["gather"] * 2 + ["reduce"] * 2
        exchanges.clear()
        with general():
            assert_same(found, seeded(twin, image, dtype))
        exchanges.clear()
    begun, ended, shared = parts().values()
    assert begun > 0
    assert ended > 0
    assert shared > 1  # sums, and gradients
    assert not any(isinstance(one, dist.ProcessGroup) for key in recordings._known
                   for one in torch.utils._pytree.tree_leaves(key))  # fmt: skip


@pytest.mark.parametrize("name", ["PReLU", "pre-activation"])
def test_parts_equal_the_reference(name, kernels, engine, exchanges):
    """Another process with the same images changes no statistics."""
    net = converted(name, kernels)
    plain = copy.deepcopy(net).double()
    for _ in range(4):
        image = torch.randn(2, net[0].conv.weight.shape[1], 13, device=kernels, requires_grad=True)
        found = seeded(net, image)
        with dispatch.use_backend("reference"), general():
            expected = seeded(plain, image.double().detach().requires_grad_())
    assert sum(parts().values()) > 3
    largest = max(one.abs().max() for one in expected[1 : -len([*net.buffers()])])
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = largest if 0 < n < len(found) - len([*net.buffers()]) else 1 + other.abs().max()
        torch.testing.assert_close(one.to(other), other, rtol=0, atol=3e-6 * scale.item())


def changed(*args):
    raise tape.Changed("as a test has it")


def short(*args):
    raise torch.OutOfMemoryError


def test_whatever_becomes_of_a_recording_each_exchange_is_made_once(
    kernels, exchanges, monkeypatch
):
    """Where a part holds no more, and where memory is too short to record it."""
    net = converted("cndax", kernels)
    twin, image = copy.deepcopy(net), torch.randn(2, 4, 13, device=kernels, requires_grad=True)
    for n in range(9):
        if n == 3:
            for key, found in recordings._known.items():
                recordings._known[key] = changed if callable(found) else found
        if n == 6:
            recordings._known.clear()
        with monkeypatch.context() as patch:
            if n >= 6:
                patch.setattr(replay, "record", short)
            found = seeded(net, image)
        assert exchanges == ["gather"] * 2 + ["reduce"] * 2
        with general():
            assert_same(found, seeded(twin, image))
        exchanges.clear()
        assert all(parts().values()) == (n in (1, 2, 4, 5)), n


SIZES = [2, 2, 2, 2, 0, 2, 2], [1, 1, 2, 1, 3, 2, 2]
"""Of the batches of two processes; one records while the other replays, or has nothing."""


def batch(n):
    torch.manual_seed(n)
    return torch.randn(SIZES[0][n] + SIZES[1][n], 4, 9)


def work_in_turns(rank, port, engine, results):
    os.environ[dispatch.INTERPRET] = "1"
    begin(rank, port)
    net, found = converted("PReLU", "cpu"), []
    with dispatch.use_backend("triton"), dispatch.use_engine(engine), plans.use_plan(*TILES):
        for n, own in enumerate(zip(*SIZES, strict=True)):
            inp = batch(n).split(own)[rank].requires_grad_()
            net.zero_grad()
            known = sum(parts().values())
            out = net(inp)
            out.square().sum().backward()
            here = [out, inp.grad, *(p.grad for p in net.parameters()), *net.buffers()]
            news = sum(parts().values()) - known
            found.append(([one.detach().numpy().copy() for one in here], news))
    results[rank] = found
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", dispatch.ENGINES)
def test_one_process_records_while_the_other_replays(engine):
    ranks = in_two(work_in_turns, engine)
    torch.manual_seed(0)
    net = GROUPS["PReLU"]().double()
    nb_parameters = len([*net.parameters()])
    for n, (one, other) in enumerate(zip(*ranks, strict=True)):
        inp = batch(n).double().requires_grad_()
        net.zero_grad()
        with dispatch.use_backend("reference"):
            out = net(inp)
        out.square().sum().backward()
        expected = [out, inp.grad, *(p.grad for p in net.parameters()), *net.buffers()]
        pairs = [
            [torch.from_numpy(array) for array in both]
            for both in zip(one[0], other[0], strict=True)
        ]
        for m, (pair, right) in enumerate(zip(pairs, expected, strict=True)):
            both = torch.cat(pair) if m < 2 else sum(pair) if m < 2 + nb_parameters else pair[0]
            scale = max(1.0, right.abs().max().item())
            torch.testing.assert_close(both.to(right), right, rtol=0, atol=1e-5 * scale)
            if m >= 2 + nb_parameters:
                assert torch.equal(*pair)
    news = [[new for _, new in found] for found in ranks]
    assert [new > 0 for new in news[0]] == [False, True, False, False, False, False, False], news
    assert [new > 0 for new in news[1]] == [False, True, False, False, False, True, False], news
