"""Activation functions, by name, class, instance or factory."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation as torch_activations

from cassetta.core import check
from cassetta.core.typing import ActivationType
from cassetta.core.utils import build
from cassetta.kernels.types import Activation


def make_activation(activation: ActivationType, **kwargs: Any) -> nn.Module | None:
    """Make an activation layer.

    Parameters
    ----------
    activation : str, Module, type, callable or None
        - the name, in any case, of an activation of `torch.nn`, `"SymExp"` or `"SymLog"`;
        - a module, returned as it is, so that several layers share it;
        - a `Module` class, or a function that returns a module, called with `kwargs`;
        - None (or False, or an empty name): no activation.
    **kwargs
        Options of the constructor. `Softmax` and its kin act on channels unless `dim` is given.

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, a module is given options, or what is made is not a module.
    """
    if activation is None or activation is False or activation == "":
        return None
    if isinstance(activation, str):
        activation = check.named("activation", activation, _BY_NAME)
    offered = {"dim": 1} if activation in _OVER_CHANNELS else {}
    return build("activation", activation, "a name", offered=offered, **kwargs)


class SymExp(nn.Module):
    """Symmetric exponential: sign(x) (exp|x| - 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().expm1()


class SymLog(nn.Module):
    """Symmetric logarithm: sign(x) log(1 + |x|)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().log1p()


_OVER_CHANNELS = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU)
_BY_NAME: dict[str, type[nn.Module]] = {
    **{
        name: getattr(nn, name)
        for name in torch_activations.__all__
        if name != "MultiheadAttention"
    },
    "Identity": nn.Identity,
    "SymExp": SymExp,
    "SymLog": SymLog,
}


def activation_of(module: nn.Module) -> Activation | None:
    """What the kernels call an activation; None if they have none such."""
    kind = type(module)
    if kind in _PLAIN:
        return Activation(_PLAIN[kind])
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Activation("elu", float(module.alpha))
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        return Activation("softplus", float(module.beta), float(module.threshold))
    return None


_PLAIN: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.Mish: "mish", nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid", nn.Hardswish: "hardswish", nn.PReLU: "prelu",
}  # fmt: skip
