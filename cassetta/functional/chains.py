"""Sites of a program that follow each other, as one node of autograd, where images are small.

There a node of autograd costs the host more than what it computes costs the GPU. A chain does what
its sites do, one after the other; what is between them is no tensor of the graph. It holds what all
of them keep until its own backward is done, which small images allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from cassetta.functional import recordings
from cassetta.functional.nodes import first_order
from cassetta.functional.programs import Call, names
from cassetta.functional.sites import Site, picker

LENGTH = 6
"""How many sites are one node at most, so that gradients of parameters still come by and by."""


class Link(NamedTuple):
    """A site of a chain, and where its tensors are among all that there are by then."""

    site: Site
    told: list[Any]
    tables: Callable[[Sequence[Any]], tuple[Any, ...]]
    inputs: Callable[[Sequence[Any]], tuple[Any, ...]]
    places: tuple[int, ...]  # of its inputs, and of what stands for sums of images
    result: int  # the place of y; that of its sums comes next


class Chain:
    """What a node does: one site after the other; it holds no tensor."""

    def __init__(self, calls: Sequence[Call], tables: list[Any], inputs: list[Any]) -> None:
        self._first, self._nb_inputs = len(tables), len(inputs)
        places = {name: n for n, name in enumerate([*tables, *inputs])}
        self._links: list[Link] = []
        for call in calls:
            site, (told, own, *given) = call.function.__self__, call.args
            where, result = tuple([places[name] for name in given]), len(places)
            for n, name in enumerate(call.targets):
                places[name or (result, n)] = len(places)
            among = picker([places[name] for name in own])
            inside = picker([*where[: site.nb_inputs]])
            self._links.append(Link(site, told, among, inside, where, result))
        self._needs: dict[tuple[bool, ...], list[tuple[bool, ...]]] = {}
        self.is_view = self._links[-1].site.is_view

    def node(self, tables: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Any, ...]:
        """Return what the last site does."""
        found: list[Any] = []
        y, out = _apply(self, found, tables, *inputs)
        return y, out, *found

    def compute(
        self, tables: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Any, ...], list[Tensor], list[tuple[Tensor, ...]]]:
        """Return what the last site does, and what each keeps: tensors of all, tables of each."""
        values: list[Any] = [*tables, *inputs]
        kept: list[Tensor] = []
        beside: list[tuple[Tensor, ...]] = []
        made: tuple[Any, ...] = ()
        for site, _, own, given, _, _ in self._links:
            mine, x = own(values), given(values)
            y, out, *found, w = site.compute(mine, *x)
            kept += site.saved((*x, y, w))
            beside.append(site.saved_tables((*mine, *found)))
            made = y, out, *found
            values += made
        return made, kept, beside

    def differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Any, kept: Sequence[Tensor],
        beside: list[tuple[Tensor, ...]],
    ) -> list[Any]:  # fmt: skip
        """Return the gradients of the inputs that need it."""
        asked = self._needs.get(needs)
        if asked is None:
            asked = self._needs[needs] = self._asked(needs)
        *_, last = self._links
        grads = {last.result: g, last.result + 1: sums}
        end, is_unseen = len(kept), recordings.is_unseen(g)
        for link, tables, own in zip(self._links[::-1], beside[::-1], asked[::-1], strict=True):
            site, told, _, _, places, result = link
            g, sums = grads.pop(result, None), grads.pop(result + 1, None)
            if g is None or not any(own):
                break
            start = end - site.nb_saved
            mine, end = (*kept[start:end], *tables), start
            found = site.differentiate(own, g, sums if told[0] else None, mine, is_unseen)
            grads |= zip(places, site.gradients((None, *found))[3:], strict=True)
        return [grads.get(self._first + n) for n in range(self._nb_inputs)]

    def _asked(self, needs: tuple[bool, ...]) -> list[tuple[bool, ...]]:
        """Return what the inputs of each site need."""
        known = dict(enumerate(needs, self._first))
        asked: list[tuple[bool, ...]] = []
        for link in self._links:
            own = [known[place] for place in link.places]
            known |= dict.fromkeys((link.result, link.result + 1), any(own))
            asked.append((False, False, False, *own))
        return asked


class Chained(Function):
    """The node of autograd: (chain, found, tables, *inputs) to (y, its sums) of the last site."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, found: list[Any], tables: tuple[Tensor, ...], *inputs: Tensor
    ) -> tuple[Any, Any]:
        (y, out, *others), kept, ctx.tables = chain.compute(tables, inputs)
        ctx.save_for_backward(*kept)
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        found.extend(others)
        return y.view_as(y) if chain.is_view else y, out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None = None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[3:]
        grads = ctx.chain.differentiate(needs, g, sums, ctx.saved_tensors, ctx.tables)
        return None, None, None, *grads


_apply: Any = super(Function, Chained).apply  # type: ignore[attr-defined]


def joined(calls: Sequence[Call], out: Any) -> list[Call]:
    """Return the calls of a program that returns `out`, with chains in the place of their sites."""
    found: list[Call] = []
    run: list[Call] = []
    for n, call in enumerate(calls):
        after = names([out, *[(one.args, one.kwargs) for one in calls[n + 1 :]]])
        if not (run and len(run) < LENGTH and _follows(run, call, after)):
            found += _chained(run)
            run = []
        run.append(call)
    return [*found, *_chained(run)]


def _follows(run: Sequence[Call], call: Call, after: set[Any]) -> bool:
    """Tell whether a call goes on where a run ends, with nothing but that in common."""
    if not (_is_small(call) and _is_small(run[-1]) and call.args[2] == run[-1].targets[0]):
        return False
    given = [x for one in (*run, call) for x in one.args[2:]]
    beside = {x for one in (*run, call) for x in one.args[1]}
    made = {name for one in run for name in one.targets}
    return len({*given} - beside) == len(given) and not after & made


def _is_small(call: Call) -> bool:
    is_site = getattr(call.function, "__func__", None) is Site.node
    return is_site and call.grad and call.function.__self__.is_small


def _chained(run: Sequence[Call]) -> Sequence[Call]:
    """Return the one call that does what these do."""
    if len(run) < 2:
        return run
    made = {name for call in run for name in call.targets}
    tables = [*dict.fromkeys(x for call in run for x in call.args[1] if x not in made)]
    inputs = [x for call in run for x in call.args[2:] if x not in made]
    chain, last = Chain(run, tables, inputs), run[-1]
    return [Call(last.targets, False, chain.node, (tuple(tables), *inputs), {}, True)]
