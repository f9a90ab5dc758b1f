"""Mixes of residual streams with their RMS norm, forward alone and with all gradients, against
torch's operators in turn (eager) and Inductor on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.residual_mix import NORM_EPS, residual_mix_norm
from speedrun.reference import residual_mix as reference
from tests.cases import RESIDUAL_MIX_FULL, RESIDUAL_MIX_SMALL, MixCase
from tests.numerics import assert_accurate


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also every small case."""
    cases = RESIDUAL_MIX_FULL + (RESIDUAL_MIX_SMALL if shapes == "all" else ())
    for case in cases:
        num_bytes = 2 * case.tokens * sum(case.widths)
        if too_large_for_cpu(device, 4 * num_bytes):
            print(f"residual_mix {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield from benchmarks_of(case, device)


def as_terms(streams: list[Tensor], factors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(factors, streams, strict=True))


def mix(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """x and its norm, of streams and then factors."""
    half = len(tensors) // 2
    return residual_mix_norm(as_terms(tensors[:half], tensors[half:]))[:2]


def reference_mix(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    half = len(tensors) // 2
    terms = as_terms(tensors[:half], tensors[half:])
    return reference.residual_mix_norm(terms, NORM_EPS, False)[:2]


def with_gradients(
    function: Callable, tensors: list[Tensor], grads: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """Outputs and the gradients of all tensors."""

    def call() -> tuple[Tensor, ...]:
        outs = function(*tensors)
        return *outs, *torch.autograd.grad(outs, tensors, grads)

    return call


def benchmarks_of(case: MixCase, device: torch.device) -> Iterator[Benchmark]:
    """bf16 streams; two factors for all tokens, as r and p are, and the others one a token."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    streams = [random(case.tokens, width) for width in case.widths]
    factors = [random(*(() if i < 2 else (case.tokens, 1))) for i in range(len(streams))]
    tensors = [*streams, *factors]
    grads = [torch.randn_like(streams[0]) for _ in range(2)]
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        exact_grads = [g.double() for g in grads]
        same = with_gradients(reference_mix, tensors, grads)()
        exact = with_gradients(reference_mix, exact_tensors, exact_grads)()
        for found, one, other in zip(result, same, exact, strict=False):
            assert_accurate(found.detach(), one.detach(), other.detach())

    # Forward: the streams, x and its norm. Backward: both gradients, x, the streams, and theirs.
    forward_bytes = 2 * sum(t.numel() for t in (*streams, *grads))
    backward_bytes = 2 * (3 * grads[0].numel() + 2 * sum(t.numel() for t in streams))
    # Under no_grad, or a graph would be kept of every call.
    yield Benchmark(
        stem="residual_mix",
        case=f"{case.name} forward",
        call=lambda: torch.no_grad()(mix)(*tensors),
        check=check,
        num_bytes=forward_bytes,
        peers={
            "eager": lambda: lambda: torch.no_grad()(reference_mix)(*tensors),
            "inductor": lambda: peers.inductor(torch.no_grad()(reference_mix), *tensors),
        },
    )
    yield Benchmark(
        stem="residual_mix",
        case=f"{case.name} with gradients",
        call=with_gradients(mix, tensors, grads),
        check=check,
        num_bytes=forward_bytes + backward_bytes,
        peers={
            "eager": lambda: with_gradients(reference_mix, tensors, grads),
            "inductor": lambda: with_gradients(
                torch.compile(reference_mix, dynamic=False), tensors, grads
            ),
        },
    )
