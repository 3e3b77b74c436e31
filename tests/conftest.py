"""Every test begins at the same random state, leaves the requested backend as it found it, and
has a folder of its own for what is measured.

Without a GPU, kernels are interpreted on the CPU; with `--simulate 80` (or 90) they are compiled
for such a GPU and run in the simulator of its PTX (`ptxsim`). Triton decides which when the kernels
are imported, so they are imported here; afterwards the environment is as users have it, and the
fixture `kernels` asks again.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import os

import pytest
import torch

from cassetta.kernels import boxes, dispatch, engines, evidence, plans
from cassetta.recording import recordings

pytest_plugins = ["budget"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RUNNER = "gpu" if DEVICE == "cuda" else "interpreter"
"""Who runs kernels in tests; "simulator" by --simulate."""


def pytest_addoption(parser):
    parser.addoption(
        "--simulate", type=int, choices=(80, 90), help="run kernels as on such a GPU, on the CPU"
    )


def pytest_configure(config):
    global RUNNER
    config.addinivalue_line("markers", "simulated: runs in the simulator only (--simulate)")
    arch = config.getoption("--simulate")
    if arch is not None:
        RUNNER = "simulator"
        _simulate(arch)
    elif HAS_TRITON and DEVICE == "cpu":
        os.environ[dispatch.INTERPRET] = "1"
        dispatch._triton_passes()
        del os.environ[dispatch.INTERPRET]
        _hasten_interpreter()


def _hasten_interpreter():
    """Spare what it does in vain, more than half of its time.

    For each sum and product of integers it computes whether it overflows, and, without its option
    `debug`, forgets the answer. At each call of a function within a kernel it replaces what the
    function's module imports of `triton.language`; it does not take that back, so once is enough.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replaced = set()

    def call(function, *args, **named):
        if function.fn.__module__ not in replaced:
            replaced.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call


def _simulate(arch):
    """Kernels of this process are compiled for sm_`arch`, and run in the simulator, on the CPU."""
    import ptxsim

    try:
        ptxsim.install(("cuda", arch, 32))
    except ptxsim.UnsupportedError as error:
        raise pytest.UsageError(f"--simulate {arch}: {error}") from None
    dispatch._triton_passes()
    copied = boxes.are_copied
    boxes.are_copied = lambda device: arch >= 90 if device.type == "cpu" else copied(device)


def pytest_collection_modifyitems(config, items):
    """Where kernels are simulated, nothing runs but what runs kernels."""
    if config.getoption("--simulate") is None:
        for item in items:
            if item.get_closest_marker("simulated"):
                item.add_marker(pytest.mark.skip("runs in the simulator: --simulate 80 or 90"))
        return
    wanted = [i for i in items if i.get_closest_marker("simulated") or "kernels" in i.fixturenames]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch, tmp_path_factory):
    torch.manual_seed(0)
    cache = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"  # made if it is needed
    monkeypatch.setenv(evidence.CACHE, str(cache))
    monkeypatch.setattr(dispatch, "_requested", None)
    monkeypatch.setattr(recordings, "_known", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.delenv(dispatch.INTERPRET, raising=False)


@pytest.fixture
def kernels(monkeypatch):
    """The device on which kernels run in this test: a GPU, or the CPU, interpreted or simulated.

    What `torch.empty` and the like return holds NaN, so that an element that nobody writes is seen.
    Simulated, what is copied ahead has its address inside a tensor even if it is not used, and no
    register is set that a product may still read.
    """
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv(dispatch.INTERPRET, "1")
    if RUNNER == "simulator":
        import ptxsim

        monkeypatch.setattr(ptxsim.Options, "copies", True)
        monkeypatch.setattr(ptxsim.Options, "factors", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    with dispatch.use_backend("triton"):
        yield torch.device(DEVICE)


@pytest.fixture(params=[*engines.ENGINES])
def engine(request):
    """Which engine runs every fused block in this test."""
    with dispatch.use_engine(request.param), large_tiles():
        yield request.param


def large_tiles():
    """The interpreter takes its time per step, whatever its size, and no GPU has to hold it."""
    large = plans.Plan(2**16), plans.GemmPlan(4096, 128, 128), plans.WgradPlan(512, 512, 2048)
    return plans.use_plan(*(large if RUNNER == "interpreter" else ()))


def need_boxes():
    """Skip the test if kernels are interpreted by triton 3.4, whose boxes want strides of 16
    elements, where GPUs want 16 bytes."""
    if RUNNER == "interpreter":
        from triton.runtime import interpreter

        if "itemsize" not in inspect.getsource(interpreter.TensorDescHandle.validate):
            pytest.skip("this interpreter takes the strides of boxes for bytes")


def _poisoned(make):
    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor:
            return out  # of a graph, in which AOTAutograd takes no such change
        with torch.no_grad():  # an old torch's checkpoint makes a leaf that needs a gradient
            return out.fill_(float("nan")) if out.is_floating_point() else out

    return poisoned
