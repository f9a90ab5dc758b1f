"""Triton version of `residual_mix`: all terms in one pass, and their gradients in another.

Terms come as tuples, one entry each: streams (T, width), their factors (T,) with a stride, or () of
stride 0, or None where the factor is a number, and these numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import (
    bytes_of,
    casts_in_software,
    fp8_bits,
    interprets,
    round_as,
    store_rounded,
    to_float,
)

NUM_WARPS = 4
TILE = 4096  # elements a program, in whole rows: 32 a thread, 16 bytes a load


@triton.jit
def _factor(factor, stride, number, row, mask, SOFTWARE: tl.constexpr):
    """What a term of these rows is multiplied by, (rows, 1) float32, or a number."""
    if factor is None:
        value = number
    else:
        value = to_float(tl.load(factor + row * stride, mask=mask, other=0.0), SOFTWARE)[:, None]
    return value


@triton.jit
def residual_mix_kernel(
    streams,
    factors,
    strides,
    numbers,
    widths,
    x_ptr,
    normed_ptr,
    codes_ptr,
    rows,
    cols,
    inverse_cols,
    eps,
    scale,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """x (rows, cols): the terms' sum; normed: x over its RMS; codes: that over scale, as e4m3.

    normed and codes may be None. A program has TILE_M whole rows.
    """
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    col = tl.arange(0, TILE_N)
    in_rows = row < rows
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for i in tl.static_range(len(streams)):
        mask = in_rows[:, None] & (col[None, :] < widths[i])
        ptrs = streams[i] + row[:, None] * widths[i] + col[None, :]
        stream = to_float(tl.load(ptrs, mask=mask, other=0.0), SOFTWARE)
        factor = _factor(factors[i], strides[i], numbers[i], row, in_rows, SOFTWARE)
        # Beside a narrow stream an infinite factor makes no NaN.
        total += tl.where(mask, stream * factor, 0.0)
    x = round_as(total, x_ptr.dtype.element_ty, SOFTWARE)
    mask = in_rows[:, None] & (col[None, :] < cols)
    offset = row[:, None] * cols + col[None, :]
    tl.store(x_ptr + offset, x, mask=mask)
    if normed_ptr is not None:
        rounded = to_float(x, SOFTWARE)
        mean = tl.sum(tl.where(mask, rounded * rounded, 0.0), axis=1) * inverse_cols
        normed = rounded * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        normed = round_as(normed, normed_ptr.dtype.element_ty, SOFTWARE)
        tl.store(normed_ptr + offset, normed, mask=mask)
        if codes_ptr is not None:
            quotient = tl.div_rn(to_float(normed, SOFTWARE), scale)
            tl.store(codes_ptr + offset, fp8_bits(quotient, 3, SOFTWARE), mask=mask)


@triton.jit
def residual_mix_bwd_kernel(
    dx_ptr,
    dnormed_ptr,
    x_ptr,
    streams,
    factors,
    strides,
    numbers,
    widths,
    dstreams,
    sums,
    rows,
    cols,
    inverse_cols,
    eps,
    SOFTWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """dstreams: the total gradient of x times each factor; sums (rows,) float32 for each factor:
    along its row, that gradient times the stream. dx, or dnormed, may be None."""
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    col = tl.arange(0, TILE_N)
    in_rows = row < rows
    mask = in_rows[:, None] & (col[None, :] < cols)
    offset = row[:, None] * cols + col[None, :]
    grad = tl.zeros((TILE_M, TILE_N), tl.float32)
    if dx_ptr is not None:
        grad += to_float(tl.load(dx_ptr + offset, mask=mask, other=0.0), SOFTWARE)
    if dnormed_ptr is not None:
        x = to_float(tl.load(x_ptr + offset, mask=mask, other=0.0), SOFTWARE)
        dnormed = to_float(tl.load(dnormed_ptr + offset, mask=mask, other=0.0), SOFTWARE)
        mean = tl.sum(x * x, axis=1) * inverse_cols
        inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        normed = x * inverse_rms
        along = (tl.sum(dnormed * normed, axis=1) * inverse_cols)[:, None]
        grad += inverse_rms * (dnormed - normed * along)
    for i in tl.static_range(len(streams)):
        part = in_rows[:, None] & (col[None, :] < widths[i])
        part_offset = row[:, None] * widths[i] + col[None, :]
        factor = _factor(factors[i], strides[i], numbers[i], row, in_rows, SOFTWARE)
        store_rounded(dstreams[i] + part_offset, grad * factor, part, SOFTWARE)
        if factors[i] is not None:
            stream = to_float(tl.load(streams[i] + part_offset, mask=part, other=0.0), SOFTWARE)
            along = tl.sum(tl.where(part, grad * stream, 0.0), axis=1)
            tl.store(sums[i] + row, along, mask=in_rows)


def _tiles(cols: int) -> dict[str, int]:
    tile_n = max(16, triton.next_power_of_2(cols))
    return {"TILE_M": min(32, max(1, TILE // tile_n)), "TILE_N": tile_n}


def _terms(streams: list[Tensor], factors: list[Tensor | None], numbers: list[float]) -> tuple:
    """The five tuples of a kernel."""
    strides = (0 if f is None or f.numel() == 1 else f.stride(0) for f in factors)
    widths = (stream.shape[1] for stream in streams)
    return tuple(map(tuple, (streams, factors, strides, numbers, widths)))


def residual_mix_out(
    streams: list[Tensor],
    factors: list[Tensor | None],
    numbers: list[float],
    eps: float,
    scale: float,
    x: Tensor,
    normed: Tensor | None,
    codes: Tensor | None,
) -> None:
    """Into x (T, D) contiguous, and normed and codes like it; streams (T, width) contiguous."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    tiles = _tiles(cols)
    with torch.cuda.device_of(x):  # a launch goes to the current device
        residual_mix_kernel[(triton.cdiv(rows, tiles["TILE_M"]),)](
            *_terms(streams, factors, numbers),
            x,
            normed,
            bytes_of(codes),
            rows,
            cols,
            1 / cols,
            eps,
            scale,
            SOFTWARE=interprets() if codes is None else casts_in_software(x.device),
            **tiles,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # as the reference, every product and every sum is rounded
        )


def residual_mix_bwd_out(
    dx: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor,
    streams: list[Tensor],
    factors: list[Tensor | None],
    numbers: list[float],
    eps: float,
    dstreams: list[Tensor],
    sums: list[Tensor | None],
) -> None:
    """Into dstreams, like the streams, and by term sums (T,), None without a factor; contiguous."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    tiles = _tiles(cols)
    with torch.cuda.device_of(x):
        residual_mix_bwd_kernel[(triton.cdiv(rows, tiles["TILE_M"]),)](
            dx,
            dnormed,
            x,
            *_terms(streams, factors, numbers),
            tuple(dstreams),
            tuple(sums),
            rows,
            cols,
            1 / cols,
            eps,
            SOFTWARE=interprets(),
            **tiles,
            num_warps=NUM_WARPS,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: the mixes of the record (README: format)."""
    options = {"num_warps": NUM_WARPS}
    constexprs = {"SOFTWARE": False, **_tiles(768)}
    floats = dict.fromkeys(("inverse_cols", "eps"), "fp32")
    pointer, wide = "*bf16:16", "i32:16"
    cases = (  # name, types of the factors' strides: "i32:16" is 0, of a factor for all tokens
        ("mlp", (wide, wide)),
        ("attention", (wide, wide, "i32", "i32")),
        ("skip", (None, "i32")),
        ("mudd, 6 terms", (None, *("i32",) * 5)),
    )
    for name, strides in cases:
        terms = {
            "streams": (pointer,) * len(strides),
            "factors": tuple(s and "*bf16" for s in strides),
            "strides": tuple(s or wide for s in strides),
            "numbers": ("fp32",) * len(strides),
            "widths": (wide,) * len(strides),
            "rows": wide,
            "cols": wide,
            **floats,
        }
        outputs = {"x_ptr": pointer, "normed_ptr": pointer, "codes_ptr": "*u8:16", "scale": "fp32"}
        exact = {**options, "enable_fp_fusion": False}
        yield name, residual_mix_kernel, terms | outputs, constexprs, exact
        grads = dict.fromkeys(("dx_ptr", "dnormed_ptr", "x_ptr"), pointer)
        grads["dstreams"] = (pointer,) * len(strides)
        grads["sums"] = tuple(s and "*fp32" for s in strides)
        yield f"{name}, backward", residual_mix_bwd_kernel, terms | grads, constexprs, options
