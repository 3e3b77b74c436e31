"""Modules that save the arguments of their constructor with their weights.

A file holds a dictionary of plain values and tensors,

    {"cassetta.Loadable": "1.0", "module": ..., "qualname": ..., "args": ..., "kwargs": ...,
     "state": ...}

in upstream's format. It is read by `torch.load(weights_only=True)`, which runs no code XX"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

Source = str | os.PathLike | IO[bytes] | dict

VERSION = "1.0"
ALLOWED = ("cassetta", "torch.nn")
"""Packages whose module classes a file may name, if they are imported already."""

_KEY, _CLASS, _PARTIAL = "cassetta.Loadable", "cassetta.class", "cassetta.partial"
_known: dict[tuple[str, str], type] = {}


class _LoadMethod:
    """`Class.load(file)` builds a module; `module.load(file)` fills the one at hand."""

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return owner.load_from if instance is None else instance._load_weights


class LoadableMixin:
    """Mixin that lets a `torch.nn.Module` be saved with its constructor's arguments.

    ```python
    class Net(LoadableMixin, nn.Sequential):
        def __init__(self, channels):
            super().__init__(nn.Linear(channels, 16), nn.ReLU())

    Net(3).save("net.pt")
    net = Net.load_from("net.pt")       # or, of any class, cassetta.io.load("net.pt")
    Net(3).load("net.pt")               # fills a module that is there already
    ```

    Arguments can be plain values, tensors, classes, `functools.partial`s of classes, loadable
    modules, and containers of these. Other modules do not know their own arguments: pass their
    class or their name, or make them loadable first (`make_loadable`).
    """

    load = _LoadMethod()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, /, save_args: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _known[cls.__module__, cls.__qualname__] = cls
        if save_args:
            cls.__init__ = _remembering(cls)

    def serialize(self) -> dict[str, Any]:
        """The module as a dictionary of plain values, from which `load` builds it again.

        Raises
        ------
        TypeError
            If an argument of the constructor cannot be written as plain values.
        """
        cls = type(self)
        cls = cls.__bases__[-1] if getattr(cls, "_is_made_loadable", False) else cls
        arguments = getattr(self, "_arguments", ((), {}))
        packed: dict[str, Any] = {
            _KEY: VERSION,
            "module": cls.__module__,
            "qualname": cls.__qualname__,
            "args": _pack(arguments[0], f"{cls.__name__} argument"),
            "kwargs": _pack(arguments[1], f"{cls.__name__} argument"),
        }
        if isinstance(self, nn.Module):
            packed["state"] = self.state_dict()
        return packed

    def save(self, path: str | os.PathLike | IO[bytes]) -> None:
        """Save the module and what is needed to build it. An interrupted save leaves no trace.

        Raises
        ------
        TypeError
            If an argument of the constructor cannot be written as plain values.
        """
        save(self.serialize(), path)

    @classmethod
    def load_from(cls, source: Source, allow: Iterable[str] = ()) -> Any:
        """Build a module from what `save` or `serialize` made.

        Parameters
        ----------
        source : path, file or dict
            What was saved.
        allow : sequence of str
            Further packages whose classes the file may name; all are imported if it does.

        Raises
        ------
        TypeError
            If the file holds another class than the one it is asked for.
        ValueError
            If the file holds no loadable module, or names a class that is not allowed.
        """
        packed = read(source)
        if isinstance(allow, str):
            raise TypeError(f"allow={allow!r} must be a list of packages: use [{allow!r}]")
        hint = None if cls is LoadableMixin else cls
        return _unpack_module(packed, tuple(allow), hint)

    def _load_weights(self, source: Source) -> Any:
        """Fill this module with the weights that `save` wrote."""
        assert isinstance(self, nn.Module)
        self.load_state_dict(_state(read(source)))
        return self


def load(source: Source, allow: Iterable[str] = ()) -> Any:
    """Build a module, of whatever class, from what `LoadableMixin.save` wrote.

    See `LoadableMixin.load_from`.
    """
    return LoadableMixin.load_from(source, allow)


load_module = load


@functools.cache
def make_loadable(cls: type[nn.Module], save_args: bool = True) -> Any:
    """A loadable subclass of a module class.

    ```python
    norm = make_loadable(nn.GroupNorm)(4, 16)
    ```
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls={cls!r} is no class of modules")
    if issubclass(cls, LoadableMixin):
        return cls
    name = "Loadable" + cls.__name__

    def __reduce__(self: Any) -> tuple:  # pickle finds the class by what it was made of
        return _bare, (cls, save_args), self.__dict__

    body = {
        "__module__": cls.__module__, "__qualname__": name, "__reduce__": __reduce__,
        "_is_made_loadable": True,
    }  # fmt: skip
    return type(name, (LoadableMixin, cls), body, save_args=save_args)


def _bare(cls: type[nn.Module], save_args: bool) -> Any:
    made = make_loadable(cls, save_args)
    return made.__new__(made)


def save(packed: dict[str, Any], path: str | os.PathLike | IO[bytes]) -> None:
    """`torch.save`, but a file appears whole or not at all."""
    if not isinstance(path, (str, os.PathLike)):
        return torch.save(packed, path)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} lies in a folder that there is not")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(packed, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remembering(cls: type) -> Callable[..., None]:
    """The constructor of `cls`, which also stores its arguments in the object."""
    own = cls.__dict__.get("__init__")

    def inherited(self: Any, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(*args, **kwargs)

    @functools.wraps(own or cls.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_arguments" not in self.__dict__:  # those of the outermost class come first
            self.__dict__["_arguments"] = _copied((args, kwargs))
        (own or inherited)(self, *args, **kwargs)

    return __init__


def _copied(value: Any) -> Any:
    """`value` with fresh containers, so that the caller may change the ones that were passed.

    Functions, which `save` refuses anyway, leave their name only: a network that was built with a
    lambda can still be pickled.
    """
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    made = value.func if isinstance(value, functools.partial) else value
    is_plain = isinstance(made, (type, nn.Module)) or not callable(made)
    return value if is_plain else _Function(repr(value))


class _Function:
    """Stands for an argument that cannot be saved."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _pack(value: Any, what: str) -> Any:
    """`value` as plain values and tensors."""
    if isinstance(value, LoadableMixin):
        return value.serialize()
    if isinstance(value, dict):
        return {k: _pack(v, f"{what} {k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pack(v, f"{what} {i}") for i, v in enumerate(value))
    if isinstance(value, type):
        return {_CLASS: [value.__module__, value.__qualname__]}
    if isinstance(value, functools.partial):
        return {_PARTIAL: _pack([value.func, list(value.args), value.keywords], what)}
    plain = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype)
    if isinstance(value, (*plain, torch.device)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    fix = "pass a name or a class"
    if isinstance(value, nn.Module):
        fix = f"pass its name or class, or make_loadable({type(value).__name__})(...)"
    raise TypeError(f"{what} = {value!r} ({type(value).__name__}) cannot be saved: {fix}")


def read(source: Source) -> dict[str, Any]:
    """The dictionary in a file that `save` wrote, on the CPU. No code from the file is run.

    Raises
    ------
    ValueError
        If it holds no loadable module.
    """
    name = "the dictionary" if isinstance(source, dict) else str(source)
    packed: Any = source
    if not isinstance(packed, dict):
        if not isinstance(packed, (str, os.PathLike)) and not hasattr(packed, "read"):
            raise TypeError(f"source={source!r} is neither a path, a file nor a dictionary")
        try:
            packed = torch.load(packed, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # of many kinds, for empty, cut, foreign and malicious files
            raise ValueError(f"{name} holds no loadable module: {error}") from error
    if not isinstance(packed, dict) or _KEY not in packed:
        raise ValueError(
            f"{name} holds no loadable module: a bare state_dict goes to load_state_dict of a "
            "module built by hand"
        )
    if str(packed[_KEY]).split(".")[0] != VERSION.split(".")[0]:
        raise ValueError(f"{name} has version {packed[_KEY]!r}: this package reads {VERSION}")
    if not all(isinstance(packed.get(key), str) for key in ("module", "qualname")):
        raise ValueError(f"{name} holds no loadable module: it does not name its class")
    return packed


def _state(packed: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(packed.get("state"), dict):
        raise ValueError(f"the file of a {packed['qualname']} holds no weights")
    return packed["state"]


def _unpack(value: Any, allow: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        if _KEY in value:
            return _unpack_module(value, allow, None)
        if _CLASS in value:
            module, qualname = value[_CLASS]
            return _find(module, qualname, allow)
        if _PARTIAL in value:
            function, args, kwargs = _unpack(value[_PARTIAL], allow)
            return functools.partial(function, *args, **kwargs)
        return {k: _unpack(v, allow) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unpack(v, allow) for v in value)
    return value


def _unpack_module(packed: dict[str, Any], allow: tuple[str, ...], hint: type | None) -> Any:
    module, qualname = packed["module"], packed["qualname"]
    if hint is not None and hint.__qualname__ == qualname:
        cls = hint  # it may have moved to another file since
    else:
        cls = _find(module, qualname, allow)
        if hint is not None and not issubclass(cls, hint):
            raise TypeError(f"the file holds a {qualname}, not a {hint.__qualname__}")
    if not issubclass(cls, LoadableMixin):
        cls = make_loadable(cls)
    obj = cls(*_unpack(packed.get("args", ()), allow), **_unpack(packed.get("kwargs", {}), allow))
    if "state" in packed and isinstance(obj, nn.Module):
        state = _state(packed)
        for name, tensor in [*obj.named_parameters(), *obj.named_buffers()]:
            if name in state and tensor.is_floating_point():  # as it was saved: double, half, ...
                tensor.data = tensor.data.to(state[name].dtype)
        obj.load_state_dict(state)
    return obj


def _find(module: str, qualname: str, allow: tuple[str, ...]) -> type:
    """The class that a file names, if it is known already or lies in an allowed package."""
    if (module, qualname) in _known:
        return _known[module, qualname]

    def within(packages: tuple[str, ...], name: str = module) -> bool:
        return any(name == p or name.startswith(p + ".") for p in packages)

    if not within(ALLOWED + allow):
        raise ValueError(
            f"the file names the class {module}.{qualname}, outside the packages it may name "
            f"({', '.join(ALLOWED + allow)}): if you trust it, pass "
            f"allow=[{module.split('.')[0]!r}]"
        )
    # to import is to run code, which only the caller may allow
    found: Any = importlib.import_module(module) if within(allow) else sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    is_class = isinstance(found, type) and issubclass(found, (nn.Module, LoadableMixin))
    if not is_class or not within(ALLOWED + allow, found.__module__):
        raise ValueError(f"the file names {module}.{qualname}, which is no class of modules")
    return found
