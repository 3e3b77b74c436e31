"""Images that are read side by side, and sums that leave with a product: nothing is copied."""

import pytest
import torch

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.functional import Deferred, defer, fit, fit_at_once, join, materialize
from cassetta.functional.norm import Normalization, Pool
from cassetta.kernels import dispatch, layout, reference
from cassetta.kernels.types import NOTHING, Activation, Prologue
from cassetta.layers import ConvBlock, ConvGroup, UpConvGroup

from compare import Counted, assert_near

LAYOUTS = {
    "first": lambda x: x,
    "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "words": lambda x: layout.empty(tuple(x.shape), x.dtype, x.device).copy_(x),
}


@pytest.mark.parametrize("channels", [(4, 4), (5, 3), (8, 16), (12, 4), (16, 21), (1, 1)])
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_images_become_one(first, second, channels, dtype, kernels):
    """The last word of one, if it is not full, does not overwrite the other."""
    x, x2 = (torch.randn(2, c, 3, 4, 5).to(kernels, dtype) for c in channels)
    x, x2 = LAYOUTS[first](x), LAYOUTS[second](x2)
    s, t = (torch.randn(2, channels[1], device=kernels) for _ in range(2))
    p2 = Prologue(s, t, Activation("relu"))
    ours = dispatch.passes(x).concatenate(x, NOTHING, x2, p2, dtype)
    expected = reference.concatenate(x, NOTHING, x2, p2, dtype)
    assert ours.stride() == expected.stride()
    # one rounding of a multiplication and an addition, or two
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=2 * eps, atol=2e-6)
    torch.testing.assert_close(ours[:, : channels[0]], x, rtol=0, atol=0)


def pending(x, gamma, beta):
    norm = Normalization(gamma, beta, 1e-5, Pool("instance"))
    return defer(x).normalized(norm).activated(Activation("silu"))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_a_block_of_two_images_is_that_of_their_concatenation(kernel_size, train, engine):
    """In values and in every gradient, through the norms that are pending on both."""
    options = {"bias": False, "norm": "instance", "order": "cna"}
    block = ConvBlock(2, 7, 4, kernel_size, **options).double()
    images = [torch.randn(2, c, 6, 5, dtype=torch.float64).requires_grad_() for c in (3, 4)]
    tables = [torch.randn(c, dtype=torch.float64).requires_grad_() for c in (3, 3, 4, 4)]
    given = [*images, *tables, *block.parameters()]
    expected, found = [], []
    for fused, results in ((False, expected), (True, found)):
        context = dispatch.fused_on_reference() if fused else dispatch.use_backend("reference")
        with context, torch.set_grad_enabled(train):
            first, second = pending(images[0], *tables[:2]), pending(images[1], *tables[2:])
            both = join(first, second)
            assert both.shape == (2, 7, 6, 5)
            if not fused:
                both = Deferred(torch.cat([first.z(), second.z()], 1))
            out = materialize(block.defer(both))
            results.append(out.detach())
            if train:
                results += torch.autograd.grad(out, given, out.detach().cos())
    for one, other in zip(found, expected, strict=True):
        assert_near(one.contiguous(), other.contiguous())


@pytest.mark.parametrize("wanted", [0, 1])
def test_of_two_images_one_may_need_no_gradient(wanted, engine):
    """Nothing is computed for the other, nor for weights that are frozen."""
    block = ConvBlock(2, 7, 4, bias=False).double().requires_grad_(False)
    images = [torch.randn(2, c, 6, 5, dtype=torch.float64) for c in (3, 4)]
    images[wanted].requires_grad_()
    expected = torch.autograd.grad(block(torch.cat(images, 1)).sum(), images[wanted])[0]
    with dispatch.fused_on_reference(), Counted() as counted:
        out = materialize(block.defer(join(*map(defer, images))))
        found = torch.autograd.grad(out.sum(), images[wanted])[0]
    assert_near(found.contiguous(), expected.contiguous())
    backward = "convolution_backward" if engine == "library" else "cassetta.conv_dgrad"
    assert counted.count(backward) == 1
    assert counted.count("cassetta.conv_wgrad") == 0


def test_what_differs_in_kind_is_concatenated_by_torch():
    x, y = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(1, 3, 4)
    assert isinstance(join(defer(x), defer(y)).source, torch.Tensor)
    assert join(defer(x), defer(y)).z().dtype == torch.float64
    three = join(defer(y), defer(y), defer(y))
    assert three.shape == (1, 9, 4)
    assert_near(three.z(), torch.cat([y, y, y], 1), 0)
    assert_near(three.leading(3), y, 0)
    assert_near(three.leading(4), torch.cat([y, y[:, :1]], 1), 0)


@pytest.mark.parametrize("mode", ["conv", "interpolate"])
def test_a_decoder_copies_no_skip_connection(mode, engine):
    """Its first convolution reads two images; the library's builds one, and does not keep it."""
    group = UpConvGroup(2, 16, 8, skip=8, mode=mode)
    x, skip = torch.randn(1, 16, 8, 8), torch.randn(1, 8, 16, 16)
    with dispatch.fused_on_reference(), Counted() as counted:
        group(x, skip)
    copies = 0 if engine == "gemm" else 1
    assert counted.count("cassetta.concatenate") == copies
    assert counted.count("aten.cat") == 0


@pytest.mark.parametrize("mode", ["conv", "interpolate"])
@pytest.mark.parametrize("skip", [True, "+"])
def test_odd_sizes_are_met_in_one_copy(mode, skip, engine):
    """Of the upsampled image, however many of its axes are odd; nothing is concatenated."""
    net = UNet(3, 4, nb_levels=2, skip=skip, unpool_mode=mode, norm="batch").double()
    inp = torch.randn(1, 4, 7, 9, 5, dtype=torch.float64)
    expected = net(inp)
    with dispatch.fused_on_reference(), dispatch.use_engine(engine), Counted() as counted:
        out = net(inp)
    assert_near(out.contiguous(), expected)
    assert counted.count("aten.cat") == 0
    assert counted.count("aten.copy_") == 1 + 3  # and three slabs


@pytest.mark.parametrize("size", [(6, 5, 7), (4, 4, 4), (6, 4, 3), (4, 5, 6)])
def test_what_is_fitted_at_once_is_what_is_fitted(size):
    """Repeated and cropped, in values and gradients."""
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    for one in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        found, expected = fit_at_once(one, size), fit(one, size)
        assert_near(found.contiguous(), expected.contiguous(), 0)
        g = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(out, x, g)[0] for out in (found, expected))
        assert_near(ours.contiguous(), theirs.contiguous(), 1e-14)


@pytest.mark.parametrize("pool_mode", ["pool", "conv", "interpolate"])
def test_between_the_levels_of_a_unet_nothing_is_materialized(pool_mode, engine):
    """A convolution of several taps builds its operand; others apply what is pending on load."""
    net = UNet(2, 8, nb_levels=3, norm="instance", pool_mode=pool_mode)
    with dispatch.fused_on_reference(), Counted() as counted:
        net(torch.randn(1, 8, 16, 16))
    assert counted.count("aten.cat") == 0
    if engine == "gemm":
        # of ten blocks, the first of each level of the encoder reads what is there; of two images
        # the upsampled one is there; and one leaves the network
        assert counted.count("cassetta.conv_fprop") == 10 + 2
        assert counted.count("cassetta.materialize") == 10 - 3 + 1
        assert counted.count("cassetta.moments") == 0
        assert counted.count("cassetta.norm_statistics") == 0


def with_residual(counted):
    """How many products were given a residual."""
    given = (
        dict(zip((one.name for one in func._schema.arguments), args, strict=False))
        for func, args in counted.calls
    )
    return sum("w" in one and one.get("residual") is not None for one in given)


RESIDUAL = {
    # but those around whole layers: a product adds one
    "meshnet": (lambda: MeshNet(2, 8, nb_layers=2, residual=True), 4, 2),
    "atrous": (lambda: ATrousNet(2, 8, nb_levels=2, nb_conv_per_level=1), 1, 0),
    "pre-activation": (
        lambda: ConvGroup(2, 8, nb_conv=3, residual=True, norm="batch", order="nac"), 3, 0,
    ),
    "summed skips": (lambda: UNet(2, 8, nb_levels=3, skip="+", norm="batch"), 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", RESIDUAL)
def test_in_inference_sums_leave_with_the_product(name):
    """Residual connections, branches and summed skips: nothing runs but products and pooling."""
    make, sums, alone = RESIDUAL[name]
    net, inp = make().eval(), torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        expected = net(inp)
        with dispatch.fused_on_reference(), dispatch.use_engine("gemm"), Counted() as summed:
            out = net(inp)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert with_residual(summed) == sums
    assert summed.count("aten.add") == alone
    assert summed.count("cassetta.moments") == 0
    assert summed.count("cassetta.norm_statistics") == 0
    assert summed.count("cassetta.materialize") == (3 if name == "pre-activation" else 0)
