"""The casts to fp8 against torch's own operators in turn (eager) and Inductor on the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun import ops
from speedrun.ops.fp8_quantize import DTYPES
from speedrun.reference import fp8_quantize as reference
from tests.cases import FP8_QUANTIZE_FULL, FP8_QUANTIZE_SMALL, Case
from tests.numerics import assert_accurate, bits

E4M3 = torch.float8_e4m3fn


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the shapes of training; "all": also every small case in every type, cast and normed."""
    for case in FP8_QUANTIZE_FULL if shapes == "record" else all_cases():
        num_bytes = 4 * math.prod(case.shape)  # 2 read, 1 written in each of two layouts
        if too_large_for_cpu(device, num_bytes):
            print(f"fp8_quantize {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        make = {"norm": norm_benchmark, "refresh": refresh_benchmark}
        yield make.get(case.name.split("_")[0], cast_benchmark)(case, device)


def all_cases() -> Iterator[Case]:
    yield from FP8_QUANTIZE_FULL
    for case in FP8_QUANTIZE_SMALL:
        for dtype in DTYPES:
            yield Case(f"{case.name} {dtype}", case.shape, dtype, case.why)
            yield Case(f"norm_{case.name} {dtype}", case.shape, dtype, case.why)


def assert_same_fp8(out: Tensor | None, expected: Tensor | None) -> None:
    """Every byte; the inputs here have no NaN."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    wrong = (bits(out) != bits(expected)).sum().item()
    assert wrong == 0, f"{wrong} of {out.numel()} bytes differ"


def is_approximate(name: str) -> bool:
    """Inductor divides by another instruction and leaves roundings to bf16 out."""
    return name == "inductor"


def assert_fp8(name: str, out: Tensor, expected: Tensor) -> None:
    if not is_approximate(name):
        return assert_same_fp8(out, expected)
    steps = (bits(out).int() - bits(expected).int()).abs()  # of neighbouring numbers
    assert steps.max() <= 1 and (steps > 0).double().mean() < 0.05, "more than rounding"


def eager(function: Callable, *arguments: object) -> Callable[[], Callable[[], object]]:
    """A peer: our reference as it stands, one torch operator after another."""
    return lambda: lambda: function(*arguments)


def cast_benchmark(case: Case, device: torch.device) -> Benchmark:
    x = torch.randn(case.shape, device=device).to(case.dtype)
    scale = torch.tensor(0.01, device=device)
    arguments = x, scale, E4M3, True, True

    def check(name: str, result: tuple[Tensor, Tensor, Tensor]) -> None:
        out, out_t, amax = result
        assert_fp8(name, out, reference.to_fp8(x, scale, E4M3))
        assert torch.equal(bits(out_t), bits(out).mT)
        assert amax.item() == (x.abs().max().item() if x.numel() else 0)

    return Benchmark(
        stem="fp8_quantize",
        case=case.name,
        call=lambda: ops.fp8_quantize(x, scale, transposed=True, amax=True),
        check=check,
        num_bytes=x.numel() * (x.element_size() + 2),
        peers={
            "eager": eager(reference.fp8_quantize, *arguments),
            "inductor": lambda: peers.inductor(reference.fp8_quantize, *arguments),
        },
    )


def norm_benchmark(case: Case, device: torch.device) -> Benchmark:
    x = torch.randn(case.shape, device=device).to(case.dtype)
    scale = torch.tensor(max(1, case.shape[-1]) ** 0.5 / 448, device=device)
    arguments = x, scale, 2**-23, True, True

    def check(name: str, result: tuple[Tensor, Tensor, Tensor]) -> None:
        y, out, out_t = result
        assert_accurate(y, reference.rms_norm(x).bfloat16(), reference.rms_norm(x.double()))
        assert_fp8(name, out, reference.to_fp8(y, scale, E4M3))
        assert torch.equal(bits(out_t), bits(out).mT)

    return Benchmark(
        stem="fp8_quantize",
        case=case.name,
        call=lambda: ops.rms_norm_fp8_quantize(x, scale, keep=True, transposed=True),
        check=check,
        num_bytes=x.numel() * (x.element_size() + 4),
        peers={
            "eager": eager(reference.rms_norm_fp8_quantize, *arguments),
            "inductor": lambda: peers.inductor(reference.rms_norm_fp8_quantize, *arguments),
        },
    )


def refresh_benchmark(case: Case, device: torch.device) -> Benchmark:
    """As each step of training does it from step 17 on; the bank is read twice at most."""
    bank = torch.randn(case.shape, device=device).mul_(0.05).to(case.dtype)
    old_amax = torch.full((case.shape[0] // 2,), 0.2, device=device)
    arguments = bank, old_amax, True, True, True

    def check(name: str, result: reference.MlpWeights) -> None:
        expected = reference.refresh_mlp_weights(*arguments)
        for field, one, other in zip(result._fields, result, expected, strict=True):
            if field.endswith("_f8") or field.endswith("_f8_t"):
                assert_fp8(name, one, other)
            else:
                torch.testing.assert_close(
                    one, other, rtol=2**-7 if is_approximate(name) else 0, atol=0
                )

    return Benchmark(
        stem="fp8_quantize",
        case=case.name,
        call=lambda: ops.refresh_mlp_weights(bank, old_amax, True, up_t=True, down_row=True),
        check=check,
        num_bytes=bank.numel() * (bank.element_size() + 2),
        peers={
            "eager": eager(reference.refresh_mlp_weights, *arguments),
            "inductor": lambda: peers.inductor(reference.refresh_mlp_weights, *arguments),
        },
    )
