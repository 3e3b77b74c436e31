"""What a module decided is recalled while nothing has changed, and at no other time."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from cassetta.functional import defer
from cassetta.kernels import dispatch, evidence
from cassetta.layers import ConvBlock, ConvGroup, DownConv, decisions, fusing
from cassetta.layers.decisions import LIMIT, recalled


class Count:
    """Decides, and counts how often it was asked."""

    def __init__(self, module):
        self.module, self.calls = module, 0

    def __call__(self, x=None):
        image = torch.randn(2, 4, 6, 6) if x is None else x
        return recalled(self.module, defer(image), self._decide)

    def _decide(self, x):
        self.calls += 1
        return self.calls


def block(**options):
    options = {"norm": "batch", "dropout": 0.1, "order": "cndax", **options}
    return ConvBlock(2, 4, 4, activation=nn.LeakyReLU, **options)


def replaced(module, name):
    own = getattr(module, name)
    setattr(module, name, nn.Parameter(own.detach().clone()))


class Other(nn.Module):
    """Of another class."""


SAME = {
    "nothing": lambda block: None,
    "other values": lambda block: block.conv.weight.data.add_(1),
    "another parameter": lambda block: replaced(block.conv, "weight"),
    "what needs gradients": lambda block: block.requires_grad_(False),
    "the mode it has": lambda block: block.train(),
    "parameters in other places": lambda block: block.double().float(),
}
OTHER = {
    "mode": lambda block: block.eval(),
    "eps": lambda block: setattr(block.norm, "eps", 0.1),
    "momentum": lambda block: setattr(block.norm, "momentum", None),
    "statistics are forgotten": lambda block: setattr(block.norm, "running_mean", None),
    "slope": lambda block: setattr(block.activation, "negative_slope", 0.3),
    "dropout": lambda block: setattr(block.dropout, "p", 0.2),
    "dilation": lambda block: setattr(block.conv, "dilation", (2, 2)),
    "no bias": lambda block: setattr(block.conv, "bias", None),
    "another layer": lambda block: setattr(block, "activation", nn.ReLU()),
    "no layer": lambda block: setattr(block, "norm", None),
    "a layer more": lambda block: block.append(nn.ReLU()),
    "a layer deeper": lambda block: setattr(block, "activation", nn.Sequential(nn.ReLU())),
    "a hook": lambda block: block.conv.register_forward_hook(lambda *_: None),
    "a hook of backward": lambda block: block.norm.register_full_backward_hook(lambda *_: None),
    "another forward": lambda block: setattr(block.norm, "forward", lambda x: x),
    "another class": lambda block: setattr(block.conv, "__class__", Other),
}  # fmt: skip


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_a_decision_holds_while_the_module_is_as_it_was(change):
    module = block()
    count = Count(module)
    assert [count(), count()] == [1, 1]
    (SAME | OTHER)[change](module)
    again = 2 if change in OTHER else 1
    assert [count(), count()] == [again, again]


IMAGES = {
    "size": torch.randn(2, 4, 6, 7),
    "batch": torch.randn(3, 4, 6, 6),
    "dtype": torch.randn(2, 4, 6, 6).half(),
    "layout": torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),
    "device": torch.empty(2, 4, 6, 6, device="meta"),
}


@pytest.mark.parametrize("kind", [*IMAGES])
def test_each_kind_of_image_has_its_own(kind):
    count = Count(block())
    assert [count(), count(IMAGES[kind]), count(), count(IMAGES[kind])] == [1, 2, 1, 2]


def hook():
    """A global hook, within a context."""
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


SETTINGS = {
    "backend": lambda: dispatch.use_backend("reference"),
    "engine": lambda: dispatch.use_engine("gemm"),
    "passes of the reference": dispatch.fused_on_reference,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "without gradients": torch.no_grad,
    "a global hook": hook,
}


@pytest.mark.parametrize("setting", [*SETTINGS])
def test_settings_of_the_process_are_looked_at(setting):
    count = Count(block())
    assert count() == 1
    with SETTINGS[setting]():
        assert [count(), count()] == [2, 2]
    assert count() == 1


def test_tables_that_are_read_anew_and_thresholds_are_looked_at(monkeypatch):
    count = Count(block())
    assert count() == 1
    evidence.forget()
    assert count() == 2
    monkeypatch.setattr(dispatch, "SMALL", 1)
    assert count() == 3


def test_nothing_is_recalled_where_somebody_listens_or_torch_transforms():
    count = Count(block())
    assert [count(), count()] == [1, 1]
    with fusing.listening(training=True):
        assert [count(), count()] == [2, 3]
    assert count() == 1
    torch.func.vmap(lambda x: torch.zeros(count(x)))(torch.randn(1, 2, 4, 6, 6))
    assert count.calls == 4


def test_a_list_that_is_changed_in_place_is_noticed():
    """A layer may have been given one, as `Resize` is for its factors."""
    module = block()
    module.norm.factor = [2.0, 2.0]
    count = Count(module)
    assert [count(), count()] == [1, 1]
    module.norm.factor[1] = 3.0
    assert [count(), count()] == [2, 2]
    module.norm.factor.append(1.0)
    assert count() == 3


def test_no_copy_has_what_was_decided():
    module = block()
    assert Count(module)() == 1
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        count = Count(other)
        assert [count(), count()] == [1, 1]
    replica = module._replicate_for_data_parallel()
    count = Count(replica)
    assert [count(), count()] == [1, 2]


def test_many_kinds_of_images_are_not_kept_for_ever():
    count = Count(block())
    for n in range(2 * LIMIT):
        count(torch.empty(1, 4, 1, n + 1))
    assert count.calls == 2 * LIMIT
    assert len(decisions._known[count.module].found) <= LIMIT


def test_modules_go_when_nobody_holds_them(engine):
    """At once, with their parameters: nothing that was decided refers to them."""
    net = ConvGroup(2, 4, nb_conv=2, norm="batch", activation="PReLU", residual=True)
    known = [weakref.ref(one) for one in (*net.modules(), *net.parameters())]
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            net(torch.randn(2, 4, 6, 6)).sum().backward()
            with dispatch.fused_on_reference(), dispatch.use_engine(engine):
                net(torch.randn(2, 4, 6, 6)).sum().backward()
        assert net[0] in decisions._known
        del net
        assert not [one() for one in known if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["mode", "slope", "a hook", "another layer", "no layer"])
def test_a_block_computes_what_it_is(change, engine):
    """With dropout, statistics and all; a block that is new is the truth."""
    module = block(dropout=None)
    image = torch.randn(2, 4, 6, 6)
    with dispatch.fused_on_reference(), dispatch.use_engine(engine):
        module(image)
        OTHER[change](module)
        fresh = copy.deepcopy(module)
        torch.testing.assert_close(module(image), fresh(image), rtol=0, atol=0)


class Doubled(ConvBlock):
    """A block with a forward of its own."""

    def forward(self, inp):
        return 2 * super().forward(inp)


def of_another_class(group):
    group[1].__class__ = Doubled


GROUPS = {
    "a hook on a block": lambda group: group[1].register_forward_hook(lambda *found: found[-1] * 2),
    "a hook on a layer": lambda group: group[1].conv.register_forward_hook(lambda *f: f[-1] * 2),
    "another forward of a block": lambda group: setattr(group[0], "forward", lambda x: x),
    "another class of a block": of_another_class,
    "a block more": lambda group: group.append(block(dropout=None)),
    "another block": lambda group: group.__setitem__(0, nn.Conv2d(4, 4, 1)),
    "residual": lambda group: setattr(group, "residual", not group.residual),
    "slope": lambda group: OTHER["slope"](group[1]),
    "mode of a block": lambda group: group[0].eval(),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("change", [*GROUPS])
def test_a_group_computes_what_it_is(change, residual, engine):
    """What its blocks do is recalled for all of them at once."""
    group = ConvGroup(2, 4, nb_conv=2, norm="batch", activation=nn.LeakyReLU, residual=residual)
    image = torch.randn(2, 4, 6, 6)
    with dispatch.fused_on_reference(), dispatch.use_engine(engine):
        for _ in range(2):
            group(image)
        before = group(image)
        GROUPS[change](group)
        fresh = copy.deepcopy(group)
        for _ in range(2):
            out = group(image)
            torch.testing.assert_close(out, fresh(image), rtol=0, atol=0)
            assert not torch.equal(out, before)


class Counting(nn.Module):
    """Other than it was in each call, in its attributes alone."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


LAYERS = {
    "scripted": lambda: torch.jit.script(nn.ReLU()),
    "traced": lambda: torch.jit.trace(nn.ReLU(), torch.randn(1, 4, 6, 6)),
    "of torch.fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())),
    "lazy": lambda: nn.LazyBatchNorm2d(),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "with state": Counting,
}


@pytest.mark.filterwarnings("ignore:.*jit")  # which the newest torch would have us leave
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("kind", [*LAYERS])
def test_layers_of_any_kind_are_looked_at_or_asked_each_time(kind):
    torch.manual_seed(0)
    layer, image = LAYERS[kind](), torch.randn(1, 4, 6, 6)
    group = ConvGroup(2, 4, nb_conv=2, activation=layer)
    for _ in range(3):
        calls = getattr(layer, "calls", None)
        expected = layer(group[1].conv(layer(group[0].conv(image))))
        if calls is not None:
            layer.calls = calls
        torch.testing.assert_close(group(image), expected, rtol=0, atol=0)


def test_a_forward_that_is_exchanged_in_its_class_is_noticed(monkeypatch):
    group = ConvGroup(2, 4, nb_conv=2)
    image = torch.randn(2, 4, 6, 6)
    for _ in range(2):
        group(image)
    monkeypatch.setattr(ConvBlock, "forward", lambda self, inp: inp + 1)
    torch.testing.assert_close(group(image), image + 2)


def test_a_group_that_is_recalled_asks_none_of_its_blocks(monkeypatch):
    group = ConvGroup(2, 4, nb_conv=3, norm="instance")
    image = torch.randn(2, 4, 6, 6)
    expected = group(image)
    monkeypatch.setattr(ConvBlock, "deferred_steps", lambda *_: pytest.fail("a block was asked"))
    torch.testing.assert_close(group(image), expected, rtol=0, atol=0)


def test_a_way_down_recalls_its_engine(monkeypatch):
    down = DownConv(2, 4, 4, 2)
    asked = []
    choose = fusing.choose_for
    monkeypatch.setattr(fusing, "choose_for", lambda *a: asked.append(1) or choose(*a))
    image = torch.randn(1, 4, 6, 6)
    for _ in range(3):
        down(image)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="too small"):
        down(image[..., :1])
