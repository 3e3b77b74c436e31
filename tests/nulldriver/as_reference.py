"""A plugin of pytest that runs the tests of a GPU on the stand-in, and is loaded after `standin`.

Kernels are launched, and the reference computes what they should have written. A test that passes
shows that it, and the host's code under it, would run to the end on a GPU; it shows nothing of a
kernel. It cannot see a tensor that was left on the CPU, for all tensors name a GPU as their device;
streams do nothing here, graphs call again what they captured (`replayed`), gloo stands for NCCL,
and inductor generates no code.
"""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from cassetta.kernels import dispatch, reference

import replayed

SMALLER = {"SCALE": 4, "TIMES": 2, "STEPS": 2}
"""Constants of the tests of a GPU, which are larger there."""


def answered():
    """Return Triton's passes, each of which is launched, and returns the reference's results."""
    passes = vars(dispatch._triton_passes())
    return SimpleNamespace(**{name: _answered(name, kernel) for name, kernel in passes.items()})


def _answered(name, kernel):

    def run(*args, **kwargs):
        found = kernel(*args, **kwargs)
        truth = getattr(reference, name)(*args, **kwargs)
        pairs = (
            [(found, truth)] if isinstance(found, torch.Tensor) else zip(found, truth, strict=True)
        )
        for one, other in pairs:
            assert (one is None) == (other is None), name
            if one is not None:
                assert (one.shape, one.dtype, one.stride()) == (
                    other.shape, other.dtype, other.stride()
                ), name  # fmt: skip
                one.copy_(other)
        return found

    return run


class Autocast(torch.autocast):
    """Autocast for a GPU that also rounds the CPU's tensors, for they pass for the GPU's."""

    def __enter__(self):
        self.rest = contextlib.ExitStack()
        if self.device == "cuda":
            self.rest.enter_context(_autocast("cpu", self.fast_dtype, self._enabled))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.rest.close()


def compiled(net, **options):
    """Compile a network by all of `torch.compile` but inductor, which would generate for a GPU."""
    options.pop("mode", None)  # of inductor
    out = _compile(net, **options | {"backend": "aot_eager_decomp_partition"})
    run = out.forward

    def forward(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", _autocast)  # which dynamo knows
            return run(*args)

    out.forward = forward
    return out


_autocast, _compile = torch.autocast, torch.compile


def pytest_configure():
    cuda = torch.cuda
    replayed.installed(setattr)
    cuda._sleep = lambda cycles: None
    cuda.mem_get_info = lambda device=None: (2**33, 2**36)
    torch.compile, torch.autocast = compiled, Autocast
    dispatch.SMALL = 0
    distributed = torch.distributed
    distributed.init_process_group = functools.partial(_gloo, distributed.init_process_group)
    passes = answered()
    dispatch._triton_passes = lambda: passes


def pytest_collection_modifyitems(config, items):
    """Keep, of each test, one for each value of each parameter, and make them smaller."""
    seen, few = set(), []
    for item in items:
        for name, small in SMALLER.items():
            if hasattr(item.module, name):
                setattr(item.module, name, small)
        params = item.callspec.params if hasattr(item, "callspec") else {}
        new = {item.obj, *((item.obj, name, repr(value)) for name, value in params.items())}
        if not new <= seen:
            seen |= new
            few.append(item)
        if "memory" in item.name:
            item.add_marker(pytest.mark.skip("the stand-in counts no memory"))
    config.hook.pytest_deselected(items=[item for item in items if item not in few])
    items[:] = few


def _gloo(begin, backend, **options):
    begin("gloo", **options)
