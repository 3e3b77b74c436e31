"""`cassetta check`: kernels that are right pass, and one that is wrong or fails is named."""

from types import SimpleNamespace

import pytest
import torch
from conftest import large_tiles

from cassetta.backbones import MeshNet
from cassetta.cli import main
from cassetta.kernels import activations, configs, dispatch
from cassetta.layers import ConvBlock
from cassetta.measure import agreement, checking


@pytest.fixture
def few(monkeypatch, kernels):
    """Two activations, one dtype, a convolution, a block and a network."""
    monkeypatch.setattr(activations, "NAMES", ("relu", "prelu"))
    monkeypatch.setattr(configs, "dtypes", lambda: (torch.float32,))
    _, *how = checking.CONVOLUTIONS["even"]
    some = {"even": ((1, 8, 9, 7), *how)}
    monkeypatch.setattr(checking, "CONVOLUTIONS", some)
    options = {"activation": "SiLU", "dropout": 0.2}
    nets = {
        "_blocks": ("block, instance norm", ConvBlock(2, 6, 6, norm="instance", **options)),
        "_networks": ("MeshNet", MeshNet(2, 6, nb_layers=2, **options)),
    }
    for part, (name, net) in nets.items():
        assert name in getattr(checking, part)()
        one = {name: (net, (2, 6, 17, 16))}  # in 2-D, which takes the interpreter less long
        monkeypatch.setattr(checking, part, lambda one=one: one)
    with large_tiles():
        yield kernels


def spoil(monkeypatch, name, run):
    right = dispatch._triton_passes()
    wrong = SimpleNamespace(**{**vars(right), name: lambda *args: run(getattr(right, name)(*args))})
    monkeypatch.setattr(dispatch, "_triton_passes", lambda: wrong)


def test_what_is_right_passes(few):
    rows = [*checking.check(few)]
    assert [row.why for row in rows] == [None] * len(rows)
    names = [row.what for row in rows]
    products = ["conv_fprop", "conv_dgrad", "conv_wgrad"]
    nets = [name for name in ("block, instance norm", "MeshNet") for _ in ("library", "gemm")]
    assert names == [*agreement.PASSES * 2, *products, *nets]


def test_what_is_wrong_is_named(monkeypatch, few):
    spoil(monkeypatch, "materialize", lambda out: 1.01 * out)
    wrong = {row.what: row.why for row in checking.check(few) if row.why}
    assert {*wrong} == {"materialize", "block, instance norm", "MeshNet"}
    assert wrong["materialize"].startswith("its result 0 is off by 0.01 of its size")


def test_what_fails_is_named_also_without_words(monkeypatch, few):
    def fails(out):
        raise AssertionError

    spoil(monkeypatch, "prologue_dgrad", fails)
    wrong = {row.what: row.why for row in checking.check(few) if row.why}
    assert wrong["prologue_dgrad"] == "it fails (AssertionError:)"
    assert "MeshNet" in wrong


def test_a_network_that_is_not_fused_is_no_success(monkeypatch, few):
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: "this is a test")
    last = [*checking.check(few)][-1]
    assert "runs as plain PyTorch: this is a test" in last.why


def test_the_command_says_what_is_at_fault(monkeypatch, few, capsys):
    assert main(["check"]) == 0
    assert "21 comparisons on" in capsys.readouterr().out
    spoil(monkeypatch, "moments", lambda out: (out[0] + 1, out[1]))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "moments (2x21x9x10x11 last float32, relu): its result 0 is off by" in out
    assert "0 at fault" not in out
    assert main(["check", "--budget", "1e-9"]) in (0, 1)
    assert "1 comparisons" in capsys.readouterr().out


def test_the_command_refuses(monkeypatch, capsys):
    for budget in ("0", "nan", "-1"):
        assert main(["check", "--budget", budget]) == 2
        assert "must be a number of seconds above 0" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "this is a test")
    assert main(["check"]) == 2
    assert "there is no kernel to check: this is a test" in capsys.readouterr().err
