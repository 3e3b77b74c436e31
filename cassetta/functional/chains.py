"""Sites of a program that follow each other, as one node of autograd, where images are small.

There a node of autograd costs the host more than what it computes costs the GPU. A chain does what
its sites do, one after the other; what is between them is no tensor of the graph. It holds what all
of them keep until its own backward is done, which small images allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cassetta.functional.sites import Site, Work, picker
from cassetta.recording.programs import Call, names

LENGTH = 6
"""How many sites are one node at most, so that gradients of parameters still come by and by."""


class Link(NamedTuple):
    """A site of a chain, and where its tensors are among all that there are by then."""

    site: Site
    tables: Callable[[Sequence[Any]], tuple[Any, ...]]
    inputs: Callable[[Sequence[Any]], tuple[Any, ...]]
    places: tuple[int, ...]  # of its inputs, and of what stands for sums of images
    result: int  # the place of y; that of its sums comes next


class Chain(Work):
    """The work of several sites, one after the other."""

    def __init__(self, calls: Sequence[Call], tables: list[Any], inputs: list[Any]) -> None:
        self._first, self._nb_inputs = len(tables), len(inputs)
        places = {name: n for n, name in enumerate([*tables, *inputs])}
        self._links: list[Link] = []
        for call in calls:
            site, (own, *given) = call.function.__self__, call.args
            where, result = tuple([places[name] for name in given]), len(places)
            for n, name in enumerate(call.targets):
                places[name or (result, n)] = len(places)
            among = picker([places[name] for name in own])
            self._links.append(Link(site, among, picker([*where]), where, result))
        self._needs: dict[tuple[bool, ...], list[tuple[bool, ...]]] = {}
        self.is_view = self._links[-1].site.is_view

    def compute(self, tables: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        values: list[Any] = [*tables, *inputs]
        kept: list[Tensor] = []
        beside: list[tuple[Tensor, ...]] = []
        made: tuple[Any, ...] = ()
        for site, own, given, _, _ in self._links:
            made, tensors, others = site.compute(own(values), given(values))
            kept += tensors
            beside.append(others)
            values += made
        return made, kept, beside

    def differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Tensor | None, kept: Sequence[Tensor],
        tables: Any, is_unseen: bool,
    ) -> Sequence[Any]:  # fmt: skip
        asked = self._needs.get(needs)
        if asked is None:
            asked = self._needs[needs] = self._asked(needs)
        *_, last = self._links
        grads = {last.result: g, last.result + 1: sums}
        end = len(kept)
        for link, mine, own in zip(self._links[::-1], tables[::-1], asked[::-1], strict=True):
            site, _, _, places, result = link
            g, sums = grads.pop(result, None), grads.pop(result + 1, None)
            if g is None or not any(own):
                break
            start = end - site.nb_saved
            found = site.differentiate(own, g, sums, kept[start:end], mine, is_unseen)
            grads |= zip(places, found, strict=True)
            end = start
        return [grads.get(self._first + n) for n in range(self._nb_inputs)]

    def _asked(self, needs: tuple[bool, ...]) -> list[tuple[bool, ...]]:
        """Return what the inputs of each site need."""
        known = dict(enumerate(needs, self._first))
        asked: list[tuple[bool, ...]] = []
        for link in self._links:
            own = [known[place] for place in link.places]
            known |= dict.fromkeys((link.result, link.result + 1), any(own))
            asked.append(tuple(own))
        return asked


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
    if not (_is_small(call) and _is_small(run[-1]) and call.args[1] == run[-1].targets[0]):
        return False
    given = [x for one in (*run, call) for x in one.args[1:]]
    beside = {x for one in (*run, call) for x in one.args[0]}
    made = {name for one in run for name in one.targets}
    return len({*given} - beside) == len(given) and not after & made


def _is_small(call: Call) -> bool:
    site = getattr(call.function, "__self__", None)
    return isinstance(site, Site) and call.function == site.node and call.grad and site.is_small


def _chained(run: Sequence[Call]) -> Sequence[Call]:
    """Return the one call that does what these do."""
    if len(run) < 2:
        return run
    made = {name for call in run for name in call.targets}
    tables = [*dict.fromkeys(x for call in run for x in call.args[0] if x not in made)]
    inputs = [x for call in run for x in call.args[1:] if x not in made]
    chain, last = Chain(run, tables, inputs), run[-1]
    return [Call(last.targets, False, chain.node, (tuple(tables), *inputs), {}, True)]
