"""Convolutions whose tiles are boxes, as newer GPUs copy them: as right as those that gather."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import need_boxes
from test_convolutions import CASES, assert_as_good_as_torch, problem

from cassetta.kernels import (
    boxes,
    configs,
    dispatch,
    evidence,
    layout,
    machine,
    plans,
    reference,
)
from cassetta.kernels.types import NOTHING, Geometry

tile = pytest.importorskip("cassetta.kernels.tile")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
PLAN = plans.GemmPlan(256, 64, 64, 3, True)
UNIT = Geometry((1,), ((1, 1),), (1,))


@pytest.fixture(autouse=True)
def _describable(request):
    if "kernels" in request.fixturenames:
        need_boxes()


@pytest.fixture
def launched(monkeypatch):
    """The boxes of all convolutions that are launched."""
    found, launch = [], tile.launch

    def spy(kernel, x, config, *args, **constants):
        if isinstance(config, configs.GemmConfig):
            found.append(config.box)
        launch(kernel, x, config, *args, **constants)

    monkeypatch.setattr(tile, "launch", spy)
    return found


SOME = [name for name in CASES if name not in ("first layer", "three channels, five taps")]
"""Others take the interpreter long."""


@pytest.mark.parametrize("name", SOME)
def test_every_case(name, kernels, launched):
    """Where a convolution strides, what it reads is no box; gradients of weights read none."""
    q = problem(name, torch.float32, kernels, pending=True)
    with plans.use_plan(PLAN):
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)
    strided = 2 if max(q["geometry"].stride) > 1 else 0
    gathered = strided if boxes.are_copied(kernels) else len(launched)
    assert len(launched) >= 5
    assert launched.count(boxes.NO_BOX) == gathered


def test_in_half_precision(kernels):
    q = problem("meshnet 26", torch.float16, kernels)
    with plans.use_plan(PLAN):
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)


def test_what_lies_beside_an_image_is_not_read(kernels):
    """Further channels of the same storage are NaN, and so are further voxels along an axis."""
    q = problem("meshnet 26", torch.float32, kernels)
    for name in ("x", "x2", "g", "r"):
        n, c, *size = q[name].shape
        larger = torch.full((n, size[0] + 2, *size[1:], c + 8 + -c % 8), float("nan"))
        inside = larger.to(kernels)[:, : size[0], ..., :c].movedim(-1, 1)
        q[name] = inside.copy_(q[name])
        assert boxes.strides(q[name]) is not None
    with plans.use_plan(PLAN):
        assert_as_good_as_torch(dispatch.passes(q["x"]), q)


def test_images_that_no_tensor_map_describes_are_gathered(kernels, launched):
    """One gradient for all samples, as that of a sum over them."""
    g = layout.empty((1, 8, 12), torch.float32, kernels).normal_().expand(3, -1, -1)
    assert layout.is_in_words(g)
    assert boxes.strides(g) is None
    w = torch.randn(8, 8, 3).to(kernels)
    with plans.use_plan(PLAN):
        dz, _ = dispatch.passes(g).conv_dgrad(g, w, UNIT, (12,))
    assert launched == [boxes.NO_BOX]
    truth, _ = reference.conv_dgrad(g.double(), w.double(), UNIT, (12,))
    torch.testing.assert_close(dz.double(), truth, rtol=0, atol=1e-5)


def test_moments_of_boxes_are_those_of_their_voxels(kernels, launched):
    """Boxes at the edges have fewer, some of them one; there are so many that stages combine."""
    x = (3 + torch.randn(2, 8, 33, 17, 9)).to(kernels)
    w = (torch.randn(16, 8, 1, 1, 1) / 3).to(kernels)
    unit = Geometry((1,) * 3, ((0, 0),) * 3, (1,) * 3)
    with plans.use_plan(plans.GemmPlan(64, 16, 16, 2, True)):
        y, mean, var = dispatch.passes(x).conv_fprop(
            x, NOTHING, w, None, unit, moments_of=reference.Activation()
        )
    assert (launched[0] != boxes.NO_BOX) == boxes.are_copied(kernels)
    values = y.double().flatten(2)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(var.double(), values.var(2, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("voxels", "size", "box"),
    [
        (128, (64, 64, 64), (4, 4, 8)),
        (128, (1, 64, 64), (1, 8, 16)),
        (128, (1, 1, 500), (1, 1, 128)),
        (64, (30, 30, 30), (2, 2, 16)),
        (256, (1, 1, 1), (4, 8, 8)),
        (16, (7, 3, 1), (4, 4, 1)),
    ],
)
def test_the_box_of_a_size(voxels, size, box):
    assert boxes.fitting(voxels, size) == box
    assert math.prod(box) == voxels


@pytest.mark.parametrize("size", [(64, 64, 64), (31, 5, 9), (1, 1, 7)])
def test_boxes_cover_an_image(size):
    box = boxes.fitting(128, size)
    starts = [range(0, n, side) for n, side in zip(size, box, strict=True)]
    assert boxes.covering(box, size) == math.prod(map(len, starts))


def test_strides_of_an_image():
    x = layout.empty((2, 21, 4, 5, 6), torch.float16, "cpu")
    assert boxes.strides(x) == (2880, 720, 144, 24, 1)
    assert boxes.strides(x[:1]) == (2880, 720, 144, 24, 1)
    assert boxes.strides(x[:, :, :2]) == (2880, 720, 144, 24, 1)
    assert boxes.strides(layout.empty((1, 5, 1), torch.float16, "cpu")) == (8, 8, 8, 8, 1)
    assert boxes.strides(layout.empty((2, 5, 7), torch.float16, "cpu")) == (56, 56, 56, 8, 1)
    assert boxes.strides(x[:0]) is None
    assert boxes.strides(x[:, 1:]) is None  # begins within a word
    assert boxes.strides(torch.as_strided(x, (2, 21, 4, 5), (500 * 8, 1, 120, 24))) is None
    huge = torch.empty(1, 2**16, 2**16, 2**9, dtype=torch.float16, device="meta").movedim(-1, 1)
    assert boxes.strides(huge) is None


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that there is not: a function sets what it is."""

    def become(*capability, shared=232_448):
        found = machine.Gpu("", capability, 2**34, 2**25, shared)
        monkeypatch.setattr(machine, "gpu", lambda device: found)
        return torch.device("cuda")

    return become


def gemm_of(product, device, readable):
    plan = plans.chosen(product, device)
    return configs.gemm(plan, product, 1, (1, 1, 64), device, False, readable)


def test_who_copies_boxes(gpu):
    device = gpu(8, 9)
    assert not boxes.are_copied(device)
    product = plans.Product("conv_fprop", (1, 8, 64), 8, (3,), UNIT, torch.float16)
    assert not any(plan.boxes for plan in plans.candidates(product, device))
    with plans.use_plan(plans.GemmPlan(boxes=True)):
        gathered = gemm_of(product, device, lambda: True)
        gpu(9, 0)
        boxed = gemm_of(product, device, lambda: True)
        scattered = gemm_of(product, device, lambda: False)
    assert gathered.box == scattered.box == boxes.NO_BOX
    assert boxed.box == (1, 2, 64)
    assert any(plan.boxes for plan in plans.candidates(product, device))
    halved = product._replace(geometry=Geometry((3,), ((0, 0),), (1,)))
    assert not any(plan.boxes for plan in plans.candidates(halved, device))
    back = halved._replace(name="conv_dgrad")
    assert any(plan.boxes for plan in plans.candidates(back, device))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (10, 0), (10, 3), (12, 0)])
def test_boxes_are_not_copied_where_triton_is_wrong(gpu, capability):
    """On 10.0: of images that are not dense before 3.6, and in TF32; nor where there are none."""
    device = gpu(*capability)
    assert not boxes.are_copied(device)
    product = plans.Product("conv_fprop", (1, 8, 64), 8, (3,), UNIT, torch.float16)
    assert not any(plan.boxes for plan in plans.candidates(product, device))
    with plans.use_plan(plans.GemmPlan(boxes=True)):  # whoever asks for it
        config = gemm_of(product, device, lambda: True)
    assert config.box == boxes.NO_BOX


@pytest.mark.parametrize("dtype", configs.dtypes())
@pytest.mark.parametrize("name", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
def test_plans_fit_into_the_shared_memory(gpu, name, dtype):
    """Of GPUs with 99 KB too: none that a launch would fail with is offered, or taken."""
    product = plans.Product(name, (1, 128, 64), 128, (3,), UNIT, dtype)
    large, small = gpu(9, 0), 101_376
    every = plans.candidates(product, large)
    assert every == [*product.plans]
    device = gpu(9, 0, shared=small)
    some = plans.candidates(product, device)
    assert some == [plan for plan in every if plan.shared(dtype.itemsize) <= small]
    assert every[0] == plans.chosen(product, gpu(9, 0))
    assert some[0] == plans.chosen(product, gpu(9, 0, shared=small))
    most = plans.GemmPlan(128, 128, 64, 4, True)  # 128 KB of operands in 16 bits
    wide = plans.WgradPlan(), plans.WgradPlan(256, 96, 64), plans.WgradPlan(128, 96, 32)
    assert {*every} - {*some} == {most, *wide} & {*every}


def test_a_plan_that_does_not_fit_is_not_taken_from_a_table(monkeypatch, gpu):
    """Of a GPU of the same name, for instance, that lends less of its memory."""
    product = plans.Product("conv_fprop", (1, 128, 64), 128, (3,), UNIT, torch.float16)
    most = plans.GemmPlan(128, 128, 64, 4, True)
    record = evidence.Record(str(most), {str(most): 1.0}, {})
    table = SimpleNamespace(records={product.key: record}, find=lambda key: record)
    monkeypatch.setattr(evidence, "table", lambda device: table)
    assert plans.chosen(product, gpu(9, 0)) == most
    assert plans.chosen(product, gpu(9, 0, shared=101_376)) == product.plans[0]
