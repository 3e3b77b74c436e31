"""What is replayed is what the general path does: to the bit, and launch by launch."""

import contextlib
import copy
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from cassetta.backbones import ATrousNet, MeshNet, UNet
from cassetta.kernels import dispatch, plans, records
from cassetta.layers import ConvBlock, ConvGroup, fusing
from cassetta.recording import recordings, replay, tape

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
GPU = torch.cuda.is_available()  # whose libraries may add up in another order each time


@contextlib.contextmanager
def general():
    """Nothing is recorded or replayed in a `with` block, nor is any decision recalled."""
    recordings._enabled = False
    try:
        with fusing.listening(training=True):
            yield
    finally:
        recordings._enabled = True


def replays():
    return [found for found in recordings._known.values() if callable(found)]


TILES = plans.Plan(1024, 4), plans.GemmPlan(64, 16, 16), plans.WgradPlan(64, 48, 64)
"""As small as these images: the interpreter computes all of a tile."""


def step(net, image, dtype=None):
    """Output, gradients and buffers; from the same random state each time."""
    with plans.use_plan(*TILES):
        return _step(net, image, dtype)


def _step(net, image, dtype):
    net.zero_grad()
    torch.manual_seed(1)
    asks = image.requires_grad or any(p.requires_grad for p in net.parameters())
    kind = image.device.type
    with torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
        out = net(image)
    found = [out.detach().clone()]
    if asks and out.requires_grad:
        torch.manual_seed(2)
        inputs = [one for one in (image, *net.parameters()) if one.requires_grad]
        cotangent = torch.randn(out.shape).to(out)
        grads = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
        found += [one for one in grads if one is not None]
    return found + [one.clone() for one in net.buffers()]


def assert_same(found, expected):
    """Assert equal tensors: to the bit, or on a GPU to what a library's other order makes."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        scale = GPU * 1e-4 * (other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(one, other, rtol=0, atol=scale, equal_nan=True)


NETS = {  # in one dimension, for the interpreter takes its time for each tap
    "instance": lambda: (ConvBlock(2, 4, 6, norm="instance", order="cndax"), (2, 4, 6, 7)),
    "pre-activation": lambda: (
        ConvGroup(1, 6, nb_conv=2, norm="batch", order="nacdx", residual=True), (2, 6, 15),
    ),
    "PReLU": lambda: (
        ConvGroup(1, 5, nb_conv=2, norm=5, order="cdnax", activation="PReLU", dropout=0.3),
        (2, 5, 16),
    ),
    "no norm": lambda: (ConvGroup(1, 5, nb_conv=2, activation="ELU"), (2, 5, 40)),
    "attention": lambda: (
        ConvGroup(1, 8, nb_conv=2, norm="layer", attention="sqzex", order="cndax"), (2, 8, 12),
    ),
    "unet": lambda: (UNet(1, 4, nb_levels=2, norm="batch", dropout=0.2), (2, 4, 17)),
    "unet, pooled": lambda: (
        UNet(1, 4, nb_levels=2, norm="instance", pool_mode="pool", unpool_mode="conv", skip="+"),
        (2, 4, 16),
    ),
    "meshnet": lambda: (MeshNet(1, 5, nb_layers=3, residual=True), (1, 5, 30)),
    "atrous": lambda: (ATrousNet(1, 4, nb_levels=2), (2, 4, 19)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "train"),
    [*((name, True) for name in NETS), *((name, False) for name in ("no norm", "unet", "atrous"))],
)
def test_a_replay_gives_the_same_bits(name, train, kernels, engine):
    """Of other images each time, with other weights; also under another dtype meanwhile."""
    torch.manual_seed(0)
    net, shape = NETS[name]()
    net = net.to(kernels).train(train)
    twin = copy.deepcopy(net)
    for _ in range(5):  # by the general path, traced and recorded, by a program, by its replays
        image = torch.randn(shape, device=kernels, requires_grad=train)
        with contextlib.nullcontext() if train else torch.no_grad():
            found = step(net, image)
            with general():
                expected = step(twin, image)
        assert_same(found, expected)
        with torch.no_grad():
            for one, other in zip(net.parameters(), twin.parameters(), strict=True):
                one.add_(0.01)
                other.add_(0.01)
    assert bool(replays()) != (name == "no norm" and engine == "library")  # torch's own nodes
    assert records.here.tape is None


def exchanged(net):
    """Each parameter is another one, of the same values but for the sign."""
    for module in net.modules():
        for name, one in [*module._parameters.items()]:
            if one is not None:
                setattr(module, name, nn.Parameter(-one.detach().clone()))


def swapped(net):
    for one in net.parameters():
        one.data = one.data.flip(0).contiguous()


def flipped(net):
    some = [*net.parameters()][::2]
    for one in some:
        one.requires_grad_(not one.requires_grad)


def another_eps(net):
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps *= 3


def activated(net):
    for block in net:
        block.activation = nn.Hardswish()


def without_bias(net):
    for block in net:
        block.conv.bias = None


def hooked(net):
    next(m for m in net.modules() if isinstance(m, ConvBlock)).conv.register_forward_hook(
        lambda module, inputs, out: out * 2
    )


CHANGES = {
    "parameters are exchanged": exchanged,
    "data is swapped": swapped,
    "requires_grad is flipped": flipped,
    "eps": another_eps,
    "a hook": hooked,
    "another activation": activated,
    "a layer is appended": lambda net: net[0].append(nn.Tanh()),
    "no bias": without_bias,
    "mode": lambda net: net.train(not net.training),
    "weights in another layout": lambda net: [
        setattr(p, "data", last(p.data)) for p in net.parameters() if p.ndim == 3
    ],
}


def last(image):
    return image.movedim(1, -1).contiguous().movedim(-1, 1)


def inside(image):
    """The same values, in another place of a larger storage."""
    n, c, *size = image.shape
    return image.new_zeros(n, c + 1, *size)[:, 1:].copy_(image)


def expanded(image):
    return image[:1].expand(image.shape)


IMAGES = [lambda x: x, last, inside, expanded, lambda x: x[..., :-1], lambda x: x[:1]]
DTYPES = [None, None, None, torch.float16]  # (the interpreter computes bfloat16 wrongly)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_changes_nothing_stale_runs(seed, kernels, engine):
    """Random blocks, of which something changes between calls, in turns."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net = ConvGroup(
        1, 4, nb_conv=2,
        norm=draw.choice(["instance", "batch", "layer", 2, None]),
        order=draw.choice(["cndax", "caxnd", "nacdx", "dcnax"]),
        activation=draw.choice(["ReLU", "PReLU", "SiLU", "Softplus", "Tanh"]),
        dropout=draw.choice([None, 0.4]), residual=draw.choice([True, False]),
        kernel_size=draw.choice([1, 3]),
    )  # fmt: skip
    net = net.to(kernels)
    twin = copy.deepcopy(net)
    # all changes and kinds of images are met by the seeds together
    changes = [[*CHANGES][(3 * seed + n) % len(CHANGES)] for n in range(4)]
    images = [IMAGES[(5 * seed + n) % len(IMAGES)] for n in range(5)]
    draw.shuffle(changes)
    draw.shuffle(images)
    for change in ["", *changes]:
        for one in (net, twin):
            CHANGES.get(change, lambda net: None)(one)
        image = images.pop()(torch.randn(2, 4, 25, device=kernels)).detach()
        image.requires_grad_(draw.random() < 0.7)
        dtype = draw.choice(DTYPES)
        for _ in range(4):
            found = step(net, image, dtype)
            with general():
                assert_same(found, step(twin, image, dtype))
    assert replays()


def test_plans_and_what_was_measured_are_part_of_the_key(kernels):
    """Another plan is another recording."""
    net = ConvBlock(2, 4, 4, norm="instance").to(kernels)
    image = torch.randn(2, 4, 6, 6, device=kernels)
    known = []
    with dispatch.use_engine("gemm"), torch.no_grad():
        for plan in (plans.GemmPlan(64, 64, 32), plans.GemmPlan(128, 64, 32)):
            with plans.use_plan(plan):
                for _ in range(3):
                    net(image)
            known.append(len(replays()))
    assert 0 < known[0] < known[1]


def test_where_somebody_looks_the_general_path_runs(kernels):
    """Modes see the operators, and what nobody could record is left alone."""
    net = ConvBlock(2, 4, 4, norm="instance").to(kernels)
    image = torch.randn(2, 4, 6, 6, device=kernels)
    with dispatch.use_engine("gemm"), torch.no_grad():
        for _ in range(3):
            net(image)
        seen = []

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func.namespace)
                return func(*args, **(kwargs or {}))

        with Mode():
            net(image)
    assert "cassetta" in seen


def test_what_does_not_hold_is_recorded_anew_once(kernels, monkeypatch):
    """Then it is left to the general path, which is right each time."""
    x, y = torch.randn(1, 2, 9, device=kernels), torch.randn(1, 2, 9, device=kernels)
    monkeypatch.setattr(recordings, "_changed", set())
    calls = []

    def added(a, b):
        calls.append(1)
        return (a + 2 * b,)

    def found(a, b):
        (out,) = recordings.run("a test", added, (a, b))
        torch.testing.assert_close(out, a + 2 * b)

    for _ in range(3):
        found(x, x)  # one tensor
    assert len(calls) == 2
    for _ in range(3):
        found(x, y)  # two: as a replay finds out, then by the general path, recorded, replayed
    assert len(calls) == 4
    for _ in range(3):
        found(x, x)  # which is none of what this recording distinguishes
    assert len(calls) == 4


def test_gradients_of_many_outputs_at_once(kernels):
    """Whose backward is of a tensor that stands for several, and has no address."""
    net = ConvBlock(1, 2, 2, norm="instance").to(kernels)
    x = torch.randn(1, 2, 6, device=kernels, requires_grad=True)
    for _ in range(3):
        out = net(x)
        many = torch.randn(3, *out.shape, device=kernels)
        with dispatch.use_backend("reference"):
            plain = net(x)
        (found,) = torch.autograd.grad(out, x, many, is_grads_batched=True)
        (expected,) = torch.autograd.grad(plain, x, many, is_grads_batched=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_where_memory_is_short_nothing_is_recorded(monkeypatch):
    """A tape frees nothing before its end; the general path, which does, may still fit."""
    monkeypatch.setattr(recordings, "may_replay", lambda x: True)

    def short(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(replay, "record", short)
    x = torch.randn(1, 2, 6)
    for _ in range(3):
        (out,) = recordings.run("a test", lambda a: (a + 1,), (x,))
        torch.testing.assert_close(out, x + 1)
    assert [*recordings._known.values()] == [recordings.NEVER]


def test_many_kinds_of_images_are_said_once(kernels, monkeypatch):
    """And no more of them are known than the limit allows."""
    monkeypatch.setattr(recordings, "LIMIT", 4)
    monkeypatch.setattr(recordings, "_gone", 0)
    net = ConvBlock(1, 2, 2).to(kernels)
    with dispatch.use_engine("gemm"), torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", "blocks met more than")
        for n in range(15):
            net(torch.randn(1, 2, 5 + n, device=kernels))
        assert len(recordings._known) == 4
        assert not told
        for n in range(15, 60):
            net(torch.randn(1, 2, 5 + n, device=kernels))
    assert [str(one.message)[:42] for one in told] == ["blocks met more than 16 kinds of images, m"]


@pytest.mark.parametrize("number", ["0", "1"])
def test_recordings_can_be_turned_off(number):
    code = "from cassetta.recording import recordings; print(recordings._enabled)"
    env = {**os.environ, recordings.ENVIRONMENT: number}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert told.stdout.split() == [str(number == "1")]


def test_what_cannot_be_repeated_is_refused():
    x = torch.randn(3)
    with pytest.raises(tape.Unrecordable, match="the host reads a value"):
        replay.record(lambda x: (x * x.sum().item(),), x)
    pair = torch.randn(3, 4)
    parts = pair[:, :3], pair[:, 1:]  # which share their memory
    again, (out,) = replay.record(lambda a, b: (pair[1:2, 2:3] + 1,), *parts)
    assert again is None
    torch.testing.assert_close(out, pair[1:2, 2:3] + 1)


def test_what_was_given_is_changed_once():
    """Also where it is found, after that, that nothing can repeat it; and nothing raises after."""
    counter, x = torch.zeros(()), torch.randn(2, 3)

    def goes_on(counter, x):
        counter.add_(1)
        return (x.sum(0),)

    again, (out,) = replay.record(goes_on, counter, x)
    assert again is None
    assert counter == 1
    torch.testing.assert_close(out, x.sum(0))
    again, _ = replay.record(lambda counter, x: (x.sum(0), counter.add_(1))[:1], counter, x)
    y = torch.randn(2, 3)
    (out,) = again(counter, y)
    assert counter == 3
    torch.testing.assert_close(out, y.sum(0))


@pytest.mark.parametrize("write", [
    lambda room, x: torch.cat([x, x], out=room),
    lambda room, x: torch._foreach_copy_([room[:2], room[2:]], [x, x]),
])  # fmt: skip
def test_operators_that_write_elsewhere_than_in_their_first_argument(write):
    x, y = torch.randn(2, 3), torch.randn(2, 3)

    def into_what_is_new(x):
        room = torch.empty(4, 3)
        write(room, x)
        return (room.sum(0),)  # whose layout is looked at

    def into_what_was_given(room, x):
        write(room, x)
        return (x.sum(0),)

    again, _ = replay.record(into_what_is_new, x)
    torch.testing.assert_close(again(y)[0], 2 * y.sum(0))
    assert replay.record(into_what_was_given, torch.empty(4, 3), x)[0] is None


def test_what_is_empty_is_allocated_too():
    """As the channels of a second image are, where all are of the first."""

    def function(x):
        none = torch.empty(0, 3)
        return (torch.cat((none, x)), none)

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    again, _ = replay.record(function, x)
    out, none = again(y)
    torch.testing.assert_close(out, y)
    assert none.shape == (0, 3)


def test_a_tensor_that_was_two_is_noticed():
    """Of one tensor that was given twice, two are told apart, and never mistaken for one."""
    x, y = torch.randn(3), torch.randn(3)
    again, out = replay.record(lambda a, b: (a + 2 * b,), x, x)
    torch.testing.assert_close(out[0], 3 * x)
    torch.testing.assert_close(again(y, y)[0], 3 * y)
    with pytest.raises(tape.Changed):
        again(x, y)


LAUNCHES = Path(__file__).with_name("launches.py")


@pytest.mark.skipif(GPU, reason="the driver here is another")
def test_launches_are_those_of_the_general_path(tmp_path):
    """On a driver that does nothing: kernels, grids, numbers and addresses, one by one."""
    line = [sys.executable, str(LAUNCHES), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    if "cannot be measured" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "compared" in done.stdout


@pytest.mark.parametrize("old", [False, True], ids=["guards of torch", "in Python"])
def test_tensors_are_of_one_kind(old, monkeypatch):
    """By torch's guards, or without them: both tell the same."""
    if old:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    pair = nn.Parameter(torch.randn(4, 4)), torch.randn(2, 3)
    are_alike = recordings.alike(pair)
    assert are_alike(*pair)
    assert are_alike(nn.Parameter(torch.zeros(4, 4)), torch.zeros(2, 3))
    first, second = pair
    others = [
        first.detach(), first.detach().requires_grad_(), nn.Parameter(torch.randn(4, 5)),
        nn.Parameter(torch.randn(4, 4).T), nn.Parameter(torch.randn(4, 4).double()),
    ]  # fmt: skip
    for other in others:
        assert not are_alike(other, second)
    same = recordings.alike([second, second])
    assert not same(second, second)
    with torch.inference_mode():
        assert not are_alike(*pair)


def test_a_copy_of_its_own_dtype_is_a_copy(kernels):
    """By whatever way that is quicker than ATen's operator."""
    x = torch.randn(2, 4, 8, device=kernels)
    again, _ = replay.record(lambda x: (x.to(x.dtype, copy=True), x.to(torch.float16)), x)
    same, rounded = again(x)
    assert same.data_ptr() != x.data_ptr()
    torch.testing.assert_close(same, x, rtol=0, atol=0)
    torch.testing.assert_close(rounded, x.half(), rtol=0, atol=0)
