"""Convolutions that march along D (`conv_march`). They are written in Gluon, for sm_90, which is
compiled, and not interpreted: on a GPU, or in the simulator (`pytest --simulate 90`)."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, RUNNER
from test_convolutions import assert_as_good_as_torch, case, double, drawn
from test_pairwise import pairs

from cassetta.explanation import Explanation
from cassetta.kernels import boxes, dispatch, layout, lines, machine, plans, reference
from cassetta.kernels.geometry import along_depth, walk
from cassetta.kernels.plans import MarchPlan, Product
from cassetta.kernels.types import NOTHING, Activation, Geometry

tile = pytest.importorskip("cassetta.kernels.tile")  # where there is no triton
CHANNELS = (1, 5, 8, 13, 16, 21, 24, 30, 32)
DTYPES = (torch.bfloat16, torch.float16)
DILATIONS = (1, 2, 5, 16)
SIZES = ((4, 5, 37), (9, 41), (3, 3, 3), (13, 6, 18))


@pytest.fixture
def marches(request, kernels, monkeypatch):
    """The configurations of all marches that are started."""
    simulated = RUNNER == "simulator" and request.config.getoption("--simulate") == 90
    if not simulated and (DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("marches are for sm_90, compiled")
    found, launch = [], tile.launch

    def spy(kernel, x, config, *args, **constants):
        if isinstance(config, lines.MarchConfig):
            found.append(config)
        launch(kernel, x, config, *args, **constants)

    monkeypatch.setattr(tile, "launch", spy)
    with plans.use_plan(MarchPlan()):
        yield found


def geometry_of(axes, dilation):
    return Geometry((1,) * axes, ((dilation, dilation),) * axes, (dilation,) * axes)


def problem(device, dtype, shape, more, dilation=1, taps=None, padding=None, activation="silu"):
    """What the passes work on, in words; beside channels, there is NaN."""
    axes = len(shape) - 2
    made = case(shape, more, taps or (3,) * axes, (dilation,) * axes, padding)
    q = drawn(made, dtype, device, activation=activation)
    for name in "x", "g":
        image = q[name] = layout.in_words(q[name])
        if layout.is_padded(image):
            (last,) = image.new_empty(0).set_(image.untyped_storage())[-1:]
            assert last.isnan()
    return q


def results(passes, q):
    """With moments; with an epilogue; both gradients of the image, one with the sums of a norm."""
    x, g, w, b, geometry = q["x"], q["g"], q["w"], q["b"], q["geometry"]
    size = tuple(x.shape[2:])
    y, mean, var = passes.conv_fprop(x, NOTHING, w, b, geometry, moments_of=Activation("relu"))
    after, *_ = passes.conv_fprop(x, NOTHING, w, None, geometry, epilogue=q["e"])
    dz, _ = passes.conv_dgrad(g, w, geometry, size)
    also, sums = passes.conv_dgrad(g, w, geometry, size, x, q["of_x"], q["centre"], True)
    return {"y": y, "mean": mean, "var": var, "after": after, "dz": dz, "also": also, "sums": sums}


def assert_right(q):
    assert_as_good_as_torch(dispatch.passes(q["x"]), q, results)


@pytest.mark.parametrize(
    ("channels", "dtype", "dilation", "size"),
    [*pairs(CHANNELS, DTYPES, DILATIONS, SIZES)],
    ids=lambda value: str(value),
)
def test_pairs(channels, dtype, dilation, size, kernels, marches):
    """Of odd sizes, so that no tile divides them."""
    more = CHANNELS[-1 - CHANNELS.index(channels)]  # few to many, and many to few
    assert_right(problem(kernels, dtype, (1, channels, *size), more, dilation))
    assert len(marches) == 4


CASES = {
    "unpadded": ((2, 21, 7, 6, 20), 16, 2, None, ((0, 0),) * 3),
    "padded by hand": ((1, 21, 5, 6, 21), 24, 1, None, ((2, 0), (0, 3), (3, 0))),
    "padded far": ((1, 8, 3, 4, 9), 8, 2, None, ((7, 1), (4, 4), (9, 5))),
    "no taps along H": ((2, 24, 9, 5, 19), 21, 1, (3, 1, 3), ((1, 1), (0, 0), (1, 1))),
    "one line": ((1, 13, 40, 1, 33), 13),
    "one plane": ((3, 21, 1, 12, 33), 21),
    "many planes": ((1, 5, 220, 2, 9), 5),
    "a single voxel": ((2, 5, 1, 1, 1), 21),
    "two axes, unpadded": ((2, 21, 33, 9), 21, 4, None, ((0, 0),) * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name, kernels, marches):
    assert_right(problem(kernels, torch.bfloat16, *CASES[name], activation="prelu"))
    assert len(marches) == 4
    assert name != "many planes" or marches[0].parts > 1


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "gelu", "mish"])
def test_epilogues(activation, kernels, marches):
    assert_right(problem(kernels, torch.float16, (1, 21, 4, 3, 20), 30, activation=activation))
    assert len(marches) == 4


def test_offsets_beyond_31_bits(kernels, marches, monkeypatch):
    monkeypatch.setattr(tile, "is_wide", lambda *images: True)
    assert_right(problem(kernels, torch.bfloat16, (2, 21, 5, 4, 20), 21, 2))
    assert len(marches) == 4


def test_parts_without_voxels_weigh_nothing(kernels, marches):
    """Of two lattices along D, the shorter has a last part without planes: 64 tiles, a whole block
    of the stage that combines them."""
    x = torch.randn(1, 5, 37, 64, 64)
    w = torch.randn(8, 5, 3, 3, 3) / 12
    x, w = x.to(kernels, torch.bfloat16), w.to(kernels, torch.bfloat16)
    y, mean, var = dispatch.passes(x).conv_fprop(
        x, NOTHING, w, None, geometry_of(3, 2), moments_of=Activation()
    )
    (config,) = marches
    longest, shorter = 19, 18
    assert (config.parts - 1) * config.part >= shorter > (config.parts - 2) * config.part
    assert config.parts * config.part >= longest
    assert config.tiles >= 64
    stored = y.double().flatten(2)
    torch.testing.assert_close(mean.double(), stored.mean(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(var.double(), stored.var(2, correction=0), rtol=1e-5, atol=0)


def test_what_a_march_covers():
    """Not an image without voxels, nor planes whose offsets have more than 31 bits."""
    steps = walk((1, 5, 5), (3, 3, 3), geometry_of(3, 1))
    assert lines.are_covered(1, steps, 24)
    assert not lines.are_covered(1, steps._replace(out=(0, 5, 5)), 24)
    assert not lines.are_covered(0, steps, 24)
    large = walk((4, 9000, 9000), (3, 3, 3), geometry_of(3, 1))
    assert lines.are_covered(1, large, 24)
    assert not lines.are_covered(1, large, 32)


def test_moments_are_of_what_is_stored(kernels, marches):
    """Near 700, values are rounded to halves; and a constant channel has no variance."""
    x, w = torch.randn(1, 8, 30, 6, 40), torch.randn(16, 8, 3, 3, 3) / 20
    w[5], b = 0, torch.full((16,), 700.0)
    x, w, b = (t.to(kernels, torch.float16) for t in (x, w, b))
    same = geometry_of(3, 1)
    y, mean, var = dispatch.passes(x).conv_fprop(x, NOTHING, w, b, same, moments_of=Activation())
    stored, near = y.double().flatten(2), (2 * 700 * 2**-24) ** 2  # of a mean that was rounded
    torch.testing.assert_close(mean.double(), stored.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), stored.var(2, correction=0), rtol=1e-4, atol=near)
    assert len(marches) == 1


def test_what_no_tap_reads_is_not_read(kernels, marches):
    """A NaN of one voxel reaches those that read it, and no other."""
    x = torch.randn(1, 5, 7, 6, 40)
    x[0, 3, 3, 2, 17] = float("nan")
    w, same = torch.randn(8, 5, 3, 3, 3), geometry_of(3, 2)
    x, w = x.to(kernels, torch.bfloat16), w.to(kernels, torch.bfloat16)
    y, *_ = dispatch.passes(x).conv_fprop(x, NOTHING, w, None, same)
    truth, *_ = reference.conv_fprop(x, NOTHING, w, None, same)
    assert torch.equal(y.isnan(), truth.isnan())
    assert truth.isnan().sum() == 8 * 27


def test_the_same_input_gives_the_same_bits(kernels, marches):
    q = problem(kernels, torch.bfloat16, (1, 21, 5, 4, 20), 21)
    one, two = (results(dispatch.passes(q["x"]), q) for _ in range(2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0)


def test_what_a_march_does_not_cover_is_gathered(kernels, marches):
    """A pending transform, a second image, a residual, though a march was asked for."""
    q = problem(kernels, torch.bfloat16, (1, 8, 4, 3, 20), 8)
    x, w, geometry = q["x"], q["w"], q["geometry"]
    calls = {
        "pending": (x, q["of_x"], w, None, geometry),
        "two": (x, NOTHING, torch.cat((w, w), 1), None, geometry, x),
        "residual": (x, NOTHING, w, None, geometry, None, NOTHING, q["g"]),
    }
    for given in calls.values():
        y, *_ = dispatch.passes(x).conv_fprop(*given)
        truth, *_ = reference.conv_fprop(*map(double, given))
        assert (y.double() - truth).abs().max() <= 2**-7 * truth.abs().max()
    assert not marches


def model(config, steps):
    """What the rows of all tiles of a plane are, as `conv_march._voxels` finds them."""
    index = torch.arange(config.tiles)[:, None]
    m = torch.arange(config.block_m)[None]
    split, line = index % config.splits, index // config.splits
    line = line * (config.block_m // config.places) + m // config.places
    lane = m % config.places
    place = split * (config.places - 2 * config.shift) + lane
    y1, q = line // config.phases, config.low + line % config.phases + place * config.phases
    y2 = q + steps.before[2] - steps.dilation[2]
    first = torch.where(split > 0, config.shift, 0)
    last = torch.where(split < config.splits - 1, config.shift, 0)
    mine = (place < config.length) & (y1 < steps.out[1]) & (y2 >= 0) & (y2 < steps.out[2])
    return y1, y2, q, lane, mine & (lane >= first) & (lane < config.places - last)


@pytest.mark.parametrize("far", [1, 2, 3, 5, 16, 31])
@pytest.mark.parametrize("wide", [1, 3, 9, 18, 37, 64, 100, 256])
@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (3, 0), (0, 40), "same"])
def test_tiles_cover_a_plane(wide, far, padding):
    """Each voxel of the result is one tile's own, and in it are all that its taps see, a shift
    apart; programs along D cover all planes, too."""
    padding = (far, far) if padding == "same" else padding
    geometry = Geometry((1,) * 3, ((far, far), (1, 1), padding), (far, 1, far))
    if geometry.size_of((wide, 5, wide), (3, 3, 3))[2] < 1:
        pytest.skip("nothing is left")
    steps = along_depth(walk((wide, 5, wide), (3, 3, 3), geometry))
    config = lines.marching(MarchPlan(), 1, steps, 21)
    y1, y2, q, lane, mine = model(config, steps)
    voxels = (y1 * steps.out[2] + y2)[mine]
    assert torch.equal(voxels.sort().values, torch.arange(steps.out[1] * steps.out[2]))
    tiles, rows = mine.nonzero(as_tuple=True)
    for by in -config.shift, config.shift:
        there = (lane[tiles.clamp(max=0), rows] + by >= 0) & (lane[0, rows] + by < config.places)
        sees = q[tiles, rows] + (far if by > 0 else -far)
        met = q[tiles[there], rows[there] + by]
        assert torch.equal(met, sees[there])
        beyond = sees[~there]
        assert ((beyond < 0) | (beyond >= wide)).all()
    planes = [
        lattice + step * far
        for lattice, part in itertools.product(range(config.lattices), range(config.parts))
        for step in range(part * config.part, (part + 1) * config.part)
        if lattice + step * far < steps.out[0]
    ]
    assert sorted(planes) == [*range(steps.out[0])]
    assert config.programs == config.chunks == config.tiles * config.lattices * config.parts
    assert config.shift <= config.places


def product(shape=(1, 21, 9, 9, 9), channels=21, taps=(3, 3, 3), dtype=torch.bfloat16, stride=1):
    axes = len(taps)
    geometry = Geometry((stride,) * axes, ((1, 1),) * axes, (1,) * axes)
    return Product("conv_fprop", shape, channels, taps, geometry, dtype)


def test_what_marches(hopper, monkeypatch):
    monkeypatch.setattr(boxes, "are_copied", lambda device: True)
    device = torch.device("cuda")
    assert product().marches
    assert product((1, 5, 9, 9), 32, (3, 3)).marches
    assert product(taps=(3, 1, 3)).marches
    others = [
        product((1, 33, 9, 9, 9)), product(channels=40), product(dtype=torch.float32),
        product(stride=3), product(taps=(1, 3, 3)), product(taps=(3, 5, 3)),
        product((1, 5, 9), 5, (3,)), product()._replace(name="conv_wgrad"),
    ]  # fmt: skip
    assert not any(one.marches for one in others)
    assert all(MarchPlan() not in plans.candidates(one, device) for one in others)
    assert MarchPlan() in plans.candidates(product(), device)
    monkeypatch.setattr(machine, "known", lambda device: None)  # a CPU
    assert MarchPlan() not in plans.candidates(product(), device)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as plans are concerned."""
    gpu = machine.Gpu("", (9, 0), 0, 0, 232_448)
    monkeypatch.setattr(machine, "known", lambda device: gpu)
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: None)
    return SimpleNamespace(
        replace=lambda **new: monkeypatch.setattr(
            machine, "known", lambda device: gpu._replace(**new)
        )
    )


def test_where_it_is_offered(hopper, monkeypatch):
    """First, on 9.0, if this triton compiles it; and never where products are mma.sync."""
    device = torch.device("cuda")
    monkeypatch.setattr(boxes, "are_copied", lambda device: True)
    assert plans.candidates(product(), device)[0] == MarchPlan()
    assert plans.fitting(product(), device, False) == plans.GEMM_PLANS  # of a launch not covered
    assert MarchPlan().shared(2) <= 232_448
    for capability in (8, 0), (8, 9), (10, 0), (12, 0):
        hopper.replace(capability=capability)
        assert MarchPlan() not in plans.fitting(product(), device, True)
        assert "wgmma" in plans.why_no_march(product(), capability)
    hopper.replace(capability=(9, 0))
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: "triton 3.9 does not")
    assert plans.fitting(product(), device, True) == plans.GEMM_PLANS


def test_a_triton_that_does_not_compile_it_is_told(monkeypatch):
    """By the last line of what it raises, or by what is wrong with what it makes."""
    if RUNNER == "interpreter":
        pytest.skip("Gluon cannot be imported where kernels are interpreted")
    march = importlib.import_module("cassetta.kernels.conv_march")

    def fails(*given):
        raise ValueError("at 3:4:\n  footprint exceeds the source view")

    check = plans._why_not_compiled.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(march, "compiled", fails)
        assert "(ValueError: footprint exceeds the source view)" in check(3, 24, 24)
        patch.setattr(march, "compiled", lambda *given: SimpleNamespace(excess="8 bytes spill"))
        assert "(8 bytes spill)" in check(3, 24, 24)
    assert check(3, 24, 24) is None


def test_a_gradient_goes_the_other_way(hopper, monkeypatch):
    """It reads as many channels as the convolution returns: what is compiled for it is another."""
    asked = []
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: asked.append(given))
    one = product((1, 21, 9, 9, 9), 32, (3, 1, 3))
    for name in "conv_fprop", "conv_dgrad":
        plans.fitting(one._replace(name=name), torch.device("cuda"), True)
    plans.fitting(product((1, 5, 9, 9), 13, (3, 3)), torch.device("cuda"), True)
    assert asked == [(1, 24, 32), (1, 32, 24), (1, 8, 16)]


def test_explain_tells_where_it_is_not_offered(hopper, monkeypatch):
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: "triton 3.9 does not")
    found = plans.declined([product(), product(dtype=torch.float32)], torch.device("cuda"))
    assert found == {f"{MarchPlan()}, conv_fprop of 21 to 21 channels": "triton 3.9 does not"}
    shown = str(Explanation([], {}, found))
    assert "not offered: a march along D, 64 places, conv_fprop of 21 to 21 channels" in shown
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: None)
    assert plans.declined([product()], torch.device("cuda")) == {}
