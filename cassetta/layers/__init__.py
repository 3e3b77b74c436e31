"""Layers: simple modules and sequences of them, the building blocks of backbones."""

from cassetta.layers.activations import (
    SymExp as SymExp,
    SymLog as SymLog,
    make_activation as make_activation,
)
from cassetta.layers.attention import (
    BlockAttention as BlockAttention,
    ChannelBlockAttention as ChannelBlockAttention,
    ChannelSqzEx as ChannelSqzEx,
    DotProductAttention as DotProductAttention,
    MultiHeadAttention as MultiHeadAttention,
    SpatialBlockAttention as SpatialBlockAttention,
    SpatialSqzEx as SpatialSqzEx,
    SqzEx as SqzEx,
    make_attention as make_attention,
)
from cassetta.layers.blocks import ConvBlock as ConvBlock, ConvGroup as ConvGroup
from cassetta.layers.conv import (
    Conv as Conv,
    ConvTransposed as ConvTransposed,
    CrossHairConv as CrossHairConv,
    LazyConv as LazyConv,
    LazyConvTransposed as LazyConvTransposed,
    SeparableConv as SeparableConv,
    make_conv as make_conv,
)
from cassetta.layers.dropout import (
    ChannelDropout as ChannelDropout,
    make_dropout as make_dropout,
)
from cassetta.layers.interpol import (
    CoeffToValue as CoeffToValue,
    FlowExp as FlowExp,
    FlowPull as FlowPull,
    FlowPush as FlowPush,
    GridPull as GridPull,
    GridPush as GridPush,
    Resize as Resize,
    ResizeFlow as ResizeFlow,
    Restrict as Restrict,
    ValueToCoeff as ValueToCoeff,
)
from cassetta.layers.levels import (
    DownConvGroup as DownConvGroup,
    DownGroup as DownGroup,
    UpConvGroup as UpConvGroup,
    UpGroup as UpGroup,
)
from cassetta.layers.linear import LazyLinear as LazyLinear, Linear as Linear
from cassetta.layers.norm import (
    BatchNorm as BatchNorm,
    InstanceNorm as InstanceNorm,
    LayerNorm as LayerNorm,
    make_norm as make_norm,
)
from cassetta.layers.simple import (
    Add as Add,
    Cat as Cat,
    DoNothing as DoNothing,
    GlobalPool as GlobalPool,
    Hadamard as Hadamard,
    ModuleGroup as ModuleGroup,
    ModuleSum as ModuleSum,
    MoveDim as MoveDim,
    Split as Split,
)
from cassetta.layers.updown import (
    DownConv as DownConv,
    DownInterpol as DownInterpol,
    DownPool as DownPool,
    UpConv as UpConv,
    UpInterpol as UpInterpol,
    UpPool as UpPool,
)
