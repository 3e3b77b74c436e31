"""What only a GPU can show. Most decisive first; `make test-gpu` runs this before all else."""

import contextlib
import copy
import shutil
import subprocess
import sys

import pytest
import torch

import cassetta
from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.kernels import dispatch, reference
from cassetta.kernels.types import Activation, Prologue

from compare import assert_near

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

NETS = {
    "meshnet": lambda: (MeshNet(3, 21, nb_layers=4), (1, 21, 40, 41, 42)),
    "unet": lambda: (UNet(3, 16, nb_levels=3, norm="instance"), (2, 16, 36, 40, 33)),
    "unet, batch norm": lambda: (UNet(2, 32, nb_levels=3, norm="batch"), (2, 32, 65, 64)),
    "atrous": lambda: (ATrousNet(3, 8, nb_levels=3), (1, 8, 30, 31, 32)),
}


def step(net, inp, **autocast):
    """Output and gradients of one step."""
    net.zero_grad()
    inp = inp.clone().requires_grad_()
    rounded = torch.autocast("cuda", **autocast) if autocast else contextlib.nullcontext()
    with rounded:
        out = net(inp)
    torch.manual_seed(2)
    out.backward(torch.randn_like(out))
    return [out.detach(), inp.grad.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_as_good_as_eager(name, dtype, layout, kernels, engine):
    """err(ours) <= 2 err(eager under the same autocast) + slack, against float64, in norm."""
    net, shape = NETS[name]()
    net = net.to(kernels)
    inp = torch.randn(shape, device=kernels)
    if layout == "last":
        inp = inp.movedim(1, -1).contiguous().movedim(-1, 1)
    autocast = {} if dtype is torch.float32 else {"dtype": dtype}
    with dispatch.use_backend("reference"):
        truth = step(copy.deepcopy(net).double(), inp.double())
        same = step(copy.deepcopy(net), inp, **autocast)
    assert {row.engine for row in cassetta.explain(net, inp)} == {engine}
    ours = step(copy.deepcopy(net), inp, **autocast)
    largest = max(t.norm().item() for t in truth[2:])
    for one, other, expected in zip(ours, same, truth, strict=True):
        scale = max(expected.norm().item(), 1e-3 * largest)
        off, allowed = (one.double() - expected).norm(), (other.double() - expected).norm()
        assert off <= 2 * allowed + 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("name", ["meshnet", "unet"])
def test_training_keeps_less_memory(name, kernels, engine):
    net, shape = NETS[name]()
    net = net.to(kernels)
    inp = torch.randn(shape, device=kernels)
    peak = {}
    for backend in ("reference", "triton"):
        with dispatch.use_backend(backend):
            step(net, inp)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(net, inp)
            peak[backend] = torch.cuda.max_memory_allocated() - before
    assert peak["triton"] < peak["reference"]


@pytest.mark.parametrize("name", ["meshnet", "unet"])
def test_training_converges_alike(name, kernels, engine):
    losses = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        net, shape = NETS[name]()
        net, inp = net.to(kernels), torch.randn(shape, device=kernels)
        target = torch.nn.functional.avg_pool3d(inp, 3, 1, 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        with dispatch.use_backend(backend):
            for _ in range(60):
                optimizer.zero_grad()
                loss = (net(inp) - target).square().mean()
                loss.backward()
                optimizer.step()
        losses[backend] = loss.item()
    assert losses["triton"] == pytest.approx(losses["reference"], rel=0.1)


@pytest.mark.parametrize("name", ["unet", "unet, batch norm"])
def test_a_cuda_graph_captures_a_step(name, kernels, engine):
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    eager = net(inp)
    eager.square().sum().backward()
    expected = [eager.detach(), *(p.grad.clone() for p in net.parameters())]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            net(inp).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = net(inp)
        out.square().sum().backward()
    graph.replay()
    torch.cuda.synchronize()
    largest = max(t.norm().item() for t in expected[1:])
    found = [out.detach(), *(p.grad for p in net.parameters())]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * max(other.norm().item(), 1e-3 * largest)


@pytest.mark.parametrize("name", ["meshnet", "unet"])
def test_compile(name, kernels, engine):
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    expected = step(net, inp)
    found = step(torch.compile(net, fullgraph=True), inp)
    largest = max(t.norm().item() for t in expected[2:])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * max(other.norm().item(), 1e-3 * largest)


def test_a_sample_of_more_than_2_to_the_31_elements(kernels):
    """Compared in slabs of channels, which are smaller."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("40 GiB of free memory are needed")
    x = torch.randn(1, 3, 1024, 1024, 720, dtype=torch.float16, device=kernels)
    assert x.numel() > 2**31
    one = torch.randn(1, 3, device=kernels)
    p = Prologue(one, one, Activation("relu"))
    passes = dispatch.passes(x)
    z = passes.materialize(x, p, None, x.dtype)
    moments = passes.moments(x, p)
    for c in range(3):
        slab, own = x[:, c : c + 1], Prologue(one[:, c : c + 1], one[:, c : c + 1], p.activation)
        assert_near(z[:, c : c + 1], reference.materialize(slab, own, None, x.dtype), 2e-3)
        truth = reference.moments(slab, own)
        torch.testing.assert_close(moments.mean[:, c], truth.mean[:, 0], rtol=1e-4, atol=1e-5)
    del z
    dx = passes.prologue_dgrad(x, x, p, None, False)  # x is its own gradient: it need not fit twice
    sums = passes.prologue_sums(x, x, p, one, None, False)
    for c in range(3):
        slab, own = x[:, c : c + 1], Prologue(one[:, c : c + 1], one[:, c : c + 1], p.activation)
        expected = reference.prologue_dgrad(slab, slab, own, None, False)
        assert_near(dx[:, c : c + 1], expected, 2e-3)
        expected = reference.prologue_sums(slab, slab, own, one[:, c : c + 1], None, False)
        assert_near(sums[:2, :, c : c + 1], expected[:2], 1e-3)


def test_kernels_run_on_the_device_of_the_tensor(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    net, shape = NETS["unet"]()
    net, inp = net.to("cuda:1"), torch.randn(shape, device="cuda:1")
    with torch.cuda.device(0):
        assert net(inp).device == inp.device


def test_nothing_reads_or_writes_out_of_bounds():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    line = [sanitizer, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    line += ["tests/test_passes.py", "-k", "shape_and_layout"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
