"""Every pass as compiled for sm_80 or sm_90, in the simulator of PTX (`pytest --simulate 80`).

Where the interpreter runs Python, this runs what Triton made of it: layouts of registers and shared
memory, software pipelines, tensor cores, bfloat16, TF32 and, on sm_90, TMA. An access out of
bounds (also of what is copied ahead and not used), a race in shared memory, a register that is set
while a product may read it, or an instruction that runs too early raises, whatever the result.
"""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import ptxsim
import test_convolutions
import test_passes
import test_pool
import test_resize
from conftest import RUNNER
from ptxsim import driver

from cassetta.kernels import (
    activations,
    conv_fprop,
    dispatch,
    layout,
    ops,
    plans,
    precision,
    reference,
)
from cassetta.kernels.types import NOTHING, Activation, Geometry, Moments, Pooling, Prologue

pytestmark = pytest.mark.simulated
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAYOUTS = ["first", "last", "words"]


@pytest.fixture(autouse=True)
def options(monkeypatch):
    """The simulator's, as they were after each test."""
    for name in ("worst", "races", "factors", "copies"):
        monkeypatch.setattr(ptxsim.Options, name, getattr(ptxsim.Options, name))
    return ptxsim.Options


@pytest.fixture(autouse=True, scope="module")
def ran():
    """The names of the passes that have run in this file."""
    found = set()

    def noted(name, kernel):
        def run(*args, **kwargs):
            found.add(name)
            return kernel(*args, **kwargs)

        return run

    passes = vars(dispatch._triton_passes())
    passes = SimpleNamespace(**{name: noted(name, kernel) for name, kernel in passes.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_triton_passes", lambda: passes)
        yield found


@pytest.fixture
def hopper(request):
    if request.config.getoption("--simulate") != 90:
        pytest.skip("begins with sm_90")


def laid_out(image, kind):
    if kind == "last":
        return image.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "words":
        return layout.empty(tuple(image.shape), image.dtype, image.device).copy_(image)
    return image


ELEMENTWISE = [
    # channels first: voxels side by side; last and words: channels
    ((2, 21, 5, 6, 7), F32, "silu", "first"),
    ((1, 2, 5000), F16, "leaky_relu", "first"),
    ((2, 21, 5, 6, 7), BF16, "relu", "first"),
    ((2, 5, 7, 9), F32, "mish", "last"),
    ((2, 21, 5, 6, 7), F16, "silu", "last"),
    ((1, 64, 9, 11), BF16, "prelu", "last"),
    ((2, 21, 5, 6, 7), F32, "elu", "words"),
    ((3, 4, 1, 1, 1), F16, "hardswish", "words"),
    ((2, 21, 5, 6, 7), BF16, "gelu", "words"),
]


@pytest.mark.parametrize(("shape", "dtype", "activation", "kind"), ELEMENTWISE, ids=str)
def test_elementwise_passes_and_sums(shape, dtype, activation, kind, kernels):
    x, g, r, p, fold = test_passes.problem(shape, dtype, activation, True, kernels)
    arguments = (*(laid_out(t, kind) for t in (x, g, r)), p, fold)
    test_passes.assert_as_good_as_torch(dispatch.passes(x), arguments)


@pytest.mark.parametrize("activation", activations.NAMES)
def test_approximations_may_be_as_far_off_as_the_isa_allows(activation, kernels, options):
    options.worst = True
    passes = dispatch.passes(torch.empty(1, device=kernels))
    test_passes.assert_right_at_special_points(passes, activation, kernels)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", activations.BY_RESULT)
def test_gradients_by_result(name, dtype, kernels):
    test_passes.test_gradients_by_result(name, dtype, kernels)


CONVOLUTIONS = [
    ("even taps", "float32", "first", True, "silu"),
    ("meshnet 26", "float32", "last", False, "relu"),
    ("halved", "float32", "words", True, "prelu"),
    ("thirty channels, dilation 31", "float16", "first", False, "relu"),
    ("meshnet 21, dilation 2", "float16", "last", True, "gelu"),
    ("one tap", "float16", "words", True, "silu"),
    ("first layer", "bfloat16", "first", True, "elu"),
    ("three channels, five taps", "bfloat16", "last", False, "relu"),
    ("halved, odd sizes", "bfloat16", "words", True, "silu"),
    ("halved, odd sizes", "float16", "last", False, "relu"),
    ("halved", "tf32", "first", True, "silu"),
    ("more channels than a tile", "tf32", "first", False, "leaky_relu"),
    ("a single voxel", "tf32", "last", True, "relu"),
    ("meshnet 21, dilation 2", "tf32", "words", True, "silu"),
]


@pytest.mark.parametrize(
    ("name", "how", "kind", "pending", "activation"), CONVOLUTIONS, ids=lambda value: str(value)
)
def test_convolutions_and_their_gradients(name, how, kind, pending, activation, kernels):
    assert_right(name, how, kernels, kind, pending, activation)


def assert_right(name, how, device, kind="first", pending=False, activation="relu"):
    q = test_convolutions.problem(
        name, test_convolutions.PRECISIONS[how], device, pending, activation
    )
    for key in ("x", "x2", "g", "r", "coarse"):
        q[key] = laid_out(q[key], kind)
    if how == "tf32":
        with precision.use("tf32"):
            assert_right_in_tf32(dispatch.passes(q["x"]), q)
    else:
        test_convolutions.assert_as_good_as_torch(dispatch.passes(q["x"]), q)


def assert_right_in_tf32(passes, q):
    """To 2^-8 of the largest value.

    A factor that is cut to 10 bits is off by less than 2^-10 of itself, a product by 2^-9; what is
    drawn is as often negative, so that a sum of products is off by less, on the scale of its
    largest value; and twice as much is left to variances and to what an epilogue multiplies.
    """
    ours = test_convolutions.results(passes, q)
    exact = {key: test_convolutions.double(value) for key, value in q.items()}
    for name, expected in test_convolutions.results(reference, exact).items():
        off = (ours[name].double() - expected).abs().max() if expected.numel() else 0.0
        assert off <= 2**-8 * (expected.abs().max() if expected.numel() else 0.0), name


BOXED = [
    ("meshnet 21, dilation 2", "bfloat16", False, "relu"),
    ("more channels than a tile", "float16", True, "silu"),
    ("padded by hand", "float32", False, "relu"),
    ("meshnet 26", "tf32", True, "relu"),
    ("halved", "bfloat16", False, "relu"),
    ("unpadded", "bfloat16", False, "relu"),
]


def _plan(dtype, boxed):
    """The first plan of convolutions that copies boxes, or does not."""
    unit = Geometry((1,), ((0, 0),), (1,))
    every = plans.Product("conv_fprop", (1, 1), 1, (1,), unit, dtype).plans
    return next(plan for plan in every if plan.boxes == boxed)


@pytest.mark.parametrize(("name", "how", "pending", "activation"), BOXED, ids=str)
def test_convolutions_of_boxes(name, how, pending, activation, kernels, hopper):
    """TMA: what a copy brings, and where it is awaited."""
    with plans.use_plan(_plan(test_convolutions.PRECISIONS[how], True)):
        assert_right(name, how, kernels, "words", pending, activation)


@pytest.mark.parametrize("how", ["float16", "bfloat16", "tf32"])
def test_gradients_of_weights_do_not_race(how, kernels, hopper):
    """An operand of wgmma that something else reads too gets a buffer too few from triton.

    Many steps, so that the pipeline goes round: found as a write to what a product may still read.
    """
    x, g = (
        torch.randn(1, 24, 300).to(kernels, test_convolutions.PRECISIONS[how]) for _ in range(2)
    )
    unit = Geometry((1,), ((1, 1),), (1,))
    with precision.use("tf32"):
        dw = dispatch.passes(x).conv_wgrad(g, x, NOTHING, (3,), unit)
    truth = reference.conv_wgrad(g.double(), x.double(), NOTHING, (3,), unit)
    assert (dw.double() - truth).abs().max() <= 2**-8 * truth.abs().max()


@pytest.mark.parametrize(
    ("channels", "pending", "boxed"),
    [
        (32, False, False),
        (21, False, False),  # channels that do not exist are masked
        (160, True, False),  # transformed on load
        (21, False, True),
    ],
)
def test_no_product_reads_registers_that_are_set_anew(channels, pending, boxed, kernels, hopper):
    """An operand of wgmma that is computed, and not copied, comes from shared memory.

    Triton would feed it from registers, which the next step sets too early (triton#9433).
    """
    x = laid_out(torch.randn(1, channels, 200).to(kernels, BF16), "words")
    taps = 1 if pending else 3
    w = torch.randn(channels, channels, taps).to(kernels, BF16)
    p = (
        Prologue(*torch.rand(2, 1, channels).to(kernels), Activation("relu"))
        if pending
        else NOTHING
    )
    geometry = Geometry((1,), ((taps // 2, taps // 2),), (1,))
    with plans.use_plan(_plan(BF16, boxed)):
        y = dispatch.passes(x).conv_fprop(x, p, w, None, geometry)[0]
    truth = reference.conv_fprop(
        x.double(), test_convolutions.double(p), w.double(), None, geometry
    )
    assert (y.double() - truth[0]).abs().max() <= 2**-7 * truth[0].abs().max()


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_two_images_become_one(dtype, kind, kernels):
    x, x2 = (laid_out(torch.randn(2, c, 5, 6, 7, device=kernels).to(dtype), kind) for c in (21, 8))
    p, p2 = (
        Prologue(*torch.rand(2, 2, c).to(kernels), Activation("silu"), None, None, None)
        for c in (21, 8)
    )
    ours = dispatch.passes(x).concatenate(x, p, x2, p2, dtype)
    truth = reference.concatenate(
        x.double(), test_convolutions.double(p), x2.double(), test_convolutions.double(p2), F64
    )
    # on the scale of the largest value: two roundings to the dtype, or those of float32
    atol = max(2 * torch.finfo(dtype).eps, 1e-6) * truth.abs().max().item()
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=atol)


POOLS = [
    ("uneven window", F32, "first", "silu"),
    ("two axes", F16, "first", None),
    ("21 channels, ragged", BF16, "first", None),
    ("21 channels, ragged", F32, "last", "relu"),
    ("uneven window", F16, "last", "gelu"),
    ("two axes", BF16, "last", "prelu"),
    ("more than a byte counts", F32, "words", None),
    ("21 channels, ragged", F16, "words", "relu"),
    ("halved", BF16, "words", "silu"),
]


@pytest.mark.parametrize(("name", "dtype", "kind", "activation"), POOLS, ids=str)
def test_max_pooling(name, dtype, kind, activation, kernels):
    shape, window = test_pool.CASES[name]
    x = laid_out(torch.randn(shape, device=kernels).to(dtype), kind)
    pending = test_pool.transform(shape, activation, kernels) if activation else NOTHING
    test_pool.assert_right(x, window, pending)


GRIDS = [
    ("2-D, mixed", F32, 3, "first", "center", True),
    ("3-D, any", F16, 21, "first", "edge", True),
    ("1-D, tripled", BF16, 5, "first", "last", False),
    ("3-D, any", F32, 21, "last", "edge", True),
    ("3-D, 2 1 3", F16, 3, "last", "center", False),
    ("3-D, doubled", BF16, 21, "last", "edge", True),
    ("single voxels", F32, 5, "words", "last", True),
    ("2-D, mixed", F16, 8, "words", "first", False),
    ("3-D, doubled", BF16, 21, "words", "edge", True),
]


@pytest.mark.parametrize(("name", "dtype", "c", "kind", "anchor", "full"), GRIDS, ids=str)
def test_interpolation_and_its_adjoint(name, dtype, c, kind, anchor, full, kernels):
    x, g, p, grid = test_resize.problem(name, dtype, kernels, c, anchor, full)
    test_resize.assert_as_good_as_torch(laid_out(x, kind), laid_out(g, kind), p, grid)


@pytest.mark.parametrize(
    ("pooling", "shape", "full", "half"),
    [
        (Pooling("batch"), (5, 300), True, True),
        (Pooling("instance"), (40, 21), True, False),
        (Pooling("group", 3), (2, 6), False, False),
    ],
    ids=str,
)
def test_norms_of_moments(pooling, shape, full, half, kernels):
    test_passes.test_what_a_norm_makes_of_its_moments(pooling, shape, full, half, kernels)


@pytest.mark.parametrize(("shape", "full"), [((2, 6), True), ((5, 300), False), ((1, 130), True)])
def test_statistics_that_are_kept(shape, full, kernels):
    test_passes.test_a_norm_updates_what_it_keeps(shape, full, kernels)


@pytest.mark.parametrize(
    ("pooling", "shape", "full", "dtype", "last"),
    [
        (Pooling("instance"), (2, 21, 5, 6, 7), True, BF16, True),
        (Pooling("batch"), (1, 6, 5, 7), True, F16, False),
        (Pooling("batch"), (3, 9, 40), False, F32, True),
        (Pooling("instance"), (1, 4, 9000), True, F32, False),  # several chunks
        (Pooling("fixed"), (3, 9, 40), True, F32, False),
    ],
    ids=str,
)
def test_norms_of_images(pooling, shape, full, dtype, last, kernels):
    test_passes.test_a_norm_of_an_image(pooling, shape, full, dtype, last, kernels)


@pytest.mark.parametrize("shape", [(8, 64, 1), (8, 8, 5, 5)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
def test_variances_are_not_negative(activation, shape, kernels):
    """Of constant channels: where `value - mean` is fused with the product that gave the value."""
    n, c = shape[:2]
    constant = torch.rand(n, c, *[1] * (len(shape) - 2)) * 200 + 5
    x = constant.expand(shape).contiguous().to(kernels)
    s, t = (torch.rand(n, c).to(kernels) + 0.5 for _ in range(2))
    passes = dispatch.passes(x)
    moments = passes.moments(x, Prologue(s, t, Activation(activation, 0.1)))
    w = torch.rand(8, c, *[1] * (len(shape) - 2)).to(kernels)
    unit = Geometry(*((one,) * (len(shape) - 2) for one in (1, (0, 0), 1)))
    _, *stored = passes.conv_fprop(x, NOTHING, w, None, unit, moments_of=Activation())
    for own in (moments, Moments(*stored)):
        assert (own.var >= 0).all()
        for pooling in (Pooling("instance"), Pooling("batch"), Pooling("group", 4)):
            rstd = passes.norm_finalize(own, None, None, None, 1e-6, 8, pooling)[2]
            assert rstd.isfinite().all()


@pytest.mark.parametrize(
    "pattern",
    [r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;", r"wgmma\.wait_group\.sync\.aligned\s+\d;"],
)
def test_a_convolution_that_does_not_wait_is_found_out(pattern, kernels, request, monkeypatch):
    """What this file asserts, it can see: barriers and waits are taken away from the PTX."""
    if "wgmma" in pattern:
        request.getfixturevalue("hopper")
    x, w = torch.randn(1, 16, 300).to(kernels, BF16), torch.randn(16, 16, 3).to(kernels, BF16)
    unit = Geometry((1,), ((1, 1),), (1,))
    whole, caches = driver._ptx, conv_fprop._conv_kernel.device_caches

    def less(metadata):
        text, count = re.subn(pattern, "", whole(metadata))
        assert count
        return text

    def run():
        caches.clear()
        return dispatch.passes(x).conv_fprop(x, NOTHING, w, None, unit)[0]

    assert run().isfinite().all()
    monkeypatch.setattr(driver, "_ptx", less)
    try:
        assert run().isnan().any()  # of a copy that has not arrived
    except ptxsim.RaceError:
        assert "cp.async" not in pattern
    finally:
        caches.clear()


def test_kernels_run_in_the_simulator(kernels, options, monkeypatch):
    """And not in the interpreter, or nowhere."""
    monkeypatch.setattr(options, "log", [])
    x = torch.randn(1, 3, 40)
    dispatch.passes(x).materialize(x, Prologue(), None, F32)
    assert RUNNER == "simulator"
    assert [name for name, *_ in options.log] == ["_materialize_kernel"]


def test_every_pass_has_run(ran, request):
    """If all other tests of this file have, before and in this process."""
    items = request.session.items
    before = {one.originalname for one in items[: items.index(request.node)]}
    tests = {name for name, one in globals().items() if name.startswith("test_") and callable(one)}
    if hasattr(request.config, "workerinput") or tests - before - {request.node.originalname}:
        pytest.skip("other tests of this file have not run before, in this process")
    assert ran == {*ops.PASSES}
