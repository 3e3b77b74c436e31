"""The choice of a backend, and its reasons."""

import math
from types import SimpleNamespace

import pytest
import torch

import cassetta
from cassetta.kernels import (
    BackendError,
    backend,
    dispatch,
    evidence,
    library,
    machine,
    plans,
    why_reference,
)
from cassetta.kernels.types import Geometry
from cassetta.layers import Conv, ConvBlock, DownConv


def test_the_default_is_auto_and_says_why_it_runs_the_reference():
    assert backend() == "auto"
    assert dispatch.implementation() is library
    why = why_reference()
    assert why is None if torch.cuda.is_available() else "no NVIDIA GPU" in why


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("CASSETTA_BACKEND", "reference")
    assert backend() == "reference"
    assert "was asked for" in why_reference()
    monkeypatch.setenv("CASSETTA_BACKEND", "")
    assert backend() == "auto"
    monkeypatch.setenv("CASSETTA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CASSETTA_BACKEND='cuda'.*auto, triton, reference"):
        backend()


def test_a_request_that_cannot_be_met_is_never_ignored(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "there is none")
    monkeypatch.setenv("CASSETTA_BACKEND", "triton")
    conv = Conv(1, 2, padding="same")
    with pytest.raises(BackendError, match="'triton' cannot run: .*Ask for 'auto' or 'reference'"):
        conv(torch.randn(1, 2, 4))
    with cassetta.use_backend("reference"):
        assert conv(torch.randn(1, 2, 4)).shape == (1, 2, 4)


def test_use_backend_and_set_backend():
    with cassetta.use_backend("reference"):
        assert backend() == "reference"
        with cassetta.use_backend("auto"):
            assert backend() == "auto"
        assert backend() == "reference"
    assert backend() == "auto"
    cassetta.set_backend("reference")
    assert backend() == "reference"
    cassetta.set_backend(None)
    assert backend() == "auto"


@pytest.mark.parametrize("name", ["Triton", "cuda", 3, True])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="is not a backend: use one of auto, triton, reference"):
        cassetta.set_backend(name)


def test_a_refused_backend_changes_nothing(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "there is none")
    cassetta.set_backend("reference")
    with pytest.raises(BackendError):
        cassetta.set_backend("triton")
    with pytest.raises(BackendError), cassetta.use_backend("triton"):
        pass
    assert backend() == "reference"


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU, of which no kernel is asked to run; its capability is a list."""
    found = [(9, 0)]
    one = lambda device=None: machine.Gpu("a GPU", found[0], 2**36, 2**25, 2**17)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "gpu", one)
    monkeypatch.setattr(machine, "gpus", lambda: [one()])
    monkeypatch.setattr(torch.version, "hip", None)
    return found


class Image:
    """What dispatch asks of an image on a GPU."""

    def __init__(self, dtype=torch.float32, device="cuda", size=dispatch.SMALL):
        self.dtype, self.device, self.size = dtype, torch.device(device), size
        self.shape = (1, size)

    def numel(self):
        return self.size

    def is_complex(self):
        return False


def why(monkeypatch, **image):
    monkeypatch.setattr(dispatch, "PLAIN", (Image,))
    return why_reference(Image(**image))


def test_reasons_on_a_gpu(monkeypatch, gpu):
    assert why(monkeypatch) is None
    assert why(monkeypatch, dtype=torch.bfloat16) is None
    assert "the image is in float64" in why(monkeypatch, dtype=torch.float64)
    assert "the image is on the CPU" in why(monkeypatch, device="cpu")
    assert "the image is on the mps device" in why(monkeypatch, device="mps")
    assert "so small an image" in why(monkeypatch, size=100)
    with cassetta.use_backend("triton"):
        assert why(monkeypatch, size=100) is None
    gpu[0] = (7, 5)
    assert "this GPU has compute capability 7.5, and 8.0 is needed" in why(monkeypatch)
    with pytest.raises(BackendError, match=r"no GPU .* 8.0 or newer \(the best has 7.5\)"):
        cassetta.set_backend("triton")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in why(monkeypatch)


def test_reasons_without_triton(monkeypatch, gpu):
    monkeypatch.setattr(dispatch, "_why_not_importable", lambda: "triton cannot be imported (no)")
    assert "triton cannot be imported" in why(monkeypatch)
    with pytest.raises(BackendError, match="cannot be imported"):
        cassetta.set_backend("triton")


def test_other_kinds_of_tensor_and_transforms_stay_with_torch(monkeypatch):
    class Mine(torch.Tensor):
        pass

    monkeypatch.setenv(dispatch.INTERPRET, "1")
    with cassetta.use_backend("triton"):
        assert why_reference(torch.ones(1, 1, 4)) is None
        assert "a Mine" in why_reference(torch.ones(1, 1, 4).as_subclass(Mine))
        reasons = []
        torch.vmap(lambda x: reasons.append(why_reference(x)) or x)(torch.ones(2, 1, 4))
        assert "torch.func" in reasons[0]
    assert why_reference(torch.ones(1, 1, 4)) == "the image is on the CPU"


def test_the_rule_for_odd_channels(monkeypatch, gpu):
    """On 9.0, channels last that fill no words go to our own convolutions in training (`ODD`)."""
    monkeypatch.setattr(dispatch, "PLAIN", (Image,))
    monkeypatch.setattr(evidence, "table", lambda device: SimpleNamespace(records={}))

    def engine(taps=27, is_last=True, training=True, channels=21, lacks=None, use=True, size=2**25):
        image = Image(torch.bfloat16, size=size)
        image.shape = (1, channels, size // channels)
        about = dispatch.Use(taps, is_last, training) if use else None
        lacking = {"library": None, "gemm": lacks, "reference": None}
        return dispatch.choose(image, None, lambda: "", lacking, about).engine

    assert engine() == "gemm"
    assert engine(is_last=False) == engine(training=False) == engine(taps=9) == "library"
    assert engine(channels=24) == engine(lacks="no kernel") == engine(use=False) == "library"
    assert engine(size=100) == "reference"
    with dispatch.use_engine("library"):
        assert engine() == "library"
    gpu[0] = (8, 0)
    assert engine() == "library"


def test_the_rule_for_convolutions_that_march(monkeypatch, gpu):
    """On 9.0, of odd channels, in training or not, in either layout: if they do (`ODD`)."""
    monkeypatch.setattr(dispatch, "PLAIN", (Image,))
    monkeypatch.setattr(evidence, "table", lambda device: SimpleNamespace(records={}))
    why: list[str | None] = [None]
    monkeypatch.setattr(plans, "_why_not_compiled", lambda *given: why[0])

    def engine(dtype=torch.bfloat16, channels=21, taps=(3, 3, 3), more=21, lacks=None):
        image = Image(torch.bfloat16, size=2**25)
        image.shape = (1, channels, 2**25 // channels)
        same = Geometry((1,) * 3, ((1, 1),) * 3, (1,) * 3)
        product = plans.Product("conv_fprop", image.shape, more, taps, same, dtype)
        about = dispatch.Use(math.prod(taps), False, False, lambda: product)
        lacking = {"library": None, "gemm": lacks, "reference": None}
        return dispatch.choose(image, None, lambda: "", lacking, about).engine

    assert engine() == "gemm"
    assert engine(torch.float32) == engine(channels=24) == engine(taps=(3, 1, 3)) == "library"
    assert engine(more=48) == engine(lacks="no kernel") == "library"
    why[0] = "triton does not compile it well"
    assert engine() == "library"
    why[0], gpu[0] = None, (8, 0)
    assert engine() == "library"


def test_what_rules_are_told_of_a_block(monkeypatch):
    told, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *given: told.append(given[-1]) or choose(*given))
    block, image = ConvBlock(3, 4, 4), torch.randn(1, 4, 5, 5, 5)
    block(image)
    cassetta.explain(block.eval(), image.contiguous(memory_format=torch.channels_last_3d))
    with torch.no_grad():
        DownConv(3, 4, 4)(image)
    expected = (27, False, True), (27, True, False), (0, False, False)
    assert [one[:3] for one in told] == [*expected]
    product = told[0].product()
    assert product[:4] == ("conv_fprop", (1, 4, 5, 5, 5), 4, (3, 3, 3))
    assert product.dtype == torch.float32
    assert told[2].product is None
