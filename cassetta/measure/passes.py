"""The passes over an image, each on its own: their bandwidth beside that of a copy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cassetta.kernels import dispatch, reference
from cassetta.kernels.types import Activation, Prologue
from cassetta.measure.correct import Expected
from cassetta.measure.peers import Rival, as_it_is

NAMES = ("moments", "materialize", "prologue_sums", "prologue_dgrad")


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
    """What the passes work on: images, gradients, and one pending transform."""

    images: list[Tensor]
    gradients: list[Tensor]
    target: Tensor
    prologue: Prologue
    centre: Tensor

    def run(self, what: str, engine: str) -> Callable[[int], Any]:
        """A pass, or the copy of an image, over the images in turn."""
        passes = dispatch.passes(self.images[0]) if engine == "library" else reference
        p = self.prologue

        def one(k: int) -> Any:
            x, g = (several[k % len(several)] for several in (self.images, self.gradients))
            if engine == "copy":
                return self.target.copy_(x)
            if what == "moments":
                return passes.moments(x, p)
            if what == "materialize":
                return passes.materialize(x, p, None, x.dtype)
            if what == "prologue_sums":
                return passes.prologue_sums(g, x, p, self.centre, None, False)
            return passes.prologue_dgrad(g, x, p, None, False)

        return one

    def expected(self, what: str) -> Expected:
        """What plain PyTorch computes of the first image."""
        wide = self._replace(images=[self.images[0].float()], gradients=[self.gradients[0].float()])
        return Expected(*(tensors(work.run(what, "reference")(0)) for work in (wide, self)))


def work(shape: tuple[int, ...], layout: str, dtype: torch.dtype, nb: int, device: Any) -> Work:
    """Images and gradients in this layout, drawn anew."""

    def image() -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        return in_memory(x, layout)

    images = [image() for _ in range(nb)]
    scale, shift = torch.randn(2, *shape[:2], device=device)
    prologue = Prologue(scale, shift, Activation("relu"))
    return Work(images, [image() for _ in range(nb)], image(), prologue, shift)


def in_memory(x: Tensor, layout: str) -> Tensor:
    """The image with its channels first or last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x


def tensors(result: Any) -> list[Tensor]:
    """What a pass returned, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)
