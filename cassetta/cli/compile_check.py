"""Compile every kernel ahead of time, without a GPU, and print what it costs on each architecture.

The exit code is 1 if a kernel spills registers, needs more shared memory than there is, or has
fewer buffers than its asynchronous products need (`kernels.buffers`).
"""

import argparse
import importlib
import time

from rich.console import Console
from rich.table import Table

from cassetta.cli.errors import CommandError
from cassetta.kernels import dispatch

ARCHITECTURES = {f"sm_{arch}": arch for arch in (80, 86, 89, 90, 100, 120)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=[*ARCHITECTURES, "all"], default="all", help="[all]")
    parser.add_argument(
        "--part", action="store_true", help="dtypes in turn: a third of the compilations"
    )
    parser.add_argument("--verbose", action="store_true", help="a row for every case")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0 if every kernel is as it should be."""
    if dispatch.is_interpreted():
        raise CommandError(f"{dispatch.INTERPRET} is set, and interpreted kernels do not compile")
    try:
        aot = importlib.import_module("cassetta.kernels.aot")
    except ImportError as error:
        raise CommandError(f"triton cannot be imported ({error}): install it, on Linux") from error
    start = time.perf_counter()
    names = ARCHITECTURES if arguments.arch == "all" else [arguments.arch]
    reports = [
        report for name in names for report in aot.check(ARCHITECTURES[name], arguments.part)
    ]
    console = Console(soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("kernel", "case", "arch"):
        table.add_column(name)
    for name in ("registers", "spilled", "shared"):
        table.add_column(name, justify="right")
    table.add_column("tensor cores")
    for row in reports if arguments.verbose else _worst(reports):
        table.add_row(
            row.kernel, row.case, f"sm_{row.arch}", str(row.registers), str(row.spilled),
            str(row.shared), row.tensor_cores or "-",
        )  # fmt: skip
    console.print(table)
    faults = [row for row in reports if row.excess]
    for row in faults:
        console.print(f"[red]{row.kernel}[/] ({row.case}, sm_{row.arch}): {row.excess}")
    seconds = time.perf_counter() - start
    console.print(f"{len(reports)} compilations in {seconds:.0f} s, {len(faults)} at fault")
    return 1 if faults else 0


def _worst(reports: list) -> list:
    """The row with most registers of each kernel and architecture."""
    worst = {}
    for row in reports:
        key = row.kernel, row.arch
        if key not in worst or row.registers > worst[key].registers:
            worst[key] = row
    return [worst[key] for key in sorted(worst)]
