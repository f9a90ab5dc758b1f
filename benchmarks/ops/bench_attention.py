"""Attention over documents with sliding windows, forward and with gradients, against the other
backends that are installed: FlashAttention 2, 3 and 4, and FlexAttention, behind our front door;
for short windows also our own strip form of the gradients, which bench_attention_strip.py judges.

Left out of these times: the plan of a batch, which ten layers share.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.ops._attention_backends import STRIP, STRIP_WINDOW
from speedrun.ops._dispatch import Unavailable, forced_backend
from speedrun.ops.attention import AttentionPlan, attention, plan_attention
from tests.cases import ATTENTION_FULL, ATTENTION_SMALL, AttentionCase
from tests.numerics import assert_accurate, attention_results

PEERS = ("fa3", "fa4", "fa2", "flex")
NUM_CHECKED = 2048  # tokens, or those of the first documents that are as many


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the windows of RECIPE's stages and of validation; "all": also two small cases."""
    for case in ATTENTION_FULL if shapes == "record" else ATTENTION_FULL + ATTENTION_SMALL:
        for backward in (False, True) if case.backward else (False,):
            flops = num_flops(case, backward)
            if too_large_for_cpu(device, 0, flops):
                print(f"attention {case.name}: left out, {flops:.3g} operations for a CPU")
                continue
            yield make(case, backward, device)


def num_flops(case: AttentionCase, backward: bool) -> float:
    """Of the products that the pairs of a query and a key that it sees need, and no others."""
    pairs = 0
    for start, end in itertools.pairwise(case.starts()):
        full = max(0, end - start - case.window)  # queries that see window + 1 keys
        rest = end - start - full  # the first ones see 1, 2, …
        pairs += full * (case.window + 1) + rest * (rest + 1) // 2
    K, E = case.head_dims
    heads = case.heads // 2 if case.paired else case.heads
    return 2 * heads * pairs * (K + E + (3 * K + 2 * E if backward else 0))


def make(case: AttentionCase, backward: bool, device: torch.device) -> Benchmark:
    starts, (K, E) = case.starts(), case.head_dims
    T, H = starts[-1], case.heads // 2 if case.paired else case.heads
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in itertools.pairwise(starts))
    scale = K**-0.5

    def random(width: int) -> Tensor:
        return torch.randn(T, H, width, dtype=torch.bfloat16, device=device)

    q, k, v, dout = random(K), random(K), random(E), random(E)
    leaves = [t.requires_grad_(backward) for t in (q, k, v)]

    @functools.cache
    def plan(backend: str | None) -> AttentionPlan:
        return plan_attention(cu_seqlens, T, case.window, q.dtype, (K, E), longest)

    def call() -> tuple[Tensor, ...]:
        out = attention(q, k, v, plan(forced_backend("attention")), scale)
        return (out, *torch.autograd.grad(out, leaves, dout)) if backward else (out,)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        """The first documents, and the last, behind which the padding is: they are alone."""
        ends = sorted(set(starts))
        head = next(end for end in ends if end >= min(NUM_CHECKED, T))
        for first, end in {(0, head), (ends[-2], T)}:
            inside = cu_seqlens.clamp(first, end) - first
            parts = [t[first:end] for t in (q, k, v, dout)]
            same, exact = attention_results(*parts, inside, case.window, scale)
            for found, reference, ref64 in zip(result, same, exact, strict=False):
                assert_accurate(found[first:end], reference, ref64)

    def peer(name: str) -> Callable[[], tuple[Tensor, ...]]:
        peers.package("torch")  # refused where no peers are wanted

        def on_peer() -> tuple[Tensor, ...]:
            with ops.use_backend(name, "attention"):
                return call()

        try:
            with ops.use_backend(name, "attention"):
                plan(name)
        except Unavailable as reason:
            raise peers.Missing(str(reason)) from reason
        return on_peer

    def strip() -> Callable[[], tuple[Tensor, ...]]:
        on_triton = peer("triton")

        def on_strip() -> tuple[Tensor, ...]:
            with ops.use_backend("triton", STRIP):
                return on_triton()

        return on_strip

    peer_makers = {name: functools.partial(peer, name) for name in PEERS}
    if backward and case.window <= STRIP_WINDOW:
        peer_makers["strip"] = strip
    num_bytes = 4 * T * H * (K + E)  # q, k, v, out of two bytes
    if backward:
        num_bytes += 8 * T * H * (K + E)  # the same and dout again, and gradients
    return Benchmark(
        stem="attention",
        case=f"{case.name} {'forward+backward' if backward else 'forward'}",
        call=call,
        check=check,
        num_bytes=num_bytes,
        num_flops={"bf16": num_flops(case, backward)},
        peers=peer_makers,
    )
