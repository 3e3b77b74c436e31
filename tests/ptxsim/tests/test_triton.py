"""Kernels that Triton compiles for the simulated target, against float64."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import ptxsim

pytestmark = pytest.mark.simulated


@triton.jit
def _sum_kernel(x, out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(v * v, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reductions(dtype):
    x = torch.randn(37, 300).to(dtype)
    out = torch.full((37,), float("nan"))
    _sum_kernel[(37,)](x, out, 300, B=512)
    torch.testing.assert_close(out.double(), x.double().square().sum(1), rtol=1e-5, atol=0)


@triton.jit
def _product_kernel(
    a, b, c, M, N, K, am, ak, bk, bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * am + k[None, :] * ak, mask=(m < M)[:, None] & (k < K)[None, :],
                    other=0.0)  # fmt: skip
        y = tl.load(b + k[:, None] * bk + n[None, :] * bn, mask=(k < K)[:, None] & (n < N)[None, :],
                    other=0.0)  # fmt: skip
        total = tl.dot(x, y, total)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=inside)


BLOCKS = [(64, 64, 32), (128, 16, 64), (64, 128, 16)]


@pytest.mark.parametrize("turned", ["", "a", "b", "ab"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_in_every_layout(dtype, turned):
    """Operands whose rows or columns run along memory: all layouts of shared memory."""
    block = BLOCKS[(len(turned) + dtype.itemsize + (dtype is torch.bfloat16)) % 3]
    a, b = torch.randn(100, 96).to(dtype), torch.randn(96, 80).to(dtype)
    a = a.T.contiguous().T if "a" in turned else a
    b = b.T.contiguous().T if "b" in turned else b
    c = torch.full((100, 80), float("nan"), dtype=dtype)
    grid = triton.cdiv(100, block[0]), triton.cdiv(80, block[1])
    _product_kernel[grid](a, b, c, 100, 80, 96, *a.stride(), *b.stride(), *block, 3)
    truth = a.double() @ b.double()
    eps = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-9}[dtype]  # tf32
    assert (c.double() - truth).abs().max() < eps * truth.abs().max()


@triton.jit
def _box_kernel(x, out, i, j, B0: tl.constexpr, B1: tl.constexpr):
    box = x.load([i, j])
    at = tl.arange(0, B0)[:, None] * B1 + tl.arange(0, B1)[None, :]
    tl.store(out + at, box)


@pytest.mark.parametrize("at", [(0, 0), (-3, -8), (4, 88), (100, 200), (-50, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boxes_end_in_zeros(dtype, at):
    x = torch.randn(10, 96).to(dtype)
    out = torch.full((16, 32), float("nan"), dtype=dtype)
    descriptor = TensorDescriptor(x, [10, 93], [96, 1], [16, 32])
    _box_kernel[(1,)](descriptor, out, *at, B0=16, B1=32)
    truth = torch.zeros(16, 32, dtype=dtype)
    for i in range(16):
        for j in range(32):
            if 0 <= i + at[0] < 10 and 0 <= j + at[1] < 93:
                truth[i, j] = x[i + at[0], j + at[1]]
    assert torch.equal(out, truth)


@pytest.mark.parametrize("at", [(0, 2), (-3, -5), (100, 97)], ids=str)
def test_a_box_that_begins_within_16_bytes(at, hopper):
    x, out = torch.randn(10, 96), torch.empty(16, 32)
    descriptor = TensorDescriptor(x, [10, 93], [96, 1], [16, 32])
    with pytest.raises(ptxsim.SimulationError, match="an illegal instruction"):
        _box_kernel[(1,)](descriptor, out, *at, B0=16, B1=32)


def test_a_tensor_map_that_cuda_refuses(hopper):
    x = torch.randn(10, 90)
    # TensorDescriptor itself asks for strides of 16 bytes; the driver's check is its own
    with pytest.raises(ptxsim.SimulationError, match="strides of"):
        triton.runtime.driver.active.utils.fill_tma_descriptor(
            x.data_ptr() // 16 * 16, 0, 4, 7, [16, 32], [10, 90], [90, 1], 0
        )


@triton.jit
def _wild_kernel(x, out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.load(x + i), mask=i < n)  # the load has no mask


def test_a_load_without_its_mask():
    x, out = torch.randn(100), torch.empty(100)
    with pytest.raises(ptxsim.MemoryFault, match="behind the end of argument 0 .100 float32"):
        _wild_kernel[(1,)](x, out, 100, B=128)


@triton.jit
def _count_kernel(out, n):
    i = tl.program_id(0)
    tl.atomic_add(out + i % n, i)


def test_atomics():
    out = torch.zeros(3, dtype=torch.int32)
    _count_kernel[(10,)](out, 3)
    assert out.tolist() == [18, 12, 15]


@triton.jit
def _scan_kernel(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.cumsum(tl.load(x + i), 0))


def test_scans():
    x, out = torch.randn(256), torch.empty(256)
    _scan_kernel[(1,)](x, out, B=256)
    torch.testing.assert_close(out, x.cumsum(0), rtol=1e-4, atol=1e-4)
