"""Backbones map features to features; models put them between an image and an answer.

A backbone does not care about the channels of the problem at hand: it takes `inp_channels` features
and gives `out_channels`.
"""

from cassetta.backbones.atrous import ATrousNet as ATrousNet, MeshNet as MeshNet
from cassetta.backbones.fcn import ConvDecoder as ConvDecoder, ConvEncoder as ConvEncoder
from cassetta.backbones.unet import UNet as UNet
