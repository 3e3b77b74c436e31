"""The passes in plain PyTorch, under torch's own autograd: the specification and the fallback.

Second derivatives, FLOP counters, exports and every transform work as in any PyTorch module,
because nothing here is written by hand but the padding.
"""

from torch import Tensor
from torch.nn import functional as F

from cassetta.kernels.types import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_fprop(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x (N, C, *X) with w (K, C/G, *T), zeros outside x: (N, K, *Y)."""
    stride, padding, dilation, groups = geometry
    if any(before != after for before, after in padding):
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
        padding = ((0, 0),) * len(padding)
    symmetric = tuple(before for before, _ in padding)
    return _CONV[len(stride)](x, w, b, stride, symmetric, dilation, groups)


def conv_transposed(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, output_padding: tuple[int, ...]
) -> Tensor:
    """The adjoint of `conv_fprop` in x, plus b: x (N, K, *Y), w (K, C/G, *T) to (N, C, *X).

    What the forward convolution pads is cropped here; `output_padding` lengthens the end of each
    axis, which a stride leaves open.
    """
    stride, padding, dilation, groups = geometry
    common = tuple(min(pair) for pair in padding)
    y = _CONV_TRANSPOSED[len(stride)](x, w, b, stride, common, output_padding, groups, dilation)
    for axis, (before, after) in enumerate(padding, start=2):
        if before != after:
            start = before - min(before, after)
            y = y.narrow(axis, start, y.shape[axis] - abs(after - before))
    return y
