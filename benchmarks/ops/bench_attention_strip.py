"""The strip form of `attention`'s gradients against the plain one, forward pass included.

Asked for `triton` it is the strip form, for `torch` the plain form of our Triton kernels, which it
must beat to become the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.ops.bench_attention import make, num_flops
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.ops._attention_backends import STRIP, STRIP_WINDOW
from speedrun.ops._dispatch import forced_backend
from tests.cases import ATTENTION_FULL, ATTENTION_SMALL


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """Those cases of `attention` that it serves; "all": also a small one."""
    for case in ATTENTION_FULL if shapes == "record" else ATTENTION_FULL + ATTENTION_SMALL:
        left_out = too_large_for_cpu(device, 0, num_flops(case, backward=True))
        if case.backward and case.window <= STRIP_WINDOW and not left_out:
            benchmark = make(case, True, device)
            call = on_triton(benchmark.call)
            yield dataclasses.replace(benchmark, stem=STRIP, call=call, peers={})


def on_triton(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """By our Triton kernels, in the form that this operator's backend names."""

    def function() -> tuple[Tensor, ...]:
        form = forced_backend(STRIP)
        with ops.use_backend("triton", "attention"), ops.use_backend(form, STRIP):
            return call()

    return function
