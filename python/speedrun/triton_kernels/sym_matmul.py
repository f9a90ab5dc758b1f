"""Triton version of `sym_matmul`: the tiles of one triangle, each stored on both sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, round_to_bf16, to_float


@triton.jit
def _pair(index):
    """(row, column) number `index` of those with column <= row, row after row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the root may be an ulp off
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def sym_matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    N,
    K,
    a_batch_stride,
    a_row_stride,
    b_batch_stride,
    b_row_stride,
    c_batch_stride,
    c_row_stride,
    out_batch_stride,
    out_row_stride,
    alpha,
    beta,
    TRANS: tl.constexpr,
    HAS_C: tl.constexpr,
    SOFTWARE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = alpha·A·Bᵀ + beta·C, (batch, N, N), one square tile and its mirror image a program.

    a, b: (batch, N, K), with TRANS (batch, K, N) and alpha·Aᵀ·B. Strides in elements, of the last
    dimensions 1. Sums in float32. out is symmetric in every bit: of a tile on the diagonal, too,
    only the lower triangle counts.
    """
    tiles = tl.cdiv(N, TILE)
    pairs = tiles * (tiles + 1) // 2
    batch = (tl.program_id(0) // pairs).to(tl.int64)
    tile_row, tile_col = _pair(tl.program_id(0) % pairs)
    row = tile_row * TILE + tl.arange(0, TILE)
    col = tile_col * TILE + tl.arange(0, TILE)
    k = tl.arange(0, BLOCK_K)
    row, col, k_64 = row.to(tl.int64), col.to(tl.int64), k.to(tl.int64)
    a_ptr += batch * a_batch_stride
    b_ptr += batch * b_batch_stride
    if TRANS:
        a_ptrs = a_ptr + k_64[:, None] * a_row_stride + row[None, :]
        b_ptrs = b_ptr + k_64[:, None] * b_row_stride + col[None, :]
        a_step = BLOCK_K * a_row_stride
        b_step = BLOCK_K * b_row_stride
    else:
        a_ptrs = a_ptr + row[:, None] * a_row_stride + k[None, :]
        b_ptrs = b_ptr + col[None, :] * b_row_stride + k[:, None]
        a_step = BLOCK_K
        b_step = BLOCK_K

    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        if TRANS:
            a_mask = inside[:, None] & (row[None, :] < N)
        else:
            a_mask = inside[None, :] & (row[:, None] < N)
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & (col[None, :] < N), other=0.0)
        if SOFTWARE:  # whose dot of bf16 operands is wrong
            a, b = to_float(a, SOFTWARE), to_float(b, SOFTWARE)
        if TRANS:
            a = tl.trans(a)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += a_step
        b_ptrs += b_step

    mask = (row[:, None] < N) & (col[None, :] < N)
    acc *= alpha
    if HAS_C:
        c_ptrs = c_ptr + batch * c_batch_stride + row[:, None] * c_row_stride + col[None, :]
        acc += beta * to_float(tl.load(c_ptrs, mask=mask, other=0.0), SOFTWARE)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        result = round_to_bf16(acc, SOFTWARE)
    else:
        result = acc.to(out_ptr.dtype.element_ty)
    out_ptr += batch * out_batch_stride
    out_ptrs = out_ptr + row[:, None] * out_row_stride + col[None, :]
    mirror_ptrs = out_ptr + col[:, None] * out_row_stride + row[None, :]
    mirrored = tl.trans(result)
    if tile_row == tile_col:
        result = tl.where(row[:, None] >= col[None, :], result, mirrored)
    else:
        tl.store(mirror_ptrs, mirrored, mask=(col[:, None] < N) & (row[None, :] < N))
    tl.store(out_ptrs, result, mask=mask)


class Tile(NamedTuple):
    """Side of the square that a program computes, and with what."""

    side: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_tile(n: int, batch: int, num_sms: int, shared_bytes: int) -> Tile:
    """The tile for `batch` products of (n, n) on a GPU of which a block may have `shared_bytes`."""
    side = triton.cdiv(n, 128)
    if n > 64 and batch * side * (side + 1) // 2 >= num_sms * 3 // 4:
        # Two reads of 128 · 64 for 128 · 128 · 64 products: half the traffic of the small tile.
        # Stages of 32 KiB: 4 hide the latency of HBM, 3 are what GPUs with 99 KiB have room for.
        return Tile(128, 64, 8, 4 if shared_bytes >= 131_072 else 3)
    # Fewer tiles would leave SMs idle: 3 matrices of 768 are 63 large tiles or 234 small ones.
    # Stages of 16 KiB, 4 of them: three programs fit on an SM of H100.
    return Tile(64, 64, 4, 4)


def sym_matmul_out(
    a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, trans: bool, alpha: float, beta: float
) -> None:
    """Writes alpha·A·Bᵀ + beta·C of 3-D tensors into `out` (B, N, N): see the kernel."""
    if out.numel() == 0:
        return
    batch, n, _ = out.shape
    num_sms = shared_bytes = 0
    if a.is_cuda:
        gpu = torch.cuda.get_device_properties(a.device)
        num_sms, shared_bytes = gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    tile = choose_tile(n, batch, num_sms, shared_bytes)
    tiles = triton.cdiv(n, tile.side)
    strides = (x.stride()[:2] for x in (a, b, out if c is None else c, out))
    with torch.cuda.device_of(a):  # a launch goes to the current device
        sym_matmul_kernel[(batch * tiles * (tiles + 1) // 2,)](
            a,
            b,
            c,
            out,
            n,
            a.shape[-2 if trans else -1],
            *(stride for pair in strides for stride in pair),
            alpha,
            beta,
            TRANS=trans,
            HAS_C=c is not None,
            SOFTWARE=interprets(),
            TILE=tile.side,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: tiles, layouts and types, with C and without."""
    names = ("a", "b", "c", "out")
    signature = {f"{name}_{kind}_stride": "i64:16" for name in names for kind in ("batch", "row")}
    signature |= {"N": "i32:16", "K": "i32:16", "alpha": "fp32", "beta": "fp32"}
    for dtype in ("bf16", "fp16"):
        for what, trans, has_c in (("XXt", False, False), ("XtX", True, False), ("C", False, True)):
            for batch in (3, 24):
                tile = choose_tile(768, batch, 132, 227 << 10)
                pointers = {f"{name}_ptr": f"*{dtype}:16" for name in names}
                constexprs = {"TRANS": trans, "HAS_C": has_c, "SOFTWARE": False}
                constexprs |= {"TILE": tile.side, "BLOCK_K": tile.block_k}
                if not has_c:
                    del pointers["c_ptr"]
                    constexprs["c_ptr"] = None
                options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                name = f"{dtype} {what} {tile.side}"
                yield name, sym_matmul_kernel, signature | pointers, constexprs, options
