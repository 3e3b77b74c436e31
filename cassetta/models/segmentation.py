"""Segmentation: which tissue, or which thing, is in each voxel."""

from typing import Any

from torch import Tensor, nn

from cassetta import backbones
from cassetta.backbones.presets import find_preset
from cassetta.core import check
from cassetta.core.typing import ActivationType, OneOrSeveral
from cassetta.functional import defer
from cassetta.io.loadable import LoadableMixin
from cassetta.layers import ConvBlock, fusing
from cassetta.layers.repeated import repeated
from cassetta.layers.simple import Chain, listed

BACKBONES = {
    kind.__name__: kind
    for kind in (
        backbones.UNet, backbones.MeshNet, backbones.ATrousNet, backbones.ConvEncoder,
        backbones.ConvDecoder,
    )
}  # fmt: skip
"""Those that can be asked for by name."""


class SegNet(LoadableMixin, Chain):
    """A feature convolution, a backbone, and a 1x1 convolution to classes.

    It is saved with all it takes to build it: `net.save(path)`, `SegNet.load_from(path)`.
    """

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int,
        kernel_size: OneOrSeveral[int] = 3,
        activation: ActivationType = "Softmax",
        backbone: str | nn.Module | type[nn.Module] = "UNet",
        opt_backbone: dict[str, Any] | None = None,
        opt_features: dict[str, Any] | None = None,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        inp_channels : int
            Number of channels of the image.
        out_channels : int
            Number of classes.
        kernel_size : [list of] int
            Kernel size of the feature convolution.
        activation : ActivationType
            What turns the logits into the output. None: the output is the logits.
        backbone : str, Module or Module class
            "UNet", "MeshNet", "ATrousNet", ...; or any module that has `inp_channels` and
            `out_channels`; or its class, which is called with `ndim` and `opt_backbone`.
        opt_backbone : dict
            Options of the backbone, unless it is a module already.
        opt_features : dict
            Options of the feature convolution, which is a `ConvBlock` without activation.
        """
        ndim = check.dimensions(ndim)
        inp_channels = check.whole("inp_channels", inp_channels)
        out_channels = check.whole("out_channels", out_channels)
        net = _backbone(backbone, ndim, opt_backbone)
        features: dict[str, Any] = {"kernel_size": kernel_size, "activation": None}
        super().__init__(
            ConvBlock(ndim, inp_channels, net.inp_channels, **{**features, **(opt_features or {})}),
            net,
            ConvBlock(ndim, net.out_channels, out_channels, kernel_size=1, activation=activation),
        )

    @classmethod
    def preset(
        cls,
        name: str,
        ndim: int = 3,
        inp_channels: int = 1,
        out_channels: int | None = None,
        activation: ActivationType = "Softmax",
    ) -> "SegNet":
        """A published MeshNet, whole: its first convolution is the feature convolution.

        Parameters
        ----------
        name : str
            One of `cassetta.backbones.presets.PRESETS`: "fedorov", "mindgrab", "meshnet26", ...
        ndim : {1, 2, 3}
            Number of spatial dimensions; all were published in 3-D.
        inp_channels : int
            Number of channels of the image; all were published for one.
        out_channels : int, default=as published
            Number of classes.
        activation : ActivationType
            What turns the logits into the output.
        """
        preset = find_preset(name)
        first, *others = preset.dilation
        return cls(
            ndim,
            inp_channels,
            preset.nb_classes if out_channels is None else out_channels,
            activation=activation,
            backbone="MeshNet",
            opt_backbone={
                "nb_features": preset.nb_features, "nb_layers": len(others),
                "nb_conv_per_layer": 1, "dilation": others, **preset.block_options(),
            },
            opt_features={"dilation": first, **preset.block_options()},
        )  # fmt: skip

    @repeated
    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size)

        Raises
        ------
        ValueError, TypeError
            If the image has other dimensions or channels, or is too small for the backbone.
        """
        self._check(inp)
        out = defer(inp)
        for part in self:
            out = defer(fusing.deferred_call(part)(out))
        return out.z()

    def predict_logits(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size), before the last activation"""
        self._check(inp)
        features, backbone, head = listed(self)
        last = head.conv if isinstance(head, ConvBlock) else head
        out = defer(inp)
        for part in features, backbone:
            out = defer(fusing.deferred_call(part)(out))
        return last(out.z())

    def _check(self, inp: Tensor) -> None:
        """Refuse what some part could not work with, before the first one has worked."""
        features, backbone, _ = listed(self)
        if isinstance(features, ConvBlock):  # what a user put there instead need not tell
            check.image(inp, features.ndim, features.inp_channels)
            if hasattr(backbone, "check_image"):
                batch, _, *size = inp.shape
                backbone.check_image(inp[:1, :1].expand(batch, features.out_channels, *size))


def _backbone(backbone: Any, ndim: int, options: dict[str, Any] | None) -> Any:
    """The backbone, built if it is not yet."""
    if isinstance(backbone, nn.Module):
        if options:
            raise ValueError(f"opt_backbone={options!r} comes too late: the backbone is built")
        net = backbone
    elif isinstance(backbone, str):
        net = check.named("backbone", backbone, BACKBONES)(ndim, **(options or {}))
    elif callable(backbone):
        net = backbone(ndim, **(options or {}))
    else:
        raise TypeError(f"backbone={backbone!r} is neither a name, a Module, nor a Module class")
    for name in ("inp_channels", "out_channels"):
        if not isinstance(getattr(net, name, None), int):
            raise TypeError(f"backbone={type(net).__name__} does not say its {name}")
    return net
