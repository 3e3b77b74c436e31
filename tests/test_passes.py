"""The passes in Triton against float64: right to rounding, in every dtype, layout and shape."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import RUNNER
from torch.nn import functional

from cassetta.kernels import activations, configs, dispatch, plans, reference
from cassetta.kernels.types import Activation, Fold, Moments, Pooling, Prologue

from compare import Counted

# numpy says when exp overflows, which leads to the right limits
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CONSTANTS = {"leaky_relu": (0.1, 0.0), "elu": (1.3, 0.0), "softplus": (2.0, 5.0)}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if RUNNER != "interpreter" else [])
SHAPES = [(2, 5, 7, 9), (1, 3, 40), (2, 21, 5, 6, 7), (1, 1, 1), (3, 4, 1, 1, 1), (1, 2, 5000)]


def problem(shape, dtype, name, full, device):
    """An image, a gradient and a residual of a dtype, and a prologue; drawn after rounding."""
    n, c = shape[:2]
    x, g, r = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(3))
    table = lambda: torch.randn(n, c).to(device)  # noqa: E731
    tables = [table() if full else None for _ in range(4)]
    activation = Activation(name, *CONSTANTS.get(name, (0.0, 0.0)))
    slope = table() if name == "prelu" else None
    p = Prologue(*tables[:2], activation, slope, *tables[2:])
    return x, g, r, p, Fold(table(), table(), table())


def results(passes, x, g, r, p, fold):
    """All that the passes compute of it, by name."""
    out = dict(zip(("mean", "var"), passes.moments(x, p), strict=True))
    out["z"] = passes.materialize(x, p, None, x.dtype)
    out["z + r"] = passes.materialize(x, p, r, x.dtype)
    for word, residual in (("", None), (" + r", r)):
        names = (f"z{word}, with moments", f"mean of z{word}", f"var of z{word}")
        found = passes.materialize_moments(x, p, residual, x.dtype)
        out |= dict(zip(names, found, strict=True))
    for after in (False, True):
        for share in (None, fold):
            word = f"{'after' if after else 'before'}{', folded' if share else ''}"
            sums = passes.prologue_sums(g, x, p, fold.centre, share, after)
            names = ("sum h", "sum hb", "sum slope")
            for name, value in list(zip(names, sums, strict=True))[
                : 3 if p.slope is not None else 2
            ]:
                out[f"{name}, {word}"] = value
            out[f"dx, {word}"] = passes.prologue_dgrad(g, x, p, share, after)
    return out


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, (Prologue, Fold)):
        return type(value)(*map(double, value))
    return value


SLACK = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""On the scale of the largest value: 32 eps for the sums and transcendentals of float32; 2 eps
where the result is rounded to half."""


def assert_as_good_as_torch(passes, arguments):
    """err(ours) <= 2 err(the same formulas in plain torch, same dtype) + slack, against float64."""
    truth = results(reference, *map(double, arguments))
    same = results(reference, *arguments)
    ours = results(passes, *arguments)
    for name, expected in truth.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        ours_off, same_off = (
            (one[name].double() - expected).abs().max().item() for one in (ours, same)
        )
        assert ours[name].shape == expected.shape
        assert ours[name].dtype == same[name].dtype
        allowed = 2 * same_off + SLACK[arguments[0].dtype] * max(scale, 1e-3)
        assert ours_off <= allowed, f"{name}: {ours_off:.2e} of {scale:.2e}, torch {same_off:.2e}"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
def test_every_activation(name, dtype, full, kernels):
    arguments = problem((2, 5, 7, 9), dtype, name, full, kernels)
    assert_as_good_as_torch(dispatch.passes(arguments[0]), arguments)


LAYOUTS = [
    "channels first", "channels last", "mixed", "sliced", "gaps", "turned", "expanded", "one voxel",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(shape, layout, kernels):
    x, g, r, p, fold = problem(shape, torch.float32, "silu", True, kernels)
    last = lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)  # noqa: E731
    if layout == "channels last":
        x, g, r = last(x), last(g), last(r)
    elif layout == "mixed":
        g, r = last(g), last(r)
    elif layout == "sliced":  # some channels of a larger image
        x = torch.cat([x, x], 1)[:, : shape[1]]
    elif layout == "expanded":  # as the gradient of a sum is
        g, r = g[:1, :1, ..., :1].expand(shape), r[..., :1].expand(shape)
        g = g.mean().expand(shape)
    elif layout == "one voxel":  # of each channel, at all places
        g = g.flatten(2)[..., :1].reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
    elif layout == "turned":  # dense, but its voxels have no common stride
        x, r = (t.mT.contiguous().mT for t in (x, r))
    elif layout == "gaps":  # every other voxel of the last axis
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    assert_as_good_as_torch(dispatch.passes(x), (x, g, r, p, fold))


def test_the_layout_is_kept(kernels):
    x, g, r, p, fold = problem((2, 5, 6, 7), torch.float32, "relu", True, kernels)
    x = x.contiguous(memory_format=torch.channels_last)
    passes = dispatch.passes(x)
    for out in (passes.materialize(x, p, r, x.dtype), passes.prologue_dgrad(g, x, p, fold, True)):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch(kernels):
    x, g, r, p, fold = problem((0, 5, 6, 7), torch.float32, "relu", True, kernels)
    for value in results(dispatch.passes(x), x, g, r, p, fold).values():
        assert value.shape[0] == 0


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_variance_of_a_large_mean_does_not_cancel(mean, kernels):
    x = (mean + torch.randn(2, 3, 3000)).to(kernels)
    truth = reference.moments(x.double(), Prologue())
    ours = dispatch.passes(x).moments(x, Prologue())
    torch.testing.assert_close(ours.mean.double(), truth.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.var.double(), truth.var, rtol=1e-4, atol=0)
    constant = torch.full((1, 2, 3000), mean + 0.1, device=kernels)
    var = dispatch.passes(x).moments(constant, Prologue()).var
    assert ((var >= 0) & (var <= (2 * 1.2e-7 * (mean + 0.1)) ** 2)).all()  # rounding of the mean


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["identity", "leaky_relu", "silu"])
def test_variance_of_constant_channels_is_not_negative(name, full, kernels):
    """On a GPU a value that is a product may be subtracted from before it is rounded (fma), so that
    it differs from itself: what is added up must be squares. (The interpreter rounds it first.)"""
    x = (5 + 200 * torch.rand(4, 8, 1)).expand(4, 8, 25).contiguous().to(kernels)
    _, _, _, p, _ = problem((4, 8, 25), torch.float32, name, full, kernels)
    passes = dispatch.passes(x)
    _, *stored = passes.materialize_moments(x, p, None, x.dtype)
    for mean, var in (passes.moments(x, p), stored):
        # the mean of each lane, and that of lanes, are off by a few roundings of what was added
        assert ((var >= 0) & (var <= (8 * 2**-24 * (mean.abs() + 4)) ** 2)).all()
        for eps in (1e-6, 0.0):  # as nothing is subtracted, 0 adds up to 0
            _, var, rstd, *_ = passes.norm_finalize(
                Moments(mean, var), None, None, None, eps, 25, Pooling("instance")
            )
            assert (var >= 0).all()
            assert not rstd.isnan().any()


def test_float16_statistics_do_not_overflow(kernels):
    x = torch.full((1, 1, 3000), 60_000.0, dtype=torch.float16, device=kernels)
    mean, var = dispatch.passes(x).moments(x, Prologue())
    assert mean.item() == pytest.approx(60_000, rel=1e-3)
    # a GPU divides to 2 of the last digits: each value is off the mean by a few of these
    assert 0 <= var.item() <= (60_000 * 2**-21) ** 2


def test_the_same_input_gives_the_same_bits(kernels):
    arguments = problem((2, 5, 900), torch.float32, "gelu", True, kernels)
    passes = dispatch.passes(arguments[0])
    for one, other in zip(
        results(passes, *arguments).values(), results(passes, *arguments).values(), strict=True
    ):
        assert torch.equal(one, other)


POINTS = torch.tensor([
    *[0.0, -0.0, 3.0, -3.0, 1e-8, -1e-8, 1e-4, -1e-4, 0.0999, -0.1, 0.26, -20.0, -15.0, 30.0],
    *torch.linspace(-9, 9, 50).tolist(),
    *torch.linspace(-1.5, -0.7, 33).tolist(),  # where derivatives cross zero
    float("nan"),
])  # fmt: skip


def addends(u, name):
    """Sums of the magnitudes of what is added up: to act(u), and to act'(u); 0 without a sum."""
    s, t = torch.sigmoid(u), torch.tanh(functional.softplus(u))
    none = torch.zeros_like(u)
    if name == "gelu":
        halves = 0.5 * (1 + torch.erf(u.abs() / 2**0.5))
        density = torch.exp(-0.5 * u.square()) / (2 * torch.pi) ** 0.5
        return u.abs() * halves, halves + u.abs() * density
    if name == "gelu_tanh":
        k, cube = (2 / torch.pi) ** 0.5, 0.044715
        t = torch.tanh(k * (u + cube * u**3))
        halves = 0.5 * (1 + t.abs())
        slope = (1 + t.square()) * k * (1 + 3 * cube * u.square())
        return u.abs() * halves, halves + 0.5 * u.abs() * slope
    return none, {
        "silu": s + u.abs() * s * (1 - s),
        "mish": t + u.abs() * s * (1 + t.square()),
        "hardswish": torch.where(u.abs() < 3, u.abs() / 3 + 0.5, none),
    }.get(name, none)


def assert_right_at_special_points(passes, name, device):
    """Zeros, tails, kinks and NaN: not hidden by the largest value of an image.

    On a GPU, exp(u) is `ex2.approx` of a rounded product: off by 2^-22 and |u| 2^-24 of itself; a
    quotient (`div.full`), a logarithm or erf by 2^-22. With |u| <= 30 that is 2^-18 (32 eps) of a
    result which is a product of such factors. Where addends cancel, and so wherever a derivative
    crosses zero, the sum is no more exact than they are: it is off by 2^-21 of their magnitudes,
    2^-22 from the functions above and as much from rounding products and sums. (Zeros lie at
    |u| < 2; farther out, |u| 2^-24 is more than that, but the sum is no less than half of them.)
    """
    u = POINTS
    x = u.reshape(1, 1, -1).to(device)
    activation = Activation(name, *CONSTANTS.get(name, (0.0, 0.0)))
    p = Prologue(activation=activation, slope=torch.full((1, 1), 0.3, device=device))
    g = torch.ones_like(x)
    for run, added in zip(
        (
            lambda passes, g, x, p: passes.materialize(x, p, None, x.dtype),
            lambda passes, g, x, p: passes.prologue_dgrad(g, x, p, None, False),
        ),
        addends(u.double(), name),
        strict=True,
    ):
        ours = run(passes, g, x, p).double().flatten().cpu()
        truth = run(reference, *map(double, (g, x, p))).flatten().cpu()
        assert ours[-1].isnan() == truth[-1].isnan()
        off, allowed = (ours - truth).abs(), 2**-18 * truth.abs() + 2**-21 * added + 1e-15
        wrong = (off > allowed)[:-1]
        assert not wrong.any(), [
            f"act({at}) is off by {o:.1e}, allowed {a:.1e}"
            for at, o, a in zip(u[:-1][wrong], off[:-1][wrong], allowed[:-1][wrong], strict=True)
        ]


@pytest.mark.parametrize("name", activations.NAMES)
def test_special_points_in_relative_terms(name, kernels):
    assert_right_at_special_points(dispatch.passes(torch.empty(1, device=kernels)), name, kernels)


def _silu_of_tanh(g, x, p, fold, after):
    s = 0.5 * (1 + torch.tanh(0.5 * x))
    return g * s * (1 + x * (1 - s))


@pytest.mark.parametrize(
    ("name", "dgrad"),
    [
        ("tanh", reference.prologue_dgrad),  # 1 - tanh(u)^2
        ("sigmoid", reference.prologue_dgrad),  # s (1 - s)
        ("silu", _silu_of_tanh),
    ],
)
def test_formulas_that_cancel_are_seen(name, dgrad):
    """By the comparison above, for all that it allows."""
    passes = SimpleNamespace(materialize=reference.materialize, prologue_dgrad=dgrad)
    with pytest.raises(AssertionError, match="is off by"):
        assert_right_at_special_points(passes, name, torch.device("cpu"))


@pytest.mark.parametrize("name", activations.NAMES)
def test_derivatives_are_those_of_torch(name):
    """The reference's own, against autograd."""
    activation = Activation(name, *CONSTANTS.get(name, (0.0, 0.0)))
    slope = torch.tensor(0.3, dtype=torch.float64)
    kinks = torch.tensor([0.0, -0.0, 3.0, -3.0], dtype=torch.float64)
    u = torch.cat([kinks, torch.linspace(-7, 7, 101, dtype=torch.float64)]).requires_grad_()
    (expected,) = torch.autograd.grad(activations.apply(u, activation, slope).sum(), u)
    torch.testing.assert_close(activations.derivative(u, activation, slope).detach(), expected)


@pytest.mark.parametrize("name", activations.BY_RESULT)
def test_derivatives_by_result(name):
    """The reference's own are those by argument."""
    activation = Activation(name, *CONSTANTS.get(name, (0.0, 0.0)))
    assert activations.told_by_result(activation)
    assert not activations.told_by_result(activation._replace(p=-0.1))
    u = torch.linspace(-7, 7, 101, dtype=torch.float64)
    by_result = activation._replace(name=activations.BY_RESULT[name])
    found = activations.derivative(activations.apply(u, activation), by_result)
    torch.testing.assert_close(found, activations.derivative(u, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", activations.BY_RESULT)
def test_gradients_by_result(name, dtype, kernels):
    """From what `materialize` stored, as near to float64 as the reference."""
    x, g, _, p, _ = problem((2, 5, 7, 9), dtype, name, True, kernels)
    forward = p._replace(s2=None, t2=None)
    backward = p._replace(
        s1=None, t1=None, activation=p.activation._replace(name=activations.BY_RESULT[name])
    )

    def run(passes, g, x, forward, backward):
        z = passes.materialize(x, forward, None, x.dtype)
        return passes.prologue_dgrad(g, z, backward, None, False).double()

    truth = run(reference, *map(double, (g, x, forward, backward)))
    same, ours = (run(one, g, x, forward, backward) for one in (reference, dispatch.passes(x)))
    off, same_off = ((one - truth).abs().max() for one in (ours, same))
    assert off <= 2 * same_off + SLACK[dtype] * truth.abs().max()


POOLINGS = [
    Pooling("batch"),
    Pooling("instance"),
    Pooling("group", 1),
    Pooling("group", 3),
    Pooling("fixed"),
]


def tables(n, c, full, device):
    """What `norm_finalize` and its backward take: moments, factors, parameters, sums."""
    draw = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
    own = Moments(3 + draw(n, c), draw(n, c).square())
    before, after, gamma, beta = (draw(n, c), draw(n, c), draw(c), draw(c)) if full else [None] * 4
    return own, before, after, gamma, beta, draw(3, n, c), draw(n, c)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (5, 300), (40, 21), (1, 3), (0, 6)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_what_a_norm_makes_of_its_moments(pooling, shape, full, half, kernels):
    own, before, after, gamma, beta, sums, centre = tables(*shape, full, kernels)
    if half and gamma is not None:  # parameters of a module in half precision
        gamma, beta = gamma.half(), beta.half()
    passes = dispatch.passes(centre)

    def both(passes, cast):
        moments, b, a, s, m = Moments(*map(cast, own)), *map(cast, (before, after, sums, centre))
        forward = passes.norm_finalize(moments, b, cast(gamma), cast(beta), 1e-5, 60, pooling)
        mean, _, rstd, *_ = cast(finalized)
        backward = passes.norm_finalize_backward(
            s, mean, rstd, m, b, a, cast(gamma), 60, pooling
        )  # fmt: skip
        return {
            **dict(zip(("mean", "var", "rstd", "scale", "shift", "own"), forward, strict=True)),
            **dict(zip(("dgamma", "dbeta", "dbias", "a", "k"), backward, strict=True)),
        }

    finalized = reference.norm_finalize(own, before, gamma, beta, 1e-5, 60, pooling)
    truth = both(reference, double)
    same, ours = both(reference, lambda t: t), both(passes, lambda t: t)
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape
        scale = expected.abs().max().item() if expected.numel() else 0.0
        if name == "dbias":  # which is a sum of two, that cancel
            scale += 60 * truth["a"].abs().max().item() if expected.numel() else 0.0
        off = [(one[name].double() - expected).abs().max().item() if expected.numel() else 0.0
               for one in (ours, same)]  # fmt: skip
        assert off[0] <= 2 * off[1] + SLACK[torch.float32] * scale, name


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (5, 300), (40, 21), (0, 6)], ids=str)
def test_a_norm_updates_what_it_keeps(shape, full, kernels):
    """As torch does; and its tables are those of `norm_finalize`, to the bit."""
    own, before, _, gamma, beta, _, _ = tables(*shape, full, kernels)
    start = torch.randn(shape[1]).to(kernels), torch.rand(shape[1]).to(kernels) + 0.5

    def kept(passes, cast):
        mean, var = (cast(one).clone() for one in start)
        batches = torch.tensor(7, device=kernels)
        given = Moments(*map(cast, own)), *map(cast, (before, gamma, beta)), 1e-5, 60
        out = passes.norm_finalize_running(*given, mean, var, batches, 0.3)
        if passes is not reference:
            same = passes.norm_finalize(*given, Pooling("batch"))
            torch.testing.assert_close(out, same, rtol=0, atol=0, equal_nan=True)
        assert batches.item() == 8
        return mean, var

    truth, same = kept(reference, double), kept(reference, lambda t: t)
    for name, *one in zip(
        ("mean", "var"), truth, same, kept(dispatch.passes(own.mean), lambda t: t), strict=True
    ):
        expected, other, ours = (x.double() for x in one)
        assert torch.equal(ours.isnan(), expected.isnan()), name  # of an empty batch
        off = [(x - expected).nan_to_num().abs().max() for x in (ours, other)]
        assert off[0] <= 2 * off[1] + SLACK[torch.float32] * expected.nan_to_num().abs().max(), name


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 6, 5, 7), (3, 9, 40), (2, 21, 5, 6, 7), (1, 4, 70000)], ids=str
)
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_a_norm_of_an_image(pooling, shape, full, dtype, last, kernels):
    """Statistics, and sums in the gradient, whether one kernel does it all or there are chunks."""
    n, c, *size = shape
    if pooling.kind == "group" and c % pooling.groups:
        pooling = Pooling("group", 1)
    x, g, _, p, _ = problem(shape, dtype, "silu", full, kernels)
    if last:
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    own, before, after, gamma, beta, _, centre = tables(n, c, full, kernels)
    start = torch.randn(c).to(kernels), torch.rand(c).to(kernels) + 0.5

    def both(passes, cast):
        given = *map(cast, (x, p, before, gamma, beta)), 1e-5
        norm = *map(cast, (own.mean, own.var, centre, before, after, gamma)), full, pooling
        out = dict(enumerate(passes.norm_sums(*map(cast, (g, x, p)), *norm)))
        if pooling.kind != "fixed":
            out |= zip("msrabo", passes.norm_statistics(*given, pooling), strict=True)
        if pooling.kind == "batch":
            kept = [cast(one).clone() for one in start]
            batches = torch.tensor(7, device=kernels)
            found = passes.norm_statistics_running(*given, *kept, batches, 0.3)
            assert batches.item() == 8
            out |= {"running": found, "kept mean": kept[0], "kept var": kept[1]}
        return out

    truth, same = both(reference, double), both(reference, lambda t: t)
    ours = both(dispatch.passes(x), lambda t: t)
    for name, expected in truth.items():
        scale = expected.abs().max().item()
        if name == 2:  # the sums of a gradient, which are a sum of two that cancel
            scale += math.prod(size) * truth[3].abs().max().item()
        off = [(one[name].double() - expected).abs().max().item() for one in (ours, same)]
        assert off[0] <= 2 * off[1] + SLACK[torch.float32] * scale, name


@pytest.fixture(params=[(False, False), (False, True), (True, False), (True, True)], ids=str)
def chunked(request, monkeypatch):
    """Whether channels come last, and whether there are more chunks than a program combines."""
    last, many = request.param
    if many:
        monkeypatch.setattr(configs, "REDUCED", 2)
    with plans.use_plan(plans.Plan(16 * 32 if last else 16, 4)):
        yield last, many


def of_chunks(n, c, last, device):
    """An image of 70 chunks of each channel, if it is visited as `chunked` has it."""
    x = 3 + torch.randn(n, c, 1120)
    return (x.mT.contiguous().mT if last else x).to(device)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "pooling", [Pooling("batch"), Pooling("instance"), Pooling("fixed")], ids=str
)
def test_a_norm_of_chunks(pooling, full, chunked, kernels):
    """Also where stages combine them, and channels do not fill the last tile."""
    last, _ = chunked
    shape = (1 if pooling.kind == "batch" else 2, 21 if last else 3, 1120)
    test_a_norm_of_an_image(pooling, shape, full, torch.float32, last, kernels)


def test_a_norm_of_chunks_is_two_launches(chunked, kernels, monkeypatch):
    """The one that combines them goes on with the algebra; only where they are many, stages do."""
    last, many = chunked
    x = of_chunks(1, 21 if last else 3, last, kernels)
    passes, tile = dispatch.passes(x), importlib.import_module("cassetta.kernels.tile")
    table, row = torch.ones(1, x.shape[1]).to(kernels), torch.ones(x.shape[1]).to(kernels)
    launched, launch = [], tile.launch

    def spy(kernel, *args, **constants):
        launched.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(tile, "launch", spy)
    given, several = (x, Prologue(), None, row, row, 1e-5), 1 + many
    with Counted() as counted:
        passes.norm_statistics(*given, Pooling("instance"))
        passes.norm_statistics_running(
            *given, row.clone(), row.clone(), torch.tensor(0).to(kernels), 0.1
        )
    assert launched == ["_moments_kernel", *["_combine_kernel"] * several] * 2
    launched.clear()
    assert counted.count("aten.sum") == 0
    with Counted() as counted:
        passes.norm_sums(
            x, x, Prologue(), *[table] * 3, None, None, row, False, Pooling("instance")
        )  # fmt: skip
    assert launched == ["_prologue_sums_kernel", "_norm_sums_kernel"]
    assert counted.count("aten.sum") == many


def test_nan_stays_in_its_channel_of_chunks(chunked, kernels):
    last, _ = chunked
    c = 21 if last else 3
    x = of_chunks(1, c, last, kernels)
    x[0, 1, 700] = float("nan")
    table, row = torch.ones(1, c).to(kernels), torch.ones(c).to(kernels)
    passes, p, kept = dispatch.passes(x), Prologue(activation=Activation("relu")), row.clone()
    batches = torch.tensor(0).to(kernels)
    tables = passes.norm_statistics(x, p, None, None, None, 1e-5, Pooling("instance"))
    passes.norm_statistics_running(x, p, None, row, row, 1e-5, kept, row.clone(), batches, 0.1)
    sums = passes.norm_sums(
        x, x, p, *[table] * 3, None, None, row, False, Pooling("instance")
    )  # fmt: skip
    for found in (*tables.flatten(1), kept, *sums.flatten(1)):
        assert found.isnan().nonzero().flatten().tolist() == [1]


def test_variance_of_constant_chunks_is_not_negative(chunked, kernels):
    last, _ = chunked
    x = of_chunks(1, 21 if last else 3, last, kernels)
    x.copy_((5 + 200 * torch.rand_like(x[..., :1])).expand_as(x))
    p = problem(tuple(x.shape), torch.float32, "silu", True, kernels)[3]
    passes = dispatch.passes(x)
    _, var, rstd, *_ = passes.norm_statistics(x, p, None, None, None, 0.0, Pooling("instance"))
    mean = passes.moments(x, p).mean  # which is off by a few roundings for each stage
    assert ((var >= 0) & (var <= (32 * 2**-24 * (mean.abs() + 4)) ** 2)).all()
    assert not rstd.isnan().any()


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_the_algebra_of_norms_is_that_of_torch(pooling):
    """The reference's own, values and every gradient, against torch's norms and autograd."""
    n, c = 4, 6
    factor, after = torch.rand(2, n, c, dtype=torch.float64) + 0.5
    gamma, beta = torch.randn(2, c, dtype=torch.float64).requires_grad_()
    b = torch.randn(n, c, 7, dtype=torch.float64).requires_grad_()
    v = b * factor[..., None]
    mean, var = torch.randn(c, dtype=torch.float64), torch.rand(c, dtype=torch.float64)
    plain = {
        "batch": lambda: torch.nn.functional.batch_norm(v, None, None, gamma, beta, True),
        "instance": lambda: torch.nn.functional.instance_norm(v, weight=gamma, bias=beta),
        "group": lambda: torch.nn.functional.group_norm(v, pooling.groups, gamma, beta),
        "fixed": lambda: torch.nn.functional.batch_norm(v, mean, var, gamma, beta, False),
    }[pooling.kind]
    expected = plain() * after[..., None]
    g = torch.randn_like(expected)
    given = torch.autograd.grad(expected, (b, gamma, beta), g)
    with torch.no_grad():
        own = reference.moments(b, Prologue())
        fixed = Moments(mean.repeat(n, 1), var.repeat(n, 1))
        moments = fixed if pooling.kind == "fixed" else own
        found = reference.norm_finalize(moments, factor, gamma, beta, 1e-5, 7, pooling)
        if pooling.kind == "batch":  # as it is kept for evaluation
            unbiased = v.transpose(0, 1).flatten(1).var(1)
            torch.testing.assert_close(found[1], unbiased.expand(n, c), rtol=1e-10, atol=1e-10)
        scale, shift = found[3] * after, found[4] * after
        out = scale[..., None] * b + shift[..., None]
        sums = torch.stack([g.sum(-1), (g * (b - own.mean[..., None])).sum(-1)])
        dgamma, dbeta, dbias, a, k = reference.norm_finalize_backward(
            sums, found[0], found[2], own.mean, factor, after, gamma, 7, pooling
        )
        db = scale[..., None] * g + a[..., None] + k[..., None] * (b - own.mean[..., None])
    for ours, theirs in zip(
        (out, db, dgamma.sum(0), dbeta.sum(0), dbias),
        (expected, *given, given[0].sum(-1)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)
