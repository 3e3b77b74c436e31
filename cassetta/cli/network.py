"""The network of a command: built from the command line, saved and loaded with its surroundings."""

import ast
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cassetta.cli.errors import CommandError
from cassetta.core import check
from cassetta.io import loadable
from cassetta.kernels import dispatch
from cassetta.models import SegNet
from cassetta.rehearsal import Rehearsal

_SURROUNDINGS = "cassetta.predict"

SMALL: dict[str, dict[str, Any]] = {
    "meshnet": {"nb_features": 8, "nb_layers": 5, "nb_conv_per_layer": 1},
    "unet": {"nb_features": 8, "nb_levels": 3, "norm": "batch"},
    "atrousnet": {"nb_features": 8, "nb_levels": 2, "nb_conv_per_level": 1},
}
"""Options with which a backbone trains in minutes on two processor cores."""


class Surroundings(NamedTuple):
    """What a network must know of the images it was trained on."""

    resolution: float  # mm
    patch: int  # voxels
    names: tuple[str, ...]  # of the labels
    values: tuple[int, ...]  # that stand for the labels in a file


def device(name: str) -> torch.device:
    """The device of this name, "auto" being the GPU if there is one, and a backend that can run."""
    try:
        dispatch.implementation()
    except (ValueError, dispatch.BackendError) as error:
        raise CommandError(str(error)) from error
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used here: {reason}") from error
    return chosen


def options(words: list[str], backbone: str = "") -> dict[str, Any]:
    """Options from words such as "nb_features=16" and "norm=instance", over those in `SMALL`."""
    chosen = dict(SMALL.get(backbone.lower(), {}))
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise CommandError(f"--option {word} is not of the form NAME=VALUE")
        try:
            chosen[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            chosen[name] = value
    return chosen


def build(
    ndim: int, nb_classes: int, backbone: str, opt_backbone: dict[str, Any], patch: int
) -> SegNet:
    """A network from one channel to `nb_classes` that preserves the size of a patch."""
    try:
        net = SegNet(ndim, 1, nb_classes, backbone=backbone, opt_backbone=opt_backbone)
        size = (patch,) * ndim
        out = Rehearsal(net)((1, 1, *size)).shape[2:]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if "memory" in str(error):
            raise
        raise CommandError(str(error).splitlines()[0]) from error
    if out != size:
        raise CommandError(
            f"--backbone {backbone} with {opt_backbone} turns {size} voxels into {out}: "
            "every voxel needs a label"
        )
    return net


def save(net: SegNet, surroundings: Surroundings, path: Path) -> None:
    """Write a network and what it must know, so that `load` finds both."""
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in surroundings._asdict().items()}
    loadable.save({**net.serialize(), _SURROUNDINGS: known}, path)


def load(path: Path) -> tuple[SegNet, Surroundings]:
    """What `save` wrote. No code from the file is run."""
    try:
        packed = loadable.read(path)
        net = SegNet.load_from(packed)
    except Exception as error:  # a missing, foreign, broken or malicious file
        raise CommandError(f"{path} cannot be read: {error}") from error
    try:
        known = _surroundings(packed[_SURROUNDINGS], net)
        Rehearsal(net.eval())((1, 1, *[known.patch] * net.ndim))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(f"{path} was not written by `cassetta demo`: {error}") from error
    return net, known


def _surroundings(known: dict[str, Any], net: SegNet) -> Surroundings:
    """What the file says of the images, if it is whole and fits the network."""
    resolution = check.positive("resolution", known["resolution"])
    patch = check.whole("patch", known["patch"], least=2)
    names = tuple(str(name) for name in known["names"])
    values = tuple(check.whole("values", value, least=-(2**31)) for value in known["values"])
    if not len(names) == len(values) == net.out_channels or net.inp_channels != 1:
        raise ValueError(
            f"{net.inp_channels} channels become {net.out_channels} classes, "
            f"but it names {len(names)} labels and {len(values)} values"
        )
    return Surroundings(resolution, patch, names, values)
