"""Brain volumes: the template that nilearn ships, or any NIfTI image, on a regular grid."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cassetta.cli.errors import CommandError, need

AHEAD = 1
"""The axis from back to front: all volumes are brought to the axes right, ahead, up."""


class Volume(NamedTuple):
    """An image and perhaps its labels, on a grid of cubic voxels along right, ahead, up."""

    image: Tensor  # (X, Y, Z), zero mean and unit deviation inside the object
    labels: Tensor | None  # (X, Y, Z), 0 to len(names) - 1
    names: tuple[str, ...]  # of the labels, background first
    values: tuple[int, ...]  # that stand for the labels in a file
    affine: np.ndarray
    about: str


class Split(NamedTuple):
    """Two parts of a volume, front and back, as slices of the axis `AHEAD`."""

    learn: slice
    test: slice


def template(resolution: float) -> Volume:
    """The ICBM152 template (2009a, symmetric), with grey and white matter, at `resolution` mm."""
    datasets = need("nilearn.datasets")
    loaders = [
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    ]
    head, grey, white = (_regrid(load(resolution=1), resolution) for load in loaders)
    maps = [np.asarray(i.dataobj, dtype=np.float32) for i in (grey, white)]
    labels = np.argmax(np.stack([1 - maps[0] - maps[1], *maps]), axis=0)
    return Volume(
        standardize(np.asarray(head.dataobj, dtype=np.float32)),
        torch.from_numpy(labels),
        ("background", "grey matter", "white matter"),
        (0, 1, 2),
        head.affine,
        "the ICBM152 template (Fonov et al. 2011), the average of 152 brains: T1 image, grey and "
        "white matter",
    )


def read(image: Path, labels: Path | None, resolution: float) -> Volume:
    """An image, and perhaps its label map, from NIfTI files."""
    original = open_image(image)
    head = _regrid(original, resolution)
    seen = standardize(np.asarray(head.dataobj, dtype=np.float32))
    if labels is None:
        return Volume(seen, None, (), (), head.affine, image.name)
    truth = open_image(labels)
    if truth.shape != original.shape or not np.allclose(truth.affine, original.affine, atol=1e-3):
        raise CommandError(
            f"{labels} ({truth.shape}) and {image} ({original.shape}) lie on different grids"
        )
    given = np.asarray(truth.dataobj)
    if not np.isfinite(given).all() or np.abs(given - given.round()).max() > 1e-3:
        raise CommandError(f"{labels} holds other numbers than whole ones: it is no map of labels")
    if len(kinds := np.unique(given.round())) < 2:
        raise CommandError(f"{labels} holds only the value {kinds[0]:g}: there is nothing to learn")
    numbers = np.asarray(_regrid(truth, resolution, order=0).dataobj).round().astype(np.int64)
    found, dense = np.unique(numbers, return_inverse=True)
    names = tuple(f"label {n}" for n in found)
    dense = torch.from_numpy(dense.reshape(numbers.shape))
    return Volume(seen, dense, names, tuple(map(int, found)), head.affine, image.name)


def standardize(values: np.ndarray) -> Tensor:
    """Zero mean and unit deviation over the object: the voxels above the mean of the image."""
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    inside = values[values > values.mean()]
    if inside.size == 0 or inside.std() == 0:
        raise CommandError("the image is constant: there is nothing to see in it")
    return torch.from_numpy(((values - inside.mean()) / inside.std()).astype(np.float32))


def split(labels: Tensor, gap: int, size: tuple[int, int, int] = (1, 1, 1)) -> Split:
    """Front and back of what is labelled, as long as each other, with `gap` slices between them.

    Boxes of a given `size` must fit into each, or a CommandError says what does.
    """
    first, last = labelled(labels)
    half = (last - first - gap) // 2
    if half < size[AHEAD]:
        raise CommandError(
            f"the labels are {last - first} slices long, too short for a gap of {gap} between two "
            f"parts of at least {size[AHEAD]}: use a smaller --patch or a finer --resolution"
        )
    if any(n < most for n, most in zip(labels.shape, size, strict=True)):
        raise CommandError(
            f"the image has {tuple(labels.shape)} voxels, too few for a patch of {max(size)}: "
            "use a smaller --patch or a finer --resolution"
        )
    return Split(learn=slice(last - half, last), test=slice(first, first + half))


def labelled(labels: Tensor) -> tuple[int, int]:
    """The first slice, from back to front, that holds a label, and the one after the last."""
    others = [axis for axis in range(3) if axis != AHEAD]
    where = torch.nonzero((labels > 0).any(others[1]).any(others[0])).flatten()
    return int(where[0]), int(where[-1]) + 1


def open_image(path: Path) -> Any:
    """A 3-D image of any format that nibabel reads, in memory."""
    nibabel = need("nibabel")
    broken = (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError)
    try:
        loaded = nibabel.squeeze_image(nibabel.load(path))
        values = np.asanyarray(loaded.dataobj)
    except broken as error:
        raise CommandError(f"{path} cannot be read as an image: {error}") from error
    if len(loaded.shape) != 3 or 0 in loaded.shape:
        raise CommandError(f"{path} has shape {loaded.shape}, but a 3-D image is needed")
    if values.dtype.kind not in "iuf":
        raise CommandError(f"{path} holds {values.dtype}, but one number per voxel is needed")
    if not np.isfinite(loaded.affine).all() or abs(np.linalg.det(loaded.affine)) < 1e-12:
        raise CommandError(f"{path} does not say where its voxels lie: its affine is singular")
    return loaded


def _regrid(image: Any, resolution: float, order: int = 1) -> Any:
    """The image on cubic voxels of `resolution` mm, along the axes right, ahead, up."""
    return need("nibabel.processing").resample_to_output(image, [resolution] * 3, order=order)
