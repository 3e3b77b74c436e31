"""What must be found, and where threads part: in PTX written by hand."""

import numpy as np
import pytest

import ptxsim

PLACE = "mul.wide.u32 %rd80, %r90, 4; add.s64 %rd81, %rd1, %rd80;"  # of a float of each thread


def test_stores_and_special_registers(run, zeros):
    out = zeros(64, np.uint32)
    run(PLACE + "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 100, %r90;"
        "mul.wide.u32 %rd3, %r1, 128; add.s64 %rd81, %rd81, %rd3; st.global.b32 [%rd81], %r2;",
        out, grid=(2, 1, 1))  # fmt: skip
    assert out.tolist() == [*range(32), *range(100, 132)]


@pytest.mark.parametrize(("at", "words"), [
    ("add.s64 %rd81, %rd81, 4;", ["out of bounds", "0 bytes behind the end", "thread 31"]),
    ("sub.s64 %rd81, %rd81, 4;", ["out of bounds", "before array 0", "thread 0"]),
    ("add.s64 %rd81, %rd81, 2;", ["misaligned", "thread 0", "st.global.b32"]),
])  # fmt: skip
def test_a_wrong_address_is_named(at, words, run, zeros):
    with pytest.raises(ptxsim.MemoryFault) as error:
        run(PLACE + at + "st.global.b32 [%rd81], %r90;", zeros(32))
    assert all(word in str(error.value) for word in words), error.value


def test_a_misaligned_vector_is_found(run, zeros):
    with pytest.raises(ptxsim.MemoryFault, match="misaligned read of 16 bytes"):
        run(PLACE + "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd81];", zeros(64))


def test_a_guard_keeps_threads_from_bad_addresses(run, zeros):
    out = zeros(16, np.uint32)
    run(PLACE + "setp.lt.u32 %p1, %r90, 16; @%p1 st.global.b32 [%rd81], %r90;", out)
    assert out.tolist() == list(range(16))


def test_shared_memory_that_nobody_has_written_is_poison(run, zeros):
    out = zeros(32)
    run(PLACE + "shl.b32 %r1, %r90, 2; ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd81], %r2;", out)
    assert np.isnan(out).all()


COPY = (
    PLACE
    + """
add.s64 %rd82, %rd2, %rd80; shl.b32 %r1, %r90, 2;
cp.async.ca.shared.global [%r1], [%rd82], 0x4;
cp.async.commit_group;
{wait}
bar.sync 0;
xor.b32 %r2, %r1, 4; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd81], %r3;
"""
)


@pytest.mark.parametrize(("wait", "arrived"), [("cp.async.wait_group 0;", True), ("", False),
                                           ("cp.async.wait_group 1;", False)])  # fmt: skip
def test_a_copy_arrives_when_it_is_waited_for(wait, arrived, run, zeros):
    out, source = zeros(32), zeros(32)
    source[:] = np.arange(32)
    run(COPY.format(wait=wait), out, source)
    assert np.isnan(out).all() != arrived
    assert not arrived or out.tolist() == [k ^ 1 for k in range(32)]


def test_a_copy_of_nothing_may_point_anywhere_or_not(run, zeros):
    """As the ISA has it; or as a GPU may need it, which accessed the address."""
    body = COPY.replace("0x4;", "0x4, 0;").replace("%rd2, %rd80;", "%rd2, -4;")
    out = zeros(32)
    run(body.format(wait="cp.async.wait_group 0;"), out, zeros(32))
    assert (out == 0).all()
    with pytest.raises(ptxsim.MemoryFault, match="copy of 4 bytes out of bounds"):
        run(body.format(wait=""), out, zeros(32), copies=True)


EXCHANGE = (
    PLACE
    + """
shl.b32 %r1, %r90, 2; st.shared.b32 [%r1], %r90; {barrier}
xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd81], %r3;
"""
)


def test_a_missing_barrier_is_a_race(run, zeros):
    out = zeros(64, np.uint32)
    run(EXCHANGE.format(barrier="bar.sync 0;"), out, threads=64)
    assert out.tolist() == [k ^ 32 for k in range(64)]
    with pytest.raises(ptxsim.RaceError, match="warp 1 wrote since the last barrier"):
        run(EXCHANGE.format(barrier=""), out, threads=64)


def test_a_write_after_a_read_needs_a_barrier(run, zeros):
    with pytest.raises(ptxsim.RaceError, match="writes .* that warp 1 read"):
        run(EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r1], %r90;", zeros(64),
            threads=64)  # fmt: skip


def test_the_same_value_may_be_written_twice(run):
    run("mov.b32 %r1, 7; setp.lt.u32 %p1, %r90, 32; @%p1 st.shared.b32 [0], %r1;"
        "@!%p1 st.shared.b32 [0], %r1;", threads=64)  # fmt: skip
    with pytest.raises(ptxsim.RaceError):
        run("setp.lt.u32 %p1, %r90, 32; @%p1 st.shared.b32 [0], %r90;"
            "@!%p1 st.shared.b32 [0], %r90;", threads=64)  # fmt: skip


def test_loops_of_different_lengths(run, zeros):
    out = zeros(64, np.uint32)
    run(PLACE + """
    mov.b32 %r1, 0; mov.b32 %r2, 0;
    $loop: setp.ge.u32 %p1, %r1, %r90; @%p1 bra $end;
    add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; bra.uni $loop;
    $end: bar.sync 0; st.global.b32 [%rd81], %r2;""", out, threads=64)  # fmt: skip
    assert out.tolist() == [k * (k - 1) // 2 for k in range(64)]


def test_a_shuffle_waits_for_the_other_branch_that_comes_later_in_the_code(run, zeros):
    out = zeros(32, np.uint32)
    run(PLACE + """
    setp.lt.u32 %p1, %r90, 7; @%p1 bra $far; add.s32 %r1, %r90, 100;
    $join: shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; st.global.b32 [%rd81], %r2; ret;
    $far: add.s32 %r1, %r90, 1000; bra.uni $join;""", out)  # fmt: skip
    value = [k + (1000 if k < 7 else 100) for k in range(32)]
    assert out.tolist() == [value[k ^ 16] for k in range(32)]


def test_threads_that_end_do_not_hold_up_a_barrier(run, zeros):
    out = zeros(64, np.uint32)
    run(PLACE + "setp.lt.u32 %p1, %r90, 32; @%p1 ret; bar.sync 0; st.global.b32 [%rd81], 5;", out,
        threads=64)  # fmt: skip
    assert out.tolist() == [0] * 32 + [5] * 32


def test_a_deadlock_is_told(run):
    wait = """mbarrier.init.shared::cta.b64 [0], 1; mov.b32 %r1, 0;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [0], %r1;
    @!done bra.uni again; }"""
    with pytest.raises(ptxsim.SimulationError, match="deadlock"):
        run("setp.eq.b32 %p1, %r90, 0; @%p1 mbarrier.init.shared::cta.b64 [8], 1;" + wait)


def test_warps_hand_over_by_barriers_in_memory(run, zeros):
    out = zeros(64, np.uint32)
    run(PLACE + """
    setp.eq.b32 %p1, %r90, 0; @%p1 mbarrier.init.shared::cta.b64 [0], 32; bar.sync 0;
    setp.lt.u32 %p2, %r90, 32; @%p2 bra $wait;
    st.global.b32 [%rd81], 1; mbarrier.arrive.shared::cta.b64 _, [0]; ret;
    $wait: mov.b32 %r1, 0;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [0], %r1;
    @!done bra.uni again; }
    ld.global.b32 %r2, [%rd81+128]; st.global.b32 [%rd81], %r2;""", out, threads=64)  # fmt: skip
    assert out.tolist() == [1] * 64


@pytest.mark.parametrize(("how", "b", "c", "source"), [
    ("bfly", 5, 31, lambda k: k ^ 5), ("down", 3, 31, lambda k: k + 3 if k + 3 < 32 else k),
    ("up", 3, 0, lambda k: k - 3 if k >= 3 else k), ("idx", 9, 31, lambda k: 9),
    ("bfly", 4, 0x181F, lambda k: k ^ 4), ("idx", 2, 0x181F, lambda k: k // 8 * 8 + 2),
    ("down", 3, 0x181F, lambda k: k + 3 if k % 8 + 3 < 8 else k),
    ("up", 3, 0x1800, lambda k: k - 3 if k % 8 >= 3 else k),
])  # fmt: skip
def test_shuffles(how, b, c, source, run, zeros):
    out = zeros(32, np.uint32)
    run(PLACE + f"shfl.sync.{how}.b32 %r1, %r90, {b}, {c}, -1; st.global.b32 [%rd81], %r1;", out)
    assert out.tolist() == [source(k) for k in range(32)]


def test_reductions_votes_and_atomics(run, zeros):
    out, total = zeros(32, np.uint32), zeros(1, np.uint32)
    run(PLACE + """redux.sync.add.s32 %r1, %r90, -1; setp.lt.u32 %p1, %r90, 4;
    vote.sync.ballot.b32 %r2, %p1, -1; add.s32 %r1, %r1, %r2; st.global.b32 [%rd81], %r1;
    red.global.add.u32 [%rd2], %r90; atom.global.add.u32 %r3, [%rd2], %r90;""",
        out, total)  # fmt: skip
    assert out.tolist() == [496 + 15] * 32
    assert total[0] == 2 * 496


def test_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.9.0")
    with pytest.raises(ptxsim.UnsupportedError, match="of triton 3.6, and this is 3.9.0"):
        ptxsim.install()


def test_what_is_unknown_is_named(run):
    with pytest.raises(ptxsim.UnsupportedError, match="dp4a"):
        run("dp4a.u32.u32 %r1, %r2, %r3, %r4;")


def test_many_ctas_at_once_and_one_after_the_other(run, zeros):
    out = zeros(3 * 5 * 7 * 64, np.uint32)
    run("""mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r4, %r3, 5, %r2; mad.lo.s32 %r4, %r4, 3, %r1; mad.lo.s32 %r5, %r4, 64, %r90;
    mul.wide.u32 %rd3, %r5, 4; add.s64 %rd3, %rd1, %rd3; st.global.b32 [%rd3], %r5;""",
        out, threads=64, grid=(3, 5, 7))  # fmt: skip
    assert out.tolist() == list(range(len(out)))
