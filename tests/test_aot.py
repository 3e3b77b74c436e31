"""What the compiled kernels look like, ahead of time and without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


SPY = """
import re, torch, triton
found, compile_ = [], triton.compile
def spy(*args, **options):
    found.append(compile_(*args, **options))
    return found[-1]
triton.compile = spy
"""
"""Code after which `found` has all that triton has compiled."""


def run(code, **environment):
    """In a process of its own: in this one, kernels may be interpreted."""
    env = {**os.environ, **environment}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("layout", ["3-D", "1-D", "2-D channels-last", "more than 2**31"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_accesses_are_of_16_bytes(arch, layout):
    """Each image is read and written in vectors of four words, never element by element."""
    out = run(f"""{SPY}
from cassetta.kernels import aot
from cassetta.measure import agreement
with aot.recorded({arch}, "", []):
    one = aot.sample(torch.bfloat16, "{layout}", "relu", True, True)
    aot.run(one, *agreement.PLANNED, "concatenate")
for built in found:
    name, ptx = built.metadata.name, built.asm["ptx"]
    if "combine" in name or "finalize" in name:  # of small tables
        continue
    wide = re.findall(r"(ld|st)\\.global\\S*\\.v4\\.b32", ptx)
    narrow = re.findall(r"(?:ld|st)\\.global\\S*\\.b16", ptx)
    print(name, len(wide) > 0, len(narrow))
""")
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 7
    for name, wide, narrow in rows:
        assert (wide, narrow) == ("True", "0"), name


@pytest.mark.parametrize("channels", [21, 64])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_interpolation_reads_words(arch, channels):
    """Every corner, and every gradient, in 16 bytes."""
    out = run(f"""{SPY}
from cassetta.kernels import aot, layout
with aot.recorded({arch}, "", []):
    image = lambda shape: layout.empty(shape, torch.bfloat16, "meta")
    one = aot.sample(torch.bfloat16, "3-D", "identity", False, False)
    one = one._replace(shape=(1, {channels}, 8, 8, 8), image=image)
    aot.run(one, "resize", "resize_dgrad")
for built in found:
    ptx = built.asm["ptx"]
    wide = [len(re.findall(rf"{{way}}\\.global\\S*\\.v4\\.b32", ptx)) for way in ("ld", "st")]
    print(built.metadata.name, *wide, len(re.findall(r"(?:ld|st)\\.global\\S*\\.b16", ptx)))
""")
    assert out.splitlines() == ["_resize_kernel 8 1 0", "_resize_dgrad_kernel 4 1 0"]


def convolved(arch, channels, *plans):
    """Code that compiles the three passes of a convolution, by these plans: `built`, one by one."""
    return f"""{SPY}
from cassetta.kernels import aot, conv_dgrad, conv_fprop, conv_wgrad, layout
from cassetta.kernels.plans import GemmPlan, MarchPlan, WgradPlan, use_plan
from cassetta.kernels.types import NOTHING, Activation, Geometry
c = {channels}
x = layout.empty((1, c, 32, 32, 32), torch.bfloat16, "meta")
w = torch.empty(c, c, 3, 3, 3, dtype=x.dtype, device="meta")
same = Geometry((1, 1, 1), ((2, 2),) * 3, (2, 2, 2))
with aot.recorded({arch}, "", []), use_plan({", ".join(plans)}):
    conv_fprop.conv_fprop(x, NOTHING, w, None, same, moments_of=Activation("relu"))
    conv_dgrad.conv_dgrad(x, w, same, (32, 32, 32))
    conv_wgrad.conv_wgrad(x, x, NOTHING, (3, 3, 3), same)
for built in found:
    ptx, name = built.asm["ptx"], built.metadata.name
    if "combine" in name:
        continue
"""


@pytest.mark.parametrize("channels", [21, 64])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_convolutions_feed_tensor_cores_by_16_bytes(arch, channels):
    """Operands are copied ahead, in words of 16 bytes, by cp.async where a tile is read as it is;
    images are written so, too. Narrow loads are of the bias alone, and of nothing large; but where
    a tile has fewer words than there are threads, each copies half of one."""
    out = run(f"""{convolved(arch, channels, "GemmPlan()")}
    cores = any(re.search(aot._MMA[kind], ptx) for kind in {{80: ["mma"], 90: ["wgmma"],
        100: ["tcgen05", "mma"]}}[{arch}])
    ahead = len(re.findall(r"cp\\.async\\.cg\\.shared\\.global.*0x10", ptx))
    short = {{*re.findall(r"cp\\.async\\.ca\\.shared\\.global.*(0x[48])\\b", ptx)}}
    narrow = len(re.findall(r"(?:ld|st)\\.global\\S*\\.b16", ptx))
    print(name, cores, ahead > 0, *short or [0], narrow)
""")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["_conv_kernel", "_conv_kernel", "_conv_wgrad_kernel"]
    for name, *found in rows:
        is_half = channels == 21 and "wgrad" in name  # 64 x 16 channels of g, by 256 threads
        assert found == ["True", "True", "0x8" if is_half else "0", "0"], name


def test_a_march_feeds_tensor_cores_by_16_bytes():
    """All that is read and written of images, in words; products of a plane are awaited at once."""
    out = run(f"""{convolved(90, 21, "MarchPlan()")}
    if "march" in name:
        copies = {{*re.findall(r"cp\\.async\\.c(.)\\.shared\\.global.*(0x\\w+)", ptx)}}
        stores = {{*re.findall(r"st\\.global(\\.v\\d)?\\.b(\\d+)", ptx)}} - {{("", "32")}}
        waits = len(re.findall(r"wgmma\\.wait_group", ptx))
        print(*copies, *stores, ptx.count("wgmma.mma_async") // 30, waits, sep="|")
""")
    row = "('g', '0x10')|('.v4', '32')|3|3"  # (moments are of 32 bits)
    assert out.splitlines() == [row, row]


@pytest.mark.parametrize("channels", [5, 21, 30])
def test_no_register_of_a_march_is_set_while_a_product_reads_it(channels):
    """By the machine code: the operands in registers of all that runs, up to the wait. There is one
    wait for each of three planes: ptxas has not made products wait for each other."""
    out = run(f"""{convolved(90, channels, "MarchPlan()")}
    if "march" not in name:
        continue
    code = aot.told(built.asm["cubin"], "-sass")
    code = re.findall(r"/\\*[0-9a-f]{{4,}}\\*/\\s+(?:@!?U?P\\w+ )?(.*?);", code)
    read, products, waits, faults = set(), 0, 0, []
    for line in code:
        if product := re.match(r"HGMMA\\S* R\\d+, R(\\d+)\\b", line):
            read |= {{*range(int(product[1]), int(product[1]) + 4)}}
            products += 1
        elif "WARPGROUP.DEPBAR" in line:
            read = set()
            waits += 1
        elif not re.match(r"ST|LDGSTS|BAR|BRA|R2UR", line):
            target = re.match(r"\\S+ (?:P\\d, )?R(\\d+)", line)
            wide = 4 if ".128" in line or "M88.4" in line else 2 if ".64" in line else 1
            if target and read & {{*range(int(target[1]), int(target[1]) + wide)}}:
                faults.append(line)
    print(products, waits, faults)
""")
    steps = {5: 2, 21: 5, 30: 6}[channels]  # of 16 taps x channels; of two products, three taps
    assert out.splitlines() == [f"{3 * 6 * steps} 3 []"] * 2


@pytest.mark.parametrize("channels", [21, 64])
def test_boxes_are_copied_as_a_whole(channels):
    """Images, five axes of them, and weights go to tensor cores by copies of boxes (TMA) alone."""
    out = run(f"""{convolved(90, channels, "GemmPlan(boxes=True)")}
    cores = next(kind for kind in ("wgmma", "mma") if re.search(aot._MMA[kind], ptx))
    boxes = re.findall(r"cp\\.async\\.bulk\\.tensor\\.(.)d", ptx)
    images, weights = boxes.count("5"), boxes.count("3")
    loads = len(re.findall(r"ld\\.global|cp\\.async\\.c[ag]", ptx))
    print(name, cores, images > 0, weights > 0, loads)
""")
    fprop, dgrad, _ = (line.split() for line in out.splitlines())
    assert fprop == dgrad == ["_conv_kernel", "wgmma", "True", "True", "0"]


@pytest.mark.parametrize(
    ("arch", "plan"),
    [(86, "GemmPlan()"), (120, "GemmPlan()"), (90, "GemmPlan(128, 128, 64, 4, True)")],
)
def test_plans_say_how_much_shared_memory_they_take(arch, plan):
    """At most; and these, which take the most of all, are as much as there is."""
    out = run(f"""{convolved(arch, 128, plan, "WgradPlan(128, 192, 32, 4)")}
    plan = WgradPlan(128, 192, 32, 4) if "wgrad" in name else {plan}
    print(name, built.metadata.shared <= plan.shared(2) <= aot.SHARED[{arch}])
""")
    names = ["_conv_kernel", "_conv_kernel", "_conv_wgrad_kernel"]
    assert out.splitlines() == [f"{name} True" for name in names]


def test_a_fault_is_an_excess():
    out = run("""
from cassetta.kernels.aot import Report
good = Report("k", "c", 90, 32, 0, 1000, "")
print(good.excess, good._replace(spilled=8).excess, good._replace(shared=300_000).excess, sep="|")
print(good._replace(spilled=8, shortage="few").excess)
""")
    spilled, large, both = "8 bytes of registers spill", "300000 bytes of shared memory", "few"
    assert out.splitlines() == [f"None|{spilled}|{large}, of 232448", f"{spilled}; {both}"]


def test_a_spill_is_seen():
    """Of a tile that is too large for its threads: there is local memory, and it is accessed."""
    out = run("""
import torch
from cassetta.kernels import aot, conv_fprop, layout, plans
from cassetta.kernels.types import NOTHING, Activation, Geometry, Prologue
x = layout.empty((1, 128, 32, 32, 32), torch.bfloat16, "meta")
w = torch.empty(128, 128, 3, 3, 3, dtype=x.dtype, device="meta")
one = torch.empty(1, 128, device="meta")
p = Prologue(one, one, Activation("gelu"), None, one, one)
same = Geometry((1, 1, 1), ((1, 1),) * 3, (1, 1, 1))
reports = []
with aot.recorded(100, "", reports), plans.use_plan(plans.GemmPlan(256, 128, 64, 3, True)):
    conv_fprop.conv_fprop(x, NOTHING, w, None, same, None, p, x)
print([report.spilled > 0 for report in reports])
""")
    assert out == "[True]"


@pytest.mark.parametrize(
    ("fault", "code"),
    [({}, 0), ({"spilled": 8}, 1), ({"shared": 300_000}, 1), ({"shortage": "too few"}, 1)],
)
def test_a_fault_is_the_exit_code(fault, code):
    out = run(f"""
from cassetta.cli import main
from cassetta.kernels import aot
good = aot.Report("k", "c", 90, 32, 0, 1000, "mma")
aot.check = lambda arch, part: [good, good._replace(**{fault})]
print(main(["compile-check", "--arch", "sm_90"]))
""")
    assert out.splitlines()[-1] == str(code)
    assert f"2 compilations in 0 s, {code} at fault" in out


def test_nan_survives_every_minimum_and_maximum():
    """The interpreter cannot show it: numpy's maximum keeps NaN, a GPU's max.f32 does not."""
    out = run(f"""{SPY}
from cassetta.kernels import activations, aot
from cassetta.measure import agreement
for name in activations.NAMES:
    with aot.recorded(90, "", []):
        one = aot.sample(torch.float32, "1-D", name, True, True)
        aot.run(one, *agreement.PLANNED, "concatenate")
for built in found:
    least = len(re.findall(r"(?:max|min)\\.f32", built.asm["ptx"]))
    # of numbers of voxels, which are no NaN
    of_counts = {{"_moments_kernel": 1, "_combine_kernel": 2}}.get(built.metadata.name, 0)
    assert least == of_counts, (built.metadata.name, least)
""")
    assert out == ""


@pytest.mark.parametrize(("engine", "nb_kernels"), [("library", 8), ("gemm", 12)])
def test_the_first_step_of_a_network_compiles_in_a_minute(engine, nb_kernels, tmp_path):
    """All that the passes of a 3-D U-Net compile, cold: sizes are no constants of kernels."""
    out = run(
        f"""
import contextlib, time, torch
from cassetta.backbones import UNet
from cassetta.kernels import aot, dispatch, ops
passes = dispatch._triton_passes()
for name in ops.PASSES:  # the launchers themselves, which see tensors without data
    setattr(ops, name, getattr(passes, name))
torch.is_autocast_enabled = lambda *_: False  # which knows no device "meta"
torch.autocast = lambda *_, **__: contextlib.nullcontext()
net = UNet(3, 32, norm="instance").to("meta", torch.bfloat16)
inp = torch.empty(2, 32, 128, 128, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
reports, start = [], time.monotonic()
with (
    dispatch.fused_on_reference(), dispatch.use_engine("{engine}"), aot.recorded(90, "", reports)
):
    net(inp).sum().backward()
print(len({{report.kernel for report in reports}}), time.monotonic() - start)
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    kernels, seconds = out.split()
    assert int(kernels) == nb_kernels  # each of the passes, the stages of reductions apart
    assert len(list(tmp_path.rglob("*.cubin"))) <= 51
    assert float(seconds) < 60
