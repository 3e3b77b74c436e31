"""The MeshNets that were published, with the number of parameters their authors state.

Each is a chain of 3x3x3 convolutions, the first of which maps the image to `nb_features`, and a
1x1x1 convolution to `nb_classes`. Sources:

    fedorov        Fedorov et al. (2017) [arXiv:1612.00940], github.com/Entodi/MeshNet
    meshnet_104_38 github.com/Entodi/meshnet-pytorch
    model...       Brainchop, github.com/neuroneural/brainchop, whose norms are folded into weights
    mindgrab       MindGrab (2025) [arXiv:2506.11860], github.com/neuroneural/brainchop-models
    meshnet5...26  stroke lesions, (2025) [arXiv:2503.05531]
    hdc_deep...    github.com/neuroneural/catalyst_example; its authors state 83,682 for the 16
                   channels, without the scale and shift of the norms that are counted here
"""

import re
from functools import partial
from typing import Any, NamedTuple

from cassetta.core import check
from cassetta.layers import LayerNorm

_DOWN_UP = (1, 2, 4, 8, 16, 8, 4, 2, 1)
_STROKE = (1, 2, 4, 8, 16, 16, 8, 4, 2)
_HDC = (1, 3, 5, 7, 13, 19, 31, 19, 13, 7, 5, 3, 1)


class Preset(NamedTuple):
    """One published network."""

    nb_features: int
    dilation: tuple[int, ...]
    nb_classes: int
    nb_parameters: int  # of the whole network, the first convolution taking one channel
    activation: str = "ReLU"
    norm: Any = None
    dropout: float | None = None
    bias: bool = True
    order: str = "cndax"

    def block_options(self) -> dict[str, Any]:
        """The options that every convolution block of the network shares."""
        names = ("activation", "norm", "dropout", "bias", "order")
        return {name: getattr(self, name) for name in names}


PRESETS: dict[str, Preset] = {
    "fedorov": Preset(
        21, (1, 1, 2, 4, 8, 16, 1), 3, 72_516, norm="batch", dropout=0.25, order="caxnd"
    ),
    "meshnet_104_38": Preset(71, (1, 1, 1, 2, 4, 8, 1), 104, 827_538, norm="batch"),
    "model5_gw_ae": Preset(5, _DOWN_UP, 3, 5_598),
    "model11_gw_ae": Preset(11, (1, 2, 4, 8, 4, 2, 2, 1), 3, 23_290),
    "model20chan3cls": Preset(20, _DOWN_UP, 3, 87_183, activation="ELU"),
    "model18cls": Preset(21, _DOWN_UP, 18, 96_408, activation="ELU"),
    "model30chan18cls": Preset(30, _DOWN_UP, 18, 196_038, activation="ELU"),
    "model30chan50cls": Preset(30, _DOWN_UP, 50, 197_030, activation="ELU"),
    "model21_104class": Preset(21, (1, 2, 2, 4, 4, 8, 8, 16), 104, 86_372),
    "mindgrab": Preset(
        15, (16, 8, 4, 2, 1) * 5, 2, 146_237,
        activation="GELU", norm=partial(LayerNorm, affine=False), bias=False,
    ),
    "meshnet5": Preset(5, _STROKE, 2, 5_682, norm="batch"),
    "meshnet16": Preset(16, _STROKE, 2, 56_194, norm="batch"),
    "meshnet26": Preset(26, _STROKE, 2, 147_474, norm="batch"),
    "hdc_deep16": Preset(16, _HDC, 18, 84_098, activation="GELU", norm="layer", bias=False),
    "hdc_deep24": Preset(24, _HDC, 104, 190_496, activation="GELU", norm="layer", bias=False),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of this name, in any case, with or without "-" and "_"."""
    return check.named("name", name, PRESETS, lambda word: re.sub("[-_ ]", "", word.lower()))
