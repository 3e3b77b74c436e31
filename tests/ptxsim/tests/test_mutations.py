"""Triton's own code, from which something is taken away: the simulator must see it."""

import re

import pytest
import torch
import triton
from hazards import product_kernel

import ptxsim
from ptxsim import driver
from ptxsim.tests.test_triton import _product_kernel

pytestmark = pytest.mark.simulated


def product(monkeypatch, change, dtype=torch.bfloat16, stages=3, warps=4):
    """The largest error, of the largest value, of a product whose PTX was changed."""
    monkeypatch.setattr(driver, "_ptx", lambda metadata: change(original(metadata)))
    torch.manual_seed(0)
    a, b = torch.randn(128, 160).to(dtype), torch.randn(160, 64).to(dtype)
    c = torch.full((128, 64), float("nan"), dtype=dtype)
    kernel = triton.JITFunction(_product_kernel.fn)
    kernel[(2, 1)](
        a, b, c, 128, 64, 160, *a.stride(), *b.stride(), 64, 64, 32, stages, num_warps=warps
    )
    truth = a.double() @ b.double()
    return ((c.double() - truth).abs().max() / truth.abs().max()).item()


original = driver._ptx


def without(pattern, which=None):
    """Take away all that match, or one of them."""

    def change(text):
        found = list(re.finditer(pattern, text))
        assert found
        for one in found if which is None else [found[which % len(found)]]:
            assert one[0].endswith(";")
        if which is None:
            return re.sub(pattern, "", text)
        one = found[which % len(found)]
        return text[: one.start()] + text[one.end() :]

    return change


@pytest.mark.parametrize("warps", [4, 8])
def test_unchanged(warps, monkeypatch):
    assert product(monkeypatch, lambda text: text, warps=warps) < 1e-2


def test_without_barriers(monkeypatch):
    with pytest.raises(ptxsim.RaceError):
        product(monkeypatch, without(r"bar\.sync\s+0;"))


def test_without_waiting_for_copies(monkeypatch):
    error = product(monkeypatch, without(r"cp\.async\.wait_group\s+\d;"))
    assert error != error


def test_waiting_for_too_few_copies(arch, monkeypatch):
    later = lambda text: re.sub(r"(cp\.async\.wait_group\s+)2;", r"\g<1>4;", text)  # noqa: E731
    try:
        error = product(monkeypatch, later)
        assert error != error
    except ptxsim.RaceError:  # a copy arrives where a product of a warp group is reading
        assert arch == 90


def test_without_the_fence_before_products_of_warp_groups(hopper, monkeypatch):
    with pytest.raises(ptxsim.SimulationError, match=r"no fence\.proxy\.async"):
        product(monkeypatch, without(r"fence\.proxy\.async[.:\w]*;"), stages=1)


def test_without_waiting_for_products_of_warp_groups(hopper, monkeypatch):
    with pytest.raises(ptxsim.RaceError, match="not waited for"):
        product(monkeypatch, without(r"wgmma\.wait_group\.sync\.aligned\s+\d;"))


def test_a_wrong_mask(monkeypatch):
    with pytest.raises(ptxsim.MemoryFault):
        product(monkeypatch, lambda text: re.sub(r"@%p\d+ (st\.global)", r"\1", text).replace(
            "mov.u32 \t%r1, %ctaid.x", "mov.u32 \t%r1, 7").replace("%ctaid.x", "7"))  # fmt: skip


@pytest.mark.parametrize(
    ("what", "why"), [(None, None), ("SUM", "may still read what"), ("HALVE", "read the registers")]
)
def test_what_triton_3_6_gets_wrong(what, why, hopper, monkeypatch):
    """An operand of wgmma that is also summed has a buffer too few: it is overwritten in flight; so
    are the registers of one that is changed."""
    monkeypatch.setattr(ptxsim.Options, "factors", True)
    a, b = torch.randn(64, 160).bfloat16(), torch.randn(160, 64).bfloat16()
    c, s = torch.empty(64, 64), torch.empty(64)
    kernel = triton.JITFunction(product_kernel.fn)
    fixed = {"SUM": what == "SUM", "HALVE": what == "HALVE", "STAGES": 3}
    if what is None:
        kernel[(1,)](a, b, c, s, 160, **fixed)
        torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ptxsim.RaceError, match=why):
            kernel[(1,)](a, b, c, s, 160, **fixed)
