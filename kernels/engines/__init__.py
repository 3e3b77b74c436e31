"""The engines: each convolves in its own way, and is one module, named here and nowhere else.

An engine is a module, or any object, with

    FUSES                           whether an epilogue, a residual and moments leave with a product
    IS_TORCH                        whether torch differentiates what is not pending
    supports(geometry, taps)        why it has no kernel for a convolution; None if it has one
    is_last(x_is_last, w)           whether it returns channels last
    fprop(x, p, x2, p2, w, ...)     the convolution of one image, or of two, side by side
    dgrad(g, w, geometry, x, ...)   the gradient of an image
    wgrad(g, x, p, w, ...)          those of the weights and of a bias
    bprop(g, x, p, w, ...)          all of these that are needed
    transposed(x, p, w, b, ...)     the adjoint of a convolution whose stride is its size

x (N, C, *X) comes with the transform p that is still to be applied to it (`types.Prologue`). All
compute in the dtype of the weights w (K, C, *T). To add one is to write its module and its name.
"""

from cassetta.kernels import dispatch
from cassetta.kernels.engines import gemm, library

ENGINES = dispatch.ENGINES
ENGINES.update(library=library, gemm=gemm)
