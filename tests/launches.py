"""Compare the launches of replays with those of the general path: a script, in its own process.

On a driver that does nothing (`bench/libcuda.py`), as `make bench-host` has it: launches are real
up to the driver, kernels do not run. What Triton's launcher is given is compared: kernel, grid,
numbers, and addresses, of which those of parameters and images are the same, and others equal one
another in the same places.
"""

import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import libcuda

try:
    libcuda.activate(Path(sys.argv[1]))
except libcuda.Missing as missing:
    sys.exit(f"it cannot be measured here: {missing}")

from triton.backends.nvidia import driver as nvidia

from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch, evidence, machine
from cassetta.layers import ConvBlock, ConvGroup
from cassetta.recording import recordings, replay

os.environ[evidence.CACHE] = sys.argv[1]
warnings.simplefilter("ignore")
machine.stand_in = machine.Gpu("null", (9, 0), 80 * 2**30, 50 * 2**20, 232_448)
dispatch.SMALL = 0
launch, log, alive = nvidia.CudaLauncher.__call__, [], []


def spy(self, *args):
    """Log what a launcher is given, which lives on."""
    x, y, z, stream, function, packed, _, _, _, *given = args
    alive.append(given)
    values = [("at", one.data_ptr()) if isinstance(one, torch.Tensor) else one for one in given]
    log.append((id(self), (x, y, z), stream, function, packed, values))
    return launch(self, *args)


nvidia.CudaLauncher.__call__ = spy


class Keeping(replay._Writer):
    """Replays that free nothing, so that no address is met twice that was not one tensor's."""

    def _begin(self):
        self.last = {}
        super()._begin()

    def _result(self, x):
        self.lines.append(f"{self._constant(keep)}(locals())")
        return super()._result(x)


def keep(values):
    alive.append([*values.values()])


replay._Writer = Keeping


def step(net, image):
    """What is launched for a step."""
    log.clear()
    net.zero_grad()
    image.grad = None
    torch.manual_seed(0)
    out = net(image)
    out.backward(torch.ones_like(out))
    return [*log]


def pattern(launches, known):
    """Launches, with an address that is not known by the place where it was first met."""
    met, found = {}, []
    for *head, values in launches:
        row = []
        for one in values:
            address = one[1] if isinstance(one, tuple) else one
            if isinstance(one, tuple) or (isinstance(one, int) and one > 2**32):
                row.append(known.get(address) or ("met", met.setdefault(address, len(met))))
            else:
                row.append(one)
        found.append((*head, row))
    return found


CASES = {
    "cndax instance": (lambda: ConvGroup(3, 16, nb_conv=2, norm="instance"), (1, 16, 4, 5, 6)),
    "several chunks": (lambda: ConvGroup(3, 8, nb_conv=2, norm="instance"), (2, 8, 16, 16, 17)),
    "caxnd batch": (
        lambda: ConvGroup(3, 21, nb_conv=2, norm="batch", order="caxnd", dropout=0.3),
        (2, 21, 4, 5, 6),
    ),
    "PReLU, residual": (
        lambda: ConvGroup(2, 8, nb_conv=2, norm=2, activation="PReLU", residual=True), (2, 8, 9, 9),
    ),
    "no norm": (lambda: ConvBlock(3, 5, 30), (1, 5, 4, 5, 6)),
    "meshnet": (lambda: MeshNet(3, 5, nb_layers=3), (1, 5, 6, 6, 6)),
    "unet": (lambda: UNet(2, 8, nb_levels=2, norm="instance"), (2, 8, 12, 12)),
}  # fmt: skip

nb = 0
for name, (make, shape) in CASES.items():
    for engine in dispatch.ENGINES:
        recordings._known.clear()
        torch.manual_seed(0)
        net, image = make(), torch.randn(shape, requires_grad=True)
        known = {one.data_ptr(): ("given", n) for n, one in enumerate((image, *net.parameters()))}
        with dispatch.use_engine(engine):
            recordings._enabled = False
            step(net, image)
            expected = pattern(step(net, image), known)
            recordings._enabled = True
            for _ in range(3):
                found = pattern(step(net, image), known)
        if name == "no norm" and engine == "library":  # all of it is torch's own
            assert not expected
            continue
        assert any(map(callable, recordings._known.values())), name
        assert len(found) == len(expected) > 0, (name, engine, len(found), len(expected))
        for one, other in zip(found, expected, strict=True):
            assert one == other, (name, engine, one, other)
        nb += len(found)
        alive.clear()

# an image that is not aligned as before is not replayed, and neither is one recorded for it
net, image = ConvBlock(3, 8, 8, norm="instance"), torch.randn(8 * 64 + 1)
with dispatch.use_engine("gemm"), torch.no_grad():
    for begin in (0, 1, 0, 1, 0, 1):
        log.clear()
        net(image[begin : begin + 512].view(1, 8, 4, 4, 4))
print(f"{nb} launches were compared")
