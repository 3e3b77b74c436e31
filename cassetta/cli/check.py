"""Compare every kernel with plain PyTorch on this machine's GPU, in every precision.

The exit code is 0 if all are as they should be, 1 if any is not, and 2 if none can run here.
"""

import argparse
import time

import torch
from rich.console import Console

from cassetta.cli.errors import CommandError
from cassetta.kernels import dispatch
from cassetta.measure import checking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=float, default=600, metavar="S", help="stop after S seconds [600]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong; 0 if nothing is."""
    if not arguments.budget > 0:
        raise CommandError(f"--budget {arguments.budget:g} must be a number of seconds above 0")
    why = dispatch.why_no_triton()
    if why:
        raise CommandError(f"there is no kernel to check: {why}")
    device = torch.device("cpu" if dispatch.is_interpreted() else "cuda")
    console = Console(soft_wrap=True)
    start, wrong, count = time.perf_counter(), 0, 0
    for row in checking.check(device):
        count += 1
        if row.why:
            wrong += 1
            console.print(f"[red]{row.what}[/] ({row.case}): {row.why}", highlight=False)
        if time.perf_counter() - start > arguments.budget:
            console.print(f"the budget of {arguments.budget:g} s is spent; the rest is not checked")
            break
    where = "this GPU" if device.type == "cuda" else "the interpreter"
    seconds = time.perf_counter() - start
    console.print(f"{count} comparisons on {where} in {seconds:.0f} s, {wrong} at fault")
    return 1 if wrong else 0
