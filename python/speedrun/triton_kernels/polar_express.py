"""Triton version of `polar_express`'s prologue: momentum, Nesterov gradient, norm and cast."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, round_to_bf16, to_float

CHUNK = 8192  # elements of a matrix whose squares make one partial sum: the operator's contract
# Of a chunk a program reads so many at a time: 16 a thread, 2 or 4 loads of 16 bytes in flight from
# each tensor.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp's formula: exact at either end."""
    near = start + weight * (end - start)
    return tl.where(tl.abs(weight) < 0.5, near, end - (end - start) * (1.0 - weight))


@triton.jit
def momentum_kernel(
    grad_ptr,
    momentum_ptr,
    mu_ptr,
    sums_ptr,
    numel,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """M ← lerp(M, G, 1−μ); the sum of lerp(G, M, μ)² over one chunk of one matrix a program.

    Grid: (chunks, batch). grad, momentum: (batch, numel), mu () float64, sums (batch, chunks).
    """
    mu = tl.load(mu_ptr).to(tl.float32)
    weight = (1.0 - mu.to(tl.float64)).to(tl.float32)
    start = tl.program_id(1).to(tl.int64) * numel
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in tl.static_range(0, CHUNK, BLOCK):
        index = tl.program_id(0) * CHUNK + first + tl.arange(0, BLOCK)
        inside = index < numel
        g = to_float(tl.load(grad_ptr + start + index, mask=inside, other=0.0), SOFTWARE)
        m = tl.load(momentum_ptr + start + index, mask=inside, other=0.0)
        m = _lerp(m, g, weight)
        tl.store(momentum_ptr + start + index, m, mask=inside)
        nesterov = _lerp(g, m, mu)
        squares += nesterov * nesterov
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + place, tl.sum(squares, axis=0))


@triton.jit
def normalize_kernel(
    grad_ptr,
    momentum_ptr,
    mu_ptr,
    sums_ptr,
    x_ptr,
    numel,
    num_sums,
    norm_factor,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_SUMS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """x = lerp(G, M, μ)/(√Σ sums · norm_factor + eps), rounded once. Shapes and grid as above.

    PADDED_SUMS: the power of two from num_sums = chunks on.
    """
    part = tl.arange(0, PADDED_SUMS)
    parts = sums_ptr + tl.program_id(1) * num_sums + part
    total = tl.sum(tl.load(parts, mask=part < num_sums, other=0.0), axis=0)
    norm = tl.sqrt_rn(total) * norm_factor + eps
    mu = tl.load(mu_ptr).to(tl.float32)
    start = tl.program_id(1).to(tl.int64) * numel
    for first in tl.static_range(0, CHUNK, BLOCK):
        index = tl.program_id(0) * CHUNK + first + tl.arange(0, BLOCK)
        inside = index < numel
        g = to_float(tl.load(grad_ptr + start + index, mask=inside, other=0.0), SOFTWARE)
        m = tl.load(momentum_ptr + start + index, mask=inside, other=0.0)
        x = tl.div_rn(_lerp(g, m, mu), norm)
        if x_ptr.dtype.element_ty == tl.bfloat16:
            x = round_to_bf16(x, SOFTWARE)
        tl.store(x_ptr + start + index, x, mask=inside)


def momentum_out(grad: Tensor, momentum: Tensor, mu: Tensor, sums: Tensor) -> None:
    """Contiguous (B, M, N) `grad` and `momentum`, updated; writes `sums` (B, ceil(M·N/CHUNK))."""
    if grad.numel() == 0:
        return
    with torch.cuda.device_of(grad):  # a launch goes to the current device
        momentum_kernel[_grid(sums)](
            grad,
            momentum,
            mu,
            sums,
            grad[0].numel(),
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            SOFTWARE=interprets(),
            num_warps=NUM_WARPS,
        )


def normalize_out(
    grad: Tensor,
    momentum: Tensor,
    mu: Tensor,
    sums: Tensor,
    norm_factor: float,
    eps: float,
    x: Tensor,
) -> None:
    """Writes the normalised Nesterov gradient into `x` (B, M, N), contiguous."""
    if grad.numel() == 0:
        return
    with torch.cuda.device_of(grad):
        normalize_kernel[_grid(sums)](
            grad,
            momentum,
            mu,
            sums,
            x,
            grad[0].numel(),
            sums.shape[1],
            norm_factor,
            eps,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            PADDED_SUMS=triton.next_power_of_2(sums.shape[1]),
            SOFTWARE=interprets(),
            num_warps=NUM_WARPS,
        )


def _grid(sums: Tensor) -> tuple[int, int]:
    return sums.shape[1], sums.shape[0]


def static_variants():
    """What benchmarks/static_check.py compiles: both kernels, for the types of training."""
    constexprs = {"CHUNK": CHUNK, "BLOCK": BLOCK, "SOFTWARE": False}
    options = {"num_warps": NUM_WARPS}
    numbers = {"mu_ptr": "*fp64:16", "sums_ptr": "*fp32:16", "numel": "i32:16"}
    for grad in ("bf16", "fp32"):
        signature = {"grad_ptr": f"*{grad}:16", "momentum_ptr": "*fp32:16", **numbers}
        yield f"momentum {grad}", momentum_kernel, signature, constexprs, options
        signature |= {"num_sums": "i32", "norm_factor": "fp32", "eps": "fp32"}
        for x in ("bf16", "fp16"):
            pointers = signature | {"x_ptr": f"*{x}:16"}
            padded = constexprs | {"PADDED_SUMS": 512}
            yield f"normalize {grad} to {x}", normalize_kernel, pointers, padded, options
