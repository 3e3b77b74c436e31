"""The passes over an image, each on its own: their bandwidth beside that of a copy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import dispatch, ops, reference
from cassetta.kernels.examples import Sample
from cassetta.kernels.types import Activation, Prologue
from cassetta.measure.agreement import PLANNED, SLACK, cast
from cassetta.measure.correct import Expected
from cassetta.measure.peers import Rival, as_it_is

NAMES = PLANNED


def rivals(device: torch.device, layouts: Any) -> list[Rival]:
    """Triton's passes where they run, those of plain PyTorch, and a copy of the image."""
    engines = {"library": "ours", "reference": "peer", "copy": "roof"}
    if device.type != "cuda":
        engines = {"reference": "ours", "copy": "roof"}
    return [
        Rival(engine, layout, role, "triton" if engine == "library" else "reference", as_it_is)
        for layout in layouts
        for engine, role in engines.items()
    ]


class Work(NamedTuple):
    """What the passes work on: so many examples of each, with one pending transform."""

    sample: Sample
    nb: int
    arguments: dict[str, list[tuple[Any, ...]]]  # of each pass, drawn when they are first needed

    def given(self, what: str) -> list[tuple[Any, ...]]:
        """What a pass is called with, in turn."""
        if what not in self.arguments:
            examples = ops.PASSES[what].examples
            self.arguments[what] = [next(iter(examples(self.sample))) for _ in range(self.nb)]
        return self.arguments[what]

    def run(self, what: str, engine: str) -> Callable[[int], Any]:
        """A pass, or the copy of an image, over the images in turn."""
        several = self.given(what)
        image = several[0][0]
        passes = dispatch.passes(image) if engine == "library" else reference
        target = torch.empty_like(image) if engine == "copy" else image

        def one(k: int) -> Any:
            arguments = several[k % len(several)]
            if engine == "copy":
                return target.copy_(arguments[0])
            return getattr(passes, what)(*arguments)

        return one

    def expected(self, what: str) -> Expected:
        """What plain PyTorch computes of the first image."""
        own = self.given(what)[0]
        run = getattr(reference, what)
        truth, same = tensors(run(*cast(own, torch.float32))), tensors(run(*own))
        return Expected(truth, same, SLACK[same[0].dtype])

    def moved(self, what: str, engine: str, result: Any) -> int:
        """Bytes of the images that a run reads and writes, each once."""
        given = self.given(what)[0][: 1 if engine == "copy" else None]
        every = [x for x in (*given, *tensors(result)) if isinstance(x, Tensor)]
        return sum(x.nbytes for x in every if x.shape == self.sample.shape)


def work(shape: tuple[int, ...], layout: str, dtype: torch.dtype, nb: int, device: Any) -> Work:
    """Images and gradients in this layout, drawn anew."""

    def image(shape: tuple[int, ...]) -> Tensor:
        return in_memory(torch.randn(shape, device=device).to(dtype), layout)

    def table(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) + 0.5

    scale, shift = torch.randn(2, *shape[:2], device=device)
    prologue = Prologue(scale, shift, Activation("relu"))
    sample = Sample(shape, image, table, lambda c: prologue, False, False, shape[1])
    return Work(sample, nb, {})


def in_memory(x: Tensor, layout: str) -> Tensor:
    """The image with its channels first or last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x


def tensors(result: Any) -> list[Tensor]:
    """What a pass returned, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)
