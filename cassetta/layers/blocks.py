"""Convolutions with their norm, dropout, activation and attention, and groups of them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

from cassetta import functional
from cassetta.core import check
from cassetta.core.typing import (
    ActivationType,
    AttentionType,
    DropoutType,
    NormType,
    OneOrSeveral,
    SeparableType,
)
from cassetta.functional import Deferred, Product, defer, materialize
from cassetta.layers import fusing
from cassetta.layers.activations import make_activation
from cassetta.layers.attention import make_attention
from cassetta.layers.conv import make_conv
from cassetta.layers.decisions import recalled
from cassetta.layers.dropout import make_dropout
from cassetta.layers.norm import make_norm
from cassetta.layers.repeated import repeated
from cassetta.layers.simple import ModuleGroup, Stack

LAYERS = {"n": "norm", "c": "conv", "d": "dropout", "a": "activation", "x": "attention"}


@fusing.fuses
class ConvBlock(Stack):
    """One convolution with its norm, dropout, activation and attention, in any order.

    The word `order` says which comes when: n norm, c convolution, d dropout, a activation,
    x attention. Letters that are left out are appended, in the sequence n, c, d, a, x. The layers
    are the attributes `norm`, `conv`, `dropout`, `activation` and `attention`, None where there is
    none. The size of the image is preserved (`padding="same"`).
    """

    conv: nn.Module
    norm: nn.Module | None
    dropout: nn.Module | None
    activation: nn.Module | None
    attention: nn.Module | None

    def __init__(
        self,
        ndim: int,
        inp_channels: int,
        out_channels: int | None,
        kernel_size: OneOrSeveral[int] = 3,
        dilation: OneOrSeveral[int] = 1,
        bias: bool = True,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        compression: int = 16,
        order: str = "ncdax",
        separable: SeparableType = False,
        optc: dict[str, Any] | None = None,
        optn: dict[str, Any] | None = None,
        optd: dict[str, Any] | None = None,
        opta: dict[str, Any] | None = None,
        optx: dict[str, Any] | None = None,
    ) -> None:
        """
        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        inp_channels, out_channels : int
            Number of input and output channels.
        kernel_size, dilation, bias
            See `Conv`.
        activation : ActivationType
            See `make_activation`.
        norm : NormType
            See `make_norm`.
        dropout : DropoutType
            See `make_dropout`.
        attention : AttentionType
            See `make_attention`.
        compression : int
            Number of channels per channel of the bottleneck of the attention.
        order : str
            Word over the letters "ncdax", each at most once, in any case.
        separable : bool or {"crosshair", "cross"}
            See `make_conv`.
        optc, optn, optd, opta, optx : dict
            Further options of the convolution, norm, dropout, activation and attention.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above, or an option contradicts an argument.
        """
        super().__init__()
        self.order = _full_order(order)
        bias = check.flag("bias", bias)
        self.ndim = check.dimensions(ndim)
        self.inp_channels = check.whole("inp_channels", inp_channels)
        out = inp_channels if out_channels is None else out_channels
        self.out_channels = check.whole("out_channels", out)
        own = {"kernel_size": kernel_size, "dilation": dilation, "bias": bias,
               "separable": separable, "padding": "same"}  # fmt: skip
        convolution = _and("optc", optc, own)
        attend = _and("optx", optx, {"compression": compression})

        def channels(letter: str) -> int:
            before = self.order.index(letter) < self.order.index("c")
            return self.inp_channels if before else self.out_channels

        layers = {
            "c": make_conv(ndim, self.inp_channels, self.out_channels, **convolution),
            "n": make_norm(norm, channels("n"), **check.options("optn", optn)),
            "d": make_dropout(dropout, **check.options("optd", optd)),
            "a": make_activation(activation, **check.options("opta", opta)),
            "x": make_attention(attention, channels("x"), ndim, **attend),
        }
        for letter in self.order:
            setattr(self, LAYERS[letter], layers[letter])

    @repeated
    def forward(self, inp: Tensor) -> Tensor:
        """(B, inp_channels, *size) -> (B, out_channels, *size)"""
        return materialize(self.defer(defer(inp)))

    def defer(self, x: Deferred) -> Deferred:
        """`forward` of what x stands for, which need not be computed on the way."""
        for step in self.deferred_steps(x):
            x = step(x)
        return x

    def deferred_steps(self, x: Deferred) -> fusing.Steps:
        """Return what `defer` does to x, step by step."""
        return recalled(self, x, self._steps)

    def _steps(self, x: Deferred) -> fusing.Steps:
        check.image(x.image, self.ndim, self.inp_channels)
        layers: dict[str, Any] = {
            letter: getattr(self, LAYERS[letter], None) for letter in self.order
        }
        engine = fusing.choose(self, layers, x).engine
        if engine == "reference":
            block = ref(self)
            return [lambda x: block()._plain(x)]  # type: ignore[union-attr]
        present = [(letter, layer) for letter, layer in layers.items() if layer is not None]
        return [
            self._convolution(engine, layers["n"] is None) if letter == "c"
            else fusing.step(letter, layer) for letter, layer in present
        ]  # fmt: skip

    def _convolution(self, engine: str, by_result: bool) -> Callable[[Deferred], Deferred]:
        """Return the convolution as a step, computed by an engine."""
        conv: Any = self.conv
        product = Product(engine, conv.geometry)
        block = ref(self)
        return lambda x: functional.convolved(
            x, product, conv.weight, conv.bias, by_result, block()
        )

    def _plain(self, x: Deferred) -> Deferred:
        out = materialize(x)
        for layer in self.in_order():
            out = layer(out)
        return Deferred(out)

    def in_order(self) -> Iterator[nn.Module]:
        """The layers that there are, in the order of the word; then what was appended since.

        By name: a layer may have been taken out, put in or exchanged after the block was built.
        """
        names = [LAYERS[letter] for letter in self.order]
        others = [name for name in self._modules if name not in names]
        for name in names + others:
            layer = getattr(self, name, None)
            if layer is not None:
                yield layer


def _and(name: str, options: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
    """The options and the block's own arguments, which the options must not contradict."""
    chosen = check.options(name, options)
    for key, value in own.items():
        if key in chosen and repr(chosen[key]) != repr(value):
            raise ValueError(f"{name}={options!r} contradicts the block, whose {key} is {value!r}")
    return {**chosen, **own}


def _full_order(order: str) -> str:
    """`order` in lower case, with the letters that it leaves out."""
    if not isinstance(order, str):
        raise TypeError(f"order={order!r} is not a word over the letters 'ncdax'")
    word = order.lower()
    if len(set(word)) < len(word) or not set(word) <= set("ncdax"):
        raise ValueError(f"order={order!r} must hold letters of 'ncdax', each at most once")
    return word + "".join(letter for letter in "ncdax" if letter not in word)


class ConvGroup(ModuleGroup):
    """`ConvBlock`s one after the other, perhaps with residual connections or shared weights.

    They preserve the number of channels, except that the first one may take `skip` more.
    """

    def __init__(
        self,
        ndim: int,
        channels: int,
        nb_conv: int = 1,
        recurrent: bool = False,
        residual: bool = False,
        kernel_size: OneOrSeveral[int] = 3,
        dilation: OneOrSeveral[int] = 1,
        bias: bool = True,
        activation: ActivationType = "ReLU",
        norm: NormType = None,
        dropout: DropoutType = None,
        attention: AttentionType = None,
        compression: int = 16,
        order: str = "ncdax",
        separable: SeparableType = False,
        skip: int = 0,
    ) -> None:
        """
        What is not listed is a parameter of `ConvBlock`.

        Parameters
        ----------
        ndim : {1, 2, 3}
            Number of spatial dimensions.
        channels : int
            Number of input (without `skip`) and output channels.
        nb_conv : int
            Number of blocks.
        recurrent : bool
            All blocks share the weights of one (the first has its own if it takes `skip` more).
        residual : bool
            Add the input of each block to its output (without the last `skip` channels).
        skip : int
            Number of additional channels in the input. If negative, of missing ones; then there
            can be no residual connections.
        """
        channels = check.whole("channels", channels)
        nb_conv = check.whole("nb_conv", nb_conv)
        residual, recurrent = check.flag("residual", residual), check.flag("recurrent", recurrent)
        skip = check.whole("skip", skip, least=1 - channels)
        if residual and skip < 0:
            raise ValueError(f"residual=True is impossible with skip={skip} missing channels")
        block = partial(
            ConvBlock, ndim, out_channels=channels, kernel_size=kernel_size, dilation=dilation,
            bias=bias, activation=activation, norm=norm, dropout=dropout, attention=attention,
            compression=compression, order=order, separable=separable,
        )  # fmt: skip
        first = [block(channels + skip)] if skip else []
        nb_same = nb_conv - len(first)
        if recurrent and nb_same:
            others = [block(channels)] * nb_same
        else:
            others = [block(channels) for _ in range(nb_same)]
        super().__init__(first + others, residual=residual, skip=skip)
