"""Fused blocks and networks against plain PyTorch on a GPU: time, and the memory of a step.

    python bench/gpu.py --budget 500            # again, and it goes on where it stopped

Each case is a row of `bench/results/<gpu>/fused.jsonl`, written when it is measured; the most
decisive cases come first. Every rival runs in the same process, in turns, and the median counts:

    eager           plain PyTorch, channels first          cudnn.benchmark on
    eager last      the same, channels last
    compiled        torch.compile of eager
    ours, ours last the fused blocks, in both layouts
"""

import argparse
import functools
import itertools
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import cassetta
from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch
from cassetta.kernels.types import Activation, Prologue
from cassetta.layers import ConvGroup

RESULTS = Path(__file__).parent / "results"


def networks(small: bool) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Name, network and input shape, most decisive first."""
    n, m, f = (16, 16, 32) if small else (256, 128, 512)
    return [
        ("MeshNet 21, 12 convolutions", lambda: MeshNet(3), (1, 21, n, n, n)),
        ("U-Net 32 3-D, instance norm", lambda: UNet(3, 32, norm="instance"), (2, 32, m, m, m)),
        ("U-Net 64 2-D, batch norm", lambda: UNet(2, 64, norm="batch"), (8, 64, f, f)),
        ("block 32, instance norm", lambda: _block(32), (1, 32, n, n, n)),
        ("block 64, instance norm", lambda: _block(64), (2, 64, m, m, m)),
        ("MeshNet 5", lambda: MeshNet.preset("meshnet5"), (1, 5, n, n, n)),
    ]


def _block(channels):
    return ConvGroup(3, channels, nb_conv=2, norm="instance", order="cndax")


def measure(step, device, rounds):
    """Median seconds of a step, once warm."""
    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def network_row(name, make, shape, device, dtype, rounds):
    """Forward and backward of every rival, under autocast, in turns."""
    row = {"case": name, "pass": "forward and backward", "dtype": str(dtype), "shape": shape}
    net = make().to(device)
    first = torch.randn(shape, device=device)
    last = first.movedim(1, -1).contiguous().movedim(-1, 1)
    rivals = {
        "eager": ("reference", net, first), "eager last": ("reference", net, last),
        "compiled": ("reference", torch.compile(net), first),
        "ours": ("triton", net, first), "ours last": ("triton", net, last),
    }  # fmt: skip

    def step(backend, module, inp):
        def run():
            net.zero_grad()
            with dispatch.use_backend(backend), torch.autocast(device.type, dtype):
                module(inp).sum().backward()

        return run

    for rival, (backend, module, inp) in rivals.items():
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            step(backend, module, inp)()
            _wait(device)
            row[f"{rival}, first step s"] = time.perf_counter() - start
            row[f"{rival}, ms"] = 1000 * measure(step(backend, module, inp), device, rounds)
            if device.type == "cuda":
                row[f"{rival}, peak MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
        except Exception as error:  # a rival that cannot run is a result too
            row[f"{rival}, error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def pass_row(shape, last, device, dtype, rounds):
    """Bandwidth of the passes over one image, beside that of a copy."""
    x = torch.randn(shape, device=device).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    one = torch.randn(shape[:2], device=device)
    p = Prologue(one, one, Activation("relu"))
    passes = dispatch.passes(x)
    g, y = torch.randn_like(x), torch.empty_like(x)
    runs = {
        "copy": (2, lambda: y.copy_(x)),
        "moments": (1, lambda: passes.moments(x, p)),
        "materialize": (2, lambda: passes.materialize(x, p, None, x.dtype)),
        "prologue_sums": (2, lambda: passes.prologue_sums(g, x, p, one, None, False)),
        "prologue_dgrad": (3, lambda: passes.prologue_dgrad(g, x, p, None, False)),
    }
    layout = "channels last" if last else "channels first"
    row = {"case": f"passes, {layout}", "dtype": str(dtype), "shape": shape}
    for name, (images, run) in runs.items():
        row[f"{name}, GB/s"] = images * x.nbytes / 1e9 / measure(run, device, rounds)
    return row


def about(device):
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "cassetta": cassetta.__version__,
        "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budget", type=float, default=500, help="seconds [500]")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    facts = about(device)
    folder = arguments.out / "-".join(str(facts["gpu"]).split())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fused.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {json.loads(line)["key"] for line in lines}
    n, rounds = (16, 2) if arguments.small else (256, 10)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    common = (device, dtype, rounds)
    todo = {}
    for channels, last in itertools.product((32, 21), (False, True)):
        shape = (1, channels, n, n, n)
        todo[f"passes {shape} {last}"] = functools.partial(pass_row, shape, last, *common)
    for name, make, shape in networks(arguments.small):
        todo[f"{name} {shape}"] = functools.partial(network_row, name, make, shape, *common)
    for key, run in todo.items():
        if key in done:
            continue
        if time.perf_counter() - start > arguments.budget:
            print("the budget is spent: run it again, and it goes on")
            return
        row = {"key": key, **run(), **facts}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in facts}, indent=1), flush=True)


if __name__ == "__main__":
    main()
