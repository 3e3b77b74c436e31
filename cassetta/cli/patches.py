"""Small boxes of a volume: drawn at random to learn from, swept in order to predict."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

AXES = {3: (0, 1, 2), 2: (0, 2), 1: (2,)}
"""The axes of the volume that a network of 1, 2 or 3 dimensions sees; never, below 3, the axis
along which the volume is split."""


def box(ndim: int, patch: int) -> tuple[int, int, int]:
    """The size of a patch in the volume: one voxel along the axes that the network does not see."""
    x, y, z = (patch if axis in AXES[ndim] else 1 for axis in range(3))
    return x, y, z


class Sampler:
    """Random patches (B, 1, *patch) and their labels (B, *patch) of a volume.

    Each holds a labelled voxel; half of them are flipped left to right.
    """

    def __init__(self, image: Tensor, labels: Tensor, size: Sequence[int], seed: int) -> None:
        self.image, self.labels = image, labels
        self.size = torch.tensor(size)
        self.seen = [axis for axis, n in enumerate(size) if n > 1]
        self.inside = torch.nonzero(labels > 0)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        patches, labels = zip(*(self._one() for _ in range(count)), strict=True)
        return torch.stack(patches)[:, None], torch.stack(labels)

    def _one(self) -> tuple[Tensor, Tensor]:
        centre = self.inside[self._draw(len(self.inside))]
        shift = torch.tensor([self._draw(int(n)) for n in self.size])
        most = torch.tensor(self.image.shape) - self.size
        start = torch.minimum(torch.clamp(centre - shift, min=0), most)
        where = tuple(slice(int(a), int(a + n)) for a, n in zip(start, self.size, strict=True))
        patch, label = self.image[where], self.labels[where]
        if self._draw(2) and 0 in self.seen:
            patch, label = patch.flip(0), label.flip(0)
        shape = [int(self.size[axis]) for axis in self.seen]
        return patch.reshape(shape), label.reshape(shape)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


@torch.inference_mode()
def sweep(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    size: Sequence[int],
    nb_classes: int,
    batch: int = 8,
    track: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Predict a volume in overlapping boxes, whose middle counts more than their edges.

    Parameters
    ----------
    predict : callable
        (B, 1, *patch) -> (B, nb_classes, *patch), on the device of `image`.
    image : (X, Y, Z) tensor
        Volume; smaller than a box, it is seen between zeros.
    size : (x, y, z)
        Size of a box; where it is 1, the network does not see that axis.
    track : callable
        Wraps the list of batches, to show how far it is.

    Returns
    -------
    out : (nb_classes, X, Y, Z) tensor
    """
    shape = image.shape
    padding = [max(0, n - have) for n, have in zip(size, shape, strict=True)]
    image = torch.nn.functional.pad(image, [p for n in reversed(padding) for p in (0, n)])
    weight = _window(size).to(image)
    out = image.new_zeros(nb_classes, *image.shape)
    total = torch.zeros_like(image)
    seen = [n for n in size if n > 1]
    starts = list(itertools.product(*map(_starts, image.shape, size)))
    for some in track([starts[n : n + batch] for n in range(0, len(starts), batch)]):
        boxes = [tuple(slice(a, a + n) for a, n in zip(s, size, strict=True)) for s in some]
        answers = predict(torch.stack([image[b].reshape(seen) for b in boxes])[:, None])
        for where, answer in zip(boxes, answers, strict=True):
            out[(slice(None), *where)] += answer.reshape(-1, *size) * weight
            total[where] += weight
    out /= total
    return out[(slice(None), *(slice(n) for n in shape))]


def _starts(length: int, size: int) -> list[int]:
    """Where boxes begin along an axis: first at 0, last at the end, overlapping by half or more."""
    count = 1 if length == size else 1 + -(-(length - size) // max(1, size // 2))
    return [round(n * (length - size) / max(1, count - 1)) for n in range(count)]


def _window(size: Sequence[int]) -> Tensor:
    """Weights that fall off towards the edges of a box, and are nowhere zero: (x, y, z)."""
    lines = [torch.hann_window(n + 2, periodic=False)[1:-1] for n in size]
    return lines[0][:, None, None] * lines[1][:, None] * lines[2]
