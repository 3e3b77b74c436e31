"""Networks of dilated convolutions, at full resolution throughout."""

from functools import partial
from typing import Any

from cassetta.backbones.presets import find_preset
from cassetta.core import check
from cassetta.core.typing import (
    ActivationType,
    AttentionType,
    DropoutType,
    NormType,
    OneOrSeveral,
)
from cassetta.core.utils import extrapolate
from cassetta.io.loadable import LoadableMixin
from cassetta.layers import ConvGroup, ModuleGroup, ModuleSum


class MeshNet(LoadableMixin, ModuleGroup):
    """A chain of dilated convolutions, with a large field of view and few parameters.

    Yu & Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions" (2016)
    [arXiv:1511.07122]; Fedorov et al., "End-to-end learning of brain tissue segmentation from
    imperfect labeling" (2017) [arXiv:1612.00940].

    The defaults are upstream's: dilations 1, 2, 4, 8, 16, 32 with **two** convolutions each. The
    network of Fedorov et al. has seven single convolutions, and is
    `MeshNet(3, nb_layers=7, nb_conv_per_layer=1, dilation=[1, 1, 2, 4, 8, 16, 1])`, or
    `MeshNet.preset("fedorov")`.
    """

    def __init__(
        self,
        ndim: int,
        nb_features: OneOrSeveral[int] = 21,
        nb_layers: int = 6,
        nb_conv_per_layer: int = 2,
        dilation: OneOrSeveral[int] = 1,
        mul_dilation: int = 2,
        kernel_size: OneOrSeveral[int] = 3,
        residual: bool = False,
        activation: ActivationType = "ReLU",
        norm: NormType = "batch",
        dropout: DropoutType = None,
        attention: AttentionType = None,
        order: str = "caxnd",
        bias: bool = True,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        nb_features : [list of] int
            Number of features; if a list, of each layer (its last entry holds for all further
            layers), and there can be no residual connections where it changes.
        nb_layers : int
            Number of layers.
        nb_conv_per_layer : int
            Number of convolutions of each layer.
        dilation : [list of] int
            Dilation of the first layer; if a list, of each layer. The rest is continued.
        mul_dilation : int
            Multiply the dilation by this from layer to layer.
        kernel_size, activation, norm, dropout, attention, order, bias
            See `ConvBlock`.
        residual : bool
            Residual connections around convolutions, and around layers.
        """
        nb_layers = check.whole("nb_layers", nb_layers)
        layer = partial(
            ConvGroup, ndim, nb_conv=nb_conv_per_layer, kernel_size=kernel_size,
            residual=residual, activation=activation, norm=norm, dropout=dropout,
            attention=attention, order=order, bias=bias,
        )  # fmt: skip
        features = _features(nb_features, nb_layers, residual)
        dilations = _dilations(dilation, mul_dilation, nb_layers)
        layers = [
            layer(channels=out, skip=inp - out, dilation=d)
            for inp, out, d in zip([features[0], *features[:-1]], features, dilations, strict=True)
        ]
        super().__init__(layers, residual=residual)

    @classmethod
    def preset(cls, name: str, ndim: int = 3, **options: Any) -> "MeshNet":
        """The hidden layers of a published MeshNet.

        ```python
        MeshNet.preset("mindgrab")                       # 15 features in, 15 out
        SegNet.preset("mindgrab")                        # the whole network, image to classes
        ```

        Parameters
        ----------
        name : str
            One of `cassetta.backbones.presets.PRESETS`: "fedorov", "mindgrab", "meshnet26", ...
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        **options
            Arguments of the constructor to change.
        """
        preset = find_preset(name)
        published: dict[str, Any] = {
            "nb_features": preset.nb_features, "nb_layers": len(preset.dilation),
            "nb_conv_per_layer": 1, "dilation": list(preset.dilation), **preset.block_options(),
        }  # fmt: skip
        return cls(ndim, **{**published, **options})


class ATrousNet(LoadableMixin, ModuleGroup):
    """Stages of parallel dilated convolutions, more and more of them, then fewer and fewer.

    Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
    Convolution, and Fully Connected CRFs" (2018) [arXiv:1606.00915].

    There are **2L - 1 stages** for `nb_levels=L`: stage l sums l branches, of the first l
    dilations, and l runs from 1 to L and back to 1. (The usual diagram shows L = 3.)
    """

    def __init__(
        self,
        ndim: int,
        nb_features: OneOrSeveral[int] = 21,
        nb_levels: int = 5,
        nb_conv_per_level: int = 2,
        dilation: OneOrSeveral[int] = 1,
        mul_dilation: int = 2,
        kernel_size: OneOrSeveral[int] = 3,
        residual: bool = False,
        activation: ActivationType = "ReLU",
        norm: NormType = "batch",
        dropout: DropoutType = None,
        attention: AttentionType = None,
        order: str = "caxnd",
        bias: bool = True,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        nb_features : [list of] int
            Number of features; if a list, of each level (its last entry holds for all further
            levels), and there can be no residual connections where it changes.
        nb_levels : int
            Number of levels, and of different dilations.
        nb_conv_per_level : int
            Number of convolutions of each branch.
        dilation : [list of] int
            Dilation of the first branch; if a list, of each branch. The rest is continued.
        mul_dilation : int
            Multiply the dilation by this from branch to branch.
        kernel_size, activation, norm, dropout, attention, order, bias
            See `ConvBlock`.
        residual : bool
            Residual connections around convolutions, and around stages.
        """
        nb_levels = check.whole("nb_levels", nb_levels)
        branch = partial(
            ConvGroup, ndim, nb_conv=nb_conv_per_level, kernel_size=kernel_size,
            residual=residual, activation=activation, norm=norm, dropout=dropout,
            attention=attention, order=order, bias=bias,
        )  # fmt: skip
        features = _features(nb_features, nb_levels, residual)
        dilations = _dilations(dilation, mul_dilation, nb_levels)
        stages, inp = [], features[0]
        for level in [*range(nb_levels), *reversed(range(nb_levels - 1))]:
            out = features[level]
            branches = [
                branch(channels=out, skip=inp - out, dilation=d) for d in dilations[: level + 1]
            ]
            stages.append(ModuleSum(branches))
            inp = out
        super().__init__(stages, residual=residual)


def _features(nb_features: Any, depth: int, residual: bool) -> list[int]:
    features = extrapolate(check.several("nb_features", nb_features), depth, lambda last, n: last)
    if residual and len(set(features)) > 1:
        raise ValueError(f"residual=True needs equal features, not nb_features={nb_features!r}")
    return features


def _dilations(dilation: Any, mul_dilation: float, depth: int) -> list[int]:
    factor = check.positive("mul_dilation", mul_dilation)
    return extrapolate(check.several("dilation", dilation), depth, lambda last, n: last * factor**n)
