"""Triton version of `dc_attention`: three launches forward, four backward, all deterministic.

Programs have BLOCK queries or keys and walk over the blocks of the other within the window, so work
grows with T·window. What heads share is kept in tables (T, window), whose column c of row t is key
t − window + 1 + c: the mixed weights A, and in the backward pass their gradient. The heads' own
softmaxes are made again wherever they are needed, from the largest score of each row and its share.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import interprets, round_as, store_rounded, to_float

# wgmma's rows; with a window of 112 three blocks of keys hold all that 64 queries see.
BLOCK = 64
# With 4 warps the gradients' sums, and addresses into the tables, would spill.
OPTIONS = {"num_warps": 8, "num_stages": 2}
# Two blocks of keys and values in flight would need 112 KiB of shared memory; some GPUs have 99.
DW_OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def _rows(ptr, token, head, strides, num_tokens, BLOCK_D: tl.constexpr, DIM: tl.constexpr):
    """(BLOCK, BLOCK_D) of one head; zeros beyond the tokens and columns that there are."""
    col = tl.arange(0, BLOCK_D)
    ptrs = ptr + token.to(tl.int64)[:, None] * strides[0] + head * strides[1] + col[None, :]
    return tl.load(ptrs, mask=(token[:, None] < num_tokens) & (col[None, :] < DIM), other=0.0)


@triton.jit
def _store_rows(
    ptr, x, token, head, num_heads, num_tokens,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """x (BLOCK, BLOCK_D) float32 into one head of a contiguous (T, H, DIM)."""
    col = tl.arange(0, BLOCK_D)
    ptrs = ptr + (token.to(tl.int64)[:, None] * num_heads + head) * DIM + col[None, :]
    mask = (token[:, None] < num_tokens) & (col[None, :] < DIM)
    store_rounded(ptrs, x, mask, SOFTWARE)


@triton.jit
def _dot(a, b, SOFTWARE: tl.constexpr):
    """a·b in float32, whose interpreted form is wrong for bf16."""
    if SOFTWARE:
        a, b = to_float(a, SOFTWARE), to_float(b, SOFTWARE)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _seen(query, key, start_ptr, window, num_tokens):
    """Whether queries, along the rows, see keys: the last `window` of their documents."""
    start = tl.load(start_ptr + query, mask=query < num_tokens, other=0)
    distance = query[:, None] - key[None, :]
    inside = (distance >= 0) & (distance < window) & (query[:, None] < num_tokens)
    return inside & (key[None, :] >= start[:, None])


@triton.jit
def _first_block(first_query, start_ptr, window, BLOCK: tl.constexpr):
    """Where the first block of keys begins that a block of queries sees."""
    start = tl.load(start_ptr + first_query)  # those of later queries aren't earlier
    return tl.maximum(start, first_query - window + 1) // BLOCK * BLOCK


@triton.jit
def _table(ptr, query, key, window):
    """Where a table (T, window) has what queries, along the rows, and keys share."""
    rows = ptr + query.to(tl.int64) * (window - 1) + (window - 1)
    return rows[:, None] + key[None, :]


@triton.jit
def _weights(q, k, largest, share, seen, scale_log2, SOFTWARE: tl.constexpr):
    """One head's softmax (queries, keys), 0 where not seen."""
    scores = _dot(q, tl.trans(k), SOFTWARE) * scale_log2
    return tl.where(seen, tl.exp2(scores - largest[:, None]) * share[:, None], 0.0)


@triton.jit
def _by_head(ptr, token, head, num_heads, num_tokens, SOFTWARE: tl.constexpr):
    """A number a token, of a contiguous (T, H), as float32."""
    return to_float(
        tl.load(ptr + token * num_heads + head, mask=token < num_tokens, other=0.0), SOFTWARE
    )


@triton.jit
def dc_softmax_kernel(
    q_ptr, k_ptr, start_ptr, largest_ptr, share_ptr,
    q_strides, k_strides, num_tokens, num_heads, window, scale_log2,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """By query and head the largest score, times scale·log2(e), and its share, 1 over the sum of
    exp2 of the scores' distances to it: (T, H)."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    query = first + tl.arange(0, BLOCK)
    q = _rows(q_ptr, query, head, q_strides, num_tokens, BLOCK_K, K)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for key0 in range(_first_block(first, start_ptr, window, BLOCK), first + BLOCK, BLOCK):
        key = key0 + tl.arange(0, BLOCK)
        k = _rows(k_ptr, key, head, k_strides, num_tokens, BLOCK_K, K)
        scores = _dot(q, tl.trans(k), SOFTWARE) * scale_log2
        seen = _seen(query, key, start_ptr, window, num_tokens)
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        largest = new
    inside = query < num_tokens
    tl.store(largest_ptr + query * num_heads + head, largest, mask=inside)
    share = 1 / tl.where(inside, total, 1.0)
    tl.store(share_ptr + query * num_heads + head, share, mask=inside)


@triton.jit
def dc_mix_kernel(
    q_ptr, k_ptr, w1_ptr, start_ptr, largest_ptr, share_ptr, mixed_ptr,
    q_strides, k_strides, num_tokens, num_heads, window, scale_log2,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """mixed (T, window): the heads' softmaxes times w1, summed."""
    first = tl.program_id(0) * BLOCK
    key0 = _first_block(first, start_ptr, window, BLOCK) + tl.program_id(1) * BLOCK
    if key0 < first + BLOCK:
        query, key = first + tl.arange(0, BLOCK), key0 + tl.arange(0, BLOCK)
        seen = _seen(query, key, start_ptr, window, num_tokens)
        mixed = tl.zeros((BLOCK, BLOCK), tl.float32)
        for head in range(num_heads):
            q = _rows(q_ptr, query, head, q_strides, num_tokens, BLOCK_K, K)
            k = _rows(k_ptr, key, head, k_strides, num_tokens, BLOCK_K, K)
            largest = _by_head(largest_ptr, query, head, num_heads, num_tokens, SOFTWARE)
            share = _by_head(share_ptr, query, head, num_heads, num_tokens, SOFTWARE)
            w1 = _by_head(w1_ptr, query, head, num_heads, num_tokens, SOFTWARE)
            mixed += w1[:, None] * _weights(q, k, largest, share, seen, scale_log2, SOFTWARE)
        store_rounded(_table(mixed_ptr, query, key, window), mixed, seen, SOFTWARE)


@triton.jit
def dc_values_kernel(
    v_ptr, w2_ptr, start_ptr, mixed_ptr, y_ptr,
    v_strides, num_tokens, num_heads, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """y (T, H, E): values by the mixed weights, times w2."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    query = first + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for key0 in range(_first_block(first, start_ptr, window, BLOCK), first + BLOCK, BLOCK):
        key = key0 + tl.arange(0, BLOCK)
        seen = _seen(query, key, start_ptr, window, num_tokens)
        ptrs = _table(mixed_ptr, query, key, window)
        mixed = tl.load(ptrs, mask=seen, other=0.0)
        v = _rows(v_ptr, key, head, v_strides, num_tokens, BLOCK_E, E)
        y += _dot(mixed, v, SOFTWARE)
    y = y * _by_head(w2_ptr, query, head, num_heads, num_tokens, SOFTWARE)[:, None]
    _store_rows(y_ptr, y, query, head, num_heads, num_tokens, E, BLOCK_E, SOFTWARE)


@triton.jit
def dc_dmixed_kernel(
    v_ptr, w2_ptr, start_ptr, dy_ptr, dmixed_ptr,
    v_strides, dy_strides, num_tokens, num_heads, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """dmixed (T, window) float32: Σ over heads of w2·⟨dy, v⟩."""
    first = tl.program_id(0) * BLOCK
    key0 = _first_block(first, start_ptr, window, BLOCK) + tl.program_id(1) * BLOCK
    if key0 < first + BLOCK:
        query, key = first + tl.arange(0, BLOCK), key0 + tl.arange(0, BLOCK)
        dmixed = tl.zeros((BLOCK, BLOCK), tl.float32)
        for head in range(num_heads):
            dy = _rows(dy_ptr, query, head, dy_strides, num_tokens, BLOCK_E, E)
            v = _rows(v_ptr, key, head, v_strides, num_tokens, BLOCK_E, E)
            w2 = _by_head(w2_ptr, query, head, num_heads, num_tokens, SOFTWARE)
            dmixed += w2[:, None] * _dot(dy, tl.trans(v), SOFTWARE)
        ptrs = _table(dmixed_ptr, query, key, window)
        tl.store(ptrs, dmixed, mask=_seen(query, key, start_ptr, window, num_tokens))


@triton.jit
def dc_dw_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, largest_ptr, share_ptr, mixed_ptr, dmixed_ptr, dy_ptr,
    dw1_ptr, dw2_ptr,
    q_strides, k_strides, v_strides, dy_strides, num_tokens, num_heads, window, scale_log2,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """dw1, dw2 (T, H) float32: ⟨dmixed, the head's softmax⟩ and ⟨mixed, dy·v⟩."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    query = first + tl.arange(0, BLOCK)
    q = _rows(q_ptr, query, head, q_strides, num_tokens, BLOCK_K, K)
    dy = _rows(dy_ptr, query, head, dy_strides, num_tokens, BLOCK_E, E)
    largest = _by_head(largest_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    share = _by_head(share_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    dw1, dw2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for key0 in range(_first_block(first, start_ptr, window, BLOCK), first + BLOCK, BLOCK):
        key = key0 + tl.arange(0, BLOCK)
        seen = _seen(query, key, start_ptr, window, num_tokens)
        k = _rows(k_ptr, key, head, k_strides, num_tokens, BLOCK_K, K)
        weights = _weights(q, k, largest, share, seen, scale_log2, SOFTWARE)
        dmixed = tl.load(_table(dmixed_ptr, query, key, window), mask=seen, other=0.0)
        dw1 += tl.sum(weights * dmixed, axis=1)
        v = _rows(v_ptr, key, head, v_strides, num_tokens, BLOCK_E, E)
        mixed = tl.load(_table(mixed_ptr, query, key, window), mask=seen, other=0.0)
        dw2 += tl.sum(to_float(mixed, SOFTWARE) * _dot(dy, tl.trans(v), SOFTWARE), axis=1)
    tl.store(dw1_ptr + query * num_heads + head, dw1, mask=query < num_tokens)
    tl.store(dw2_ptr + query * num_heads + head, dw2, mask=query < num_tokens)


@triton.jit
def _dscores(weights, w1, dw1, dmixed):
    """Gradient of one head's scores; dw1 is what a softmax's gradient takes off each row."""
    return w1[:, None] * weights * (dmixed - dw1[:, None])


@triton.jit
def dc_dq_kernel(
    q_ptr, k_ptr, w1_ptr, start_ptr, largest_ptr, share_ptr, dmixed_ptr, dw1_ptr, dq_ptr,
    q_strides, k_strides, num_tokens, num_heads, window, scale, scale_log2,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """dq (T, H, K)."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    query = first + tl.arange(0, BLOCK)
    q = _rows(q_ptr, query, head, q_strides, num_tokens, BLOCK_K, K)
    largest = _by_head(largest_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    share = _by_head(share_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    w1 = _by_head(w1_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    dw1 = _by_head(dw1_ptr, query, head, num_heads, num_tokens, SOFTWARE)
    dq = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for key0 in range(_first_block(first, start_ptr, window, BLOCK), first + BLOCK, BLOCK):
        key = key0 + tl.arange(0, BLOCK)
        seen = _seen(query, key, start_ptr, window, num_tokens)
        k = _rows(k_ptr, key, head, k_strides, num_tokens, BLOCK_K, K)
        weights = _weights(q, k, largest, share, seen, scale_log2, SOFTWARE)
        dmixed = tl.load(_table(dmixed_ptr, query, key, window), mask=seen, other=0.0)
        dscores = _dscores(weights, w1, dw1, dmixed)
        dq += _dot(round_as(dscores, k_ptr.dtype.element_ty, SOFTWARE), k, SOFTWARE)
    _store_rows(dq_ptr, dq * scale, query, head, num_heads, num_tokens, K, BLOCK_K, SOFTWARE)


@triton.jit
def dc_dkv_kernel(
    q_ptr, k_ptr, w1_ptr, w2_ptr, start_ptr, largest_ptr, share_ptr, mixed_ptr, dmixed_ptr,
    dy_ptr, dw1_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, dy_strides, num_tokens, num_heads, window, scale, scale_log2,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, SOFTWARE: tl.constexpr,
):  # fmt: skip
    """dk (T, H, K) and dv (T, H, E) of a block of keys, over the blocks of queries that see it."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    key = first + tl.arange(0, BLOCK)
    k = _rows(k_ptr, key, head, k_strides, num_tokens, BLOCK_K, K)
    dk = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for query0 in range(first, tl.minimum(first + BLOCK + window - 1, num_tokens), BLOCK):
        query = query0 + tl.arange(0, BLOCK)
        seen = _seen(query, key, start_ptr, window, num_tokens)
        q = _rows(q_ptr, query, head, q_strides, num_tokens, BLOCK_K, K)
        largest = _by_head(largest_ptr, query, head, num_heads, num_tokens, SOFTWARE)
        share = _by_head(share_ptr, query, head, num_heads, num_tokens, SOFTWARE)
        w1 = _by_head(w1_ptr, query, head, num_heads, num_tokens, SOFTWARE)
        dw1 = _by_head(dw1_ptr, query, head, num_heads, num_tokens, SOFTWARE)
        weights = _weights(q, k, largest, share, seen, scale_log2, SOFTWARE)
        dmixed = tl.load(_table(dmixed_ptr, query, key, window), mask=seen, other=0.0)
        dscores = _dscores(weights, w1, dw1, dmixed)
        dk += _dot(tl.trans(round_as(dscores, q_ptr.dtype.element_ty, SOFTWARE)), q, SOFTWARE)
        mixed = tl.load(_table(mixed_ptr, query, key, window), mask=seen, other=0.0)
        w2 = _by_head(w2_ptr, query, head, num_heads, num_tokens, SOFTWARE)
        dy = to_float(_rows(dy_ptr, query, head, dy_strides, num_tokens, BLOCK_E, E), SOFTWARE)
        dy = round_as(dy * w2[:, None], dy_ptr.dtype.element_ty, SOFTWARE)
        dv += _dot(tl.trans(mixed), dy, SOFTWARE)
    _store_rows(dk_ptr, dk * scale, key, head, num_heads, num_tokens, K, BLOCK_K, SOFTWARE)
    _store_rows(dv_ptr, dv, key, head, num_heads, num_tokens, E, BLOCK_E, SOFTWARE)


def _blocks(**dims: int) -> dict[str, int | bool]:
    """The constants of a kernel whose head dims these are."""
    padded = {f"BLOCK_{name}": max(16, triton.next_power_of_2(dim)) for name, dim in dims.items()}
    return {**dims, **padded, "BLOCK": BLOCK, "SOFTWARE": interprets()}


def _grids(num_tokens: int, num_heads: int, window: int) -> tuple[tuple[int, int], ...]:
    """Of kernels that take a head, and of those that take one of the blocks a query sees."""
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    return (num_blocks, num_heads), (num_blocks, triton.cdiv(window - 1, BLOCK) + 1)


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def dc_attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    y: Tensor,
    largest: Tensor,
    share: Tensor,
    mixed: Tensor,
) -> None:
    """Into y (T, H, E), largest and share (T, H) float32, mixed (T, window) of zeros in v's type.

    q, k (T, H, K) and v (T, H, E): last dims contiguous; w1, normed, and w2 (T, H): contiguous.
    """
    if y.numel() == 0:
        return
    num_tokens, num_heads, head_dim = q.shape
    by_head, by_block = _grids(num_tokens, num_heads, window)
    sizes = (num_tokens, num_heads, window)
    scale_log2 = scale * math.log2(math.e)
    keys, values = _blocks(K=head_dim), _blocks(E=v.shape[2])
    strides = (_strides(q), _strides(k))
    with torch.cuda.device_of(q):  # a launch goes to the current device
        dc_softmax_kernel[by_head](
            q, k, start, largest, share, *strides, *sizes, scale_log2, **keys, **OPTIONS
        )  # fmt: skip
        dc_mix_kernel[by_block](
            q, k, w1, start, largest, share, mixed, *strides, *sizes, scale_log2, **keys, **OPTIONS
        )  # fmt: skip
        dc_values_kernel[by_head](
            v, w2, start, mixed, y, _strides(v), *sizes, **values, **OPTIONS
        )  # fmt: skip


def dc_attention_bwd_out(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    largest: Tensor,
    share: Tensor,
    mixed: Tensor,
    dmixed: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dw1: Tensor,
    dw2: Tensor,
) -> None:
    """Into the gradients, contiguous, of w1 and w2 in float32; dmixed (T, window) float32 is room
    for what comes between."""
    if dy.numel() == 0:
        return
    num_tokens, num_heads, head_dim = q.shape
    by_head, by_block = _grids(num_tokens, num_heads, window)
    sizes = (num_tokens, num_heads, window)
    scales = (scale, scale * math.log2(math.e))
    keys, values = {"K": head_dim}, {"E": v.shape[2]}
    q_strides, k_strides, v_strides, dy_strides = (_strides(x) for x in (q, k, v, dy))
    softmaxes = (start, largest, share)
    with torch.cuda.device_of(q):
        dc_dmixed_kernel[by_block](
            v, w2, start, dy, dmixed, v_strides, dy_strides, *sizes,
            **_blocks(**values), **OPTIONS,
        )  # fmt: skip
        dc_dw_kernel[by_head](
            q, k, v, *softmaxes, mixed, dmixed, dy, dw1, dw2,
            q_strides, k_strides, v_strides, dy_strides, *sizes, scales[1],
            **_blocks(**keys, **values), **DW_OPTIONS,
        )  # fmt: skip
        dc_dq_kernel[by_head](
            q, k, w1, *softmaxes, dmixed, dw1, dq, q_strides, k_strides, *sizes, *scales,
            **_blocks(**keys), **OPTIONS,
        )  # fmt: skip
        dc_dkv_kernel[by_head](
            q, k, w1, w2, *softmaxes, mixed, dmixed, dy, dw1, dk, dv,
            q_strides, k_strides, dy_strides, *sizes, *scales,
            **_blocks(**keys, **values), **OPTIONS,
        )  # fmt: skip


def static_variants():
    """What benchmarks/static_check.py compiles: heads of the record (README: format)."""
    pointer, wide = "*bf16:16", "i32:16"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dy_ptr", "mixed_ptr", "y_ptr"), pointer)
    types |= dict.fromkeys(("w1_ptr", "w2_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), pointer)
    types |= dict.fromkeys(
        ("largest_ptr", "share_ptr", "dmixed_ptr", "dw1_ptr", "dw2_ptr"), "*fp32:16"
    )
    types |= {"start_ptr": "*i32:16", "num_tokens": wide, "num_heads": "i32", "window": wide}
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides", "dy_strides"), (wide, wide))
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    constants = {"K": 128, "BLOCK_K": 128, "E": 128, "BLOCK_E": 128}
    constants |= {"BLOCK": BLOCK, "SOFTWARE": False}
    forward = (dc_softmax_kernel, dc_mix_kernel, dc_values_kernel)
    for kernel in (*forward, dc_dmixed_kernel, dc_dw_kernel, dc_dq_kernel, dc_dkv_kernel):
        names = [param.name for param in kernel.params]
        chosen = [{name: of[name] for name in names if name in of} for of in (types, constants)]
        options = DW_OPTIONS if kernel is dc_dw_kernel else OPTIONS
        yield kernel.fn.__name__, kernel, *chosen, options
