"""`transpose` and `transpose_add_` against the reference, Inductor and modded-nanogpt."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.ops.transpose import ADD_DTYPES, DTYPES
from speedrun.reference import transpose as reference
from tests.cases import TRANSPOSE_FULL, TRANSPOSE_SMALL, Case
from tests.numerics import assert_accurate, assert_same_bits, bits


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also every small case in every type."""
    for case in TRANSPOSE_FULL if shapes == "record" else all_cases():
        num_bytes = (3 if case.add else 2) * math.prod(case.shape) * case.dtype.itemsize
        if too_large_for_cpu(device, num_bytes):
            print(f"transpose {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield add_benchmark(case, device) if case.add else move_benchmark(case, device)


def all_cases() -> Iterator[Case]:
    yield from TRANSPOSE_FULL
    for case in TRANSPOSE_SMALL:
        for dtype in DTYPES:
            yield Case(f"{case.name} {dtype}", case.shape, dtype, case.why)
        for dtype in ADD_DTYPES:
            yield Case(f"{case.name} {dtype} add", case.shape, dtype, case.why, add=True)


def random_values(shape: tuple[int, ...], case: Case, device: torch.device) -> torch.Tensor:
    return torch.randint(-100, 100, shape, dtype=torch.int8, device=device).to(case.dtype)


def move_benchmark(case: Case, device: torch.device) -> Benchmark:
    x = random_values(case.shape, case, device)

    def check(name: str, result: torch.Tensor) -> None:
        assert_same_bits(bits(result), bits(x).mT.contiguous())

    def modded_nanogpt() -> Callable[[], torch.Tensor]:
        copy = peers.modded_nanogpt("transpose_copy")
        if x.dim() != 2:
            raise peers.Missing("it takes no batches")
        out = torch.empty_like(x.mT, memory_format=torch.contiguous_format)

        def call() -> torch.Tensor:
            copy(x, out)
            return out

        return call

    return Benchmark(
        stem="transpose",
        case=case.name,
        call=lambda: ops.transpose(x),
        check=check,
        num_bytes=2 * x.numel() * x.element_size(),
        peers={
            "inductor": lambda: peers.inductor(reference.transpose, x),
            "modded-nanogpt": modded_nanogpt,
        },
    )


def add_benchmark(case: Case, device: torch.device) -> Benchmark:
    x = random_values(case.shape, case, device)
    before = random_values(x.mT.shape, case, device)
    out = before.clone()

    def check(name: str, result: torch.Tensor) -> None:
        same = reference.transpose_add_(before.clone(), x)
        assert_accurate(out, same, reference.transpose_add_(before.double(), x.double()))

    return Benchmark(
        stem="transpose",
        case=case.name,
        call=lambda: ops.transpose_add_(out, x),
        check=check,
        num_bytes=3 * x.numel() * x.element_size(),
        peers={
            "inductor": lambda: peers.inductor(reference.transpose_add_, out, x),
            "modded-nanogpt": lambda: functools.partial(
                peers.modded_nanogpt("transpose_add"), x, out
            ),
        },
        reset=lambda: out.copy_(before),
    )
