"""What tests of several operators do in the same way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from speedrun.ops._dispatch import Unavailable
from train_helpers import FLOAT64_NOISE


@contextmanager
def skips_without_cuda_kernel() -> Iterator[None]:
    """Skips the test at a call that backend `cuda`, if forced, has no compiled kernel for."""
    try:
        yield
    except Unavailable as reason:
        if "no CUDA kernel" not in str(reason):
            raise
        pytest.skip(str(reason))


def run_with_gradients(function: Callable, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradient of each tensor where that of the output is `grad`."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def assert_same_with_gradients(
    found: Callable, expected: Callable, tensors: list[Tensor], grad: Tensor
) -> None:
    """Two float64 functions agree in value and in the gradient of every tensor."""
    results = [run_with_gradients(function, tensors, grad) for function in (found, expected)]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64_NOISE)


def assert_compiles(function: Callable, tensors: list[Tensor], grad: Tensor) -> None:
    """Compiled as one graph it is the same as eager, and other values don't compile it again."""
    compiled = torch.compile(function, fullgraph=True)
    assert_same_with_gradients(compiled, function, tensors, grad)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_with_gradients(compiled, function, [t + 1 for t in tensors], grad)


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance as a share of the expected tensor's norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
