"""XSA, attention gate and the fp8 copy, against Inductor on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.attention_epilogue import attention_epilogue, attention_epilogue_fp8
from speedrun.reference import attention_epilogue as reference
from speedrun.reference._fp8 import to_fp8
from tests.cases import ATTENTION_EPILOGUE_FULL, ATTENTION_EPILOGUE_SMALL, EpilogueCase
from tests.numerics import assert_accurate, bits

KINDS = ("", " fp8", " with gradients")


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the record's layers: forward, with an fp8 copy, with gradients; "all": small ones too."""
    for case in ATTENTION_EPILOGUE_FULL + (ATTENTION_EPILOGUE_SMALL if shapes == "all" else ()):
        num_bytes = least_bytes(case, " with gradients")
        if too_large_for_cpu(device, num_bytes):
            print(f"attention_epilogue {case.name}: left out, {num_bytes:,} bytes for a CPU")
            continue
        for kind in KINDS:
            yield make(case, kind, device)


def least_bytes(case: EpilogueCase, kind: str) -> int:
    """y, v where there is XSA, and out; the copy; backward these but out, its gradient, and those
    of y and v. Gates are left out: some hundredths."""
    inputs = 2 + 2 * case.xsa
    backward = inputs + 2 + inputs if kind == " with gradients" else 0
    per_number = inputs + 2 + (kind == " fp8") + backward
    return case.tokens * case.heads * case.dim * per_number


def make(case: EpilogueCase, kind: str, device: torch.device) -> Benchmark:
    rows, backward = (case.tokens, case.heads), kind == " with gradients"

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_(backward)

    y, v = random(*rows, case.dim), random(*rows, case.dim)
    xsa, gate = random(*rows) if case.xsa else None, random(*rows) if case.gate else None
    tensors = [t for t in (y, v if case.xsa else None, xsa, gate) if t is not None]
    grad = random(*rows, case.dim).detach()
    scale = torch.tensor(0.01, device=device)

    def both(function: Callable, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        used = {t: t.to(dtype) for t in (y, v, xsa, gate) if t is not None}
        out = function(*(None if t is None else used[t] for t in (y, v, xsa, gate)))
        if not backward:
            return [out]
        leaves = [used[t] for t in tensors]
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def ours() -> list[Tensor]:
        if kind == " fp8":
            return list(attention_epilogue_fp8(y, v, scale, xsa, gate))
        return both(attention_epilogue)

    def check(name: str, result: list[Tensor]) -> None:
        plain = reference.attention_epilogue
        found = result[:1] if kind == " fp8" else result
        for mine, same, exact in zip(found, both(plain), both(plain, torch.float64), strict=True):
            assert_accurate(mine, same, exact)
        if kind != " fp8":
            return
        out, out_f8, amax = result
        expected = to_fp8(out, scale, torch.float8_e4m3fn)
        steps = (bits(out_f8).int() - bits(expected).int()).abs()  # of neighbouring numbers
        if name == "inductor":  # it quantises what it hasn't rounded to bf16
            assert steps.max() <= 1 and (steps > 0).double().mean() < 0.1, "more than rounding"
            torch.testing.assert_close(amax, out.abs().amax().float(), rtol=2**-8, atol=0)
        else:
            assert steps.numel() == 0 or (steps.max() == 0 and amax == out.abs().max())

    def inductor() -> Callable[[], list[Tensor]]:
        if kind == " fp8":
            function = reference.attention_epilogue_fp8
            call = peers.inductor(function, y, v, xsa, gate, scale)
            return lambda: list(call())
        compiled = peers.inductor(reference.attention_epilogue, y, v, xsa, gate).func
        return lambda: both(compiled)

    return Benchmark(
        stem="attention_epilogue",
        case=case.name + kind,
        call=ours,
        check=check,
        num_bytes=least_bytes(case, kind),
        peers={"inductor": inductor},
    )
