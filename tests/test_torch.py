"""Networks are plain modules: what torch does with modules, it does with these."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.models import SegNet

from compare import assert_near

NETS = {
    "unet": lambda: UNet(2, 4, nb_levels=3, norm="instance", unpool_mode="interpolate"),
    "unet, summed": lambda: UNet(2, 4, nb_levels=3, norm=2, skip="+", residual=True),
    "meshnet": lambda: MeshNet(2, 4, nb_layers=2, residual=True, attention="sqzex"),
    "atrous": lambda: ATrousNet(2, 4, nb_levels=2),
    "segnet": lambda: SegNet(2, 4, 3, opt_backbone={"nb_features": 4, "nb_levels": 2}),
}


LAYERS = 20
"""The deepest of these networks rounds its image so often, each time by eps / 2 of the largest
value at most; twice that, for operands and result of each convolution are rounded."""


@pytest.fixture(params=NETS)
def net(request):
    return NETS[request.param]()


@pytest.fixture
def inp():
    return torch.randn(2, 4, 11, 13)  # odd, so that skip connections are fitted


def gradients(net, inp, run=None):
    """The output of a step, and the gradients of all parameters."""
    net.zero_grad()
    out = (net if run is None else run)(inp)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in net.parameters()]


def assert_same_step(ours, expected, tolerance=1e-5):
    """Output and gradients agree to float32 rounding, on the scale of the largest gradient.

    1e-5 is 80 eps: sums of up to a few thousand terms in another order, through 20 layers and back.
    """
    assert_near(ours[0], expected[0], tolerance)
    scale = max(g.abs().max() for g in expected[1])
    for one, other in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale.item())


def test_compile_whole_graph(net, inp):
    expected = gradients(net, inp)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_step(gradients(net, inp, compiled), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(net, inp, strict):
    net.eval()
    program = torch.export.export(net, (inp,), strict=strict)
    assert_near(program.module()(inp), net(inp), 1e-5)


def test_export_with_open_sizes(net):
    """Batch and sizes stay open; those of a U-Net are multiples of what it divides by."""
    net.eval()
    batch = torch.export.Dim("batch", min=2, max=16)
    height, width = (4 * torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    inp = torch.randn(2, 4, 16, 24)
    program = torch.export.export(net, (inp,), dynamic_shapes=[{0: batch, 2: height, 3: width}])
    other = torch.randn(5, 4, 8, 44)
    assert_near(program.module()(other), net(other), 1e-5)


def test_copies_and_pickles(net, inp):
    net.eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_near(twin(inp), net(inp))


def test_activation_checkpointing(net, inp):
    expected = gradients(net, inp)
    inp = inp.clone().requires_grad_()
    run = lambda x: checkpoint(net, x, use_reentrant=False)  # noqa: E731
    assert_same_step(gradients(net, inp, run), expected)


def test_functional_call_and_vmap(net, inp):
    net.eval()
    expected = net(inp)
    called = torch.func.functional_call(net, dict(net.named_parameters()), (inp,))
    assert_near(called, expected)
    assert_near(torch.vmap(net)(inp[:, None])[:, 0], expected, 1e-5)


def test_second_derivatives(net, inp):
    net.double().eval()
    inp = inp[:, :, :8, :9].double().requires_grad_()
    (slope,) = torch.autograd.grad(net(inp).pow(2).sum(), inp, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.pow(2).sum(), inp)
    assert curvature.isfinite().all()
    assert curvature.abs().max() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(net, inp, layout):
    expected = gradients(net, inp)
    moved = net.to(memory_format=layout)
    assert_same_step(gradients(moved, inp.to(memory_format=layout)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net, inp, dtype):
    expected = net.eval()(inp)
    with torch.autocast("cpu", dtype):
        out = net(inp)
    assert_near(out.float(), expected, LAYERS * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(net, inp, dtype):
    expected = net.eval()(inp)
    out = net.to(dtype)(inp.to(dtype))
    assert out.dtype == dtype
    # as under autocast; and in float64 the error is that of the float32 it is compared with
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert_near(out.float(), expected, LAYERS * eps)


def test_hooks_see_tensors(net, inp):
    seen = []
    for module in net.modules():
        module.register_forward_hook(lambda m, i, o: seen.append((m, o)))
    net(inp)
    for module, out in seen:
        for one in out if isinstance(out, tuple) else (out,):  # an encoder returns its levels
            assert type(one) is torch.Tensor, module
    assert {module for module, _ in seen} == set(net.modules())


def test_conversion_to_sync_batch_norm(inp):
    net = MeshNet(2, 4, nb_layers=2).eval()
    expected = net(inp)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(converted[0][0].norm, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(MeshNet(2, 4, nb_layers=2).state_dict())
    assert_near(converted(inp), expected)


def test_distributed_data_parallel(net, inp, tmp_path):
    expected = gradients(copy.deepcopy(net), inp)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        assert_same_step(gradients(net, inp, parallel), expected)
        # were its reducer the last to hold the group, torch would wait, with Python's lock, for a
        # thread that may want it (seen with torch 2.13: ~ProcessGroupGloo joins its loop)
        del parallel
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_keys_are_clean(net):
    assert not any(key.startswith(("_", "module.")) for key in net.state_dict())
    assert not any("_orig_mod" in key for key in torch.compile(net)._orig_mod.state_dict())
