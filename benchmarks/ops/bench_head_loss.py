"""The head, loss and both gradients, in FP8, against modded-nanogpt's, and against others in bf16.

Our other forms are beside it, on the default backend: FP8 without logits in memory, and in bf16
rows in chunks, and the plain expression.

A peer without this loss computes its own, which is named: one target a position, no prefix target;
Liger's and cut-cross-entropy's softcap is 23·tanh(z/23), quack has none. So they do less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.ops.bench_softcap_ce import SCALE, A, B, C, next_tokens
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.head_loss import head_loss, quantize_head
from speedrun.reference import softcap_ce as reference
from tests.cases import SOFTCAP_CE_FULL, SOFTCAP_CE_SMALL, CrossEntropyCase

DIM = 768
CHECKED_AT_ONCE = 1024  # rows of float64 logits
# Of ‖found − exact‖/‖exact‖; e5m2 rounds by 2^-3 at most. benchmarks.head_error has the usual ones.
LARGEST_ERROR = {"fp8": 2**-3, "bf16": 0.02}
BF16_FORMS = ("chunked, bf16", "plain, bf16", "inductor")
OTHER_LOSSES = {
    "liger (tanh softcap, 1 target)": peers.liger_linear_cross_entropy,
    "quack (no softcap, 1 target)": peers.quack_linear_cross_entropy,
    "cut_cross_entropy (tanh softcap, 1 target)": peers.cut_cross_entropy,
}


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also small ones, those that FP8 GEMMs take."""
    small = [case for case in SOFTCAP_CE_SMALL if case.rows % 16 == 0] if shapes == "all" else []
    for case in (*SOFTCAP_CE_FULL, *small):
        num_flops = 3 * 2.0 * case.rows * DIM * case.cols
        if too_large_for_cpu(device, 4 * case.rows * case.cols, num_flops):
            print(f"head_loss {case.name}: left out, {num_flops:.0e} FLOP are many for a CPU")
            continue
        yield make(case, num_flops, device)


def make(case: CrossEntropyCase, num_flops: float, device: torch.device) -> Benchmark:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    x = torch.nn.functional.rms_norm(random(case.rows, DIM), (DIM,)).bfloat16().requires_grad_()
    w = random(DIM, case.cols).mul_(0.15).bfloat16().requires_grad_()
    tokens = torch.randint(case.cols, (case.rows,), device=device)
    weights = 0.5 ** torch.arange(case.num_targets, device=device, dtype=torch.float32)
    prefixes = torch.randint(-1, case.cols, (case.rows,), device=device) if case.prefix else None
    prefix_weight = torch.tensor(0.25 if case.prefix else 0.0, device=device)
    targets = next_tokens(tokens, case.num_targets)
    loss = reference.Loss(targets, weights, A, B, C, prefixes, prefix_weight, True, True)
    options = loss._asdict()
    if prefixes is None:
        options["prefix_weight"] = 0.0
    fp8 = quantize_head(w.detach(), form="fused")  # all copies: as in training, made beforehand

    def with_gradients(losses: Tensor) -> tuple[Tensor, ...]:
        return losses.detach(), *torch.autograd.grad(losses.sum(), (x, w))

    def plain(x: Tensor, w: Tensor, **options: object) -> Tensor:
        return reference.softcap_ce(x @ w, **options)

    def form(losses: Callable[..., Tensor], **switches: object) -> Callable:
        return lambda: lambda: with_gradients(losses(x, w, **{**options, **switches}))

    def inductor() -> Callable[[], tuple[Tensor, ...]]:
        compiled = peers.inductor(partial(plain, **options), x, w).func
        return lambda: with_gradients(compiled(x, w))

    def modded_nanogpt() -> Callable[[], tuple[Tensor, ...]]:
        head = peers.modded_nanogpt_head(tokens, loss, fp8, SCALE)
        return lambda: with_gradients(head(x, w))

    def other(peer: Callable) -> Callable[[], Callable[[], tuple[Tensor, ...]]]:
        def make() -> Callable[[], tuple[Tensor, ...]]:
            head, w_VD = peer(tokens, A), w.detach().mT.contiguous().requires_grad_()

            def call() -> tuple[Tensor, ...]:
                losses = head(x, w_VD)
                return losses.detach(), *torch.autograd.grad(losses.sum(), (x, w_VD))

            return call

        return make

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        if name in OTHER_LOSSES:
            assert all(t.isfinite().all() for t in result), "not finite"
            return
        exact_options = {**options, "round_sigmoid": False, "rows": CHECKED_AT_ONCE}
        inputs = (x.detach().double(), w.detach().double())
        exact = reference.linear_softcap_ce_grad(*inputs, **exact_options)
        limit = LARGEST_ERROR["bf16" if name in BF16_FORMS else "fp8"]
        for what, found, ref64 in zip(("loss", "dX", "dW"), result, exact, strict=True):
            error = ((found.double() - ref64).norm() / ref64.norm()).item()
            assert error <= limit, f"{what} is {error:.1%} off"

    return Benchmark(
        stem="head_loss",
        case=case.name,
        call=lambda: with_gradients(head_loss(x, w, **options, fp8=fp8)),
        check=check,
        num_bytes=4 * x.numel() + 4 * w.numel(),  # x and dX, W twice in FP8 and dW
        num_flops={"fp8": num_flops},
        peers={
            "no logits in memory": form(
                head_loss, fp8=fp8, form="fused", count_missing_targets=False, round_sigmoid=False
            ),
            "chunked, bf16": form(head_loss),
            "plain, bf16": form(plain),
            "modded_nanogpt": modded_nanogpt,
            "inductor": inductor,
            **{name: other(peer) for name, peer in OTHER_LOSSES.items()},
        },
        peak=True,
    )
