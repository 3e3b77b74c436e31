"""Resampling: the numbers of torch-interpol, by matrices where it is linear."""

import interpol
import pytest
import torch

from cassetta import functional
from cassetta.layers import (
    CoeffToValue,
    FlowExp,
    FlowPull,
    FlowPush,
    GridPull,
    GridPush,
    Resize,
    ResizeFlow,
    Restrict,
    ValueToCoeff,
)

from compare import assert_gradients, assert_near, image

SCALES = [
    {"factor": [0.5, 2, 1.5]},
    {"factor": [1 / 3, 0.7, 3]},
    {"factor": 2},
    {"shape": [3, 8, 20]},
    {"shape": [1, 16, 4]},
]


def theirs(inp, factor=None, shape=None, **options):
    factor = [factor] * (inp.ndim - 2) if isinstance(factor, int) else factor
    return interpol.resize(inp, factor=factor, shape=shape, **options)


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("anchor", ["edge", "center", "first", "last"])
def test_resize_linear_equals_torch_interpol(scale, anchor):
    if anchor in ("first", "last") and "shape" in scale:
        scale = {**scale, "factor": [0.5, 1.7, 2.1]}
    inp = image(2, 2, 7, 8, 9)
    expected = theirs(inp, **scale, anchor=anchor, interpolation=1, bound="zero")
    layer = Resize(**scale, anchor=anchor)
    assert_near(layer(inp), expected)
    (ours,) = torch.autograd.grad(layer(inp).square().sum(), inp)
    (same,) = torch.autograd.grad(expected.square().sum(), inp)
    assert_near(ours, same)


@pytest.mark.parametrize("interpolation", ["nearest", "linear", 2, "cubic"])
@pytest.mark.parametrize("bound", ["zero", "replicate", "dct2", "dft"])
@pytest.mark.parametrize("extrapolate", [True, False])
def test_resize_every_other_option_equals_torch_interpol(interpolation, bound, extrapolate):
    inp = image(1, 2, 6, 5, 4)  # 3-D: torch-interpol 0.3 fails in 2-D for one of the options
    options = {"interpolation": interpolation, "bound": bound, "extrapolate": extrapolate}
    expected = theirs(inp, 2, anchor="edge", **options)
    ours = Resize(factor=2, **options)
    assert_near(ours(inp), expected)
    assert_gradients(ours, inp)
    assert ours(inp[..., 0]).shape == (1, 2, 12, 10)


def test_resize_mixed_anchors():
    inp = image(1, 2, 6, 5)
    ours = Resize(factor=[2, 3], anchor=["edge", "center"])(inp)
    assert_near(ours, theirs(inp, [2, 3], anchor=["e", "c"], bound="zero"))


def test_resize_gradients_to_second_order():
    inp = image(1, 1, 4, 3)
    assert_gradients(Resize(factor=[1.5, 2]), inp)
    assert torch.autograd.gradgradcheck(lambda x: Resize(factor=2)(x).pow(3), inp)


def test_resize_keeps_half_precision_and_darkens_edges():
    out = Resize(factor=2)(torch.ones(1, 1, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.flatten().tolist() == [0.75, *[1] * 6, 0.75]


def test_resize_labels_stay_labels():
    labels = torch.randint(0, 4, (1, 1, 8, 8))
    assert set(Resize(factor=2)(labels).unique().tolist()) <= {0, 1, 2, 3}


def test_resize_shape_at_the_call():
    inp = image(1, 2, 6, 5)
    assert_near(Resize(factor=3)(inp, shape=[9, 4]), Resize(shape=[9, 4])(inp))


@pytest.mark.parametrize("size", [(4, 6), (5, 5), (7, 3)])
def test_fit_crops_or_repeats_the_last_voxel(size):
    inp = image(1, 2, 5, 5)
    out = functional.fit(inp, size)
    index = [torch.arange(n).clamp(max=4) for n in size]
    assert_near(out, inp[:, :, index[0]][:, :, :, index[1]])


def test_restrict_is_the_adjoint_of_resize():
    small, large = image(1, 2, 4, 3), image(1, 2, 8, 9)
    up = Resize(factor=[2, 3])(small)
    down = Restrict(factor=[2, 3], reduce_sum=True)(large)
    assert_near((up * large).sum(), (small * down).sum())


def test_push_is_the_adjoint_of_pull():
    inp, out = image(1, 2, 6, 5), image(1, 2, 4, 4)
    grid = torch.rand(1, 2, 4, 4, dtype=torch.float64) * 4
    assert_near((GridPull()(inp, grid) * out).sum(), (inp * GridPush()(out, grid, [6, 5])).sum())
    flow = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    other = image(1, 2, 6, 5)
    assert_near((FlowPull()(inp, flow) * other).sum(), (inp * FlowPush()(other, flow)).sum())


def test_pull_samples_at_coordinates():
    inp = image(1, 2, 6, 5)
    assert_near(FlowPull()(inp, torch.zeros(1, 2, 6, 5, dtype=torch.float64)), inp)
    grid = torch.tensor([[[1.0, 4.0]], [[2.0, 3.0]]], dtype=torch.float64)[None]
    assert_near(GridPull()(inp, grid)[0, :, 0], inp[0, :, [1, 4], [2, 3]])


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_coefficients_and_values_are_inverse(interpolation):
    """Upstream's reads an attribute that it never sets."""
    inp = image(1, 2, 8, 9)
    coefficients = ValueToCoeff(interpolation, "dct2")(inp)
    # torch-interpol is compiled by older torch, which makes float32 of the numbers in its formulas
    compiled = isinstance(interpol.coeff.get_poles, torch.jit.ScriptFunction)
    tolerance = 2**-24 if compiled else 1e-10
    assert_near(CoeffToValue(interpolation, "dct2")(coefficients), inp, tolerance)


@pytest.mark.parametrize("anchor", ["edge", "center", "first"])
def test_resize_flow_scales_displacements(anchor):
    flow = torch.ones(1, 2, 6, 4, dtype=torch.float64)
    out = ResizeFlow(factor=[2, 3], anchor=anchor, bound="dct2")(flow)
    scale = {"edge": (2, 3), "center": (11 / 5, 11 / 3), "first": (2, 3)}[anchor]
    for axis in range(2):
        assert_near(out[:, axis], torch.full((1, 12, 12), scale[axis], dtype=torch.float64))


@pytest.mark.parametrize("coeff", [False, True])
def test_flow_exp_of_a_constant_velocity_is_that_displacement(coeff):
    velocity = (
        torch.ones(1, 2, 8, 8, dtype=torch.float64) * torch.tensor([1.5, -0.5])[:, None, None]
    )
    exponential = FlowExp(extrapolate=True, coeff=coeff)
    assert_near(exponential(velocity), velocity)


def test_flow_exp_of_a_linear_velocity():
    """d/dt x = a x moves x to exp(a) x."""
    grid = torch.linspace(-10, 10, 21, dtype=torch.float64)
    flow = FlowExp(nsteps=12, bound="replicate", extrapolate=True)(-0.2 * grid[None, None])
    inner = slice(5, 16)
    # (1 + a/n)^n instead of exp(a), n = 2^12: an error of a^2 / 2n = 5e-6 |x|, 3e-5 of the largest
    expected = (torch.exp(torch.tensor(-0.2, dtype=torch.float64)) - 1) * grid
    assert_near(flow[0, 0, inner], expected[inner], tolerance=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "factor=None and shape=None"),
        ({"factor": -1}, "factor=-1"),
        ({"factor": 2, "anchor": "middle"}, "anchor='middle'"),
        ({"shape": 4, "anchor": "first"}, "anchor='first' needs a factor"),
        ({"factor": 2, "interpolation": "lineal"}, "interpolation='lineal'.*'linear'"),
        ({"factor": 2, "interpolation": 9}, "interpolation=9"),
        ({"factor": 2, "bound": "wood"}, "bound='wood'"),
        ({"shape": 0}, "shape=0"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Resize(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResizeFlow(2)(torch.ones(1, 1, 4, 4)), r"flow has shape \(1, 1, 4, 4\)"),
        (lambda: FlowPull()(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4)), "flow has shape|grid"),
        (lambda: GridPull()(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 4, 4)), "grid has shape"),
        (lambda: GridPush()(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 3, 4)), "does not fit"),
        (lambda: Resize(0.1)(torch.ones(1, 2, 4, 4)), "leaves nothing"),
        (lambda: Restrict(10)(torch.ones(1, 2, 4, 4)), "too few"),
        (lambda: Restrict(3, anchor="center")(torch.ones(2, 2, 5, 7)), "too few"),
        (lambda: Resize(2, interpolation=[]), "interpolation=.. has 0 values"),
        (lambda: Resize(2, bound=["zero"] * 3)(torch.ones(1, 1, 4, 4)), "bound=.* has 3 values"),
        (lambda: Resize(2, bound="nocheck"), "bound='nocheck' is unknown"),
        (lambda: Resize(1e300), "factor=1e.300 must be positive"),
        (lambda: FlowExp()(torch.ones(1, 3, 4, 4)), "flow has shape"),
        (lambda: ValueToCoeff()(torch.ones(4)), "input has shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_is_resized():
    assert Resize(2)(torch.ones(0, 2, 4, 4)).shape == (0, 2, 8, 8)
