"""From the QKV projection to attention's inputs, against Inductor on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.qk_norm_rope import (
    qk_norm_rope,
    rotary_frequencies,
    rotary_positions,
    rotary_table,
)
from speedrun.reference import qk_norm_rope as reference
from tests.cases import QK_NORM_ROPE_FULL, QK_NORM_ROPE_SMALL, HeadsCase
from tests.numerics import assert_accurate


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the record's layers, forward alone and with gradients; "all": also the small cases."""
    for case in QK_NORM_ROPE_FULL + (QK_NORM_ROPE_SMALL if shapes == "all" else ()):
        num_bytes = 2 * least_numbers(case, True)
        if too_large_for_cpu(device, num_bytes):
            print(f"qk_norm_rope {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield make(case, False, device)
        yield make(case, True, device)


def least_numbers(case: HeadsCase, backward: bool) -> int:
    """Read and written once: qkv and what it becomes, and ve; backward queries and keys again, all
    gradients, and with a gate ve and its own. Tables and gates are left out: some hundredths."""
    rows, E = case.parts * case.tokens * case.heads, case.value_dim
    qkv, ve = 2 * case.head_dim + E, E if case.ve else 0
    gradients = 2 * case.head_dim + 2 * qkv + 2 * ve * case.gate if backward else 0
    return rows * (2 * qkv + ve + gradients)


def make(case: HeadsCase, backward: bool, device: torch.device) -> Benchmark:
    P, T, H, K, E = case.parts, case.tokens, case.heads, case.head_dim, case.value_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    tensors = [random(P, T, H * (2 * K + E))]
    tensors += [random(P, T, H * E)] * case.ve + [random(P, T, H)] * case.gate
    tensors = [t.requires_grad_(backward) for t in tensors]
    grads = [random(P, T, H, width) for width in (K, K, E)]
    positions = rotary_positions(T, H if case.paired else 0).to(device)
    frequencies = rotary_frequencies(K, 1024.0).to(device)
    tables = rotary_table(frequencies, positions, torch.bfloat16)
    first = torch.rand(P, T, device=device) < 0.01 if case.first else None

    def ours(qkv: Tensor, ve: Tensor | None = None, gate: Tensor | None = None):
        keys = {"offset_keys": case.offset, "first_PT": first}
        return qk_norm_rope(qkv, *tables, H, **keys, ve_PTD=ve, ve_gate_PTH=gate)

    def plain(qkv: Tensor, ve: Tensor | None = None, gate: Tensor | None = None):
        cos, sin = (table.to(qkv.dtype) for table in tables)
        return reference.qk_norm_rope(qkv, cos, sin, H, case.offset, first, ve, gate)

    def both(function: Callable, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        inputs = [t.to(dtype) for t in tensors]
        out = function(*inputs)
        if not backward:
            return list(out)
        return [*out, *torch.autograd.grad(out, inputs, [g.to(dtype) for g in grads])]

    def check(name: str, result: list[Tensor]) -> None:
        for mine, same, exact in zip(result, both(plain), both(plain, torch.float64), strict=True):
            assert_accurate(mine, same, exact)

    def inductor() -> Callable[[], list[Tensor]]:
        compiled = peers.inductor(plain, *tensors).func
        return lambda: both(compiled)

    return Benchmark(
        stem="qk_norm_rope",
        case=case.name + (" with gradients" if backward else ""),
        call=lambda: both(ours),
        check=check,
        num_bytes=2 * least_numbers(case, backward),
        peers={"inductor": inductor},
    )
