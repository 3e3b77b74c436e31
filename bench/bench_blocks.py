"""Blocks and backbones against the same chain of plain `torch.nn` modules, forward and backward.

    make bench

Runs on the GPU if there is one. The two agree to rounding, which is asserted before they are timed:
what the layers of this package add is the check of their input, some 15 us per block, which only
shows on images of a few voxels.
"""

import pytest
import torch
from torch import nn

from cassetta.backbones import MeshNet
from cassetta.layers import ConvGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 32


def group(norm):
    """Two blocks of convolution, norm and ReLU, and their plain twin."""
    ours = ConvGroup(3, 16, nb_conv=2, norm=norm, order="cndax")
    plain = []
    for _ in range(2):
        plain += [nn.Conv3d(16, 16, 3, padding=1)]
        plain += {
            "batch": [nn.BatchNorm3d(16)],
            "instance": [nn.InstanceNorm3d(16, affine=True)],
            None: [],
        }[norm]
        plain += [nn.ReLU()]
    return ours, nn.Sequential(*plain)


def meshnet():
    """A small MeshNet and its plain twin."""
    ours = MeshNet(3, 5, nb_layers=4, nb_conv_per_layer=1)
    plain = []
    for dilation in (1, 2, 4, 8):
        conv = nn.Conv3d(5, 5, 3, padding=dilation, dilation=dilation)
        plain += [conv, nn.ReLU(), nn.BatchNorm3d(5)]
    return ours, nn.Sequential(*plain)


CASES = {
    "group": lambda: group(None),
    "group, batch norm": lambda: group("batch"),
    "group, instance norm": lambda: group("instance"),
    "MeshNet 4x5": meshnet,
}


@pytest.mark.parametrize("which", ["cassetta", "plain torch"])
@pytest.mark.parametrize("case", CASES)
def test_blocks(benchmark, case, which):
    torch.manual_seed(0)
    ours, plain = (net.to(DEVICE) for net in CASES[case]())
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    channels = next(ours.parameters()).shape[0]
    inp = torch.randn(1, channels, SIZE, SIZE, SIZE, device=DEVICE)
    torch.testing.assert_close(ours(inp), plain(inp))
    net = ours if which == "cassetta" else plain

    def step():
        net.zero_grad()
        net(inp).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case}, {SIZE}^3, forward and backward"
    benchmark.name = which
    benchmark(step)
