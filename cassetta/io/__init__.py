"""Saving modules with what is needed to build them again."""

from cassetta.io.loadable import (
    LoadableMixin as LoadableMixin,
    load as load,
    load_module as load_module,
    make_loadable as make_loadable,
)
