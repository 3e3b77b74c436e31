"""The passes of the convolutional block, and the one place that chooses who runs them.

A *pass* is a function of tensors and a `Geometry`: `reference` states each in plain PyTorch, and
`dispatch` picks the implementation. Modules know nothing of either: they call
`cassetta.functional`, which asks `dispatch` and runs what it answers.

Shape letters used in every file here:

    N samples   C input channels   K output channels   G groups
    *X input size   *Y output size   *T taps (the kernel's size)
    x (N, C, *X)   w (K, C/G, *T)   b (K,)   y (N, K, *Y)
"""

# `kernels/` lies at the root of the repository, so `import kernels` can reach it through sys.path,
# where it would silently become a second copy of this package.
if __name__ != "cassetta.kernels":
    raise ImportError(f"{__file__} is cassetta.kernels; `import {__name__}` reached it by sys.path")

from cassetta.kernels.dispatch import (
    BackendError as BackendError,
    backend as backend,
    set_backend as set_backend,
    use_backend as use_backend,
    why_reference as why_reference,
)
