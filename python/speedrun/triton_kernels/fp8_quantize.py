"""Triton version of `fp8_quantize`. fp8 numbers are written as bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import (
    bytes_of,
    casts_in_software,
    fp8_bits,
    max_bits,
    round_to_bf16,
    store_codes,
    to_float,
)

NUM_WARPS = 8
TILES = {"TILE_M": 128, "TILE_N": 128}  # rows of 128 bytes in both layouts
# A norm reads its rows twice, the second time from a cache. Half the rows a program: 256 programs
# for 16,384 tokens, on 132 multiprocessors.
NORM_TILES = {"TILE_M": 64, "TILE_N": 128}
# Matrices whose amax is found ahead of those being quantised: 3 of 4.7 MB are still in L2 then.
LOOKAHEAD = 3
# As in the reference, which this may not import.
MIN_AMAX = 1e-12
DOWN_HEADROOM = 1.12
_MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


@triton.jit
def fp8_quantize_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    out_t_ptr,
    amax_ptr,
    rows,
    cols,
    x_batch_stride,
    x_row_stride,
    MANTISSA: tl.constexpr,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """out (batch, rows, cols) = x / scale, out_t its transpose, amax () raised; one tile a program.

    out_t and amax may be None. amax points to the bits of a float32 that isn't negative.
    """
    row_tiles = tl.cdiv(rows, TILE_M)
    col_tiles = tl.cdiv(cols, TILE_N)
    tile = tl.program_id(0)
    batch = (tile // col_tiles // row_tiles).to(tl.int64)
    row = (tile // col_tiles % row_tiles).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    col = (tile % col_tiles).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    x_ptrs = x_ptr + batch * x_batch_stride + row[:, None] * x_row_stride + col[None, :]
    x = tl.load(x_ptrs, mask=(row[:, None] < rows) & (col[None, :] < cols), other=0.0)
    x = to_float(x, SOFTWARE)
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, max_bits(x))
    code = fp8_bits(tl.div_rn(x, tl.load(scale_ptr)), MANTISSA, SOFTWARE)
    store_codes(code, out_ptr, out_t_ptr, batch * rows * cols, row, col, rows, cols)


@triton.jit
def rms_norm_fp8_quantize_kernel(
    x_ptr,
    scale_ptr,
    y_ptr,
    out_ptr,
    out_t_ptr,
    rows,
    cols: tl.constexpr,
    x_batch_stride,
    x_row_stride,
    inverse_cols,
    eps,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """y = bf16 of x / sqrt(mean(x²) + eps) by rows, out = y / scale in e4m3, out_t its transpose.

    y and out_t may be None; TILE_M rows a program. Compiled for each width: a model has one.
    """
    row_tiles = tl.cdiv(rows, TILE_M)
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    x_ptrs = x_ptr + batch * x_batch_stride + row[:, None] * x_row_stride
    offset = batch * rows * cols

    squares = tl.zeros((TILE_M,), dtype=tl.float32)
    for start in range(0, cols, TILE_N):
        col = start + tl.arange(0, TILE_N)
        mask = (row[:, None] < rows) & (col[None, :] < cols)
        x = to_float(tl.load(x_ptrs + col[None, :], mask=mask, other=0.0), SOFTWARE)
        squares += tl.sum(x * x, axis=1)
    root = tl.sqrt_rn(squares * inverse_cols + eps)
    reciprocal = tl.div_rn(tl.full((TILE_M,), 1.0, tl.float32), root)

    scale = tl.load(scale_ptr)
    for start in range(0, cols, TILE_N):
        col = start + tl.arange(0, TILE_N)
        mask = (row[:, None] < rows) & (col[None, :] < cols)
        x = to_float(tl.load(x_ptrs + col[None, :], mask=mask, other=0.0), SOFTWARE)
        y = round_to_bf16(x * reciprocal[:, None], SOFTWARE)
        if y_ptr is not None:
            tl.store(y_ptr + offset + row[:, None] * cols + col[None, :], y, mask=mask)
        code = fp8_bits(tl.div_rn(to_float(y, SOFTWARE), scale), 3, SOFTWARE)
        store_codes(code, out_ptr, out_t_ptr, offset, row, col, rows, cols)


@triton.jit
def fp8_refresh_kernel(
    bank_ptr,
    down_amax_ptr,
    up_ptr,
    up_t_ptr,
    down_ptr,
    down_t_ptr,
    scales_ptr,
    amax_ptr,
    progress_ptr,
    num_matrices,
    rows,
    cols,
    min_amax,
    own_factor,
    old_factor,
    HEADROOM: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """fp8 copies of bank (num_matrices, rows, cols), even matrices up, odd ones down.

    A program finds the amax of one tile or quantises one, as its ticket says: tickets are drawn in
    the order in which programs start, and those that quantise a matrix come after all those that
    find its amax. So whoever waits, waits for programs that run already.
    progress: ticket counter, then tiles done by matrix; zeros, as amax (2, layers), int32 bits.
    """
    col_tiles = tl.cdiv(cols, TILE_N)
    num_tiles = tl.cdiv(rows, TILE_M) * col_tiles
    ticket = tl.atomic_add(progress_ptr, 1)
    # Jobs of num_tiles tickets: amax of the first LOOKAHEAD matrices, then by turns quantise one
    # and find the amax of another, then quantise the last LOOKAHEAD.
    job = ticket // num_tiles
    lookahead = tl.minimum(LOOKAHEAD, num_matrices)
    turn = job - lookahead
    by_turns = 2 * (num_matrices - lookahead)
    finds_amax = (turn < 0) | ((turn < by_turns) & (turn % 2 == 1))
    matrix = tl.where(turn < by_turns, turn // 2, turn - (num_matrices - lookahead))
    matrix = tl.where(finds_amax, tl.where(turn < 0, job, turn // 2 + lookahead), matrix)
    is_down = matrix % 2 == 1
    layer = matrix // 2
    own = (matrix % 2) * (num_matrices // 2) + layer  # place in amax and scales

    tile = ticket % num_tiles
    row = (tile // col_tiles).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    col = (tile % col_tiles).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    x_ptrs = bank_ptr + matrix.to(tl.int64) * rows * cols + row[:, None] * cols + col[None, :]
    x = to_float(tl.load(x_ptrs, mask=mask, other=0.0), SOFTWARE)

    if finds_amax:
        tl.atomic_max(amax_ptr + own, max_bits(x))
        tl.atomic_add(progress_ptr + 1 + matrix, 1)
    else:
        uses_old = is_down & HEADROOM
        if uses_old:
            amax = tl.load(down_amax_ptr + layer)
        else:
            while tl.atomic_add(progress_ptr + 1 + matrix, 0) < num_tiles:
                pass
            amax = tl.atomic_max(amax_ptr + own, 0).to(tl.float32, bitcast=True)
        amax = tl.where(amax < min_amax, min_amax, amax)  # keeps NaN
        if uses_old:
            scale = amax * old_factor
        else:
            scale = to_float(round_to_bf16(amax * own_factor, SOFTWARE), SOFTWARE)
        if tile == 0:
            tl.store(scales_ptr + own, scale)
        quotient = tl.div_rn(x, scale)
        offset = layer.to(tl.int64) * rows * cols
        if is_down:
            code = fp8_bits(quotient, 3, SOFTWARE)
            store_codes(code, down_ptr, down_t_ptr, offset, row, col, rows, cols)
        else:
            quotient = to_float(round_to_bf16(quotient, SOFTWARE), SOFTWARE)
            code = fp8_bits(quotient, 3, SOFTWARE)
            store_codes(code, up_ptr, up_t_ptr, offset, row, col, rows, cols)


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """batch, rows, cols, batch stride, row stride of x (M, N) or (B, M, N)."""
    x = x if x.dim() == 3 else x[None]
    return *x.shape, x.stride(0), x.stride(1)


def fp8_quantize_out(
    x: Tensor, scale: Tensor, out: Tensor, out_t: Tensor | None, amax: Tensor | None
) -> None:
    """x / scale into `out` (contiguous, like x), its transpose into `out_t`; amax () is raised."""
    if x.numel() == 0:
        return
    batch, rows, cols, *strides = _sizes(x)
    grid = (batch * triton.cdiv(rows, TILES["TILE_M"]) * triton.cdiv(cols, TILES["TILE_N"]),)
    with torch.cuda.device_of(x):  # a launch goes to the current device
        fp8_quantize_kernel[grid](
            x,
            scale,
            bytes_of(out),
            bytes_of(out_t),
            None if amax is None else amax.view(torch.int32),
            rows,
            cols,
            *strides,
            MANTISSA=_MANTISSA_BITS[out.dtype],
            SOFTWARE=casts_in_software(x.device),
            **TILES,
            num_warps=NUM_WARPS,
        )


def rms_norm_fp8_quantize_out(
    x: Tensor, scale: Tensor, eps: float, y: Tensor | None, out: Tensor, out_t: Tensor | None
) -> None:
    """The RMS norm of x into `y` (bf16), as e4m3 into `out` and transposed into `out_t`."""
    if x.numel() == 0:
        return
    batch, rows, cols, *strides = _sizes(x)
    grid = (batch * triton.cdiv(rows, NORM_TILES["TILE_M"]),)
    with torch.cuda.device_of(x):
        rms_norm_fp8_quantize_kernel[grid](
            x,
            scale,
            y,
            bytes_of(out),
            bytes_of(out_t),
            rows,
            cols,
            *strides,
            1 / cols,
            eps,
            SOFTWARE=casts_in_software(x.device),
            **NORM_TILES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference rounds products and sums one by one
        )


def fp8_refresh_out(
    bank: Tensor,
    down_amax: Tensor,
    headroom: bool,
    up: Tensor,
    up_t: Tensor | None,
    down: Tensor | None,
    down_t: Tensor,
    scales: Tensor,
    amax: Tensor,
    progress: Tensor,
) -> None:
    """The fp8 weights of bank (2L, F, D); amax (2, L) and progress (1 + 2L,) are zeros before."""
    if bank.numel() == 0:
        return
    num_matrices, rows, cols = bank.shape
    tiles = triton.cdiv(rows, TILES["TILE_M"]) * triton.cdiv(cols, TILES["TILE_N"])
    with torch.cuda.device_of(bank):
        fp8_refresh_kernel[(2 * num_matrices * tiles,)](
            bank,
            down_amax,
            bytes_of(up),
            bytes_of(up_t),
            bytes_of(down),
            bytes_of(down_t),
            scales,
            amax.view(torch.int32),
            progress,
            num_matrices,
            rows,
            cols,
            MIN_AMAX,
            1 / 448,
            DOWN_HEADROOM / 448,
            HEADROOM=headroom,
            LOOKAHEAD=LOOKAHEAD,
            SOFTWARE=casts_in_software(bank.device),
            **TILES,
            num_warps=NUM_WARPS,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: all that training launches (README: format)."""
    sizes = dict.fromkeys(("rows", "cols", "x_row_stride"), "i32:16") | {"x_batch_stride": "i64:16"}
    outputs = {"scale_ptr": "*fp32:16", "out_ptr": "*u8:16", "out_t_ptr": "*u8:16"}
    amax = {"amax_ptr": "*i32:16"}
    warps = {"num_warps": NUM_WARPS}
    for dtype in ("fp16", "bf16", "fp32"):
        x = {"x_ptr": f"*{dtype}:16"}
        for mantissa, fp8 in ((3, "e4m3"), (2, "e5m2")):
            constexprs = {"MANTISSA": mantissa, "SOFTWARE": False, **TILES}
            signature = {**x, **outputs, **amax, **sizes}
            yield f"{dtype} to {fp8}", fp8_quantize_kernel, signature, constexprs, warps
        signature = {**x, **outputs, **sizes, "y_ptr": "*bf16:16"}
        signature |= {"inverse_cols": "fp32", "eps": "fp32"}
        del signature["cols"]
        constexprs = {"cols": 768, "SOFTWARE": False, **NORM_TILES}
        options = {**warps, "enable_fp_fusion": False}
        yield f"norm of {dtype}", rms_norm_fp8_quantize_kernel, signature, constexprs, options
    copies = dict.fromkeys(("up_ptr", "up_t_ptr", "down_ptr", "down_t_ptr"), "*u8:16")
    factors = dict.fromkeys(("min_amax", "own_factor", "old_factor"), "fp32")
    signature = {"bank_ptr": "*bf16:16", "down_amax_ptr": "*fp32:16", "scales_ptr": "*fp32:16"}
    signature |= {"progress_ptr": "*i32:16", "num_matrices": "i32", **amax, **copies, **factors}
    signature |= {"rows": "i32:16", "cols": "i32:16"}
    for headroom in (False, True):
        constexprs = {"HEADROOM": headroom, "LOOKAHEAD": LOOKAHEAD, "SOFTWARE": False, **TILES}
        name = "refresh with headroom" if headroom else "refresh"
        yield name, fp8_refresh_kernel, signature, constexprs, warps
