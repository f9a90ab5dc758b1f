"""Triton versions of the `fp8_matmul` family, for GPUs with FP8 tensor cores (sm_89 and later).

One kernel: a tile of D = A·Bᵀ a program, rastered in groups of row tiles so that programs which run
together share operands in L2; then the epilogue, on the tile in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from speedrun.triton_kernels._fp8 import casts_in_software, round_to_bf16, round_to_fp8

PLAIN, RELU2, DRELU2 = (tl.constexpr(i) for i in range(3))  # EPILOGUE
BLOCK_K = 128  # also the length of K after which a precise sum is promoted to float32
GROUP_M = 8  # rows of tiles whose programs run together


@triton.jit
def _raise_amax(amax_ptr, x):
    """amax = max(amax, |x|) as integers: the order of non-negative floats, with NaN above all."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit
def fp8_matmul_kernel(
    a,
    b,
    scale_a_ptr,
    scale_b_ptr,
    row_scale_ptr,
    out_scale_ptr,
    post_ptr,
    post_scale_ptr,
    out_ptr,
    out_t_ptr,
    amax_ptr,
    M,
    N,
    K,
    a_batch_stride,
    a_row_stride,
    b_batch_stride,
    b_row_stride,
    EPILOGUE: tl.constexpr,
    FAST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles of one matrix, batch, SPLIT_K).

    a (batch, M, K), b (batch, N, K): pointers, or with DESCRIPTORS tensor descriptors of
    (batch·M, K) and (batch·N, K). Outputs contiguous. Pointers that an epilogue lacks are None:
      PLAIN: out (batch, M, N), times row_scale (M,), over out_scale; ACCUMULATE: out += (fp32)
      RELU2: post (M, N) bf16, out (M, N) and out_t (N, M) fp8 over out_scale, amax (int32 view)
      DRELU2: the same outputs from a given post (M, N); without out_scale out is bf16
    """
    pid = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    row = (first_m + in_group % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = in_group // group_m * BLOCK_N + tl.arange(0, BLOCK_N)

    tiles_k = tl.cdiv(K, BLOCK_K)
    begin = 0
    if SPLIT_K > 1:
        begin = tl.program_id(2) * tiles_k // SPLIT_K
        tiles_k = (tl.program_id(2) + 1) * tiles_k // SPLIT_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        a_row = (batch * M).to(tl.int32) + (first_m + in_group % group_m) * BLOCK_M
        b_row = (batch * N).to(tl.int32) + in_group // group_m * BLOCK_N
    else:
        k = tl.arange(0, BLOCK_K)
        # Rows past the end are read from the last one: their results are not stored.
        a_rows = a + batch * a_batch_stride + tl.minimum(row, M - 1).to(tl.int64) * a_row_stride
        b_rows = b + batch * b_batch_stride + tl.minimum(col, N - 1).to(tl.int64) * b_row_stride
        a_ptrs = a_rows[:, None] + k[None, :]
        b_ptrs = b_rows[:, None] + k[None, :]
    for tile_k in range(begin, tiles_k):
        if DESCRIPTORS:
            a_tile = a.load([a_row, tile_k * BLOCK_K])
            b_tile = b.load([b_row, tile_k * BLOCK_K])
        else:
            inside = k[None, :] < K - tile_k * BLOCK_K
            a_tile = tl.load(a_ptrs + tile_k * BLOCK_K, mask=inside, other=0.0)
            b_tile = tl.load(b_ptrs + tile_k * BLOCK_K, mask=inside, other=0.0)
        if FAST:
            acc = tl.dot(a_tile, b_tile.T, acc)
        else:
            acc = tl.dot(a_tile, b_tile.T, acc, max_num_imprecise_acc=BLOCK_K)

    acc *= tl.load(scale_a_ptr) * tl.load(scale_b_ptr)
    inside = (row[:, None] < M) & (col[None, :] < N)
    offset = row[:, None].to(tl.int64) * N + col[None, :]
    if EPILOGUE == PLAIN:
        if row_scale_ptr is not None:
            acc *= tl.load(row_scale_ptr + row, mask=row < M, other=0.0)[:, None]
        offset += batch * M * N
    elif EPILOGUE == RELU2:
        pre = round_to_bf16(acc, SOFTWARE).to(tl.float32)
        relu = (pre + tl.abs(pre)) * 0.5  # exact, and keeps NaN
        post = round_to_bf16(relu * relu, SOFTWARE)
        if post_ptr is not None:
            tl.store(post_ptr + offset, post, mask=inside)
        acc = post.to(tl.float32)
    else:
        post = tl.load(post_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if post_scale_ptr is not None:
            post *= tl.load(post_scale_ptr)
        acc *= 2.0 * tl.sqrt(post)
    if amax_ptr is not None:
        _raise_amax(amax_ptr, tl.where(inside, acc, 0.0))

    if out_scale_ptr is not None:
        inverse = 1.0 / tl.load(out_scale_ptr)
        result = round_to_fp8(acc * inverse, out_ptr.dtype.element_ty, SOFTWARE)
    elif out_ptr.dtype.element_ty == tl.bfloat16:
        result = round_to_bf16(acc, SOFTWARE)
    else:
        result = acc
    if ACCUMULATE and SPLIT_K > 1:
        tl.atomic_add(out_ptr + offset, result, mask=inside, sem="relaxed")
    else:
        if ACCUMULATE:
            result += tl.load(out_ptr + offset, mask=inside)
        tl.store(out_ptr + offset, result, mask=inside)
    if out_t_ptr is not None:
        offset_t = col[:, None].to(tl.int64) * M + row[None, :]
        inside_t = (col[:, None] < N) & (row[None, :] < M)
        tl.store(out_t_ptr + offset_t, tl.trans(result), mask=inside_t)


class Tile(NamedTuple):
    """What a program computes, and with what."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(
    m: int, n: int, fast: bool, aligned: bool, transposed: bool, capability: tuple[int, int]
) -> Tile:
    """The tile for a product of (m, n); `aligned`: to 16 bytes, the rows of both operands;
    `transposed`: whether the result is stored that way too."""
    if not aligned:
        return Tile(64, 64, 8, 2)  # loaded byte by byte: an address for each in a register
    if capability[0] not in (9, 10):
        return Tile(64 if m <= 64 else 128, 128, 8, 3)  # 64 KB: these GPUs have 99 KB a program
    if m <= 64:
        return Tile(64, 128, 4, 4)  # few rows: the weights' bandwidth counts
    if fast and n >= 256 and not transposed:
        return Tile(128, 256, 8, 4)  # 128 registers of sums a thread, most products per byte
    return Tile(128, 128, 8, 4)  # precise sums, or a second layout, take twice the registers


def choose_split(tiles: int, tiles_k: int, num_sms: int) -> int:
    """How many programs share the sums of a tile: as many as fill the SMs best, at most 8.

    Each program keeps 16 steps along K, so that its atomic adds are a small part of its work.
    """

    def idle(split: int) -> float:
        waves = -(-tiles * split // num_sms)
        return waves * num_sms / (tiles * split) + 0.01 * split  # an extra pass of adds costs 1 %

    return min(range(1, max(1, min(8, tiles_k // 16)) + 1), key=idle)


def _is_aligned(x: Tensor) -> bool:
    return all(step % 16 == 0 for step in (x.data_ptr(), *x.stride()[:-1]))


def _is_one_matrix(x: Tensor) -> bool:
    """Whether x, (rows, K) or (batch, rows, K), is one matrix of batch·rows rows."""
    flat = x.dim() == 2 or len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    row = x.stride(-2) >= x.shape[-1] and x.stride(-1) == 1
    return flat and row and 0 < x.numel() < 2**31 * x.shape[-1]


def _descriptor(x: Tensor, block_rows: int) -> TensorDescriptor:
    rows = x.numel() // x.shape[-1]
    return TensorDescriptor(x, [rows, x.shape[-1]], [x.stride(-2), 1], [block_rows, BLOCK_K])


def _launch(
    epilogue: tl.constexpr,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out: Tensor,
    fast: bool,
    *,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    post: Tensor | None = None,
    post_scale: Tensor | None = None,
    out_t: Tensor | None = None,
    amax: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    if out.numel() == 0:
        return
    m, n, k = a.shape[-2], b.shape[-2], a.shape[-1]
    on_gpu = a.device.type == "cuda"
    device = torch.cuda.get_device_properties(a.device) if on_gpu else None
    capability = (device.major, device.minor) if on_gpu else (9, 0)
    aligned = k % 16 == 0 and _is_aligned(a) and _is_aligned(b)
    descriptors = aligned and _is_one_matrix(a) and _is_one_matrix(b) and capability[0] >= 9
    tile = choose_tile(m, n, fast, aligned, out_t is not None, capability)
    num_tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    num_sms = device.multi_processor_count if on_gpu else 132
    split = choose_split(num_tiles, triton.cdiv(k, BLOCK_K), num_sms) if accumulate else 1
    with torch.cuda.device_of(a):  # a launch goes to the current device
        fp8_matmul_kernel[(num_tiles, a.shape[0] if a.dim() == 3 else 1, split)](
            _descriptor(a, tile.block_m) if descriptors else a,
            _descriptor(b, tile.block_n) if descriptors else b,
            scale_a,
            scale_b,
            row_scale,
            out_scale,
            post,
            post_scale,
            out,
            out_t,
            None if amax is None else amax.view(torch.int32),
            m,
            n,
            k,
            a.stride(0) if a.dim() == 3 else 0,
            a.stride(-2),
            b.stride(0) if b.dim() == 3 else 0,
            b.stride(-2),
            EPILOGUE=epilogue,
            FAST=fast,
            ACCUMULATE=accumulate,
            SPLIT_K=split,
            DESCRIPTORS=descriptors,
            SOFTWARE=casts_in_software(a.device),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=BLOCK_K,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def fp8_matmul_out(
    a, b, scale_a, scale_b, row_scale, out_scale, out, fast_accum, accumulate
) -> None:
    """`out` (M, N) or (L, M, N) = or += A·Bᵀ·scales, as the front door describes."""
    scales = {"row_scale": row_scale, "out_scale": out_scale}
    _launch(PLAIN, a, b, scale_a, scale_b, out, fast_accum, **scales, accumulate=accumulate)


def fp8_matmul_relu2_out(
    a, b, scale_a, scale_b, post_scale, post, post_f8, post_f8_t, amax, fast_accum
) -> None:
    """`post` (M, N), `post_f8`, `post_f8_t` (N, M); raises `amax` () to the largest post."""
    others = {"post": post, "out_t": post_f8_t, "amax": amax, "out_scale": post_scale}
    _launch(RELU2, a, b, scale_a, scale_b, post_f8, fast_accum, **others)


def fp8_matmul_drelu2_out(
    a, b, scale_a, scale_b, post, post_scale, out_scale, dpre, dpre_t, amax, fast_accum
) -> None:
    """`dpre` (M, N), `dpre_t` (N, M) from `post` (M, N); raises `amax` () to the largest |dpre|."""
    others = {"post": post, "post_scale": post_scale, "out_scale": out_scale}
    _launch(DRELU2, a, b, scale_a, scale_b, dpre, fast_accum, **others, out_t=dpre_t, amax=amax)


def static_variants(capability: tuple[int, int] = (9, 0)):
    """What benchmarks/static_check.py compiles: what training launches, and unaligned."""
    e4m3, e5m2, many = "fp8e4nv", "fp8e5", (49152, 768)
    scale, fp8_post = "*fp32:16", f"*{e4m3}:16"
    relu2 = {"post_ptr": "*bf16:16", "out_scale_ptr": scale, "amax_ptr": "*i32:16"}
    transposed = {"out_t_ptr": f"*{e4m3}:16"}
    dpre = {"post_ptr": "*bf16:16"}
    dpre_f8 = {**relu2, "post_ptr": fp8_post, "post_scale_ptr": scale, "out_t_ptr": f"*{e5m2}:16"}
    # name, epilogue, (m, n), types of a, b and out, fast sums, parts of K, the other pointers
    rows = (
        ("store e4m3 fast", PLAIN, many, e4m3, e4m3, "bf16", True, 1, {}),
        ("store e4m3", PLAIN, many, e4m3, e4m3, "bf16", False, 1, {}),
        ("store e5m2", PLAIN, many, e5m2, e4m3, "bf16", False, 1, {}),
        ("store fp8", PLAIN, many, e4m3, e4m3, e4m3, False, 1, {"out_scale_ptr": scale}),
        ("store rows times", PLAIN, many, e4m3, e4m3, "bf16", True, 1, {"row_scale_ptr": scale}),
        ("store few rows", PLAIN, (64, 768), e4m3, e4m3, "bf16", False, 1, {}),
        ("store unaligned", PLAIN, many, e4m3, e4m3, "bf16", True, 1, {}),
        ("add e5m2", PLAIN, (768, 50304), e5m2, e4m3, "fp32", False, 1, {}),
        ("add e5m2 in parts", PLAIN, (3072, 768), e5m2, e4m3, "fp32", False, 4, {}),
        ("relu2", RELU2, many, e4m3, e4m3, e4m3, True, 1, relu2),
        ("relu2 both layouts", RELU2, many, e4m3, e4m3, e4m3, True, 1, {**relu2, **transposed}),
        ("drelu2 bf16", DRELU2, many, e5m2, e4m3, "bf16", False, 1, dpre),
        ("drelu2 fp8, both layouts", DRELU2, many, e5m2, e4m3, e5m2, False, 1, dpre_f8),
    )
    for name, epilogue, (m, n), a, b, out, fast, split, pointers in rows:
        aligned = "unaligned" not in name
        tma = aligned and capability[0] >= 9
        multiple = ":16" if aligned else ""
        tile = choose_tile(m, n, fast, aligned, "out_t_ptr" in pointers, capability)
        sizes = ("M", "N", "K", "a_batch_stride", "a_row_stride", "b_batch_stride", "b_row_stride")
        signature = {
            "a": f"tensordesc<{a}[{tile.block_m}, {BLOCK_K}]>" if tma else f"*{a}{multiple}",
            "b": f"tensordesc<{b}[{tile.block_n}, {BLOCK_K}]>" if tma else f"*{b}{multiple}",
            "scale_a_ptr": scale,
            "scale_b_ptr": scale,
            "out_ptr": f"*{out}:16",
            **dict.fromkeys(sizes, f"i32{multiple}"),
            **pointers,
        }
        constexprs = {
            "EPILOGUE": epilogue.value,
            "FAST": fast,
            "ACCUMULATE": name.startswith("add"),
            "SPLIT_K": split,
            "DESCRIPTORS": tma,
            "SOFTWARE": capability < (9, 0),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": BLOCK_K,
            "GROUP_M": GROUP_M,
        }
        absent = [p.name for p in fp8_matmul_kernel.params if p.name not in signature | constexprs]
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield name, fp8_matmul_kernel, signature, {**constexprs, **dict.fromkeys(absent)}, options
