"""What the compiled convolutions do, read from what Triton makes of them, without a GPU.

The interpreter runs one step after the other, and sees neither what is under way at the same time
nor what is computed and not used.
"""

import sys

import pytest

pytest.importorskip("triton")

from test_aot import convolved, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


@pytest.mark.parametrize("channels", [21, 64])
def test_operands_of_asynchronous_products_have_a_buffer_for_each_stage(channels):
    """While one is multiplied, the next are under way: with fewer, it would be overwritten.

    Triton counts one fewer for an operand that is read by something else, too (triton#6691).
    """
    out = run(f"""{convolved(90, channels, "GemmPlan(stages=3)", "WgradPlan(64, 64, 32, 3)")}
    text, views, room, read = built.asm["ttgir"], {{}}, {{}}, set()
    for line in text.splitlines():
        if made := re.search(r"(%\\S+) = ttg.local_alloc : .*memdesc<(\\d+)x\\d+x\\d+x", line):
            room[made[1]] = int(made[2])
        elif made := re.search(r"(%\\S+) = ttg.memdesc_\\w+ (%\\w+)", line):
            views[made[1]] = made[2]
        elif made := re.search(r"warp_group_dot (%\\w+), (%\\w+), .*isAsync = true", line):
            for operand in made.groups():
                while operand in views:
                    operand = views[operand]
                if operand in room:
                    read.add(operand)
    print(name, *sorted(room[operand] for operand in read))
""")
    fprop, dgrad, wgrad = (line.split() for line in out.splitlines())
    in_registers = channels % 8 != 0  # as channels that do not exist are dropped on load
    assert fprop == dgrad == ["_conv_kernel", "3", "3"][: 3 - in_registers]
    assert wgrad == ["_conv_wgrad_kernel", "3", "3"]
