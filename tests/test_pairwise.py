"""Convolutions of every number of channels, dilation, precision and number of axes, in pairs.

Compiled, on a GPU or in the simulator (`pytest --simulate 80`): forward, with moments, and both
gradients, against float64. Sizes are odd, so that no tile divides them.
"""

import itertools

import pytest
import torch
from conftest import RUNNER
from test_convolutions import PRECISIONS, SLACK, double

from cassetta.kernels import dispatch, layout, precision, reference
from cassetta.kernels.types import NOTHING, Activation, Geometry

CHANNELS = (1, 5, 8, 16, 21, 24, 30, 32, 64, 100, 128)
SIZES = ((71,), (5, 35), (3, 5, 19))
DILATIONS = (1, 2, 5, 16)


AXES = CHANNELS, tuple(PRECISIONS), DILATIONS, SIZES


def pairs(*axes):
    """Combinations of one value of each axis, in which every two values of two axes meet."""
    every = {one: {*itertools.combinations(enumerate(one), 2)} for one in itertools.product(*axes)}
    missing = set().union(*every.values())
    while missing:
        best = max(every, key=lambda one: len(every[one] & missing))
        missing -= every[best]
        yield best


COMBINATIONS = [*pairs(*AXES)]


def test_pairs_are_all_there():
    for a, b in itertools.combinations(range(4), 2):
        assert {(one[a], one[b]) for one in COMBINATIONS} == {*itertools.product(AXES[a], AXES[b])}
    assert len(COMBINATIONS) < 60


@pytest.mark.skipif(RUNNER == "interpreter", reason="of what is compiled")
@pytest.mark.parametrize(
    ("channels", "how", "dilation", "size"), COMBINATIONS, ids=lambda value: str(value)
)
def test_a_convolution_and_its_gradients(channels, how, dilation, size, kernels):
    dtype, axes = PRECISIONS[how], len(size)
    more = CHANNELS[-1 - CHANNELS.index(channels)]  # few to many, and many to few
    same = Geometry((1,) * axes, ((dilation, dilation),) * axes, (dilation,) * axes)
    draw = lambda *shape: torch.randn(shape).to(kernels, dtype)  # noqa: E731
    x, g = (layout.in_words(draw(1, c, *size)) for c in (channels, more))
    w, b = draw(more, channels, *(3,) * axes) / (channels * 3**axes) ** 0.5, draw(more)

    def results(passes, x, g, w, b):
        y, mean, var = passes.conv_fprop(x, NOTHING, w, b, same, moments_of=Activation("relu"))
        dz, _ = passes.conv_dgrad(g, w, same, size)
        dw = passes.conv_wgrad(g, x, NOTHING, (3,) * axes, same)
        return {"y": y, "mean": mean, "var": var, "dz": dz, "dw": dw}

    with precision.use("tf32" if how == "tf32" else "ieee"):
        ours = results(dispatch.passes(x), x, g, w, b)
    truth = results(reference, *map(double, (x, g, w, b)))
    usual = results(reference, x, g, w, b)
    for name, exact in truth.items():
        scale = max(exact.abs().max().item(), 1e-3)
        off, known = ((one[name].double() - exact).abs().max().item() for one in (ours, usual))
        allowed = 2**-8 * scale if how == "tf32" else 2 * known + SLACK[dtype] * scale
        assert off <= allowed, f"{name}: {off:.2e} of {scale:.2e}, torch {known:.2e}"
