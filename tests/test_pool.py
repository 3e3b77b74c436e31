"""Max pooling of a pending transform: values, places and gradients are those of torch."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import HAS_TRITON, RUNNER
from torch import nn
from torch.nn import functional as F

from cassetta.functional import defer, max_pool
from cassetta.functional.norm import Normalization, Pool
from cassetta.kernels import dispatch, layout, reference, tile
from cassetta.kernels.types import NOTHING, Activation, Prologue

from compare import NothingRead, assert_near

# numpy says when exp overflows, which leads to the right limits
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if RUNNER != "interpreter" else [])
SLACK = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""On the scale of the largest value; two roundings in half precision (see `test_passes`)."""

CASES = {
    "halved": ((2, 8, 6, 4, 8), (2, 2, 2)),
    "21 channels, ragged": ((1, 21, 7, 5, 9), (2, 2, 2)),
    "uneven window": ((2, 3, 5, 7, 4), (2, 3, 1)),
    "one channel": ((2, 1, 9, 8), (3, 3)),
    "two axes": ((1, 16, 11, 6), (2, 2)),
    "one axis": ((3, 5, 1000), (3,)),
    "more than a byte counts": ((1, 3, 14, 8, 15), (7, 8, 7)),
    "as many as a byte counts": ((2, 8, 17, 16), (16, 16)),
    "windows of one": ((1, 8, 3, 4, 5), (1, 1, 1)),
    "a single window": ((2, 4, 2, 2, 2), (2, 2, 2)),
    "no window": ((2, 4, 1, 5), (2, 2)),
    "no image": ((0, 4, 6, 6), (2, 2)),
    "more channels than a tile": ((1, 70, 5, 4), (2, 2)),
}
LAYOUTS = ["first", "last", "words", "some channels", "every other voxel", "turned", "expanded"]


def laid_out(x, kind):
    """The image in this layout; what lies beside it in memory is NaN."""
    beside = torch.full_like(x, math.nan)
    if kind == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "words":
        return layout.empty(tuple(x.shape), x.dtype, x.device).copy_(x)
    if kind == "some channels":
        return torch.cat([x, beside], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]]
    if kind == "every other voxel":
        return torch.stack([x, beside], -1).flatten(-2)[..., ::2]
    if kind == "turned":  # dense, but its voxels have no common stride
        return x.mT.contiguous().mT
    return x[:, :1].expand(x.shape) if kind == "expanded" else x


def transform(shape, name, device):
    """A pending transform with everything in it."""
    s1, t1, slope, s2, t2 = (torch.randn(shape[:2]).to(device) for _ in range(5))
    return Prologue(s1, t1, Activation(name), slope if name == "prelu" else None, s2, t2)


def at_places(z, where, window):
    """The values of z at these places of its windows."""
    found = torch.zeros(where.shape, dtype=z.dtype, device=z.device)
    for tap, at in enumerate(reference._places(window, where.shape[2:])):
        found = torch.where(where == tap, z[at], found)
    return found


def by_torch(z, window):
    """Values, and places in the windows, of torch's own max pooling."""
    run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[z.ndim - 3]
    y, index = run(z, window, return_indices=True)
    where = torch.zeros_like(index)
    for step, n, t in zip(
        (math.prod(z.shape[k + 1 :]) for k in range(2, z.ndim)), z.shape[2:], window, strict=True
    ):
        where = where * t + index // step % n % t
    return y, where


@pytest.mark.parametrize("special", ["noise", "ties", "negative", "infinite", "NaN"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("no ")])
def test_the_reference_is_torch(name, special):
    shape, window = CASES[name]
    x = torch.randn(shape, dtype=torch.float64)
    if special == "ties":
        x = x.round().clamp(-1, 1)
    elif special == "negative":
        x = -5 - x.abs()
    elif special == "infinite":
        x = torch.where(x < 0.5, -math.inf, x)
    elif special == "NaN":
        x = torch.where(x > 1.0, math.nan, x)
    y, where = reference.max_pool(x, NOTHING, window)
    expected, places = by_torch(x, window)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(where.long(), places, rtol=0, atol=0)
    assert where.dtype == (torch.uint8 if math.prod(window) <= 256 else torch.int32)
    x.requires_grad_()
    g = torch.randn_like(y)
    (dz,) = torch.autograd.grad(by_torch(x, window)[0], x, g)
    ours = reference.max_pool_dgrad(g, where, window, tuple(shape[2:]))
    torch.testing.assert_close(ours, dz, rtol=0, atol=0)


def assert_bits(ours, expected):
    """Bit for bit, and in the same layout."""
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit(), expected.signbit())


def assert_right(x, window, p=NOTHING):
    """Exact where nothing is computed; else as near to float64 as the reference, and consistent."""
    passes, size = dispatch.passes(x), tuple(x.shape[2:])
    y, where = passes.max_pool(x, p, window)
    same, places = reference.max_pool(x, p, window)
    assert (y.stride(), where.stride()) == (same.stride(), places.stride())
    assert (y.dtype, where.dtype) == (x.dtype, places.dtype)
    if p.is_identity():
        assert_bits(y, same)
        assert_bits(where, places)
    else:
        wide = Prologue(*(t.double() if isinstance(t, torch.Tensor) else t for t in p))
        truth, _ = reference.max_pool(x.double(), wide, window)
        off, known = ((one.double() - truth).abs().max() for one in (y, same))
        assert off <= 2 * known + SLACK[x.dtype] * truth.abs().max()
        z = passes.materialize(x, p, None, x.dtype)
        slack = 4e-6 * truth.abs().max() if x.dtype == torch.float32 else SLACK[x.dtype]
        assert ((at_places(z, where, window) - y).abs() <= slack * (1 + y.abs())).all()
    g = torch.randn_like(y, memory_format=torch.contiguous_format)
    for one in (g, y, g.mean().expand(g.shape)):  # one of them is as the gradient of a sum is
        dz = passes.max_pool_dgrad(one, where, window, size)
        assert_bits(dz, reference.max_pool_dgrad(one, where, window, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype, kernels):
    shape, window = CASES[name]
    assert_right(torch.randn(shape).to(kernels, dtype), window)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 8, 21])
def test_every_layout(channels, kind, kernels):
    x = torch.randn(1, channels, 5, 4, 3).to(kernels)
    assert_right(laid_out(x, kind), (2, 2, 3))
    assert_right(laid_out(x, kind), (2, 2, 3), transform(x.shape, "relu", kernels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "prelu"])
@pytest.mark.parametrize("name", ["21 channels, ragged", "one axis"])
def test_a_pending_transform(name, activation, dtype, kernels):
    shape, window = CASES[name]
    x, p = torch.randn(shape).to(kernels, dtype), transform(shape, activation, kernels)
    assert_right(x, window, p)
    assert_right(x, window, p._replace(s2=None, t2=None))
    assert_right(x, window, Prologue(None, None, *p[2:]))


@pytest.mark.parametrize("special", ["ties", "negative", "infinite", "NaN", "zeros"])
def test_special_values(special, kernels):
    """Of equals the first; NaN before all, the last of several; and minus infinity is a value."""
    x = torch.randn(1, 8, 6, 6).to(kernels)
    x = {
        "ties": torch.full_like(x, 3.0),
        "negative": -5 - x.abs(),
        "infinite": torch.where(x < 0.5, -math.inf, x),
        "NaN": torch.where(x > 0.5, math.nan, x),
        "zeros": torch.where(x > 0, 0.0, -0.0),
    }[special]
    assert_right(x, (2, 3))
    p = Prologue(activation=Activation("relu"))
    y, where = dispatch.passes(x).max_pool(x, p, (2, 3))
    expected, places = by_torch(x.relu(), (2, 3))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(where.long(), places, rtol=0, atol=0)
    if special in ("ties", "negative", "zeros"):
        assert not where.any()


def test_offsets_beyond_31_bits(kernels, monkeypatch):
    """The kernels that such samples take, on a small one."""
    monkeypatch.setattr(tile, "is_wide", lambda *images: True)
    for name in ("21 channels, ragged", "more than a byte counts"):
        shape, window = CASES[name]
        assert_right(torch.randn(shape).to(kernels), window)


def pending(x, gamma, beta, slope):
    """Norm and PReLU, to be applied by whoever reads."""
    norm = Normalization(gamma, beta, 1e-5, Pool("group", 2))
    return defer(x).normalized(norm).activated(Activation("prelu"), slope)


@pytest.mark.parametrize("case", ["21 channels, ragged", "two axes", "one axis"])
def test_gradients_are_those_of_plain_modules(case):
    """Through the norm and the activation that were pending, in float64."""
    (n, _, *size), window = CASES[case]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(size) - 1](window)
    norm, act = nn.GroupNorm(2, 6).double(), nn.PReLU(6).double()
    x = torch.randn(n, 6, *size, dtype=torch.float64).requires_grad_()
    given = (x, *norm.parameters(), act.weight)
    with torch.no_grad():
        for parameter in given[1:]:
            parameter.normal_()
    expected = pool(act(norm(x)))
    g = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, given, g)
    with dispatch.fused_on_reference(), NothingRead():
        y = max_pool(pending(*given), window)
        ours = torch.autograd.grad(y, given, g)
    assert_near(y.contiguous(), expected.detach().contiguous())
    for one, other in zip(ours, grads, strict=True):
        assert_near(one.contiguous(), other)


def test_other_readers_and_a_residual():
    """Of what is pending, which then is added up; and of a sum, which is computed first."""
    x, r = torch.randn(2, 2, 6, 7, 8, dtype=torch.float64).requires_grad_().unbind()
    plain = F.max_pool2d(x.sigmoid(), 2).sum() + (x.sigmoid() ** 2).sum()
    plain = plain + F.max_pool2d(x.sigmoid() + r, (3, 2)).prod(1).sum()
    expected = torch.autograd.grad(plain, (x, r))
    with dispatch.fused_on_reference():
        z = defer(x).activated(Activation("sigmoid"))
        ours = max_pool(z, (2, 2)).sum() + (z.z() ** 2).sum()
        ours = ours + max_pool(z.plus(r), (3, 2)).prod(1).sum()
        found = torch.autograd.grad(ours, (x, r))
    assert_near(ours.detach(), plain.detach())
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_a_byte_per_window_is_kept():
    kept = []
    x = torch.randn(2, 8, 6, 8).requires_grad_()
    with (
        dispatch.fused_on_reference(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = max_pool(defer(x), (2, 2))
    ((dtype, nbytes),) = ((t.dtype, t.untyped_storage().nbytes()) for t in kept)
    assert (dtype, nbytes) == (torch.uint8, y.numel())


def test_second_derivatives_are_refused():
    x = torch.randn(1, 2, 4, 4).requires_grad_()
    with dispatch.fused_on_reference():
        y = max_pool(defer(x).activated(Activation("silu")), (2, 2))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("kind", ["1-D", "2-D channels-last", "3-D channels-last, 128 channels"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_is_compiled(arch, kind):
    """Images are accessed by 16 bytes, also those in words; nothing spills, and NaN stays NaN."""
    code = f"""
import re, torch, triton
from cassetta.kernels import aot, layout
found, reports, compile_ = [], [], triton.compile
def spy(*args, **options):
    found.append(compile_(*args, **options))
    return found[-1]
triton.compile = spy
one = aot.sample(torch.bfloat16, "{kind}", "relu", True, False)
one = one._replace(image=lambda shape: layout.empty(shape, torch.bfloat16, "meta"))
n, c, *size = one.shape
with aot.recorded({arch}, "", reports):
    for shape in (one.shape, (2, c + 5, *size)):
        aot.run(one._replace(shape=shape), "max_pool", "max_pool_dgrad")
assert not any(report.excess for report in reports)
for built in found:
    ptx = built.asm["ptx"]
    wide = len(re.findall(r"ld\\.global\\S*\\.v4\\.b32", ptx)) > 0
    wide &= len(re.findall(r"st\\.global\\S*\\.v4\\.b32", ptx)) > 0
    narrow = len(re.findall(r"(?:ld|st)\\.global\\S*\\.b(?:8|16)\\b", ptx))
    print(built.metadata.name, wide, narrow, len(re.findall(r"(?:max|min)\\.f32", ptx)))
"""
    env = {name: v for name, v in os.environ.items() if name != dispatch.INTERPRET}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["_max_pool_kernel", "_max_pool_dgrad_kernel"] * 2
    for name, *seen in rows:
        assert seen == ["True", "0", "0"], name
