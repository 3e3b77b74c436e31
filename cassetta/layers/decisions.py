"""What was decided for a module on an image, kept while nothing has changed.

Which engine runs a block, and by which steps, follows from the layers of the block, from what kind
of image it meets, and from the settings of the process. All of these are looked at in each call;
what follows from them is found once.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import distributed as dist, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import Deferred
from cassetta.kernels import dispatch
from cassetta.layers import fusing

T = TypeVar("T")

LIMIT = 64
"""For how many kinds of images a module keeps what was decided; then it begins anew."""


Look = Callable[[], list[Any]]
_known: WeakKeyDictionary[nn.Module, tuple[Look, list[Any], dict[Any, Any]]] = WeakKeyDictionary()
"""By module: what looks at it, what that saw, and what was decided then by the kinds of images.

None of it holds the module, so that this goes when the module goes. Threads replace it as one.
"""


def recalled(module: nn.Module, x: Deferred, decide: Callable[[Deferred], T]) -> T:
    """Return decide(x), or what it returned for such an image while the module was as it is.

    What `decide` returns may depend on all that is no value of a tensor: on the attributes of the
    module and of those within, on which parameters and buffers there are, on the kind of the image,
    autocast, and the requests for backends and engines. It may hold the modules within, but neither
    the module itself nor a tensor.
    """
    if torch.compiler.is_compiling() or fusing.is_observed():
        return decide(x)
    if type(x.image) not in dispatch.PLAIN or "_is_replica" in module.__dict__:
        return decide(x)  # (a replica of DataParallel lives for one call)
    found, kind = _of(module), _kind(x)
    decided = found.get(kind)
    if decided is None:
        if len(found) >= LIMIT:
            found.clear()
        decided = found[kind] = decide(x)
    return decided


def _of(module: nn.Module) -> dict[Any, Any]:
    """Return what was decided for the module as it is now, to be added to."""
    look, known, found = _known.get(module, _NOTHING)
    facts = look()
    facts.append(type(module))
    if len(facts) != len(known) or not all(map(operator.is_, facts, known)):
        look, found = _looking_at(module), {}
        _known[module] = look, [*look(), type(module)], found
    return found


def _looking_at(module: nn.Module) -> Look:
    """Return what lists all that a module and those within are, but for the values of tensors.

    The children of each module are in the list, so a module that is added or removed is noticed.
    """
    _, *within = module.modules()
    if any(isinstance(one, torch.jit.ScriptModule) for one in within):
        return lambda: [object()]  # what is compiled cannot be looked at: each time it is another
    views: list[Any] = []
    tensors: list[Any] = []
    for own in (one.__dict__ for one in (module, *within)):
        views.append(own.values())
        for name in ("_parameters", "_buffers"):
            views.append(own[name].keys())
            tensors.append(own[name].values())
        views += (own[name].values() for name in ("_modules", *_HOOKS))
    chained = itertools.chain.from_iterable
    kinds = [type(one) for one in within]
    return lambda: [
        *map(type, within), *map(_forward, kinds), *chained(views), *map(_is_none, chained(tensors))
    ]  # fmt: skip


_NOTHING: tuple[Look, list[Any], dict[Any, Any]] = (lambda: [], [], {})
"""Of a module that nobody has looked at."""

_IS_DISTRIBUTED = dist.is_available()
_forward = operator.attrgetter("forward")
_is_none = functools.partial(operator.is_, None)
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _kind(x: Deferred) -> Any:
    """Return all of an image, and of the process, that decisions depend on."""
    image = x.image
    device = image.device
    kind = device.type
    rounded = None  # to what autocast rounds, where kernels may run
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        rounded = torch.get_autocast_dtype(kind)
    others: Any = ()
    if not x.is_settled and len(x.parts) > 1:
        others = [(part.shape[1], part.is_last) for part in x.parts]
    hooked = bool(torch_module._has_any_global_hook())
    world = dist.group.WORLD if _IS_DISTRIBUTED else None
    return (
        type(image), image.shape, image.dtype, device, x.is_last, *others, rounded, hooked, world,
        torch.is_grad_enabled(), dispatch.settings(),
    )  # fmt: skip
