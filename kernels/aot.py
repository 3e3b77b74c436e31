"""Compile kernels ahead of time, for any GPU and without one, and read what became of them.

`recorded()` turns every launch into a compilation: launchers run on tensors of the device "meta",
so what is compiled is, argument for argument, what a real call would run.
"""

import functools
import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from cassetta.kernels import (
    activations,
    boxes,
    buffers,
    configs,
    layout,
    machine,
    ops,
    plans,
    precision,
    tile,
)
from cassetta.kernels.examples import Sample, transform
from cassetta.kernels.types import NOTHING, Activation, Geometry

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program may use, by compute capability."""

PRODUCTS = {
    80: (torch.float32, torch.float16),
    90: (torch.float32, torch.float16, torch.bfloat16),
    100: (torch.float32, torch.bfloat16),
}  # fmt: skip
"""Convolutions of a part: two types of 16 bits differ by their conversions alone, and what is not
named here has the instructions of sm_80."""

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_MMA = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}


class Report(NamedTuple):
    """What a kernel became on one architecture."""

    kernel: str
    case: str
    arch: int
    registers: int
    spilled: int  # bytes of stack
    shared: int  # bytes
    tensor_cores: str  # the instructions, "" for none
    shortage: str = ""  # of operands that may be overwritten, in words

    @property
    def excess(self) -> str | None:
        """What is wrong with it, in words; None if nothing is."""
        most, found = SHARED[self.arch], []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers spill")
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory, of {most}")
        return "; ".join([*found, *filter(None, [self.shortage])]) or None


@contextmanager
def recorded(arch: int, case: str, reports: list[Report]) -> Iterator[None]:
    """Compile for `arch` (80, 90, ...) what is launched in this block, instead of running it."""

    def report(kernel: Any, config: Any, built: Any) -> None:
        reports.append(report_of(kernel.fn.__name__.strip("_"), case, arch, built))

    with captured(arch, report):
        yield


@contextmanager
def captured(arch: int, see: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Compile what is launched in this block for `arch`, and let `see` have each kernel, the
    configuration of its launch, and what Triton made of it."""

    def compile_instead(kernel: Any, x: Tensor, config: Any, *args: Any, **constants: Any) -> None:
        built = compiled(kernel, args, constants | config.blocks, config.options, arch)
        see(kernel, config, built)

    launch, tile.launch = tile.launch, compile_instead
    gpu = machine.Gpu("", divmod(arch, 10), 0, 0, SHARED[arch])
    target, machine.target = machine.target, gpu
    try:
        yield
    finally:
        tile.launch, machine.target = launch, target


def check(arch: int, part: bool = False) -> Iterator[Report]:
    """Compile every pass with every activation, convolutions by every plan, all in every dtype.

    Layouts, channels and what may be absent come in turn. Of a part, an activation meets another
    dtype on each architecture of `PRODUCTS`; for those that are not in it, the heaviest activations
    and convolutions in float16 are compiled.
    """
    dtypes = configs.dtypes()
    turns: Sequence[int] = range(len(dtypes))
    if part:
        turns = [[*PRODUCTS].index(arch) if arch in PRODUCTS else 0]
        dtypes = PRODUCTS.get(arch, (torch.float16,))
    pairs = [
        pair
        for turn in turns
        for pair in enumerate(_pairs(turn), turn * len(activations.NAMES))
        if not part or arch in PRODUCTS or pair[1][1] in _HEAVIEST
    ]
    for n, (dtype, activation, kind) in pairs:
        reports: list[Report] = []
        case = f"{str(dtype).removeprefix('torch.')} {activation} {kind}"
        plan = plans.PLANS[n // 4 % len(plans.PLANS)]  # with every other choice
        with recorded(arch, f"{case}, {plan}", reports), plans.use_plan(plan):
            wanted = ("images", "tables") if activation == "identity" else ("images",)
            run(sample(dtype, kind, activation, full=n % 2 == 0, other=n % 4 < 2), *wanted)
        yield from reports
    for n, dtype in enumerate(configs.dtypes()):
        if dtype in dtypes:
            yield from _check_convolutions(arch, dtype, n)
            yield from _check_marches(arch, dtype)


def _check_convolutions(arch: int, dtype: torch.dtype, n: int) -> Iterator[Report]:
    """By each plan that the architecture can run, with other channels and another activation."""
    gemm, wgrad = (
        [
            plan
            for plan in plans.offered(product.plans, dtype.itemsize, SHARED[arch], divmod(arch, 10))
            if not plan.boxes or boxes.are_copied_by(divmod(arch, 10))
        ]
        for product in (
            plans.Product(name, (1, 1), 1, (1,), _SAME, dtype)
            for name in ("conv_fprop", "conv_wgrad")
        )
    )
    half = dtype.itemsize == 2
    for m in range(max(len(gemm), len(_CHANNELS)) if half else 2 * len(gemm)):
        pair = gemm[m % len(gemm)], wgrad[m % len(wgrad)]
        channels = _CHANNELS[(m + 2 * n) % len(_CHANNELS)]
        reports: list[Report] = []
        case = f"{str(dtype).removeprefix('torch.')} {channels} channels, {pair[0]}, {pair[1]}"
        exact = precision.use("ieee" if m // len(gemm) % 2 else "tf32")
        with recorded(arch, case, reports), plans.use_plan(*pair), exact:
            full, names = (n + m) % 2 == 0, activations.NAMES
            name = _HEAVIEST[m // 2 % 2] if full else names[(n * 5 + m) % len(names)]
            run(_words(dtype, channels, name, full, wide=m % 3 == 2), "products")
        yield from reports


def _check_marches(arch: int, dtype: torch.dtype) -> Iterator[Report]:
    """Compile convolutions that march along D, where they do: with moments, with an epilogue, and
    the gradient of the image."""
    fprop, dgrad = (ops.PASSES[name].launched() for name in ("conv_fprop", "conv_dgrad"))
    for n, (channels, more) in enumerate(_MARCHED):
        one = _words(dtype, channels, _HEAVIEST[n % 2], full=True, wide=n % 3 == 2)
        (geometry, taps, size), w = one.kept(3), one.weights(more, channels, 3, 3, 3)
        product = plans.Product("conv_fprop", one.shape, more, taps, geometry, dtype)
        if not product.marches or plans.why_no_march(product, divmod(arch, 10)):
            continue
        reports: list[Report] = []
        case = f"{str(dtype).removeprefix('torch.')} {channels} to {more} channels"
        plan = plans.MarchPlan()
        with recorded(arch, f"{case}, {plan}", reports), plans.use_plan(plan):
            given = one.x, NOTHING, w, one.weights(more), geometry, None
            fprop(*given, NOTHING, None, Activation("relu"))
            fprop(*given, one.pending(more), None, None)
            dgrad(one.of(more), w, geometry, size)
        yield from reports


_MARCHED = ((5, 5), (13, 21), (21, 21), (24, 24), (32, 32), (30, 8))
_CHANNELS = (5, 21, 32, 64, 128)
_HEAVIEST = ("prelu", "gelu_tanh")  # of registers, beside a residual
_SAME = Geometry((1,), ((0, 0),), (1,))


def _pairs(turn: int) -> list[tuple[torch.dtype, str, str]]:
    """Each activation, with one dtype and one layout, which are others in each turn."""
    dtypes, layouts = configs.dtypes(), tuple(_SHAPES)
    return [
        (dtypes[n % len(dtypes)], name, layouts[n % len(layouts)])
        for n, name in enumerate(activations.NAMES, turn)
    ]


_SHAPES = {
    "1-D": (2, 8, 4096),
    "2-D channels-last": (2, 64, 64, 64),
    "3-D": (1, 21, 32, 32, 32),
    "3-D channels-last, 21 channels": (1, 21, 32, 32, 32),
    "3-D channels-last, 128 channels": (1, 128, 16, 16, 16),
    "more than 2**31": (1, 128, 256, 256, 257),
    "a single voxel": (3, 5, 1, 1),
}


def run(one: Sample, *wanted: str) -> None:
    """Launch the passes of these names, or on what is so named, with their examples."""
    for name, record in ops.PASSES.items():
        if name in wanted or record.of in wanted:
            for arguments in record.examples(one):
                record.launched()(*arguments)


def sample(dtype: torch.dtype, kind: str, activation: str, full: bool, other: bool) -> Sample:
    """An image of a kind in `_SHAPES`, without data, and a transform with this activation."""

    def image(shape: tuple[int, ...]) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if "channels-last" in kind else x

    table = functools.partial(torch.empty, dtype=torch.float32, device="meta")
    shape, one = _SHAPES[kind], Activation(activation, 1.0, 20.0)
    pending = lambda c: transform(table(shape[0], c), one, full)  # noqa: E731
    return Sample(shape, image, table, pending, full, other, shape[1])


def _words(dtype: torch.dtype, c: int, activation: str, full: bool, wide: bool) -> Sample:
    """An image as convolutions read it; if `wide`, its samples have more than 2^31 elements."""
    shape = (1, c, *((1024, 1024, 544) if wide else (32, 32, 32)))
    image = functools.partial(layout.empty, dtype=dtype, device="meta")
    one = sample(dtype, "3-D", activation, True, False)
    return one._replace(shape=shape, image=image, full=full, more=c)


def _signature(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Types, constants and alignments as the just-in-time compiler would see them."""
    types: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    for i, name in enumerate(kernel.arg_names):
        value, special = values[name], not kernel.params[i].do_not_specialize
        if isinstance(value, Tensor):
            types[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = _TYPES[value.base.dtype].removeprefix("*")
            types[name] = f"tensordesc<{kind}{list(value.block_shape)}>"
        elif name in constants or value is None or (special and type(value) is int and value == 1):
            types[name] = "constexpr"
            fixed[(i,)] = value
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    source = ASTSource
    if getattr(kernel, "is_gluon", bool)():  # (`bool()` is False: a triton without Gluon)
        source = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return source(fn=kernel, signature=types, constexprs=fixed, attrs=attributes)


def compiled(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, int],
    arch: int,
) -> Any:  # fmt: skip
    """Compile a kernel for `arch`, as a launch with these arguments would."""
    target = GPUTarget("cuda", arch, 32)
    source = _signature(kernel, args, constants)
    return triton.compile(source, target=target, options={**options, **tile.OPTIONS})


def report_of(name: str, case: str, arch: int, built: Any) -> Report:
    """Read what a kernel became."""
    return Report(name, case, arch, *_found(built))


def _found(built: Any) -> tuple[int, int, int, str, str]:
    """Read the fields of a report, from the registers on, of a compiled kernel."""
    used = usage(built.asm["cubin"])
    found = " ".join(name for name, word in _MMA.items() if re.search(word, built.asm["ptx"]))
    stack = used["STACK"] + used["LOCAL"]
    # (triton 3.9 has been seen to reserve a byte that nothing reads or writes)
    if stack and not re.search(r"\b(STL|LDL)\b", told(built.asm["cubin"], "-sass")):
        stack = 0
    unsafe = "; ".join(map(str, buffers.shortages(built.asm["ttgir"])))
    return used["REG"], stack, built.metadata.shared, found, unsafe


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and memory of a compiled kernel."""
    text = told(cubin, "-res-usage")
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def told(cubin: bytes, option: str) -> str:
    """What NVIDIA's cuobjdump tells of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        line = [_cuobjdump(), option, str(file)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout


@functools.cache
def _cuobjdump() -> str:
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if not found:
        raise FileNotFoundError("cuobjdump is neither in triton nor on the PATH: install CUDA's")
    return found
