"""The parts of the head without logits in memory: its product, and what targets add to it.

Peer `fp8_matmul and softcap_ce` is what the product takes the place of: logits in bf16, then losses
and both layouts of their gradient. bench_head_loss.py has the whole head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.ops.bench_softcap_ce import SCALE, A, B, C, next_tokens
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.fp8_matmul import fp8_matmul
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_logits import (
    HeadLogits,
    add_target_columns_,
    add_target_rows_,
    head_logits,
    target_terms_,
)
from speedrun.ops.softcap_ce import softcap_ce_fp8
from speedrun.reference import head_logits as reference
from tests.cases import SOFTCAP_CE_FULL, CrossEntropyCase
from tests.numerics import bits

DIM = 768
CHECKED_ROWS = 256  # a row stands for itself
SMALL = CrossEntropyCase("small", 272, 400, 3, True, "edges of tiles")


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also a small one."""
    for case in SOFTCAP_CE_FULL if shapes == "record" else (*SOFTCAP_CE_FULL, SMALL):
        num_bytes, num_flops = 2 * case.rows * case.cols, 2.0 * case.rows * DIM * case.cols
        if too_large_for_cpu(device, num_bytes, num_flops):
            print(f"head_logits {case.name}: left out, {num_flops:.0e} FLOP are many for a CPU")
            continue
        yield from of_case(case, num_flops, device)


def of_case(case: CrossEntropyCase, num_flops: float, device: torch.device) -> Iterator[Benchmark]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, w = random(case.rows, DIM), random(case.cols, DIM) * 0.15
    scales = [torch.tensor(of, device=device) for of in (4 / 448, 0.8 / 448)]
    (x_f8, *_), (w_f8, *_) = (fp8_quantize(t, s) for t, s in zip((x, w), scales, strict=True))
    operands, softcap = (x_f8, w_f8, *scales), (A, B, C)
    tokens = torch.randint(case.cols, (case.rows,), device=device)
    targets = next_tokens(tokens, case.num_targets)
    weights = 0.5 ** torch.arange(case.num_targets, device=device, dtype=torch.float32)
    rows, cols = min(case.rows, CHECKED_ROWS), case.cols

    def check_product(name: str, result: HeadLogits) -> None:
        if name not in ("cuda", "triton", "torch"):
            return  # other numbers; bench_softcap_ce.py checks them
        same = reference.head_logits(x_f8[:rows], *operands[1:], *softcap, rows=rows)
        torch.testing.assert_close(result.sums_BT[:, :rows], same.sums_BT, rtol=0.02, atol=0)
        found, expected = result.g_TV[:rows].double(), same.g_TV.double()
        assert (found - expected).norm() <= 0.05 * expected.norm(), "g is another"
        assert torch.equal(bits(result.g_VT), bits(result.g_TV).mT), "not its transpose"

    def logits_in_memory() -> Callable[[], object]:
        scale = torch.tensor(SCALE, device=device)

        def call() -> object:
            z = fp8_matmul(*operands, fast_accum=True)
            return softcap_ce_fp8(z, targets, weights, *softcap, scale, transposed=True)

        return call

    yield Benchmark(
        stem="head_logits",
        case=case.name,
        call=lambda: head_logits(*operands, *softcap),
        check=check_product,
        num_bytes=2 * case.rows * cols + DIM * (case.rows + cols),
        num_flops={"fp8": num_flops},
        peers={"fp8_matmul and softcap_ce": logits_in_memory},
        peak=True,
    )

    logits = head_logits(*operands, *softcap)
    dx, dw = random(case.rows, DIM), torch.zeros(DIM, cols, device=device)
    before = dx.clone()

    def reset() -> None:
        dx.copy_(before)
        dw.zero_()

    def of_targets() -> tuple[Tensor, ...]:
        terms = target_terms_(logits, x, w, *operands, targets, weights, *softcap)
        sides = terms.sides_TM
        rows_of_w = add_target_rows_(dx, w, targets, sides)
        return *terms, rows_of_w, add_target_columns_(dw, x, targets, sides)

    def check_targets(_: str, result: tuple[Tensor, ...]) -> None:
        given = (logits, x, w, *operands, targets, weights, *softcap)
        terms = reference.target_terms_(*given)
        same = reference.add_target_rows_(before.clone(), w, targets, terms.sides_TM)
        zeros = torch.zeros_like(dw)
        expected = (*terms, same, reference.add_target_columns_(zeros, x, targets, terms.sides_TM))
        for found, value in zip(result, expected, strict=True):
            assert (found.double() - value.double()).norm() <= 0.01 * value.double().norm()

    yield Benchmark(
        stem="head_logits",
        case=f"{case.name}_targets",
        call=of_targets,
        check=check_targets,
        # x thrice, dX in and out, a target's row of W in bf16 twice and in FP8, dW in and out
        num_bytes=DIM * (case.rows * (11 + 5 * case.num_targets) + 8 * cols),
        reset=reset,
    )
