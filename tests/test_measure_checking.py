"""`cassetta check`: kernels that are right pass, and one that is wrong or fails is named."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import large_tiles

from cassetta.backbones import MeshNet
from cassetta.cli import main
from cassetta.kernels import activations, boxes, configs, dispatch, plans, precision, reference
from cassetta.kernels.geometry import walk
from cassetta.kernels.types import Geometry
from cassetta.layers import ConvBlock
from cassetta.measure import agreement, checking

UNIT = Geometry((1,), ((0, 0),), (1,))


@pytest.fixture
def few(monkeypatch, kernels):
    """Two activations, one dtype, some passes and plans, a convolution, a block, a network."""
    monkeypatch.setattr(activations, "NAMES", ("relu", "prelu"))
    monkeypatch.setattr(configs, "dtypes", lambda: (torch.float32,))
    monkeypatch.setattr(agreement, "PLANNED", ("moments", "materialize"))
    monkeypatch.setattr(agreement, "PASSES", ("moments", "materialize", "concatenate"))
    monkeypatch.setattr(plans, "PLANS", plans.PLANS[:2])
    monkeypatch.setattr(plans, "_GEMM_PLANS_32", plans._GEMM_PLANS_32[::3])
    monkeypatch.setattr(plans, "_WGRAD_PLANS_32", plans._WGRAD_PLANS_32[1:2])
    monkeypatch.setattr(checking, "SHAPES", ((2, 21, 7, 6), (1, 5, 300)))
    _, *how = checking.CONVOLUTIONS["even"]
    some = {"even": ((1, 8, 9, 7), *how)}
    monkeypatch.setattr(checking, "CONVOLUTIONS", some)
    options = {"activation": "SiLU", "dropout": 0.2}
    nets = {
        "_blocks": ("block, instance norm", ConvBlock(2, 6, 6, norm="instance", **options)),
        "_networks": ("MeshNet", MeshNet(2, 6, nb_layers=2, **options)),
    }
    for part, (name, net) in nets.items():
        assert name in getattr(checking, part)()
        one = {name: (net, (2, 6, 17, 16))}  # in 2-D, which takes the interpreter less long
        monkeypatch.setattr(checking, part, lambda one=one: one)
    with large_tiles():
        yield kernels


def spoil(monkeypatch, name, run):
    right = dispatch._triton_passes()
    wrong = SimpleNamespace(**{**vars(right), name: lambda *args: run(getattr(right, name)(*args))})
    monkeypatch.setattr(dispatch, "_triton_passes", lambda: wrong)


def wrong(device, *names):
    """What is at fault, and how, of the comparisons of these names, or of all."""
    planned = [one for one in checking.comparisons(device) if not names or one.what in names]
    assert {one.what for one in planned} >= {*names}
    return {one.what: why for one in planned if (why := one.run())}


def test_what_is_right_passes(few):
    assert wrong(few) == {}


def test_every_plan_that_a_launch_may_take(monkeypatch, few):
    """Of each pass, in each precision; what is most decisive comes first."""
    planned = checking.comparisons(few)
    parts = [one.part for one in planned]
    assert [*dict.fromkeys(parts)] == [*checking.PARTS]
    assert parts == sorted(parts, key=checking.PARTS.index)
    pairs = {(one.what, one.plan) for one in planned if one.plan}
    expected = {*itertools.product(agreement.PLANNED, map(str, plans.PLANS))}
    _, sizes = checking.CONVOLUTIONS.popitem()
    for pass_, names in agreement.PRODUCTS.items():
        product = plans.Product(pass_, *sizes, torch.float32)
        gathering = [str(plan) for plan in product.plans if not plan.boxes]
        expected |= {*itertools.product(names, gathering)}
    assert pairs == expected


@pytest.mark.parametrize("kind", ["wide", "dilated", "strided", "one tap"])
def test_every_kernel_of_a_convolution_by_every_plan(monkeypatch, kind):
    """Those that scatter, transform what they load or read two images are kernels of their own."""
    monkeypatch.setattr(boxes, "are_copied", lambda device: True)
    sizes = checking.CONVOLUTIONS[kind]
    device = torch.device("cpu")
    planned = checking.comparisons(device)
    for dtype in configs.dtypes():
        expected = set()
        for pass_, names in agreement.PRODUCTS.items():
            product = plans.Product(pass_, *sizes, dtype)
            more = ("conv_transposed",) if (pass_, kind) == ("conv_dgrad", "strided") else ()
            tried = map(str, plans.candidates(product, device))
            expected |= {*itertools.product((*names, *more), tried)}
        own = plans.Product("", *sizes, dtype).key
        found = {
            (one.what, one.plan)
            for one in planned
            if one.case.startswith(f"{kind}: ") and one.case.endswith(own)
        }
        assert found == expected, dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_boxes_are_compared_where_the_device_copies_them(monkeypatch, dtype):
    monkeypatch.setattr(configs, "dtypes", lambda: (dtype,))
    for copied in False, True:
        monkeypatch.setattr(boxes, "are_copied", lambda device, copied=copied: copied)
        planned = checking.comparisons(torch.device("cpu"))
        boxed = {(one.what, one.plan) for one in planned if "boxes" in one.plan}
        assert any(one.case.startswith("wide") for one in planned)
        expected = set()
        for pass_, names in agreement.PRODUCTS.items() if copied else ():
            product = plans.Product(pass_, *checking.CONVOLUTIONS["wide"], dtype)
            found = [str(plan) for plan in product.plans if plan.boxes]
            expected |= {*itertools.product(names, found)}
        assert boxed - {one for one in boxed if one[0] == "conv_transposed"} == expected


def test_wide_products_have_many_warps():
    """As many as any launch has: those were wrong in other compilers' loops on H100."""
    samples, c, *size = checking.CONVOLUTIONS["wide"][0]
    product = plans.Product("conv_fprop", *checking.CONVOLUTIONS["wide"], torch.float16)
    device = torch.device("meta")
    config = configs.gemm(
        product.plans[0], product, samples, tuple(size), device, False, lambda: True
    )
    assert (config.warps, config.block_n, config.block_k) == (8, c, 64)
    weights = product._replace(name="conv_wgrad")
    with plans.use_plan(weights.plans[1]):
        steps = walk(size, product.taps, product.geometry)
        assert configs.wgrad(weights, steps, device, False).warps == 8


def test_what_is_wrong_is_named(monkeypatch, few):
    spoil(monkeypatch, "materialize", lambda out: 1.01 * out)
    names = "materialize", "block, instance norm", "MeshNet"
    found = wrong(few, "moments", *names)
    assert {*found} == {*names}
    assert found["materialize"].startswith("its result 0 is off by 0.01 of its size")


def test_what_fails_is_named_also_without_words(monkeypatch, few):
    def fails(out):
        raise AssertionError

    spoil(monkeypatch, "materialize", fails)
    found = wrong(few, "materialize", "MeshNet")
    assert found["materialize"] == "it fails (AssertionError:)"
    assert "MeshNet" in found


def test_what_changes_from_run_to_run_is_named(monkeypatch):
    """Within all tolerance: passes are deterministic, so that threads must have raced."""
    count = itertools.count()

    def moments(x, p):
        mean, var = reference.moments(x, p)
        return mean + 1e-6 * next(count), var

    monkeypatch.setattr(dispatch, "passes", lambda x: SimpleNamespace(moments=moments))
    drawn = checking._drawn("relu", torch.float32, (2, 3, 50), False, torch.device("cpu"))
    one = checking._Judged(drawn, "ieee").by(plans.Plan(), "", "moments", "")
    assert one.run() == "it gives other bits when it is run again: its threads race"
    monkeypatch.setattr(dispatch, "passes", lambda x: reference)
    assert one.run() is None


@pytest.mark.parametrize("how", ["tf32", "ieee"])
def test_short_factors_have_their_own_slack(how):
    """TF32 has the digits of float16, and torch may have computed with whole factors."""
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    half = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    with precision.use(how):
        expected = agreement.SLACK[torch.float16 if how == "tf32" else torch.float32]
        assert agreement.slack_of(on_gpu) == expected
        assert agreement.slack_of(half) == agreement.SLACK[torch.bfloat16]
        assert agreement.slack_of(torch.zeros(1)) == agreement.SLACK[torch.float32]


def test_a_network_that_is_not_fused_is_no_success(monkeypatch, few):
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: "this is a test")
    nets = [one for one in checking.comparisons(few) if one.part == "networks"]
    assert "runs as plain PyTorch: this is a test" in nets[-1].run()


@pytest.mark.parametrize("name", agreement.PASSES)
def test_every_pass_has_its_work(name):
    drawn = checking._drawn("prelu", torch.float64, (1, 2, 6, 5), True, torch.device("cpu"))
    found = drawn().step(reference, name)
    assert found.tensors
    assert all(one.isfinite().all() for one in found.tensors)


@pytest.mark.parametrize(
    "name", [one for several in agreement.PRODUCTS.values() for one in several]
)
def test_every_product_has_its_work(name):
    """Fused with it is what changes its result."""
    product = plans.Product("conv_fprop", *checking.CONVOLUTIONS["even"], torch.float64)
    work = agreement.ProductWork.drawn(product, torch.device("cpu"))
    (found, *_), pass_ = work.step(reference, name).tensors, name.partition(",")[0]
    (usual, *_) = work.step(reference, pass_).tensors
    assert found.shape == usual.shape
    assert torch.equal(found, usual) == (name in (pass_, "conv_dgrad, alone"))


def test_the_command_says_what_is_at_fault(monkeypatch, few, capsys):
    only = ("moments", "materialize")
    planned = [one for one in checking.comparisons(few) if one.what in only]
    monkeypatch.setattr(checking, "comparisons", lambda device: planned)
    spoil(monkeypatch, "moments", lambda out: (out[0] + 1, out[1]))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    case = "(2x21x7x6 last float32, silu, 2048 elements, 8 warps)"
    assert f"moments {case}: its result 0 is off by" in out
    assert "0 at fault" not in out
    assert re.search(r"^first plans \d+ s, networks \d+ s, ", out, re.MULTILINE)
    assert "pairs of pass and plan were compared" in out
    assert "not compared" not in out


def test_the_command_says_what_the_budget_left_out(few, capsys):
    count = len(checking.comparisons(few))
    assert main(["check", "--budget", "1e-9"]) == 0
    out = capsys.readouterr().out
    assert "1 comparisons on" in out
    assert f"{count - 1} comparisons are left out" in out
    assert re.search(r"^1 of \d+ pairs of pass and plan were compared$", out, re.MULTILINE)
    second = plans.PLANS[1]
    assert f"not compared: moments by {second}\n" in out  # the first plan was
    assert "not compared: conv_wgrad, fused by 64 x 192 x 32, 3 stages\n" in out


def test_the_command_refuses(monkeypatch, capsys):
    for budget in ("0", "nan", "-1"):
        assert main(["check", "--budget", budget]) == 2
        assert "must be a number of seconds above 0" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "this is a test")
    assert main(["check"]) == 2
    assert "there is no kernel to check: this is a test" in capsys.readouterr().err
