"""Opcodes of numbers and predicates: lines of Python for each, see `emitter`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.emitter import DTYPES, Emitter, kind_of, op
from ptxsim.parse import Imm, Ins, Pair, Reg, UnsupportedError, Vec

# integers, predicates

_SIGNLESS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_MODES = ("rn", "rz", "rm", "rp")


@op("add", "sub", "and", "or", "xor")
def _binary(e: Emitter, ins: Ins) -> None:
    sign, word = _SIGNLESS[ins.words[0]], ins.words[-1]
    d, a, b = ins.operands
    if word == "pred":
        e.put(d, "p", f"{e.get(a, 'p')} {sign} {e.get(b, 'p')}")
        return
    if word.startswith(("f", "bf")):
        _float(e, ins, lambda a, b: f"({a} {sign} {b})")
        return
    bits = kind_of(ins)[1]
    if "sat" in ins.words or "cc" in ins.words:
        raise UnsupportedError(f"opcode {ins.opcode}")
    e.put(d, "u", f"{e.get(a, 'u', bits)} {sign} {e.get(b, 'u', bits)}")


def _float(e: Emitter, ins: Ins, formula: Callable[..., str]) -> None:
    """A formula of floats, in the type of the opcode; half precision is computed in float32."""
    word, (d, *operands) = ins.words[-1], ins.operands
    exact = {"rz", "rm", "rp"} & set(ins.words)
    if exact:
        raise UnsupportedError(f"rounding .{exact.pop()} of {ins.opcode}")
    if word in ("f32", "f64"):
        values = [e.get(x, "f", int(word[1:])) for x in operands]
        if "ftz" in ins.words:
            values = [f"N.flush({v})" for v in values]
        result = formula(*values)
        if "sat" in ins.words:
            result = f"N.saturate({result})"
        e.put(d, "f", f"N.flush({result})" if "ftz" in ins.words else result)
        return
    kind = "bf16" if word.startswith("bf16") else "f16"
    if word.endswith("x2"):
        pairs = [e.fresh(f"N.halves({e.get(x, 'u', 32)}, {kind!r})") for x in operands]
        sides = [formula(*(f"{pair}[{k}]" for pair in pairs)) for k in (0, 1)]
        e.put(d, "u", f"N.packed({sides[0]}, {sides[1]}, {kind!r})")
        return
    values = [_half(e, x, kind) for x in operands]
    result = formula(*values)
    e.put(d, "u", f"N.to_bf16({result})" if kind == "bf16" else f"N.to_f16({result}).view(N.u2)")


def _half(e: Emitter, x: Any, kind: str) -> str:
    if kind == "bf16":
        return f"N.from_bf16({e.get(x, 'u', 16)})"
    return f"{e.get(x, 'f', 16)}.astype(N.f4)"


@op("mul")
def _mul(e: Emitter, ins: Ins) -> None:
    d, a, b = ins.operands
    if ins.words[-1].startswith(("f", "bf")):
        _float(e, ins, lambda a, b: f"({a} * {b})")
        return
    kind, bits = kind_of(ins)
    if "wide" in ins.words:
        e.put(d, kind, _wide(e, a, b, kind, bits))
    elif "hi" in ins.words and bits == 32:
        e.put(d, kind, f"N.high({e.get(a, kind, bits)}, {e.get(b, kind, bits)})")
    elif "hi" in ins.words and bits == 16:
        e.put(
            d,
            kind,
            f"(({_wide(e, a, b, kind, bits)}) >> 16).astype(np.{np.dtype(DTYPES[kind, 16]).name})",
        )
    elif "lo" in ins.words:
        e.put(d, "u", f"{e.get(a, 'u', bits)} * {e.get(b, 'u', bits)}")
    else:
        raise UnsupportedError(f"opcode {ins.opcode}")


def _wide(e: Emitter, a: Any, b: Any, kind: str, bits: int) -> str:
    dtype = np.dtype(DTYPES[kind, 2 * bits]).name
    x, y = (f"{e.get(one, kind, bits)}.astype(np.{dtype})" for one in (a, b))
    return f"{x} * {y}"


@op("mad")
def _mad(e: Emitter, ins: Ins) -> None:
    d, a, b, c = ins.operands
    if ins.words[-1] == "f32":
        _float(e, ins, lambda a, b, c: f"N.fma({a}, {b}, {c})")
        return
    kind, bits = kind_of(ins)
    if "wide" in ins.words:
        e.put(d, kind, f"{_wide(e, a, b, kind, bits)} + {e.get(c, kind, 2 * bits)}")
    elif "lo" in ins.words:
        e.put(d, "u", f"{e.get(a, 'u', bits)} * {e.get(b, 'u', bits)} + {e.get(c, 'u', bits)}")
    elif "hi" in ins.words and bits == 32:
        x, y, z = (e.get(one, kind, bits) for one in (a, b, c))
        e.put(d, kind, f"N.high({x}, {y}) + {z}")
    else:
        raise UnsupportedError(f"opcode {ins.opcode}")


@op("div", "rem")
def _div(e: Emitter, ins: Ins) -> None:
    d, a, b = ins.operands
    if ins.words[-1] in ("f32", "f64"):
        exact = "rn" in ins.words or ins.words[-1] == "f64"
        formula = "({} / {})" if exact else "N.approximate({} / {}, 'div')"
        _float(e, ins, lambda a, b: formula.format(a, b))
        return
    kind, bits = kind_of(ins)
    name = "divide" if ins.words[0] == "div" else "remainder"
    e.put(d, kind, f"N.{name}({e.get(a, kind, bits)}, {e.get(b, kind, bits)})")


@op("min", "max")
def _extreme(e: Emitter, ins: Ins) -> None:
    d, a, b = ins.operands
    first = ins.words[0]
    if ins.words[-1].startswith(("f", "bf")):
        name = ("minimum", "maximum") if "NaN" in ins.words else ("fmin", "fmax")
        function = name[first == "max"]
        _float(e, ins, lambda a, b: f"np.{function}({a}, {b})")
        return
    kind, bits = kind_of(ins)
    e.put(d, kind, f"np.{first}imum({e.get(a, kind, bits)}, {e.get(b, kind, bits)})")


@op("neg", "abs")
def _unary(e: Emitter, ins: Ins) -> None:
    name = {"neg": "negative", "abs": "abs"}[ins.words[0]]
    if ins.words[-1].startswith(("f", "bf")):
        _float(e, ins, lambda a: f"np.{name}({a})")
        return
    kind, bits = kind_of(ins)
    e.put(ins.operands[0], kind, f"np.{name}({e.get(ins.operands[1], kind, bits)})")


@op("not")
def _not(e: Emitter, ins: Ins) -> None:
    kind = "p" if ins.words[-1] == "pred" else "u"
    e.put(ins.operands[0], kind, f"~{e.get(ins.operands[1], kind)}")


@op("shl", "shr")
def _shift(e: Emitter, ins: Ins) -> None:
    d, a, b = ins.operands
    kind, bits = kind_of(ins)
    left = ins.words[0] == "shl"
    kind = "u" if left else kind
    value = e.get(a, kind, bits)
    if isinstance(b, Imm) and int(b.text, 0) < bits:
        by = e.constant(int(b.text, 0), DTYPES[kind, bits])
        e.put(d, kind, f"{value} {'<<' if left else '>>'} {by}")
    else:
        e.put(d, kind, f"N.shift({value}, {e.get(b, 'u', 32)}, {left})")


_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<",
            "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip


@op("setp")
def _setp(e: Emitter, ins: Ins) -> None:
    how, word = ins.words[1], ins.words[-1]
    d, a, b, *more = ins.operands
    if word.endswith("x2"):
        kind = "bf16" if word.startswith("bf16") else "f16"
        x, y = (e.fresh(f"N.halves({e.get(one, 'u', 32)}, {kind!r})") for one in (a, b))
        assert isinstance(d, Pair), ins.text
        assert not more, ins.text
        for k, reg in enumerate((d.first, d.second)):
            e.put(reg, "p", f"N.compared({x}[{k}], {y}[{k}], {how!r})")
        return
    if word in ("f16", "bf16"):
        result = f"N.compared({_half(e, a, word)}, {_half(e, b, word)}, {how!r})"
    elif word in ("f32", "f64"):
        x, y = (e.get(one, "f", int(word[1:])) for one in (a, b))
        if how in ("lt", "le", "gt", "ge", "eq"):
            result = f"{x} {_COMPARE[how]} {y}"
        else:
            result = f"N.compared({x}, {y}, {how!r})"
    else:
        kind, bits = kind_of(ins)
        result = f"{e.get(a, kind, bits)} {_COMPARE[how]} {e.get(b, kind, bits)}"
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    sign = {"and": "&", "or": "|", "xor": "^"}.get(ins.words[2]) if more else None
    test = e.fresh(result)
    other = f" {sign} {e.get(more[0], 'p')}" if sign else ""
    e.put(first, "p", test + other)
    if second is not None:
        e.put(second, "p", f"~{test}{other}")


@op("selp")
def _selp(e: Emitter, ins: Ins) -> None:
    d, a, b, c = ins.operands
    bits = kind_of(ins)[1]
    kind = "f" if ins.words[-1] in ("f32", "f64") else "u"
    e.put(d, kind, f"np.where({e.get(c, 'p')}, {e.get(a, kind, bits)}, {e.get(b, kind, bits)})")


@op("mov")
def _mov(e: Emitter, ins: Ins) -> None:
    d, a = ins.operands
    word = ins.words[-1]
    if word == "pred":
        e.put(d, "p", e.get(a, "p"))
        return
    bits = kind_of(ins)[1]
    if isinstance(d, Vec):
        part = bits // len(d.items)
        whole = e.fresh(e.get(a, "u", bits))
        dtype = np.dtype(DTYPES["u", part]).name
        for k, reg in enumerate(d.items):
            by = f" >> {e.constant(k * part, DTYPES['u', bits])}" if k else ""
            e.put(reg, "u", f"({whole}{by}).astype(np.{dtype})")
    elif isinstance(a, Vec):
        part = bits // len(a.items)
        dtype = np.dtype(DTYPES["u", bits]).name
        by = [e.constant(k * part, DTYPES["u", bits]) for k in range(len(a.items))]
        terms = [
            f"({e.get(one, 'u', part)}.astype(np.{dtype}) << {k})"
            for one, k in zip(a.items, by, strict=True)
        ]
        e.put(d, "u", " | ".join(terms))
    elif isinstance(a, Reg) and a.name in e.have and not e.guard and a.bits == d.bits:
        kind = next(iter(e.have[a.name]))
        e.put(d, kind, e.get(a, kind))
    else:
        e.put(d, "u", e.get(a, "u", bits))


@op("prmt")
def _prmt(e: Emitter, ins: Ins) -> None:
    if ins.opcode != "prmt.b32":
        raise UnsupportedError(f"opcode {ins.opcode}")
    d, *rest = ins.operands
    e.put(d, "u", f"N.permuted({', '.join(e.get(x, 'u', 32) for x in rest)})")


@op("bfe")
def _bfe(e: Emitter, ins: Ins) -> None:
    d, a, b, c = ins.operands
    kind, bits = kind_of(ins)
    at, size = e.get(b, "u", 32), e.get(c, "u", 32)
    if bits == 64:
        e.put(d, kind, f"N.extracted64({e.get(a, kind, 64)}, {at}, {size})")
        return
    e.put(d, kind, f"N.extracted({e.get(a, kind, 32)}, {at}, {size})")


@op("bfi.b32")
def _bfi(e: Emitter, ins: Ins) -> None:
    d, *rest = ins.operands
    e.put(d, "u", f"N.inserted({', '.join(e.get(x, 'u', 32) for x in rest)})")


@op("shf")
def _shf(e: Emitter, ins: Ins) -> None:
    d, *rest = ins.operands
    values = ", ".join(e.get(x, "u", 32) for x in rest)
    e.put(d, "u", f"N.funnel({values}, {ins.words[1] == 'l'}, {'wrap' in ins.words})")


@op("lop3.b32")
def _lop3(e: Emitter, ins: Ins) -> None:
    d, a, b, c, table = ins.operands
    values = ", ".join(e.get(x, "u", 32) for x in (a, b, c))
    e.put(d, "u", f"N.looked_up({values}, {int(table.text.rstrip('U'), 0)})")


@op("popc.b32", "clz.b32", "brev.b32")
def _bits(e: Emitter, ins: Ins) -> None:
    name = {"popc": "counted", "clz": "leading", "brev": "reversed_bits"}[ins.words[0]]
    e.put(ins.operands[0], "u", f"N.{name}({e.get(ins.operands[1], 'u', 32)})")


# floats


@op("fma")
def _fma(e: Emitter, ins: Ins) -> None:
    if "relu" in ins.words:
        raise UnsupportedError(f"opcode {ins.opcode}")
    if ins.words[-1] == "f64":
        raise UnsupportedError(f"opcode {ins.opcode}")
    _float(e, ins, lambda a, b, c: f"N.fma({a}, {b}, {c})")


_FUNCTIONS = {
    "ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "(N.f4(1) / {})", "sqrt": "np.sqrt({})",
    "rsqrt": "(N.f4(1) / np.sqrt({}))", "sin": "np.sin({})", "cos": "np.cos({})",
    "tanh": "np.tanh({})",
}  # fmt: skip


@op(*_FUNCTIONS)
def _function(e: Emitter, ins: Ins) -> None:
    name = ins.words[0]
    formula = _FUNCTIONS[name]
    if "approx" in ins.words and ins.words[-1] == "f32":
        formula = f"N.approximate({formula}, {name!r})"
    _float(e, ins, lambda a: formula.format(a))


@op("copysign.f32")
def _copysign(e: Emitter, ins: Ins) -> None:
    d, a, b = ins.operands
    e.put(d, "f", f"np.copysign({e.get(b, 'f', 32)}, {e.get(a, 'f', 32)})")


@op("cvt")
def _cvt(e: Emitter, ins: Ins) -> None:
    to, of = ins.words[-2:]
    known = {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", to, of, "cvt"}
    if strange := set(ins.words) - known:
        raise UnsupportedError(f".{strange.pop()} of {ins.opcode}")
    d, a, *more = ins.operands
    rz = "rz" in ins.words
    if to in ("bf16x2", "f16x2") and of == "f32":
        low, high = e.get(more[0], "f", 32), e.get(a, "f", 32)
        e.put(d, "u", f"N.packed({low}, {high}, {to[:-2]!r}, {rz})")
        return
    whole = next((one for one in ins.words if one in ("rni", "rzi", "rmi", "rpi")), "")
    if to == "tf32":
        e.put(d, "u", f"N.to_tf32({e.get(a, 'f', 32)})")
    elif of in ("f16", "bf16", "f32", "f64"):
        value = _half(e, a, of) if of.endswith("16") else e.get(a, "f", int(of[1:]))
        if "ftz" in ins.words and of == "f32":
            value = f"N.flush({value})"
        _from_float(e, ins, d, value, to, whole, rz)
    else:
        kind, bits = kind_of(ins, of)
        value = e.get(a, kind, bits)
        _from_int(e, ins, d, value, to)


def _from_float(e, ins, d, value, to, whole, rz) -> None:
    if to in ("f16", "bf16"):
        value = f"N.rounded({value}, {whole!r})" if whole else value
        more = ".view(N.u2)" if to == "f16" else ""
        e.put(d, "u", f"N.to_{to}({value}, {rz}){more}")
    elif to in ("f32", "f64"):
        if {"rz", "rm", "rp"} & set(ins.words):
            raise UnsupportedError(f"opcode {ins.opcode}")
        value = f"N.rounded({value}, {whole!r})" if whole else value
        value = f"N.saturate({value})" if "sat" in ins.words else value
        e.put(d, "f", f"({value}).astype(np.float{to[1:]})")
    else:
        kind, bits = kind_of(ins, to)
        name = np.dtype(DTYPES[kind, bits]).name
        widened(e, d, kind, bits, f"N.to_int({value}, np.{name}, {whole!r})")


def _from_int(e, ins, d, value, to) -> None:
    if to in ("f32", "f64"):
        if {"rz", "rm", "rp"} & set(ins.words):
            raise UnsupportedError(f"opcode {ins.opcode}")
        e.put(d, "f", f"{value}.astype(np.float{to[1:]})")
    elif to in ("f16", "bf16"):
        more = ".view(N.u2)" if to == "f16" else ""
        e.put(d, "u", f"N.to_{to}({value}.astype(N.f4)){more}")
    else:
        if "sat" in ins.words:
            raise UnsupportedError(f"opcode {ins.opcode}")
        kind, bits = kind_of(ins, to)
        widened(e, d, kind, bits, f"{value}.astype(np.{np.dtype(DTYPES[kind, bits]).name})")


def widened(e: Emitter, d: Reg, kind: str, bits: int, value: str) -> None:
    """Into a register that may be wider than the type, its sign spread."""
    if d.bits != bits:
        value = f"{value}.astype(np.{np.dtype(DTYPES[kind, d.bits]).name})"
    e.put(d, kind, value)
