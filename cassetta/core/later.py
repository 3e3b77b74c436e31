"""Packages that take long to import, and that few programs need: imported where they are used."""

from types import ModuleType


def interpol() -> ModuleType:
    """Import torch-interpol; with torch before 2.10 it compiles itself first, for half a second."""
    import interpol

    return interpol
