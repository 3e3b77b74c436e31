"""Opcodes of memory, of other threads, of matrices, and those of sm_90: calls of the machine."""

import re

import numpy as np

from ptxsim.arithmetic import widened
from ptxsim.emitter import DTYPES, Emitter, kind_of, op, registers
from ptxsim.parse import Ins, Pair, Sym, UnsupportedError, Vec

# memory


def access(ins: Ins) -> tuple[str, int, int, str]:
    """Space, bytes of a word, words, and kind."""
    words = ins.words
    space = next((w.split("::")[0] for w in words if w.split("::")[0] in
                  ("global", "shared", "param", "local", "const")), "generic")  # fmt: skip
    count = next((int(w[1:]) for w in words if re.fullmatch(r"v[248]", w)), 1)
    kind, bits = kind_of(ins)
    if space not in ("global", "shared", "param"):
        raise UnsupportedError(f"{space} memory in {ins.text!r} ({ins.place})")
    return space, bits // 8, count, kind


@op("ld")
def _ld(e: Emitter, ins: Ins) -> None:
    space, width, count, kind = access(ins)
    d, a = ins.operands[:2]
    out = e.vector(d)
    assert len(out) == count, ins.text
    kind = "s" if kind == "s" else "u"
    if space == "param":
        assert count == 1, ins.text
        if not isinstance(a.base, Sym):
            raise UnsupportedError(f"computed parameter address in {ins.text!r}")
        dtype = np.dtype(DTYPES[kind, 8 * width]).name
        widened(e, d, kind, 8 * width, f"m.param({a.base.name!r}, {a.offset}, np.{dtype})")
        return
    old = [e.get(reg, kind) for reg in out] if e.guard else []
    bits = next(reg.bits for reg in out if reg is not None)
    types = [f"np.{np.dtype(DTYPES[kind, n]).name}" for n in (8 * width, bits)]
    e.call(ins, f"load_{space}", e.address(a), str(width), str(count), *types,
           f"({''.join(o + ', ' for o in old)})", out=out, kind=kind)  # fmt: skip


@op("st")
def _st(e: Emitter, ins: Ins) -> None:
    space, width, count, _ = access(ins)
    a, values = ins.operands[:2]
    values = [e.get(one, "u", 8 * width) for one in e.vector(values)]
    assert len(values) == count, ins.text
    e.call(ins, f"store_{space}", e.address(a), str(width), f"({', '.join(values)},)")


@op("atom", "red")
def _atom(e: Emitter, ins: Ins) -> None:
    words = [w.split("::")[0] for w in ins.words]
    kind, bits = kind_of(ins)
    space = "shared" if "shared" in words else "global" if "global" in words else ""
    names = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    how = next(w for w in words if w in names)
    if not space or how in ("inc", "dec"):
        raise UnsupportedError(f"{ins.text!r} ({ins.place})")
    has_result = ins.words[0] == "atom"
    d, a, *values = ins.operands if has_result else (None, *ins.operands)
    if isinstance(values[0], Vec):
        raise UnsupportedError(f"{ins.text!r} ({ins.place})")
    dtype = f"np.{np.dtype(DTYPES[kind, bits]).name}"
    args = [e.get(one, kind, bits) for one in values]
    old = e.get(d, kind) if e.guard and d is not None else "None"
    e.call(ins, "atomic", repr(space), e.address(a), repr(how), dtype, f"({', '.join(args)},)", old,
           out=[d] if d is not None else (), kind=kind)  # fmt: skip


@op("cp.async.ca", "cp.async.cg")
def _cp_async(e: Emitter, ins: Ins) -> None:
    to, of, size, *more = ins.operands
    if "L2::cache_hint" in ins.words:
        raise UnsupportedError(f"{ins.text!r} ({ins.place})")
    amount = int(size.text, 0)
    source = e.get(more[0], "u", 32) if more else e.constant(amount, np.uint32)
    e.call(ins, "copy_async", e.address(to), e.address(of), str(amount), source)


@op("cp.async.commit_group")
def _commit(e: Emitter, ins: Ins) -> None:
    e.call(ins, "commit_copies")


@op("cp.async.wait_group")
def _wait(e: Emitter, ins: Ins) -> None:
    e.call(ins, "wait_copies", ins.operands[0].text)


@op("cp.async.wait_all")
def _wait_all(e: Emitter, ins: Ins) -> None:
    e.call(ins, "wait_copies", "-1")


@op("cvta")
def _cvta(e: Emitter, ins: Ins) -> None:
    if not {"global", "param"} & set(ins.words):
        raise UnsupportedError(f"generic address in {ins.text!r} ({ins.place})")
    d, a = ins.operands
    e.put(d, "u", e.get(a, "u", d.bits))


@op("fence", "membar", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "nanosleep",
    "bar.warp", "pmevent", "discard", "applypriority")  # fmt: skip
def _nothing(e: Emitter, ins: Ins) -> None:
    """What orders or hints only: here everything is in order."""


@op("createpolicy")
def _createpolicy(e: Emitter, ins: Ins) -> None:
    e.put(ins.operands[0], "u", e.constant(0, np.uint64))


# other threads of the warp


@op("shfl.sync")
def _shfl(e: Emitter, ins: Ins) -> None:
    d, a, b, c, _ = ins.operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    if e.guard:
        raise UnsupportedError(f"guarded {ins.text!r} ({ins.place})")
    args = e.get(a, "u", 32), e.get(b, "u", 32), e.get(c, "u", 32), repr(ins.words[2])
    e.call(ins, "shuffle", *args, out=[first])
    if second is not None:
        raise UnsupportedError(f"predicate of {ins.text!r} ({ins.place})")


@op("vote.sync")
def _vote(e: Emitter, ins: Ins) -> None:
    d, a = ins.operands[:2]
    how = ins.words[2]
    kind = "u" if how == "ballot" else "p"
    e.call(ins, "vote", e.get(a, "p"), repr(how), out=[d], kind=kind)


@op("redux.sync")
def _redux(e: Emitter, ins: Ins) -> None:
    kind, bits = kind_of(ins)
    e.call(ins, "reduce", e.get(ins.operands[1], kind, bits), repr(ins.words[2]),
           out=[ins.operands[0]], kind=kind)  # fmt: skip


@op("elect.sync")
def _elect(e: Emitter, ins: Ins) -> None:
    d = ins.operands[0]
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    if first is not None:
        e.put(first, "u", e.constant(0, np.uint32))
    if second is not None:
        e.put(second, "p", "t.lane == N.u4(0)")


@op("activemask")
def _activemask(e: Emitter, ins: Ins) -> None:
    e.put(ins.operands[0], "u", e.constant(0xFFFFFFFF, np.uint32))


# matrices


@op("mma.sync.aligned")
def _mma(e: Emitter, ins: Ins) -> None:
    d, a, b, c = ins.operands
    if ins.words[4:6] != ["row", "col"] or ins.words[6] != "f32" or ins.words[9] != "f32":
        raise UnsupportedError(f"opcode {ins.opcode}")
    lists = [f"({', '.join(e.get(x, 'u', 32) for x in one.items)},)" for one in (a, b)]
    last = f"({', '.join(e.get(x, 'f', 32) for x in c.items)},)"
    e.call(ins, "multiply", *lists, last, repr(ins.words[3]), repr(ins.words[7]), out=d.items,
           kind="f")  # fmt: skip


@op("ldmatrix")
def _ldmatrix(e: Emitter, ins: Ins) -> None:
    d, a = ins.operands
    if "m8n8" not in ins.words or ins.words[-1] != "b16":
        raise UnsupportedError(f"opcode {ins.opcode}")
    out = e.vector(d)
    e.call(ins, "load_matrix", e.address(a), str(len(out)), str("trans" in ins.words), out=out)


@op("stmatrix")
def _stmatrix(e: Emitter, ins: Ins) -> None:
    a, d = ins.operands
    if "m8n8" not in ins.words or ins.words[-1] != "b16":
        raise UnsupportedError(f"opcode {ins.opcode}")
    values = ", ".join(e.get(x, "u", 32) for x in e.vector(d))
    e.call(ins, "store_matrix", e.address(a), f"({values},)", str("trans" in ins.words))


# sm_90


@op("mbarrier.init")
def _barrier_init(e: Emitter, ins: Ins) -> None:
    a, count = ins.operands
    e.call(ins, "barrier_init", e.address(a), e.get(count, "u", 32))


@op("mbarrier.inval")
def _barrier_inval(e: Emitter, ins: Ins) -> None:
    e.call(ins, "barrier_inval", e.address(ins.operands[0]))


@op("mbarrier.arrive")
def _barrier_arrive(e: Emitter, ins: Ins) -> None:
    d, a, *more = ins.operands
    if d is not None or "noComplete" in ins.words or "shared::cluster" in ins.words:
        raise UnsupportedError(f"{ins.text!r} ({ins.place})")
    one, none = e.constant(1, np.uint32), e.constant(0, np.uint32)
    value = e.get(more[0], "u", 32) if more else one
    args = (one, value) if "expect_tx" in ins.words else (value, none)
    e.call(ins, "barrier_arrive", e.address(a), *args)


@op("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")
def _barrier_wait(e: Emitter, ins: Ins) -> None:
    d, a, parity = ins.operands[:3]
    e.call(ins, "barrier_wait", e.address(a), e.get(parity, "u", 32), out=[d], kind="p")


@op("cp.async.bulk.tensor")
def _copy_box(e: Emitter, ins: Ins) -> None:
    words = [w.split("::")[0] for w in ins.words]
    if words[5:8] != ["shared", "global", "mbarrier"] or len(ins.operands) != 3:
        raise UnsupportedError(f"{ins.text!r} ({ins.place})")
    to, of, barrier = ins.operands
    first = [e.get(one, "u", 32) for one in of.coordinates]
    source = e.get(of.base, "u", 64)
    e.call(ins, "copy_box", e.address(to), source, e.address(barrier), *first)


@op("fence.proxy.async")
def _fence(e: Emitter, ins: Ins) -> None:
    e.call(ins, "fence")


@op("wgmma.fence")
def _group_fence(e: Emitter, ins: Ins) -> None:
    """Products are done at once, and registers are in order."""


@op("wgmma.commit_group")
def _group_commit(e: Emitter, ins: Ins) -> None:
    e.call(ins, "commit_products")


@op("wgmma.wait_group")
def _group_wait(e: Emitter, ins: Ins) -> None:
    e.call(ins, "wait_products", ins.operands[0].text)


@op("wgmma.mma_async.sync.aligned")
def _group_multiply(e: Emitter, ins: Ins) -> None:
    d, a, b, keep, *signs = ins.operands
    shape, result, kind = ins.words[4:7]
    if result != "f32" or not isinstance(d, Vec) or kind not in ("f16", "bf16", "tf32"):
        raise UnsupportedError(f"opcode {ins.opcode}")
    columns = int(re.match(r"m64n(\d+)k", shape)[1])
    numbers_ = [int(one.text) for one in signs]
    flips = numbers_[2:]  # of a, if it is in shared memory, and of b; none for tf32
    flip_b = flips[-1] if flips else 0
    flip_a = flips[0] if len(flips) == 2 else 0
    if isinstance(a, Vec):
        left = f"({', '.join(e.get(x, 'u', 32) for x in a.items)},)"
    else:
        left = e.get(a, "u", 64)
    old = f"({', '.join(e.get(x, 'f', 32) for x in d.items)},)"
    e.call(ins, "multiply_group", left, e.get(b, "u", 64), old, e.get(keep, "p"), str(columns),
           repr(kind), str(bool(flip_a)), str(bool(flip_b)), repr(tuple(numbers_[:2])),
           repr(tuple(reg.name for reg in registers(a)) if isinstance(a, Vec) else ()),
           out=d.items, kind="f")  # fmt: skip
