"""`transpose` at the shapes of training, against torch's `.mT.contiguous()` and `add_`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from benchmarks.run import Benchmark
from speedrun import ops
from speedrun.ops.transpose import ADD_DTYPES, DTYPES
from speedrun.reference import transpose as reference
from tests.cases import TRANSPOSE_FULL, TRANSPOSE_SMALL, Case
from tests.numerics import assert_accurate, assert_same_bits, bits

MAX_CPU_ELEMENTS = 1 << 26  # larger cases are left out on a CPU


def make_inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and an output with values to add to."""
    shape = (*case.shape[:-2], case.shape[-1], case.shape[-2])
    x, out = (
        torch.randint(-100, 100, size, dtype=torch.int8, device=device).to(case.dtype)
        for size in (case.shape, shape)
    )
    return x, out


def check(case: Case, backend: str, device: torch.device) -> None:
    """AssertionError if the result of `backend` is not what the reference says."""
    x, out = make_inputs(case, device)
    before = out.clone()
    with ops.use_backend(backend):
        result = ops.transpose_add_(out, x) if case.add else ops.transpose(x)
    if not case.add:
        assert_same_bits(bits(result), bits(x).mT.contiguous())
        return
    same = reference.transpose_add_(before.clone(), x)
    assert_accurate(result, same, reference.transpose_add_(before.double(), x.double()))


def serving_backends(device: torch.device) -> list[str]:
    """Those of ours that can run here."""
    found = []
    for backend in ("cuda", "triton"):
        try:
            with ops.use_backend(backend):
                ops.transpose(torch.zeros(2, 2, device=device))
            found.append(backend)
        except RuntimeError as error:
            print(f"transpose {backend}: left out, {error}")
    return found


def hardware_cases() -> Iterator[Case]:
    """Every case in every type, then the full-size ones."""
    for case in TRANSPOSE_SMALL:
        for dtype in DTYPES:
            yield Case(f"{case.name} {dtype}", case.shape, dtype, case.why)
        for dtype in ADD_DTYPES:
            yield Case(f"{case.name} {dtype} add", case.shape, dtype, case.why, add=True)
    yield from TRANSPOSE_FULL


def benchmarks(device: torch.device) -> Iterator[Benchmark]:
    ours = serving_backends(device) if device.type == "cuda" else []
    for case in TRANSPOSE_FULL:
        num_elements = math.prod(case.shape)
        if device.type == "cpu" and num_elements > MAX_CPU_ELEMENTS:
            print(f"transpose {case.name}: left out, {num_elements:,} elements are many for a CPU")
            continue
        x, out = make_inputs(case, device)
        baseline = reference.transpose_add_ if case.add else reference.transpose
        arguments = (out, x) if case.add else (x,)
        functions = {"torch": functools.partial(baseline, *arguments)}
        operators = torch.ops.speedrun
        operator = operators.transpose_add_ if case.add else operators.transpose
        for backend in ours:
            functions[backend] = functools.partial(operator, *arguments, backend)
        yield Benchmark(
            "transpose",
            case.name,
            functions,
            num_bytes=(3 if case.add else 2) * num_elements * case.dtype.itemsize,
            check=functools.partial(check, case, device=device),
        )
