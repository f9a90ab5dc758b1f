"""Triton version of `softcap_ce`: loss, log-sum-exp and the gradient in e5m2, in both layouts.

A program has whole rows and walks along them twice: for the sum, and for the gradient. So logits
are read twice, the second time from L2 where rows in flight fit there: Triton can't keep a row of
50,304 numbers in shared memory between its loops, as the CUDA kernel does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import (
    bytes_of,
    casts_in_software,
    fp8_bits,
    round_to_bf16,
    to_float,
)

LOG2E = math.log2(math.e)
NUM_WARPS = 8
# One row, unless there is a transposed copy: then rows of it are written 32 bytes at a time.
TILES = {False: {"TILE_M": 1, "TILE_N": 4096}, True: {"TILE_M": 32, "TILE_N": 128}}


@triton.jit
def _sigmoid(z_ptrs, mask, slope, offset, ROUNDED: tl.constexpr, SOFTWARE: tl.constexpr):
    """σ((z + b)/c) = 1/(1 + 2^(slope·z + offset)), of bf16 logits."""
    z = to_float(tl.load(z_ptrs, mask=mask, other=0.0), SOFTWARE)
    sigmoid = 1.0 / (1.0 + tl.exp2(z * slope + offset))
    if ROUNDED:
        sigmoid = to_float(round_to_bf16(sigmoid, SOFTWARE), SOFTWARE)
    return sigmoid


@triton.jit
def softcap_ce_kernel(
    z_ptr,
    targets_ptr,
    weights_ptr,
    prefix_targets_ptr,
    prefix_weight_ptr,
    dz_scale_ptr,
    loss_ptr,
    lse_ptr,
    dz_ptr,
    dz_t_ptr,
    rows,
    cols,
    a,
    a_over_c,
    slope,
    offset,
    exponent,
    NUM_TARGETS: tl.constexpr,
    COUNT_MISSING: tl.constexpr,
    ROUNDED: tl.constexpr,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """TILE_M rows of z (rows, cols) bf16: loss, lse (rows,) and the bytes dz (rows, cols), dz_t
    (cols, rows). prefix_targets and dz_t may be None. exponent: a / ln 2.

    exp(logit - a/2) needs no largest logit: 0 <= logit <= a. A target of cols or more makes the
    loss NaN.
    """
    BOTH: tl.constexpr = dz_t_ptr is not None
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_rows = row < rows
    row_ptrs = z_ptr + row[:, None] * cols
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, cols, TILE_N):
        col = start + tl.arange(0, TILE_N)
        mask = in_rows[:, None] & (col[None, :] < cols)
        sigmoid = _sigmoid(row_ptrs + col[None, :], mask, slope, offset, ROUNDED, SOFTWARE)
        sums += tl.where(mask, tl.exp2((sigmoid - 0.5) * exponent), 0.0)
    log2_sum = tl.log2(tl.sum(sums, axis=1))
    lse = 0.5 * a + log2_sum * 0.6931471805599453

    loss = tl.zeros((TILE_M,), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    missing = tl.zeros((TILE_M,), tl.float32)
    HAS_PREFIX: tl.constexpr = prefix_targets_ptr is not None
    for n in tl.static_range(NUM_TARGETS + HAS_PREFIX):
        if n < NUM_TARGETS:
            target = tl.load(targets_ptr + row * NUM_TARGETS + n, mask=in_rows, other=-1)
            weight = tl.load(weights_ptr + n)
            if COUNT_MISSING:
                first = tl.load(targets_ptr + row * NUM_TARGETS, mask=in_rows, other=-1)
                missing += tl.where((first >= 0) & (target < 0), weight, 0.0)
        else:
            target = tl.load(prefix_targets_ptr + row, mask=in_rows, other=-1)
            weight = tl.load(prefix_weight_ptr)
        in_cols = (target >= 0) & (target < cols)
        ptrs = z_ptr + row * cols + target
        own = _sigmoid(ptrs, in_cols, slope, offset, ROUNDED, SOFTWARE)
        logit = tl.where(in_cols, a * own, float("nan"))
        loss += tl.where(target >= 0, weight * (lse - logit), 0.0)
        total += tl.where(target >= 0, weight, 0.0)
    total += missing
    tl.store(loss_ptr + row, loss, mask=in_rows)
    tl.store(lse_ptr + row, lse, mask=in_rows)

    times = a_over_c / tl.load(dz_scale_ptr)
    for start in range(0, cols, TILE_N):
        col = start + tl.arange(0, TILE_N)
        mask = in_rows[:, None] & (col[None, :] < cols)
        sigmoid = _sigmoid(row_ptrs + col[None, :], mask, slope, offset, ROUNDED, SOFTWARE)
        grad = tl.exp2((sigmoid - 0.5) * exponent - log2_sum[:, None]) * total[:, None]
        for n in tl.static_range(NUM_TARGETS + HAS_PREFIX):
            if n < NUM_TARGETS:
                target = tl.load(targets_ptr + row * NUM_TARGETS + n, mask=in_rows, other=-1)
                weight = tl.load(weights_ptr + n)
            else:
                target = tl.load(prefix_targets_ptr + row, mask=in_rows, other=-1)
                weight = tl.load(prefix_weight_ptr)
            grad -= tl.where(col[None, :] == target[:, None], weight, 0.0)
        # Both layouts: in integers. Of the GPU's own conversion ptxas 12.8 (Triton 3.6) reads one
        # byte in four too early where a register is stored byte by byte and in 16 at once: an H200.
        code = fp8_bits(grad * sigmoid * (1.0 - sigmoid) * times, 2, SOFTWARE or BOTH)
        tl.store(dz_ptr + row[:, None] * cols + col[None, :], code, mask=mask)
        if BOTH:
            t_ptrs = dz_t_ptr + col[:, None].to(tl.int64) * rows + row[None, :]
            tl.store(t_ptrs, tl.trans(code), mask=(col[:, None] < cols) & in_rows[None, :])


def softcap_ce_fp8_out(
    z: Tensor,
    loss: tuple,
    dz_scale: Tensor,
    loss_T: Tensor,
    lse_T: Tensor,
    dz_TV: Tensor,
    dz_VT: Tensor | None,
) -> None:
    """z (T, V) bf16 and a reference Loss with float32 weights, all contiguous; into the others."""
    targets, weights, a, b, c, prefix_targets, prefix_weight, count_missing, rounded = loss
    rows, cols = z.shape
    if z.numel() == 0:
        return
    tiles = TILES[dz_VT is not None]
    with torch.cuda.device_of(z):  # a launch goes to the current device
        softcap_ce_kernel[(triton.cdiv(rows, tiles["TILE_M"]),)](
            z,
            targets,
            weights,
            prefix_targets,
            prefix_weight,
            dz_scale,
            loss_T,
            lse_T,
            bytes_of(dz_TV),
            bytes_of(dz_VT),
            rows,
            cols,
            a,
            a / c,
            -LOG2E / c,
            -LOG2E * b / c,
            LOG2E * a,
            NUM_TARGETS=targets.shape[1],
            COUNT_MISSING=count_missing,
            ROUNDED=rounded,
            SOFTWARE=casts_in_software(z.device),
            **tiles,
            num_warps=NUM_WARPS,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: as in training, and the plain loss of validation's
    kind (README: format)."""
    floats = dict.fromkeys(("a", "a_over_c", "slope", "offset", "exponent"), "fp32")
    outputs = {"loss_ptr": "*fp32:16", "lse_ptr": "*fp32:16", "dz_ptr": "*u8:16"}
    inputs = {"z_ptr": "*bf16:16", "targets_ptr": "*i64:16", "weights_ptr": "*fp32:16"}
    signature = {**inputs, **outputs, **floats, "dz_scale_ptr": "*fp32:16"}
    signature |= {"rows": "i32:16", "cols": "i32:16"}
    prefix = {"prefix_targets_ptr": "*i64:16", "prefix_weight_ptr": "*fp32:16"}
    for both, tiles in TILES.items():
        given = signature | prefix | ({"dz_t_ptr": "*u8:16"} if both else {})
        constexprs = {"NUM_TARGETS": 3, "COUNT_MISSING": True, "ROUNDED": True, "SOFTWARE": False}
        constexprs |= tiles if both else {"dz_t_ptr": None, **tiles}
        name = "both layouts" if both else "one layout"
        yield name, softcap_ce_kernel, given, constexprs, {"num_warps": NUM_WARPS}
