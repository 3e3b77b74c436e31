"""What only a GPU can show. Most decisive first; `make test-gpu` runs this before all else."""

import copy
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cassetta
from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.kernels import dispatch, layout, precision, reference
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue
from cassetta.layers import ConvBlock
from cassetta.measure import agreement

from compare import assert_near

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

SCALE = 1  # by which images are smaller where there is no GPU
TIMES, STEPS = 20, 60  # how often something is convolved, and of a training
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sized(n, c, *size):
    return n, c, *(length // SCALE for length in size)


SMOOTH = "SiLU"
"""After ReLU, a value that rounds to the other side of 0 changes a gradient by a whole voxel, so
that two right results in float32 may differ by 1e-3."""
NETS = {
    "meshnet": lambda: (
        MeshNet(3, 21, nb_layers=4, activation=SMOOTH), sized(1, 21, 40, 41, 42),
    ),
    "unet": lambda: (
        UNet(3, 16, nb_levels=3, norm="instance", activation=SMOOTH), sized(2, 16, 36, 40, 33),
    ),
    "unet, batch norm": lambda: (
        UNet(2, 32, nb_levels=3, norm="batch", activation=SMOOTH), sized(2, 32, 65, 64),
    ),
    "atrous": lambda: (
        ATrousNet(3, 8, nb_levels=3, activation=SMOOTH), sized(1, 8, 30, 31, 32),
    ),
}  # fmt: skip


def autocast(inp, dtype):
    """To a dtype of half precision; to float32, nothing."""
    return torch.autocast(inp.device.type, dtype, enabled=dtype is not torch.float32)


def in_layout(inp, name):
    """The image with its channels first or last in memory."""
    return inp if name == "first" else inp.movedim(1, -1).contiguous().movedim(-1, 1)


def step(net, inp, dtype=torch.float32):
    """Output and gradients of one step."""
    net.zero_grad()
    inp = inp.clone().requires_grad_()
    with autocast(inp, dtype):
        out = net(inp)
    torch.manual_seed(2)
    out.backward(torch.randn_like(out))
    return [out.detach(), inp.grad.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_alike(found, expected):
    """To rounding of float32 through a network; what is nearly zero, on the scale of the others."""
    largest = max(t.norm().item() for t in expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * max(other.norm().item(), 1e-3 * largest)


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(21, 21), (32, 64)], ids=str)
@pytest.mark.parametrize("norm", ["instance", "batch", None])
def test_a_block_is_as_good_as_eager(norm, channels, dtype, order, kernels, engine):
    """Output and every gradient, against float64, beside eager under the same autocast."""
    block = ConvBlock(3, *channels, dilation=2, norm=norm, activation="SiLU", order="cnda")
    inp = in_layout(torch.randn(2, channels[0], 17, 18, 19, device=kernels), order)
    block = block.to(kernels)
    with autocast(inp, dtype):
        assert {row.engine for row in cassetta.explain(block, inp)} == {engine}
        assert agreement.disagreement(block, inp, True, engine) is None


@pytest.mark.parametrize("how", [torch.float16, torch.bfloat16, "ieee", "tf32"], ids=str)
@pytest.mark.parametrize("channels", [21, 32, 128])
def test_our_convolutions_give_the_same_bits_every_time(channels, how, kernels):
    """On images that fill a GPU: whoever overwrites what is being multiplied is seen now and then.

    And right ones: TF32 cuts each factor to 10 bits, so that a product is off by 2^-9 at most.
    """
    dtype = how if isinstance(how, torch.dtype) else torch.float32
    geometry = Geometry((1,) * 3, ((1, 1),) * 3, (1,) * 3)
    image = lambda: layout.empty(sized(2, channels, 40, 41, 42), dtype, kernels).normal_()  # noqa: E731
    x, g = image(), image()
    w = (torch.randn(channels, channels, 3, 3, 3, device=kernels) / channels).to(dtype)
    passes = dispatch.passes(x)

    def run(passes, x, w, g):
        y, *_ = passes.conv_fprop(x, NOTHING, w, None, geometry)
        dz, _ = passes.conv_dgrad(g, w, geometry, tuple(x.shape[2:]))
        return [y, dz, passes.conv_wgrad(g, x, NOTHING, (3, 3, 3), geometry)]

    with precision.use(how if isinstance(how, str) else "ieee"):
        first = run(passes, x, w, g)
        for _ in range(TIMES):
            for one, other in zip(run(passes, x, w, g), first, strict=True):
                assert torch.equal(one, other)
    truth = run(reference, x.double(), w.double(), g.double())
    allowed = {torch.bfloat16: 2**-8, torch.float16: 2**-10, "tf32": 2**-9, "ieee": 1e-5}[how]
    for one, expected in zip(first, truth, strict=True):
        assert (one.double() - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_as_good_as_eager(name, dtype, order, kernels, engine):
    """The output, and all gradients as one vector, beside eager under the same autocast."""
    net, shape = NETS[name]()
    net, inp = net.to(kernels), in_layout(torch.randn(shape, device=kernels), order)
    with autocast(inp, dtype):
        assert {row.engine for row in cassetta.explain(net, inp)} == {engine}
        assert agreement.disagreement(net, inp, True, engine, deep=True) is None


@pytest.mark.parametrize("name", NETS)
def test_a_step_in_tf32_is_as_good_as_in_float16(name, kernels, engine):
    """cuDNN may take whole factors, of which ours have the first 10 bits."""
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    with precision.use("tf32"):
        assert agreement.disagreement(net, inp, True, engine, deep=True) is None


@pytest.mark.parametrize("chosen", ["auto", "library", "gemm"])
@pytest.mark.parametrize("name", ["unet", "meshnet"])
def test_compiled_as_a_whole(name, chosen, kernels, monkeypatch):
    """By what the backend chooses, too: nobody asks the machine for it in a trace."""
    monkeypatch.setattr(dispatch, "SMALL", 0)
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(4, *shape[1:-1], 48 // SCALE, device=kernels)
    auto = chosen == "auto"
    forced = dispatch.use_backend("auto") if auto else dispatch.use_engine(chosen)
    with forced:
        engines = {row.engine for row in cassetta.explain(net, inp)}
        assert ("library" if auto else chosen) in engines
        expected = step(net, inp)
        assert_alike(step(torch.compile(net, fullgraph=True), inp), expected)


@pytest.mark.parametrize("name", ["unet", "meshnet"])
def test_kernels_run_in_the_stream_that_is_current(name, kernels, engine):
    """Where the image comes late: another stream would read it before."""
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    expected = step(net, inp)
    late = torch.zeros_like(inp)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # some 50 ms
        late.copy_(inp)
        found = step(net, late)
    torch.cuda.synchronize()
    assert_alike(found, expected)


@pytest.mark.parametrize("name", ["unet", "unet, batch norm"])
def test_a_cuda_graph_captures_a_step(name, kernels, engine):
    net, shape = NETS[name]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    eager = net(inp)
    eager.square().sum().backward()
    expected = [eager.detach(), *(p.grad.clone() for p in net.parameters())]
    del eager  # while it is alive, gradients add up in the stream of this call
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
    assert_alike([out.detach(), *(p.grad for p in net.parameters())], expected)


def trained(net, call, images, dtype):
    """Losses of some steps of a training that adds up gradients, and what became of the network."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    losses = []
    for n, image in enumerate(images):
        with autocast(image, dtype):
            loss = call(image).float().square().mean()
        loss.backward()
        losses.append(loss.detach())
        if n % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [*losses, *(p.detach() for p in net.parameters()), *net.buffers()]


GRAPHED = [("unet", DTYPES[0]), ("meshnet", DTYPES[0]), ("unet, batch norm", DTYPES[1])]


@pytest.mark.parametrize(("name", "dtype"), GRAPHED, ids=str)
def test_a_graphed_network_is_trained_alike(name, dtype, kernels, engine):
    """Captured once, with every image of its own; statistics of batches are those of each step."""
    net, shape = NETS[name]()
    net = net.to(kernels)
    images = [torch.randn(shape, device=kernels) for _ in range(6)]
    twin, before = copy.deepcopy(net), [one.clone() for one in net.buffers()]
    with autocast(images[0], dtype):
        step = cassetta.graphed(net, images[0])
    for one, other in zip(net.buffers(), before, strict=True):
        assert torch.equal(one, other)
    assert all(p.grad is None for p in net.parameters())
    found, expected = (trained(*one, images, dtype) for one in ((net, step), (twin, twin)))
    for one, other in zip(found, expected, strict=True):
        bound = 1e-4 if dtype is torch.float32 else 2e-2
        assert (one.double() - other).norm() <= bound * max(other.double().norm().item(), 1e-2)


@pytest.mark.parametrize("name", ["unet", "meshnet", "atrous"])
def test_a_graphed_network_predicts_alike(name, kernels, engine):
    net, shape = NETS[name]()
    net = net.to(kernels).eval()
    images = [torch.randn(shape, device=kernels) for _ in range(3)]
    with torch.no_grad():
        predict = cassetta.graphed(net, images[0])
        found = [predict(image) for image in images]
        for one, image in zip(found, images, strict=True):
            assert_near(one, net(image), 1e-4)


def test_an_earlier_call_may_be_alive(kernels, engine):
    """Whose gradients add up in the stream of that call, which no capture can wait for."""
    net, shape = NETS["meshnet"]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    earlier = net(inp)
    assert_near(cassetta.graphed(net, inp)(inp), net(inp), 1e-4)
    earlier.sum().backward()


def test_dropout_is_drawn_anew_by_each_replay(kernels, engine):
    """The numbers that eager draws from the same seed, and none of them by the capture."""
    block = ConvBlock(3, 8, 8, dropout=0.5, norm="instance", activation="ReLU", order="cnda")
    block, inp = block.to(kernels), torch.randn(sized(2, 8, 16, 16, 16), device=kernels)
    torch.manual_seed(3)
    expected = [block(inp) for _ in range(3)]
    torch.manual_seed(3)
    step = cassetta.graphed(block, inp)
    found = [step(inp) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-5)


@pytest.mark.parametrize(("name", "train"), [("unet", True), ("meshnet", False)])
def test_compiled_with_cuda_graphs(name, train, kernels):
    """By torch itself: it warms up, captures, and replays."""
    net, shape = NETS[name]()
    net = net.to(kernels).train(train)
    fast = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        inp = torch.randn(shape, device=kernels)
        torch.compiler.cudagraph_mark_step_begin()
        if train:
            assert_alike(step(fast, inp), step(net, inp))
        else:
            with torch.no_grad():
                assert_near(fast(inp), net(inp), 1e-4)


def test_the_recipe_for_fixed_patches(kernels):
    """Each block of code of docs/patches.md, one after the other."""
    page = (Path(__file__).parents[1] / "docs" / "patches.md").read_text()
    page = page.replace("64, 64, 64", ", ".join([str(64 // SCALE)] * 3))
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    known = {}
    for block in blocks:
        exec(block, known)
    assert known["labels"].shape == (1, *[64 // SCALE] * 3)
    assert len(known["losses"]) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["meshnet", "unet"])
def test_training_converges_alike(name, dtype, kernels, engine):
    """Under autocast, and in float16 with a scaler of gradients, as trainers do it."""
    losses = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        net, shape = NETS[name]()
        net, inp = net.to(kernels), torch.randn(shape, device=kernels)
        target = torch.nn.functional.avg_pool3d(inp, 3, 1, 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler(kernels.type, enabled=dtype is torch.float16)
        with dispatch.use_backend(backend):
            for _ in range(STEPS):
                optimizer.zero_grad()
                with autocast(inp, dtype):
                    loss = (net(inp).float() - target).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        losses[backend] = loss.item()
    assert losses["triton"] == pytest.approx(losses["reference"], rel=0.1)


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


def test_distributed_data_parallel(kernels, engine, tmp_path):
    """In one process, whose gradients travel in buckets beside the kernels that make the others."""
    net, shape = NETS["unet"]()
    net, inp = net.to(kernels), torch.randn(shape, device=kernels)
    expected = step(net, inp)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(net, device_ids=[kernels])
        assert_alike(step(parallel, inp), expected)
    finally:
        torch.distributed.destroy_process_group()


def _on_the_cpu(net, inp, results):
    torch.set_num_threads(1)  # those of the other process are not here
    results.put(net(inp).sum().item())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_computes_on_the_cpu(kernels):
    """As workers of a DataLoader do: CUDA cannot be asked for anything there."""
    net, inp = UNet(2, 4, nb_levels=2), torch.randn(1, 4, 16, 16)
    torch.zeros(1, device=kernels)
    fork = multiprocessing.get_context("fork")
    with dispatch.use_backend("auto"), torch.no_grad():
        results = fork.SimpleQueue()
        process = fork.Process(target=_on_the_cpu, args=(net, inp, results))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert results.get() == pytest.approx(net(inp).sum().item(), rel=1e-4)


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


@pytest.mark.parametrize(
    ("file", "some"),
    [
        ("convolutions", "every_case and float16"),
        ("passes", "shape_and_layout and 21"),
        ("pool", "every_layout"),
        ("resize", "every_layout"),
    ],
)
def test_nothing_reads_or_writes_out_of_bounds(file, some):
    """By NVIDIA's own tool, which neither knows every machine nor is quick."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    line = [sanitizer, "--error-exitcode", "9", sys.executable]
    allocate = [*line, "-c", "import torch; torch.zeros(1, device='cuda')"]
    if subprocess.run(allocate, capture_output=True, check=False).returncode:
        pytest.skip("compute-sanitizer cannot be used on this machine")
    line += ["-m", "pytest", f"tests/test_{file}.py", "-k", some, "-q", "-x"]
    line += ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each image by itself
    try:
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, check=False, timeout=100
        )
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer takes more than 100 s")
    assert done.returncode == 0, done.stdout[-3000:]
