"""Loops whose products run while the next operands are copied: where a buffer is missing."""

import os
import re
import sys
from pathlib import Path

import pytest
from test_aot import convolved, run

from cassetta.kernels import buffers

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
KERNEL = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cassetta.kernels import aot
from hazards import product_kernel

types = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "s": "*fp32", "K": "i32"}
types |= {"SUM": "constexpr", "HALVE": "constexpr", "STAGES": "constexpr"}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
for arch in 80, 90, 100:
    for stages in (3, 4) if arch == 90 else (3,):
        for fixed in (False, False), (True, False), (False, True):
            constants = dict(zip([(5,), (6,), (7,)], (*fixed, stages)))
            source = ASTSource(product_kernel, types, constants, aligned)
            built = compile(source, target=GPUTarget("cuda", arch, 32))
            report = aot.report_of("", "", arch, built)
            print(arch, stages, *fixed, report.excess or "", sep="|")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_what_is_unsafe_on_sm_90_is_reported():
    """An operand that is also summed gets the buffers of a load that no product reads; one that is
    changed is in registers. `compile-check` says so."""
    triton = pytest.importorskip("triton")
    rows = [line.split("|") for line in run(KERNEL, PYTHONPATH=PATH).splitlines()]
    assert len(rows) == 12
    for arch, stages, is_summed, is_halved, found in rows:
        few = f"has {int(stages) - 1} buffers, and its asynchronous product needs {stages}"
        changed = "is in registers, which may change while they are read"
        unsafe = {few} if is_summed == "True" else {changed} if is_halved == "True" else set()
        if arch != "90":
            unsafe = set()
        said = {re.sub(r"^operand \S+ ", "", one) for one in found.split("; ") if one}
        if [*map(int, triton.__version__.split(".")[:2])] > [3, 9]:  # it may be mended
            unsafe &= said
        assert said == unsafe, (arch, stages)


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
@pytest.mark.parametrize("arch", [90, 100])
def test_operands_of_our_convolutions_are_found(arch):
    """Both of each product, in rings of as many buffers as it needs: as there are stages."""
    pytest.importorskip("triton")
    out = run(f"""
from cassetta.kernels import buffers
{convolved(arch, 64)}
    walk = buffers.walked(built.asm["ttgir"])
    print(*((walk.needed[one], walk.buffers[one]) for one in walk.operands))
""")
    two, three = "(3, 3) (3, 3)", "(3, 3) (3, 3) (3, 3)"  # which are x and two of g
    assert out.splitlines() == [two, two, three]


def loop(ahead, pendings, buffers, copies_first=False, slices=1):
    """A loop whose operand is copied so many steps ahead of its product, which runs on so long."""
    kind = "!ttg.memdesc<32x64xbf16, #s, #smem, mutable>"
    ring = f"!ttg.memdesc<{buffers}x32x64xbf16, #s, #smem, mutable>"

    def copy(n):
        return [
            f"%to_{n} = ttg.memdesc_index %y[%at_{n}] : {ring} -> {kind}",
            f"%t_{n} = ttg.async_copy_global_to_local %p_{n}, %to_{n} mask %m : tensor -> <>",
        ]

    wide = kind.replace("mutable", "32x64")
    product = [f"%from = ttg.memdesc_index %y[%i] : {ring} -> {kind}"]
    for n in range(slices):
        product += [
            f"%f_{n} = ttg.memdesc_subslice %from[{n}, 0] : {kind} -> {wide}",
            f"%d_{n} = ttng.warp_group_dot %x, %f_{n}, %c {{isAsync = true}} : {kind} * {wide}",
        ]
    product.append(f"%w:2 = ttng.warp_group_dot_wait %d_0, %from {{pendings = {pendings} : i32}}")
    inner = [*copy(99), *product] if copies_first else [*product, *copy(99)]
    lines = [
        f"%y = ttg.local_alloc : () -> {ring}",
        *(line for n in range(ahead) for line in copy(n)),
        "%r:2 = scf.for %v = %zero to %K step %one iter_args(%c = %cst, %i = %zero)"
        " -> (tensor, i32)  : i32 {",
        *inner,
        "scf.yield %w#0, %i : tensor, i32",
        "} {tt.num_stages = 3 : i32}",
        "%e = ttng.warp_group_dot_wait %r#0 {pendings = 0 : i32} : tensor",
    ]
    return "\n".join(f"    {line} loc(#loc{n})" for n, line in enumerate(lines))


@pytest.mark.parametrize("copies_first", [False, True])
@pytest.mark.parametrize(("ahead", "pendings"), [(1, 0), (1, 1), (2, 1), (3, 1), (2, 2)])
def test_the_rule(ahead, pendings, copies_first):
    """As many as are copied ahead and multiplied; one more if the copy comes before the wait."""
    needed = ahead + pendings + copies_first
    assert buffers.shortages(loop(ahead, pendings, needed, copies_first)) == []
    (found,) = buffers.shortages(loop(ahead, pendings, needed - 1, copies_first))
    assert found == ("%y", needed - 1, needed)
    few = f"operand %y has {needed - 1} buffer{'s' * (needed != 2)}"
    assert str(found) == f"{few}, and its asynchronous product needs {needed}"


def test_a_buffer_that_several_products_read_is_one():
    """As where an operand is multiplied in slices: it is free when the last of them is done."""
    assert buffers.shortages(loop(2, 0, 2, slices=4)) == []
    for pendings in 1, 4:
        (found,) = buffers.shortages(loop(2, pendings, 2, slices=4))
        assert found.needed == 3


def test_operands_in_registers_are_reported():
    """Of products that are asynchronous: what comes next may set them anew."""
    text = loop(2, 1, 3).replace(": !ttg.memdesc<32x64xbf16, #s, #smem, mutable> *", ": tensor<> *")
    (found,) = buffers.shortages(text)
    assert found == ("%x", None, 1)
    few = "operand %x is in registers, which may change while they are read"
    assert str(found) == few
    assert buffers.shortages(text.replace("isAsync = true", "inputPrecision = 0 : i32")) == []


def in_registers(ahead, pendings, waited="%x"):
    """A loop whose first operand is in registers, of which its wait is given one value more."""
    text = loop(ahead, pendings, ahead + pendings).replace(
        "_dot_wait %d_0,", f"_dot_wait {waited},"
    )
    return text.replace(": !ttg.memdesc<32x64xbf16, #s, #smem, mutable> *", ": tensor<> *")


def test_operands_in_registers_may_be_awaited():
    """In the same turn of the loop, by a wait that is given them; then nothing sets them before."""
    assert buffers.shortages(in_registers(2, 0)) == []
    for text in in_registers(2, 0, "%other"), in_registers(2, 1):
        (found,) = buffers.shortages(text)
        assert found == ("%x", None, 1)


def test_what_no_loop_writes_may_be_read_in_each_turn():
    """As weights that stay: written once, before; but not what a loop writes once more."""
    kept = loop(1, 0, 1).splitlines()
    copy = [line for line in kept if "async_copy" in line or "%to_" in line]
    before, inside = copy[: len(copy) // 2], copy[len(copy) // 2 :]
    text = "\n".join(line for line in kept if line not in inside)
    assert all(line in text for line in before)
    assert buffers.shortages(text) == []
    assert buffers.walked(text).operands == {"%y"}
    (found,) = buffers.shortages(loop(2, 0, 1))
    assert found == ("%y", 1, 2)


def test_what_runs_at_once_needs_no_further_buffer():
    text = loop(2, 1, 2).replace("isAsync = true", "inputPrecision = 0 : i32")
    assert buffers.shortages(text) == []
    assert buffers.shortages(re.sub(r".*warp_group_dot.*", "", loop(2, 1, 2))) == []


def test_names_hold_within_their_loop():
    """MLIR gives them again: what addresses a buffer here may be numbers in another loop."""
    other = loop(2, 0, 2).replace("%y", "%z").replace("%from", "%g").replace("dot %x", "dot %from")
    other = other.replace("%g = ", "%from, %rest = tt.split %q : tensor -> tensor\n    %g = ")
    assert "dot %from, %f_0" in other
    assert buffers.shortages(loop(2, 1, 3) + "\n" + other) == []
    (found,) = buffers.shortages(loop(2, 1, 3) + "\n" + other.replace("<2x", "<1x"))
    assert found == ("%z", 1, 2)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="is read more often than it is written"):
        buffers.shortages(re.sub(r".*async_copy.*", "", loop(2, 1, 3)))
    with pytest.raises(ValueError, match="does not end"):
        buffers.shortages(loop(2, 1, 3).replace("} {", ""))
