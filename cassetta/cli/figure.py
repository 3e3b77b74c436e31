"""The picture at the end of the demo: what was seen, what is true, what the network says."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cassetta.cli.errors import need
from cassetta.cli.volume import AHEAD, Split, Volume

PAPER, INK, FAINT = "#101218", "#e8e6e3", "#7d8594"
CLEAR = "#00000000"
LABELS = ["#e8788a", "#f5e6c8", "#6cc3d5", "#b39ddb", "#9ccc65", "#ffb74d", "#90a4ae"]
ERRORS = {"missed": "#ff4fa3", "invented": "#ffd23f", "confused": "#35d0ff"}
COLUMNS = ["image", "truth", "prediction", "errors"]
MARGIN = 4  # voxels around the object


class Plane(NamedTuple):
    """One cut through the volume, rows from top to bottom."""

    axis: int
    image: np.ndarray
    truth: np.ndarray
    guess: np.ndarray


def draw(
    path: Path, volume: Volume, guess: Tensor, part: Split, losses: list[float], title: str
) -> None:
    """Three planes of image, truth, prediction and errors, and the learning curve.

    Parameters
    ----------
    path : Path
        PNG file to write.
    volume : Volume
        Image and labels.
    guess : (X, Y, Z) tensor[long]
        Predicted labels.
    part : Split
        Which part was learned from, and which was not.
    losses : list of float
        Loss of each step.
    title : str
        One line for the top.
    """
    assert volume.labels is not None
    corner, maps = _cropped(volume.image, volume.labels, guess)
    borders = [where - corner[AHEAD] for where in (part.test.stop, part.learn.start)]
    unseen = (part.test.start + part.test.stop) // 2 - corner[AHEAD]
    planes = [_cut(maps, axis, where) for axis, where in _places(maps[1], unseen)]

    figure = need("matplotlib.figure").Figure(facecolor=PAPER)
    heights = [4 * plane.image.shape[0] / plane.image.shape[1] for plane in planes]
    figure.set_size_inches(13, sum(heights) * 13 / 16.6 + 3.5)
    grid = figure.add_gridspec(
        4, 4, height_ratios=[*heights, 2.2], hspace=0.05, wspace=0.03,
        left=0.06, right=0.98, top=0.905, bottom=0.055,
    )  # fmt: skip
    bright = np.percentile(volume.image.numpy(), [1, 99.9])
    for row, plane in enumerate(planes):
        for column, name in enumerate(COLUMNS):
            axes = figure.add_subplot(grid[row, column])
            _show(axes, plane, name, bright)
            _mark(axes, plane, borders)
            if row == 0:
                axes.set_title(name, color=INK, fontsize=13, pad=7)
    _curve(figure.add_subplot(grid[3, :]), losses)
    _legend(figure, volume.names)
    figure.suptitle(title, color=INK, fontsize=15, x=0.06, ha="left", y=0.985)
    figure.savefig(path, dpi=100, facecolor=PAPER)


def _cropped(image: Tensor, labels: Tensor, guess: Tensor) -> tuple[list[int], list[Tensor]]:
    """The three volumes around what is labelled, and where that begins."""
    where = labels.nonzero()
    low = (where.amin(0) - MARGIN).clamp(min=0).tolist()
    high = (where.amax(0) + MARGIN + 1).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return low, [volume[box] for volume in (image, labels, guess)]


def _places(labels: Tensor, unseen: int) -> list[tuple[int, int]]:
    """Axis and position of a plane seen from above, one from behind, one from the side.

    The one from behind lies in the middle of the unseen part, the others where most is labelled.
    """
    above, side = (int((labels > 0).sum([AHEAD, other]).argmax()) for other in (0, 2))
    return [(2, above), (AHEAD, unseen), (0, side)]


def _cut(maps: list[Tensor], axis: int, where: int) -> Plane:
    return Plane(axis, *(np.flipud(volume.select(axis, where).numpy().T) for volume in maps))


def _show(axes: Any, plane: Plane, what: str, bright: np.ndarray) -> None:
    """The image, and over it one of the maps."""
    low, high = bright
    dim = 2.2 if what == "errors" else 1.0
    axes.imshow(plane.image, cmap="gray", vmin=low, vmax=low + dim * (high - low))
    if what == "errors":
        _overlay(axes, _errors(plane), list(ERRORS.values()), 1.0)
    elif what != "image":
        shown = plane.truth if what == "truth" else plane.guess
        colors = [LABELS[n % len(LABELS)] for n in range(max(1, int(shown.max())))]
        _overlay(axes, shown, colors, 0.85)
    axes.set_axis_off()


def _overlay(axes: Any, labels: np.ndarray, colors: list[str], alpha: float) -> None:
    """Label n in the n-th colour; nothing where there is no label."""
    shown = need("matplotlib.colors").ListedColormap([CLEAR, *colors])
    limits = {"vmin": -0.5, "vmax": len(colors) + 0.5}
    axes.imshow(labels, cmap=shown, alpha=alpha, interpolation="nearest", **limits)


def _errors(plane: Plane) -> np.ndarray:
    """1 where something was missed, 2 where it was invented, 3 where it was taken for another."""
    there, claimed = plane.truth > 0, plane.guess > 0
    confused = there & claimed & (plane.truth != plane.guess)
    return (there & ~claimed) + 2 * (claimed & ~there) + 3 * confused


def _mark(axes: Any, plane: Plane, borders: list[int]) -> None:
    """Where the unseen part ends, and where the one that was learned from begins."""
    style = {"color": FAINT, "fontsize": 9, "transform": axes.transAxes}
    axes.text(0.02, 0.02, "unseen", **style)
    if plane.axis == AHEAD:
        return
    from_above = plane.axis == 2
    line = axes.axhline if from_above else axes.axvline
    for where in borders:
        place = plane.image.shape[0] - where if from_above else where
        line(place - 0.5, color=FAINT, lw=0.9, ls=(0, (4, 3)))
    if from_above:
        axes.text(0.02, 0.98, "learned from", va="top", **style)
    else:
        axes.text(0.98, 0.02, "learned from", ha="right", **style)


def _legend(figure: Any, names: tuple[str, ...]) -> None:
    patch = need("matplotlib.patches").Patch
    shown = [*zip(names[1:], LABELS, strict=False), *ERRORS.items()]
    figure.legend(
        handles=[patch(color=color, label=name) for name, color in shown],
        loc="upper left", bbox_to_anchor=(0.052, 0.968), ncols=len(shown), frameon=False,
        labelcolor=INK, fontsize=10, handlelength=1, columnspacing=1.6,
    )  # fmt: skip


def _curve(axes: Any, losses: list[float]) -> None:
    """Loss of each step, and its running mean."""
    steps = np.arange(1, len(losses) + 1)
    width = max(1, len(losses) // 30)
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.set_facecolor(PAPER)
    axes.plot(steps, losses, color=FAINT, lw=0.8)
    axes.plot(steps[width // 2 :][: len(mean)], mean, color=LABELS[0], lw=2)
    axes.set(xlim=(0, len(losses) + 1), ylim=(0, None))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.tick_params(colors=FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
