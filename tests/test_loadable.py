"""Modules that save how they were built, and files that can do no more than build them."""

import copy
import io
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import cassetta.io
from cassetta.backbones import ATrousNet, ConvDecoder, ConvEncoder, MeshNet, UNet
from cassetta.io import LoadableMixin, load, load_module, make_loadable
from cassetta.models import SegNet

from compare import assert_near

NETS = {
    "segnet": lambda: SegNet(2, 1, 3, opt_backbone={"nb_features": 3, "nb_levels": 2}),
    "instance": lambda: SegNet(2, 1, 3, backbone=MeshNet(2, 3, nb_layers=2, norm="batch")),
    "unet": lambda: UNet(2, np.int64(3), nb_levels=2, pool_factor=(2, 1)),
    "class": lambda: MeshNet(2, 3, nb_layers=2, activation=nn.ELU, norm=nn.BatchNorm2d),
    "partial": lambda: ATrousNet(2, 4, nb_levels=2, norm=partial(nn.GroupNorm, 2)),
    "encoder": lambda: ConvEncoder(2, [3, 4]),
    "decoder": lambda: ConvDecoder(2, 8, skip=[4, 2]),
    "loadable": lambda: MeshNet(2, 4, nb_layers=1, norm=make_loadable(nn.GroupNorm)(2, 4)),
}


def inputs(net):
    if isinstance(net, ConvDecoder):
        return [torch.randn(1, 8 // 2**n, 4 * 2**n, 4 * 2**n) for n in range(3)]
    return [torch.randn(1, net.inp_channels, 8, 8)]


@pytest.mark.parametrize("name", NETS)
def test_save_and_load(name, tmp_path):
    net = NETS[name]()
    net(*inputs(net))  # running statistics are part of the state
    net.eval()
    data = inputs(net)
    path = tmp_path / "net.pt"
    net.save(path)
    for twin in (load(path), type(net).load_from(path), type(net).load(str(path))):
        assert type(twin) is type(net)
        assert_near(twin.eval()(*data), net(*data))
    assert list(tmp_path.iterdir()) == [path]
    assert load_module is load


def test_files_and_dictionaries():
    net = NETS["segnet"]().eval()
    data = inputs(net)
    file = io.BytesIO()
    net.save(file)
    file.seek(0)
    assert_near(load(file).eval()(*data), net(*data))
    assert_near(load(net.serialize()).eval()(*data), net(*data))


def test_load_of_an_instance_fills_it():
    """Upstream's documentation says so, but its `load` returns another module."""
    trained, fresh = NETS["segnet"](), NETS["segnet"]()
    data = inputs(trained)
    assert fresh.load(trained.serialize()) is fresh
    assert_near(fresh.eval()(*data), trained.eval()(*data))


def test_a_class_made_loadable():
    norm = make_loadable(nn.GroupNorm)(2, 4)
    packed = norm.serialize()
    assert (packed["module"], packed["qualname"]) == ("torch.nn.modules.normalization", "GroupNorm")
    twin = load(packed)
    assert isinstance(twin, nn.GroupNorm)
    assert (twin.num_groups, twin.num_channels) == (2, 4)
    group = make_loadable(nn.Sequential)(make_loadable(nn.Linear)(3, 4), make_loadable(nn.ReLU)())
    data = torch.randn(2, 3)
    assert_near(load(group.serialize())(data), group(data))


class Outer(LoadableMixin, nn.Module):
    def __init__(self, width, *, depth=1):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


class Derived(Outer):
    def __init__(self, width):
        super().__init__(width, depth=3)


class Plain(Outer):
    """No constructor of its own."""


class Moved(Outer):
    pass


def test_classes_of_the_program():
    for net in (Outer(3, depth=2), Derived(3), Plain(3, depth=2)):
        twin = load(net.serialize())
        assert type(twin) is type(net)
        assert len(twin.layers) == len(net.layers)
    assert load(Derived(3).serialize()["kwargs"] | Derived(3).serialize())._arguments == ((3,), {})


def test_a_class_that_moved_is_found_by_the_class_that_asks():
    packed = {**Moved(3).serialize(), "module": "somewhere.else"}
    assert type(Moved.load_from(packed)) is Moved
    with pytest.raises(ValueError, match="somewhere.else"):
        load(packed)


def test_a_file_of_another_class_is_refused():
    with pytest.raises(TypeError, match="holds a Derived, not a UNet"):
        UNet.load_from(Derived(3).serialize())
    assert type(Outer.load_from(Derived(3).serialize())) is Derived


def test_arguments_that_cannot_be_saved_are_refused_before_writing(tmp_path):
    cases = [
        (MeshNet(2, 4, nb_layers=1, activation=nn.LeakyReLU(0.2)), "activation.*make_loadable"),
        (MeshNet(2, 4, nb_layers=1, norm=lambda c: nn.BatchNorm2d(c)), "norm.*name or a class"),
    ]
    for net, message in cases:
        with pytest.raises(TypeError, match=message):
            net.save(tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    net = NETS["segnet"]()
    net.save(path)
    before = path.read_bytes()

    def interrupted(packed, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        net.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torchvision.models", "ResNet"),
        ("cassettas", "Net"),
    ],
)
def test_files_may_not_name_other_packages(module, qualname):
    packed = {**NETS["unet"]().serialize(), "module": module, "qualname": qualname}
    with pytest.raises(ValueError, match=f"{module}.{qualname}, outside"):
        load(packed)
    packed = NETS["class"]().serialize()
    packed["kwargs"]["norm"] = {"cassetta.class": [module, qualname]}
    with pytest.raises(ValueError, match=f"{module}.{qualname}, outside"):
        load(packed)


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("torch.nn.functional", "relu"),
        ("torch.nn.init", "torch.load"),
        ("cassetta.io.loadable", "Path"),
    ],
)
def test_files_may_only_name_classes_of_modules(module, qualname):
    packed = {**NETS["unet"]().serialize(), "module": module, "qualname": qualname}
    with pytest.raises(ValueError, match="no class of modules"):
        load(packed)


@pytest.mark.parametrize("module", ["cassetta.__main__", "cassetta.nowhere", "torch.nn.nowhere"])
def test_files_import_nothing(module):
    """`import cassetta.__main__` would run the command line."""
    packed = {**NETS["unet"]().serialize(), "module": module, "qualname": "main"}
    with pytest.raises(ValueError, match="no class of modules"):
        load(packed)
    assert module not in sys.modules


@pytest.mark.parametrize("name", NETS)
def test_pickles_and_copies_can_be_saved(name):
    net = NETS[name]().eval()
    data = inputs(net)
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert_near(load(twin.serialize()).eval()(*data), net(*data))


def test_a_network_built_with_a_function_can_be_pickled_though_not_saved():
    net = MeshNet(2, 4, nb_layers=1, activation=lambda: nn.LeakyReLU(0.1))
    twin = pickle.loads(pickle.dumps(net.eval()))
    data = inputs(net)
    assert_near(twin(*data), net(*data))
    with pytest.raises(TypeError, match="activation = <function .* cannot be saved"):
        twin.serialize()


def test_numbers_of_numpy_are_plain_numbers():
    net = MeshNet(2, np.int32(4), nb_layers=1, dropout=np.float32(0.25), bias=np.bool_(False))
    kwargs = net.serialize()["kwargs"]
    assert kwargs["dropout"] == 0.25
    assert kwargs["bias"] is False
    assert load(net.serialize())[0][0].conv.bias is None


def test_files_may_name_a_package_that_is_allowed():
    packed = {**NETS["unet"]().serialize(), "module": "json", "qualname": "JSONDecoder"}
    with pytest.raises(ValueError, match="no class of modules"):
        load(packed, allow=["json"])


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return exec, ("raise SystemExit('the pickle ran')",)

    path = tmp_path / "net.pt"
    torch.save({"cassetta.Loadable": "1.0", "args": Attack()}, path)
    with pytest.raises(ValueError, match="holds no loadable module"):
        load(path)


def test_bare_weights_are_refused_with_advice(tmp_path):
    torch.save(NETS["unet"]().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt holds no loadable module.*load_state_dict"):
        cassetta.io.load(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="the dictionary holds no loadable"):
        load({})


def test_signatures_survive():
    import inspect

    parameters = inspect.signature(UNet).parameters
    assert list(parameters)[:3] == ["ndim", "nb_features", "mul_features"]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04cut"], ids=["empty", "junk", "cut"])
def test_what_is_no_file_of_ours_is_said_to_be_none(content, tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="net.pt holds no loadable module"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": 3}, "does not name its class"),
        ({"cassetta.Loadable": "99.0"}, "has version '99.0': this package reads 1.0"),
        ({"state": None}, "holds no weights"),
        ({"module": "torch.nn.modules.module", "qualname": "torch.fx.GraphModule"}, "no class of"),
    ],
    ids=str,
)
def test_a_broken_or_foreign_dictionary(change, message):
    with pytest.raises(ValueError, match=message):
        load({**NETS["unet"]().serialize(), **change})


def test_misused_arguments(tmp_path):
    with pytest.raises(TypeError, match="allow='os' must be a list"):
        load(NETS["unet"]().serialize(), allow="os")
    with pytest.raises(TypeError, match="source=None"):
        load(None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NETS["unet"]().save(tmp_path / "nowhere" / "net.pt")
    with pytest.raises(TypeError, match="no class of modules"):
        make_loadable(dict)
    assert make_loadable(UNet) is UNet


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_weights(dtype):
    net = NETS["segnet"]().to(dtype)
    twin = load(net.serialize())
    for one, other in zip(twin.parameters(), net.parameters(), strict=True):
        assert_near(one, other)
