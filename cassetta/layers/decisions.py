"""What was decided for a module on an image, kept with the module while nothing has changed.

Which engine runs a block, and by which steps, follows from the layers of the block, from what kind
of image it meets, and from the settings of the process. All of these are looked at in each call;
what follows from them is found once.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist, nn
from torch.nn.modules import module as torch_module

from cassetta.functional import Deferred
from cassetta.kernels import dispatch
from cassetta.layers import fusing

T = TypeVar("T")

LIMIT = 64
"""For how many kinds of images a module keeps what was decided; then it begins anew."""


class Decisions:
    """What a module was like, and what was decided then by the kinds of images; in no copy."""

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current: tuple[list[Any], dict[Any, Any]] = [], {}  # replaced as one: threads share it

    def __deepcopy__(self, memo: Any) -> "Decisions":
        return Decisions()

    def __reduce__(self) -> Any:
        return Decisions, ()

    def of(self, module: nn.Module) -> dict[Any, Any]:
        """Return what was decided for the module as it is now, to be added to."""
        facts: list[Any] = []
        _collect(module, facts)
        known, found = self.current
        if len(facts) != len(known) or not all(map(operator.is_, facts, known)):
            found = {}
            self.current = facts, found
        return found


def recalled(module: nn.Module, x: Deferred, decide: Callable[[Deferred], T]) -> T:
    """Return decide(x), or what it returned for such an image while the module was as it is.

    What `decide` returns may depend on all that is no value of a tensor: on the attributes of the
    module and of those within, on which parameters and buffers there are, on the kind of the image,
    autocast, and the requests for backends and engines. It may hold modules, but no tensor.
    """
    if torch.compiler.is_compiling() or fusing.is_observed():
        return decide(x)
    own = module.__dict__
    if type(x.image) not in dispatch.PLAIN or "_is_replica" in own:  # of DataParallel, for a call
        return decide(x)
    decisions = own.get("_decisions")
    if decisions is None:
        decisions = own["_decisions"] = Decisions()
    found, kind = decisions.of(module), _kind(x)
    decided = found.get(kind)
    if decided is None:
        if len(found) >= LIMIT:
            found.clear()
        decided = found[kind] = decide(x)
    return decided


def _collect(module: nn.Module, facts: list[Any]) -> None:
    """Add all that a module is, but for the values of its tensors, to what is known of others."""
    own = module.__dict__
    facts.append(type(module))
    facts += own.values()
    for tensors in own["_parameters"], own["_buffers"]:
        if tensors:
            facts += tensors
            facts += map(_is_none, tensors.values())
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        for name in _HOOKS:
            facts += own[name].values()
    for child in own["_modules"].values():
        if child is None:
            facts.append(None)
        else:
            _collect(child, facts)


_IS_DISTRIBUTED = dist.is_available()
_is_none = functools.partial(operator.is_, None)
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def _kind(x: Deferred) -> Any:
    """What of an image, and of the process, decisions depend on."""
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
