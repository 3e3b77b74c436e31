"""Lower bounds of the time of our own convolutions, from their machine code: nothing is measured.

    python bench/roofline.py --machine H100 A100 --channels 5 21 64 --passes conv_wgrad

needs triton, and no GPU. A launch takes at least the longest of

    issue    its instructions, on the four schedulers of each SM
    product  what it multiplies, padding too, at the dense rate of the tensor cores
    shared   what it writes to shared memory and reads from there, at 128 bytes a clock and SM
    cache    what it reads from the L2 cache, of which each step of each program reads its operands
    memory   images read and written once, and shares of programs written and read again

of which latency, barriers, conflicts of banks and how many programs an SM holds are no part. The
rates of a machine are its data sheet's, those of its L2 cache and of `mma.sync` on sm_90 assumed.
"""

import argparse
import functools
import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import aot, conv_dgrad, conv_fprop, conv_wgrad, layout
from cassetta.kernels.configs import GemmConfig, WgradConfig
from cassetta.kernels.lines import MarchConfig
from cassetta.kernels.types import NOTHING, Activation, Geometry


class Machine(NamedTuple):
    """What a GPU does per second, or per clock."""

    arch: int
    sms: int
    clock: float  # per second
    products: float  # multiplications and additions, of 16 bits in float32, of an SM per clock
    cache: float  # bytes per second from L2: assumed
    memory: float  # bytes per second


MACHINES = {
    "H100": Machine(90, 132, 1.755e9, 4096, 5.5e12, 3.35e12),
    "H200": Machine(90, 132, 1.755e9, 4096, 5.5e12, 4.8e12),
    "A100": Machine(80, 108, 1.41e9, 2048, 4.0e12, 1.9e12),
    "L40S": Machine(89, 142, 2.2e9, 1024, 4.0e12, 0.86e12),
    "RTX 5090": Machine(120, 170, 2.4e9, 512, 5.0e12, 1.79e12),
}
SYNC = 0.62
"""Of the rate of `wgmma`, that of `mma.sync` on sm_90: assumed."""


class Work(NamedTuple):
    """What a launch does, at least."""

    issue: float  # instructions of warps
    product: float  # multiplications and additions
    shared: float  # bytes
    cache: float  # bytes
    memory: float  # bytes

    def seconds(self, machine: Machine, wide: bool) -> dict[str, float]:
        """Return what each part takes; `wide` if it multiplies by `wgmma` or newer."""
        clocks = machine.sms * machine.clock
        rate = machine.products * (SYNC if machine.arch == 90 and not wide else 1)
        return {
            "issue": self.issue / 4 / clocks,
            "product": self.product / rate / clocks,
            "shared": self.shared / 128 / clocks,
            "cache": self.cache / machine.cache,
            "memory": self.memory / machine.memory,
        }


class Bound(NamedTuple):
    """The bound of a pass of a convolution on a machine."""

    seconds: dict[str, float]  # of each part
    plan: str  # of the launch, in words

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


def bound(machine: Machine, name: str, channels: int) -> Bound:
    """Return the bound of a pass with 3 x 3 x 3 taps in bfloat16, of `channels` to as many, over an
    image of 256^3 voxels, or, from 64 channels on, of 128^3, padded to its own size."""
    size, dtype = (256 if channels < 64 else 128,) * 3, torch.bfloat16
    x = layout.empty((1, channels, *size), dtype, "meta")
    w = torch.empty(channels, channels, 3, 3, 3, dtype=dtype, device="meta")
    same = Geometry((1,) * 3, ((1, 1),) * 3, (1,) * 3)
    launches: list[tuple[Any, Any]] = []
    with aot.captured(machine.arch, lambda _, config, built: launches.append((config, built))):
        if name == "conv_fprop":
            conv_fprop.conv_fprop(x, NOTHING, w, w[:, 0, 0, 0, 0], same, moments_of=Activation())
        elif name == "conv_dgrad":
            conv_dgrad.conv_dgrad(x, w, same, size)
        else:
            conv_wgrad.conv_wgrad(x, x, NOTHING, (3, 3, 3), same)
    # (others combine moments)
    kinds = GemmConfig | MarchConfig | WgradConfig
    ((config, built),) = [one for one in launches if isinstance(one[0], kinds)]
    code, wide = instructions(built), bool(re.search(r"wgmma|tcgen05", built.asm["ptx"]))
    march = functools.partial(_of_march, moments=name == "conv_fprop")
    count = {GemmConfig: _of_image, MarchConfig: march, WgradConfig: _of_weights}[type(config)]
    work = count(config, code, x, wide)
    return Bound(work.seconds(machine, wide), _in_words(config, code, built))


class Code(NamedTuple):
    """Instructions of a compiled kernel."""

    loop: int  # of the loop that multiplies
    rest: int


def instructions(built: Any) -> Code:
    """Count those of a compiled kernel; a branch that is seldom taken counts, too."""
    found = re.findall(r"\s/\*([0-9a-f]{4,})\*/\s+(.*?);", aot.told(built.asm["cubin"], "-sass"))
    where = {int(address, 16): number for number, (address, _) in enumerate(found)}
    loops = []
    for number, (_, text) in enumerate(found):
        to = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        start = where.get(int(to[1], 16), number) if to else number
        if any(re.search("HGMMA|HMMA|UTC.?MMA", line) for _, line in found[start:number]):
            loops.append(number + 1 - start)
    loop = min(loops, default=len(found))
    return Code(loop, len(found) - loop)


def _of_image(config: Any, code: Code, x: Tensor, wide: bool) -> Work:
    """Count what a convolution does, or the gradient of its image."""
    rows, columns, depth = config.block_m, config.block_n, config.block_k
    stored, size = layout.padded(x.shape[1]), x.element_size()
    steps = 27 * -(-stored // depth) * config.programs
    left, right = rows * depth * size, depth * columns * size
    again = rows // 64 if wide else config.warps  # that read the right operand
    return Work(
        (steps * code.loop + config.programs * code.rest) * config.warps,
        2 * steps * rows * columns * depth,
        steps * (2 * left + right + right * again),
        steps * min(depth, stored) * (rows + min(columns, stored)) * size,
        2 * math.prod(x.shape[2:]) * stored * size,
    )


def _of_march(config: Any, code: Code, x: Tensor, wide: bool, moments: bool) -> Work:
    """Count what a march along D does, of a convolution that keeps the size of x; its loop takes
    three planes a turn, and each program reads two planes and finishes one late. Moments are of
    what is stored, which they read again."""
    rows, stored, size = config.block_m, layout.padded(x.shape[1]), x.element_size()
    depth, columns = -(-3 * stored // 16) * 16, 3 * stored
    lengths = [min(config.part, x.shape[2] - n * config.part) for n in range(config.parts)]
    turns = sum(-(-(length + 3) // 3) for length in lengths) * config.tiles * x.shape[0]
    planes = 3 * turns
    # (a middle tap that is whole in an accumulator stays there)
    ring = rows * (columns if stored == 24 else 2 * stored) * 4
    left, right = rows * depth * size, 3 * depth * columns * size
    groups = config.warps // 4  # of warps, that share columns; each reads the left operand
    again = rows // 64  # that read the right operand
    results = rows * stored * size
    return Work(
        (turns * code.loop + config.programs * code.rest) * config.warps,
        2 * planes * rows * 3 * columns * depth,
        planes * (2 * ring + left * (1 + groups) + right * again + (2 + moments) * results),
        planes * (rows * columns * size + results),
        2 * math.prod(x.shape[2:]) * stored * size,
    )


def _of_weights(config: Any, code: Code, x: Tensor, wide: bool) -> Work:
    """Count what the gradient of the weights does."""
    stored, size, taps = layout.padded(x.shape[1]), x.element_size(), 3 if config.along else 1
    rows, columns, tile = 27 // taps * stored, taps * stored, config.block_n + config.block_n2
    steps, voxels = config.steps * config.r_blocks * config.q_blocks, config.steps * config.block_v
    left, right = config.block_r * config.block_v * size, tile * config.block_v * size
    again = config.block_r // 64 if wide else config.warps
    products = 2 if config.block_n2 and wide else 1  # that read the left operand
    share = config.splits * rows * columns * 4
    return Work(
        (steps * code.loop + config.programs * code.rest) * config.warps,
        2 * steps * config.block_r * tile * config.block_v,
        steps * (left + right + left * products + right * again),
        voxels * size * (config.q_blocks * rows + config.r_blocks * columns),
        2 * math.prod(x.shape[2:]) * stored * size + 2 * share,
    )


def _in_words(config: Any, code: Code, built: Any) -> str:
    """Describe a launch."""
    registers = aot.usage(built.asm["cubin"])["REG"]
    if isinstance(config, WgradConfig):
        tile = f"{config.block_r} x ({config.block_n} + {config.block_n2}) x {config.block_v}"
    elif isinstance(config, MarchConfig):
        tile = f"a march, lines of {config.places} of {config.block_m} places, {config.part} planes"
    else:
        tile = f"{config.block_m} x {config.block_n} x {config.block_k}"
    return (
        f"{tile}, {config.warps} warps, {registers} registers, "
        f"{built.metadata.shared // 1024} KB, {code.loop} + {code.rest} instructions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine", nargs="+", choices=[*MACHINES], default=["H100", "A100"])
    parser.add_argument("--channels", nargs="+", type=int, default=[5, 16, 21, 32, 64, 128])
    names = ["conv_fprop", "conv_dgrad", "conv_wgrad"]
    parser.add_argument("--passes", nargs="+", choices=names, default=names)
    asked = parser.parse_args()
    heads = ["machine", "pass", "channels", "bound, ms", "by", *Work._fields, "launch"]
    print("|", " | ".join(heads), "|")
    print("|" + " --- |" * len(heads))
    for machine in asked.machine:
        for name in asked.passes:
            for channels in asked.channels:
                one = bound(MACHINES[machine], name, channels)
                parts = [f"{1e3 * part:.2f}" for part in one.seconds.values()]
                cells = [machine, name, channels, f"{1e3 * one.seconds[one.limit]:.2f}"]
                print("|", " | ".join(map(str, [*cells, one.limit, *parts, one.plan])), "|")


if __name__ == "__main__":
    main()
