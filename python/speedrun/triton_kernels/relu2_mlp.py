"""Triton version of `relu2_mlp`'s 16-bit GEMMs, with relu² or its gradient in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, round_to_bf16


@triton.jit
def relu2_gemm_kernel(
    a_ptr,
    b_ptr,
    post_ptr,
    dpre_ptr,
    M,
    N,
    K,
    BACKWARD: tl.constexpr,
    SOFTWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of A·Bᵀ a program; A (M, K), B (N, K), post and dpre (M, N) bf16, contiguous.

    Forward: post = relu(A·Bᵀ)², rounded before and after the square. Backward: dpre =
    2·A·Bᵀ·√post. Sums in float32.
    """
    # Programs go down GROUP_M row tiles before the next column, so that B's tiles stay in L2.
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * num_n
    first_m = tl.program_id(0) // per_group * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    inside = tl.program_id(0) % per_group
    row = (first_m + inside % group_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (inside // group_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row[:, None] * K + k[None, :]
    b_ptrs = b_ptr + col[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        here = k < K - start
        a = tl.load(a_ptrs, mask=(row[:, None] < M) & here[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(col[None, :] < N) & here[:, None], other=0.0)
        if SOFTWARE:  # whose dot of bf16 operands is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    offsets = row[:, None] * N + col[None, :]
    mask = (row[:, None] < M) & (col[None, :] < N)
    if BACKWARD:
        post = tl.load(post_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dpre_ptr + offsets, round_to_bf16(2 * acc * tl.sqrt_rn(post), SOFTWARE), mask=mask)
    else:
        pre = round_to_bf16(acc, SOFTWARE).to(tl.float32)
        relu = tl.where(pre < 0, 0.0, pre)  # NaN stays NaN
        tl.store(post_ptr + offsets, round_to_bf16(relu * relu, SOFTWARE), mask=mask)


def tile(shared_bytes: int, backward: bool) -> dict[str, int]:
    """Tile and pipeline for a GPU whose blocks may have `shared_bytes` of shared memory."""
    # Three stages of (BLOCK_M + BLOCK_N)·BLOCK_K·2 bytes: 144 KiB for A100 and H100, else 96 KiB.
    # The backward pass holds a tile of post beside the sums: with 256 columns it spills.
    block_n = 256 if shared_bytes >= 147_456 and not backward else 128
    blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 8}
    return blocks | {"num_warps": 8, "num_stages": 3}


def relu2_up(h: Tensor, up: Tensor, post: Tensor) -> None:
    """Writes post (T, F) = relu(h·upᵀ)² of `h` (T, D), `up` (F, D)."""
    _launch(h, up, post, post, backward=False)


def drelu2(grad: Tensor, down: Tensor, post: Tensor, dpre: Tensor) -> None:
    """Writes dpre (T, F) = 2·(grad·downᵀ)·√post of `grad` (T, D), `down` (F, D), `post` (T, F)."""
    _launch(grad, down, post, dpre, backward=True)


def _launch(a: Tensor, b: Tensor, post: Tensor, dpre: Tensor, backward: bool) -> None:
    if post.numel() == 0:
        return
    (rows, depth), cols = a.shape, b.shape[0]
    shared_bytes = 0
    if a.is_cuda:
        shared_bytes = torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin
    config = tile(shared_bytes, backward)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(cols, config["BLOCK_N"]),)
    with torch.cuda.device_of(a):  # a launch goes to the current device
        relu2_gemm_kernel[grid](
            a,
            b,
            post,
            dpre,
            rows,
            cols,
            depth,
            BACKWARD=backward,
            SOFTWARE=interprets(),
            **config,
        )


def static_variants():
    """What benchmarks/static_check.py compiles: both directions, for each tile."""
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "post_ptr", "dpre_ptr"), "*bf16:16")
    signature = pointers | dict.fromkeys("MNK", "i32:16")
    for backward, name, shared_bytes in (
        (False, "relu2_up 144 KiB", 227 << 10),
        (False, "relu2_up 96 KiB", 99 << 10),
        (True, "drelu2", 227 << 10),
    ):
        config = tile(shared_bytes, backward)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        constexprs = {"BACKWARD": backward, "SOFTWARE": False, **config}
        yield name, relu2_gemm_kernel, signature, constexprs, options
