"""Interpolation and sampling of images: the functions of torch-interpol as layers.

Spatial dimensions follow the channels everywhere: images (B, C, *size), coordinates (B, ndim,
*size), in voxels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.later import interpol
from cassetta.core.typing import BoundType, InterpolationType, OneOrSeveral

_ORDERS = ["nearest", "linear", "quadratic", "cubic", "fourth", "fifth", "sixth", "seventh"]
_ANCHORS = ["edge", "edges", "center", "centers", "first", "last", "e", "c", "f", "l"]


def _listed(name: str, value: Any, ndim: int) -> list[Any]:
    """One value for all axes, or a list of at most one for each, as a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not 0 < len(values) <= ndim:
        raise ValueError(f"{name}={value!r} has {len(values)} values for {ndim} dimensions")
    return values


def _spline(interpolation: Any, bound: Any, ndim: int = 3) -> tuple[Any, Any]:
    """Refuse unknown orders and boundary conditions."""
    for order in _listed("interpolation", interpolation, ndim):
        name = order.lower() if isinstance(order, str) else order
        check.one_of("interpolation", name, [*_ORDERS, *range(len(_ORDERS))])
    for one in _listed("bound", bound, ndim):
        check.bound("bound", one)
    return interpolation, bound


class _Sampler(nn.Module):
    def __init__(
        self,
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
        extrapolate: bool = False,
        prefilter: bool = False,
    ) -> None:
        """
        Parameters
        ----------
        interpolation : [list of] InterpolationType
            Order of the spline.
        bound : [list of] BoundType
            Boundary condition.
        extrapolate : bool
            Sample beyond the field of view too.
        prefilter : bool
            Turn values into spline coefficients first, so that the spline interpolates them.
        """
        super().__init__()
        self.interpolation, self.bound = _spline(interpolation, bound)
        self.extrapolate = extrapolate
        self.prefilter = prefilter

    def _check(self, inp: Tensor, grid: Tensor, same_size: bool) -> None:
        """An image, and coordinates or displacements of as many dimensions."""
        ndim = check.any_image(inp, "input", labels=True)
        check.image(grid, ndim, ndim, "grid")
        _spline(self.interpolation, self.bound, ndim)
        if inp.shape[0] != grid.shape[0] or (same_size and inp.shape[2:] != grid.shape[2:]):
            raise ValueError(
                f"grid has shape {tuple(grid.shape)}, which does not fit an image of shape "
                f"{tuple(inp.shape)}"
            )

    def _options(self) -> dict[str, Any]:
        names = ("interpolation", "bound", "extrapolate", "prefilter")
        return {name: getattr(self, name) for name in names}


class GridPull(_Sampler):
    """Sample an image at given coordinates."""

    def forward(self, input: Tensor, grid: Tensor) -> Tensor:
        """input (B, C, *size), grid (B, ndim, *out_size) -> (B, C, *out_size)

        An integer image is a label map: every label is sampled, and the strongest wins.
        """
        self._check(input, grid, same_size=False)
        return interpol().grid_pull(input, grid.movedim(1, -1), **self._options())


class FlowPull(GridPull):
    """Sample an image at displaced coordinates."""

    def forward(self, input: Tensor, flow: Tensor) -> Tensor:
        """input (B, C, *size), flow (B, ndim, *out_size) -> (B, C, *out_size)"""
        return super().forward(input, _displaced(flow))


class GridPush(_Sampler):
    """Splat an image onto given coordinates: the adjoint of `GridPull`."""

    def forward(self, input: Tensor, grid: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """input (B, C, *size), grid (B, ndim, *size) -> (B, C, *shape); `shape` defaults to size"""
        self._check(input, grid, same_size=True)
        return interpol().grid_push(input, grid.movedim(1, -1), shape, **self._options())


class FlowPush(GridPush):
    """Splat an image onto displaced coordinates: the adjoint of `FlowPull`."""

    def forward(self, input: Tensor, flow: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """input (B, C, *size), flow (B, ndim, *size) -> (B, C, *shape); `shape` defaults to size"""
        return super().forward(input, _displaced(flow), shape)


def _displaced(flow: Tensor) -> Tensor:
    """Coordinates (B, ndim, *size) of the voxels that a displacement field points to."""
    ndim = check.any_image(flow, "flow")
    check.image(flow, ndim, ndim, "flow")
    return interpol().add_identity_grid(flow.movedim(1, -1)).movedim(-1, 1)


class _Scaler(nn.Module):
    options = ("factor", "shape", "anchor", "interpolation", "bound")

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in self._checked(options, ndim=3).items():
            setattr(self, name, options[name] if name in ("factor", "shape") else value)

    def _arguments(self, ndim: int, changes: dict[str, Any]) -> dict[str, Any]:
        """The options of one call, with one factor and one size per dimension."""
        if unknown := set(changes) - set(self.options):
            raise TypeError(f"{min(unknown)} is no option: use {', '.join(self.options)}")
        options = {name: getattr(self, name) for name in self.options}
        return self._checked({**options, **changes}, ndim)

    def _checked(self, options: dict[str, Any], ndim: int) -> dict[str, Any]:
        """The options, with one factor and one size per dimension."""
        factor, shape, anchor = options["factor"], options["shape"], options["anchor"]
        if factor is None and shape is None:
            raise ValueError("factor=None and shape=None: give one of them")
        for one in _listed("anchor", anchor, ndim):
            check.one_of("anchor", str(one).lower(), _ANCHORS)
            if str(one)[0].lower() in "fl" and factor is None:
                raise ValueError(f"anchor={one!r} needs a factor, even if there is a shape")
        if factor is not None:
            factor = [check.positive("factor", z) for z in _listed("factor", factor, ndim)]
            factor += factor[-1:] * (ndim - len(factor))
        if shape is not None:
            shape = list(check.per_dimension("shape", shape, ndim))
        _spline(options["interpolation"], options["bound"], ndim)
        return {**options, "factor": factor, "shape": shape}

    def extra_repr(self) -> str:
        given = {name: getattr(self, name) for name in self.options}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)


class Resize(_Scaler):
    """Resample an image by a factor, or to a size.

    The numbers are those of torch-interpol. With the default boundary condition, "zero", the
    outermost voxels of an enlarged image mix with the zeros around it: **edges darken**.

    The anchor says which points keep their place:

        edge     the outer edges of the image           (what upsampling by an integer expects)
        center   the centres of the corner voxels       (`align_corners` in torch)
        first    the centre of the first voxel, and the voxel size is exactly divided by `factor`
        last     the centre of the last voxel, likewise
    """

    options = (*_Scaler.options, "extrapolate", "prefilter")

    def __init__(
        self,
        factor: OneOrSeveral[float] | None = None,
        shape: OneOrSeveral[int] | None = None,
        anchor: OneOrSeveral[str] = "edge",
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
        extrapolate: bool = True,
        prefilter: bool = True,
    ) -> None:
        """
        Parameters
        ----------
        factor : [list of] float, optional
            Above 1, the image grows. The new size is rounded down.
        shape : [list of] int, optional
            New size. One of `factor` and `shape` is needed; anchors "first" and "last" need a
            factor in any case.
        anchor : [list of] {"edge", "center", "first", "last"}
            Points that keep their place.
        interpolation : [list of] InterpolationType
            Order of the spline.
        bound : [list of] BoundType
            Boundary condition.
        extrapolate : bool
            Sample beyond the centres of the outermost voxels too.
        prefilter : bool
            Turn values into spline coefficients first, so that the spline interpolates them.
        """
        super().__init__(
            factor=factor, shape=shape, anchor=anchor, interpolation=interpolation, bound=bound,
            extrapolate=extrapolate, prefilter=prefilter,
        )  # fmt: skip

    def forward(self, input: Tensor, **options: Any) -> Tensor:
        """(B, C, *size) -> (B, C, *shape); `options`, such as `shape`, replace the constructor's"""
        ndim = check.any_image(input, "input", labels=True)
        return functional.resize(input, **self._arguments(ndim, options))


class Restrict(_Scaler):
    """Splat an image onto a coarser grid: the adjoint of `Resize`."""

    options = (*_Scaler.options, "reduce_sum")

    def __init__(
        self,
        factor: OneOrSeveral[float] | None = None,
        shape: OneOrSeveral[int] | None = None,
        anchor: OneOrSeveral[str] = "edge",
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
        reduce_sum: bool = False,
    ) -> None:
        """
        Parameters
        ----------
        factor : [list of] float, optional
            Above 1, the image shrinks. The new size is rounded down.
        shape, anchor, interpolation, bound
            As in `Resize`.
        reduce_sum : bool
            Sum what falls into a voxel, instead of averaging it.
        """
        super().__init__(
            factor=factor, shape=shape, anchor=anchor, interpolation=interpolation, bound=bound,
            reduce_sum=reduce_sum,
        )  # fmt: skip

    def forward(self, input: Tensor, **options: Any) -> Tensor:
        """(B, C, *size) -> (B, C, *shape); `options`, such as `shape`, replace the constructor's"""
        ndim = check.any_image(input, "input")
        arguments = self._arguments(ndim, options)
        size = input.shape[2:]
        shape = arguments["shape"] or [
            int(n / f) for n, f in zip(size, arguments["factor"], strict=True)
        ]
        for axis, length in enumerate(shape):
            centred = functional.nth(arguments["anchor"], axis)[0].lower() == "c"
            if length < (2 if centred else 1):
                raise ValueError(
                    f"factor={arguments['factor']} makes {tuple(shape)} voxels of {tuple(size)}: "
                    f"too few for anchor={arguments['anchor']!r}"
                )
        return interpol().restrict(input, **arguments)


class ResizeFlow(Resize):
    """Resample a displacement field, and scale the displacements with the voxels."""

    def __init__(
        self,
        factor: OneOrSeveral[float] | None = None,
        shape: OneOrSeveral[int] | None = None,
        anchor: str = "edge",
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "dft",
        extrapolate: bool = True,
        prefilter: bool = True,
    ) -> None:
        super().__init__(factor, shape, anchor, interpolation, bound, extrapolate, prefilter)

    def forward(self, flow: Tensor, **options: Any) -> Tensor:
        """(B, ndim, *size) -> (B, ndim, *shape), in voxels of each"""
        ndim = check.any_image(flow, "flow")
        check.image(flow, ndim, ndim, "flow")
        arguments = self._arguments(ndim, options)
        resized = functional.resize(flow, **arguments)
        scale = []
        for axis in range(ndim):
            new, old = resized.shape[axis + 2], flow.shape[axis + 2]
            anchor = functional.nth(arguments["anchor"], axis)[0].lower()
            if anchor == "e":
                scale.append(new / old)
            elif anchor == "c":
                scale.append((new - 1) / (old - 1) if old > 1 else 1.0)
            else:
                scale.append(arguments["factor"][axis])
        return resized * resized.new_tensor(scale).reshape(-1, *[1] * ndim)


class ValueToCoeff(nn.Module):
    """Spline coefficients of an image."""

    def __init__(
        self,
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "zero",
    ) -> None:
        super().__init__()
        self.interpolation, self.bound = _spline(interpolation, bound)

    def forward(self, input: Tensor) -> Tensor:
        """values (B, C, *size) -> coefficients (B, C, *size)"""
        check.any_image(input, "input")
        return interpol().spline_coeff_nd(input, self.interpolation, self.bound, dim=input.ndim - 2)


class CoeffToValue(ValueToCoeff):
    """Values of an image of spline coefficients: the inverse of `ValueToCoeff`."""

    def forward(self, input: Tensor) -> Tensor:
        """coefficients (B, C, *size) -> values (B, C, *size)"""
        check.any_image(input, "input")
        grid = interpol().identity_grid(input.shape[2:], dtype=input.dtype, device=input.device)
        return interpol().grid_pull(input, grid, self.interpolation, self.bound, extrapolate=True)


class FlowExp(nn.Module):
    """Exponentiate a stationary velocity field by scaling and squaring.

    Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms" (2006).
    """

    def __init__(
        self,
        nsteps: int = 8,
        interpolation: OneOrSeveral[InterpolationType] = "linear",
        bound: OneOrSeveral[BoundType] = "dft",
        extrapolate: bool = False,
        coeff: bool = False,
    ) -> None:
        """
        Parameters
        ----------
        nsteps : int
            Number of squarings.
        interpolation, bound, extrapolate
            As in `GridPull`.
        coeff : bool
            Input and output hold spline coefficients, not values.
        """
        super().__init__()
        self.nsteps = check.whole("nsteps", nsteps, least=0)
        self.coeff = coeff
        self.to_coeff = ValueToCoeff(interpolation, bound)
        self.to_value = CoeffToValue(interpolation, bound)
        self.compose = FlowPull(interpolation, bound, extrapolate)

    def forward(self, flow: Tensor) -> Tensor:
        """velocity (B, ndim, *size) -> displacement (B, ndim, *size), in voxels"""
        ndim = check.any_image(flow, "flow")
        check.image(flow, ndim, ndim, "flow")
        flow = flow / 2**self.nsteps
        if self.coeff:
            flow = self.to_value(flow)
        for _ in range(self.nsteps):
            flow = flow + self.compose(self.to_coeff(flow), flow)
        return self.to_coeff(flow) if self.coeff else flow
