"""The node of autograd, and its work: that of a block at its place in a network, or of several.

A site knows which of the many tensors of a block (`block.compute`) there are. In a program it stays
while tensors come and go: so its node is given these alone, its replays are found without a key,
and a backward asks no more than what may have changed since the program ran.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional.block import Backward, Plan, compute, saved
from cassetta.functional.nodes import first_order
from cassetta.functional.norm import Running
from cassetta.kernels import layout
from cassetta.recording import recordings, tape
from cassetta.recording.programs import calling

_INPUTS, _SAVED = 8, 6
"""Of `block.compute`, what may need gradients; of what `block.saved` lists, what is no table."""

_GRADIENTS = 0, 2, 4, 5, 6, 7, 8, 9, 1, 3
"""Where, among what `block.Backward` returns, are the gradients of the inputs, and of sums."""

_LIMIT = 8
"""How many kinds of gradients a site knows how to go on from, the newest ones."""

SMALL = 2**20
"""Elements of an image up to which a site may be one node with others (`chains`)."""

_ROWS = 6
"""Of what `norm_finalize` returns."""

_KEPT = 3
"""Of running statistics, those that are tensors."""


class _Place(NamedTuple):
    """Where a table is: among others, or a row of one of them."""

    which: int
    row: int | None = None

    def unbind(self) -> list[_Place]:
        """Return the places of its rows."""
        return [_Place(self.which, row) for row in range(_ROWS)]

    def of(self, tables: Sequence[Tensor]) -> Tensor:
        """Return the table that is there."""
        return tables[self.which] if self.row is None else tables[self.which][self.row]


class Work(ABC):
    """The computation of a node of autograd; it holds no tensor."""

    is_view: bool  # whether y may be an input

    @abstractmethod
    def compute(self, tables: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Compute (y, its sums, *tables); return it, and the tensors and tables to be kept."""

    @abstractmethod
    def differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Tensor | None, kept: Sequence[Tensor],
        tables: Any, is_unseen: bool,
    ) -> Sequence[Any]:  # fmt: skip
        """Return the gradients of the inputs that need them, given what was kept."""

    def node(self, tables: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Any, ...]:
        """Return y, its sums and what else there is; y by a node of autograd.

        That is applied without what torch does for its transforms of functions: no kernel runs
        where one is active.
        """
        found: list[Any] = []
        y, out = _apply(self, found, tables, *inputs)
        return y, out, *found


class Node(Function):
    """The node of autograd: (work, found, tables, *inputs) to (y, its sums).

    What else is computed is added to `found`. No user sees a table, so that autograd need not watch
    over those that are kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, work: Work, found: list[Any], tables: tuple[Tensor, ...], *inputs: Tensor
    ) -> tuple[Any, Any]:
        (y, out, *others), kept, ctx.tables = work.compute(tables, inputs)
        ctx.save_for_backward(*kept)
        ctx.work = work
        ctx.set_materialize_grads(False)
        found.extend(others)
        return y.view_as(y) if work.is_view else y, out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None = None) -> tuple[Any, ...]:
        needs, is_unseen = ctx.needs_input_grad[3:], recordings.is_unseen(g)
        grads = ctx.work.differentiate(needs, g, sums, ctx.saved_tensors, ctx.tables, is_unseen)
        return None, None, None, *grads


_apply: Any = super(Function, Node).apply  # type: ignore[attr-defined]


class Site(Work):
    """The work of one block, and where its tensors are among those that are present.

    Its functions take tables as a tuple, since autograd has nothing to do with them: those of
    `block.beside`, and running statistics, or what they are rows of; and one by one the inputs of
    `block.compute`, and what stands for the sums of images.
    """

    def __init__(
        self, plan: Plan, numbers: tuple[float, ...], inputs: Sequence[Any], sums: Sequence[Any],
        places: tuple[_Place | None, ...], nb_tables: int, how: Any, told: Any,
    ) -> None:  # fmt: skip
        self._plan, self._numbers, self._tables = plan, numbers, places
        self._how, self._told = how, told
        self._is_shared = plan.group() is not None
        self._reads_sums = (sums[0] is not None, sums[1] is not None)
        self._forward: Callable[..., Any] | None = None
        self._backward: list[tuple[Any, Callable[..., bool], Callable[..., Any]]] = []
        self.is_view = plan.product is None
        self.is_small = max(x.numel() for x in inputs[:2] if x is not None) <= SMALL
        self._nb_inputs = len(_present(inputs))
        self._inputs = _places(inputs)
        # what is saved, of inputs, y and rounded weights, and of tables and what is found
        found, own = [_Place(nb_tables + n) for n in range(3)], [*self._inputs]
        own[2] = own[2] if plan.rounds is None else self._nb_inputs + 1
        (*parts,) = saved(plan, own, places[:-_KEPT], self._nb_inputs, found)
        self._saved, rows = _places(parts[:_SAVED]), parts[_SAVED:]
        whole = [*dict.fromkeys(place.which for place in _present(rows))]
        self._saved_tables = tuple([
            None if place is None else _Place(whole.index(place.which), place.row)
            for place in rows
        ])  # fmt: skip
        self._keep, self._keep_tables = picker(_present(parts[:_SAVED])), picker(whole)
        self.nb_saved = len(_present(parts[:_SAVED]))
        self._is_odd = any(x is not None and x.shape[1] % layout.WORD for x in inputs[:2])
        # of each input, the place of its gradient among None and what `Backward` returns
        given = zip(_GRADIENTS, (*inputs, *sums), strict=True)
        grads = [place + 1 for place, x in given if x is not None]
        self._needs = [grads.index(n + 1) if n + 1 in grads else None for n in range(10)]
        self._gradients = picker(grads)

    def compute(self, tables: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        inputs = inputs[: self._nb_inputs]
        y, out, *found, w = self.run(tables, inputs)
        return (y, out, *found), self._keep((*inputs, y, w)), self._keep_tables((*tables, *found))

    def run(self, tables: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Return what `block.compute` does."""
        again = self._forward
        if again is not None:
            try:
                return recordings.replayed(again, (*inputs, *tables))
            except tape.Changed:
                self._forward = None
        everything = *[None if n is None else inputs[n] for n in self._inputs], *tables
        if self._is_shared:
            return self._compute(*everything)
        key = "forward", self._plan, self._numbers, self._how, self._tables
        return recordings.run(key, self._compute, everything, self._replay)

    def _compute(self, *tensors: Any) -> tuple[Any, ...]:
        inputs, tables = tensors[:_INPUTS], tensors[_INPUTS:]
        *beside, mean, var, batches = _rows(self._tables, tables)
        running = None if self._how is None else Running(mean, var, batches, *self._how)
        return compute(self._plan, self._numbers, inputs, beside, running)

    def _replay(self, again: Callable[..., Any]) -> None:
        self._forward = again

    def differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Tensor | None, kept: Sequence[Tensor],
        tables: Any, is_unseen: bool,
    ) -> Sequence[Any]:  # fmt: skip
        sums = sums if self._told[0] else None
        grads = self._differentiate(needs, g, sums, (*kept, *tables), is_unseen)
        return self._gradients((None, *grads))

    def _differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Tensor | None, kept: Sequence[Tensor],
        is_unseen: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return what `block.Backward` does."""
        keep = None
        if is_unseen:
            # users may have given saved tensors other data, and hooks may return other tensors
            own, words = (g, *kept[: self.nb_saved]), None
            if self._is_odd or g.shape[1] % layout.WORD:
                odd = [x for x in own if x.ndim > 2 and x.shape[1] % layout.WORD]
                words = [*map(layout.is_in_words, odd)]
            key = needs, sums is None, words, g.data_ptr() % 16, recordings.settings(g)
            for entry in self._backward:
                known, are_alike, again = entry
                if known != key or not are_alike(*own):
                    continue
                try:
                    return recordings.replayed(
                        again, (g, *kept) if sums is None else (g, sums, *kept)
                    )
                except tape.Changed:
                    self._backward[:] = [one for one in self._backward if one is not entry]
                    break
            keep = lambda again: self._remember(key, own, again)  # noqa: E731
        wanted = tuple([n is not None and needs[n] for n in self._needs])
        back = Backward(self._plan, self._numbers, wanted, self._reads_sums)
        tables = kept[self.nb_saved :]
        everything = g, sums, *[None if n is None else kept[n] for n in self._saved], *tables

        def compute(*tensors: Any) -> tuple[Any, ...]:
            own, tables = tensors[: _SAVED + 2], tensors[_SAVED + 2 :]
            return back.compute(*own, *_rows(self._saved_tables, tables))

        if self._is_shared:
            return compute(*everything)
        return recordings.run(("backward", back, self._saved_tables), compute, everything, keep)

    def _remember(self, key: Any, own: Sequence[Tensor], again: Callable[..., Any]) -> None:
        self._backward[:] = [(key, recordings.alike(own), again), *self._backward[: _LIMIT - 1]]


def run(
    plan: Plan, numbers: tuple[float, ...], told: list[Any] | None, inputs: Sequence[Any],
    sums: Sequence[Any], tensors: Sequence[Any], running: Running | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return what a block computes: by one call of the program that is traced, if any.

    Parameters
    ----------
    told : list, optional
        Whether readers return sums, once that is known; None where no gradient is asked for.
    inputs, sums, tensors
        See `block.compute` and `block.beside`; of images, what stands for sums.
    """
    kept, how = ((None,) * _KEPT, None) if running is None else (running[:_KEPT], running[_KEPT:])
    tables, places = _listed([*tensors, *kept])
    site = Site(plan, numbers, inputs, sums, places, len(tables), how, told)
    if told is not None:
        return calling(site.node)(tables, *_present([*inputs, *sums]))
    with torch.no_grad():
        y, out, *found, _ = calling(site.run)(tables, tuple(_present(inputs)))
        return y, out, *found


def _listed(tables: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[_Place | None, ...]]:
    """List tables once each, or what they are rows of; and where each is then."""
    found: dict[int, int] = {}
    several: list[Any] = []
    places: list[_Place | None] = []
    for table in tables:
        place = None
        if table is not None:
            whole, row = _whole(table)
            if id(whole) not in found:
                found[id(whole)] = len(several)
                several.append(whole)
            place = _Place(found[id(whole)], row)
        places.append(place)
    return tuple(several), tuple(places)


def _whole(table: Tensor) -> tuple[Tensor, int | None]:
    """Return what a norm's table is a row of, and which; or any other itself."""
    whole: Any = table._base
    if whole is None or whole.shape != (_ROWS, *table.shape) or not table.numel():
        return table, None
    row, rest = divmod(table.storage_offset() - whole.storage_offset(), table.numel())
    is_row = table.is_contiguous() and whole.is_contiguous() and not rest
    return (whole, row) if is_row else (table, None)


def _rows(places: Sequence[_Place | None], tables: Sequence[Tensor]) -> list[Any]:
    return [None if place is None else place.of(tables) for place in places]


def _present(parts: Sequence[Any]) -> list[Any]:
    return [x for x in parts if x is not None]


def _places(parts: Sequence[Any]) -> list[int | None]:
    """Return where each part is among those that are not None."""
    places: list[int | None] = []
    count = 0
    for x in parts:
        places.append(None if x is None else count)
        count += x is not None
    return places


def picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks these from a sequence, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda parts: tuple([parts[n] for n in places])
