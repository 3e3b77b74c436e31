"""Blocks, groups and levels under the name that upstream's file has."""

from cassetta.layers.blocks import ConvBlock as ConvBlock, ConvGroup as ConvGroup
from cassetta.layers.levels import (
    DownConvGroup as DownConvGroup,
    DownGroup as DownGroup,
    UpConvGroup as UpConvGroup,
    UpGroup as UpGroup,
)
