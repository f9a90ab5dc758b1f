"""Triton version of `adam_step`: a launch for each tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, store_rounded, to_float

NUM_WARPS = 4
BLOCK = 1024  # elements a program: 8 a thread, which are 16 bytes of bf16
# With `seen` a program has whole rows, in steps of as many elements: 3 steps at width 768.
ROW_TILES = {"TILE_M": 4, "TILE_N": 256}


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    offset,
    mask,
    step_size,
    decay,
    weight1,
    beta2,
    weight2,
    eps,
    CAUTIOUS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """The elements at `offset` where `mask`; the reference's operations in its order."""
    g = to_float(tl.load(grad_ptr + offset, mask=mask, other=0.0), SOFTWARE)
    m = to_float(tl.load(exp_avg_ptr + offset, mask=mask, other=0.0), SOFTWARE)
    v = to_float(tl.load(exp_avg_sq_ptr + offset, mask=mask, other=0.0), SOFTWARE)
    exact = to_float(tl.load(param_ptr + offset, mask=mask, other=0.0), SOFTWARE)
    m = (g - m) * weight1 + m
    v = g * weight2 * g + v * beta2
    update = tl.div_rn(m, tl.sqrt_rn(v) + eps) * step_size
    decayed = exact * decay + update
    if CAUTIOUS:
        decayed = tl.where(update * exact > 0, decayed, update)
    store_rounded(exp_avg_ptr + offset, m, mask, SOFTWARE)
    store_rounded(exp_avg_sq_ptr + offset, v, mask, SOFTWARE)
    store_rounded(param_ptr + offset, exact - decayed, mask, SOFTWARE)


@triton.jit
def adam_step_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scalars_ptr,
    numel,
    weight1,
    beta2,
    weight2,
    eps,
    CAUTIOUS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of `numel` elements a program. scalars (2,) float64; weight1 = 1 − β1, weight2 so."""
    step_size = tl.load(scalars_ptr).to(tl.float32)
    decay = tl.load(scalars_ptr + 1).to(tl.float32)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _update(
        param_ptr,
        grad_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        offset,
        offset < numel,
        step_size,
        decay,
        weight1,
        beta2,
        weight2,
        eps,
        CAUTIOUS,
        SOFTWARE,
    )


@triton.jit
def adam_step_rows_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scalars_ptr,
    seen_ptr,
    rows,
    cols,
    weight1,
    beta2,
    weight2,
    eps,
    CAUTIOUS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """TILE_M rows of (rows, cols) a program: those with a gradient now, or ever: seen (rows,)."""
    step_size = tl.load(scalars_ptr).to(tl.float32)
    decay = tl.load(scalars_ptr + 1).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    seen = tl.load(seen_ptr + row, mask=row < rows, other=1) != 0
    wanted = seen
    for start in range(0, cols, TILE_N):
        col = start + tl.arange(0, TILE_N)
        mask = (col[None, :] < cols) & ~seen[:, None]
        offset = row[:, None] * cols + col[None, :]
        g = to_float(tl.load(grad_ptr + offset, mask=mask, other=0.0), SOFTWARE)
        wanted = wanted | (tl.max((g != 0).to(tl.int32), axis=1) != 0)
    if not CAUTIOUS:
        wanted = row >= 0
    tl.store(seen_ptr + row, wanted.to(tl.uint8), mask=(row < rows) & ~seen)
    wanted = wanted & (row < rows)
    if tl.max(wanted.to(tl.int32), axis=0) != 0:
        for start in range(0, cols, TILE_N):
            col = start + tl.arange(0, TILE_N)
            _update(
                param_ptr,
                grad_ptr,
                exp_avg_ptr,
                exp_avg_sq_ptr,
                row[:, None] * cols + col[None, :],
                (col[None, :] < cols) & wanted[:, None],
                step_size,
                decay,
                weight1,
                beta2,
                weight2,
                eps,
                CAUTIOUS,
                SOFTWARE,
            )


def adam_step_out(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scalars: list[Tensor],
    seen: list[Tensor],
    beta1s: list[float],
    beta2s: list[float],
    eps: float,
    cautious: bool,
) -> None:
    """Contiguous tensors; `seen` (R,) of a tensor, or empty where it has none."""
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, scalars, seen, beta1s, beta2s, strict=True)
    for param, grad, exp_avg, exp_avg_sq, numbers, seen_rows, beta1, beta2 in rows:
        if param.numel() == 0:
            continue
        tensors = (param, grad, exp_avg, exp_avg_sq, numbers)
        factors = (1 - beta1, beta2, 1 - beta2, eps)
        # As the reference, every product and every sum is rounded on its own.
        flags = {"CAUTIOUS": cautious, "SOFTWARE": interprets(), "enable_fp_fusion": False}
        with torch.cuda.device_of(param):  # a launch goes to the current device
            if seen_rows.numel() == 0:
                grid = (triton.cdiv(param.numel(), BLOCK),)
                adam_step_kernel[grid](
                    *tensors, param.numel(), *factors, BLOCK=BLOCK, num_warps=NUM_WARPS, **flags
                )
            else:
                num_rows = seen_rows.numel()
                grid = (triton.cdiv(num_rows, ROW_TILES["TILE_M"]),)
                adam_step_rows_kernel[grid](
                    *tensors,
                    seen_rows.view(torch.uint8),
                    num_rows,
                    param.numel() // num_rows,
                    *factors,
                    **ROW_TILES,
                    num_warps=NUM_WARPS,
                    **flags,
                )


def static_variants():
    """What benchmarks/static_check.py compiles: all that training launches (README: format)."""
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    flags = {"CAUTIOUS": True, "SOFTWARE": False}
    floats = dict.fromkeys(("weight1", "beta2", "weight2", "eps"), "fp32")
    for dtype, moments in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
        signature = dict.fromkeys(("param_ptr", "grad_ptr"), f"*{dtype}:16")
        signature |= dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr"), f"*{moments}:16")
        signature |= {"scalars_ptr": "*fp64:16", **floats}
        name, sizes = f"{dtype}, moments {moments}", {"numel": "i32:16"}
        yield name, adam_step_kernel, signature | sizes, {"BLOCK": BLOCK, **flags}, options
        sizes = {"seen_ptr": "*u8:16", "rows": "i32:16", "cols": "i32:16"}
        constexprs = {**ROW_TILES, **flags}
        yield f"{name}, rows", adam_step_rows_kernel, signature | sizes, constexprs, options
