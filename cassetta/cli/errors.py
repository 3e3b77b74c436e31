"""What a command says instead of a traceback."""

import importlib
import os
from pathlib import Path
from types import ModuleType


class CommandError(Exception):
    """What the user should read; the command line prints it and exits with code 2."""


def need(name: str) -> ModuleType:
    """A module of the extra "demo", or a sentence on how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CommandError(
            f"{name.split('.')[0]} is needed and cannot be imported ({error}): "
            "pip install 'cassetta-triton[demo]'"
        ) from error


def writable(folder: Path, name: str = "--out") -> Path:
    """The folder that `name` asks for, made if need be, once files can surely be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{name} {folder} cannot be made a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"{name} {folder} cannot be written to: choose another folder")
    return folder
