"""Resampling by matrices against torch-interpol, voxel by voxel: forward, and with backward.

    make bench

Runs on the GPU if there is one. The two agree to rounding, which is asserted before they are timed.
"""

import interpol
import pytest
import torch

from cassetta.functional import resize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"up 16 x 32^3": (2.0, 16, 32), "down 16 x 64^3": (0.5, 16, 64)}


def by_matrices(inp, factor):
    return resize(inp, [factor] * 3)


def by_torch_interpol(inp, factor):
    return interpol.resize(inp, [factor] * 3, anchor="edge", bound="zero")


@pytest.mark.parametrize("how", [by_matrices, by_torch_interpol])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("case", CASES)
def test_resize(benchmark, case, backward, how):
    factor, channels, size = CASES[case]
    inp = torch.randn(1, channels, size, size, size, device=DEVICE, requires_grad=backward)
    torch.testing.assert_close(by_matrices(inp, factor), by_torch_interpol(inp, factor))

    def step():
        out = how(inp, factor)
        if backward:
            torch.autograd.grad(out, inp, torch.ones_like(out))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"resize {case}, {'forward and backward' if backward else 'forward'}"
    benchmark.name = how.__name__
    benchmark(step)
