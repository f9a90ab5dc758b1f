"""Triton version of `normuon_step`: two launches a bank, one without the variance's state.

Lines are the rows of a matrix, or its columns where it has fewer rows than columns.
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
    max_bits,
    round_to_bf16,
    store_codes,
    to_float,
)

LINES = 16  # of which a program finds the variance: as many as the front door has partials for
SECOND_TILES = {"LINES": LINES, "STEP": 256}
UPDATE_TILES = {"TILE_M": 64, "TILE_N": 128}
NUM_WARPS = {"second": 4, "update": 8}


@triton.jit
def _at_least(x, least):
    """max(x, least), where NaN stays NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def _line_factor(second):
    """What O is multiplied by in a line, before its matrix's norm is put back."""
    root = tl.sqrt_rn(_at_least(second, 1e-10))
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def normuon_second_kernel(
    o_ptr,
    second_ptr,
    partials_ptr,
    rows,
    cols,
    lerp_weight,
    BY_ROW: tl.constexpr,
    SOFTWARE: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    """S of LINES lines of o (batch, rows, cols), and what they add to |O|² and |O·f|²."""
    num_lines = rows if BY_ROW else cols
    size = cols if BY_ROW else rows
    strips = tl.cdiv(num_lines, LINES)
    batch = (tl.program_id(0) // strips).to(tl.int64)
    line = tl.program_id(0) % strips * LINES + tl.arange(0, LINES)
    o_ptr += batch * rows * cols
    if BY_ROW:
        squares = tl.zeros((LINES, STEP), dtype=tl.float32)
    else:
        squares = tl.zeros((STEP, LINES), dtype=tl.float32)
    for start in range(0, size, STEP):
        place = start + tl.arange(0, STEP)
        if BY_ROW:
            mask = (line[:, None] < num_lines) & (place[None, :] < size)
            ptrs = o_ptr + line[:, None].to(tl.int64) * cols + place[None, :]
        else:
            mask = (place[:, None] < size) & (line[None, :] < num_lines)
            ptrs = o_ptr + place[:, None].to(tl.int64) * cols + line[None, :]
        o = to_float(tl.load(ptrs, mask=mask, other=0.0), SOFTWARE)
        squares += o * o
    sums = tl.sum(squares, axis=1 if BY_ROW else 0)

    second_ptrs = second_ptr + batch * num_lines + line
    second = tl.load(second_ptrs, mask=line < num_lines, other=0.0)
    mean = tl.div_rn(sums, tl.full((LINES,), 1.0, tl.float32) * size)
    difference = mean - second
    near_mean = mean - difference * (1 - lerp_weight)
    second = tl.where(lerp_weight < 0.5, second + lerp_weight * difference, near_mean)
    tl.store(second_ptrs, second, mask=line < num_lines)
    factor = _line_factor(second)
    partials_ptr += 2 * tl.program_id(0).to(tl.int64)
    tl.store(partials_ptr, tl.sum(sums, axis=0))  # of lines that are none, the sums are 0
    tl.store(partials_ptr + 1, tl.sum(sums * factor * factor, axis=0))


@triton.jit
def _norm_ratio(partials_ptr, count):
    """|O| / |O·f| of a matrix from `count` pairs of sums."""
    BLOCK: tl.constexpr = 128
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    new_squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        squares += tl.load(partials_ptr + 2 * place, mask=place < count, other=0.0)
        new_squares += tl.load(partials_ptr + 2 * place + 1, mask=place < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    new_norm = tl.sqrt_rn(tl.sum(new_squares, axis=0))
    return tl.div_rn(norm, _at_least(new_norm, 1e-10))


@triton.jit
def normuon_update_kernel(
    weight_ptr,
    low_ptr,
    o_ptr,
    second_ptr,
    partials_ptr,
    lr_ptr,
    decay_lr_ptr,
    wd_ptr,
    scale_ptr,
    out_ptr,
    out_t_ptr,
    amax_ptr,
    rows,
    cols,
    BY_ROW: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    NEAREST: tl.constexpr,
    SOFTWARE: tl.constexpr,
    LINES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """New weights, one tile a program; the reference's operations in its order.

    low, second with partials, scale with amax, out and out_t may be None. amax points to the bits
    of float32 numbers that aren't negative.
    """
    row_tiles = tl.cdiv(rows, TILE_M)
    col_tiles = tl.cdiv(cols, TILE_N)
    tile = tl.program_id(0)
    batch = (tile // col_tiles // row_tiles).to(tl.int64)
    row = (tile // col_tiles % row_tiles).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    col = (tile % col_tiles).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    matrix = batch * rows * cols
    place = matrix + row[:, None] * cols + col[None, :]
    o = tl.load(o_ptr + place, mask=mask, other=0.0)
    old = tl.load(weight_ptr + place, mask=mask, other=0.0)
    if low_ptr is not None:
        low = tl.load(low_ptr + place, mask=mask, other=0).to(tl.int32)
        if not NEAREST:
            low = low & 0xFFFF
        upper = old.to(tl.uint16, bitcast=True).to(tl.int32) << 16
        exact = (upper + low).to(tl.float32, bitcast=True)
    else:
        exact = to_float(old, SOFTWARE)

    direction = to_float(o, SOFTWARE)
    if second_ptr is not None:
        num_lines = rows if BY_ROW else cols
        count = tl.cdiv(num_lines, LINES)
        ratio = _norm_ratio(partials_ptr + 2 * batch * count, count)
        line = row if BY_ROW else col
        second_ptrs = second_ptr + batch * num_lines + line
        second = tl.load(second_ptrs, mask=line < num_lines, other=1.0)
        factor = _line_factor(second) * ratio
        direction = direction * (factor[:, None] if BY_ROW else factor[None, :])
        if o.dtype == tl.bfloat16:
            direction = to_float(round_to_bf16(direction, SOFTWARE), SOFTWARE)
        else:
            direction = direction.to(o.dtype).to(tl.float32)

    lr = tl.load(lr_ptr + batch).to(tl.float32)
    decay_lr = tl.load(decay_lr_ptr + batch).to(tl.float32)
    wd = tl.load(wd_ptr).to(tl.float32)
    shrinks = exact
    if CAUTIOUS:
        shrinks = tl.where(direction * exact >= 0, exact, 0.0)
    exact = exact - shrinks * wd * decay_lr - direction * lr

    if low_ptr is not None:
        bits = exact.to(tl.int32, bitcast=True)
        tl.store(low_ptr + place, bits.to(tl.int16), mask=mask)
        if NEAREST:
            bits += 0x8000
        weight = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif weight_ptr.dtype.element_ty == tl.bfloat16:
        weight = round_to_bf16(exact, SOFTWARE)
    else:
        weight = exact
    tl.store(weight_ptr + place, weight, mask=mask)
    if scale_ptr is not None:
        stored = to_float(weight, SOFTWARE)
        tl.atomic_max(amax_ptr + batch, max_bits(stored))
        code = fp8_bits(tl.div_rn(stored, tl.load(scale_ptr + batch)), 3, SOFTWARE)
        store_codes(code, out_ptr, out_t_ptr, matrix, row, col, rows, cols)


def normuon_step_out(
    weight_BMN: Tensor,
    low_BMN: Tensor | None,
    o_BMN: Tensor,
    second: Tensor | None,
    partials: Tensor | None,
    lr_B: Tensor,
    decay_lr_B: Tensor,
    wd: Tensor,
    beta2: float,
    cautious: bool,
    nearest: bool,
    scale_B: Tensor | None,
    row: Tensor | None,
    transposed: Tensor | None,
    amax_B: Tensor | None,
) -> None:
    """Contiguous tensors; partials (B, ⌈lines/16⌉, 2) float32, of any content."""
    batch, rows, cols = weight_BMN.shape
    by_row = rows >= cols
    # The reference rounds every product and every sum on its own.
    options = {"BY_ROW": by_row, "enable_fp_fusion": False}
    options["SOFTWARE"] = casts_in_software(weight_BMN.device)
    with torch.cuda.device_of(weight_BMN):  # a launch goes to the current device
        if second is not None:
            normuon_second_kernel[(batch * triton.cdiv(max(rows, cols), LINES),)](
                o_BMN,
                second,
                partials,
                rows,
                cols,
                1 - beta2,
                **SECOND_TILES,
                **options,
                num_warps=NUM_WARPS["second"],
            )
        tiles = triton.cdiv(rows, UPDATE_TILES["TILE_M"]) * triton.cdiv(
            cols, UPDATE_TILES["TILE_N"]
        )
        normuon_update_kernel[(batch * tiles,)](
            weight_BMN,
            low_BMN,
            o_BMN,
            second,
            partials,
            lr_B,
            decay_lr_B,
            wd,
            scale_B,
            bytes_of(row),
            bytes_of(transposed),
            None if amax_B is None else amax_B.view(torch.int32),
            rows,
            cols,
            CAUTIOUS=cautious,
            NEAREST=nearest,
            LINES=LINES,
            **UPDATE_TILES,
            **options,
            num_warps=NUM_WARPS["update"],
        )


def static_variants():
    """What benchmarks/static_check.py compiles: all that training launches (README: format)."""
    sizes = {"rows": "i32:16", "cols": "i32:16"}
    state = {"second_ptr": "*fp32:16", "partials_ptr": "*fp32:16"}
    rates = dict.fromkeys(("lr_ptr", "decay_lr_ptr", "wd_ptr"), "*fp64:16")
    fp8 = {"scale_ptr": "*fp32:16", "amax_ptr": "*i32:16"}
    fp8 |= dict.fromkeys(("out_ptr", "out_t_ptr"), "*u8:16")
    types = (("bf16", True, "bf16"), ("bf16", True, "fp16"), ("fp32", False, "fp32"))
    for by_row, lines in ((True, "rows"), (False, "columns")):
        flags = {"BY_ROW": by_row, "SOFTWARE": False}
        options = {"num_warps": NUM_WARPS["second"], "enable_fp_fusion": False}
        for dtype in ("bf16", "fp16"):
            signature = {"o_ptr": f"*{dtype}:16", **state, **sizes, "lerp_weight": "fp32"}
            name = f"second of {dtype}, {lines}"
            yield name, normuon_second_kernel, signature, {**SECOND_TILES, **flags}, options
        flags |= {"CAUTIOUS": True, "NEAREST": False, "LINES": LINES, **UPDATE_TILES}
        options = options | {"num_warps": NUM_WARPS["update"]}
        for weight, low, o in types:
            signature = {"weight_ptr": f"*{weight}:16", "o_ptr": f"*{o}:16"}
            signature |= {**state, **rates, **sizes}
            constexprs = flags | dict.fromkeys(fp8)
            name = f"update {weight}, O {o}, {lines}"
            if low:
                signature["low_ptr"] = "*i16:16"
                yield f"{name}, fp8", normuon_update_kernel, signature | fp8, flags, options
            else:
                constexprs["low_ptr"] = None
            yield name, normuon_update_kernel, signature, constexprs, options
