"""What compilers are told of an operator is what it returns, however its images lie in memory."""

import contextlib
import importlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import large_tiles
from torch import Tensor, nn

from cassetta.backbones import MeshNet, UNet
from cassetta.kernels import dispatch, layout, ops
from cassetta.kernels.examples import Sample, transform
from cassetta.kernels.records import PASSES
from cassetta.kernels.types import Activation, Prologue
from cassetta.layers import Conv, DownInterpol, DownPool, UpInterpol

from compare import AsTold, assert_near, assert_registered

Draw = Callable[..., Tensor]

LAYOUTS = {
    "first": lambda t: t.contiguous(),
    "last": lambda t: last(t),
    "words": lambda t: layout.empty(tuple(t.shape), t.dtype, t.device).copy_(t),
    "crop of first": lambda t: crop(torch.zeros_like, t),
    "crop of last": lambda t: crop(lambda room: last(torch.zeros_like(room)), t),
    "crop of words": lambda t: crop(LAYOUTS["words"], t),
    "some channels of first": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "some channels of last": lambda t: last(torch.cat([t, t], 1))[:, : t.shape[1]],
    "turned": lambda t: t.mT.contiguous().mT,
    "turned, last": lambda t: last(t.mT).mT,
    "samples and channels exchanged": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded samples": lambda t: t[:1].contiguous().expand(t.shape),
    "expanded channels": lambda t: t[:, :1].contiguous().expand(t.shape),
    "expanded": lambda t: t.new_ones(()).expand(t.shape),
}
"""Views of the values of an image, or of some of them."""

SHAPES = [
    (2, 5, 4, 6), (2, 16, 4, 6), (1, 3, 5, 4), (2, 1, 4, 6), (1, 1, 3, 3), (2, 5, 1, 6),
    (2, 5, 6, 1), (3, 5, 1, 1), (0, 5, 4, 6), (2, 3, 7), (1, 6, 2, 3, 4),
]  # fmt: skip
"""Two or more samples, one, and none; channels in words, and one; axes of size 1."""


def last(t: Tensor) -> Tensor:
    """Channels last, whatever the number of axes."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def crop(make: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The middle of a larger image."""
    room = make(t.new_zeros(*t.shape[:2], *(n + 2 for n in t.shape[2:])))
    return room[(..., *(slice(1, n + 1) for n in t.shape[2:]))].copy_(t)


def examples(name: str, shape: tuple[int, ...], image: Draw, draw: Draw) -> list[tuple[Any, ...]]:
    """What an operator is called with, of what `image` and `draw` make."""
    record = ops.PASSES[name]

    def table(*size: int) -> Tensor:
        one = draw(*size).abs() + 0.1
        return one.mT.contiguous().mT if record.of == "tables" and len(size) == 2 else one

    def pending(channels: int) -> Prologue:
        return transform(table(shape[0], channels), Activation("silu"))

    sample = Sample(shape, image, table, pending, True, False, 7)
    found = [*record.examples(sample), *record.examples(sample._replace(full=False, other=True))]
    half = [[torch.float16 if one is torch.float32 else one for one in args] for args in found]
    return [*found, *half] if any(torch.float32 in args for args in map(_plain, found)) else found


def makers(run: str, kind: str, request: Any) -> tuple[Draw, Draw]:
    """What makes images of a layout, of a shape, and tensors of any, for those who run a pass."""
    device = request.getfixturevalue("kernels") if run == "triton" else torch.device("cpu")
    draw = lambda *size: torch.randn(size, device=device)  # noqa: E731
    return lambda shape: LAYOUTS[kind](draw(*shape)), draw


def _plain(arguments: tuple[Any, ...]) -> list[Any]:
    return [one for one in arguments if isinstance(one, torch.dtype)]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, interpreted
@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")  # of an empty batch
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("run", ["reference", "triton"])
@pytest.mark.parametrize("name", ops.PASSES)
def test_results_lie_as_compilers_are_told(name, run, kind, request):
    image, draw = makers(run, kind, request)
    with AsTold() as told, large_tiles():
        for shape in SHAPES if run == "reference" else SHAPES[::4]:
            for arguments in examples(name, shape, image, draw)[:: 1 if run == "reference" else 3]:
                getattr(ops, name)(*arguments)
    assert told.names == {name}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, interpreted
@pytest.mark.parametrize("kind", ["first", "last", "turned", "expanded"])
@pytest.mark.parametrize("run", ["reference", "triton"])
@pytest.mark.parametrize("name", ops.PASSES)
def test_operators_are_registered_as_torch_wants_them(name, run, kind, request):
    image, draw = makers(run, kind, request)
    first, *_, last = examples(name, (2, 5, 4, 6), image, draw)
    for arguments in (first, last) if kind == "first" else (first,):
        assert_registered(name, lambda arguments=arguments: getattr(ops, name)(*arguments))


def ways() -> nn.Module:
    """Ways down and up a level, each of the same image."""

    class Ways(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return sum(way(x).square().sum() for way in self)

    return Ways([DownPool(2, 8), DownInterpol(2, 8), UpInterpol(2, 8)])


def unet() -> nn.Module:
    return UNet(2, 8, nb_levels=2, norm="instance", unpool_mode="interpolate")


def meshnet() -> nn.Module:
    return nn.Sequential(Conv(2, 8, 5, kernel_size=3), MeshNet(2, 5, nb_layers=3))


def step(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves a network, and the gradient of its square."""
    x = x.detach().requires_grad_()
    out = run(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("kind", ["crop of last", "crop of words", "expanded channels"])
@pytest.mark.parametrize("make", [ways, unet])
def test_steps_of_networks_lie_as_compilers_are_told(make, kind, engine):
    """Forward and backward, with the layouts that operators hand to each other."""
    net = make()
    with dispatch.fused_on_reference(), AsTold() as told:
        step(net, LAYOUTS[kind](torch.randn(1, 8, 8, 8)))
    assert {"max_pool_dgrad", "resize", "resize_dgrad"} <= told.names


@pytest.fixture
def nothing_in_words(monkeypatch):
    """Inductor meets the operators as for the first time, and may describe none of them.

    The description of an operator is that of all before it: 2 to the depth of a network.
    """
    lowerings = importlib.import_module("torch._inductor.lowering").lowerings
    issue = importlib.import_module("torch._inductor.exc").OperatorIssue
    operators = [getattr(torch.ops.cassetta, name).default for name in PASSES]
    for one in operators:
        monkeypatch.delitem(lowerings, one, raising=False)

    def described(target, *arguments):
        assert target not in operators
        return ""

    monkeypatch.setattr(issue, "operator_str", staticmethod(described))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler of C++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of what it imports itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize(
    ("make", "run", "engine"),
    [
        (ways, "reference", "library"),
        (ways, "triton", "library"),
        (unet, "reference", "library"),
        (meshnet, "reference", "gemm"),
    ],
)
@pytest.mark.usefixtures("nothing_in_words")
def test_inductor_finds_results_where_it_was_told(make, run, engine, request):
    """Its code asserts the strides of what an operator returns."""
    device = request.getfixturevalue("kernels") if run == "triton" else torch.device("cpu")
    net, x = make().to(device), LAYOUTS["crop of last"](torch.randn(1, 8, 8, 8, device=device))
    torch._dynamo.reset()
    options = {"fx_graph_cache": False, "compile_threads": 1}
    fused = dispatch.fused_on_reference() if run == "reference" else contextlib.nullcontext()
    with fused, large_tiles(), dispatch.use_engine(engine):
        expected = step(net, x)
        found = step(torch.compile(net, fullgraph=True, options=options), x)
    for one, other in zip(found, expected, strict=True):
        assert_near(one.contiguous(), other.contiguous(), 1e-5)  # sums in another order
