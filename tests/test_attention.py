"""Attention layers, against their formulas."""

import pytest
import torch
from torch import nn

from cassetta.layers import (
    BlockAttention,
    ChannelBlockAttention,
    ChannelSqzEx,
    ConvBlock,
    DotProductAttention,
    MultiHeadAttention,
    SpatialBlockAttention,
    SpatialSqzEx,
    SqzEx,
    make_attention,
)

from compare import assert_gradients, assert_near, image

SIZES = {1: (7,), 2: (4, 5), 3: (2, 3, 4)}


@pytest.mark.parametrize("name", ["sqzex", "cbam", "bcam", "dp", "sdp", "mha", True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_by_name_over_voxels(name, ndim):
    layer = make_attention(name, channels=6, ndim=ndim)
    inp = image(2, 6, *SIZES[ndim])
    assert layer.double()(inp).shape == inp.shape
    assert_gradients(layer, inp)
    names = {p for p, _ in layer.named_parameters()}
    out = layer(inp).sum()
    out.backward()
    assert names == {p for p, v in layer.named_parameters() if v.grad is not None}


@pytest.mark.parametrize("name", ["sqzex", "cbam", "dp", "sdp", "mha"])
def test_in_a_block_before_and_after_the_convolution(name):
    for order, channels in (("cndax", 5), ("xcnda", 3)):
        block = ConvBlock(2, 3, 5, attention=name, order=order, norm="batch")
        assert block(torch.randn(2, 3, 6, 6)).shape == (2, 5, 6, 6)
        assert make_attention(name, channels, 2) is not None


def dense_attention(qkv, keys, values, scaled):
    """Softmax over all voxels of the products of queries and keys, times values."""
    q, k, v = qkv.flatten(2).split([keys, keys, values], dim=1)
    products = torch.einsum("bki,bkj->bij", q, k) / (keys**0.5 if scaled else 1)
    out = torch.einsum("bij,bvj->bvi", products.softmax(-1), v)
    return out.reshape(qkv.shape[0], values, *qkv.shape[2:])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_dot_product_attention_equals_its_formula(scaled, ndim):
    layer = DotProductAttention(key_channels=3, val_channels=2, scaled=scaled)
    assert not list(layer.parameters())
    qkv = image(2, 8, *SIZES[ndim])
    assert_near(layer(qkv), dense_attention(qkv, 3, 2, scaled))


def test_multi_head_attention_is_one_attention_per_head():
    layer = MultiHeadAttention(6, key_channels=3, val_channels=2, nb_heads=2).double()
    inp = image(2, 6, 4, 3)
    heads = layer.project(inp).split(8, dim=1)
    expected = layer.combine(torch.cat([dense_attention(h, 3, 2, True) for h in heads], dim=1))
    assert_near(layer(inp), expected)
    assert MultiHeadAttention(8).key_channels == 2


def test_attention_does_not_care_where_a_voxel_is():
    layer = MultiHeadAttention(4).double()
    inp = image(1, 4, 3, 4)
    assert_near(layer(inp.flip(2, 3)), layer(inp).flip(2, 3))


def test_squeeze_and_excitation_equals_its_formula():
    inp = image(2, 32, 4, 5)
    c, s = ChannelSqzEx(32, compression=16).double(), SpatialSqzEx(32).double()
    hidden = torch.relu(inp.mean((2, 3)) @ c[1].weight.T)
    channel = inp * torch.sigmoid(hidden @ c[3].weight.T)[:, :, None, None]
    assert c[1].weight.shape == (2, 32)
    assert_near(c(inp), channel)
    voxel = inp * torch.sigmoid(torch.einsum("bcij,oc->boij", inp, s[0].weight))
    assert_near(s(inp), voxel)
    both = SqzEx(32, "+")
    both.load_state_dict({**{f"0.{k}": v for k, v in s.state_dict().items()},
                          **{f"1.{k}": v for k, v in c.state_dict().items()}})  # fmt: skip
    assert_near(both.double()(inp), channel + voxel)


def test_block_attention_equals_its_formula():
    inp = image(2, 8, 6, 5)
    c, s = ChannelBlockAttention(8, compression=2).double(), SpatialBlockAttention(2).double()
    votes = [
        torch.relu(pooled @ c[2].weight.T) @ c[4].weight.T
        for pooled in (inp.mean((2, 3)), inp.amax((2, 3)))
    ]
    assert_near(c(inp), inp * torch.sigmoid(sum(votes))[:, :, None, None])
    pooled = torch.stack([inp.mean(1), inp.amax(1)], dim=1)
    gate = torch.nn.functional.conv2d(pooled, s[2].weight, padding=3)
    assert_near(s(inp), inp * torch.sigmoid(gate))


@pytest.mark.parametrize("kind", [SqzEx, BlockAttention])
@pytest.mark.parametrize("mode", ["c", "s", "cs", "sc", "+"])
def test_modes(kind, mode):
    where = {"ndim": 2} if kind is BlockAttention else {}
    layer = kind(**where, channels=6, mode=mode).double()
    inp = image(1, 6, 5, 4)
    expected = [module(inp) for module in layer]
    if mode == "+":
        assert_near(layer(inp), sum(expected))
    else:
        step = inp
        for module in layer:
            step = module(step)
        assert_near(layer(inp), step)
    assert len(layer) == len(mode.replace("+", "cs"))


def test_every_form():
    assert make_attention(None, 4) is None
    assert make_attention(False, 4) is None
    shared = nn.Identity()
    assert make_attention(shared, 4) is shared
    assert type(make_attention(SqzEx, 4, 2, compression=2)) is SqzEx
    assert make_attention(MultiHeadAttention, 8, 2, compression=2, nb_heads=2).nb_heads == 2
    assert make_attention(DotProductAttention, 8).project is not None
    assert type(make_attention(lambda: nn.Identity(), 4)) is nn.Identity


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: make_attention("sqz", 4), "attention='sqz'.*'sqzex'"),
        (TypeError, lambda: make_attention(3, 4), "attention=3"),
        (TypeError, lambda: make_attention(int, 4), "made a int"),
        (TypeError, lambda: make_attention("sqzex", 4, 2, heads=2), "heads"),
        (ValueError, lambda: SqzEx(4, mode="x"), "mode='x'.*'cs'"),
        (ValueError, lambda: SqzEx(4, compression=0), "compression=0"),
        (ValueError, lambda: SqzEx(0), "channels=0"),
        (ValueError, lambda: DotProductAttention(), "key_channels=None"),
        (ValueError, lambda: MultiHeadAttention(4, nb_heads=0), "nb_heads=0"),
        (ValueError, lambda: DotProductAttention(2, 3)(torch.ones(1, 8, 4)), r"\(1, 8, 4\).*7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(error, call, message):
    with pytest.raises(error, match=message):
        call()
