"""Triton version of `attention`: causal sliding windows over documents, forward and backward.

A list on the device names the tiles of queries (or keys) that documents have: (token, first, end)
of each, relative to no padding, so that nothing is computed for documents of length 0. Sums never
cross programs: the results are the same bits in every run.

T tokens, H heads, K head dim of queries and keys, E of values, N entries of cu_seqlens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, round_to_bf16, to_float

LIST_TILE = 64  # the smallest tile: what the length of a list is computed from
LIST_BLOCK = 128  # entries of the list a program writes at a time
DIMS = ("token", "head")  # whose strides kernels are given; the last one's is 1


@triton.jit(do_not_specialize=["num_docs", "length", "tile"])
def tile_list_kernel(
    cu_seqlens_ptr, list_ptr, num_docs, length, tile, DOCS: tl.constexpr, BLOCK: tl.constexpr
):
    """list (length, 3) int32: (first token of the tile, of its document, end of the document).

    cu_seqlens (num_docs + 1,) int32. A program writes the tiles of one document, and one after
    them all the entries that are left over, which end at token 0: no tile is before that.
    """
    doc = tl.program_id(0)
    others = tl.arange(0, DOCS)
    start = tl.load(cu_seqlens_ptr + others, mask=others < doc, other=0)
    end = tl.load(cu_seqlens_ptr + others + 1, mask=others < doc, other=0)
    before = tl.sum((end - start + tile - 1) // tile, 0)
    first = tl.load(cu_seqlens_ptr + doc, mask=doc < num_docs, other=0)
    last = tl.load(cu_seqlens_ptr + doc + 1, mask=doc < num_docs, other=0)
    count = tl.where(doc < num_docs, (last - first + tile - 1) // tile, length - before)
    for done in range(0, count, BLOCK):
        index = done + tl.arange(0, BLOCK)
        entry_ptr = list_ptr + 3 * (before + index)
        tl.store(entry_ptr, first + index * tile, mask=index < count)
        tl.store(entry_ptr + 1, index * 0 + first, mask=index < count)
        tl.store(entry_ptr + 2, index * 0 + last, mask=index < count)


@triton.jit
def _place(list_ptr, H):
    """This program's head, int64 since it is multiplied by strides, and its entry of the list."""
    entry_ptr = list_ptr + 3 * (tl.program_id(0) // H)
    head = (tl.program_id(0) % H).to(tl.int64)
    return head, tl.load(entry_ptr), tl.load(entry_ptr + 1), tl.load(entry_ptr + 2)


@triton.jit
def _load_tile(
    ptr, token, end, token_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Rows token … token + ROWS - 1 of a head, 0 from `end` on and from column WIDTH on."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    tile_ptr = ptr + (tl.zeros((), tl.int64) + token) * token_stride
    ptrs = tile_ptr + (row[:, None] * token_stride + col[None, :])
    mask = (row < end - token)[:, None]
    if WIDTH < COLS:
        mask &= (col < WIDTH)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store_tile(
    ptr,
    x,
    token,
    end,
    token_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """The rows before `end` and the columns before WIDTH of x, rounded to bf16."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    tile_ptr = ptr + (tl.zeros((), tl.int64) + token) * token_stride
    ptrs = tile_ptr + (row[:, None] * token_stride + col[None, :])
    mask = (row < end - token)[:, None]
    if WIDTH < COLS:
        mask &= (col < WIDTH)[None, :]
    tl.store(ptrs, round_to_bf16(x, SOFTWARE), mask=mask)


@triton.jit
def _dot(a, b, acc, SOFTWARE: tl.constexpr):
    """a·b + acc in float32, of bf16. The interpreter's own product of bf16 is wrong."""
    if SOFTWARE:
        out = tl.dot(to_float(a, SOFTWARE), to_float(b, SOFTWARE), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out


@triton.jit
def _products(a, b, SOFTWARE: tl.constexpr):
    """a·bᵀ, of all pairs of rows."""
    return _dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32), SOFTWARE)


@triton.jit
def _first_key(token, first, window, KEYS: tl.constexpr):
    """Where the first tile of keys begins that a tile of queries from `token` on sees: tiles begin
    at multiples of KEYS in the document, so that only its last one is cut."""
    return first + tl.maximum(token - window - first, 0) // KEYS * KEYS


@triton.jit
def _seen(query, key, window):
    """Whether a query sees a key of its document: itself and `window` before."""
    return (query >= key) & (query - key <= window)


@triton.jit(do_not_specialize=["window"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    list_ptr,
    T,
    H,
    window,
    scale,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """A tile of queries of one head a program; grid: list entries x H.

    q, k (T, H, K), v (T, H, E) bf16 -> out (T, H, E) bf16, lse (H, T) float32, both contiguous.
    `scale` is that of the scores times log2(e), and lse is of base 2: exp2 is one instruction.
    """
    head, token, first, end = _place(list_ptr, H)
    if token >= end:
        return
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    q_head = q_ptr + head * q_head_stride
    q = _load_tile(q_head, token, end, q_token_stride, K, QUERIES, COLS_K)
    query = token + tl.arange(0, QUERIES)
    acc = tl.zeros((QUERIES, COLS_E), tl.float32)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    low = _first_key(token, first, window, KEYS)
    for start in range(low, tl.minimum(token + QUERIES, end), KEYS):
        k = _load_tile(k_ptr, start, end, k_token_stride, K, KEYS, COLS_K)
        scores = _products(q, k, SOFTWARE) * scale
        seen = _seen(query[:, None], (start + tl.arange(0, KEYS))[None, :], window)
        scores = tl.where(seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        # A row may see no key of its first tiles: then nothing minus nothing is 0, not NaN.
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(p, 1)
        most = new_most
        v = _load_tile(v_ptr, start, end, v_token_stride, E, KEYS, COLS_E)
        acc = _dot(round_to_bf16(p, SOFTWARE), v, acc * shrink[:, None], SOFTWARE)
    out_head = out_ptr + head * E
    acc /= total[:, None]
    _store_tile(out_head, acc, token, end, H * E, E, QUERIES, COLS_E, SOFTWARE)
    tl.store(lse_ptr + head * T + query, most + tl.log2(total), mask=query < end)


@triton.jit(do_not_specialize=["window"])
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    list_ptr,
    T,
    H,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTWARE: tl.constexpr,
):
    """dq (T, H, K) bf16 and delta (H, T) float32, the rows' sums of dout·out; grid as forward.

    out, dout (T, H, E) and dq contiguous; `grad_scale` is the scores' scale itself.
    """
    head, token, first, end = _place(list_ptr, H)
    if token >= end:
        return
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    q_head = q_ptr + head * q_head_stride
    q = _load_tile(q_head, token, end, q_token_stride, K, QUERIES, COLS_K)
    out = _load_tile(out_ptr + head * E, token, end, H * E, E, QUERIES, COLS_E)
    dout = _load_tile(dout_ptr + head * E, token, end, H * E, E, QUERIES, COLS_E)
    query = token + tl.arange(0, QUERIES)
    delta = tl.sum(to_float(out, SOFTWARE) * to_float(dout, SOFTWARE), 1)
    tl.store(delta_ptr + head * T + query, delta, mask=query < end)
    lse = tl.load(lse_ptr + head * T + query, mask=query < end, other=0.0)
    dq = tl.zeros((QUERIES, COLS_K), tl.float32)
    low = _first_key(token, first, window, KEYS)
    for start in range(low, tl.minimum(token + QUERIES, end), KEYS):
        k = _load_tile(k_ptr, start, end, k_token_stride, K, KEYS, COLS_K)
        v = _load_tile(v_ptr, start, end, v_token_stride, E, KEYS, COLS_E)
        scores = _products(q, k, SOFTWARE) * scale
        seen = _seen(query[:, None], (start + tl.arange(0, KEYS))[None, :], window)
        p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        dp = _products(dout, v, SOFTWARE)
        ds = p * (dp - delta[:, None])
        dq = _dot(round_to_bf16(ds, SOFTWARE), k, dq, SOFTWARE)
    dq_head = dq_ptr + head * K
    _store_tile(dq_head, dq * grad_scale, token, end, H * K, K, QUERIES, COLS_K, SOFTWARE)


@triton.jit(do_not_specialize=["window"])
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    list_ptr,
    T,
    H,
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
    SOFTWARE: tl.constexpr,
):
    """dk (T, H, K), dv (T, H, E) bf16, a tile of keys of one head a program, over all queries that
    see them. Scores are computed transposed, so that both results are sums of rows of keys."""
    head, token, _, end = _place(list_ptr, H)
    if token >= end:
        return
    q_ptr += head * q_head_stride
    dout_ptr += head * E
    lse_ptr += head * T
    delta_ptr += head * T
    k_head = k_ptr + head * k_head_stride
    v_head = v_ptr + head * v_head_stride
    k = _load_tile(k_head, token, end, k_token_stride, K, KEYS, COLS_K)
    v = _load_tile(v_head, token, end, v_token_stride, E, KEYS, COLS_E)
    key = token + tl.arange(0, KEYS)
    dk = tl.zeros((KEYS, COLS_K), tl.float32)
    dv = tl.zeros((KEYS, COLS_E), tl.float32)
    for start in range(token, tl.minimum(token + KEYS + window, end), QUERIES):
        q = _load_tile(q_ptr, start, end, q_token_stride, K, QUERIES, COLS_K)
        dout = _load_tile(dout_ptr, start, end, H * E, E, QUERIES, COLS_E)
        query = start + tl.arange(0, QUERIES)
        lse = tl.load(lse_ptr + query, mask=query < end, other=0.0)
        delta = tl.load(delta_ptr + query, mask=query < end, other=0.0)
        scores = _products(k, q, SOFTWARE) * scale
        seen = _seen(query[None, :], key[:, None], window)  # from `end` on all is 0: adds nothing
        p = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        dv = _dot(round_to_bf16(p, SOFTWARE), dout, dv, SOFTWARE)
        dp = _products(v, dout, SOFTWARE)
        ds = p * (dp - delta[None, :])
        dk = _dot(round_to_bf16(ds, SOFTWARE), q, dk, SOFTWARE)
    dk_head = dk_ptr + head * K
    dv_head = dv_ptr + head * E
    _store_tile(dk_head, dk * grad_scale, token, end, H * K, K, KEYS, COLS_K, SOFTWARE)
    _store_tile(dv_head, dv, token, end, H * E, E, KEYS, COLS_E, SOFTWARE)


class Tile(NamedTuple):
    """Tokens of a program, tokens it takes at a time from the other side, and with what."""

    rows: int
    steps: int
    num_warps: int
    num_stages: int


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on `device`; H100's for the interpreter."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def tile_rows(window: int, shared: int) -> int:
    """Tokens of a tile, the same in all kernels, so that one list serves them.

    A tile of r queries reads r + window keys (in whole steps of 64). For a window of 128 those are
    192 with tiles of 64, but 256 with tiles of 128: a third more products. At 512 the difference
    is a ninth, and the large tile loads each key half as often; it needs 128 KiB.
    """
    return 128 if window >= 512 and shared >= 132_096 else 64


def choose_tile(kernel: str, window: int, head_dim: int, shared: int) -> Tile:
    """The tile of kernel "forward", "dq" or "dkdv". 16 rows a warp: what a wgmma takes of them.

    Stages: 3 of forward's 32 KiB hide more latency than 2, where two programs then still share an
    SM. `dkdv` has two sums of a tile in registers, and spills with steps of 64 tokens of 128.
    """
    rows = tile_rows(window, shared)
    steps = 32 if kernel == "dkdv" and head_dim > 64 else 64
    stages = 3 if kernel == "forward" and shared >= 232_448 else 2
    return Tile(rows, steps, rows // 16, stages)


def list_length(num_tokens: int, num_entries: int) -> int:
    """At most so many tiles: a document's last one may be cut, and no tile is empty."""
    return max(1, min(num_tokens, num_tokens // LIST_TILE + num_entries - 1))


def tile_list(cu_seqlens: Tensor, num_tokens: int, window: int) -> Tensor:
    """(length, 3) int32, what the kernels call list, of a window's tiles; nothing waits for it."""
    num_docs = len(cu_seqlens) - 1
    length = list_length(num_tokens, num_docs + 1)
    tiles = cu_seqlens.new_empty(length, 3)
    docs = triton.next_power_of_2(max(num_docs, 1))
    rows = tile_rows(window, shared_bytes(cu_seqlens.device))
    with torch.cuda.device_of(cu_seqlens):
        tile_list_kernel[(num_docs + 1,)](
            cu_seqlens, tiles, num_docs, length, rows, DOCS=docs, BLOCK=LIST_BLOCK
        )
    return tiles


def _arguments(kernel: str, q: Tensor, k: Tensor, v: Tensor, window: int) -> dict:
    """What the three kernels are given alike."""
    K, E = q.shape[2], v.shape[2]
    if (K % 16 or E % 16) and not interprets():  # 24 and 8: wrong, and out of bounds, on an H200
        raise ValueError(f"attention in Triton: head dims are multiples of 16, got {K} and {E}")
    tile = choose_tile(kernel, window, max(K, E), shared_bytes(q.device))
    rows, steps = ("KEYS", "QUERIES") if kernel == "dkdv" else ("QUERIES", "KEYS")
    strides = zip("qkv", (q, k, v), strict=True)
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "T": q.shape[0],
        "H": q.shape[1],
        "window": window,
        **{f"{n}_{d}_stride": t.stride(i) for n, t in strides for i, d in enumerate(DIMS)},
        "K": K,
        "E": E,
        "COLS_K": max(16, triton.next_power_of_2(K)),
        "COLS_E": max(16, triton.next_power_of_2(E)),
        rows: tile.rows,
        steps: tile.steps,
        "SOFTWARE": interprets(),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, H, E) bf16, lse (H, T) float32 of base 2); `tiles`: tile_list's of this window."""
    T, H, E = v.shape
    out, lse = v.new_empty(T, H, E), v.new_empty(H, T, dtype=torch.float32)
    arguments = _arguments("forward", q, k, v, window)
    pointers = {"out_ptr": out, "lse_ptr": lse, "list_ptr": tiles, "scale": scale / math.log(2)}
    with torch.cuda.device_of(q):  # a launch goes to the current device
        attention_forward_kernel[(len(tiles) * H,)](**arguments, **pointers)
    return out, lse


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
    """dq, dk (T, H, K), dv (T, H, E) of a contiguous dout (T, H, E) and what forward returned."""
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    grid = (len(tiles) * q.shape[1],)
    shared = {"dout_ptr": dout, "lse_ptr": lse, "delta_ptr": torch.empty_like(lse)}
    shared |= {"list_ptr": tiles, "scale": scale / math.log(2), "grad_scale": scale}
    with torch.cuda.device_of(q):
        arguments = _arguments("dq", q, k, v, window) | shared
        attention_dq_kernel[grid](**arguments, out_ptr=out, dq_ptr=grads[0])
        arguments = _arguments("dkdv", q, k, v, window) | shared
        attention_dkdv_kernel[grid](**arguments, dk_ptr=grads[1], dv_ptr=grads[2])
    return tuple(grads)


def static_variants():
    """What benchmarks/static_check.py compiles: both tile sizes, head dims of records and 64."""
    kernels = {
        "forward": (attention_forward_kernel, ("lse",), ("out",)),
        "dq": (attention_dq_kernel, ("lse", "delta"), ("out", "dout", "dq")),
        "dkdv": (attention_dkdv_kernel, ("lse", "delta"), ("dout", "dk", "dv")),
    }
    sizes = {"T": "i32:16", "H": "i32", "window": "i32", "scale": "fp32"}
    sizes |= {f"{t}_{d}_stride": "i32:16" for t in "qkv" for d in DIMS}
    for K, E in ((128, 128), (64, 64), (96, 128)):
        for window in (128, 1408):
            for name, (kernel, floats, halves) in kernels.items():
                tile = choose_tile(name, window, E, 232_448)
                signature = {f"{t}_ptr": "*bf16:16" for t in ("q", "k", "v", *halves)}
                signature |= {f"{t}_ptr": "*fp32:16" for t in floats}
                signature |= {"list_ptr": "*i32:16", **sizes}
                signature |= {} if name == "forward" else {"grad_scale": "fp32"}
                sides = {"QUERIES": tile.rows, "KEYS": tile.steps}
                if name == "dkdv":
                    sides = {"QUERIES": tile.steps, "KEYS": tile.rows}
                cols = {"COLS_K": triton.next_power_of_2(K), "COLS_E": E}
                constexprs = {"K": K, "E": E, **cols, **sides, "SOFTWARE": False}
                options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                yield f"{name} {K} {E} {tile.rows}", kernel, signature, constexprs, options
    signature = {"cu_seqlens_ptr": "*i32:16", "list_ptr": "*i32:16"}
    signature |= dict.fromkeys(("num_docs", "length", "tile"), "i32")
    constexprs = {"DOCS": 1024, "BLOCK": LIST_BLOCK}
    yield "list", tile_list_kernel, signature, constexprs, {"num_warps": 4, "num_stages": 1}
