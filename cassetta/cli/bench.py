"""Time networks, blocks and passes against plain and compiled PyTorch, and what memory they take.

On a GPU, real sizes; on a CPU, tiny ones, where nothing is fused: its figures say nothing of GPUs.
Nothing is timed before it is known to compute the right thing. Each case goes into a file of
results as soon as it is measured, so that the command can be stopped, and goes on where it was.
"""

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cassetta.cli import network
from cassetta.cli.errors import CommandError, need, writable
from cassetta.measure import bench, cases, charts, peers, rows
from cassetta.measure.spending import Budget

RESULTS = Path("bench/results")
SHOWN = ("engine", "layout", "ms", "p20", "p80", "peak_mib", "kept_mib", "roof_fraction")
COST = "{gflop} GFLOP, at least {moved_mib} MiB to move"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def several(flag: str, choices: tuple[str, ...], text: str) -> None:
        parser.add_argument(flag, nargs="+", choices=choices, metavar=flag[2:].upper(), help=text)

    parser.add_argument(
        "--case", nargs="+", default=list(cases.GROUPS),
        help="cases, or groups of them: network, block, pass [all, the most decisive first]",
    )  # fmt: skip
    several("--pass", bench.PASSES, f"{', '.join(bench.PASSES)} [all]")
    several("--dtype", tuple(bench.DTYPES), "bf16, fp16, fp32 [bf16 on a GPU, fp32 on a CPU]")
    several("--mode", peers.MODES, f"{', '.join(peers.MODES)} [all on a GPU, eager on a CPU]")
    several("--layout", peers.LAYOUTS, "where channels lie in memory: first, last [both]")
    parser.add_argument(
        "--budget", type=float, default=500,
        help="seconds within which all ends: what would take longer is not begun [500]",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help=f"folder for results [{RESULTS} if there is one, or else this one]"
    )
    parser.add_argument("--small", action="store_true", help="tiny images, to try the command")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--list", action="store_true", help="list the cases, and measure nothing")
    parser.add_argument(
        "--charts", type=Path, metavar="FOLDER",
        help="draw what --out holds into this folder, and measure nothing",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure, or list, or draw; 0 even where a rival failed, which its row says."""
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    console.width = max(console.width, 130)  # rather a line too long than a number cut off
    try:
        chosen = cases.select(arguments.case)
    except ValueError as error:
        raise CommandError(f"--case {error}") from error
    out = arguments.out or (RESULTS if RESULTS.is_dir() else Path())
    if arguments.list:
        console.print(_listed(chosen))
    elif arguments.charts is not None:
        _draw(console, out, arguments.charts)
    else:
        _measure(console, _plan(arguments, chosen, out))
    return 0


def _plan(arguments: argparse.Namespace, chosen: list[cases.Case], out: Path) -> bench.Plan:
    if not 0 < arguments.budget < math.inf:
        raise CommandError(f"--budget {arguments.budget} must be positive and finite: try 500")
    device = network.device("auto")
    on_gpu = device.type == "cuda"
    return bench.Plan(
        chosen, device, writable(out),
        passes=getattr(arguments, "pass") or bench.PASSES,
        dtypes=arguments.dtype or (["bf16"] if on_gpu else ["fp32"]),
        modes=arguments.mode or (peers.MODES if on_gpu else ["eager"]),
        layouts=arguments.layout or peers.LAYOUTS,
        small=arguments.small or not on_gpu,
        again=arguments.again,
        budget=arguments.budget,
        rounds=20 if on_gpu else 5,
    )  # fmt: skip


def _measure(console: Console, plan: bench.Plan) -> None:
    known = rows.facts(plan.device)
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "cudnn", "commit"))
    console.print(f"{known['gpu']}; {versions}", markup=False)
    if plan.device.type == "cpu":
        console.print(
            "These are figures of a CPU, for tiny images, without any kernel of this package: "
            "they show that the command works, and nothing about GPUs."
        )
    nb_groups, budget = 0, Budget(plan.budget)
    before = budget.left

    def report(group: bench.Group, found: list[rows.Row]) -> None:
        nonlocal nb_groups, before
        nb_groups += 1
        console.print(_table(group, found, before - budget.left))
        before = budget.left

    try:
        complete = bench.run(plan, report, budget)
    finally:  # when it is interrupted, too
        console.print(budget.table())
    folder = rows.path_of(plan.out, "", known).parent
    console.print(f"\n{nb_groups} groups of rows measured now; all are in {folder}", markup=False)
    if not complete:
        console.print(
            f"the budget of {plan.budget:g} s leaves no time for the others: run it again, and it "
            "goes on"
        )


def _table(group: bench.Group, found: list[rows.Row], seconds: float) -> Table:
    cost = next((f": {COST.format(**row)}" for row in found if row["gflop"]), "")
    title = f"\n{group.title}, in {seconds:.1f} s{cost}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in SHOWN:
        justify = "left" if name in ("engine", "layout") else "right"
        table.add_column(name.replace("_mib", " MiB").replace("_", " "), justify=justify)
    table.add_column("against the best peer", justify="right")
    for row in found:
        ratio = _short(row["ratio_to_best_peer"])
        ratio = f"{ratio} x {row['best_peer']}" if ratio else ""
        shown = [row["engine"], row["layout"], *(_short(row[name]) for name in SHOWN[2:])]
        table.add_row(*shown, row["error"] or ratio)
    return table


def _short(number: str) -> str:
    return f"{float(number):.3g}" if number else ""


def _listed(chosen: list[cases.Case]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("case", "group", "image", "what"):
        table.add_column(name)
    for case in chosen:
        table.add_row(case.name, case.group, " x ".join(map(str, case.shape)), case.about)
    return table


def _draw(console: Console, results: Path, folder: Path) -> None:
    need("matplotlib.figure")
    try:
        measured = rows.read(sorted(results.glob("*/*.csv")))
    except ValueError as error:
        raise CommandError(f"--out {error}") from error
    if not measured:
        raise CommandError(f"--out {results} holds no results: run `cassetta bench` first")
    for path in charts.draw(measured, writable(folder, "--charts")):
        console.print(str(path), markup=False)
