"""Normalization layers against `torch.nn`, in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from cassetta.layers import BatchNorm, InstanceNorm, LayerNorm, make_norm

from compare import assert_gradients, assert_near, image, named

SIZES = {1: (11,), 2: (5, 6), 3: (3, 4, 5)}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_equals_torch(ndim, momentum):
    ours, theirs = BatchNorm(4, momentum=momentum), BATCH[ndim](4, momentum=momentum)
    ours.double(), theirs.double()
    for _ in range(3):
        inp = image(2, 4, *SIZES[ndim])
        assert_near(ours(inp), theirs(inp))
    for name, buffer in theirs.named_buffers():
        assert_near(dict(ours.named_buffers())[name], buffer)
    assert_near(ours.eval()(inp), theirs.eval()(inp))
    assert_gradients(ours.train(), inp)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
def test_instance_norm_equals_torch(ndim, affine, track):
    options = {"affine": affine, "track_running_stats": track}
    ours, theirs = InstanceNorm(4, **options).double(), INSTANCE[ndim](4, **options).double()
    inp = image(2, 4, *SIZES[ndim])
    assert_near(ours(inp), theirs(inp))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_near(ours.eval()(inp), theirs.eval()(inp))


def test_layer_norm_is_one_group_per_channel():
    """Upstream's numbers, on which checkpoints depend: it equals an affine instance norm."""
    ours, instance = LayerNorm(4).double(), nn.InstanceNorm2d(4, affine=True).double()
    with torch.no_grad():
        for p, q in zip(ours.parameters(), instance.parameters(), strict=True):
            p.copy_(torch.randn(4))
            q.copy_(p)
    inp = image(2, 4, 5, 6)
    assert_near(ours(inp), instance(inp))
    assert "one group per channel" in LayerNorm.__doc__


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", BatchNorm),
        (True, BatchNorm),
        ("BatchNorm", BatchNorm),
        ("batch_norm3d", BatchNorm),
        ("instance", InstanceNorm),
        ("InstanceNorm2d", InstanceNorm),
        ("layer", LayerNorm),
        (BatchNorm, BatchNorm),
        (nn.BatchNorm2d, nn.BatchNorm2d),
        (2, nn.GroupNorm),
        (np.int64(2), nn.GroupNorm),
        (lambda channels: nn.GroupNorm(2, channels), nn.GroupNorm),
        (partial(nn.GroupNorm, 2), nn.GroupNorm),
        (partial(InstanceNorm, affine=False), InstanceNorm),
    ],
    ids=named,
)
def test_every_form(norm, kind):
    layer = make_norm(norm, 4)
    assert type(layer) is kind
    assert layer(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


@pytest.mark.parametrize("norm", [None, False, 0, ""])
def test_no_norm(norm):
    assert make_norm(norm, 4) is None


def test_an_instance_is_shared_and_affine_is_passed_on():
    layer = BatchNorm(4)
    assert make_norm(layer, 4) is layer
    assert make_norm("instance", 4).affine
    assert not make_norm("instance", 4, affine=False).affine
    assert not make_norm(partial(InstanceNorm, affine=False), 4).affine
    assert make_norm("batch", 4, eps=1e-3).eps == 1e-3


@pytest.mark.parametrize(
    ("error", "norm", "message"),
    [
        (ValueError, "bach", "norm='bach'.*'batch'"),
        (ValueError, 3, "norm=3 groups.*4 channels"),
        (ValueError, -1, "norm=-1"),
        (TypeError, 2.5, "norm=2.5"),
        (TypeError, nn.GroupNorm, "norm=.*GroupNorm.*cannot be called"),
        (TypeError, lambda channels: None, "made a NoneType"),
    ],
    ids=named,
)
def test_bad_norms(error, norm, message):
    with pytest.raises(error, match=message):
        make_norm(norm, 4)


@pytest.mark.parametrize("kind", [BatchNorm, InstanceNorm])
def test_bad_input(kind):
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 5\).*\(batch, 4, \*size\)"):
        kind(4)(torch.ones(2, 3, 5, 5))


@pytest.mark.parametrize("dtype", ["float64", torch.float64, np.float64, np.dtype("float64")])
def test_dtype_in_every_form(dtype):
    assert BatchNorm(4, dtype=dtype).weight.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype='flat'"):
        BatchNorm(4, dtype="flat")
