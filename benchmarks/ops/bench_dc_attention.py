"""Dynamically composed attention with all gradients, against torch's operators in turn (eager) and
Inductor on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.dc_attention import DcPlan, dc_attention, plan_dc_attention
from speedrun.reference import dc_attention as reference
from tests.cases import DC_ATTENTION_FULL, DC_ATTENTION_SMALL, DcCase
from tests.numerics import assert_accurate

SCALE = 0.1


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also every small case."""
    cases = DC_ATTENTION_FULL + (DC_ATTENTION_SMALL if shapes == "all" else ())
    for case in cases:
        tokens = case.cu_seqlens[-1]
        num_bytes = 8 * tokens * case.heads * 4 * case.window  # scores of the reference, float64
        if too_large_for_cpu(device, num_bytes):
            print(f"dc_attention {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield benchmark_of(case, device)


def with_gradients(
    function: Callable, tensors: list[Tensor], plan: DcPlan, dy: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """The output and the gradients of all tensors."""

    def call() -> tuple[Tensor, ...]:
        out = function(*tensors, plan, SCALE)
        return out.detach(), *torch.autograd.grad(out, tensors, dy)

    return call


def benchmark_of(case: DcCase, device: torch.device) -> Benchmark:
    tokens, heads = case.cu_seqlens[-1], case.heads
    sizes = [(case.key_dim,), (case.key_dim,), (case.value_dim,), (), ()]
    tensors = [
        torch.randn(tokens, heads, *size, device=device).bfloat16().requires_grad_()
        for size in sizes
    ]
    starts = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    plan = plan_dc_attention(starts, tokens, case.window)
    dy = torch.randn_like(tensors[2]).detach()

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        wide = [t.detach().double().requires_grad_() for t in tensors]
        same = with_gradients(reference.dc_attention, tensors, plan, dy)()
        exact = with_gradients(reference.dc_attention, wide, plan, dy.double())()
        for results in zip(result, same, exact, strict=True):
            assert_accurate(*results)

    # Scores and values of what is seen, at most; once forward and twice for the gradients.
    pairs = tokens * case.window
    return Benchmark(
        stem="dc_attention",
        case=f"{case.name} with gradients",
        call=with_gradients(dc_attention, tensors, plan, dy),
        check=check,
        num_bytes=2 * (2 * sum(t.numel() for t in tensors) + 2 * dy.numel()),
        num_flops={"bf16": 3 * 2 * pairs * heads * (case.key_dim + case.value_dim)},
        peers={
            "eager": lambda: with_gradients(reference.dc_attention, tensors, plan, dy),
            "inductor": lambda: with_gradients(
                torch.compile(reference.dc_attention, dynamic=False), tensors, plan, dy
            ),
        },
    )
