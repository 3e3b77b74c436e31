"""How a march along D cuts an image: lines along W, lattices along D, and parts of these."""

import functools
import math
from typing import NamedTuple

from cassetta.kernels import layout
from cassetta.kernels.configs import PROGRAMS
from cassetta.kernels.geometry import Walk
from cassetta.kernels.plans import MarchPlan


class MarchConfig(NamedTuple):
    """The launch of a convolution that marches along D (`conv_march`)."""

    block_m: int  # places of a tile,
    places: int  # and of each of its lines along W
    phases: int  # lattices along W, of which a line is one
    shift: int  # places from a tap to the next
    low: int  # the first voxel of x, of the first phase
    length: int  # places of the longest line
    splits: int  # pieces of a line
    tiles: int  # programs of a plane
    lattices: int  # along D
    part: int  # planes of a lattice that a program stores
    parts: int  # programs along a lattice
    chunks: int  # programs of a sample
    programs: int
    warps: int

    @property
    def walk(self) -> tuple[int, ...]:
        """The arguments of the kernel that say how it walks."""
        return (
            self.phases, self.shift, self.low, self.length, self.splits, self.tiles, self.lattices,
            self.part, self.parts, self.chunks,
        )  # fmt: skip

    @property
    def blocks(self) -> dict[str, int]:
        return {"M": self.block_m, "BOX2": self.places}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": 255}  # all that there are


PLANES = 96
"""That a program marches through at most; it reads two more, and its neighbours these, too."""


def are_covered(samples: int, steps: Walk, step: int) -> bool:
    """Tell whether a march covers so many images: there are voxels, and offsets in a plane, where
    at most `step` elements part two voxels, have 31 bits."""
    planes = (math.prod(size[1:]) for size in (steps.inp, steps.out))
    return samples * math.prod(steps.out) > 0 and max(planes) * step < 2**31 - 2**24


def marching(plan: MarchPlan, samples: int, steps: Walk, channels: int) -> MarchConfig:
    """Return the launch, by this plan, of a march that returns so many channels.

    `steps` as `geometry.along_depth` returns them.
    """
    (_, _, wide), (deep, high, across), far = steps.inp, steps.out, steps.dilation
    phases, shift, low, length, places, splits = cut(
        high, wide, across, steps.before[2], far[2], plan.block_m
    )
    tiles = -(-high * phases // (plan.block_m // places)) * splits
    lattices, longest = min(far[0], deep), -(-deep // far[0])
    wanted = max(-(-longest // PLANES), PROGRAMS // max(1, samples * tiles * lattices))
    part = -(-longest // max(1, min(wanted, longest // 6)))
    part = min(longest, -(-part // 3) * 3)  # three planes are a turn of the loop
    parts = -(-longest // part)
    chunks = lattices * parts * tiles
    return MarchConfig(
        plan.block_m, places, phases, shift, low, length, splits, tiles, lattices, part, parts,
        chunks, samples * chunks, 8 if layout.padded(channels) == 32 else 4,
    )  # fmt: skip


@functools.lru_cache(4096)
def cut(
    high: int, wide: int, across: int, before: int, far: int, block: int
) -> tuple[int, int, int, int, int, int]:
    """Return how places along W are cut into lines of tiles: lattices, places from a tap to the
    next, the first voxel, places of the longest lattice, and of a line, and pieces of a lattice.

    Into the fewest tiles; of those, whole rows before lattices, and the longest lines.
    """
    low = min(far - before, max(-before, 0))
    high_end = max(across + far - before, min(wide, across + 2 * far - before))
    found = []
    for phases in {1, far}:
        shift, length = far // phases, -(-(high_end - low) // phases)
        for places in (1 << power for power in range(3, block.bit_length())):
            own = places - 2 * shift
            splits = 1 if length <= places else 0 if own <= 0 else -(-(length - 2 * shift) // own)
            if splits:
                tiles = -(-high * phases // (block // places)) * splits
                cut = (phases, min(shift, places), low, length, places, splits)
                found.append(((tiles, phases, -places), cut))
    return min(found)[1]
