"""Backward pass of `attention` for short windows: five products a pair of tiles instead of seven.

A program walks a strip of tiles of keys. Their gradients stay in registers; the scores' gradients
go, in bf16, into a ring of memory of its own, small enough for the L2 cache. From there a tile of
queries takes those of all its keys, and dq is complete in registers: no sum in memory, no atomics,
the same bits in every run. What the strip's queries owe to keys before it is computed again.

T tokens, H heads, K head dim of queries and keys, E of values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import round_to_bf16, to_float
from speedrun.triton_kernels.attention import (
    DIMS,
    LIST_TILE,
    _arguments,
    _dot,
    _first_key,
    _load_tile,
    _products,
    _seen,
    _store_tile,
)

STRIP = 8  # tiles a program, a power of 2: 16 compute less again, but leave SMs without a program
QUERIES = 32  # at a time: dk and dv leave no registers for 64
DELTA_TOKENS = 64  # a program of the first kernel


@triton.jit
def attention_delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    T,
    H,
    E: tl.constexpr,
    COLS_E: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """delta (H, T) float32, sums of dout·out over E; out, dout (T, H, E) bf16, all contiguous."""
    token = tl.program_id(0) // H * TOKENS
    head = (tl.program_id(0) % H).to(tl.int64)
    out = _load_tile(out_ptr + head * E, token, T, H * E, E, TOKENS, COLS_E)
    dout = _load_tile(dout_ptr + head * E, token, T, H * E, E, TOKENS, COLS_E)
    delta = tl.sum(to_float(out, SOFTWARE) * to_float(dout, SOFTWARE), 1)
    row = token + tl.arange(0, TOKENS)
    tl.store(delta_ptr + head * T + row, delta, mask=row < T)


@triton.jit(do_not_specialize=["window", "length"])
def attention_strip_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    ring_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    list_ptr,
    T,
    H,
    length,
    window,
    scale,
    grad_scale,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_E: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """dq, dk (T, H, K), dv (T, H, E) bf16, contiguous, of TILES entries of the list and one head.

    Grid: strips x H. list (length, 3): tile_list's, of tiles of KEYS tokens; its scales, too, are
    the plain form's. ring (programs, R, R·KEYS, KEYS) bf16, R tiles of keys that a query sees at
    most: slot i % R has tile i of keys, in rows the ds of queries from its first token on.
    """
    begin = tl.program_id(0) // H * TILES
    head = (tl.program_id(0) % H).to(tl.int64)
    entry_ptr = list_ptr + 3 * begin
    tile = tl.arange(0, TILES)
    tokens = tl.load(entry_ptr + 3 * tile, mask=begin + tile < length, other=0)
    ends = tl.load(entry_ptr + 3 * tile + 2, mask=begin + tile < length, other=0)
    count = tl.sum((tokens < ends).to(tl.int32), 0)  # entries without tokens come last
    if count == 0:
        return
    reach = (window + KEYS - 1) // KEYS + 1
    ring_ptr += tl.program_id(0).to(tl.int64) * reach * reach * KEYS * KEYS
    place = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    # Tiles before the strip that its queries see: for these queries their ds is computed again.
    before = (tl.load(entry_ptr) - tl.load(entry_ptr + 1)) // KEYS
    for i in range(-tl.minimum(before, reach - 1), count):
        token = tl.load(entry_ptr + 3 * i)
        first = tl.load(entry_ptr + 3 * i + 1)
        end = tl.load(entry_ptr + 3 * i + 2)
        # 0, which the compiler can't know: or it keeps all addresses over the loop, and spills.
        unknown = tl.minimum(token, 0) * 16
        q_stride, k_stride = q_token_stride + unknown, k_token_stride + unknown
        v_stride = v_token_stride + unknown
        K_stride, E_stride = H * K + unknown, H * E + unknown

        # The tile as keys: dk, dv and ds, of the queries that see it.
        k = _load_tile(k_ptr + head * k_head_stride, token, end, k_stride, K, KEYS, COLS_K)
        v = _load_tile(v_ptr + head * v_head_stride, token, end, v_stride, E, KEYS, COLS_E)
        key = token + tl.arange(0, KEYS)
        slot_ptr = ring_ptr + (i + reach) % reach * reach * KEYS * KEYS
        dk = tl.zeros((KEYS, COLS_K), tl.float32)
        dv = tl.zeros((KEYS, COLS_E), tl.float32)
        low = tl.maximum(-i, 0) * KEYS
        for row in range(low, tl.minimum(reach * KEYS, end - token), QUERIES):
            start = token + row
            q = _load_tile(q_ptr + head * q_head_stride, start, end, q_stride, K, QUERIES, COLS_K)
            dout = _load_tile(dout_ptr + head * E, start, end, E_stride, E, QUERIES, COLS_E)
            query = start + tl.arange(0, QUERIES)
            lse = tl.load(lse_ptr + head * T + query, mask=query < end, other=0.0)
            delta = tl.load(delta_ptr + head * T + query, mask=query < end, other=0.0)
            scores = _products(k, q, SOFTWARE) * scale
            seen = _seen(query[None, :], key[:, None], window)
            p = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
            ds = p * (_products(v, dout, SOFTWARE) - delta[None, :])
            ds = round_to_bf16(ds, SOFTWARE)
            if i >= 0:
                dv = _dot(round_to_bf16(p, SOFTWARE), dout, dv, SOFTWARE)
                dk = _dot(ds, q, dk, SOFTWARE)
            ours = row + tl.arange(0, QUERIES)[:, None] < (count - i) * KEYS
            tl.store(slot_ptr + row * KEYS + place, tl.trans(ds), mask=ours)
        tl.debug_barrier()  # what other threads stored is read now

        # The tile as queries: dq from all keys that they see.
        if i >= 0:
            dk_ptrs, dv_ptrs = dk_ptr + head * K, dv_ptr + head * E
            _store_tile(dk_ptrs, dk * grad_scale, token, end, K_stride, K, KEYS, COLS_K, SOFTWARE)
            _store_tile(dv_ptrs, dv, token, end, E_stride, E, KEYS, COLS_E, SOFTWARE)
            dq = tl.zeros((KEYS, COLS_K), tl.float32)
            for start in range(_first_key(token, first, window, KEYS), token + 1, KEYS):
                row = token - start
                slot_ptr = ring_ptr + (i + reach - row // KEYS) % reach * reach * KEYS * KEYS
                ds = _load_tile(slot_ptr, row, end - start, KEYS, KEYS, KEYS, KEYS)
                k = _load_tile(k_ptr + head * k_head_stride, start, end, k_stride, K, KEYS, COLS_K)
                dq = _dot(ds, k, dq, SOFTWARE)
            dq_ptrs = dq_ptr + head * K
            _store_tile(dq_ptrs, dq * grad_scale, token, end, K_stride, K, KEYS, COLS_K, SOFTWARE)
        tl.debug_barrier()  # all threads have read what the next tile overwrites


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the plain form's: dq, dk (T, H, K), dv (T, H, E) of a contiguous dout (T, H, E).

    ValueError: a window for which tile_list's tiles have more rows, 512 or above.
    """
    T, H, E = v.shape
    arguments = _arguments("dkdv", q, k, v, window) | {"QUERIES": QUERIES, "TILES": STRIP}
    if arguments["KEYS"] != LIST_TILE:
        raise ValueError(f"window={window}: the strip form needs tiles of {LIST_TILE} rows")
    programs = triton.cdiv(len(tiles), STRIP) * H
    ring = triton.cdiv(window, LIST_TILE) + 1
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    delta = torch.empty_like(lse)
    pointers = {"dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta, "list_ptr": tiles}
    pointers["ring_ptr"] = q.new_empty(programs, ring, ring * LIST_TILE, LIST_TILE)
    pointers |= dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), grads, strict=True))
    scales = {"scale": scale / math.log(2), "grad_scale": scale}
    with torch.cuda.device_of(q):  # a launch goes to the current device
        attention_delta_kernel[(triton.cdiv(T, DELTA_TOKENS) * H,)](
            out, dout, delta, T, H, E, arguments["COLS_E"], DELTA_TOKENS, arguments["SOFTWARE"]
        )
        attention_strip_kernel[(programs,)](**arguments, **pointers, **scales, length=len(tiles))
    return tuple(grads)


def static_variants():
    """What benchmarks/static_check.py compiles: head dims of records and 64."""
    halves = ("q", "k", "v", "dout", "ring", "dq", "dk", "dv")
    signature = {f"{t}_ptr": "*bf16:16" for t in halves}
    signature |= {f"{t}_ptr": "*fp32:16" for t in ("lse", "delta")} | {"list_ptr": "*i32:16"}
    signature |= {"T": "i32:16", "H": "i32", "length": "i32", "window": "i32"}
    signature |= {"scale": "fp32", "grad_scale": "fp32"}
    signature |= {f"{t}_{d}_stride": "i32:16" for t in "qkv" for d in DIMS}
    for K, E in ((128, 128), (64, 64), (96, 128)):
        tensors = [torch.empty(1, 1, width, dtype=torch.bfloat16) for width in (K, K, E)]
        arguments = _arguments("dkdv", *tensors, 384)
        options = {name: arguments[name] for name in ("num_warps", "num_stages")}
        names = ("K", "E", "COLS_K", "COLS_E", "KEYS", "SOFTWARE")
        constexprs = {name: arguments[name] for name in names}
        constexprs |= {"QUERIES": QUERIES, "TILES": STRIP}
        yield f"strip {K} {E}", attention_strip_kernel, signature, constexprs, options
    signature = {"out_ptr": "*bf16:16", "dout_ptr": "*bf16:16", "delta_ptr": "*fp32:16"}
    signature |= {"T": "i32:16", "H": "i32"}
    constexprs = {"E": 128, "COLS_E": 128, "TOKENS": DELTA_TOKENS, "SOFTWARE": False}
    yield "delta 128", attention_delta_kernel, signature, constexprs, {"num_warps": 4}
