"""`sym_matmul` at the products of polar_express, against Inductor and others' symmetric kernels.

Backend `torch` is cuBLAS, which computes both triangles. Operations are counted for one, so a rate
above that of a full product is possible only for a kernel that leaves out the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.reference import sym_matmul as reference
from tests.cases import SYM_MATMUL_FULL, SYM_MATMUL_SMALL, SymCase
from tests.numerics import assert_accurate


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the products of training, in bf16; "all": also in fp16, and the small cases in both."""
    dtypes = (torch.bfloat16,) if shapes == "record" else (torch.bfloat16, torch.float16)
    for case in SYM_MATMUL_FULL if shapes == "record" else SYM_MATMUL_FULL + SYM_MATMUL_SMALL:
        num_flops = case.batch * case.n * (case.n + 1) * case.k
        if too_large_for_cpu(device, 0, num_flops):
            print(f"sym_matmul {case.name}: left out, {num_flops:.3g} operations for a CPU")
            continue
        if not num_flops or case.b:
            continue  # nothing to time; no peer takes two operands
        for dtype in dtypes:
            yield benchmark(case, dtype, num_flops, device)


def benchmark(
    case: SymCase, dtype: torch.dtype, num_flops: float, device: torch.device
) -> Benchmark:
    adds = case.beta != 0
    shape = (case.batch, *((case.k, case.n) if case.trans else (case.n, case.k)))
    a = (torch.randn(shape, device=device) / case.k**0.5).to(dtype)
    c = None
    if adds:  # of a symmetric matrix, where it is one: b·A + c·A²
        c = torch.randn(case.batch, case.n, case.n, device=device) / case.n**0.5
        c = (c + c.mT).to(dtype)
    if adds and case.n == case.k and not case.trans:
        a = c
    out = a.new_empty(case.batch, case.n, case.n)
    options = {"trans": case.trans, "alpha": case.alpha, "beta": case.beta}

    def check(_: str, result: object) -> None:
        for b in {0, case.batch - 1}:  # float64 copies of all would be large
            operands = [None if x is None else x[b : b + 1] for x in (a, c)]
            same, exact = (
                torch.empty_like(out[:1]),
                out.new_empty(out[:1].shape, dtype=torch.float64),
            )
            into(same, *operands, **options)
            into(exact, *(None if x is None else x.double() for x in operands), **options)
            assert_accurate(out[b : b + 1], same, exact)

    def peer(make) -> object:
        if (adds and a is not c) or (not adds and case.alpha != 1):
            raise peers.Missing("it takes no C but A, and no alpha without")
        return make(a, out, case.trans, case.alpha, case.beta)

    others = {
        "modded-nanogpt": peers.modded_nanogpt_sym_matmul,
        "quack": peers.quack_sym_matmul,
        "dion": peers.dion_sym_matmul,
    }
    num_elements = a.numel() + out.numel() + (c.numel() if adds and a is not c else 0)
    return Benchmark(
        stem="sym_matmul",
        case=f"{case.name} {str(dtype).removeprefix('torch.')}",
        call=lambda: ops.sym_matmul(a, c=c, out=out, **options),
        check=check,
        num_bytes=num_elements * a.element_size(),
        num_flops={"bf16": num_flops},  # fp16 has the same rate
        peers={
            "inductor": lambda: peers.inductor(into, out, a, c, **options),
            **{name: lambda make=make: peer(make) for name, make in others.items()},
        },
    )


def into(
    out: Tensor, a: Tensor, c: Tensor | None, *, trans: bool, alpha: float, beta: float
) -> None:
    """The reference, written into `out`."""
    reference.sym_matmul_out(a, a, c, out, trans, alpha, beta)
