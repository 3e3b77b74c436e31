"""What the compiled convolutions do, read from what Triton makes of them, without a GPU.

The interpreter runs one step after the other, and sees neither what is under way at the same time
nor what is computed and not used.
"""

import sys

import pytest

pytest.importorskip("triton")

from test_aot import SPY, convolved, run

from cassetta.kernels import configs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


def test_convolutions_do_not_ask_for_all_registers():
    """255 of them do not assemble for sm_100 with triton 3.5 (triton#8488)."""
    assert configs.REGISTERS <= 250


@pytest.mark.parametrize("channels", [21, 64])
def test_operands_of_asynchronous_products_have_a_buffer_for_each_stage(channels):
    """While one is multiplied, the next are under way: with fewer, it would be overwritten.

    Triton counts one fewer for an operand that is read by something else, too (triton#6691).
    """
    plans = "GemmPlan(stages=3)", "WgradPlan(64, 192, 32, 3)"
    out = run(f"""from cassetta.kernels import buffers
{convolved(90, channels, *plans)}
    walk = buffers.walked(built.asm["ttgir"])
    print(name, *sorted(walk.buffers[one] for one in walk.operands if one in walk.buffers))
""")
    fprop, dgrad, wgrad = (line.split() for line in out.splitlines())
    late = channels % 8 != 0  # what is computed of x is multiplied by the step after
    assert fprop == dgrad == ["_conv_kernel", "3", "3"][: 3 - late]
    assert wgrad == ["_conv_wgrad_kernel", *"333"]  # x, and two of g


def test_products_read_shared_memory_alone():
    """On sm_90 a product is under way while other instructions run, and ptxas before CUDA 13.3 lets
    these set registers that it reads (triton#11781): so it reads none, but those it adds to."""
    out = run(f"""{SPY}
from cassetta.kernels import aot, conv_fprop, conv_wgrad, layout
from cassetta.kernels.examples import transform
from cassetta.kernels.plans import GemmPlan, use_plan
from cassetta.kernels.types import NOTHING, Activation, Geometry
boxed = (GemmPlan(64, 64, 64, 4, True),)
cases = ((64, True, ()), (21, False, ()), (64, False, boxed))  # pending, masked, in boxes
with aot.recorded(90, "", []):
    for c, is_pending, plans in cases:
        x = layout.empty((1, c, 32, 32, 32), torch.bfloat16, "meta")
        p = transform(layout.tables(x), Activation("silu")) if is_pending else NOTHING
        w = torch.empty(c, c, 1, 1, 1, dtype=x.dtype, device="meta")
        unit = Geometry((1,) * 3, ((0, 0),) * 3, (1,) * 3)
        with use_plan(*plans):
            conv_fprop.conv_fprop(x, p, w, None, unit)
            if c == 64:
                conv_wgrad.conv_wgrad(x, x, p, (1, 1, 1), unit)
for built in found:
    product = r"warp_group_dot .*}} : ([!\\w.]+)<.*? \\* ([!\\w.]+)<"
    print(*re.findall(product, built.asm["ttgir"]))
""")
    assert out.splitlines() == ["('!ttg.memdesc', '!ttg.memdesc')"] * 5
