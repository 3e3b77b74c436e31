"""Linear interpolation in one pass, and its adjoint: every grid, layout and dtype; gradients."""

import itertools
import math
import random

import pytest
import torch
from conftest import RUNNER
from torch import nn

from cassetta import functional
from cassetta.functional import Deferred, linear_grid, resize_deferred
from cassetta.functional.norm import Normalization, Pool
from cassetta.kernels import dispatch, layout, reference, splines, tile
from cassetta.kernels.types import NOTHING, Activation, Prologue

from compare import NothingRead, assert_near

# numpy says when exp overflows, which leads to the right limits
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if RUNNER != "interpreter" else [])
ANCHORS = ["edge", "center", "first", "last"]

SLACK = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""On the scale of the largest value: 32 eps for the sums and transcendentals of float32; 2 eps
where the result is rounded to half."""

CASES = {
    "1-D, doubled": ((9,), (18,)),
    "1-D, tripled": ((7,), (21,)),
    "2-D, doubled": ((4, 6), (8, 12)),
    "2-D, mixed": ((5, 4), (8, 3)),
    "3-D, doubled": ((3, 2, 4), (6, 4, 8)),
    "3-D, 2 1 3": ((3, 4, 2), (6, 4, 6)),
    "3-D, halved": ((6, 4, 8), (3, 2, 4)),
    "3-D, thirds, ragged": ((7, 3, 8), (2, 1, 2)),
    "3-D, any": ((5, 3, 4), (7, 5, 3)),
    "single voxels": ((1, 3, 1), (2, 1, 1)),
    "one to many": ((1,), (9,)),
}


def grid_of(size, length, anchor):
    return linear_grid(size, length, [b / a for a, b in zip(size, length, strict=True)], anchor)


def problem(name, dtype, device, c=3, anchor="edge", full=True):
    """An image, a gradient of what becomes of it, a prologue and a grid."""
    size, length = CASES[name]
    n = 2
    x, g = (torch.randn(n, c, *s, dtype=torch.float64).to(device, dtype) for s in (size, length))
    tables = [torch.randn(n, c).to(device) if full else None for _ in range(4)]
    p = Prologue(*tables[:2], Activation("silu"), None, *tables[2:]) if full else NOTHING
    return x, g, p, grid_of(size, length, anchor)


def results(passes, x, g, p, grid):
    y = passes.resize(x, p, tuple(g.shape[2:]), grid)
    return y, passes.resize_dgrad(g, tuple(x.shape[2:]), grid)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return Prologue(*map(double, value)) if isinstance(value, Prologue) else value


def drifts(x, p, g, grid):
    """How far a result may move with positions that are rounded to float32.

    A position is off by 5 roundings, 2.5 eps, of numbers up to size + 1 + |start|, and each weight
    by as much. Forward, two weights of an axis move; backward, those of 2 / step + 1 outputs, each
    of which has weights along the other axes that sum up to 1 / step + 1 at most.
    """
    off = [
        2.5 * 2**-23 * (size + 1 + abs(start))
        for size, start in zip(x.shape[2:], grid.start, strict=True)
    ]
    seen = [min(1 / s if s else math.inf, n) for s, n in zip(grid.step, g.shape[2:], strict=True)]
    others = [math.prod(m + 1 for b, m in enumerate(seen) if b != a) for a in range(len(seen))]
    back = sum(d * (2 * m + 1) * o for d, m, o in zip(off, seen, others, strict=True))
    z = reference.materialize(x.double(), double(p), None, torch.float64)
    return 2 * sum(off) * z.abs().max(), back * g.double().abs().max()


def assert_as_good_as_torch(x, g, p, grid):
    """err(ours) <= 2 err(the same formulas in plain torch, same dtype) + slack, against float64."""
    truth = results(reference, *map(double, (x, g, p)), grid)
    usual, ours = (results(one, x, g, p, grid) for one in (reference, dispatch.passes(x)))
    for one, same, right, drift in zip(ours, usual, truth, drifts(x, p, g, grid), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (same.shape, same.dtype, same.stride())
        off, known = ((t.double() - right).abs().max() for t in (one, same))
        allowed = 2 * known + SLACK[x.dtype] * right.abs().max() + drift.to(known)
        assert off <= allowed, f"{off:.2e} of {right.abs().max():.2e}, torch {known:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("name", CASES)
def test_every_grid(name, anchor, dtype, kernels):
    assert_as_good_as_torch(*problem(name, dtype, kernels, 3, anchor))


@pytest.mark.parametrize("kind", ["first", "last", "words", "sliced", "turned", "expanded"])
@pytest.mark.parametrize("channels", [1, 3, 8, 21])
def test_every_layout(channels, kind, kernels):
    """Other channels beside those of the image may hold NaN, and are not looked at."""
    x, g, p, grid = problem("3-D, any", torch.float32, kernels, channels)

    def laid_out(t):
        if kind == "last":
            return t.movedim(1, -1).contiguous().movedim(-1, 1)
        if kind == "words":
            return layout.empty(tuple(t.shape), t.dtype, t.device).copy_(t)
        if kind == "sliced":
            nan = torch.full_like(t, float("nan"))
            return torch.cat([nan, t, nan], 1)[:, channels : 2 * channels]
        if kind == "turned":  # dense, but its voxels have no common stride
            return t.mT.contiguous().mT
        return t[:, :, :1, :1, :1].expand(t.shape) if kind == "expanded" else t

    assert_as_good_as_torch(laid_out(x), laid_out(g), p, grid)


@pytest.mark.parametrize("activation", ["identity", "relu", "prelu"])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_pending(full, activation, kernels):
    x, g, p, grid = problem("2-D, mixed", torch.float32, kernels, 5, full=full)
    slope = torch.rand(2, 5).to(kernels) if activation == "prelu" else None
    p = p._replace(activation=Activation(activation), slope=slope)
    assert_as_good_as_torch(x, g, p, grid)


def test_zeros_surround_what_is_pending(kernels):
    """Edges mix with 0, not with what the transform makes of it."""
    x, one = torch.ones(1, 1, 4, device=kernels), torch.ones(1, 1, device=kernels)
    p = Prologue(one, one, Activation("relu"), None, one, one)  # 1 to 3, 0 to 2
    y = dispatch.passes(x).resize(x, p, (8,), grid_of((4,), (8,), "edge"))
    assert y.flatten().tolist() == [2.25, *[3] * 6, 2.25]


def test_nan_stays_where_it_is(kernels):
    x, g = torch.ones(1, 1, 6, device=kernels), torch.ones(1, 1, 12, device=kernels)
    x[..., 2], g[..., 5] = float("nan"), float("nan")
    y, dz = results(dispatch.passes(x), x, g, NOTHING, grid_of((6,), (12,), "edge"))
    assert y.isnan().flatten().nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert dz.isnan().flatten().nonzero().flatten().tolist() == [2, 3]


def test_offsets_beyond_31_bits(kernels, monkeypatch):
    """The kernels that such samples take, on a small one; and more voxels than they can count."""
    monkeypatch.setattr(tile, "is_wide", lambda *images: True)
    arguments = problem("3-D, any", torch.float32, kernels)
    assert_as_good_as_torch(*arguments)
    from cassetta.kernels import resize

    monkeypatch.setattr(resize, "_is_beyond", lambda *sizes: True)
    assert_as_good_as_torch(*arguments)


def test_many_tiles(kernels):
    """More voxels than a tile has, more channels than one has."""
    size, length = (30, 20), (60, 40)
    x, g = (torch.randn(1, 70, *s).to(kernels) for s in (size, length))
    assert_as_good_as_torch(x, g, NOTHING, grid_of(size, length, "edge"))


def test_an_empty_batch(kernels):
    x, g, _, grid = problem("2-D, mixed", torch.float32, kernels)
    for out in results(dispatch.passes(x), x[:0], g[:0], NOTHING, grid):
        assert out.shape[0] == 0


def test_the_same_input_gives_the_same_bits(kernels):
    arguments = problem("3-D, any", torch.float32, kernels)
    one, two = (results(dispatch.passes(arguments[0]), *arguments) for _ in range(2))
    assert all(map(torch.equal, one, two))


def axes():
    """Sizes, lengths and anchors: random, whole factors, and nearly whole ones."""
    draw = random.Random(0)
    for _ in range(400):
        size = draw.choice([1, 2, 3, draw.randint(1, 40), draw.randint(1, 3000)])
        factor = draw.choice([1, 2, 3, 5, 1 / 2, 1 / 3, 1 / 7, 1.5, 10 ** draw.uniform(-1, 1)])
        length = max(1, int(size * factor) + draw.choice([0, 0, 0, 1, -1]))
        yield size, length, draw.choice([factor, length / size]), draw.choice(ANCHORS)


def test_no_output_is_missed():
    """The range that backward visits holds every output that sees a voxel by more than nothing,
    whether products and sums are rounded once or twice; and is no longer than it must be."""
    reach = pytest.importorskip("cassetta.kernels.resize").reach
    exact = {"dtype": torch.float64}
    for size, length, factor, anchor in axes():
        ((shift,), (step,), (start,)) = linear_grid([size], [length], [factor], anchor)
        rate, offset, taps = reach(size, length, shift, step, start)
        i, j = torch.arange(length, **exact), torch.arange(size, **exact)
        true = splines.hats((i + shift) * step + start, size)
        narrow = [torch.tensor(t).float() for t in (step, start, rate, offset)]
        step_32, start_32, rate_32, offset_32 = narrow
        moved = (i + shift).float()
        for fused in (False, True):
            if fused:  # what float64 computes exactly, but for its own rounding
                p = (moved.double() * step_32.double() + start_32.double()).float()
                first = (j * rate_32.double() + offset_32.double()).float()
            else:
                p, first = moved * step_32 + start_32, j.float() * rate_32 + offset_32
            seen = (splines.hats(p, size) > 0) & (true > 1e-8)
            first = first.ceil().double().clamp(min=0)
            apart = i[:, None] - first
            missed = seen & ~((apart >= 0) & (apart < taps))
            assert not missed.any(), (size, length, factor, anchor)
        needed = ((true > 1e-8).sum(0)).max().item()
        assert taps <= max(needed, 1) + 2, (size, length, factor, anchor)


@pytest.mark.parametrize(
    ("factor", "anchor", "taps"),
    [(2, "edge", 4), (3, "edge", 5), (1, "edge", 1), (1 / 2, "edge", 1), (1 / 3, "edge", 1),
     (2, "first", 3), (1 / 2, "first", 1), (1.5, "edge", 4)],
)  # fmt: skip
def test_ranges_are_short(factor, anchor, taps):
    reach = pytest.importorskip("cassetta.kernels.resize").reach
    length = int(96 * factor)
    (where,) = zip(*linear_grid([96], [length], [factor], anchor), strict=True)
    assert reach(96, length, *where).taps == taps


@pytest.mark.parametrize("scale", [{"factor": [0.5, 2, 1.5]}, {"shape": [3, 8, 20]}], ids=str)
@pytest.mark.parametrize("anchor", [*ANCHORS, ["edge", "center"]], ids=str)
def test_the_reference_is_interpolation_axis_by_axis(anchor, scale):
    """The numbers of torch-interpol, which tests of `functional.resize` compare with."""
    if anchor in ("first", "last"):
        scale = {**scale, "factor": [0.5, 2, 1.5]}
    x = torch.randn(2, 3, 7, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = functional.resize(x, anchor=anchor, **scale)
    size = tuple(expected.shape[2:])
    zooms = scale.get("factor") or [b / a for a, b in zip(x.shape[2:], size, strict=True)]
    grid = linear_grid(x.shape[2:], size, zooms, anchor)
    assert_near(reference.resize(x.detach(), NOTHING, size, grid), expected.detach())
    g = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(expected, x, g)
    assert_near(reference.resize_dgrad(g, tuple(x.shape[2:]), grid), dx)


def test_the_gradient_is_the_adjoint():
    draw = random.Random(0)
    for dims, anchor in itertools.product((1, 2, 3), ANCHORS):
        size, length = ([draw.randint(1, 12) for _ in range(dims)] for _ in range(2))
        grid = grid_of(size, length, anchor)
        x, g = (torch.randn(2, 2, *s, dtype=torch.float64) for s in (size, length))
        y, dz = results(reference, x, g, NOTHING, grid)
        assert_near((y * g).sum(), (x * dz).sum(), tolerance=1e-9)  # a sum that may cancel


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("first", [False, True])
def test_a_pending_transform_is_interpolated_with_its_gradients(first, norm):
    """Norm and activation in either order: plain modules and `functional.resize`."""
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    gamma, beta = torch.randn(2, 4, dtype=torch.float64).unbind()
    parameters = x, gamma.requires_grad_(), beta.requires_grad_()
    normalize = nn.functional.instance_norm if norm == "instance" else nn.functional.batch_norm

    def norm_of(t):
        if norm == "instance":
            return normalize(t, weight=gamma, bias=beta)
        return normalize(t, None, None, gamma, beta, training=True)

    silu = nn.functional.silu
    z = norm_of(silu(x)) if first else silu(norm_of(x))
    expected = functional.resize(z, factor=[2, 1.5])
    g = torch.randn_like(expected)
    size = tuple(expected.shape[2:])
    with dispatch.fused_on_reference(), NothingRead():
        pending = Deferred(x)
        if first:
            pending = pending.activated(Activation("silu"))
        pending = pending.normalized(Normalization(gamma, beta, 1e-5, Pool(norm)))
        if not first:
            pending = pending.activated(Activation("silu"))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            handle = pending.read().x
            before = len(saved)
            out = resize_deferred(pending, size, linear_grid((5, 6), size, (2, 1.5), "edge"))
        assert len(saved) == before  # nothing is kept for it
        assert out.grad_fn.next_functions[0][0] is handle.grad_fn
        ours = torch.autograd.grad(out, parameters, g, retain_graph=True)
        again = torch.autograd.grad(out, x, g.clone().requires_grad_(), create_graph=True)[0]
    assert_near(out.detach(), expected.detach())
    for one, other in zip(ours, torch.autograd.grad(expected, parameters, g), strict=True):
        assert_near(one, other)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        again.sum().backward()


def test_a_residual_is_added_first():
    x, r = torch.randn(2, 1, 2, 5, dtype=torch.float64)
    grid = grid_of((5,), (10,), "edge")
    with dispatch.fused_on_reference():
        out = resize_deferred(Deferred(x).plus(r), (10,), grid)
    assert_near(out, functional.resize(x + r, factor=[2]))


def test_autocast_does_not_round_the_image():
    x, grid = torch.randn(1, 2, 5, 6), grid_of((5, 6), (10, 12), "edge")
    with dispatch.fused_on_reference():
        expected = resize_deferred(Deferred(x), (10, 12), grid)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resize_deferred(Deferred(x), (10, 12), grid), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_break(dynamic):
    def run(x):
        old = tuple(x.shape[2:])
        size = tuple(2 * n for n in old)
        return resize_deferred(Deferred(x), size, linear_grid(old, size, (2, 2), "edge"))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with dispatch.fused_on_reference():
        for size in ((5, 6), (7, 4)):
            x = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
            out, expected = compiled(x), run(x)
            assert_near(out.detach(), expected.detach())
            g = torch.randn_like(expected)
            ours, theirs = (torch.autograd.grad(y, x, g)[0] for y in (out, expected))
            assert_near(ours, theirs)
