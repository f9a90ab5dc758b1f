"""`momentum_polar_express` at the record's banks: the record's form, and those that may replace it.

Beside Inductor on the reference; modded-nanogpt's own function, bank after bank, with its form; and
gram-newton-schulz behind torch's momentum with the Gram form. Backend `torch` is cuBLAS, with as
few launches as the kernels have. Operations are those that a form needs where of symmetric products
one triangle is computed (KERNELS b.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.polar_express import RECORD, S4, PolarExpress, momentum_polar_express
from speedrun.reference import polar_express as reference
from speedrun.reference.polar_express import momentum_step
from tests.cases import POLAR_EXPRESS_FULL, POLAR_EXPRESS_SMALL, PolarCase

MU = 0.95
VARIANTS = {
    "record": (RECORD, torch.bfloat16),
    "gram": (dataclasses.replace(RECORD, form="gram"), torch.float16),
    "s4 gram": (dataclasses.replace(S4, form="gram"), torch.float16),
}


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """Each bank and all three, whole and an eighth; "all": also the small ones."""
    for case in (
        POLAR_EXPRESS_FULL if shapes == "record" else POLAR_EXPRESS_FULL + POLAR_EXPRESS_SMALL
    ):
        for name, (spec, dtype) in VARIANTS.items():
            num_flops = sum(least_flops(bank, spec) for bank in case.banks)
            if too_large_for_cpu(device, 0, num_flops):
                print(f"polar_express {case.name}: left out, {num_flops:.3g} operations for a CPU")
                break
            yield benchmark(case, name, spec, dtype, num_flops, device)


def least_flops(bank: tuple[int, int, int], spec: PolarExpress) -> float:
    B, M, N = bank
    n, m = min(M, N), max(M, N)
    steps = len(spec.coefficients)
    if spec.form == "standard" or n == m:
        return B * steps * (3 * n * n * m + n**3)
    starts = 1 + len([restart for restart in spec.restarts if restart < steps])
    products = steps + (steps - starts) + 2 * (steps - starts)  # Z; Q; RZ and R
    return B * (starts * 3 * n * n * m + products * n**3)


def benchmark(
    case: PolarCase,
    name: str,
    spec: PolarExpress,
    dtype: torch.dtype,
    num_flops: float,
    device: torch.device,
) -> Benchmark:
    grads = [torch.randn(bank, device=device).bfloat16() for bank in case.banks]
    before = [torch.randn(bank, device=device) for bank in case.banks]
    momenta = [m.clone() for m in before]
    mu = torch.tensor(MU, dtype=torch.float64, device=device)
    arguments = (grads, momenta, mu, dtype, spec)

    def reset() -> None:
        for momentum, old in zip(momenta, before, strict=True):
            momentum.copy_(old)

    def check(_: str, results: list[Tensor]) -> None:
        """First and last matrix: half as far again from the exact polynomials as the reference."""
        for grad, old, found in zip(grads, before, results, strict=True):
            for b in (0, -1):
                nesterov = momentum_step(grad[b][None], old[b][None].clone(), MU)
                exact = reference.polar_express(nesterov.double(), spec=spec)
                same = reference.polar_express(nesterov, dtype, spec)
                error, allowed = ((x.double() - exact).norm() for x in (found[b][None], same))
                assert error <= 1.5 * allowed, f"{error:.3g} from exact, reference {allowed:.3g}"

    others: dict[str, Callable[[], Callable[[], object]]] = {
        "inductor": lambda: peers.inductor(by_reference, *arguments)
    }
    if name == "record":
        others["modded-nanogpt"] = lambda: modded_nanogpt(grads, momenta)
    if name == "gram":
        others["gram-newton-schulz"] = lambda: gram_newton_schulz(grads, momenta, spec)
    return Benchmark(
        stem="polar_express",
        case=f"{case.name} {name}",
        call=lambda: momentum_polar_express(*arguments),
        check=check,
        num_bytes=sum(12 * grad.numel() for grad in grads),  # gradient, momentum twice, result
        num_flops={"bf16": num_flops},  # fp16 has the same rate
        peers=others,
        reset=reset,
    )


def by_reference(
    grads: list[Tensor],
    momenta: list[Tensor],
    mu: Tensor,
    dtype: torch.dtype,
    spec: PolarExpress,
) -> list[Tensor]:
    nesterov = [momentum_step(*pair, mu) for pair in zip(grads, momenta, strict=True)]
    return [reference.polar_express(x, dtype, spec) for x in nesterov]


def modded_nanogpt(grads: list[Tensor], momenta: list[Tensor]) -> Callable[[], list[Tensor]]:
    function = peers.modded_nanogpt_polar_express(RECORD.coefficients)
    mu = torch.tensor(MU)  # on the CPU, as there

    def call() -> list[Tensor]:
        # It overwrites its gradient, and splits the product where matrices are large.
        return [
            function(grad.float(), momentum, mu, split_baddbmm=grad.shape[-2] > 1024)
            for grad, momentum in zip(grads, momenta, strict=True)
        ]

    return call


def gram_newton_schulz(
    grads: list[Tensor], momenta: list[Tensor], spec: PolarExpress
) -> Callable[[], list[Tensor]]:
    function = peers.gram_newton_schulz(spec.coefficients, spec.restarts, spec.norm_factor)
    mu = torch.tensor(MU, dtype=torch.float64, device=grads[0].device)
    pairs = [*zip(grads, momenta, strict=True)]
    return lambda: [function(momentum_step(*pair, mu)) for pair in pairs]
