"""Arithmetic against torch, Python's integers, and definitions written as loops."""

import numpy as np
import pytest
import torch

from ptxsim import matrices, numerics as N

RNG = np.random.default_rng(0)


def floats(n=2000):
    bits = RNG.integers(0, 2**32, n, np.uint64).astype(np.uint32)
    edge = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x007FFFFF, 0x3F808000,
                     0x3F818000, 0x3F807FFF, 0x477FF000, 0x33000000], np.uint32)  # fmt: skip
    return np.concatenate(
        [bits, edge, RNG.standard_normal(n).astype(np.float32).view(np.uint32)]
    ).view(np.float32)


@pytest.mark.filterwarnings("ignore")
def test_half_precision_rounds_as_torch_does():
    x = floats()
    for kind, back in ((torch.bfloat16, N.from_bf16(N.to_bf16(x))),
                       (torch.float16, N.to_f16(x).astype(np.float32))):  # fmt: skip
        expected = torch.from_numpy(x).to(kind).float().numpy()
        np.testing.assert_array_equal(back, expected)
    cut = N.from_bf16(N.to_bf16(x, rz=True))
    fine = np.isfinite(x)
    assert (np.abs(cut[fine]) <= np.abs(x[fine])).all()


def test_integers():
    a = RNG.integers(-(2**31), 2**31, 3000).astype(np.int32)
    b = np.where(RNG.random(3000) < 0.5, RNG.integers(-9, 9, 3000), a[::-1] // 3).astype(np.int32)
    b[b == 0] = 7
    expected = [int(abs(int(x)) // abs(int(y))) * (1 if (x < 0) == (y < 0) else -1)
                for x, y in zip(a, b, strict=True)]  # fmt: skip
    assert N.divide(a, b).tolist() == np.array(expected).astype(np.int32).tolist()
    rest = [int(x) - q * int(y) for x, y, q in zip(a, b, expected, strict=True)]
    assert N.remainder(a, b).tolist() == rest
    assert N.divide(a.astype(np.int64), b.astype(np.int64)).tolist() == expected
    u = a.view(np.uint32)
    assert N.high(u, u).tolist() == [int(x) * int(x) >> 32 for x in u]
    for at, size in ((0, 32), (5, 7), (28, 9), (31, 1), (40, 3), (3, 0)):
        one = lambda v: np.array([v], np.uint32)  # noqa: E731
        assert N.extracted(u, one(at), one(size)).tolist() == [
            (int(x) >> min(at, 32)) & ((1 << size) - 1) for x in u
        ]
        signed = [(int(x) >> at & (1 << size) - 1) for x in a] if at + size <= 32 else None
        if signed and size:
            signed = [v - (1 << size) if v >> size - 1 else v for v in signed]
            assert N.extracted(a, one(at), one(size)).tolist() == signed
        if at < 32:
            mask = ((1 << size) - 1) << at & 0xFFFFFFFF
            assert N.inserted(u, ~u, one(at), one(size)).tolist() == [
                (~int(x) & 0xFFFFFFFF & ~mask) | (int(x) << at & mask) for x in u
            ]
    for amount in (0, 1, 31, 32, 40):
        by = np.array([amount], np.uint32)
        assert N.shift(u, by, True).tolist() == [int(x) << amount & 0xFFFFFFFF for x in u]
        assert N.shift(a, by, False).tolist() == [int(x) >> amount for x in a]


def test_bytes_and_bits():
    a, b = RNG.integers(0, 2**32, (2, 500), np.uint64).astype(np.uint32)
    raw = lambda x, y: int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")  # noqa: E731
    for how in (0x3210, 0x5410, 0x7632, 0x3340, 0x0123, 0xBA98, 0x8888):
        expected = []
        for x, y in zip(a, b, strict=True):
            data = raw(x, y)
            out = [data[how >> 4 * k & 7] for k in range(4)]
            signed = [0xFF * (v >> 7) if how >> 4 * k & 8 else v for k, v in enumerate(out)]
            expected.append(int.from_bytes(bytes(signed), "little"))
        assert N.permuted(a, b, np.array([how], np.uint32)).tolist() == expected
    assert N.looked_up(a, b, a ^ b, 0x96).tolist() == (a ^ b ^ a ^ b).tolist()
    assert N.looked_up(a, b, a[::-1], 0xCA).tolist() == ((a & b) | (~a & a[::-1])).tolist()
    assert N.leading(np.array([0, 1, 2**31, 12345], np.uint32)).tolist() == [32, 31, 0, 18]
    assert N.reversed_bits(np.array([1, 0x80000000], np.uint32)).tolist() == [2**31, 1]
    both = [(int(y) << 32 | int(x)) for x, y in zip(a, b, strict=True)]
    by = np.array([11], np.uint32)
    assert N.funnel(a, b, by, True, True).tolist() == [v << 11 >> 32 & 0xFFFFFFFF for v in both]
    assert N.funnel(a, b, by, False, False).tolist() == [v >> 11 & 0xFFFFFFFF for v in both]


@pytest.mark.filterwarnings("ignore")
def test_floats_to_integers():
    x = np.array([1.5, 2.5, -1.5, -0.2, 3e9, -3e9, np.nan, np.inf, -np.inf, 5e10], np.float32)
    limit = 2**31
    assert N.to_int(x, np.int32, "rzi").tolist() == [
        1, 2, -1, 0, limit - 1, -limit, 0, limit - 1, -limit, limit - 1]  # fmt: skip
    assert N.to_int(x, np.int32, "rni").tolist()[:4] == [2, 2, -2, 0]
    assert N.to_int(x, np.uint32, "rmi").tolist() == [
        1, 2, 0, 0, 3_000_000_000, 0, 0, 2**32 - 1, 0, 2**32 - 1]  # fmt: skip
    a, b = np.array([1, np.nan, 2], np.float32), np.array([2, 1, 2], np.float32)
    for how, expected in {"lt": [1, 0, 0], "ltu": [1, 1, 0], "ne": [1, 0, 0], "neu": [1, 1, 0],
                          "equ": [0, 1, 1], "geu": [0, 1, 1], "num": [1, 0, 1],
                          "nan": [0, 1, 0]}.items():  # fmt: skip
        assert N.compared(a, b, how).astype(int).tolist() == expected, how


@pytest.mark.parametrize(
    ("kind", "shape", "depth"),
    [
        ("f16", "m16n8k16", 16),
        ("bf16", "m16n8k16", 16),
        ("bf16", "m16n8k8", 8),
        ("tf32", "m16n8k8", 8),
        ("tf32", "m16n8k4", 4),
    ],
)
def test_products_of_fragments(kind, shape, depth):
    """Registers filled by the formulas of the PTX ISA, element by element."""
    warps = 3
    whole = lambda *s: RNG.integers(-8, 8, s).astype(np.float32)  # noqa: E731
    left, right, start = whole(warps, 16, depth), whole(warps, depth, 8), whole(warps, 16, 8)
    per = 1 if kind == "tf32" else 2  # numbers in a register
    block = depth // (4 * per)  # column blocks of A
    bits = {
        "tf32": lambda v: v.view(np.uint32),
        "f16": lambda v: v.astype(np.float16).view(np.uint16),
        "bf16": N.to_bf16,
    }[kind]

    def packed(values):  # (warps, 32, per) to a register
        raw = bits(np.ascontiguousarray(values, np.float32))
        out = sum(raw[..., k].astype(np.uint32) << np.uint32(16 * k) for k in range(per))
        return out.reshape(-1)

    lanes = [(lane >> 2, lane & 3) for lane in range(32)]
    a = tuple(
        packed(np.stack([left[:, g + 8 * (i % 2), t * per + i // 2 * 4 * per :][:, :per]
                         for g, t in lanes], 1))
        for i in range(2 * block)
    )  # fmt: skip
    b = tuple(
        packed(np.stack([right[:, t * per + i * 4 * per :, g][:, :per] for g, t in lanes], 1))
        for i in range(block)
    )
    c = tuple(np.stack([start[:, g + 8 * (i // 2), 2 * t + i % 2] for g, t in lanes], 1).reshape(-1)
              for i in range(4))  # fmt: skip
    matrices.check(shape, kind, a, b)
    found = matrices.multiply(matrices.left(a, kind, warps), matrices.right(b, kind, warps), c)
    truth = left @ right + start
    for i, one in enumerate(found):
        expected = np.stack([truth[:, g + 8 * (i // 2), 2 * t + i % 2] for g, t in lanes], 1)
        np.testing.assert_array_equal(one.reshape(warps, 32), expected)
