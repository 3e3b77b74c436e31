"""`bench/roofline.py`: bounds of convolutions from their machine code, as DESIGN.md states them."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_aot import run

BENCH = Path(__file__).parents[1] / "bench"


def bounds(*cases):
    """Bounds in ms, of passes, machines and channels, from compiled kernels."""
    out = run(f"""import sys
sys.path.insert(0, {str(BENCH)!r})
import roofline
for name, machine, channels in {cases}:
    one = roofline.bound(roofline.MACHINES[machine], name, channels)
    print(1e3 * max(one.seconds.values()))
""")
    return [float(line) for line in out.splitlines()]


def test_gradients_of_weights_stay_near_the_limit_of_the_machine():
    """Each is what DESIGN.md says: below those of the prototypes of gradients by rows (0.74, 1.43,
    1.76, 3.40, 1.17 and 4.39 ms on an H100, 2.64 on an A100)."""
    assert_as_stated({
        ("conv_wgrad", "H100", 5): 0.59, ("conv_wgrad", "H100", 16): 1.17,
        ("conv_wgrad", "H100", 21): 1.76, ("conv_wgrad", "H100", 32): 2.93,
        ("conv_wgrad", "H100", 64): 1.17, ("conv_wgrad", "H100", 128): 4.39,
        ("conv_wgrad", "A100", 21): 2.42,
    })  # fmt: skip


def test_a_march_along_depth_stays_near_the_limit_of_the_machine():
    """Within 1.15 of those of its prototypes: 0.24, 0.48, 1.09 and 1.87 ms on an H100."""
    out = run("from cassetta.kernels import plans; print(plans._why_not_compiled(3, 24, 24))")
    if out.strip() != "None":
        pytest.skip(out)
    assert_as_stated({
        ("conv_fprop", "H100", 5): 0.25, ("conv_fprop", "H100", 16): 0.50,
        ("conv_fprop", "H100", 21): 1.05, ("conv_fprop", "H100", 32): 1.42,
        ("conv_dgrad", "H100", 5): 0.24, ("conv_dgrad", "H100", 21): 1.02,
    })  # fmt: skip


def assert_as_stated(stated):
    for (case, bound), found in zip(stated.items(), bounds(*stated), strict=True):
        assert abs(found - bound) <= 0.02 * bound, case
