"""What a command says instead of a traceback."""

import importlib
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
