"""Seconds of a budget: what can still be begun, and where they went."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all engines"
"""The row of seconds that belong to no single engine."""


class OutOfTime(Exception):
    """What comes next would not end within the budget."""


class Budget:
    """A budget of seconds, counted from now, and a record of what they are spent on.

    Parameters
    ----------
    seconds : float, optional
        The budget; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.start = time.monotonic()
        self.seconds = math.inf if seconds is None else seconds
        self.spent: dict[tuple[str, str], float] = {}  # by for whom, and on what
        self.longest: dict[str, float] = {}  # of each kind of part

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.start + self.seconds - time.monotonic()

    def allows(self, kind: str) -> bool:
        """Tell whether a part of this kind would end in time.

        It is assumed to take as long as the longest of its kind so far; for a kind that has not
        been seen, as the longest of all.
        """
        longest = max(self.longest.values(), default=0.0)
        return self.left > self.longest.get(kind, longest)

    @contextlib.contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Run a part of this kind in a `with` block, and remember how long it takes.

        Raises
        ------
        OutOfTime
            Before the block begins, if it would not end in time.
        """
        if not self.allows(kind):
            raise OutOfTime
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))

    @contextlib.contextmanager
    def spending(self, what: str, whom: str = ALL) -> Iterator[None]:
        """Count the seconds of a `with` block, including the GPU work that it starts."""
        start = time.monotonic()
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        finally:
            self.add(what, whom, time.monotonic() - start)

    def add(self, what: str, whom: str, seconds: float) -> None:
        """Count seconds that were measured."""
        self.spent[whom, what] = self.spent.get((whom, what), 0.0) + seconds

    def share(self, what: str, seconds: float, ms: Iterable[tuple[str, float]]) -> None:
        """Count seconds in which several took turns: each row's part is in proportion to its ms."""
        parts = list(ms)
        whole = sum(one for _, one in parts)
        for whom, one in parts:
            self.add(what, whom, seconds * one / whole if whole else seconds / len(parts))

    def table(self) -> "Table":
        """Tabulate where the seconds went: a row per engine, a column per activity."""
        from rich.table import Table  # which takes long, and few need

        whole = time.monotonic() - self.start
        title = f"where {whole:.0f} s went" + (
            "" if math.isinf(self.seconds) else f", of {round(self.seconds, 1):g} s"
        )
        table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
        whats = list(dict.fromkeys(what for _, what in self.spent))
        for name in ("", *whats, "in all"):
            table.add_column(name, justify="right" if name else "left")
        for whom in dict.fromkeys(whom for whom, _ in self.spent):
            row = [self.spent.get((whom, what), 0.0) for what in whats]
            table.add_row(whom, *map(_seconds, row), _seconds(sum(row)))
        columns = [sum(s for (_, one), s in self.spent.items() if one == what) for what in whats]
        table.add_row("elsewhere", *[""] * len(whats), _seconds(whole - sum(columns)))
        table.add_row("in all", *map(_seconds, columns), _seconds(whole))
        return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds else ""
