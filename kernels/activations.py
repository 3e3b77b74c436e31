"""Each activation and its derivative, in plain PyTorch, by name. `tile` states them in Triton.

`p` and `q` are the constants of the activation, `slope` is what PReLU learns:

    leaky_relu  p = negative slope      elu       p = alpha
    softplus    p = beta, q = threshold, above which it is the identity
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cassetta.kernels.types import Activation

NAMES = (
    "identity", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "mish", "tanh",
    "sigmoid", "softplus", "hardswish", "prelu",
)  # fmt: skip

BY_RESULT = {
    "relu": "relu", "leaky_relu": "leaky_relu", "elu": "elu_by_result", "tanh": "tanh_by_result",
    "sigmoid": "sigmoid_by_result",
}  # fmt: skip
"""Those whose derivative at u can be told from act(u), and its name as a function of that."""


def told_by_result(activation: Activation) -> bool:
    """Whether act(u) tells act'(u); of a negative slope or alpha it does not."""
    return activation.name in BY_RESULT and activation.p >= 0


def apply(u: Tensor, activation: Activation, slope: Tensor | None = None) -> Tensor:
    """act(u), for any shape; `slope` must broadcast."""
    name, p, q = activation
    if name == "identity":
        return u
    if name == "prelu":
        assert slope is not None
        return torch.where(u > 0, u, slope * u)
    if name == "leaky_relu":
        return F.leaky_relu(u, p)
    if name == "elu":
        return F.elu(u, p)
    if name == "softplus":
        return F.softplus(u, p, q)
    if name == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    plain = {
        "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish, "tanh": torch.tanh,
        "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
    }  # fmt: skip
    return plain[name](u)


def apply_(u: Tensor, activation: Activation) -> Tensor:
    """act(u) in the place of u, of an activation that is told by its result."""
    name, p, _ = activation
    if name == "leaky_relu":
        return F.leaky_relu_(u, p)
    if name == "elu":
        return F.elu_(u, p)
    plain = {"relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_}
    return plain[name](u)


def derivative(u: Tensor, activation: Activation, slope: Tensor | None = None) -> Tensor:
    """act'(u), for any shape; where there is none (ReLU at 0), what torch takes.

    For a name of `BY_RESULT` u is act(u).
    """
    name, p, q = activation
    one = torch.ones_like(u)
    if name == "identity":
        return one
    if name == "relu":
        return torch.where(u <= 0, 0 * one, one)
    if name == "prelu":
        assert slope is not None
        return torch.where(u > 0, one, slope * one)
    if name == "leaky_relu":
        return torch.where(u > 0, one, p * one)
    if name == "elu":
        return torch.where(u > 0, one, p * u.clamp(max=0).exp())
    if name == "softplus":
        return torch.where(u * p > q, one, torch.sigmoid(u * p))
    if name == "hardswish":
        return torch.where(u <= -3, 0 * one, torch.where(u < 3, u / 3 + 0.5, one))
    if name == "tanh":
        return 1 - torch.tanh(u).square()
    if name == "elu_by_result":
        return torch.where(u > 0, one, u + p)
    if name == "tanh_by_result":
        return 1 - u.square()
    if name == "sigmoid_by_result":
        return u * (1 - u)
    sigmoid = torch.sigmoid(u)
    if name == "sigmoid":
        return sigmoid * (1 - sigmoid)
    if name == "silu":
        return sigmoid * (1 + u * (1 - sigmoid))
    if name == "mish":
        t = torch.tanh(F.softplus(u))
        return t + u * sigmoid * (1 - t.square())
    if name == "gelu":
        density = torch.exp(-0.5 * u.square()) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(u * 0.7071067811865476)) + u * density
    k, cube = 0.7978845608028654, 0.044715  # gelu_tanh
    t = torch.tanh(k * (u + cube * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t.square()) * k * (1 + 3 * cube * u.square())
