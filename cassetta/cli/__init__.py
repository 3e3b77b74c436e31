"""The command line: `cassetta demo`, `predict`, `summary`, `tune`, `bench`, `check`, `doctor`, ...

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit code`. What a command
needs beyond the package itself (nibabel, nilearn, matplotlib: the extra "demo") it imports when it
runs, so that the command line works without.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from cassetta.cli import bench, check, compile_check, demo, doctor, predict, summary, tune
from cassetta.cli.errors import CommandError

COMMANDS = {
    "demo": demo, "predict": predict, "summary": summary, "doctor": doctor, "check": check,
    "tune": tune, "bench": bench,
    "compile-check": compile_check,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 2 for what cannot be done, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("cassetta", description="Convolutional backbones for images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        one = commands.add_parser(name, help=text.split("\n")[0], description=text)
        module.add_arguments(one)
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except (CommandError, OSError) as error:
        reason = " ".join(str(error).split())
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        broken = "memory" not in str(error) or "illegal memory access" in str(error)
        if isinstance(error, RuntimeError) and broken:
            raise
        first = str(error).splitlines()[0]
        reason = f"not enough memory, use smaller patches, batches or networks ({first})"
    except KeyboardInterrupt:
        return 130
    print(f"cassetta {arguments.command}: {reason}", file=sys.stderr)
    return 2
