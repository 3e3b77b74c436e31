"""SyncBatchNorm in our modules: two processes with uneven batches equal one with all samples."""

import copy
import socket

import pytest
import torch
from torch import distributed as dist, multiprocessing, nn

from cassetta.backbones import MeshNet
from cassetta.kernels import dispatch

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


def work(rank, port, inp, sizes, results, backend):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(sizes))
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(work, (port, inp, sizes, results, backend), nprocs=2)
        ranks = [
            {name: torch.from_numpy(copy.deepcopy(array)) for name, array in results[rank].items()}
            for rank in range(2)
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
