"""From which size on fused blocks pay, on a GPU, the host's time and all.

    python bench/small.py --budget 90 --out small.json

Milliseconds of a call among several in a row, of inference and of forward and backward, of blocks,
groups of four and networks, under each engine and as plain twins in both layouts, under autocast to
bfloat16; the median of rounds in which rivals take turns. What is larger of the host's time and the
GPU's is what is seen. `dispatch.SMALL` follows from it.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch
from cassetta.layers import ConvGroup
from cassetta.measure import rows, twins
from cassetta.measure.passes import in_memory
from cassetta.measure.peers import in_layout

ROUNDS = 5
LONG, SHORT = 12, 6
"""Calls in a row, of groups and of networks."""


class Case(NamedTuple):
    """A network and its images."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    calls: int = SHORT

    @property
    def ndim(self) -> int:
        """How many spatial axes there are."""
        return len(self.shape) - 2


def _group(nb_conv: int, norm: str | None, channels: int, edge: int) -> Case:
    build = partial(ConvGroup, 3, channels, nb_conv=nb_conv, norm=norm, order="cndax")
    return Case(build, (2, channels, edge, edge, edge), LONG)


_NETWORKS = {
    "unet3d, 2 x 64^3": (lambda: UNet(3, 16, nb_levels=4, norm="instance"), (2, 16, 64, 64, 64)),
    "unet3d, 1 x 48^3": (lambda: UNet(3, 32, nb_levels=4, norm="instance"), (1, 32, 48, 48, 48)),
    "unet3d, 2 x 96^3": (lambda: UNet(3, 32, nb_levels=5, norm="instance"), (2, 32, 96, 96, 96)),
    "meshnet, 64^3": (lambda: MeshNet(3, 21), (1, 21, 64, 64, 64)),
    "meshnet, 96^3": (lambda: MeshNet(3, 21), (1, 21, 96, 96, 96)),
    "unet2d, 8 x 128^2": (lambda: UNet(2, 32, nb_levels=5, norm="batch"), (8, 32, 128, 128)),
    "unet2d, 8 x 256^2": (lambda: UNet(2, 32, nb_levels=5, norm="batch"), (8, 32, 256, 256)),
}
SIZES = (32, 8), (32, 16), (32, 32), (32, 48), (32, 64), (32, 96), (16, 64), (64, 32), (128, 16)
"""Channels, and voxels along each of three sides, of which there are two images."""
CASES = {name: Case(*of) for name, of in _NETWORKS.items()} | {
    f"{nb_conv} x {norm or 'no norm'}, {channels} channels, 2 x {edge}^3": _group(
        nb_conv, norm, channels, edge
    )
    for norm in ("instance", "batch", None)
    for nb_conv in (4, 1)
    for channels, edge in SIZES
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time networks on small images.")
    parser.add_argument("--budget", type=float, default=90, help="seconds [90]")
    parser.add_argument("--out", type=Path, default=Path("small.json"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], metavar="CASE")
    arguments = parser.parse_args()
    device, end, found = arguments.device, time.monotonic() + arguments.budget, []
    for name in arguments.case:
        if found and time.monotonic() > end:
            return
        found.append({"case": name, **timed(CASES[name], device)})
        print(json.dumps(found[-1]), flush=True)
        about = {"what": __doc__, **rows.facts(device), "rows": found}
        arguments.out.write_text(json.dumps(about, indent=0))


def timed(case: Case, device: torch.device) -> dict[str, list[float]]:
    """Time each rival in turns: ms of inference, and of forward and backward."""
    torch.manual_seed(0)
    net = case.build().to(device)
    rivals = {}
    for layout in ("first", "last"):
        image = in_memory(torch.randn(case.shape, device=device).bfloat16(), layout)
        for who in ("eager", *dispatch.ENGINES):
            own = twins.plain(net) if who == "eager" else copy.deepcopy(net)
            rivals[who, layout] = in_layout(own, layout, case.ndim), image.requires_grad_()
    times: dict[str, list[list[float]]] = {f"{who} {layout}": [[], []] for who, layout in rivals}
    for _ in range(ROUNDS + 1):
        for (who, layout), given in rivals.items():
            with nullcontext() if who == "eager" else dispatch.use_engine(who):
                for some, call in zip(times[f"{who} {layout}"], (_infer, _step), strict=True):
                    some.append(_each(partial(call, *given), case.calls, device))
    return {  # in the first round all was compiled
        name: [round(median(some[1:]), 4) for some in both] for name, both in times.items()
    }


def _infer(net: nn.Module, image: Tensor) -> None:
    with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16):
        net(image)


def _step(net: nn.Module, image: Tensor) -> None:
    with torch.autocast(image.device.type, torch.bfloat16):
        out = net(image)
    out.backward(out.detach())


def _each(call: Callable[[], None], calls: int, device: torch.device) -> float:
    """Milliseconds of a call among several, after the first ones, which do not count."""
    for _ in range(3):
        call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
