"""The original library's numbers: outputs, gradients and buffers of 29 networks, in float64.

`golden/*.npz` hold, per network, the constructor's arguments and a call (`meta`), the weights, and
what the original computed. `golden/module_trees.json` holds the names and classes of its modules.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cassetta import backbones, layers, models
from cassetta.kernels import dispatch

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
TREES = json.loads((GOLDEN / "module_trees.json").read_text())


def build(case):
    """The network of a case with the original's weights, its arrays, and its description."""
    arrays = np.load(GOLDEN / f"{case}.npz")
    meta = json.loads(str(arrays["meta"]))
    homes = [home for home in (backbones, layers, models) if hasattr(home, meta["cls"])]
    net = getattr(homes[0], meta["cls"])(**meta["kwargs"])
    net.load_state_dict(named(arrays, "state/"), strict=True)
    return net.double().train(meta["train"]), arrays, meta


def named(arrays, prefix):
    names = [key for key in arrays.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in names}


def test_all_cases_are_here():
    assert len(CASES) == 29
    assert sorted(TREES) == CASES


@pytest.mark.parametrize("run", ["reference", "library", "gemm"])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case, run):
    """In plain PyTorch, and by pending transforms with their written-out gradients."""
    with dispatch.use_engine(run), dispatch.fused_on_reference():
        for name, (error, scale) in errors(case, torch.float64, torch.device("cpu")).items():
            assert error <= 1e-10 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_numbers_through_the_kernels(case, kernels, engine):
    """In float32, as near as plain PyTorch comes in float32, which a dozen layers amplify."""
    ours = errors(case, torch.float32, kernels)
    with dispatch.use_backend("reference"):
        same = errors(case, torch.float32, kernels)
    for name, (error, scale) in ours.items():
        assert error <= 2 * same[name][0] + 1e-4 * scale, name


def errors(case, dtype, device):
    """How far outputs, gradients and buffers are from the original's, and on which scale."""
    net, arrays, meta = build(case)
    net = net.to(device, dtype)
    tensor = lambda name: torch.from_numpy(arrays[name]).to(device, dtype)  # noqa: E731
    inputs = [tensor(f"input_{n}").requires_grad_() for n in range(meta["n_inputs"])]
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()  # the files hold this counter as it was after the pass
    out = net(*inputs, **meta["call"])
    assert isinstance(out, tuple) == meta["is_tuple"]
    outputs = out if meta["is_tuple"] else (out,)
    assert len(outputs) == meta["n_outputs"]
    torch.autograd.backward(outputs, [tensor(f"cotangent_{n}") for n in range(len(outputs))])

    found = {f"output_{n}": output.detach() for n, output in enumerate(outputs)}
    found |= {f"after/{name}": net.state_dict()[name] for name in named(arrays, "after/")}
    gradients = {f"grad/{name}": p.grad for name, p in net.named_parameters()}
    gradients |= {f"grad_input_{n}": inp.grad for n, inp in enumerate(inputs)}
    assert {k for k in arrays.files if k.startswith("grad")} == set(gradients)
    # some gradients are zero by theory (a bias before a norm): rounding is all they hold, so the
    # scale below which none is compared is that of the network's gradients
    floor = 1e-3 * max(np.linalg.norm(arrays[name]) for name in gradients)
    off = {}
    for name, value in {**found, **gradients}.items():
        expected = torch.from_numpy(arrays[name]).double()
        assert value.shape == expected.shape, name
        scale = torch.linalg.norm(expected).item()
        error = torch.linalg.norm(value.double().cpu() - expected).item()
        off[name] = error, max(scale, floor if name in gradients else 1e-30)
    return off


@pytest.mark.parametrize("case", CASES)
def test_module_tree_and_key_order(case):
    net, arrays, _ = build(case)
    tree = TREES[case]
    modules = [[n, type(m).__name__] for n, m in net.named_modules(remove_duplicate=False)]
    assert modules == tree["modules"]
    assert list(net.state_dict()) == tree["state"]
    # optimizers know parameters by their order alone
    assert [name for name, _ in net.named_parameters()] == tree["parameters"]
    assert list(named(arrays, "state/")) == tree["state"]


def test_same_seed_same_weights():
    """The original drew these weights after `torch.manual_seed(0)`; so do we."""
    packed = torch.load(GOLDEN / "upstream_segnet.pt", weights_only=True)
    torch.manual_seed(0)
    net = models.SegNet(*packed["args"], **packed["kwargs"])
    for name, expected in packed["state"].items():
        torch.testing.assert_close(net.state_dict()[name], expected, rtol=0, atol=0)


def test_file_saved_by_the_original_loads():
    net = models.SegNet.load_from(GOLDEN / "upstream_segnet.pt").eval()
    pair = torch.load(GOLDEN / "upstream_segnet_pair.pt", weights_only=True)
    # probabilities in float32: 8 eps of the largest, 1, and its own rounding for each
    torch.testing.assert_close(net(pair["input"]), pair["output"], rtol=1e-5, atol=1e-6)
