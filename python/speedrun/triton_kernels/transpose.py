"""Triton version of `transpose`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Moved as integers of the same size: exact for every bit pattern, and for types Triton lacks.
_MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def transpose_kernel(
    x_ptr,
    out_ptr,
    rows,
    cols,
    x_batch_stride,
    x_row_stride,
    out_batch_stride,
    out_row_stride,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """out (batch, cols, rows) = or += x (batch, rows, cols) transposed, one square tile a program.

    Strides in elements, of the last dimensions 1. ADD: in float32, rounded once.
    """
    row_tiles = tl.cdiv(rows, TILE)
    col_tiles = tl.cdiv(cols, TILE)
    tile = tl.program_id(0)
    tile_row = tile // col_tiles
    batch = (tile_row // row_tiles).to(tl.int64)
    row = (tile_row % row_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    col = (tile % col_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)

    x_ptrs = x_ptr + batch * x_batch_stride + row[:, None] * x_row_stride + col[None, :]
    values = tl.trans(tl.load(x_ptrs, mask=(row[:, None] < rows) & (col[None, :] < cols)))

    out_ptrs = out_ptr + batch * out_batch_stride + col[:, None] * out_row_stride + row[None, :]
    out_mask = (col[:, None] < cols) & (row[None, :] < rows)
    if ADD:
        old = tl.load(out_ptrs, mask=out_mask)
        values = (old.to(tl.float32) + values.to(tl.float32)).to(old.dtype)
    tl.store(out_ptrs, values, mask=out_mask)


def tile_size(element_bytes: int) -> int:
    """Side of a tile: rows of 128 bytes or more on both sides, at most 16 KB a tile."""
    return 128 if element_bytes == 1 else 64


def transpose(x: Tensor, out: Tensor, add: bool) -> None:
    """Writes `x` (M, N) or (B, M, N) transposed into `out` (N, M) or (B, N, M), or adds it."""
    if x.numel() == 0:
        return
    if not add:
        x, out = (t.view(_MOVED_AS[t.element_size()]) for t in (x, out))
    if x.dim() == 2:
        x, out = x[None], out[None]
    batch, rows, cols = x.shape
    tile = tile_size(x.element_size())
    grid = (batch * triton.cdiv(rows, tile) * triton.cdiv(cols, tile),)
    with torch.cuda.device_of(x):  # a launch goes to the current device
        transpose_kernel[grid](
            x,
            out,
            rows,
            cols,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            ADD=add,
            TILE=tile,
            num_warps=4,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: every type, aligned (its README has the format)."""
    sizes = {"x_batch_stride": "i64:16", "out_batch_stride": "i64:16"}
    for name in ("rows", "cols", "x_row_stride", "out_row_stride"):
        sizes[name] = "i32:16"
    types = (("u8", 1, False), ("i16", 2, False), ("i32", 4, False))
    types += (("fp16", 2, True), ("bf16", 2, True), ("fp32", 4, True))
    for dtype, element_bytes, add in types:
        signature = {"x_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", **sizes}
        constexprs = {"ADD": add, "TILE": tile_size(element_bytes)}
        name = f"{dtype} {'add' if add else 'move'}"
        yield name, transpose_kernel, signature, constexprs, {"num_warps": 4}
