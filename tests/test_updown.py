"""Ways down and up a level."""

import interpol
import pytest
import torch
from torch import nn

import cassetta
from cassetta.kernels import dispatch
from cassetta.layers import DownConv, DownInterpol, DownPool, UpConv, UpInterpol, UpPool

from compare import assert_gradients, assert_near, image

SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 6)}
DOWN = [DownConv, DownPool, DownInterpol]
UP = [UpConv, UpInterpol]


@pytest.mark.parametrize("kind", DOWN)
@pytest.mark.parametrize("factor", [2, [2, 1, 3], 4])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_down(kind, ndim, factor):
    factors = ([factor] * ndim if isinstance(factor, int) else factor)[:ndim]
    layer = kind(ndim, 3, 5, factors)
    inp = image(2, 3, *SIZES[ndim])
    size = tuple(n // f for n, f in zip(SIZES[ndim], factors, strict=True))
    assert layer.double()(inp).shape == (2, 5, *size)
    assert (layer.inp_channels, layer.out_channels) == (3, 5)
    assert kind(ndim, 3).out_channels == 3
    assert_gradients(layer, inp)


@pytest.mark.parametrize("kind", UP)
@pytest.mark.parametrize("factor", [2, [2, 1, 3]])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_up(kind, ndim, factor):
    factors = ([factor] * ndim if isinstance(factor, int) else factor)[:ndim]
    layer = kind(ndim, 3, 2, factors)
    inp = image(1, 3, *[n // 2 for n in SIZES[ndim]])
    size = tuple(n * f for n, f in zip(inp.shape[2:], factors, strict=True))
    assert layer.double()(inp).shape == (1, 2, *size)
    assert (layer.inp_channels, layer.out_channels) == (3, 2)
    assert_gradients(layer, inp)


def test_down_conv_and_up_conv_are_torchs():
    inp = image(1, 3, 8, 8)
    down, up = DownConv(2, 3, 5).double(), UpConv(2, 3, 5).double()
    assert isinstance(down.conv, nn.Conv2d)
    assert isinstance(up.conv, nn.ConvTranspose2d)
    assert_near(down(inp), down.conv(inp))
    assert_near(up(inp), up.conv(inp))
    assert list(down.state_dict()) == ["conv.weight", "conv.bias"]


def test_down_interpol_has_the_numbers_of_torch_interpol():
    inp = image(2, 3, 9, 14)
    ours = DownInterpol(2, 3, factor=[3, 2])(inp)
    expected = interpol.resize(inp, shape=[3, 7], anchor="e", bound="zero")
    assert_near(ours, expected)


def test_down_interpol_rounds_exactly():
    """49 * (1 / 49) is below one in floating point."""
    assert DownInterpol(1, 1, factor=49)(torch.ones(1, 1, 49)).shape == (1, 1, 1)


@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_pool_and_unpool(size):
    inp = image(2, 3, *size)
    down, up = DownPool(2, 3, return_indices=True), UpPool(2, 3)
    out, indices = down(inp)
    assert down.return_indices
    back = up(out, indices=indices, out_size=size)
    assert back.shape == inp.shape
    kept = back != 0
    assert kept.sum() == out.numel()
    assert_near(back[kept], inp[kept])


def test_unpool_changes_channels_first():
    up = UpPool(2, 4, 3).double()
    indices = DownPool(2, 3, return_indices=True)(image(1, 3, 6, 6))[1]
    inp = image(1, 4, 3, 3)
    assert up(inp, indices=indices).shape == (1, 3, 6, 6)
    with pytest.raises(ValueError, match=r"indices.*\(1, 2, 3, 3\).*\(1, 3, 3, 3\)"):
        up(inp, indices=indices[:, :2])


@pytest.mark.parametrize("kind", [*DOWN, *UP, UpPool])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ndim": 0}, "ndim=0"),
        ({"inp_channels": 0}, "inp_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"factor": 0}, "factor=0"),
        ({"factor": [2, 2, 2]}, r"factor=\[2, 2, 2\]"),
    ],
    ids=str,
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"ndim": 2, "inp_channels": 3, **options})


@pytest.mark.parametrize("kind", DOWN)
def test_bad_input(kind):
    layer = kind(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(3, 8\), too small to be divided by \(4, 4\)"):
        layer(torch.ones(1, 3, 3, 8))
    with pytest.raises(ValueError, match=r"\(1, 5, 8, 8\).*\(batch, 3, W, H\)"):
        layer(torch.ones(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        layer(torch.ones(3, 8, 8))


def _with(level, part, **changes):
    """The way, of which attributes of a part were changed."""
    for name, value in changes.items():
        setattr(level[part] if isinstance(level, nn.Sequential) else level.conv, name, value)
    return level


def _exchanged(level, part, layer):
    level[part] = layer
    return level


CHANGED = {
    "its convolution is Conv2d": lambda: _with(DownConv(2, 4, 6), 0, stride=(1, 2)),
    "its convolution is ConvTranspose2d": lambda: _with(UpConv(2, 4, 6), 0, dilation=(2, 1)),
    "its pooling is MaxPool2d": lambda: _with(DownPool(2, 4, 6), 0, padding=1),
    "its pooling is AvgPool2d": lambda: _exchanged(DownPool(2, 4), 0, nn.AvgPool2d(2)),
    "its last layer is Tanh": lambda: _exchanged(DownPool(2, 4), 1, nn.Tanh()),
    "no kernel interpolates with": lambda: DownInterpol(2, 4, 6, interpolation="cubic"),
    "bound='dft'": lambda: UpInterpol(2, 4, 6, bound="dft"),
    "anchor='center'": lambda: _with(UpInterpol(2, 4), 0, anchor="center"),
    "its layers were exchanged": lambda: UpInterpol(2, 4, 6).append(nn.Tanh()),
    "a hook is attached": lambda: _hooked(DownConv(2, 4, 6)),
}


def _hooked(level):
    level.conv.register_forward_hook(lambda module, inp, out: out + 1)
    return level


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("reason", CHANGED)
def test_what_kernels_would_do_otherwise_stays_with_torch(reason, engine):
    level, inp = CHANGED[reason]().double(), image(2, 4, 8, 6)
    expected = level(inp)
    with dispatch.fused_on_reference(), dispatch.use_engine(engine):
        assert_near(level(inp).detach(), expected.detach())
        (row,) = cassetta.explain(level, inp)
    assert row.engine == "reference"
    assert reason in row.reason


@pytest.mark.parametrize("engine", ["library", "gemm"])
@pytest.mark.parametrize("factor", [2, [2, 1, 3]])
@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("kind", [*DOWN, *UP])
def test_engines_compute_what_torch_computes(kind, channels, factor, engine):
    """In values and gradients, also of sizes that the factor does not divide."""
    level, inp = kind(3, 3, channels, factor).double(), image(2, 3, 5, 4, 7)
    given = [inp, *level.parameters()]
    found = []
    for fused in (False, True):
        context = dispatch.fused_on_reference() if fused else dispatch.use_backend("reference")
        with context, dispatch.use_engine(engine):
            out = level(inp)
            found.append((out.detach(), *torch.autograd.grad(out, given, out.detach().cos())))
            (row,) = cassetta.explain(level, inp)
        able = engine if channels != 3 or hasattr(level, "conv") else "library"
        assert row.engine == (able if fused else "reference")
    for expected, ours in zip(*found, strict=True):
        assert_near(ours.contiguous(), expected.contiguous())
