"""The MODEL of a command: a backbone, a published network, or a saved file; and its input."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from cassetta.backbones.presets import PRESETS, Preset
from cassetta.cli import network
from cassetta.cli.errors import CommandError
from cassetta.core import check
from cassetta.io import loadable
from cassetta.models import SegNet
from cassetta.models.segmentation import BACKBONES

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser, nargs: Any = None) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs=nargs,
        help=f"{', '.join(BACKBONES)}; a published network ({', '.join(PRESETS)}); or a saved file",
    )  # fmt: skip
    parser.add_argument("--size", type=int, nargs="+", default=[128], help="voxels per axis [128]")
    parser.add_argument("--batch", type=int, default=1, help="[1]")
    parser.add_argument("--ndim", type=int, help="spatial dimensions [3, or what a file says]")
    parser.add_argument("--channels", type=int, help="channels of the input [as MODEL has it]")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="of a backbone, e.g. norm=instance; repeatable",
    )  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="[float32]")


def build(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, tuple[int, ...]]:
    """The network that was asked for, and the shape of its input.

    On the device "meta" it is without memory of its own, unless it is in a file.
    """
    try:
        net = _network(arguments, device)
        size = check.per_dimension("--size", arguments.size, net.ndim)
        shape = (check.whole("--batch", arguments.batch), net.inp_channels, *size)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CommandError(str(error).splitlines()[0]) from error
    return net, shape


def _network(arguments: argparse.Namespace, device: torch.device) -> Any:
    name, path = arguments.model, Path(arguments.model)
    if path.is_file():
        _refuse(arguments, "ndim", "channels", "option")
        return _load(path)
    try:
        kind = check.named("MODEL", name, {**BACKBONES, **PRESETS}, _letters)
    except ValueError as error:
        raise CommandError(f"{error}, or the path of a file that cassetta saved") from error
    ndim = 3 if arguments.ndim is None else arguments.ndim
    channels = arguments.channels
    if channels is not None:
        channels = check.whole("--channels", channels)
    with device:
        if isinstance(kind, Preset):
            _refuse(arguments, "option")
            return SegNet.preset(name, ndim, 1 if channels is None else channels)
        given = {} if channels is None else {"nb_features": channels}
        return kind(ndim, **{**given, **network.options(arguments.option)})


def _load(path: Path) -> Any:
    try:
        net = loadable.load(path)
    except Exception as error:  # a foreign, broken or malicious file
        raise CommandError(f"{path} cannot be read: {error}") from error
    if not hasattr(net, "ndim") or not hasattr(net, "inp_channels"):
        kind = type(net).__name__
        raise CommandError(f"{path} holds a {kind}, which does not say its ndim and inp_channels")
    return net


def _refuse(arguments: argparse.Namespace, *names: str) -> None:
    """What a network that exists already has of its own."""
    for name in names:
        if getattr(arguments, name):
            raise CommandError(f"--{name} cannot change {arguments.model}: leave it out")


def _letters(name: str) -> str:
    return re.sub("[-_ ]", "", name.lower())
