"""Layers with a weight, whose shape is known at once or only from the first input."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from cassetta.core import check


class Weighted(nn.Module):
    """A layer with a weight and perhaps a bias, whose shapes follow from its attributes."""

    inp_channels: int
    out_channels: int
    weight: Tensor
    bias: Tensor | None

    def check_parameters(self) -> None:
        """Normalize and check the attributes that the constructor stored."""
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _allocate(self, bias: bool, **options: Any) -> None:
        self.check_parameters()
        self.weight = nn.Parameter(torch.empty(self._weight_shape(), **options))
        bias_or_none = nn.Parameter(torch.empty(self.out_channels, **options)) if bias else None
        self.register_parameter("bias", bias_or_none)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within 1/sqrt(fan in), as every layer of torch does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.weight)
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)


_LazyModuleMixin: Any = LazyModuleMixin  # typed against a protocol that no torch module meets


class Lazy(_LazyModuleMixin, Weighted):
    """Mixin, before a `Weighted` class: nothing is checked or allocated until the first input.

    `out_channels` may be a number, None (as many as the input has), or a function of the number of
    input channels. The layer then becomes an ordinary one (`cls_to_become`).
    """

    def _allocate(self, bias: bool, **options: Any) -> None:
        self.weight = nn.UninitializedParameter(**options)
        bias_or_none: Any = nn.UninitializedParameter(**options) if bias else None
        self.register_parameter("bias", bias_or_none)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def _meet(self, inp: Tensor) -> None:
        """Read what can be known from the first input."""
        raise NotImplementedError

    def initialize_parameters(self, inp: Tensor, *args: Any, **kwargs: Any) -> None:
        """Check and allocate, knowing the first input."""
        self._meet(inp)
        if callable(self.out_channels):
            self.out_channels = check.whole("out_channels", self.out_channels(self.inp_channels))
        self.check_parameters()
        if self.has_uninitialized_params():
            weight, bias = cast(Any, self.weight), cast(Any, self.bias)
            with torch.no_grad():
                weight.materialize(self._weight_shape())
                if bias is not None:
                    bias.materialize((self.out_channels,))
                self.reset_parameters()
