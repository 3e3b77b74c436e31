"""What all convolutions share: their parameters, checked, and the geometry these amount to."""

from typing import Any, ClassVar, Literal

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import BoundType, DataType, DeviceType, OneOrSeveral
from cassetta.core.utils import to_torch_dtype
from cassetta.kernels.types import Geometry
from cassetta.layers.weighted import Weighted

PaddingType = Literal["same", "valid"] | OneOrSeveral[int]


class ConvBase(Weighted):
    """A convolution, transposed or not; see `Conv` for its parameters."""

    ndim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any  # "same", "valid" or one number per dimension
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: BoundType
    transposed: ClassVar[bool]

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None = None,
        kernel_size: OneOrSeveral[int] = 3,
        stride: OneOrSeveral[int] = 1,
        padding: PaddingType = 0,
        dilation: OneOrSeveral[int] = 1,
        output_padding: OneOrSeveral[int] = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: BoundType = "zeros",
        device: DeviceType | None = None,
        dtype: DataType | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            "ndim": ndim, "inp_channels": inp_channels, "out_channels": out_channels,
            "kernel_size": kernel_size, "stride": stride, "padding": padding,
            "dilation": dilation, "output_padding": output_padding, "groups": groups,
            "padding_mode": padding_mode,
        }  # fmt: skip
        for name, value in given.items():
            setattr(self, name, value)
        self._allocate(check.flag("bias", bias), device=device, dtype=to_torch_dtype(dtype))

    def check_parameters(self) -> None:
        ndim = self.ndim = check.dimensions(self.ndim)
        self.inp_channels = check.whole("inp_channels", self.inp_channels)
        if self.out_channels is None:
            self.out_channels = self.inp_channels
        self.out_channels = check.whole("out_channels", self.out_channels)
        self.groups = check.whole("groups", self.groups)
        for name in ("inp_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"groups={self.groups} does not divide {name}={getattr(self, name)}"
                )
        self.kernel_size = check.per_dimension("kernel_size", self.kernel_size, ndim)
        self.stride = check.per_dimension("stride", self.stride, ndim)
        self.dilation = check.per_dimension("dilation", self.dilation, ndim)
        self.output_padding = check.per_dimension("output_padding", self.output_padding, ndim, 0)
        if isinstance(self.padding, str):
            check.one_of("padding", self.padding, ["same", "valid"])
            if self.padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError(f"padding='same' is impossible with stride={self.stride}")
        else:
            self.padding = check.per_dimension("padding", self.padding, ndim, 0)
        check.bound("padding_mode", self.padding_mode)

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups, as the kernels take them."""
        if self.padding == "same":
            padding = functional.same_padding(self.kernel_size, self.dilation)
        elif self.padding == "valid":
            padding = ((0, 0),) * self.ndim
        else:
            padding = tuple((p, p) for p in self.padding)
        return Geometry(self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{self.inp_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        plain = {"padding": 0, "dilation": 1, "output_padding": 0}
        for name, usual in plain.items():
            if getattr(self, name) != (usual,) * self.ndim:
                text += f", {name}={getattr(self, name)}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text
