"""Convolutions against `torch.nn`, in float64, values and gradients."""

import itertools

import pytest
import torch
from bounds import pad as bounds_pad
from torch import nn
from torch.nn import functional as F

from cassetta import functional
from cassetta.kernels import library
from cassetta.kernels.types import Geometry
from cassetta.layers import (
    Conv,
    ConvTransposed,
    CrossHairConv,
    LazyConv,
    LazyConvTransposed,
    SeparableConv,
    make_conv,
)

from compare import assert_gradients, assert_near, image

SIZES = {1: (11,), 2: (9, 7), 3: (7, 5, 6)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS = [
    {},
    {"kernel_size": 1},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2, "bias": False},
    {"groups": 2, "padding": 1},
]
lazy_is_new = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def same_weights(ours, theirs):
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.double(), theirs.double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_conv_equals_torch(ndim, options):
    ours, theirs = same_weights(
        Conv(ndim, 4, 6, **options), CONV[ndim](4, 6, **{"kernel_size": 3, **options})
    )
    inp = image(2, 4, *SIZES[ndim])
    assert_near(ours(inp), theirs(inp))
    assert_gradients(ours, inp)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_conv_transposed_equals_torch(ndim, options):
    ours, theirs = same_weights(
        ConvTransposed(ndim, 4, 6, **options),
        CONV_TRANSPOSED[ndim](4, 6, **{"kernel_size": 3, **options}),
    )
    inp = image(2, 4, *SIZES[ndim])
    assert_near(ours(inp), theirs(inp))
    assert_gradients(ours, inp)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_keeps_the_size(kernel_size, dilation):
    conv = Conv(2, 1, 1, kernel_size, dilation=dilation, padding="same").double()
    inp = image(1, 1, 9, 8)
    span = dilation * (kernel_size - 1)
    before, after = span // 2, span - span // 2
    padded = F.pad(inp, (before, after, before, after))
    assert_near(conv(inp), F.conv2d(padded, conv.weight, conv.bias, dilation=dilation))
    assert conv(inp).shape == inp.shape


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
def test_same_padding_transposed_is_the_adjoint(kernel_size):
    conv = Conv(1, 2, 3, kernel_size, padding="same", bias=False).double()
    back = ConvTransposed(1, 3, 2, kernel_size, padding="same", bias=False).double()
    back.load_state_dict(conv.state_dict())
    inp, out = image(1, 2, 9), image(1, 3, 9)
    assert back(out).shape == inp.shape
    assert_near((conv(inp) * out).sum(), (inp * back(out)).sum())


MODES = ["zeros", "replicate", "mirror", "reflect", "antimirror", "antireflect", "circular"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("amount", [1, 4, 13])
def test_pad_equals_torch_bounds(mode, amount):
    inp = image(2, 3, 5, 6)
    ours = functional.pad(inp, ((amount, 2), (0, amount)), mode)
    assert_near(ours, bounds_pad(inp, (amount, 2, 0, amount), mode))


@pytest.mark.parametrize("mode", MODES)
def test_padding_modes(mode):
    """Upstream's forward convolution refuses every padding mode but zeros."""
    conv = Conv(2, 2, 3, [4, 3], padding="same", padding_mode=mode).double()
    inp = image(1, 2, 5, 6)
    padded = bounds_pad(inp, (1, 2, 1, 1), mode)
    assert_near(conv(inp), F.conv2d(padded, conv.weight, conv.bias))
    assert_gradients(conv, inp)


@pytest.mark.parametrize(
    ("mode", "torch_mode"),
    [("replicate", "replicate"), ("circular", "circular"), ("mirror", "reflect")],
)
def test_padding_modes_of_torch(mode, torch_mode):
    ours, theirs = same_weights(
        Conv(3, 2, 3, padding=1, padding_mode=mode),
        nn.Conv3d(2, 3, 3, padding=1, padding_mode=torch_mode),
    )
    inp = image(1, 2, 4, 5, 6)
    assert_near(ours(inp), theirs(inp))


def test_output_size_of_conv_transposed():
    ours, theirs = same_weights(
        ConvTransposed(2, 2, 3, 3, stride=2, padding=1),
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1),
    )
    inp = image(1, 2, 5, 4)
    for size in itertools.product([9, 10], [7, 8]):
        assert_near(ours(inp, size), theirs(inp, output_size=size))
        assert_near(ours(inp, (1, 3, *size)), theirs(inp, output_size=size))
    with pytest.raises(ValueError, match=r"out_size=\(11, 8\).*\[9, 7\] to \[10, 8\]"):
        ours(inp, (11, 8))


@lazy_is_new
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("lazy", "eager"), [(LazyConv, Conv), (LazyConvTransposed, ConvTransposed)]
)
def test_lazy_convs(lazy, eager, ndim):
    """Upstream's two lazy convolutions have each other's weight shape."""
    conv = lazy(lambda channels: 2 * channels, kernel_size=[3, 2, 1][:ndim], padding=1)
    inp = image(2, 5, *SIZES[ndim], dtype=torch.float32)
    out = conv(inp)
    assert type(conv) is eager
    assert (conv.ndim, conv.inp_channels, conv.out_channels) == (ndim, 5, 10)
    same = eager(ndim, 5, 10, kernel_size=[3, 2, 1][:ndim], padding=1)
    same.load_state_dict(conv.state_dict(), strict=True)
    assert_near(out, same(inp))


@lazy_is_new
def test_lazy_conv_takes_weights_before_its_first_input():
    trained = Conv(2, 3, 4, bias=False)
    conv = LazyConv(4, bias=False)
    conv.load_state_dict(trained.state_dict())
    inp = image(1, 3, 6, 6, dtype=torch.float32)
    assert_near(conv(inp), trained(inp))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("inp_channels", "out_channels"), [(2, 4), (4, 2), (3, 3)])
def test_separable_conv_is_one_conv_per_axis(ndim, inp_channels, out_channels):
    conv = SeparableConv(ndim, inp_channels, out_channels, kernel_size=5, dilation=2).double()
    inp = image(1, inp_channels, *SIZES[ndim])
    expected = inp
    for axis, one in enumerate(conv):
        assert one.kernel_size == tuple(5 if n == axis else 1 for n in range(ndim))
        assert one.dilation == tuple(2 if n == axis else 1 for n in range(ndim))
        assert (one.bias is not None) == (axis == ndim - 1)
        expected = one(expected)
    assert_near(conv(inp), expected)
    assert conv(inp).shape == (1, out_channels, *SIZES[ndim])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_crosshair_conv_is_a_cross_shaped_kernel(ndim):
    conv = CrossHairConv(ndim, 2, 3, kernel_size=3).double()
    dense = Conv(ndim, 2, 3, kernel_size=3, padding="same").double()
    with torch.no_grad():
        dense.weight.zero_()
        for axis, one in enumerate(conv):
            line = [slice(None) if n == axis else slice(1, 2) for n in range(ndim)]
            dense.weight[(slice(None), slice(None), *line)] += one.weight
        dense.bias.copy_(conv[-1].bias)
    inp = image(1, 2, *SIZES[ndim])
    assert_near(conv(inp), dense(inp))
    assert_gradients(conv, inp)


def test_make_conv_makes_each_kind():
    assert type(make_conv(2, 3)) is Conv
    assert make_conv(2, 3).out_channels == 3
    assert type(make_conv(2, 3, transpose=True, stride=2, output_padding=1)) is ConvTransposed
    assert type(make_conv(2, 3, separable=True)) is SeparableConv
    for name in ("crosshair", "cross"):
        assert type(make_conv(2, 3, separable=name, padding="same")) is CrossHairConv


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"ndim": 4}, "ndim=4"),
        (TypeError, {"ndim": 2.0}, "ndim=2.0"),
        (ValueError, {"inp_channels": 0}, "inp_channels=0"),
        (ValueError, {"out_channels": 0}, "out_channels=0"),
        (ValueError, {"out_channels": -3}, "out_channels=-3"),
        (ValueError, {"kernel_size": 0}, "kernel_size=0"),
        (ValueError, {"kernel_size": [3, 3, 3]}, r"kernel_size=\[3, 3, 3\].*ndim=2"),
        (ValueError, {"kernel_size": []}, r"kernel_size=\[\]"),
        (TypeError, {"kernel_size": [3, 2.5]}, r"kernel_size\[1\]=2.5"),
        (TypeError, {"kernel_size": "3"}, "kernel_size='3'"),
        (ValueError, {"stride": -1}, "stride=-1"),
        (ValueError, {"dilation": 0}, "dilation=0"),
        (ValueError, {"padding": -1}, "padding=-1"),
        (ValueError, {"padding": "full"}, "padding='full'.*'same'.*'valid'"),
        (ValueError, {"padding": "same", "stride": 2}, "stride"),
        (ValueError, {"padding_mode": "wood"}, "padding_mode='wood'.*replicate"),
        (ValueError, {"groups": 3}, "groups=3.*inp_channels=4"),
        (ValueError, {"output_padding": 1}, "output_padding.*ConvTransposed"),
        (ValueError, {"transpose": True, "padding_mode": "circular"}, "padding_mode='circular'"),
        (ValueError, {"transpose": True, "output_padding": 1}, "output_padding"),
        (ValueError, {"separable": True, "transpose": True}, "separable=True.*transposed"),
        (ValueError, {"separable": "crosshair", "stride": 2}, "stride=2"),
        (ValueError, {"separable": "crosshair", "padding": 0}, "padding.*'same'"),
        (ValueError, {"separable": "star"}, "separable='star'.*'crosshair'"),
    ],
    ids=str,
)
def test_bad_arguments(error, options, message):
    with pytest.raises(error, match=message):
        make_conv(**{"ndim": 2, "inp_channels": 4, "out_channels": 4, **options})


@pytest.mark.parametrize(
    ("error", "inp", "message"),
    [
        (TypeError, [1, 2], "inp must be a tensor, not list"),
        (ValueError, torch.ones(4, 8, 8), r"\(4, 8, 8\).*2-D image.*\(batch, 4, W, H\)"),
        (ValueError, torch.ones(1, 3, 8, 8), r"\(1, 3, 8, 8\).*\(batch, 4, W, H\)"),
        (ValueError, torch.ones(1, 4, 0, 8), r"\(1, 4, 0, 8\).*no size zero"),
        (TypeError, torch.ones(1, 4, 8, 8, dtype=torch.int32), "int32.*floating point"),
    ],
    ids=["list", "rank", "channels", "empty", "integer"],
)
@pytest.mark.parametrize("kind", [Conv, ConvTransposed])
def test_bad_input(kind, error, inp, message):
    with pytest.raises(error, match=message):
        kind(2, 4, 4)(inp)


def test_empty_batch():
    assert Conv(2, 3, 5, padding="same")(torch.ones(0, 3, 4, 4)).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("mode", [["zeros", "circular"], [], -1, "nocheck", True, "wrap-around"])
def test_padding_modes_that_there_are_not(mode):
    with pytest.raises(ValueError, match="padding_mode=.* is unknown"):
        Conv(2, 2, padding_mode=mode)


@pytest.mark.parametrize("options", [{"kernel_size": 0}, {"dilation": -1}, {"padding_mode": "x"}])
def test_lazy_layers_check_at_once_what_they_know(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LazyConv(3, **options)
    with pytest.raises(ValueError, match="out_channels=-1"):
        LazyConv(-1)


@pytest.mark.parametrize("bias", ["False", None, 2])
def test_a_flag_is_no_word(bias):
    with pytest.raises(TypeError, match="bias=.* must be True or False"):
        Conv(2, 2, bias=bias)


@pytest.mark.parametrize("inp", [None, "image", 3, torch.tensor(1.0), torch.ones(3)])
@pytest.mark.parametrize(
    "make", [lambda: Conv(2, 3), lambda: LazyConv(3), lambda: LazyConvTransposed(3)]
)
def test_what_is_no_image(make, inp):
    with pytest.raises((TypeError, ValueError), match="inp"):
        make()(inp)


GEOMETRIES = {
    "same": (3, Geometry((1, 1, 1), ((1, 1),) * 3, (1, 1, 1))),
    "even, dilated": (2, Geometry((1, 1, 1), ((2, 3), (1, 1), (1, 1)), (5, 1, 1))),
    "strided": (3, Geometry((2, 1, 1), ((0, 0), (1, 1), (1, 1)), (1, 1, 1))),
    "far taps": (3, Geometry((1, 1, 1), ((31, 31), (1, 1), (1, 1)), (31, 1, 1))),
    "grouped": (3, Geometry((1, 1, 1), ((1, 1),) * 3, (1, 1, 1), 2)),
}


@pytest.mark.parametrize("largest", [300, 2**31])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_gradients_of_a_transposed_convolution(monkeypatch, name, largest):
    """In slabs, too; what a padding crops on one side alone has no gradient."""
    size, geometry = GEOMETRIES[name]
    x = torch.randn(2, 4, 17, 5, 4).double()
    w = torch.randn(4, 4 // geometry.groups, size, 3, 3).double().requires_grad_()
    b = torch.randn(4).double().requires_grad_()
    x.requires_grad_()
    out = library.conv_transposed(x, w, b, geometry, (0, 0, 0))
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, w, b), g)
    monkeypatch.setattr(library, "LARGEST", largest)
    with torch.no_grad():
        found = library.conv_transposed_backward(g, x, w, geometry, (True, True, True))
        none = library.conv_transposed_backward(g, x, w, geometry, (False, True, False))
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)
    assert_near(none[1], expected[1])
    assert none[0] is None
    assert none[2] is None


@pytest.mark.parametrize("largest", [300, 1000])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_sample_too_large_for_cudnn_is_convolved_in_slabs(monkeypatch, name, largest):
    size, geometry = GEOMETRIES[name]
    x = torch.randn(2, 4, 17, 5, 4).double().requires_grad_()
    w = torch.randn(4, 4 // geometry.groups, size, 3, 3).double().requires_grad_()
    b = torch.randn(4).double().requires_grad_()
    expected = library.conv(x, w, b, geometry)
    g = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (x, w, b), g)
    whole = torch.nn.functional.conv3d
    seen = []

    def watched(x, w, *rest):
        seen.append(x[0].numel())
        return whole(x, w, *rest)

    monkeypatch.setattr(library, "LARGEST", largest)
    monkeypatch.setitem(library._CONV, 3, watched)
    out = library.conv(x, w, b, geometry)
    assert len(seen) > 1
    assert_near(out.detach(), expected.detach())
    for ours, theirs in zip(torch.autograd.grad(out, (x, w, b), g), grads, strict=True):
        assert_near(ours, theirs)
    with torch.no_grad():
        written = library.conv_backward(g, x, w, geometry, (True, True, True))
        dx, _, db = library.conv_backward(g, x, w, geometry, (False, True, False))
    assert dx is None
    assert db is None
    for ours, theirs in zip(written, grads, strict=True):
        assert_near(ours, theirs)
