"""Triton version of `qk_norm_rope`: a launch forward, a launch backward.

A row is one head of one token. A program has the queries, then the keys, then the values of ROWS
of them; the two numbers of a pair are next to each other in memory, and in one thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import casts_in_software, store_rounded, to_float

NUM_WARPS = 4
ROWS = 32  # of 128 numbers: 32 a thread, in pieces of 16 bytes
NORM_EPS = 2.0**-23  # as in the reference, which this may not import


@triton.jit
def _table(cos_ptr, sin_ptr, row, num_tokens, valid, H, K: tl.constexpr, SHARED, BLOCK, SOFTWARE):
    """cos and sin (ROWS, BLOCK/2) of each pair of a head; of the stationary half 1 and 0."""
    pair = tl.arange(0, BLOCK // 2)
    place = row // H % num_tokens
    if not SHARED:
        place = place * H + row % H
    ptrs = place[:, None] * (K // 4) + pair[None, :]
    mask = valid[:, None] & (pair[None, :] < K // 4)
    cos = to_float(tl.load(cos_ptr + ptrs, mask=mask, other=1.0), SOFTWARE)
    sin = to_float(tl.load(sin_ptr + ptrs, mask=mask, other=0.0), SOFTWARE)
    return cos, sin


@triton.jit
def _pairs(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """First and second numbers (ROWS, BLOCK/2) of the pairs of x (ROWS, BLOCK)."""
    return tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))


@triton.jit
def _turned(a, b, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) of pairs (a cos + b sin, b cos - a sin)."""
    return tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), (ROWS, BLOCK))


@triton.jit
def _norm_rope(x, cos, sin, K: tl.constexpr, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    a, b = _pairs(x, ROWS, BLOCK)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / K) + eps)[:, None]
    return _turned(a * inverse, b * inverse, cos, sin, ROWS, BLOCK)


@triton.jit
def _norm_rope_bwd(x, g, cos, sin, K: tl.constexpr, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of x where that of the result is g: turned back, then through the norm."""
    a, b = _pairs(g, ROWS, BLOCK)
    g = _turned(a, b, cos, -sin, ROWS, BLOCK)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / K) + eps)[:, None]
    y = x * inverse
    mean = tl.sum(g * y, axis=1) * (1.0 / K)
    return (g - y * mean[:, None]) * inverse


@triton.jit
def _keeps(first_ptr, token, place, inside):
    """Whether tokens' keys keep their own stationary half; `place`: in the part."""
    keeps = place == 0
    if first_ptr is not None:
        keeps = keeps | (tl.load(first_ptr + token, mask=inside, other=0) != 0)
    return keeps & inside


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    first_ptr,
    ve_ptr,
    gate_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_rows,
    num_tokens,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SOFTWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """q, k (tokens, H, K) and v (tokens, H, E) of qkv (tokens, H·(2K + E)).

    num_rows: tokens · H; num_tokens: of a part; SHARED: the heads share the tables; first_ptr (a
    byte a token, may be None): who begins a document; ve_ptr, gate_ptr may be None.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    token = row // H
    head = (row % H)[:, None]
    qkv_ptrs = qkv_ptr + token.to(tl.int64)[:, None] * (H * (2 * K + E))
    wide_row = row.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    mask = valid[:, None] & (col < K)
    cos, sin = _table(cos_ptr, sin_ptr, row, num_tokens, valid, H, K, SHARED, BLOCK_K, SOFTWARE)

    x = to_float(tl.load(qkv_ptrs + head * K + col, mask=mask, other=0.0), SOFTWARE)
    q = _norm_rope(x, cos, sin, K, eps, ROWS, BLOCK_K)
    store_rounded(q_ptr + wide_row * K + col, q, mask, SOFTWARE)

    x = to_float(tl.load(qkv_ptrs + (H + head) * K + col, mask=mask, other=0.0), SOFTWARE)
    k = _norm_rope(x, cos, sin, K, eps, ROWS, BLOCK_K)
    k_ptrs = k_ptr + wide_row * K + col
    if OFFSET:  # the stationary half goes to the token behind, if that doesn't keep its own
        place = token % num_tokens
        still = col >= K // 2
        keeps = _keeps(first_ptr, token, place, valid)
        has_next = valid & (place + 1 < num_tokens)
        gives = has_next & ~_keeps(first_ptr, token + 1, place + 1, has_next)
        store_rounded(k_ptrs, k, mask & (~still | keeps[:, None]), SOFTWARE)
        store_rounded(k_ptrs + H * K, k, mask & still & gives[:, None], SOFTWARE)
    else:
        store_rounded(k_ptrs, k, mask, SOFTWARE)

    col = tl.arange(0, BLOCK_E)[None, :]
    mask = valid[:, None] & (col < E)
    v = to_float(tl.load(qkv_ptrs + 2 * H * K + head * E + col, mask=mask, other=0.0), SOFTWARE)
    if ve_ptr is not None:
        ve = to_float(tl.load(ve_ptr + wide_row * E + col, mask=mask, other=0.0), SOFTWARE)
        if gate_ptr is not None:
            gate = to_float(tl.load(gate_ptr + row, mask=valid, other=0.0), SOFTWARE)
            ve = ve * gate[:, None]
        v += ve
    store_rounded(v_ptr + wide_row * E + col, v, mask, SOFTWARE)


@triton.jit
def qk_norm_rope_bwd_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    first_ptr,
    ve_ptr,
    gate_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dqkv_ptr,
    dve_ptr,
    dgate_ptr,
    num_rows,
    num_tokens,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SOFTWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dqkv, dve (tokens, H, E) and dgate (tokens, H); with gate_ptr None the last two are not read
    or written, nor is ve."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    token = row // H
    head = (row % H)[:, None]
    offset = token.to(tl.int64)[:, None] * (H * (2 * K + E))
    wide_row = row.to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    mask = valid[:, None] & (col < K)
    cos, sin = _table(cos_ptr, sin_ptr, row, num_tokens, valid, H, K, SHARED, BLOCK_K, SOFTWARE)

    at = offset + head * K + col
    x = to_float(tl.load(qkv_ptr + at, mask=mask, other=0.0), SOFTWARE)
    g = to_float(tl.load(dq_ptr + wide_row * K + col, mask=mask, other=0.0), SOFTWARE)
    store_rounded(
        dqkv_ptr + at, _norm_rope_bwd(x, g, cos, sin, K, eps, ROWS, BLOCK_K), mask, SOFTWARE
    )

    at = offset + (H + head) * K + col
    x = to_float(tl.load(qkv_ptr + at, mask=mask, other=0.0), SOFTWARE)
    dk_ptrs = dk_ptr + wide_row * K + col
    if OFFSET:
        place = token % num_tokens
        still = col >= K // 2
        keeps = _keeps(first_ptr, token, place, valid)
        has_next = valid & (place + 1 < num_tokens)
        gives = has_next & ~_keeps(first_ptr, token + 1, place + 1, has_next)
        own = tl.load(dk_ptrs, mask=mask & (~still | keeps[:, None]), other=0.0)
        behind = tl.load(dk_ptrs + H * K, mask=mask & still & gives[:, None], other=0.0)
        g = to_float(own, SOFTWARE) + to_float(behind, SOFTWARE)
    else:
        g = to_float(tl.load(dk_ptrs, mask=mask, other=0.0), SOFTWARE)
    store_rounded(
        dqkv_ptr + at, _norm_rope_bwd(x, g, cos, sin, K, eps, ROWS, BLOCK_K), mask, SOFTWARE
    )

    col = tl.arange(0, BLOCK_E)[None, :]
    mask = valid[:, None] & (col < E)
    g = to_float(tl.load(dv_ptr + wide_row * E + col, mask=mask, other=0.0), SOFTWARE)
    store_rounded(dqkv_ptr + offset + 2 * H * K + head * E + col, g, mask, SOFTWARE)
    if gate_ptr is not None:
        gate = to_float(tl.load(gate_ptr + row, mask=valid, other=0.0), SOFTWARE)
        ve = to_float(tl.load(ve_ptr + wide_row * E + col, mask=mask, other=0.0), SOFTWARE)
        store_rounded(dve_ptr + wide_row * E + col, g * gate[:, None], mask, SOFTWARE)
        store_rounded(dgate_ptr + row, tl.sum(g * ve, axis=1), valid, SOFTWARE)


def _launch(kernel, tensors, qkv: Tensor, cos: Tensor, num_heads: int, offset_keys: bool) -> None:
    P, T, N = qkv.shape
    num_rows, K = P * T * num_heads, 4 * cos.shape[-1]
    if num_rows == 0:
        return
    E = N // num_heads - 2 * K
    with torch.cuda.device_of(qkv):  # a launch goes to the current device
        kernel[(triton.cdiv(num_rows, ROWS),)](
            *tensors,
            num_rows,
            T,
            NORM_EPS,
            H=num_heads,
            K=K,
            E=E,
            SHARED=cos.shape[1] == 1,
            OFFSET=offset_keys,
            SOFTWARE=casts_in_software(qkv.device),
            ROWS=ROWS,
            BLOCK_K=triton.next_power_of_2(K),
            BLOCK_E=triton.next_power_of_2(E),
            num_warps=NUM_WARPS,
        )


def _flags(first: Tensor | None) -> Tensor | None:
    return None if first is None else first.view(torch.uint8)


def qk_norm_rope_out(qkv, cos, sin, num_heads, offset_keys, first, ve, ve_gate, q, k, v) -> None:
    """q, k and v of contiguous tensors; see ops/qk_norm_rope.py."""
    tensors = (qkv, cos, sin, _flags(first), ve, ve_gate, q, k, v)
    _launch(qk_norm_rope_kernel, tensors, qkv, cos, num_heads, offset_keys)


def qk_norm_rope_bwd_out(
    qkv, cos, sin, num_heads, offset_keys, first, ve, ve_gate, dq, dk, dv, dqkv, dve, dve_gate
) -> None:
    """Gradients of qkv and, with a gate, of ve and gate, where those of q, k, v are dq, dk, dv."""
    tensors = (qkv, cos, sin, _flags(first), ve, ve_gate, dq, dk, dv, dqkv, dve, dve_gate)
    _launch(qk_norm_rope_bwd_kernel, tensors, qkv, cos, num_heads, offset_keys)


def static_variants():
    """What benchmarks/static_check.py compiles: layers of the record (README: format)."""
    names = ("qkv", "cos", "sin", "ve", "gate", "q", "k", "v")
    grads = ("dq", "dk", "dv", "dqkv", "dve", "dgate")
    sizes = {"num_rows": "i32:16", "num_tokens": "i32:16", "eps": "fp32"}
    for name, dtype, offset, has_ve in (
        ("bf16", "bf16", False, False),
        ("bf16 with value embedding", "bf16", False, True),
        ("bf16 with key offset", "bf16", True, True),
        ("fp32 with value embedding", "fp32", False, True),
    ):
        for kernel, own in (
            (qk_norm_rope_kernel, names),
            (qk_norm_rope_bwd_kernel, (*names[:5], *grads)),
        ):
            kept = [n for n in own if has_ve or n not in ("ve", "gate", "dve", "dgate")]
            signature = {f"{n}_ptr": f"*{dtype}:16" for n in kept} | sizes
            constexprs = {f"{n}_ptr": None for n in own if n not in kept}
            constexprs |= {"first_ptr": None, "H": 6, "K": 128, "E": 128, "SHARED": True}
            constexprs |= {"OFFSET": offset, "SOFTWARE": False, "ROWS": ROWS}
            constexprs |= {"BLOCK_K": 128, "BLOCK_E": 128}
            what = "backward" if "dq" in own else "forward"
            yield f"{what} {name}", kernel, signature, constexprs, {"num_warps": NUM_WARPS}
