"""`polar_chain` at the record's banks in the Gram form, whole and an eighth: its two runs of steps.

Peer `sym_matmul` is the same product by product, by the kernels that serve there, and a copy of R
more; `torch` and Inductor on it compute both triangles by cuBLAS. Operations are those of one
triangle. What must be read and written once is R and Q: all else may stay in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops._polar_express_banks import ChainOfProducts
from speedrun.ops.polar_chain import num_slots, polar_chain
from speedrun.reference._gram_steps import gram_steps
from speedrun.reference.polar_express import COEFFICIENTS, RECORD, normalized
from tests.chain_cases import POLAR_CHAIN_FULL, POLAR_CHAIN_SMALL, ChainCase


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """All of training's; "all": also the small cases."""
    for case in POLAR_CHAIN_FULL if shapes == "record" else POLAR_CHAIN_FULL + POLAR_CHAIN_SMALL:
        num_flops = (4 * case.steps - 3) * case.batch * case.n**3
        if too_large_for_cpu(device, 0, num_flops):
            print(f"polar_chain {case.name}: left out, {num_flops:.3g} operations for a CPU")
            continue
        yield benchmark(case, num_flops, device)


def benchmark(case: ChainCase, num_flops: float, device: torch.device) -> Benchmark:
    steps = COEFFICIENTS[2:5] if case.steps == 3 else COEFFICIENTS[: case.steps]
    x = normalized(torch.randn(case.batch, case.n, 3 * case.n, device=device), torch.half, RECORD)
    work = x.new_empty(num_slots(case.steps), case.batch, case.n, case.n)
    work[0] = x @ x.mT

    def check(_: str, q: Tensor) -> None:
        """First and last matrix: half as far again from the exact polynomials as the reference."""
        for b in (0, -1):
            r = work[0, b][None]
            exact = gram_steps(r.double(), steps, torch.float64)
            same = gram_steps(r.float(), steps, torch.float16)
            error, allowed = ((found.double() - exact).norm() for found in (q[b][None], same))
            assert error <= 1.5 * allowed, f"{error:.3g} from exact, reference {allowed:.3g}"

    def by_products() -> Callable[[], Tensor]:
        r = work[0].clone()
        chain = ChainOfProducts(r)

        def call() -> Tensor:
            r.copy_(work[0])  # it overwrites R
            return chain(steps)

        return call

    return Benchmark(
        stem="polar_chain",
        case=case.name,
        call=lambda: polar_chain(work, steps),
        check=check,
        num_bytes=2 * work[0].numel() * work.element_size(),
        num_flops={"bf16": num_flops},  # fp16 has the same rate
        peers={
            "sym_matmul": by_products,
            "inductor": lambda: peers.inductor(
                lambda r: gram_steps(r.float(), steps, torch.float16).half(), work[0]
            ),
        },
    )
