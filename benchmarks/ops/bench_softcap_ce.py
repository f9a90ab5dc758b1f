"""The cross-entropy with its fp8 gradient against modded-nanogpt's kernel and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.softcap_ce import LossAndGrad, softcap_ce_fp8
from speedrun.reference import softcap_ce as reference
from tests.cases import SOFTCAP_CE_FULL, SOFTCAP_CE_SMALL, CrossEntropyCase
from tests.numerics import assert_accurate, bits

A, B, C = 23.0, 5.0, 7.5  # RECIPE section 3
SCALE = 0.75 / 448
CHECKED_ROWS = 512  # a row stands for itself


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training, with one layout and with both; "all": also every small case."""
    small = () if shapes == "record" else SOFTCAP_CE_SMALL
    for case in (*SOFTCAP_CE_FULL, *small):
        num_bytes = 4 * case.rows * case.cols
        if too_large_for_cpu(device, num_bytes):
            print(f"softcap_ce {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield from (loss_benchmark(case, device, transposed) for transposed in (False, True))


def next_tokens(tokens_T: Tensor, num_targets: int) -> Tensor:
    """(T, N): a position's target and those behind it, none behind the end."""
    ends = tokens_T.new_full((num_targets - 1,), reference.NO_TARGET)
    padded = torch.cat([tokens_T, ends])
    return padded.unfold(0, num_targets, 1).contiguous()


def loss_benchmark(case: CrossEntropyCase, device: torch.device, transposed: bool) -> Benchmark:
    """As the record computes it; read and written once each."""
    z = torch.randn(case.rows, case.cols, device=device).mul_(5).bfloat16()
    tokens = torch.randint(case.cols, (case.rows,), device=device)
    weights = 0.5 ** torch.arange(case.num_targets, device=device, dtype=torch.float32)
    prefixes = torch.randint(-1, case.cols, (case.rows,), device=device) if case.prefix else None
    weight = torch.tensor(0.25 if case.prefix else 0.0, device=device)
    targets, scale = next_tokens(tokens, case.num_targets), torch.tensor(SCALE, device=device)
    loss = reference.Loss(targets, weights, A, B, C, prefixes, weight, True, True)
    options = {**loss._asdict(), "dz_scale": scale}
    if prefixes is None:
        options["prefix_weight"] = 0.0

    def check(name: str, result: LossAndGrad) -> None:
        rows = min(case.rows, CHECKED_ROWS)
        names = ("targets_TN", "prefix_targets_T")
        first = {n: t[:rows] for n in names if (t := getattr(loss, n)) is not None}
        some = loss._replace(**first)._asdict()
        same = reference.softcap_ce_grad(z[:rows], **some)
        exact = reference.softcap_ce_grad(z[:rows].double(), **some)
        assert_accurate(result.loss_T[:rows], same.loss_T, exact.loss_T)
        dz = reference.softcap_ce_fp8(z[:rows], **some, dz_scale=scale, rows=rows).dz_TV
        steps = (bits(result.dz_TV[:rows]).int() - bits(dz).int()).abs()
        assert steps.max() <= 1 and (steps > 0).double().mean() < 0.03, "more than rounding"
        if result.dz_VT is not None:
            assert torch.equal(bits(result.dz_VT), bits(result.dz_TV).mT)

    return Benchmark(
        stem="softcap_ce",
        case=f"{case.name}_both" if transposed else case.name,
        call=lambda: softcap_ce_fp8(z, **options, transposed=transposed),
        check=check,
        num_bytes=z.numel() * (4 if transposed else 3),
        peers={
            "modded_nanogpt": lambda: peers.modded_nanogpt_softcap_ce(
                z, tokens, loss, SCALE, transposed
            ),
            "inductor": lambda: compiled_reference(z, transposed, **options),
        },
        peak=True,
    )


def compiled_reference(z: Tensor, transposed: bool, **options: object) -> Callable[[], LossAndGrad]:
    """Inductor on the reference, all rows at once, with the roundings to bf16 that are in it."""

    def function() -> LossAndGrad:
        found = reference.softcap_ce_fp8(z, rows=len(z), **options)
        return found._replace(dz_VT=found.dz_TV.mT.contiguous()) if transposed else found

    with torch._inductor.config.patch(emulate_precision_casts=True):
        return peers.inductor(function)
