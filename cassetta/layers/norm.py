"""Normalization layers that do not care how many spatial dimensions there are."""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from cassetta.core import check
from cassetta.core.typing import DataType, DeviceType, NormType
from cassetta.core.utils import build, to_torch_dtype


def make_norm(
    norm: NormType, channels: int, affine: bool = True, **kwargs: Any
) -> nn.Module | None:
    """Make a normalization layer.

    Parameters
    ----------
    norm : str, int, Module, type, callable or None
        - `"batch"` (or True), `"instance"`, `"layer"`, also written as `"BatchNorm"` or
          `"instance_norm3d"`. `"layer"` normalizes each channel on its own: see `LayerNorm`;
        - the number of groups of a `torch.nn.GroupNorm`;
        - a module, returned as it is, so that several layers share it;
        - a `Module` class, or a function that returns a module, called with `channels` and,
          where it takes them, `affine` and `kwargs`;
        - None (or False, or 0): no normalization.
    channels : int
        Number of channels of the image to normalize.
    affine : bool
        Learn a scale and a shift per channel.
    **kwargs
        Options of the constructor, such as `eps` or `momentum`.

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, the groups do not divide the channels, or no module is made.
    """
    channels = check.whole("channels", channels)
    if norm is None or norm is False or (isinstance(norm, (int, str)) and not norm):
        return None
    if norm is True:
        norm = "batch"
    if isinstance(norm, str):
        norm = check.named("norm", norm, _BY_NAME, _without_suffix)
    elif not callable(norm):
        groups = check.whole("norm", norm)
        if channels % groups:
            raise ValueError(f"norm={groups} groups do not divide {channels} channels evenly")
        return nn.GroupNorm(groups, channels, affine=affine, **kwargs)
    offered = {"affine": affine}
    return build("norm", norm, "a name, a number of groups", channels, offered=offered, **kwargs)


class BatchNorm(_BatchNorm):
    """Normalize each channel over all samples and voxels [arXiv:1502.03167].

    Same parameters, buffers and numbers as `torch.nn.BatchNorm{1,2,3}d`.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        channels : int
            Number of channels.
        eps : float
            Added to the variance.
        momentum : float or None
            Weight of the newest statistics in the running ones. None: all weigh the same.
        affine : bool
            Learn a scale and a shift per channel.
        track_running_stats : bool
            Keep running statistics for evaluation. If not, those of the batch are always used.
        """
        super().__init__(
            check.whole("channels", channels), eps, momentum, affine, track_running_stats,
            device=device, dtype=to_torch_dtype(dtype),
        )  # fmt: skip

    def _check_input_dim(self, input: Tensor) -> None:
        _check_channels(self, input, self.num_features)


class InstanceNorm(_InstanceNorm):
    """Normalize each channel of each sample over its voxels [arXiv:1607.08022].

    Same parameters, buffers and numbers as `torch.nn.InstanceNorm{1,2,3}d`; by name
    (`norm="instance"`) it is made with `affine=True`.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        channels : int
            Number of channels.
        eps : float
            Added to the variance.
        momentum : float
            Weight of the newest statistics in the running ones.
        affine : bool
            Learn a scale and a shift per channel.
        track_running_stats : bool
            Keep running statistics for evaluation. If not, those of the image are always used.
        """
        super().__init__(
            check.whole("channels", channels), eps, momentum, affine, track_running_stats,
            device=device, dtype=to_torch_dtype(dtype),
        )  # fmt: skip

    def _check_input_dim(self, input: Tensor) -> None:
        _check_channels(self, input, self.num_features)

    def forward(self, inp: Tensor) -> Tensor:
        """(B, channels, *size) -> (B, channels, *size)"""
        self._check_input_dim(inp)
        return F.instance_norm(  # (torch 2.8 does not export `_apply_instance_norm`)
            inp, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum or 0.0, self.eps,
        )  # fmt: skip


class LayerNorm(nn.GroupNorm):
    """Group normalization [arXiv:1803.08494] with one group per channel.

    This is upstream's `norm="layer"`, whose checkpoints depend on it: it equals an affine instance
    norm, **not** the layer norm of Ba et al. [arXiv:1607.06450]. For that one, which normalizes all
    channels of a sample together, ask for a single group: `norm=1`.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        channels : int
            Number of channels, and of groups.
        eps : float
            Added to the variance.
        affine : bool
            Learn a scale and a shift per channel.
        """
        channels = check.whole("channels", channels)
        super().__init__(
            channels, channels, eps, affine, device=device, dtype=to_torch_dtype(dtype)
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, *size) -> (B, channels, *size)"""
        _check_channels(self, input, self.num_channels)
        return super().forward(input)


def check_statistics(module: nn.Module, batch: int, size: Sequence[int], where: str) -> None:
    """Refuse an image of which some norm in a module would compute statistics of one value.

    torch refuses it too, but only once the norms before that one have updated their statistics.
    """
    voxels = math.prod(size)
    if voxels > 1:
        return
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            own = norm.training or norm.running_mean is None
            values = batch * voxels if own and process_group(norm) is None else 2
        elif isinstance(norm, _InstanceNorm):
            values = voxels if norm.training or not norm.track_running_stats else 2
        elif isinstance(norm, nn.GroupNorm):
            values = batch * voxels * (norm.num_channels // norm.num_groups)
        else:
            continue
        if values == 1:
            raise ValueError(
                f"inp has size {tuple(size)} {where}, where a {type(norm).__name__} would have one "
                "value to normalize: use larger images, larger batches or fewer levels"
            )


def process_group(norm: nn.Module | None) -> Any:
    """The group whose processes share the statistics; None if the process is alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _without_suffix(name: str) -> str:
    """ "batch" for "BatchNorm3d" and the like."""
    return re.sub(r"_?norm(_?[123]d)?$", "", name.lower())


def _check_channels(layer: nn.Module, inp: Tensor, channels: int) -> None:
    check.tensor(inp)
    if not inp.is_floating_point():
        raise TypeError(f"inp has dtype {inp.dtype}: convert it to floating point first")
    if inp.ndim < 2 or inp.shape[1] != channels:
        raise ValueError(
            f"inp has shape {tuple(inp.shape)}, but {type(layer).__name__} "
            f"normalizes (batch, {channels}, *size)"
        )


_BY_NAME: dict[str, type[nn.Module]] = {
    "batch": BatchNorm,
    "instance": InstanceNorm,
    "layer": LayerNorm,
}
