"""Compare every kernel with plain PyTorch on this machine's GPU, by every plan, in every precision.

The most decisive comparisons come first; what the budget does not suffice for is named at the end.

The exit code is 0 if all are as they should be, 1 if any is not, and 2 if none can run here.
"""

import argparse
import time

import torch
from rich.console import Console

from cassetta.cli.errors import CommandError
from cassetta.kernels import dispatch
from cassetta.measure import checking
from cassetta.measure.spending import ALL, Budget


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
    console = Console(soft_wrap=True, highlight=False)
    budget, wrong, done = Budget(arguments.budget), 0, []
    torch.manual_seed(0)
    planned = checking.comparisons(device)
    for one in planned:
        done.append(one)
        with budget.spending(one.part):
            fault = one.run()
        if fault:
            wrong += 1
            plan = f", {one.plan}" * bool(one.plan)
            console.print(f"[red]{one.what}[/] ({one.case}{plan}): {fault}")
        if budget.left < 0:
            break
    where = "this GPU" if device.type == "cuda" else "the interpreter"
    seconds = time.monotonic() - budget.start
    console.print(f"{len(done)} comparisons on {where} in {seconds:.0f} s, {wrong} at fault")
    spent = {part: budget.spent.get((ALL, part), 0.0) for part in checking.PARTS}
    console.print(", ".join(f"{part} {seconds:.0f} s" for part, seconds in spent.items()))
    _print_pairs(console, done, planned[len(done) :])
    return 1 if wrong else 0


def _print_pairs(console: Console, done: list, left: list) -> None:
    """How many plans of passes were compared, and which ones were not."""
    compared, others = (
        {(one.what, one.plan): None for one in some if one.plan} for some in (done, left)
    )
    never = [pair for pair in others if pair not in compared]
    total = len(compared) + len(never)
    console.print(f"{len(compared)} of {total} pairs of pass and plan were compared")
    if left:
        console.print(f"the budget is spent: {len(left)} comparisons are left out")
    for what in dict.fromkeys(what for what, _ in never):
        names = "; ".join(plan for name, plan in never if name == what)
        console.print(f"not compared: {what} by {names}")
