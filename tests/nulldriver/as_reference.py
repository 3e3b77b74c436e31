"""Tests of a GPU on the stand-in: kernels are launched, and what they should write, the reference
does. So nothing is proven of a kernel, and that a test, and the host, would come to their end.

What it cannot see: a tensor that was left on the CPU, for all say that they are on a GPU; streams
and graphs, which do nothing; NCCL, which is gloo; what inductor generates.

A plugin of pytest, beside `standin`, which is loaded before.
"""

import contextlib
import functools

import pytest
import torch

from cassetta.kernels import dispatch, reference

SMALLER = {"SCALE": 4, "TIMES": 2, "STEPS": 2}
"""What tests of a GPU have larger."""


class Stream:
    """Of which there is one, and nothing in it is late."""

    cuda_stream = 0

    def wait_stream(self, other):
        pass


class Graph:
    """Of what has run already."""

    def replay(self):
        pass


@contextlib.contextmanager
def current(stream_or_graph):
    yield


def written(name, kernel):
    """The pass, whose results are those of the reference."""

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
    """Of a GPU's tensors, which are the CPU's."""

    def __enter__(self):
        self.rest = contextlib.ExitStack()
        if self.device == "cuda":
            self.rest.enter_context(_autocast("cpu", self.fast_dtype, self._enabled))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.rest.close()


def compiled(net, **options):
    """By all of `torch.compile` but the generation of code, for which there is no GPU."""
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
    cuda.Stream, cuda.CUDAGraph, cuda.stream, cuda.graph = Stream, Graph, current, current
    cuda.current_stream = lambda device=None: Stream()
    cuda._sleep = lambda cycles: None
    cuda.mem_get_info = lambda device=None: (2**33, 2**36)
    torch.compile, torch.autocast = compiled, Autocast
    dispatch.SMALL = 0
    distributed = torch.distributed
    distributed.init_process_group = functools.partial(_gloo, distributed.init_process_group)
    passes = vars(dispatch._triton_passes())
    passes |= {name: written(name, kernel) for name, kernel in passes.items()}


def pytest_collection_modifyitems(config, items):
    """With each value of each parameter once, on small images, a few times."""
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
