"""Cases of `cassetta.measure` against their twins of plain `torch.nn` modules.

    make bench

Runs on the GPU if there is one, and with small images if not. The two agree to rounding, which is
asserted before they are timed: what the layers of this package add on a CPU is the check of their
input, which only shows on small images. `cassetta bench` measures all cases, and more of them.
"""

import pytest
import torch

from cassetta.measure import cases, twins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["block-16-d1", "block-64-d4", "model5_gw_ae", "meshnet", "unet2d"]


@pytest.mark.parametrize("which", ["cassetta", "plain torch"])
@pytest.mark.parametrize(
    "name", ["block-16-d1", "block-64-d4", "model5_gw_ae", "meshnet", "unet2d"]
)
def test_forward_and_backward(benchmark, name, which):
    torch.manual_seed(0)
    case = cases.find(name)
    ours = case.make().to(DEVICE)
    plain = twins.plain(ours)
    shape = case.shape if DEVICE == "cuda" else case.small
    inp = torch.randn(shape, device=DEVICE)
    torch.testing.assert_close(ours(inp), plain(inp), rtol=1e-4, atol=1e-4)
    net = ours if which == "cassetta" else plain

    def step():
        net.zero_grad()
        net(inp).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {' x '.join(map(str, shape))}, forward and backward"
    benchmark.name = which
    benchmark(step)
