"""Front door of `dc_attention`: dynamically composed attention over the last keys of a document.

Any number of heads, any window; T tokens, H heads, K and E head dims of keys and values. Kernels
take queries, keys and values of one type, bf16 with heads of up to 128 or float32 with up to 64,
sum in float32, and keep no table larger than (T, window).
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define, define_gradient
from speedrun.reference import dc_attention as reference
from speedrun.reference.dc_attention import DcPlan, normed_over_heads

__all__ = ["DcPlan", "dc_attention", "plan_dc_attention"]

DTYPES = (torch.bfloat16, torch.float32)  # that kernels have
MAX_ROW_BYTES = 256  # of a head: 128 numbers of bf16, so that blocks fit into shared memory


def plan_dc_attention(cu_seqlens: Tensor, num_tokens: int, window: int) -> DcPlan:
    """Who sees whom: token t keys t−window+1 … t of its document.

    `cu_seqlens` (N,) int32: rising document starts from 0, padded with num_tokens. TypeError:
    another type; ValueError: a window or num_tokens below 1. Source: as for `dc_attention`.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise TypeError(
            f"cu_seqlens must be a 1-D int32 tensor, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}"
        )
    if min(window, num_tokens) < 1:
        raise ValueError(f"window={window}, num_tokens={num_tokens}: both must be at least 1")
    position = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True) - 1
    return DcPlan(cu_seqlens[document], window)


def dc_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THE: Tensor,
    w1_TH: Tensor,
    w2_TH: Tensor,
    plan: DcPlan,
    scale: float,
) -> Tensor:
    """(T, H, E): what is added to attention's output, heads' weights mixed by w1 and shared by w2.

    Queries and keys (T, H, K), values (T, H, E), weights (T, H), normed over the heads if w1;
    differentiable in all. Kernels take bfloat16 or float32, the reference any floating type.
    ValueError: shapes or devices that don't go together.
    Source: dynamically composable attention (arXiv 2405.08553), as record 089 has it.
    """
    _check(q_THK, k_THK, v_THE, w1_TH, w2_TH, plan)
    has_kernel = (
        q_THK.dtype == k_THK.dtype == v_THE.dtype
        and all(x.dtype in DTYPES for x in (q_THK, w1_TH, w2_TH))
        and max(q_THK.shape[2], v_THE.shape[2]) * q_THK.element_size() <= MAX_ROW_BYTES
    )
    backend = choose("dc_attention", q_THK.device, triton=has_kernel)
    if backend == "torch":
        return reference.dc_attention(q_THK, k_THK, v_THE, w1_TH, w2_TH, plan, scale)
    w1 = normed_over_heads(w1_TH, q_THK.dtype)
    streams = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THK, k_THK, v_THE))
    weights = (w1.contiguous(), w2_TH.contiguous())
    return torch.ops.speedrun.dc_attention(*streams, *weights, plan.start_T, plan.window, scale)[0]


def _check(q, k, v, w1, w2, plan) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "dc_attention: needs q and k (T, H, K) and v (T, H, E) of the same tokens and heads, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if w1.shape != q.shape[:2] or w2.shape != q.shape[:2]:
        raise ValueError(
            f"dc_attention: w1 and w2 need shape {tuple(q.shape[:2])}, got {tuple(w1.shape)} and "
            f"{tuple(w2.shape)}"
        )
    if len(plan.start_T) != len(q):
        raise ValueError(f"the plan is for {len(plan.start_T)} tokens, q has {len(q)}")
    for name, x in (("k", k), ("v", v), ("w1", w1), ("w2", w2), ("the plan", plan.start_T)):
        if x.device != q.device:
            raise ValueError(f"dc_attention: {name} is on {x.device}, q on {q.device}")


def _empty_outputs(q, k, v, w1, w2, start, window, scale) -> tuple[Tensor, ...]:
    """y (T, H, E); of the softmaxes largest and share (T, H) float32; mixed (T, window)."""
    largest, share = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), largest, share, v.new_zeros(len(v), window)


def _forward(q, k, v, w1, w2, start, window, scale) -> tuple[Tensor, ...]:
    from speedrun.triton_kernels.dc_attention import dc_attention_out

    arguments = (q, k, v, w1, w2, start, window, scale)
    outs = _empty_outputs(*arguments)
    dc_attention_out(*arguments, *outs)
    return outs


def _empty_gradients(dy, q, k, v, w1, w2, *others) -> tuple[Tensor, ...]:
    """Of q, k and v in their types, of w1 and w2 in float32."""
    narrow = (x.new_empty(x.shape) for x in (q, k, v))
    return *narrow, *(w.new_empty(w.shape, dtype=torch.float32) for w in (w1, w2))


def _bwd(dy, q, k, v, w1, w2, start, window, scale, largest, share, mixed) -> tuple[Tensor, ...]:
    from speedrun.triton_kernels.dc_attention import dc_attention_bwd_out

    arguments = (dy, q, k, v, w1, w2, start, window, scale, largest, share, mixed)
    grads = _empty_gradients(*arguments)
    dc_attention_bwd_out(*arguments, torch.empty_like(mixed, dtype=torch.float32), *grads)
    return grads


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy, *others):
    q, k, v, w1, w2, start, *softmaxes = ctx.saved_tensors
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    options = (start, ctx.window, ctx.scale, *softmaxes)
    dq, dk, dv, dw1, dw2 = torch.ops.speedrun.dc_attention_bwd(dy, q, k, v, w1, w2, *options)
    return dq, dk, dv, dw1.to(w1.dtype), dw2.to(w2.dtype), None, None, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w1, Tensor w2, Tensor start, int window, float scale"
)
define(
    f"dc_attention({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_outputs,
    python=_forward,
)
define_gradient("dc_attention", _backward, _setup_context)
define(
    f"dc_attention_bwd(Tensor dy, {_INPUTS}, Tensor largest, Tensor share, Tensor mixed) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_gradients,
    python=_bwd,
)
