"""Say what a network costs: parameters, operations, memory; and how much of it fits.

Nothing is computed or allocated, so a laptop can answer for any GPU.
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cassetta import costs, fitting
from cassetta.cli import model
from cassetta.cli.errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser)
    parser.add_argument("--memory", type=float, metavar="GiB", help="say how much fits into it")
    parser.add_argument(
        "--inference", action="store_true", help="with --memory: for inference, not for training"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; 0 once they are there."""
    memory, inference = arguments.memory, arguments.inference
    if inference and memory is None:
        raise CommandError("--inference says what has to fit: give --memory too")
    if memory is not None and not 0 < memory < 2**20:
        raise CommandError(f"--memory {memory} must be a number of GiB above 0 and below 2**20")
    options = {"autocast": model.PRECISIONS[arguments.precision]}
    net, shape = model.build(arguments, torch.device("meta"))
    try:
        print(costs.summary(net, shape, **options))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CommandError(str(error).splitlines()[0]) from error
    if memory is not None:
        _print_what_fits(net, shape, memory, inference=inference, **options)
    return 0


def _print_what_fits(net: Any, shape: tuple[int, ...], memory: float, **options: Any) -> None:
    """The largest batch and the largest volume, for either engine; a dash where nothing fits."""
    batch, _, *size = shape
    questions = {"batch": f"batch of {_cross(size)}", "size": f"volume in a batch of {batch}"}
    table = Table(box=None, pad_edge=False)
    table.add_column(f"largest in {memory:g} GiB")
    for engine in ("plain", "fused"):
        table.add_column(engine, justify="right")
    found, why = False, ""
    for vary, question in questions.items():
        cells = []
        for fused in (False, True):
            try:
                most, _, *cube = fitting.largest(
                    net, shape, int(memory * 2**30), vary, fused=fused, **options
                )
                cells.append(str(most) if vary == "batch" else _cross(cube))
                found = True
            except ValueError as error:
                cells.append("-")
                why = str(error)
        table.add_row(question, *cells)
    if not found:
        raise CommandError(f"--memory {memory:g}: {why}")
    print()
    Console(soft_wrap=True).print(table)


def _cross(size: list[int]) -> str:
    return " x ".join(map(str, size))
