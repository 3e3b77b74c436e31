"""`bench/roofline.py`: bounds of convolutions from their machine code, as DESIGN.md states them."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_aot import run

BENCH = Path(__file__).parents[1] / "bench"


def bounds(*cases):
    """Bounds of gradients of weights in ms, of machines and channels; nothing is interpreted."""
    out = run(f"""import sys
sys.path.insert(0, {str(BENCH)!r})
import roofline
for machine, channels in {cases}:
    side = 256 if channels <= 32 else 128
    for one in roofline.bounds(roofline.MACHINES[machine], "conv_wgrad", channels, side):
        print(1e3 * max(one.seconds.values()))
""")
    return [float(line) for line in out.splitlines()]


def test_gradients_of_weights_stay_near_the_limit_of_the_machine():
    """Within 1.15 of the prototypes of gradients by rows, and 3 to 14 times below gathering."""
    most = {
        ("H100", 5): 0.74, ("H100", 16): 1.43, ("H100", 21): 1.76, ("H100", 32): 3.40,
        ("H100", 64): 1.17, ("H100", 128): 4.39, ("A100", 21): 2.64,
    }  # fmt: skip
    for (case, limit), found in zip(most.items(), bounds(*most), strict=True):
        assert 0.1 * limit < found <= 1.15 * limit, case
