"""Our own convolutions against float64: right to rounding, in every geometry, layout and dtype."""

import contextlib

import pytest
import torch
from conftest import RUNNER, large_tiles, need_boxes

from cassetta.kernels import configs, dispatch, layout, plans, reference
from cassetta.kernels.geometry import walk
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue

from compare import assert_near

tile = pytest.importorskip("cassetta.kernels.tile")  # where there is no triton

# numpy says when exp overflows, which leads to the right limits
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if RUNNER != "interpreter" else [])

PRECISIONS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
}  # fmt: skip
"""In which kernels multiply, and the dtypes of what they read."""

SLACK = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""On the scale of the largest value: 32 eps for sums in float32 in another order, 2 eps where the
result is rounded to half (and 2 more where a sum is of rounded values)."""


def same(taps, dilation):
    return tuple(
        (d * (t - 1) // 2, d * (t - 1) - d * (t - 1) // 2)
        for t, d in zip(taps, dilation, strict=True)
    )


def case(shape, channels, taps, dilation=None, padding=None, stride=None):
    """An image (N, C, *X), what it becomes, and how; padded to its own size if not said."""
    ones = (1,) * len(taps)
    dilation, stride = dilation or ones, stride or ones
    padding = same(taps, dilation) if padding is None else padding
    return shape, channels, taps, Geometry(stride, padding, dilation)


CASES = {
    "meshnet 21, dilation 2": case((2, 21, 6, 5, 9), 21, (3, 3, 3), (2, 2, 2)),
    "five channels, dilation 16": case((1, 5, 34, 3, 4), 5, (3, 3, 3), (16, 16, 16)),
    "mindgrab 15, dilation 4": case((1, 15, 4, 9, 10), 15, (3, 3, 3), (4, 4, 4)),
    "meshnet 26": case((1, 26, 7, 8), 26, (3, 3), (3, 1)),
    "thirty channels, dilation 31": case((1, 30, 70), 30, (3,), (31,)),
    "first layer": case((2, 1, 5, 6, 7), 16, (3, 3, 3)),
    "three channels, five taps": case((2, 3, 11, 13), 8, (5, 5)),
    "seven taps": case((1, 8, 40), 24, (7,)),
    "even taps": case((2, 8, 9, 7), 12, (2, 4), (1, 2)),
    "six taps by one": case((1, 4, 9, 8), 4, (6, 1)),
    "padded by hand": case((2, 8, 6, 7), 8, (3, 3), padding=((2, 0), (0, 3))),
    "unpadded": case((1, 16, 7, 8, 9), 8, (3, 3, 3), padding=((0, 0),) * 3),
    "more channels than a tile": case((1, 140, 17), 150, (3,)),
    "one tap, padded": case((2, 8, 5, 7), 8, (3, 1), padding=((1, 1), (1, 0))),
    "one tap, far": case((1, 8, 4, 9), 8, (3, 1), (1, 20), padding=((1, 1), (1, 2))),
    "one tap": case((2, 24, 5, 6, 7), 40, (1, 1, 1)),
    "halved": case((2, 8, 8, 6, 4), 20, (2, 2, 2), padding=((0, 0),) * 3, stride=(2, 2, 2)),
    "halved, odd sizes": case((1, 21, 9, 7), 8, (2, 2), padding=((0, 0),) * 2, stride=(2, 2)),
    "uneven stride": case((1, 8, 9, 8), 8, (3, 2), padding=((0, 0),) * 2, stride=(3, 2)),
    "a single voxel": case((3, 4, 1, 1, 1), 6, (3, 3, 3)),
}  # fmt: skip


def problem(name, *how, **more):
    return drawn(CASES[name], *how, **more)


def drawn(made, dtype, device, pending=False, activation="silu"):
    """All that the passes work on in a case, drawn after rounding to the dtype."""
    shape, k, taps, geometry = made
    n, c, *size = shape
    out = geometry.size_of(size, taps)
    draw = lambda *s: torch.randn(s, dtype=torch.float64).to(device, dtype)  # noqa: E731
    table = lambda c: torch.randn(n, c).to(device)  # noqa: E731

    def transform(c):
        slope = table(c) if activation == "prelu" else None
        act = Activation(activation, 0.2)  # (of a leaky ReLU, the slope)
        return Prologue(table(c), table(c), act, slope, table(c), table(c))

    scale = (c * torch.Size(taps).numel()) ** -0.5
    return {
        "x": draw(*shape), "x2": draw(n, 5, *size), "g": draw(n, k, *out), "r": draw(n, k, *out),
        "w": (draw(k, c, *taps) * scale), "w2": draw(k, 5, *taps) * scale, "b": draw(k),
        "coarse": draw(n, k, *out), "b2": draw(c), "geometry": geometry, "centre": table(c),
        "p": transform(c) if pending else NOTHING, "of_x": transform(c), "e": transform(k),
    }  # fmt: skip


def results(passes, q):
    """All that the passes compute of it, by name."""
    x, w, g, geometry = q["x"], q["w"], q["g"], q["geometry"]
    taps, size = tuple(w.shape[2:]), tuple(x.shape[2:])
    out = {}
    y, mean, var = passes.conv_fprop(x, q["p"], w, q["b"], geometry, moments_of=Activation("relu"))
    out |= {"y": y, "mean": mean, "var": var}
    both = torch.cat([w, q["w2"]], 1)
    y, mean, _ = passes.conv_fprop(x, q["p"], both, None, geometry, q["x2"], q["e"], q["r"])
    assert mean.numel() == 0
    out["y of two, epilogue"] = y
    dz, sums = passes.conv_dgrad(g, w, geometry, size, None, q["of_x"], None, True)
    assert sums.numel() == 0
    out["dz"] = dz
    for after in (False, True):
        dz, sums = passes.conv_dgrad(g, w, geometry, size, x, q["of_x"], q["centre"], after)
        out |= {f"dz, {after}": dz, f"sums, {after}": sums}
    out["dw"] = passes.conv_wgrad(g, x, q["p"], taps, geometry)
    if geometry.stride == taps:
        z = passes.conv_transposed(q["coarse"], q["e"], w, q["b2"], geometry)
        out["transposed"] = z
        r = z.float().sin().to(z.dtype)
        out["transposed, epilogue"] = passes.conv_transposed(
            q["coarse"], NOTHING, w, None, geometry, q["of_x"], r
        )
    return out


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return Prologue(*map(double, value)) if isinstance(value, Prologue) else value


def assert_as_good_as_torch(passes, q, results=results):
    """Of all `results`, against float64: err(ours) <= 2 err(the same formulas in plain torch) +
    slack."""
    truth = results(reference, {name: double(value) for name, value in q.items()})
    usual, ours = results(reference, q), results(passes, q)
    for name, expected in truth.items():
        kinds = [(t.shape, t.dtype, t.stride()) for t in (ours[name], usual[name])]
        assert kinds[0] == kinds[1], name
        scale = expected.abs().max().item() if expected.numel() else 0.0
        off, known = ((one[name].double() - expected).abs().max() for one in (ours, usual))
        allowed = 2 * known + SLACK[q["x"].dtype] * max(scale, 1e-3)
        assert off <= allowed, f"{name}: {off:.2e} of {scale:.2e}, torch {known:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype, kernels):
    """By tiles of the first plan, and, in float32, by larger ones."""
    q = problem(name, dtype, kernels, pending=dtype is torch.float32)
    with large_tiles() if dtype is torch.float32 else contextlib.nullcontext():
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "gelu", "prelu"])
def test_activations_before_and_after(activation, kernels):
    q = problem("one tap", torch.float16, kernels, True, activation)
    assert_as_good_as_torch(dispatch.passes(q["x"]), q)


@pytest.mark.parametrize("layout", ["first", "last", "of a larger image"])
def test_images_in_any_layout(layout, kernels):
    """Other channels beside those of the image may hold NaN, and are not looked at."""
    q = problem("meshnet 26", torch.float32, kernels)
    for name in ("x", "x2", "g", "r"):
        image = q[name]
        if layout == "of a larger image":  # whose voxels begin at a multiple of 8 channels
            c = image.shape[1]
            larger = torch.full((image.shape[0], *image.shape[2:], c + 8 + -c % 8), float("nan"))
            q[name] = larger.to(kernels)[..., :c].movedim(-1, 1).copy_(image)
        elif layout == "last":
            q[name] = _last(image)
    assert_as_good_as_torch(dispatch.passes(q["x"]), q)


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 8, 4, 4), (2, 21, 3, 4, 5)])
def test_whole_words(shape):
    x = layout.empty(shape, torch.float16, "cpu")
    c = shape[1]
    assert x.shape == shape
    assert layout.is_in_words(x)
    assert layout.is_padded(x) == (c % 8 != 0)
    assert layout.like(x, torch.float32).stride() == x.stride()
    assert not layout.is_in_words(torch.empty(shape, dtype=torch.float16))
    assert not layout.is_in_words(x[:, 1:])
    assert layout.in_words(x) is x
    dense = torch.randn(shape)
    torch.testing.assert_close(layout.in_words(dense), dense, rtol=0, atol=0)


def test_the_last_word_of_a_storage_is_whole_or_not_read():
    """An image of 21 channels in a storage that ends with the 21st of the last voxel."""
    whole = torch.zeros(4 * 24)
    x = torch.as_strided(whole[:-3].clone(), (1, 21, 4), (96, 1, 24))
    assert not layout.is_in_words(x)
    assert layout.is_in_words(torch.as_strided(whole, (1, 21, 4), (96, 1, 24)))


def test_offsets_beyond_31_bits(kernels, monkeypatch):
    """The kernels that such samples take, on a small one."""
    monkeypatch.setattr(tile, "is_wide", lambda *images: True)
    for name in ("meshnet 26", "halved"):
        q = problem(name, torch.float32, kernels, pending=True)
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)


def test_an_empty_batch(kernels):
    q = problem("even taps", torch.float32, kernels, pending=True)
    for name, value in q.items():
        if isinstance(value, Prologue):
            tables = (t[:0] if isinstance(t, torch.Tensor) else t for t in value)
            q[name] = Prologue(*tables)
        elif name in ("x", "x2", "g", "r", "coarse", "centre"):
            q[name] = value[:0]
    ours = results(dispatch.passes(q["x"]), q)
    assert_near(ours.pop("dw"), torch.zeros_like(q["w"]))
    for name, value in ours.items():
        assert value.shape[value.ndim == 3 and "sums" in name] == 0, name


@pytest.mark.parametrize(
    "name",
    ["meshnet 21, dilation 2", "more channels than a tile", "halved", "one tap, padded"],
)
def test_what_is_masked_lies_inside_too(name, kernels, monkeypatch):
    """Of operands, each lane has an address in the tensor: copies of nothing have accessed it."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if RUNNER != "interpreter":
        pytest.skip("the interpreter tells addresses; the simulator checks them itself")
    bounds, checked = [], []
    launch, load = tile.launch, interpreter.InterpreterBuilder.create_masked_load

    def launched(kernel, x, config, *args, **constants):
        storages = [t.untyped_storage() for t in args if isinstance(t, torch.Tensor)]
        bounds[:] = [(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages]
        launch(kernel, x, config, *args, **constants)

    def loaded(self, ptrs, mask, *rest):
        at = torch.from_numpy(ptrs.data.astype("int64"))
        first = at.flatten()[0].item()
        start, end = next((a, b) for a, b in bounds if a <= first < b)
        checked.append(bool(((start <= at) & (at < end)).all()))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(tile, "launch", launched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loaded)
    q = problem(name, torch.float32, kernels, pending=True)
    x, w, g, geometry = q["x"], q["w"], q["g"], q["geometry"]
    passes, both = dispatch.passes(x), torch.cat([w, q["w2"]], 1)
    with large_tiles():
        passes.conv_fprop(x, q["p"], both, None, geometry, q["x2"])
        passes.conv_dgrad(g, w, geometry, tuple(x.shape[2:]))
        for p in NOTHING, *[q["p"]] * (x.shape[1] % 8 == 0):  # (its tables are not copied ahead)
            passes.conv_wgrad(g, x, p, tuple(w.shape[2:]), geometry)
    assert checked
    assert all(checked)


@pytest.mark.parametrize("boxed", [False, True])
def test_moments_are_of_what_is_stored(boxed, kernels):
    """In half precision, near 700, values are rounded to halves: their variance is another."""
    if boxed:
        need_boxes()
    x, w = torch.randn(2, 8, 300), torch.randn(16, 8, 1) / 6
    x, w, b = (t.to(kernels, torch.float16) for t in (x, w, torch.full((16,), 700.0)))
    unit = Geometry((1,), ((0, 0),), (1,))
    with plans.use_plan(plans.GemmPlan(128, 64, 64, 3, boxed)):
        y, mean, var = dispatch.passes(x).conv_fprop(
            x, NOTHING, w, b, unit, moments_of=Activation()
        )
    stored = y.double()
    exact = torch.nn.functional.conv1d(x.double(), w.double(), b.double()).var(2, correction=0)
    truth = stored.var(2, correction=0)
    assert (exact / truth - 1).abs().mean() > 0.01  # so that the test can tell
    torch.testing.assert_close(mean.double(), stored.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), truth, rtol=1e-3, atol=0)


def test_the_same_input_gives_the_same_bits(kernels):
    q = problem("mindgrab 15, dilation 4", torch.float16, kernels)
    passes = dispatch.passes(q["x"])
    one, two = results(passes, q), results(passes, q)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0)


def test_what_no_tap_reads_is_not_read(kernels):
    """A NaN of a voxel that taps skip, of a channel beside an image, or of another channel."""
    x, g = torch.randn(1, 5, 40, 19), torch.randn(1, 6, 38, 1)
    x[:, :4, :, 1:9] = x[:, :4, :, 10:18] = float("nan")
    x[:, 4] = float("nan")
    valid = Geometry((1, 1), ((0, 0), (0, 0)), (1, 9))
    larger = torch.full((1, 40, 19, 8), float("nan"))
    larger[..., :5] = x.movedim(1, -1)
    for image in x, larger[..., :5].movedim(-1, 1):
        dw = dispatch.passes(x.to(kernels)).conv_wgrad(
            g.to(kernels), image.to(kernels), NOTHING, (3, 3), valid
        )
        truth = reference.conv_wgrad(g, image, NOTHING, (3, 3), valid)
        assert truth[:, 4].isnan().all()
        assert truth[:, :4].isfinite().all()
        torch.testing.assert_close(dw.cpu(), truth, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_weights_gather_what_programs_share(splits, kernels):
    """A sum over more voxels than one program visits, in order."""
    x, g = torch.randn(2, 8, 1500 * splits), torch.randn(2, 8, 1500 * splits)
    geometry = Geometry((1,), ((1, 1),), (1,))
    product = plans.Product("conv_wgrad", tuple(x.shape), 8, (3,), geometry, x.dtype)
    steps = walk(x.shape[2:], (3,), geometry)
    assert configs.wgrad(product, steps, x.device, False).splits >= splits
    dw = dispatch.passes(x.to(kernels)).conv_wgrad(
        g.to(kernels), x.to(kernels), NOTHING, (3,), geometry
    )
    truth = reference.conv_wgrad(g.double(), x.double(), NOTHING, (3,), geometry)
    scale = truth.abs().max().item()
    torch.testing.assert_close(dw.double().cpu(), truth, rtol=0, atol=4e-6 * scale)


@pytest.mark.parametrize("plan", [*plans.GEMM_PLANS, *plans.WGRAD_PLANS], ids=str)
def test_every_plan(plan, kernels):
    if plan.boxes:
        need_boxes()
    q = problem("meshnet 26", torch.float16, kernels)
    with plans.use_plan(plan):
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)


def _last(image):
    return image.movedim(1, -1).contiguous().movedim(-1, 1)
