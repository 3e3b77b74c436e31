"""Networks in CUDA graphs: on a GPU, or on the CPU by graphs that call again what they captured."""

import copy

import pytest
import torch
from torch import nn

import cassetta
from cassetta.backbones import ATrousNet, ConvEncoder, MeshNet, UNet
from cassetta.graphs import Graphed
from cassetta.kernels import dispatch, machine
from cassetta.layers import ConvBlock, LazyConv, Resize

import replayed

GPU = torch.cuda.is_available()
NULL = machine.Gpu("NVIDIA Null", (9, 0), 2**36, 2**20, 232_448)


@pytest.fixture
def device(monkeypatch):
    """A GPU, or the CPU that passes for one; blocks are fused, on the passes of the reference."""
    if not GPU:
        replayed.installed(monkeypatch.setattr)
        monkeypatch.setattr(machine, "stand_in", NULL)
    with dispatch.fused_on_reference():
        yield torch.device("cuda" if GPU else "cpu")


def block(**options):
    """A block of all kinds of state: parameters, running statistics, random numbers."""
    options = {"norm": "batch", "activation": "SiLU", "dropout": 0.3, **options}
    return ConvBlock(2, 4, 4, **options)


def patch(device, *shape):
    return torch.randn(shape or (2, 4, 6, 6), device=device)


def state(net):
    """All that a capture must leave as it is, in values."""
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if GPU else [])]
    return [None if one is None else one.clone() for one in (*tensors, *rng)]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_alike(found, expected):
    """The same to the bit, but on a GPU, whose libraries may add up in another order each time."""
    torch.testing.assert_close(found, expected, rtol=1e-4 * GPU, atol=1e-5 * GPU)


def trained(net, call, images, accumulate=1):
    """Losses of a training by SGD with momentum, and all that it left."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    losses = []
    for n, image in enumerate(images):
        loss = call(image).square().mean()
        loss.backward()
        losses.append(loss.detach())
        if n % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=n % 4 < 2)
    return [*losses, *net.parameters(), *net.buffers()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [block, lambda: MeshNet(2, 4, nb_layers=2, dropout=0.2)])
def test_training_is_what_it_is_without(make, accumulate, device):
    """Weights, running statistics and random numbers are those of each step."""
    net = make().to(device)
    net(patch(device)).sum().backward()
    images = [patch(device) for _ in range(6)]
    twin = copy.deepcopy(net)
    before = state(net)
    step = cassetta.graphed(net, images[0])
    assert_same(state(net), before)
    for one in (net, twin):
        one.zero_grad()
    found = trained(net, step, images, accumulate)
    assert_alike(found, trained(twin, twin, images, accumulate))


def test_inference_is_what_it_is_without(device):
    """What is returned is the caller's: no later call changes it. Nor is the example used."""
    net = UNet(2, 4, nb_levels=2, norm="instance").to(device).eval()
    images = [patch(device, 1, 4, 8, 8) for _ in range(3)]
    example = images[0].clone()
    with torch.inference_mode():
        predict = cassetta.graphed(net, example)
        assert not torch.is_grad_enabled()
    with torch.no_grad():
        found = [predict(image) for image in images]
        assert_alike(found, [net(image) for image in images])
        assert not found[0].requires_grad
        assert_same(example, images[0])
    with torch.inference_mode():
        assert_alike(predict(images[1]), found[1])


def test_gradients_of_inputs_and_several_outputs(device):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.unused = block(norm="instance"), nn.Linear(2, 2)

        def forward(self, x, y):
            z = self.block(x) * y
            return {"z": z, "sum": z.sum(), "where": z.argmax()}

    net = Two().to(device).eval()
    x, y = patch(device).requires_grad_(), patch(device)
    step = cassetta.graphed(net, x, y)
    results = []
    for call in (step, net):
        out = call(x, y)
        assert not out["where"].requires_grad
        results.append((out["where"], *torch.autograd.grad(out["z"].sum() + out["sum"], x)))
    assert_alike(*results)
    step(x, y)["sum"].backward()
    assert net.unused.weight.grad is None
    assert net.block.conv.weight.grad is not None


def test_autocast_is_that_of_the_capture(device):
    net, x = block(norm="instance", dropout=None).to(device), patch(device)
    with torch.autocast(device.type, torch.bfloat16):
        step = cassetta.graphed(net, x)
        assert torch.is_autocast_cache_enabled()
        found = step(x)
        assert found.dtype == torch.bfloat16
        assert_alike(found, net(x))
    with pytest.raises(
        RuntimeError, match="under autocast to torch.bfloat16, and is called under no"
    ):
        step(x)


def test_backward_is_that_of_the_latest_call_once(device):
    net, x = block().to(device), patch(device)
    step = cassetta.graphed(net, x)
    first, second = step(x).sum(), step(x).sum()
    with pytest.raises(RuntimeError, match="backward of an earlier call: .* Call backward before"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time: .* Add losses up"):
        second.backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(step(x).sum(), [*net.parameters()], create_graph=True)


def test_what_it_was_not_captured_for_is_refused(device):
    net, x = block().to(device), patch(device)
    step = cassetta.graphed(net, x)
    before = state(net)
    both = r"captured for \(2, 4, 6, 6\) float32 on .*, and is called with \(1, 4, 6, 6\) float32"
    for wrong, words in [
        ((x[:1],), both),
        ((x.double(),), "called with .* float64"),
        ((x.clone().requires_grad_(),), "called with .* with a gradient: "),
        ((x, x), r"called with .*, \(2"),
        ((), "called with nothing: "),
    ]:
        with pytest.raises(ValueError, match=words):
            step(*wrong)
    with pytest.raises(TypeError, match="an input must be a tensor, not int"):
        step(1)
    net.norm.eval()
    with pytest.raises(
        RuntimeError, match="norm was captured in training mode, and is in evaluation"
    ):
        step(x)
    step.train()
    net.conv.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="moved, exchanged, frozen or unfrozen since"):
        step(x)
    net.conv.weight.requires_grad_()
    own, net.conv.weight = net.conv.weight, nn.Parameter(net.conv.weight.detach().clone())
    with pytest.raises(RuntimeError, match="graph the network again"):
        step(x)
    net.conv.weight = own
    assert_same(state(net), before)
    step(x)
    with torch.no_grad():
        step(x)
        predict = cassetta.graphed(net, x)
    with pytest.raises(
        RuntimeError, match=r"captured under torch.no_grad\(\), and is called where"
    ):
        predict(x)


def test_it_stands_for_the_network(device, tmp_path):
    """Modes, parameters and files are the network's, also within another module."""
    net, x = block().to(device), patch(device)
    step = cassetta.graphed(net.eval(), x)
    assert isinstance(step, Graphed)
    assert not step.training
    assert [*step.parameters()] == [*net.parameters()]
    assert step.state_dict().keys() == net.state_dict().keys()
    other = block().to(device).eval()
    assert step.load_state_dict(other.state_dict()).missing_keys == []
    assert_alike(step(x), other(x))
    holder, plain = nn.Sequential(step), nn.Sequential(block().to(device).eval())
    assert holder.state_dict().keys() == plain.state_dict().keys()
    holder.load_state_dict(plain.state_dict())
    assert_alike(holder(x), plain(x))
    for use in (copy.deepcopy, lambda one: torch.save(one, tmp_path / "net.pt")):
        with pytest.raises(TypeError, match="cannot be copied or saved: copy or save its `.model`"):
            use(step)
    with pytest.raises(RuntimeError, match="graphed already"):
        cassetta.graphed(step, x)


OPTIONS = [
    {"norm": nn.BatchNorm2d(4, momentum=None)},
    {"norm": "instance", "attention": "cbam", "residual": True},
    {"norm": 1, "attention": "mha", "dropout": 0.2, "activation": "PReLU"},
    {"norm": "layer", "attention": "sqzex", "order": "ndcax"},
]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=range(4))
@pytest.mark.parametrize("kind", [MeshNet, ATrousNet, ConvEncoder])
def test_backbones_are_captured(kind, options, train, device):
    depth = {"nb_layers": 2} if kind is MeshNet else {"nb_levels": 2}
    features = 4 if kind is not ConvEncoder else [4, 4]
    net = kind(2, features, **depth, **options).to(device).train(train)
    step = cassetta.graphed(net, patch(device))
    assert isinstance(step(patch(device)), torch.Tensor)


@pytest.mark.parametrize("pool", ["interpolate", "conv", "pool"])
@pytest.mark.parametrize("skip", [True, "+"])
def test_unets_of_odd_size_are_captured(skip, pool, device):
    net = UNet(2, 4, nb_levels=3, skip=skip, pool_mode=pool, unpool_mode=pool).to(device)
    x = patch(device, 1, 4, 13, 10)
    assert_alike(cassetta.graphed(net, x)(x), net(x))


def test_what_of_ours_cannot_be_captured(device):
    """As the documentation says."""
    resize, norm = Resize(factor=2, interpolation=3), nn.BatchNorm2d(4, momentum=None).to(device)
    for net in (resize, norm):
        with pytest.raises(RuntimeError, match="the host reads a value of the GPU"):
            cassetta.graphed(net, patch(device))


class Reads(nn.Module):
    """Does with an image what no graph can hold, after the norm of a block has been updated."""

    def __init__(self, how):
        super().__init__()
        self.block, self.how = block(), how

    def forward(self, x):
        return self.how(self.block(x))


READS = {
    "_local_scalar_dense": lambda x: x * x.mean().item(),
    "equal": lambda x: x if torch.equal(x, x) else -x,
    "nonzero": lambda x: x.flatten()[x.flatten().nonzero()],
    "index.Tensor": lambda x: x[x > 0],
    "copied from or to the CPU": lambda x: (x.detach().to("cpu" if GPU else "meta"), x)[1],
}


@pytest.mark.parametrize("name", READS)
def test_what_the_host_reads_is_refused(name, device):
    net, x = Reads(READS[name]).to(device), patch(device)
    before = state(net)
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: .*{name}"):
        cassetta.graphed(net, x)
    assert_same(state(net), before)


def test_an_index_that_is_no_mask_is_captured(device):
    net, x = (
        Reads(lambda x: x[:, torch.arange(2, device=x.device)]).to(device).eval(),
        patch(device),
    )
    assert_alike(cassetta.graphed(net, x)(x), net(x))


def test_what_fails_in_the_capture_leaves_nothing(device, monkeypatch):
    """What no watch saw: CUDA's own words are told, and the state is as it was."""
    net, x = block().to(device), patch(device)
    before = state(net)

    class Broken:
        def __init__(self, graph, **options):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "graph", Broken)
    with pytest.raises(RuntimeError, match=r"\(operation not permitted .* capturing\): call it as"):
        cassetta.graphed(net, x)
    assert_same(state(net), before)
    assert torch.is_grad_enabled()


def test_a_graphed_network_can_be_distributed(device, tmp_path):
    """Wrapped after it was captured: gradients are exchanged where they leave the graph."""
    net, x = block(dropout=None).to(device), patch(device)
    twin, step = copy.deepcopy(net), cassetta.graphed(net, x)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(step)
        assert_alike(trained(net, parallel, [x] * 4), trained(twin, twin, [x] * 4))
        with pytest.raises(RuntimeError, match=r"\(DistributedDataParallel\) talks to .* wrapped"):
            cassetta.graphed(nn.parallel.DistributedDataParallel(twin), x)
    finally:
        torch.distributed.destroy_process_group()


def test_an_exchanged_buffer_is_refused(device):
    net, x = block().to(device), patch(device)
    net.register_buffer("count", torch.zeros(1, device=device))
    plain = net.forward

    def forward(x):
        net.count = net.count + 1
        return plain(x)

    net.forward, own = forward, net.count
    before = state(net)
    with pytest.raises(RuntimeError, match="exchanges its buffer count in each call"):
        cassetta.graphed(net, x)
    assert net.count is own
    assert_same(state(net), before)


def with_hook(register, *rest):
    net = block()
    getattr(net.conv, register)(lambda *args: None, *rest)
    return net


def with_gradient_hook():
    net = block()
    net.conv.weight.register_hook(lambda grad: 2 * grad)
    return net


def with_buffer():
    net = block()
    net.register_buffer("extra", torch.ones(1, requires_grad=True))
    return net


def returning(value):
    net = block()
    net.forward = lambda x: value if value is not None else x.detach()
    return net


REFUSED = {
    r"conv \(Conv\) has a hook, and no replay calls it": lambda: with_hook("register_forward_hook"),
    r"conv \(Conv\) has a hook, .* remove it": lambda: with_hook("register_full_backward_pre_hook"),
    "a hook is on the gradient of conv.weight": with_gradient_hook,
    r"norm \(SyncBatchNorm\) waits for other processes": lambda: block(norm=nn.SyncBatchNorm),
    r"the network \(DataParallel\) talks to": lambda: nn.DataParallel(block()),
    "the buffer extra asks for a gradient": with_buffer,
    "the network returns a int": lambda: returning(3),
    "no output depends on what asks for a gradient": lambda: returning(None),
    "model must be a torch.nn.Module, not function": lambda: lambda x: x,
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_graph_can_hold_is_refused(words, device):
    net = REFUSED[words]()
    net = net.to(device) if isinstance(net, nn.Module) else net
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        cassetta.graphed(net, patch(device))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_inputs_are_checked(device):
    net = block().to(device)
    with pytest.raises(ValueError, match="is empty: give what the network is called with"):
        cassetta.graphed(net)
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a tensor, not float"):
        cassetta.graphed(net, patch(device), 1.0)
    with pytest.raises(ValueError, match=r"inputs\[1\] is on meta, and inputs\[0\] on "):
        cassetta.graphed(net, patch(device), patch("meta"))
    with pytest.raises(ValueError, match="norm.weight is on meta, and .* move all to one GPU"):
        cassetta.graphed(block().to("meta"), patch(device))
    with pytest.raises(ValueError, match="lazy layers without a shape: call it once before"):
        cassetta.graphed(nn.Sequential(LazyConv(2, 4)), patch(device))


def test_the_cpu_has_no_graphs():
    with pytest.raises(ValueError, match=r"inputs\[0\] is on cpu: CUDA graphs need .* on a GPU"):
        cassetta.graphed(block(), patch("cpu"))


def test_hooks_on_all_modules_are_refused(device):
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(RuntimeError, match="a global hook is on all modules"):
            cassetta.graphed(block().to(device), patch(device))
    finally:
        hook.remove()
