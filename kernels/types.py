"""What the passes speak in, beside tensors: named tuples, without behaviour."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from torch import Tensor

Size = Annotated[tuple[int, ...], "open"]  # of an image: other than taps, it may be a symbol


class Geometry(NamedTuple):
    """How a convolution walks over its input; every field has one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after): an even kernel pads asymmetrically
    dilation: tuple[int, ...]
    groups: int = 1  # of the channels, not per axis

    def size_of(self, size: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
        """The size of what leaves a convolution of an image of this size by so many taps."""
        stride, padding, dilation, _ = self
        axes = zip(size, taps, stride, padding, dilation, strict=True)
        return tuple([(n + a + b - d * (t - 1) - 1) // s + 1 for n, t, s, (a, b), d in axes])

    def tiles(self, taps: Sequence[int]) -> bool:
        """Whether each voxel is read by one tap, once: strides are sizes, and nothing is padded."""
        stride, padding, dilation, _ = self
        axes = zip(taps, stride, padding, dilation, strict=True)
        return all(s == t and not any(pad) and (d == 1 or t == 1) for t, s, pad, d in axes)


class Activation(NamedTuple):
    """A function of one number, by the name it has in `activations`, with up to two constants."""

    name: str = "identity"
    p: float = 0.0
    q: float = 0.0


class Prologue(NamedTuple):
    """The pending transform of a tensor x: z = s2 * act(s1 * x + t1) + t2.

    The scales and shifts are (N, C) in float32 (float64 for a float64 x), or None for 1 and 0; a
    scale and its shift are both None or both given. `slope` (N, C) is what PReLU learns.
    """

    s1: Tensor | None = None
    t1: Tensor | None = None
    activation: Activation = Activation()  # immutable
    slope: Tensor | None = None
    s2: Tensor | None = None
    t2: Tensor | None = None

    def is_identity(self) -> bool:  # (torch 2.8 traces no property of a tuple)
        """Whether z is x."""
        return self.s1 is None and self.s2 is None and self.activation.name == "identity"


NOTHING = Prologue()
"""Nothing is pending."""


class Grid(NamedTuple):
    """Where in an image, in voxels, those of another lie, one number per spatial axis:
    p(i) = (i + shift) step + start, with step >= 0.
    """

    shift: tuple[float, ...]
    step: tuple[float, ...]
    start: tuple[float, ...]


class Moments(NamedTuple):
    """Mean and (biased) variance over the voxels of each channel of each sample: (N, C)."""

    mean: Tensor
    var: Tensor


class Pooling(NamedTuple):
    """Which of the (N, C) channels of an image share their statistics.

    `kind` is "batch" (over samples), "instance" (none), "group" (`groups` of channels of a sample),
    or "fixed": the statistics are given, and no gradient flows through them.
    """

    kind: str
    groups: int = 1

    def pools(self, n: int, c: int) -> tuple[int, int, int, int]:
        """How many pools, members of each, and the steps in a table (N, C) between either."""
        if self.kind == "batch":
            return c, n, 1, c
        if self.kind == "group":
            return n * self.groups, c // self.groups, c // self.groups, 1
        return n * c, 1, 1, 0

    def unbiased(self, n: int, c: int, voxels: int) -> float:
        """Return the factor that makes the variance of a pool unbiased; 1 where there is none."""
        members = 0 if self.kind == "fixed" else self.pools(n, c)[1]
        count = members * voxels
        return count / (count - 1) if count > 1 else 1.0


class Fold(NamedTuple):
    """What the gradient of a value b gains from the statistics of b: a + k (b - centre), (N, C)."""

    a: Tensor
    k: Tensor
    centre: Tensor


def flat(prologue: Prologue) -> tuple[Any, ...]:
    """The prologue as the arguments of a registered operator, which knows tensors and numbers.

    With `torch.compile(dynamic=True)` numbers are open too, and `float` makes them the graph's: one
    that is first met within an `autograd.Function` cannot be told to the next (torch 2.13).
    """
    s1, t1, activation, slope, s2, t2 = prologue
    # torch 2.8 would also open the numbers of an identity, as those of `NOTHING`
    if activation.name == "identity":
        return s1, t1, "identity", 0.0, 0.0, slope, s2, t2
    name, p, q = activation
    return s1, t1, name, float(p), float(q), slope, s2, t2


def unflat(arguments: Sequence[Any]) -> Prologue:
    """The prologue that `flat` took apart."""
    s1, t1, name, p, q, slope, s2, t2 = arguments
    return Prologue(s1, t1, Activation(name, p, q), slope, s2, t2)


def apart(prologue: Prologue) -> tuple[Tensor | None, ...]:
    """Return the tables of a prologue: s1, t1, slope, s2, t2."""
    s1, t1, _, slope, s2, t2 = prologue
    return s1, t1, slope, s2, t2


def together(tables: Sequence[Tensor | None], activation: Activation) -> Prologue:
    """Return the prologue of an activation and of tables in the order of `apart`."""
    s1, t1, slope, s2, t2 = tables
    return Prologue(s1, t1, activation, slope, s2, t2)
