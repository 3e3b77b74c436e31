"""A node of autograd at its place in a network, and what it replays there.

A site knows which of the many tensors of a node (`block.compute`) there are. In a program it stays
while tensors come and go: so its node is given these alone, its replays are found without a key,
and a backward asks no more than what may have changed since the program ran.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cassetta.functional import recordings
from cassetta.functional.block import Backward, Plan, compute, saved
from cassetta.functional.nodes import first_order
from cassetta.functional.norm import Running
from cassetta.functional.programs import called
from cassetta.kernels import layout, tape

_INPUTS, _SAVED = 8, 6
"""Of `block.compute`, what may need gradients; of what `block.saved` lists, what is no table."""

_GRADIENTS = 0, 2, 4, 5, 6, 7, 8, 9, 1, 3
"""Where, among what `block.Backward` returns, are the gradients of the inputs, and of sums."""

_LEARNED = 2, 4, 5
"""Parameters, among what is saved."""

_LIMIT = 8
"""How many kinds of gradients a site knows how to go on from, the newest ones."""

SMALL = 2**20
"""Elements of an image up to which a site may be one node with others (`chains`)."""

_ROWS = 6
"""Of what `norm_finalize` returns."""


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


class Site:
    """What a node does, and where its tensors are among those that there are; it holds none.

    Its functions take tables as a tuple, since autograd has nothing to do with them: those of
    `block.beside`, and running statistics, or what they are rows of; and one by one the inputs of
    `block.compute`, and what stands for the sums of images.
    """

    def __init__(
        self, plan: Plan, numbers: tuple[float, ...], inputs: Sequence[Any], sums: Sequence[Any],
        tensors: Sequence[Any], running: Running | None,
    ) -> None:  # fmt: skip
        self._plan, self._numbers = plan, numbers
        self._how = None if running is None else running[3:]
        self._is_shared = plan.norm is not None and plan.norm[0].process_group is not None
        self._reads_sums = (sums[0] is not None, sums[1] is not None)
        self._forward: Callable[..., Any] | None = None
        self._backward: list[tuple[Any, Callable[..., bool], Callable[..., Any]]] = []
        self.is_view = plan.product is None
        self.is_small = max(x.numel() for x in inputs[:2] if x is not None) <= SMALL
        self.nb_inputs = len(_present(inputs))
        self._inputs = _places(inputs)
        tables, self._tables = _listed([*tensors, *_kept(running)])
        # what is saved, of inputs, y and rounded weights, and of tables and what is found
        found = [_Place(len(tables) + n) for n in range(3)]
        beside, own = self._tables[: len(tensors)], [*self._inputs]
        own[2] = own[2] if plan.rounds is None else self.nb_inputs + 1
        (*parts,) = saved(plan, own, beside, self.nb_inputs, found)
        self._saved, rows = _places(parts[:_SAVED]), parts[_SAVED:]
        whole = [*dict.fromkeys(place.which for place in _present(rows))]
        self._saved_tables = tuple([
            None if place is None else _Place(whole.index(place.which), place.row)
            for place in rows
        ])  # fmt: skip
        self.saved, self.saved_tables = picker(_present(parts[:_SAVED])), picker(whole)
        self.nb_saved = len(_present(parts[:_SAVED]))
        self._learned = _present([self._saved[n] for n in _LEARNED])
        # of each input, the place of its gradient among None and what `Backward` returns
        places = zip(_GRADIENTS, (*inputs, *sums), strict=True)
        grads = [place + 1 for place, x in places if x is not None]
        self._needs = [grads.index(n + 1) + 3 if n + 1 in grads else None for n in range(10)]
        self.gradients = picker([0, 0, 0, *grads])

    def __call__(
        self, told: list[Any] | None, inputs: Sequence[Any], sums: Sequence[Any],
        tensors: Sequence[Any], running: Running | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return what `node` does: one call of the program that is traced, if any.

        Parameters
        ----------
        told : list, optional
            Whether readers return sums, once that is known; None where no gradient is asked for.
        """
        tables = tuple(_listed([*tensors, *_kept(running)])[0])
        if told is not None:
            return called(self.node, told, tables, *_present([*inputs, *sums]))
        with torch.no_grad():
            y, out, *found, _ = called(self.compute, tables, *_present(inputs))
            return y, out, *found

    def node(self, told: list[Any], tables: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Any, ...]:
        """Return what `compute` does, but for rounded weights; y by a node of autograd.

        That is applied without what torch does for its transforms of functions: no kernel runs
        where one is active.
        """
        found: list[Any] = []
        y, out = _apply(self, (told, found), tables, *inputs)
        return y, out, *found

    def compute(self, tables: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Any, ...]:
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
        return recordings.run(key, self._compute, everything, self._keep)

    def _compute(self, *tensors: Any) -> tuple[Any, ...]:
        inputs, tables = tensors[:_INPUTS], tensors[_INPUTS:]
        *beside, mean, var, batches = _rows(self._tables, tables)
        running = None if self._how is None else Running(mean, var, batches, *self._how)
        return compute(self._plan, self._numbers, inputs, beside, running)

    def _keep(self, again: Callable[..., Any]) -> None:
        self._forward = again

    def differentiate(
        self, needs: tuple[bool, ...], g: Any, sums: Tensor | None, kept: Sequence[Tensor],
        is_unseen: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return what `block.Backward` does, given what was saved, and which inputs need it."""
        keep = None
        if is_unseen:
            own = g, *[kept[n] for n in self._learned]  # a user may have given one other data
            words = g.shape[1] % layout.WORD == 0 or layout.is_in_words(g)
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


class Block(Function):
    """The node of autograd: (site, (told, found), tables, *inputs) to (y, its sums).

    What else the site computes is added to `found`. No user sees a table, so that autograd need not
    watch over those that are kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, site: Site, told: tuple[list[Any], list[Any]], tables: tuple[Tensor, ...],
        *inputs: Tensor,
    ) -> tuple[Any, Any]:  # fmt: skip
        inputs = inputs[: site.nb_inputs]
        y, out, *found, w = site.compute(tables, *inputs)
        ctx.save_for_backward(*site.saved((*inputs, y, w)))
        ctx.site, ctx.tables, ctx.told = site, site.saved_tables((*tables, *found)), told[0]
        ctx.set_materialize_grads(False)
        told[1].extend(found)
        return y.view_as(y) if site.is_view else y, out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, sums: Tensor | None = None) -> tuple[Any, ...]:
        site: Site = ctx.site
        kept = *ctx.saved_tensors, *ctx.tables
        sums = sums if ctx.told[0] else None
        is_unseen = recordings.is_unseen(g)
        found = site.differentiate(ctx.needs_input_grad, g, sums, kept, is_unseen)
        return site.gradients((None, *found))


_apply: Any = super(Function, Block).apply  # type: ignore[attr-defined]


def _kept(running: Running | None) -> Sequence[Tensor | None]:
    """List running statistics."""
    return (None,) * 3 if running is None else running[:3]


def _listed(tables: Sequence[Any]) -> tuple[list[Any], tuple[_Place | None, ...]]:
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
    return several, tuple(places)


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
