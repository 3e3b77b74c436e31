"""Pictures of result files: how our rows compare with the best peer, in time and in memory.

matplotlib (the extra "demo") is imported when something is drawn.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cassetta.measure.cases import NAMES
from cassetta.measure.peers import MODES
from cassetta.measure.rows import Row
from cassetta.measure.stages import PASSES

INK, FAINT, PAPER = "#1d2129", "#8a919e", "#ffffff"
_TICKS = {4: (1, 1.25, 1.5, 2, 3, 5, 7.5), 50: (1, 2, 5), float("inf"): (1,)}  # by the range
FASTER, SLOWER, KEPT, PEAK = "#1b9e8a", "#d1626f", "#3f6fb5", "#9db8de"


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw what has been measured, as PNG and SVG files, and return their paths.

    Parameters
    ----------
    rows : sequence of dict
        Rows of result files. Where one was measured several times, the last one counts; of the
        layouts, the faster one (of memory, the same one).
    folder : Path
        Where the pictures go: for each GPU and dtype `<gpu>-<dtype>-speed-<mode>`, and
        `<gpu>-<dtype>-memory`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        names = ("gpu", "case", "pass", "engine", "dtype", "layout")
        latest[tuple(row[name] for name in names)] = row
    paths = []
    for gpu, dtype in sorted({(row["gpu"], row["dtype"]) for row in latest.values()}):
        own = [r for r in latest.values() if (r["gpu"], r["dtype"]) == (gpu, dtype)]
        slug = "-".join(re.findall(r"[\w.]+", f"{gpu} {dtype}"))
        for mode in MODES:
            if speed := _speed(own, mode):
                figure = _speed_figure(speed, f"{gpu}, {dtype}, {mode}")
                paths += _save(figure, folder / f"{slug}-speed-{mode}")
        if memory := _memory(own):
            paths += _save(_memory_figure(memory, f"{gpu}, {dtype}"), folder / f"{slug}-memory")
    return paths


def _default(gpu: str, mode: str) -> str:
    """The engine that runs if nobody asks for one."""
    if mode != "eager":
        return f"auto {mode}"
    return "reference" if gpu.startswith("cpu") else "auto"


def _speed(rows: list[Row], mode: str) -> dict[str, dict[str, float]]:
    """Case -> pass -> best peer's time over that of our default engine, both in the best layout."""
    found: dict[str, dict[str, float]] = {}
    for row in _ordered(rows):
        ratio = row["ratio_to_best_peer"]
        if ratio and row["engine"] == _default(row["gpu"], mode):
            own = found.setdefault(row["case"], {})
            own[row["pass"]] = max(own.get(row["pass"], 0.0), float(ratio))
    return found


def _memory(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Case -> "kept" and "peak" of our default engine over those of plain PyTorch."""
    taken = {
        (row["case"], row["engine"], row["layout"]): row
        for row in _ordered(rows)
        if row["pass"] == "forward+backward" and row["ms"]
    }
    found: dict[str, dict[str, float]] = {}
    for (case, engine, layout), ours in taken.items():
        eager = taken.get((case, "eager", layout))
        if engine != _default(ours["gpu"], "eager") or eager is None or case in found:
            continue
        ratios = {
            name: float(ours[column]) / float(eager[column])
            for name, column in (("kept", "kept_mib"), ("peak", "peak_mib"))
            if ours[column] and eager[column] and float(eager[column])
        }
        if ratios:
            found[case] = ratios
    return found


def _ordered(rows: list[Row]) -> list[Row]:
    """As in the list of cases; what is no longer there comes last."""
    place = {name: n for n, name in enumerate(NAMES)}
    return sorted(rows, key=lambda row: place.get(row["case"].split(" (")[0], len(place)))


def _speed_figure(speed: dict[str, dict[str, float]], title: str) -> Any:
    whats = [what for what in PASSES if any(what in own for own in speed.values())]
    figure, axes = _figure(len(whats), len(speed), title)
    for one, what in zip(axes, whats, strict=True):
        for n, own in enumerate(speed.values()):
            if what in own:
                value = round(own[what], 2)  # what is shown as 1.00 is no slower
                _bar(one, n, value, FASTER if value >= 1 else SLOWER, "×")
        one.set_title(what, color=INK, fontsize=11)
        _dress(one, list(speed), "speed against the best peer (more is better)")
    return figure


def _memory_figure(memory: dict[str, dict[str, float]], title: str) -> Any:
    names = [name for name in ("kept", "peak") if any(name in own for own in memory.values())]
    figure, axes = _figure(len(names), len(memory), title)
    titles = {"kept": "kept for backward", "peak": "peak of forward and backward"}
    for one, name in zip(axes, names, strict=True):
        for n, own in enumerate(memory.values()):
            if name in own:
                _bar(one, n, own[name], KEPT if name == "kept" else PEAK, "")
        one.set_title(titles[name], color=INK, fontsize=11)
        _dress(one, list(memory), "memory, plain PyTorch being 1 (less is better)")
    return figure


def _figure(columns: int, bars: int, title: str) -> tuple[Any, Any]:
    """Panels side by side that share their cases, the first at the top."""
    if title.startswith("cpu"):
        title += "\ntiny images on a CPU, which say nothing about GPUs"
    figure = importlib.import_module("matplotlib.figure").Figure(facecolor=PAPER)
    height = 1.6 + 0.3 * bars
    figure.set_size_inches(2.2 + 4.2 * columns, height)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    figure.suptitle(title, color=INK, fontsize=12, x=0.02, y=1 - 0.1 / height, ha="left", va="top")
    return figure, axes


def _bar(axes: Any, n: int, value: float, color: str, unit: str) -> None:
    """From 1 to the value, as far for twice as for half; the number on its right."""
    axes.barh(n, value - 1, left=1, color=color, height=0.7)
    place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{value:.2f}{unit}", (max(value, 1), n), **place, color=INK, fontsize=9)


def _dress(axes: Any, cases: list[str], label: str) -> None:
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(range(len(cases)), cases, color=INK, fontsize=9)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    least, most = min(0.8, axes.dataLim.x0), max(1.25, axes.dataLim.x1)
    axes.set_xscale("log")
    axes.set_xlim(least / 1.1, most * (most / least) ** 0.2)  # with room for the last number
    ticker = importlib.import_module("matplotlib.ticker")
    subs = next(subs for beyond, subs in _TICKS.items() if most / least < beyond)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _save(figure: Any, stem: Path) -> list[Path]:
    figure.tight_layout()
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=110)
    return paths
