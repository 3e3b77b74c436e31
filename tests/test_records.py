"""Each pass is stated once: a record that lacks a part, or whose parts disagree, is found."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import Library

from cassetta.kernels import layout, ops, records, reference
from cassetta.kernels.examples import Sample, transform
from cassetta.kernels.types import Activation

pytest.importorskip("triton")

from cassetta.kernels import (
    conv_dgrad,
    conv_fprop,
    conv_wgrad,
    finalize,
    pointwise,
    pool,
    reductions,
    resize,
)

LAUNCHING = conv_dgrad, conv_fprop, conv_wgrad, finalize, pointwise, pool, reductions, resize


def table(*shape):
    return torch.rand(shape) + 0.5


SAMPLE = Sample(
    (2, 3, 4, 6), torch.randn, table, lambda c: transform(table(2, c), Activation("silu")),
    True, False, 5,
)  # fmt: skip


def kinds(result):
    several = result if isinstance(result, tuple) else (result,)
    return [(tuple(one.shape), one.dtype) for one in several]


def faults(record):
    """What a record lacks, or says other than its reference."""
    found = []
    if getattr(reference, record.name, None) is not record.reference:
        found.append("reference")
    signature = inspect.signature(record.reference)
    try:
        if inspect.signature(record.launched()) != signature:
            found.append("signature")
    except (ImportError, AttributeError):
        found.append("launcher")
    if not {record.judge, *record.changes} <= {"", *signature.parameters}:
        found.append("argument")
    if record.of == "products" and record.flops is None:
        found.append("flops")
    calls = [*record.examples(SAMPLE)]
    if not calls:
        found.append("examples")
    for arguments in calls:
        signature.bind(*arguments)
        if kinds(record.fake(*arguments)) != kinds(record.reference(*arguments)):
            found.append("fake")
    return sorted({*found})


def unstated():
    """Launchers of what the reference has, which no record names."""
    found = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in LAUNCHING
        for name, one in vars(module).items()
        if inspect.isfunction(one) and one.__module__ == module.__name__
        if not name.startswith("_") and hasattr(reference, name)
    }
    return found - {record.launcher for record in ops.PASSES.values()}


@pytest.mark.parametrize("name", ops.PASSES)
def test_every_record_is_whole(name):
    record = ops.PASSES[name]
    assert record.name == name
    assert faults(record) == []
    assert inspect.signature(getattr(ops, name)) == inspect.signature(record.reference)


def test_every_launcher_has_a_record(monkeypatch):
    assert unstated() == set()
    monkeypatch.setattr(reference, "combine", reference.moments, raising=False)
    assert unstated() == {"reductions.combine"}


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"reference": lambda x, p: reference.moments(x, p)}, "reference"),
        ({"launcher": "reductions.nothing"}, "launcher"),
        ({"launcher": "nowhere.moments"}, "launcher"),
        ({"launcher": "pointwise.materialize"}, "signature"),
        ({"fake": lambda x, p: layout.tables(x)}, "fake"),
        ({"examples": lambda s: []}, "examples"),
        ({"of": "products"}, "flops"),
        ({"judge": "y"}, "argument"),
        ({"changes": ("mean",)}, "argument"),
    ],
)
def test_a_record_without_a_part_is_found(part, fault):
    assert fault in faults(replace(ops.PASSES["moments"], **part))


def test_an_argument_of_no_known_type_is_refused():
    def odd(x: Tensor, words: list[str]) -> Tensor:
        return x

    with pytest.raises(KeyError, match="list"):
        _ = replace(ops.PASSES["moments"], reference=odd).schema


def test_operations_are_counted_of_shapes():
    (w, size), size_of_y = ((7, 3, 2, 2), (4, 6)), (3, 5)
    x, y = (2, 3, *size), torch.Size((2, 7, *size_of_y))
    pending = (None, None, "identity", 0.0, 0.0, None, None, None)
    walk = [1, 1], [0, 0, 0, 0], [1, 1]
    fprop = x, *pending, w, None, *walk, None, *pending, None, None, 0.0, 0.0
    products = 2 * 7 * 3 * 2 * 2 * 2 * 3 * 5
    passes = ops.PASSES
    assert passes["conv_fprop"].counted(*fprop, out_shape=(y, (0,), (0,))) == products
    assert passes["conv_wgrad"].counted(y, x, *pending, (2, 2), *walk, out_shape=w) == products
    assert passes["moments"].counted(x, *pending, out_shape=(x[:2], x[:2])) == 0


def test_a_pass_may_write_its_arguments():
    """Each has a letter of its own in the schema; they may be absent."""

    def count(x: Tensor, total: Tensor, size: Tensor | None = None) -> Tensor:
        total += x.sum()
        if size is not None:
            size += x.numel()
        return x.mean()

    record = records.PassRecord(
        count, "", lambda x, *_: x.new_empty(()), lambda s: [], changes=("total", "size")
    )
    assert record.schema == "(Tensor x, Tensor(a!) total, Tensor(b!)? size) -> Tensor"
    library = Library("planted", "FRAGMENT")
    library.define("count" + record.schema)
    library.impl("count", record.together(count), "CompositeExplicitAutograd")
    call = record.caller(torch.ops.planted.count.default)
    x, total, size = torch.ones(2, 3), torch.zeros(()), torch.zeros((), dtype=torch.int64)
    assert call(x, total=total).item() == 1
    assert call(x, total, size).item() == 1
    assert (total.item(), size.item()) == (12, 6)
