"""From which size on fused blocks pay, on a GPU, the host's time and all.

    python bench/small.py --budget 60 --out small.json

Milliseconds of a call among 30 in a row, of inference and of forward and backward, of a block
under each engine and of its plain twin in both layouts, under autocast to bfloat16. What is larger
of the host's time and the GPU's is what is seen. `dispatch.SMALL` follows from it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cassetta.kernels import dispatch
from cassetta.layers import ConvBlock
from cassetta.measure import rows, twins
from cassetta.measure.passes import in_memory
from cassetta.measure.peers import in_layout

SIZES = (
    *((32, edge) for edge in (8, 16, 24, 32, 48, 64, 80, 96, 128)), (16, 64), (64, 32), (128, 16)
)  # fmt: skip
"""Channels, and voxels along each of three sides, of which there are two images."""
CALLS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description="Time blocks on small images.")
    parser.add_argument("--budget", type=float, default=60, help="seconds [60]")
    parser.add_argument("--out", type=Path, default=Path("small.json"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    arguments = parser.parse_args()
    device, end, found = arguments.device, time.monotonic() + arguments.budget, []
    for norm in ("instance", "batch", None):
        for channels, edge in SIZES:
            if found and time.monotonic() > end:
                return
            block = ConvBlock(3, channels, channels, norm=norm, order="cndax").to(device)
            image = torch.randn(2, channels, edge, edge, edge, device=device).bfloat16()
            row = {"norm": str(norm), "C": channels, "edge": edge, **dict(_timed(block, image))}
            print(json.dumps(row), flush=True)
            found.append(row)
            about = {"what": __doc__, **rows.facts(device), "rows": found}
            arguments.out.write_text(json.dumps(about, indent=0))


def _timed(block: ConvBlock, image: Tensor) -> Iterator[tuple[str, list[float]]]:
    """Name and time each rival: inference, and forward and backward."""
    for layout in ("first", "last"):
        own = in_memory(image, layout).requires_grad_()
        for engine in (None, *dispatch.ENGINES):
            net = in_layout(block if engine else twins.plain(block), layout, 3)
            with dispatch.use_engine(engine) if engine else nullcontext():
                times = _each(partial(_infer, net, own)), _each(partial(_step, net, own))
            yield f"{engine or 'eager'} {layout}", [round(ms, 4) for ms in times]


def _infer(net: nn.Module, image: Tensor) -> None:
    with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16):
        net(image)


def _step(net: nn.Module, image: Tensor) -> None:
    with torch.autocast(image.device.type, torch.bfloat16):
        out = net(image)
    out.backward(out.detach())


def _each(call: Callable[[], None]) -> float:
    """Milliseconds of a call among several, after the first ones, which do not count."""
    for _ in range(4):
        call()
    _wait()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    _wait()
    return (time.perf_counter() - start) / CALLS * 1e3


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
