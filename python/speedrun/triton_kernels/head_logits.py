"""Triton versions of `head_logits`: the head's product with sums and factors behind it, and what
targets add. reference/head_logits.py has the formulas, ops/head_logits.py the shapes.
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
    store_rounded,
    to_float,
)

LOG2E = math.log2(math.e)
BLOCK_COLUMNS = 128  # of a partial sum, and so of a tile
TILE = {"BLOCK_M": 128, "BLOCK_N": BLOCK_COLUMNS, "BLOCK_K": 128, "GROUP_M": 8}
PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 4}
# Of columns of dW: a program has 16 of them, 64 bytes of a row, and takes 32 entries at once. The
# commonest token's are one after the other: 2,000 of them are 63 steps of a program.
COLUMNS_TILE = {"BLOCK_V": 16, "BLOCK_E": 32, "BLOCK_D": 128}
NUM_WARPS = 4


@triton.jit
def head_logits_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    sums_ptr,
    g_ptr,
    g_t_ptr,
    rows,
    cols,
    dim,
    slope,
    offset,
    exponent,
    shift,
    g_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of x (rows, dim) times w (cols, dim), both e4m3: sums (tiles of columns, rows), bytes
    g (rows, cols) and g_t (cols, rows). e over g_scale is 2^(exponent·σ + shift)."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    row = (first_m + in_group % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = in_group // group_m
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    k = tl.arange(0, BLOCK_K)
    # Rows past the end are read from the last one: their results are not stored.
    x_ptrs = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * dim + k[None, :]
    w_ptrs = w_ptr + tl.minimum(col, cols - 1).to(tl.int64)[:, None] * dim + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        inside = k[None, :] < dim - start
        x = tl.load(x_ptrs + start, mask=inside, other=0.0)
        w = tl.load(w_ptrs + start, mask=inside, other=0.0)
        acc = tl.dot(x, w.T, acc)

    slope *= tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
    sigmoid = 1.0 / (1.0 + tl.exp2(acc * slope + offset))
    power = tl.exp2(sigmoid * exponent + shift)
    in_rows, in_cols = row < rows, col < cols
    sums = tl.sum(tl.where(in_cols[None, :], power, 0.0), axis=1) * g_scale
    tl.store(sums_ptr + tile_n.to(tl.int64) * rows + row, sums, mask=in_rows)
    # In integers, as softcap_ce.py does it and for its reason: the GPU's own conversion is stored
    # wrong where both layouts are wanted (ptxas 12.8).
    code = fp8_bits(power * (sigmoid - sigmoid * sigmoid), 2, True)
    mask = in_rows[:, None] & in_cols[None, :]
    tl.store(g_ptr + row[:, None].to(tl.int64) * cols + col[None, :], code, mask=mask)
    t_ptrs = g_t_ptr + col[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(t_ptrs, tl.trans(code), mask=in_cols[:, None] & in_rows[None, :])


@triton.jit
def _factors(z, a, b, c):
    """σ, e and g of logits before the softcap."""
    sigmoid = 1.0 / (1.0 + tl.exp(-(z + b) / c))
    e = tl.exp(a * (sigmoid - 1.0))
    return sigmoid, e, e * sigmoid * (1.0 - sigmoid)


@triton.jit
def target_terms_kernel(
    sums_ptr,
    g_ptr,
    g_t_ptr,
    x_ptr,
    w_ptr,
    x_f8_ptr,
    w_f8_ptr,
    x_scale_ptr,
    w_scale_ptr,
    targets_ptr,
    weights_ptr,
    loss_ptr,
    factors_ptr,
    sides_ptr,
    rows,
    cols,
    dim,
    a,
    b,
    c,
    NUM_TARGETS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A row: loss, factor (rows,), sides (rows, NUM_TARGETS), and bytes of g and g_t that are 0.

    BLOCK_T, BLOCK_D: powers of two that hold the targets and the dim. A target of cols or more
    makes the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_B,), tl.float32)
    num_sums = tl.cdiv(cols, BLOCK_COLUMNS)
    for start in range(0, num_sums, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        total += tl.load(sums_ptr + i.to(tl.int64) * rows + row, mask=i < num_sums, other=0.0)
    total = tl.sum(total, axis=0)

    m = tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + row * NUM_TARGETS + m, mask=m < NUM_TARGETS, other=-1)
    valid = (target >= 0) & (target < cols)
    weight = tl.where(valid, tl.load(weights_ptr + m, mask=m < NUM_TARGETS, other=0.0), 0.0)
    # Of row m of this: which targets are equal to m. The other way round it is m's own weight.
    other = tl.load(targets_ptr + row * NUM_TARGETS + m, mask=m < NUM_TARGETS, other=-1)
    equal = (target[:, None] == other[None, :]) & valid[:, None]
    first = valid & (tl.sum((equal & (m[None, :] < m[:, None])).to(tl.int32), axis=1) == 0)
    other_weight = tl.load(weights_ptr + m, mask=m < NUM_TARGETS, other=0.0)
    of_column = tl.sum(tl.where(equal, other_weight[None, :], 0.0), axis=1)

    d = tl.arange(0, BLOCK_D)
    in_dim = d < dim
    w_offsets = target[:, None] * dim + d[None, :]
    mask = valid[:, None] & in_dim[None, :]
    x = to_float(tl.load(x_ptr + row * dim + d, mask=in_dim, other=0.0), SOFTWARE)
    w = to_float(tl.load(w_ptr + w_offsets, mask=mask, other=0.0), SOFTWARE)
    sigmoid, e, g = _factors(tl.sum(x[None, :] * w, axis=1), a, b, c)
    x_f8 = tl.load(x_f8_ptr + row * dim + d, mask=in_dim, other=0.0).to(tl.float32)
    w_f8 = tl.load(w_f8_ptr + w_offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
    _, e_f8, _ = _factors(tl.sum(x_f8[None, :] * w_f8, axis=1) * scale, a, b, c)
    total += tl.sum(tl.where(first, e - e_f8, 0.0), axis=0)

    factor = tl.sum(weight, axis=0) * (a / c) / total
    lse = a + tl.log(total)
    loss = tl.sum(tl.where(valid, weight * (lse - a * sigmoid), 0.0), axis=0)
    wrong = tl.max((target >= cols).to(tl.int32), axis=0) > 0
    tl.store(loss_ptr + row, tl.where(wrong, float("nan"), loss))
    tl.store(factors_ptr + row, factor)
    side = factor * g - of_column * sigmoid * (1.0 - sigmoid) * (a / c)
    side = tl.where(first, side, 0.0)
    tl.store(sides_ptr + row * NUM_TARGETS + m, side, mask=m < NUM_TARGETS)
    nothing = tl.zeros((BLOCK_T,), tl.uint8)
    tl.store(g_ptr + row * cols + target, nothing, mask=first)
    tl.store(g_t_ptr + target * rows + row, nothing, mask=first)


@triton.jit
def add_target_rows_kernel(
    w_ptr,
    targets_ptr,
    sides_ptr,
    dx_ptr,
    cols,
    dim,
    NUM_TARGETS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row of dx (rows, dim) bf16."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_dim = d < dim
    total = to_float(tl.load(dx_ptr + row * dim + d, mask=in_dim, other=0.0), SOFTWARE)
    for m in tl.static_range(NUM_TARGETS):
        target = tl.load(targets_ptr + row * NUM_TARGETS + m)
        mask = d < tl.where((target >= 0) & (target < cols), dim, 0)  # one for 16 bytes
        w = to_float(tl.load(w_ptr + target * dim + d, mask=mask, other=0.0), SOFTWARE)
        total += tl.load(sides_ptr + row * NUM_TARGETS + m) * w
    store_rounded(dx_ptr + row * dim + d, total, in_dim, SOFTWARE)


@triton.jit
def add_target_columns_kernel(
    x_ptr,
    keys_ptr,
    order_ptr,
    starts_ptr,
    sides_ptr,
    dw_ptr,
    cols,
    dim,
    NUM_TARGETS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_V columns and BLOCK_D rows of dw (dim, cols): a product of which entry has which column
    with its rows of x, so that a NaN in one of these reaches all of the program's columns. starts
    (cols + 1,): a column's first entry."""
    first = tl.program_id(0) * BLOCK_V
    begin = tl.load(starts_ptr + first)
    end = tl.load(starts_ptr + tl.minimum(first + BLOCK_V, cols))
    if begin == end:
        return
    v = first + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    for start in range(begin, end, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E)
        inside = entry < end
        key = tl.load(keys_ptr + entry, mask=inside, other=-1)
        place = tl.load(order_ptr + entry, mask=inside, other=0)
        side = tl.load(sides_ptr + place, mask=inside, other=0.0)
        x_ptrs = x_ptr + (place // NUM_TARGETS)[None, :] * dim + d[:, None]
        x = tl.load(x_ptrs, mask=inside[None, :] & (d[:, None] < dim), other=0.0)
        chosen = tl.where(key[:, None] == v[None, :], side[:, None], 0.0)
        acc = tl.dot(to_float(x, SOFTWARE), chosen, acc, input_precision="ieee")
    ptrs = dw_ptr + d[:, None].to(tl.int64) * cols + v[None, :]
    mask = (d[:, None] < dim) & (v[None, :] < cols)
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + acc, mask=mask)


# ---- Launches: outputs last, as ops/head_logits.py gives them ---------------------------------


def _exponents(a: float, b: float, c: float, g_scale: float) -> tuple[float, ...]:
    return -LOG2E / c, -LOG2E * b / c, LOG2E * a, -LOG2E * a - math.log2(g_scale), g_scale


def head_logits_out(x, w, x_scale, w_scale, a, b, c, sums, g, g_t, g_scale: float) -> None:
    """g_scale: of e5m2."""
    rows, dim = x.shape
    cols = len(w)
    if rows == 0 or cols == 0:
        return
    tiles = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(cols, TILE["BLOCK_N"])
    with torch.cuda.device_of(x):  # a launch goes to the current device
        head_logits_kernel[(tiles,)](
            x,
            w,
            x_scale,
            w_scale,
            sums,
            bytes_of(g),
            bytes_of(g_t),
            rows,
            cols,
            dim,
            *_exponents(a, b, c, g_scale),
            **TILE,
            **PRODUCT_OPTIONS,
        )


def head_target_terms_out(sums, g, g_t, *arguments) -> None:
    x, w, x_f8, w_f8, x_scale, w_scale, targets, weights, a, b, c, loss, factors, sides = arguments
    rows, dim = x.shape
    if rows == 0:
        return
    with torch.cuda.device_of(x):
        target_terms_kernel[(rows,)](
            sums,
            bytes_of(g),
            bytes_of(g_t),
            x,
            w,
            x_f8,
            w_f8,
            x_scale,
            w_scale,
            targets,
            weights,
            loss,
            factors,
            sides,
            rows,
            len(w),
            dim,
            a,
            b,
            c,
            **_constants(x, targets),
            BLOCK_T=triton.next_power_of_2(max(1, targets.shape[1])),
            BLOCK_B=512,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
        )


def head_add_target_rows_out(w: Tensor, targets: Tensor, sides: Tensor, dx: Tensor) -> None:
    rows, dim = dx.shape
    if rows == 0:
        return
    constants = _constants(dx, targets)
    with torch.cuda.device_of(dx):
        add_target_rows_kernel[(rows,)](
            w, targets, sides, dx, len(w), dim, **constants, num_warps=NUM_WARPS
        )


def head_add_target_columns_out(x, keys, order, sides, dw) -> None:
    dim, cols = dw.shape
    if keys.numel() == 0:
        return
    columns = torch.arange(cols + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(keys, columns, out_int32=True)
    tile = COLUMNS_TILE
    grid = (triton.cdiv(cols, tile["BLOCK_V"]), triton.cdiv(dim, tile["BLOCK_D"]))
    constants = {k: v for k, v in _constants(x, sides).items() if k not in tile}
    with torch.cuda.device_of(x):
        add_target_columns_kernel[grid](
            x, keys, order, starts, sides, dw, cols, dim, **constants, **tile, num_warps=NUM_WARPS
        )


def _constants(x_TD: Tensor, targets_TM: Tensor) -> dict[str, int | bool]:
    return {
        "NUM_TARGETS": targets_TM.shape[1],
        "SOFTWARE": casts_in_software(x_TD.device),
        "BLOCK_D": triton.next_power_of_2(x_TD.shape[1]),
    }


def static_variants():
    """What benchmarks/static_check.py compiles: as in training (README: format)."""
    sizes = {"rows": "i32:16", "cols": "i32:16", "dim": "i32:16"}
    few = {"cols": "i32:16", "dim": "i32:16"}
    scales = {"x_scale_ptr": "*fp32:16", "w_scale_ptr": "*fp32:16"}
    numbers = dict.fromkeys(("slope", "offset", "exponent", "shift", "g_scale"), "fp32")
    outputs = {"sums_ptr": "*fp32:16", "g_ptr": "*u8:16", "g_t_ptr": "*u8:16"}
    product = {"x_ptr": "*fp8e4nv:16", "w_ptr": "*fp8e4nv:16", **scales, **outputs, **sizes}
    yield "product", head_logits_kernel, product | numbers, TILE, PRODUCT_OPTIONS
    constexprs = {"NUM_TARGETS": 4, "SOFTWARE": False, "BLOCK_D": 1024}
    options = {"num_warps": NUM_WARPS}
    given = {"targets_ptr": "*i64:16", "sides_ptr": "*fp32:16"}
    plain = {"x_ptr": "*bf16:16", "w_ptr": "*bf16:16"}
    terms = {**outputs, **plain, "x_f8_ptr": "*fp8e4nv:16", "w_f8_ptr": "*fp8e4nv:16", **scales}
    terms |= {**given, **dict.fromkeys(("weights_ptr", "loss_ptr", "factors_ptr"), "*fp32:16")}
    terms |= {**sizes, **dict.fromkeys("abc", "fp32")}
    more = {"BLOCK_T": 4, "BLOCK_B": 512, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    yield "terms", target_terms_kernel, terms, constexprs | more, options
    rows = {"w_ptr": "*bf16:16", "dx_ptr": "*bf16:16", **given, **few}
    yield "rows", add_target_rows_kernel, rows, constexprs, options
    columns = {"x_ptr": "*bf16:16", "keys_ptr": "*i32:16", "order_ptr": "*i64:16", **few}
    columns |= {"starts_ptr": "*i32:16", "sides_ptr": "*fp32:16", "dw_ptr": "*fp32:16"}
    yield "columns", add_target_columns_kernel, columns, constexprs | COLUMNS_TILE, options
