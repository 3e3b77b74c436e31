"""What was decided for a module on an image, kept while nothing has changed.

Which engine runs a block, and by which steps, follows from the layers of the block, from what kind
of image it meets, and from the settings of the process. All of these are looked at in each call;
what follows from them is found once.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, ValuesView
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import Deferred
from cassetta.kernels import dispatch
from cassetta.layers import fusing

T = TypeVar("T")

LIMIT = 64
"""For how many kinds of images a module keeps what was decided; then it begins anew."""


class _Known(NamedTuple):
    """What is known of a module."""

    look: Callable[[], list[Any]]
    facts: list[Any]  # what that saw
    registers: Callable[[], Iterator[Any]]  # the dictionaries of tensors and modules
    held: list[Any]  # what these were
    found: dict[Any, Any]  # what was decided then, by the kinds of images
    views: list[ValuesView[Tensor | None]]  # its parameters and buffers, and those within

    def tensors(self) -> list[Tensor]:
        """List the parameters and buffers."""
        return [x for view in self.views for x in view if x is not None]


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
"""By module.

None of it holds the module, so that this goes when the module goes. Threads replace it as one.
"""


def recalled(module: nn.Module, x: Deferred, decide: Callable[[Deferred], T]) -> T:
    """Return decide(x), or what it returned for such an image while the module was as it is.

    What `decide` returns may depend on all that is no value of a tensor: on the attributes of the
    module and of those within, on which parameters and buffers there are, on the kind of the image,
    autocast, and the requests for backends and engines. It may hold the modules within, but neither
    the module itself nor a tensor. A group is given a dictionary, and fills it as it comes to each
    of its modules.
    """
    if torch.compiler.is_compiling() or fusing.is_observed():
        return decide(x)
    if type(x.image) not in dispatch.PLAIN or "_is_replica" in module.__dict__:
        return decide(x)  # (a replica of DataParallel lives for one call)
    found, kind = of(module).found, _kind(x)
    decided = found.get(kind)
    return add(found, kind, decide(x)) if decided is None else decided


def add(found: dict[Any, Any], kind: Any, decided: T) -> T:
    """Keep what was decided for a kind of image, and return it."""
    if len(found) >= LIMIT:
        found.clear()
    found[kind] = decided
    return decided


def of(module: nn.Module) -> _Known:
    """Return what is known of the module as it is now; what is decided is to be added."""
    known = _known.get(module, _NOTHING)
    if not _is_as_it_was(module, known):
        look, registers, views = _looking_at(module)
        facts = [*look(), type(module)]
        known = _known[module] = _Known(look, facts, registers, [*registers()], {}, views)
    return known


def _is_as_it_was(module: nn.Module, known: _Known) -> bool:
    """Tell whether all that is known to have been equals what is; most of it is the same object."""
    seen = known.look()
    seen.append(type(module))
    try:
        is_equal = seen == known.facts
    except Exception:
        return False
    return is_equal and all(map(operator.is_, known.registers(), known.held))


def _looking_at(
    module: nn.Module,
) -> tuple[Callable[[], list[Any]], Callable[[], Iterator[Any]], list[ValuesView[Tensor | None]]]:
    """Return what lists all that a module and those within are, but for the values of tensors.

    The children of each module are in the list, so a module that is added or removed is noticed.
    And what finds the dictionaries in which there is something, and values of those of tensors.
    """
    _, *within = module.modules()
    if any(isinstance(one, torch.jit.ScriptModule) for one in within):
        return lambda: [object()], lambda: iter(()), []  # of what is compiled nothing is seen
    views: list[Any] = []
    tensors: list[ValuesView[Tensor | None]] = []
    held: list[tuple[dict[str, Any], str]] = []
    empty: list[Any] = []  # registers in which there is nothing, as in most
    for own in (one.__dict__ for one in (module, *within)):
        views.append(own.values())
        views += [one for one in [*own.values()] if isinstance(one, list)]  # and their entries
        held += [(own, name) for name in _HELD if own[name]]
        held += [(own, name) for name, one in own.items() if isinstance(one, Tensor)]
        for name in ("_parameters", "_buffers"):
            views += [own[name].keys()] * bool(own[name])
            tensors += [own[name].values()] * bool(own[name])
        views += [own[name].values() for name in ("_modules", *_HOOKS) if own[name]]
        empty += [own[name] for name in (*_HELD, *_HOOKS) if not own[name]]
    chained = itertools.chain.from_iterable
    kinds = {type(one) for one in within}
    owners, names = zip(*held, strict=True) if held else ((), ())
    look = lambda: [  # noqa: E731
        any(empty), *map(type, within), *map(_forward, kinds), *chained(views),
        *map(_is_none, chained(tensors)),
    ]  # fmt: skip
    return look, lambda: map(operator.getitem, owners, names), tensors


_NOTHING = _Known(lambda: [], [], lambda: iter(()), [], {}, [])
"""Of a module that nobody has looked at."""

_IS_DISTRIBUTED = dist.is_available()
_forward = operator.attrgetter("forward")
_is_none = functools.partial(operator.is_, None)
_HELD = "_parameters", "_buffers", "_modules"
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _kind(x: Deferred) -> Any:
    """Return all of an image, and of the process, that decisions depend on."""
    image = x.image
    others: Any = ()
    if not x.is_settled and len(x.parts) > 1:
        others = [(part.shape[1], part.is_last) for part in x.parts]
    form = type(image), image.shape, image.dtype, image.device
    return *form, x.is_last, *others, process(image)


def process(x: Tensor) -> tuple[Any, ...]:
    """Return all of the process, and of this thread, that decisions on an image depend on."""
    kind = x.device.type
    rounded = None  # to what autocast rounds, where kernels may run
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        rounded = torch.get_autocast_dtype(kind)
    hooked = bool(torch_module._has_any_global_hook())
    world = dist.group.WORLD if _IS_DISTRIBUTED else None
    return rounded, hooked, world, torch.is_grad_enabled(), dispatch.settings()
