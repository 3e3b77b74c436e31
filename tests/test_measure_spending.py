"""Budgets: what is begun, and what the seconds were spent on."""

import io
import time

import pytest
from rich.console import Console

from cassetta.measure.spending import Budget, OutOfTime


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands until it is moved."""

    class Clock:
        now = 100.0

        def passes(self, seconds):
            self.now += seconds

    fake = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: fake.now)
    return fake


def test_a_part_is_begun_if_the_longest_of_its_kind_would_end_in_time(clock):
    budget = Budget(100)
    for kind, seconds in (("long", 40), ("short", 3), ("short", 5), ("short", 4)):
        with budget.part(kind):
            clock.passes(seconds)
    assert budget.left == 48
    clock.passes(10)
    assert budget.allows("short")
    assert not budget.allows("long")
    assert not budget.allows("new")  # as long as the longest, for all one knows
    with pytest.raises(OutOfTime), budget.part("long"):
        raise AssertionError("it is not begun")
    clock.passes(33)
    assert not budget.allows("short")


def test_what_fails_has_taken_its_time_too(clock):
    budget = Budget(100)

    def fail():
        with budget.part("one"), budget.spending("trying"):
            clock.passes(60)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not budget.allows("one")
    assert budget.spent == {("all engines", "trying"): 60}


def test_without_an_end_everything_is_begun(clock):
    budget = Budget()
    with budget.part("one"):
        clock.passes(1e9)
    assert budget.allows("one")


def test_the_table_accounts_for_every_second(clock):
    budget = Budget(59.996)  # what is left of 60
    with budget.spending("check", "gemm"):
        clock.passes(2)
    with budget.spending("check"):
        clock.passes(1)
    budget.add("timing", "gemm", 4)
    clock.passes(13)
    text = io.StringIO()
    Console(file=text, width=100).print(budget.table())
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines() if line.strip()]
    assert lines == [
        "where 16 s went, of 60 s",
        "check timing in all",
        "gemm 2.0 4.0 6.0",
        "all engines 1.0 1.0",
        "elsewhere 9.0",
        "in all 3.0 4.0 16.0",
    ]
