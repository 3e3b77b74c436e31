"""A kernel of which triton and ptxas make unsafe code for sm_90: an operand that is also summed has
a buffer too few (triton#6691); one that is changed is in registers (triton#11781)."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, c, s, K, SUM: tl.constexpr, HALVE: tl.constexpr, STAGES: tl.constexpr):
    """Store the product of a (64, K) and b (K, 64) to c, halved with HALVE; with SUM, the sums of b
    to s (64,)."""
    m, n, k = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 32)
    total, sums = tl.zeros((64, 64), tl.float32), tl.zeros((64,), tl.float32)
    for start in tl.range(0, K, 32, num_stages=STAGES):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        y = tl.load(b + (start + k)[:, None] * 64 + n[None, :])
        if SUM:
            sums += tl.sum(y.to(tl.float32), 0)
        if HALVE:
            x = (x * 0.5).to(y.dtype)
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * 64 + n[None, :], total)
    tl.store(s + n, sums)
