"""Linear layers over the channels of an image."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from cassetta.core import check
from cassetta.core.typing import DataType, DeviceType
from cassetta.core.utils import to_torch_dtype
from cassetta.layers.weighted import Lazy, Weighted


class Linear(Weighted):
    """`torch.nn.Linear` along any dimension of a tensor; by default over the channels."""

    def __init__(
        self,
        inp_channels: int,
        out_channels: int | None = None,
        bias: bool = True,
        dim: int = 1,
        *,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        inp_channels : int
            Number of input channels.
        out_channels : int, default=`inp_channels`
            Number of output channels.
        bias : bool
            Add a learned bias.
        dim : int
            The dimension that holds the channels.
        """
        super().__init__()
        self.inp_channels = inp_channels
        self.out_channels = out_channels  # type: ignore[assignment]  # checked with the rest
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim={dim!r} ({type(dim).__name__}) is not a whole number")
        self.dim = dim
        self._allocate(check.flag("bias", bias), device=device, dtype=to_torch_dtype(dtype))

    def check_parameters(self) -> None:
        self.inp_channels = check.whole("inp_channels", self.inp_channels)
        if self.out_channels is None:
            self.out_channels = self.inp_channels
        self.out_channels = check.whole("out_channels", self.out_channels)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.inp_channels

    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size), channels along `dim`"""
        check.tensor(inp)
        if not (inp.is_floating_point() or inp.is_complex()):
            raise TypeError(f"inp has dtype {inp.dtype}: convert it to floating point first")
        if not -inp.ndim <= self.dim < inp.ndim or inp.shape[self.dim] != self.inp_channels:
            raise ValueError(
                f"inp has shape {tuple(inp.shape)}, but {self.inp_channels} channels "
                f"are expected along dim={self.dim}"
            )
        return F.linear(inp.movedim(self.dim, -1), self.weight, self.bias).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"{self.inp_channels}, {self.out_channels}, bias={self.bias is not None}"


class LazyLinear(Lazy, Linear):
    """A `Linear` layer that takes the number of its input channels from its first input."""

    cls_to_become = Linear  # type: ignore[assignment]

    def __init__(
        self,
        out_channels: int | Callable[[int], int] | None = None,
        bias: bool = True,
        dim: int = 1,
        *,
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        """
        Parameters
        ----------
        out_channels : int or callable, default=number of input channels
            Number of output channels, or a function of the number of input channels.
        bias : bool
            Add a learned bias.
        dim : int
            The dimension that holds the channels.
        """
        super().__init__(0, out_channels, bias, dim, device=device, dtype=dtype)

    def _meet(self, inp: Tensor) -> None:
        check.tensor(inp)
        if not -inp.ndim <= self.dim < inp.ndim:
            raise ValueError(f"inp has shape {tuple(inp.shape)}, and so no dim={self.dim}")
        self.inp_channels = inp.shape[self.dim]
