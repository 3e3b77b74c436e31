"""Convolutional backbones for 1-D, 2-D and 3-D images.

backbones   ConvEncoder, ConvDecoder, UNet, MeshNet, ATrousNet
layers      what they are built of: ConvBlock, ConvGroup, Down/UpConvGroup, ...
models      SegNet: features, backbone, classes
io          modules that save how they were built
functional  what the layers compute
kernels     who computes it, and why

`summary(net, shape)` says what a network costs, `largest(net, shape, memory)` how much of it fits,
`explain(net, image)` who runs it and why, `tune(net, image)` finds out what runs it fastest, and
`graphed(net, patch)` captures it in CUDA graphs, for patches of one size.
"""

from cassetta import (
    backbones as backbones,
    core as core,
    functional as functional,
    io as io,
    kernels as kernels,
    layers as layers,
    models as models,
)
from cassetta.costs import summary as summary
from cassetta.explanation import explain as explain
from cassetta.fitting import largest as largest
from cassetta.graphs import graphed as graphed
from cassetta.kernels.dispatch import set_backend as set_backend, use_backend as use_backend
from cassetta.measure.tuning import tune as tune

__version__ = "0.1.0"
