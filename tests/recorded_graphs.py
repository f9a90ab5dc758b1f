"""CUDA graphs for the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """A CUDA graph for the CPU: the calls of a step, replayed on the very same tensors.

    As with a graph, whatever the host computed is a constant of it, and it can't ask the device.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # which would object to tensors written anew
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class RecordedGraphs:
    """In the place of StepGraphs."""

    def __init__(self):
        self.graphs = {}
        self.replayed = []

    def run(self, kind, work):
        if kind not in self.graphs:
            with Recording() as self.graphs[kind]:
                work()
        else:
            self.graphs[kind].replay()
            self.replayed.append(kind)
