"""Streams and CUDA graphs on the CPU: what was called while a graph was captured is called again.

Into the same memory, of which none is used twice: so it shows what a replay reads and writes, and
neither what CUDA forbids in a capture, nor what a capture frees too early.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """The only stream, in which all work is already done."""

    cuda_stream = 0

    def wait_stream(self, other):
        pass


class Graph:
    """A CUDA graph: operators, with the tensors that they read and wrote."""

    def __init__(self):
        self.calls = []

    def pool(self):
        return self

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                again = tree_leaves(func(*args, **kwargs))
                for own, new in zip(tree_leaves(outputs), again, strict=True):
                    if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                        own.copy_(new)


class _Capture(TorchDispatchMode):
    """Notes what is called; where memory is made, and moved, is no work of a GPU."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.name().startswith(("aten::empty", "aten::new_empty", "aten::set_")):
            self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def current(stream):
    """Run a `with` block, as `torch.cuda.stream` does."""
    yield


@contextlib.contextmanager
def capture(graph, pool=None, stream=None):
    """Run a `with` block, as `torch.cuda.graph` does; a real one would not compute anything."""
    assert not graph.calls
    with _Capture(graph):
        yield


def installed(patch):
    """Put all of it in place of CUDA's, by `patch(module, name, value)`."""
    cuda = torch.cuda
    patch(cuda, "Stream", Stream)
    patch(cuda, "CUDAGraph", Graph)
    patch(cuda, "stream", current)
    patch(cuda, "graph", capture)
    patch(cuda, "current_stream", lambda device=None: Stream())
