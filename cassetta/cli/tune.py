"""Find the fastest engine for each block of a network, on this machine, and keep it on disk.

An engine is timed only where it computes what plain PyTorch computes. What is found is used by
every process from then on; `cassetta.explain` shows it. Stopped, it goes on where it was.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from cassetta.cli import model, network
from cassetta.cli.errors import CommandError
from cassetta.kernels import evidence
from cassetta.measure import cases
from cassetta.measure.tuning import tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser, nargs="?")
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="NAME",
        help="instead of MODEL: cases of `cassetta bench`, or groups of them",
    )  # fmt: skip
    parser.add_argument("--inference", action="store_true", help="rather than training")
    parser.add_argument(
        "--budget", type=float, default=500, metavar="S",
        help="seconds within which all ends: what would take longer is not begun [500]",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--device", default="auto", help="[auto]")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 also where there was nothing to choose, which it says."""
    start, budget = time.monotonic(), arguments.budget
    if not 0 < budget < math.inf:
        raise CommandError(f"--budget {budget} must be positive and finite: try 500")
    if bool(arguments.model) == bool(arguments.case):
        raise CommandError("give a MODEL or --case, and not both: --case meshnet, for example")
    device = network.device(arguments.device)
    console = Console(soft_wrap=True, highlight=False)
    autocast = model.PRECISIONS[arguments.precision]
    for name, net, shape, dtype in _networks(arguments, device):
        net.train(not arguments.inference)
        image = torch.randn(shape, device=device).to(dtype)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            left = budget - (time.monotonic() - start)
            options = {"budget": left, "again": arguments.again, "progress": sys.stderr.isatty()}
            try:
                found = tune(net, image, **options)
            except (TypeError, ValueError) as error:  # an image that the network refuses
                raise CommandError(str(error).splitlines()[0]) from error
        console.print(f"[bold]{name}[/], {' x '.join(map(str, shape))}")
        console.print(str(found), markup=False)
        if found.budget.spent:
            console.print(found.budget.table())
        if not found.is_complete:
            break
        if len(found):
            console.print(f"kept in {evidence.table(device).path}")
    return 0


def _networks(arguments: argparse.Namespace, device: torch.device) -> Iterator[Any]:
    """Name, network, shape and dtype of the image of what is to be tuned, one after the other."""
    if arguments.model:
        net, shape = model.build(arguments, device)
        yield arguments.model, net.to(device), shape, torch.float32
        return
    try:
        chosen = cases.select(arguments.case)
    except ValueError as error:
        raise CommandError(f"--case {error}") from error
    for case in chosen:
        shape = case.shape if device.type == "cuda" else case.small
        dtype = case.image_dtype(model.PRECISIONS[arguments.precision] or torch.float32)
        yield case.name, case.make().to(device), shape, dtype
