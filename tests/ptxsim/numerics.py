"""Arithmetic as the GPU does it, on NumPy arrays: rounding, conversions, bit fields.

Every function takes and returns arrays of the type that its name or docstring says; arrays of one
element stand for a value that all threads share.
"""

import numpy as np

Array = np.ndarray
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i4, i8 = np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64


def from_bf16(bits: Array) -> Array:
    """uint16 to float32."""
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x: Array, rz: bool = False) -> Array:
    """float32 to uint16, to the nearest, ties to even, or toward zero."""
    bits = x.view(u4)
    up = u4(0) if rz else u4(0x7FFF) + (bits >> u4(16) & u4(1))
    out = (bits + up) >> u4(16)
    return np.where(x != x, u2(0x7FFF), out.astype(u2))


def to_f16(x: Array, rz: bool = False) -> Array:
    """float32 to float16."""
    out = x.astype(f2)
    if rz:
        far = np.abs(out.astype(f4)) > np.abs(x)
        out = np.where(far, (out.view(u2) - u2(1)).view(f2), out)
    return out


def to_tf32(x: Array, rna: bool = True) -> Array:
    """uint32 bits of a float32, rounded to 10 bits of mantissa, ties away from zero; or cut."""
    bits = x.view(u4)
    out = (bits + u4(0x1000) if rna else bits) & u4(0xFFFFE000)
    return np.where(x != x, bits, out) if rna else out


def halves(pair: Array, kind: str) -> tuple[Array, Array]:
    """The two 16-bit numbers of uint32, low and high, as float32."""
    low, high = (pair & u4(0xFFFF)).astype(u2), (pair >> u4(16)).astype(u2)
    if kind == "bf16":
        return from_bf16(low), from_bf16(high)
    return low.view(f2).astype(f4), high.view(f2).astype(f4)


def packed(low: Array, high: Array, kind: str, rz: bool = False) -> Array:
    """Two float32 as two 16-bit numbers in uint32."""
    if kind == "bf16":
        low, high = to_bf16(low, rz), to_bf16(high, rz)
    else:
        low, high = to_f16(low, rz).view(u2), to_f16(high, rz).view(u2)
    return low.astype(u4) | (high.astype(u4) << u4(16))


WORST = [False]
"""Whether approximations are as far off as the PTX ISA allows."""
_ERROR = {"ex2": 2.0**-22, "lg2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22.4, "div": 2.0**-22,
          "sqrt": 2.0**-23, "tanh": 2.0**-11, "sin": 2.0**-20.9, "cos": 2.0**-20.9}  # fmt: skip


def approximate(x: Array, name: str) -> Array:
    """The value, or, with WORST, one that is off by the largest error, to one side or the other."""
    if not WORST[0]:
        return x
    side = np.where(x.view(u4) * u4(2654435761) >> u4(31), _ERROR[name], -_ERROR[name])
    if name in ("lg2", "sin", "cos"):  # the error is absolute
        return (x + side).astype(f4)
    exact = (x == 1) | (x == 0)  # (what is exact on all GPUs)
    return np.where(exact, x, x * (1 + side)).astype(f4)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, but for a double rounding in one of some 2^29 cases."""
    return (a.astype(f8) * b + c).astype(f4)


def flush(x: Array) -> Array:
    """Subnormal numbers to zero, of their sign."""
    small = np.abs(x) < f4(1.1754944e-38)
    return np.where(small, np.copysign(f4(0), x), x) if small.any() else x


def saturate(x: Array) -> Array:
    """Into [0, 1], NaN to 0."""
    return np.where(x != x, f4(0), np.clip(x, f4(0), f4(1)))


def rounded(x: Array, mode: str) -> Array:
    """To an integer, in the type of x: rni, rzi, rmi, rpi."""
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def to_int(x: Array, kind: type, mode: str) -> Array:
    """A float to an integer type: NaN to 0, and to its limits what is beyond them."""
    info = np.iinfo(kind)
    whole = rounded(x.astype(f8), mode)
    out = np.where(whole != whole, 0.0, whole)
    low, high = out <= info.min, out >= info.max
    safe = np.where(low | high, 0.0, out).astype(kind)
    return np.where(low, kind(info.min), np.where(high, kind(info.max), safe))


def divide(a: Array, b: Array) -> Array:
    """Integers, toward zero; by zero it gives all ones."""
    zero = b == 0
    if a.dtype.itemsize == 8:
        c = np.where(zero, b.dtype.type(1), b)
        q = a // c
        q = q + ((q < 0) & (q * c != a)).astype(a.dtype)
    else:
        c = np.where(zero, 1, b).astype(f8)
        q = np.trunc(a / c).astype(i8).astype(a.dtype)
    return np.where(zero, (~np.zeros(1, a.dtype))[0], q)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of a."""
    return a - divide(a, b) * b


def shift(a: Array, by: Array, left: bool) -> Array:
    """By as many bits as `by` (uint32) says; by more than there are, everything is shifted out."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(by, u4(bits - 1)).astype(a.dtype)
    out = a << amount if left else a >> amount
    if left or a.dtype.kind == "u":
        return np.where(by >= u4(bits), a.dtype.type(0), out)
    return out


def high(a: Array, b: Array) -> Array:
    """The upper half of a product of 32-bit integers."""
    wide = i8 if a.dtype.kind == "i" else u8
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def permuted(a: Array, b: Array, how: Array) -> Array:
    """prmt: four of the eight bytes of b:a, or their signs."""
    both = (b.astype(u8) << u8(32)) | a.astype(u8)
    out = u4(0)
    for k in range(4):
        pick = (how >> u4(4 * k)) & u4(0xF)
        byte = ((both >> ((pick & u4(7)) * u4(8)).astype(u8)) & u8(0xFF)).astype(u4)
        sign = np.where(byte & u4(0x80), u4(0xFF), u4(0))
        out = out | (np.where(pick & u4(8), sign, byte) << u4(8 * k))
    return out


def extracted(a: Array, at: Array, size: Array) -> Array:
    """bfe: a field of 32 bits, its sign spread if a is signed."""
    at, size = np.minimum(at & u4(0xFF), u4(32)), np.minimum(size & u4(0xFF), u4(32))
    wide = a.astype(i8 if a.dtype == i4 else u8)
    if a.dtype == i4:  # beyond the end, the sign
        up = i8(64) - np.minimum(at.astype(i8) + size, i8(32))
        field = (wide << up) >> np.minimum(up + at, i8(63))
        return np.where(size == 0, i4(0), field.astype(i4))
    mask = (u8(1) << size.astype(u8)) - u8(1)
    return ((wide >> at.astype(u8)) & mask).astype(u4)


def extracted64(a: Array, at: Array, size: Array) -> Array:
    """bfe of 64 bits; fields that end inside."""
    at, size = (at & u4(0xFF)).astype(i8), (size & u4(0xFF)).astype(i8)
    if np.any(at + size > 64) or np.any(size == 0):
        raise NotImplementedError("bfe.64 beyond the end")
    if a.dtype == i8:
        return (a << (i8(64) - at - size)) >> (i8(64) - size)
    return (a << (i8(64) - at - size).astype(u8)) >> (i8(64) - size).astype(u8)


def inserted(a: Array, b: Array, at: Array, size: Array) -> Array:
    """bfi: the low bits of a, into b."""
    at, size = np.minimum(at & u4(0xFF), u4(32)), np.minimum(size & u4(0xFF), u4(32))
    mask = (((u8(1) << size.astype(u8)) - u8(1)) << at.astype(u8)).astype(u4)
    return (b & ~mask) | ((a.astype(u8) << at.astype(u8)).astype(u4) & mask)


def funnel(a: Array, b: Array, by: Array, left: bool, wrap: bool) -> Array:
    """shf: 32 bits of b:a."""
    amount = (by & u4(31) if wrap else np.minimum(by, u4(32))).astype(u8)
    both = (b.astype(u8) << u8(32)) | a
    return ((both << amount) >> u8(32) if left else both >> amount).astype(u4)


def looked_up(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits."""
    out = np.zeros(1, u4)
    for k in range(8):
        if table >> k & 1:
            out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return out


def counted(a: Array) -> Array:
    """popc."""
    return np.bitwise_count(a).astype(u4)


def leading(a: Array) -> Array:
    """clz of uint32: exact, as a double holds 32 bits."""
    return (u4(32) - np.frexp(a.astype(f8))[1].astype(u4)).astype(u4)


def reversed_bits(a: Array) -> Array:
    """brev."""
    bits = np.unpackbits(np.ascontiguousarray(a).view(u1).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(u4)[:, 0]


def compared(a: Array, b: Array, how: str) -> Array:
    """setp of floats, with NaN."""
    if how in ("num", "nan"):
        nan = (a != a) | (b != b)
        return nan if how == "nan" else ~nan
    if how == "neu":
        return a != b
    if how == "ne":
        return (a != b) & (a == a) & (b == b)
    if how == "equ":
        return ~((a < b) | (a > b))
    if how.endswith("u"):
        opposite = {"ltu": np.greater_equal, "leu": np.greater, "gtu": np.less_equal,
                    "geu": np.less}  # fmt: skip
        return ~opposite[how](a, b)
    return {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
            "eq": np.equal}[how](a, b)  # fmt: skip
