"""What may be tuned of a launch: the plans of each pass, and which of them is taken.

A plan is what the tuner chooses among; the launch follows from it and from the shape (`configs`).
The first plan of a pass is taken where nothing was measured.
"""

import functools
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import boxes, evidence, layout, machine
from cassetta.kernels.types import Geometry


class Plan(NamedTuple):
    """What may be tuned of the launch of a pass over an image."""

    tile: int = 2048  # elements
    warps: int = 8
    of = "pass"

    def __str__(self) -> str:
        return f"{self.tile} elements, {self.warps} warps"


class GemmPlan(NamedTuple):
    """What may be tuned of the launch of a convolution, or of the gradient of its image."""

    block_m: int = 128  # voxels of a tile
    block_n: int = 128  # channels of a tile, at most
    block_k: int = 64  # channels that are multiplied in a step, at most
    stages: int = 3
    boxes: bool = False  # whether a tile is a box, where the image can be read so
    of = "image"
    is_wide = False

    def shared(self, itemsize: int) -> int:
        """Return an upper bound of the bytes of shared memory that a launch takes.

        It holds a buffer per stage, or afterwards the result on its way to words of an image.
        """
        operands = self.block_k * (self.block_m + self.block_n) * itemsize
        return max(self.stages * operands, 4 * self.block_m * (self.block_n + 8)) + _BESIDE

    def __str__(self) -> str:
        size = f"{self.block_m} x {self.block_n} x {self.block_k}"
        return f"{size}, {self.stages} stages{', boxes' * self.boxes}"


class MarchPlan(NamedTuple):
    """What may be tuned of a march along D: nothing but whether there is one."""

    block_m: int = 64  # places of a tile
    of = "image"
    boxes = False
    is_wide = False

    def shared(self, itemsize: int) -> int:
        """Return an upper bound of the bytes of shared memory that a launch takes."""
        depth = columns = 3 * FEW
        operands = (3 * self.block_m * depth + 3 * depth * columns) * itemsize
        return operands + 4 * (self.block_m + 24) * columns + 4 * self.block_m * FEW + _BESIDE

    def __str__(self) -> str:
        return f"a march along D, {self.block_m} places"


class WgradPlan(NamedTuple):
    """What may be tuned of the launch of the gradient of weights."""

    rows: int = 128  # taps x channels of a tile, at most
    columns: int = 192  # taps x channels of a tile, at most; of half as many, rows may be 256
    block_v: int = 64  # voxels that are multiplied in a step
    stages: int = 3
    of = "weights"
    boxes = False  # none reads them

    @property
    def is_wide(self) -> bool:
        """Whether only operands that are read from memory leave registers for so many columns."""
        return self.columns > 96

    def tallest(self, columns: int) -> int:
        """Return the rows of a tile of so many columns, at most."""
        return max(self.rows, min(2 * self.rows, 256) if 2 * columns <= self.columns else 0)

    def shared(self, itemsize: int) -> int:
        """Return an upper bound of the bytes of shared memory that a launch takes."""
        half = self.columns // 2
        operands = max(self.rows + self.columns, self.tallest(half) + half)
        operands *= self.block_v * itemsize
        result = 4 * self.rows * (2 * self.columns // 3 + 8)  # of the first product
        return max(self.stages * operands, result) + _BESIDE

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} x {self.block_v}, {self.stages} stages"


FEW = 32
"""Channels of images that `conv_march` reads and returns, at most."""

_BESIDE = 2048
"""Bytes of shared memory beside operands: barriers, and what sums pass through."""

PLANS = (Plan(), Plan(1024, 4), Plan(1024, 8), Plan(2048, 16))
"""The first by rule, all to be tried by the tuner. 8 elements for a thread, a 16-byte access in 16
bits, or 4; 16 made the compiler for sm_100 spill, and 8 of 16 warps, to which it gives 64
registers, that for sm_90 (sums of PReLU)."""

GEMM_PLANS = (
    GemmPlan(), GemmPlan(128, 64, 64), GemmPlan(128, 128, 32, 4), GemmPlan(64, 64, 64, 4),
    GemmPlan(64, 128, 64), GemmPlan(boxes=True), GemmPlan(128, 64, 64, 4, True),
    GemmPlan(128, 128, 64, 4, True),
)  # fmt: skip
WGRAD_PLANS = (
    WgradPlan(), WgradPlan(256, 96, 64), WgradPlan(256, 96, 32, 4), WgradPlan(128, 96, 32, 4),
    WgradPlan(64, 96, 64),
)  # fmt: skip
MARCH_PLANS = (MarchPlan(),)
_GEMM_PLANS_32 = (
    GemmPlan(64, 64, 32), GemmPlan(64, 64, 16), GemmPlan(64, 32, 32), GemmPlan(64, 64, 32, 3, True),
)  # fmt: skip
_WGRAD_PLANS_32 = (WgradPlan(64, 96, 32), WgradPlan(64, 192, 32), WgradPlan(128, 96, 32))
"""Of float32, whose operands are twice as large."""


class Pass(NamedTuple):
    """A pass over an image, as it is named in the table of what was measured."""

    name: str
    image: Tensor
    last: bool  # whether channels come last
    plans: tuple[Plan, ...] = PLANS
    of = "pass"

    @property
    def key(self) -> str:
        """In words."""
        shape, dtype = "x".join(map(str, self.image.shape)), str(self.image.dtype)[6:]
        return f"{self.name} {shape} {'last' if self.last else 'first'} {dtype}"

    def without_data(self) -> "Pass":
        """The same, of an image that holds no memory."""
        x = self.image
        return self._replace(
            image=torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        )


class Product(NamedTuple):
    """A pass of a convolution, as it is named in the table of what was measured."""

    name: str  # "conv_fprop", "conv_dgrad" or "conv_wgrad"
    shape: tuple[int, ...]  # of the image that the convolution reads
    channels: int  # of what it returns
    taps: tuple[int, ...]
    geometry: Geometry
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """In words."""
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        stride, padding, dilation, _ = self.geometry
        how = f"k{self.taps} s{stride} p{padding} d{dilation}"
        return f"{self.name} {shape} to {self.channels}, {how}, {dtype}"

    @property
    def of(self) -> str:
        """The kind of its plans."""
        return "weights" if self.name == "conv_wgrad" else "image"

    @property
    def plans(self) -> tuple[GemmPlan, ...] | tuple[WgradPlan, ...]:
        """The plans that may run it, beside a march, the first by rule."""
        if self.name == "conv_wgrad":
            return WGRAD_PLANS if self.dtype.itemsize == 2 else _WGRAD_PLANS_32
        return GEMM_PLANS if self.dtype.itemsize == 2 else _GEMM_PLANS_32

    @property
    def marches(self) -> bool:
        """Whether `conv_march` covers it: three taps along D and W, one or three along H, without a
        stride, of two or three axes, in 16 bits, of few channels."""
        few = self.shape[1] <= FEW and self.channels <= FEW
        return (
            few and self.name != "conv_wgrad" and self.dtype.itemsize == 2
            and len(self.taps) in (2, 3) and self.taps[0] == self.taps[-1] == 3
            and self.taps[-2] in (1, 3) and max(self.geometry.stride) == 1
        )  # fmt: skip

    @property
    def reads_boxes(self) -> bool:
        """Whether the voxels that it reads for a tap of a box are a box: not where it strides."""
        scatters = self.name == "conv_dgrad" and self.geometry.stride == self.taps
        return scatters or max(self.geometry.stride) == 1

    def without_data(self) -> "Product":
        """Itself."""
        return self


_forced: dict[str, Any] = {}
_asked: dict[str, Pass | Product] | None = None


def chosen(what: Pass | Product, device: torch.device, marches: bool = False) -> Any:
    """The plan that was the fastest by measurement; the first where none was measured.

    `marches` tells whether `conv_march` covers the launch.
    """
    forced = _forced.get(what.of) if _forced else None
    if forced is not None and (marches or not isinstance(forced, MarchPlan)):
        return forced
    found = what.plans if isinstance(what, Pass) else fitting(what, device, marches)
    if device.type == "meta":
        return found[0]
    if _asked is not None:
        _asked[what.key] = what.without_data()
    table = evidence.table(device)
    record = table.find(what.key) if table.records else None
    by_name = {str(plan): plan for plan in found} if record else {}
    return by_name.get(record.choice, found[0]) if record else found[0]


def candidates(what: Pass | Product, device: torch.device) -> list[Any]:
    """The plans that the tuner tries there, the first by rule."""
    if isinstance(what, Pass):
        return list(what.plans)
    boxed = what.reads_boxes and boxes.are_copied(device)
    return [plan for plan in fitting(what, device, what.marches) if boxed or not plan.boxes]


def fitting(what: Product, device: torch.device, marches: bool) -> tuple[Any, ...]:
    """List the plans that a device can run well, the default first: where it `marches`, a march
    along D, which reads the least. (A CPU has none: no Gluon is interpreted.)

    GeForce GPUs, A10, L4 and the like have 99 KB for a program, A100 163, H100 and B200 227.
    """
    gpu = machine.known(device)
    if gpu is None or not gpu.shared:
        return what.plans
    found = offered(what.plans, what.dtype.itemsize, gpu.shared, gpu.capability)
    marches = marches and why_no_march(what, gpu.capability) is None
    return (*MARCH_PLANS, *found) if marches else found


@functools.cache
def offered(
    plans: tuple[Any, ...], itemsize: int, shared: int, capability: tuple[int, int]
) -> tuple[Any, ...]:
    """List the plans that fit into so many bytes of shared memory, and whose registers do not
    spill: where products read registers, as of 8.x and 12.x, a program has 96 columns at most."""
    narrow = capability[0] in (8, 12)
    return tuple(
        plan for plan in plans
        if plan.shared(itemsize) <= shared and not (narrow and plan.is_wide)
    )  # fmt: skip


def declined(asked: Iterable[Pass | Product], device: torch.device) -> dict[str, str]:
    """Tell of each plan that covers one of these, and is not offered on this device, why not."""
    gpu = machine.known(device)
    found = {}
    for what in asked:
        if gpu is not None and isinstance(what, Product) and what.marches:
            why = why_no_march(what, gpu.capability)
            if why is not None:
                of = f"{what.name} of {what.shape[1]} to {what.channels} channels"
                found[f"{MARCH_PLANS[0]}, {of}"] = why
    return found


def why_no_march(what: Product, capability: tuple[int, int]) -> str | None:
    """Explain in a sentence why a product that marches does not on such a GPU; None if it does.

    Where one could, the first call compiles one.
    """
    if capability[0] != 9:
        return f"it multiplies by wgmma, which GPUs of compute capability {capability[0]}.x lack"
    high = 1 if len(what.taps) == 2 else what.taps[1]
    channels, results = layout.padded(what.shape[1]), layout.padded(what.channels)
    if what.name == "conv_dgrad":
        channels, results = results, channels
    return _why_not_compiled(high, channels, results)


@functools.cache
def _why_not_compiled(high: int, channels: int, results: int) -> str | None:
    """Compile a march, and explain what is wrong with it: Gluon changes from triton to triton."""
    triton = importlib.import_module("triton")
    try:
        march = importlib.import_module("cassetta.kernels.conv_march")
        wrong = march.compiled(high, channels, results).excess
    except Exception as error:  # whatever a compiler raises
        wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return wrong and f"triton {triton.__version__} does not compile it well ({wrong})"


@contextmanager
def use_plan(*plans: Any) -> Iterator[None]:
    """Every launch that they cover by these plans, each for those of its kind."""
    global _forced
    before, _forced = _forced, {**_forced, **{plan.of: plan for plan in plans}}
    try:
        yield
    finally:
        _forced = before


def forced() -> tuple[Any, ...]:
    """Return the plans that every launch takes, each for those of its kind."""
    return tuple(_forced.values()) if _forced else ()


def is_listening() -> bool:
    """Tell whether somebody wants to know what is planned."""
    return _asked is not None


@contextmanager
def listening() -> Iterator[dict[str, Pass | Product]]:
    """What is planned in this block of code, by key."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before
