"""Say what a network costs: parameters, operations, memory; and how much of it fits.

Nothing is computed or allocated, so a laptop can answer for any GPU.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cassetta import costs, fitting
from cassetta.backbones.presets import PRESETS, Preset
from cassetta.cli import network
from cassetta.cli.errors import CommandError
from cassetta.core import check
from cassetta.io import loadable
from cassetta.models import SegNet
from cassetta.models.segmentation import BACKBONES

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL",
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
    options = {"autocast": PRECISIONS[arguments.precision]}
    try:
        net = _network(arguments)
        size = check.per_dimension("--size", arguments.size, net.ndim)
        shape = (check.whole("--batch", arguments.batch), net.inp_channels, *size)
        print(costs.summary(net, shape, **options))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CommandError(str(error).splitlines()[0]) from error
    if memory is not None:
        _print_what_fits(net, shape, memory, inference=inference, **options)
    return 0


def _network(arguments: argparse.Namespace) -> Any:
    """The network that was asked for; unless it is in a file, without memory of its own."""
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
    with torch.device("meta"):
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
