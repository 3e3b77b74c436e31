"""Say what this machine has, which backend runs and why.

The exit code is 0 if the backend asked for (CASSETTA_BACKEND) can run here, and 1 if not.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

import cassetta
from cassetta.kernels import dispatch, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: the request is in the environment."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0 if the request can be met."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    console.print()
    asked = os.environ.get(dispatch.ENVIRONMENT) or "auto (the default)"
    try:
        dispatch.implementation()
        why = dispatch.why_reference()
    except (ValueError, dispatch.BackendError) as error:
        console.print(f"asked for  {asked}\n[bold red]cannot run[/]: {error}")
        return 1
    console.print(f"asked for  {asked}")
    console.print(f"runs       {'reference (plain PyTorch)' if why else 'triton'}")
    if why:
        console.print(f"because    {why}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    """What is here, a line each. What cannot be found out says why, and the rest goes on."""
    yield "cassetta", f"{cassetta.__version__} in {os.path.dirname(cassetta.__file__)}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, built for {_built_for()}"
    yield "triton", _attempt(lambda: importlib.import_module("triton").__version__)
    for name in ("torch-interpol", "torch-bounds"):
        yield name, _attempt(lambda name=name: importlib.metadata.version(name))
    yield "cuDNN", _attempt(lambda: str(torch.backends.cudnn.version() or "none"))
    yield "GPUs", _attempt(_gpus)
    demo = [name for name in ("nibabel", "nilearn", "matplotlib") if not _installed(name)]
    yield (
        "extra demo",
        f"lacks {', '.join(demo)}: pip install cassetta-triton\\[demo]" if demo else "installed",
    )


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    lines = []
    for gpu in machine.gpus():
        major, minor = gpu.capability
        lines.append(f"{gpu.name}, capability {major}.{minor}, {gpu.memory >> 30} GiB")
    return "\n".join(lines)


def _attempt(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # a broken driver or package is what a doctor is called for
        return f"not available: {type(error).__name__}: {error}"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
