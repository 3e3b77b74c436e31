"""Dropout of whole channels, in any number of dimensions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cassetta.core.typing import DropoutType
from cassetta.core.utils import build


def make_dropout(dropout: DropoutType, **kwargs: Any) -> nn.Module | None:
    """Make a dropout layer.

    Parameters
    ----------
    dropout : float, int, Module, type, callable or None
        - the probability, between 0 and 1, that a channel is dropped;
        - a module, returned as it is, so that several layers share it;
        - a `Module` class, or a function that returns a module, called with `kwargs`;
        - None (or False, or 0): no dropout.
    **kwargs
        Options of the constructor.

    Raises
    ------
    ValueError, TypeError
        If the probability is out of range, a module is given options, or none is made.
    """
    if dropout is None or dropout is False:
        return None
    if dropout is True:
        raise TypeError("dropout=True says not how much: give a probability between 0 and 1")
    if isinstance(dropout, (float, int, np.number)):
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} is not a probability between 0 and 1")
        return ChannelDropout(float(dropout), **kwargs) if dropout else None
    return build("dropout", dropout, "a probability", offered={}, **kwargs)


class ChannelDropout(_DropoutNd):
    """Zero each channel of each sample with probability `p`, and scale the others by 1/(1-p).

    Tompson et al., "Efficient Object Localization Using Convolutional Networks" (2015)
    [arXiv:1411.4280].
    """

    def forward(self, inp: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)"""
        dropout = torch.feature_dropout_ if self.inplace else torch.feature_dropout
        return dropout(inp, self.p, self.training)
