"""Apply a network that `cassetta demo` trained to any NIfTI image.

The labels are written on the grid of the image, with its affine.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from cassetta.cli import network
from cassetta.cli.errors import CommandError, need, writable
from cassetta.cli.patches import box, sweep
from cassetta.cli.volume import Volume, open_image, read

SUFFIXES = (".nii", ".nii.gz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE.nii.gz", help="image to label")
    parser.add_argument("--weights", type=Path, required=True, help="what `cassetta demo` saved")
    parser.add_argument("--out", type=Path, help="default: IMAGE_labels.nii.gz, here")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")


def run(arguments: argparse.Namespace) -> int:
    """Label the image; 0 once the file is written."""
    image: Path = arguments.image
    out = arguments.out or Path(
        f"{image.name.removesuffix('.gz').removesuffix('.nii')}_labels.nii.gz"
    )
    if not out.name.endswith(SUFFIXES):
        raise CommandError(f"--out {out} must end in .nii or .nii.gz")
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder")
    if out.resolve() == image.resolve():
        raise CommandError(f"--out {out} would overwrite the image")
    device = network.device(arguments.device)
    need("nibabel.processing")
    writable(out.parent)
    net, known = network.load(arguments.weights)
    original = open_image(image)
    volume = read(image, None, known.resolution)
    guess = probabilities(net, volume, known.patch, device, "labelling")
    labels = onto_grid(guess.cpu().numpy(), volume.affine, original)
    _write(np.asarray(known.values)[labels], original, out)
    counts = np.bincount(labels.ravel(), minlength=len(known.names))
    console = Console(soft_wrap=True)
    for name, value, count in zip(known.names, known.values, counts, strict=True):
        console.print(f"{value:>6}  {name:<16} {count:>10} voxels  {count / labels.size:6.1%}")
    console.print(f"written to {out}")
    return 0


def probabilities(net: Any, volume: Volume, patch: int, device: torch.device, verb: str) -> Tensor:
    """Probability of each label in each voxel of the volume: (K, X, Y, Z)."""
    net.to(device).eval()
    return sweep(
        net, volume.image.to(device), box(net[0].ndim, patch), net.out_channels,
        track=lambda batches: track(batches, verb),
    )  # fmt: skip


def onto_grid(guess: np.ndarray, affine: np.ndarray, original: Any) -> np.ndarray:
    """The likeliest label in each voxel of the original image."""
    nibabel, processing = need("nibabel"), need("nibabel.processing")
    best = np.zeros(original.shape, dtype=np.float32)
    labels = np.zeros(original.shape, dtype=np.int64)
    for label, probability in enumerate(guess):
        map_ = nibabel.Nifti1Image(probability, affine)
        grid = (original.shape, original.affine)
        here = np.asarray(processing.resample_from_to(map_, grid, order=1).dataobj)
        better = here > best
        labels[better], best[better] = label, here[better]
    return labels


def _write(labels: np.ndarray, original: Any, path: Path) -> None:
    """A NIfTI file with the image's affine (and codes, if it is NIfTI); whole, or not at all."""
    nibabel = need("nibabel")
    kind = type(original) if isinstance(original, nibabel.Nifti1Image) else nibabel.Nifti1Image
    header = original.header.copy() if kind is type(original) else None
    dtype = np.uint8 if labels.min() >= 0 and labels.max() < 256 else np.int32
    image = kind(labels.astype(dtype), original.affine, header)
    image.header.set_data_dtype(dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0
    part = path.with_name(f".part-{path.name}")
    try:
        nibabel.save(image, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
