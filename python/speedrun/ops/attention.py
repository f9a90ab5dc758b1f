"""Front door of `attention`: causal sliding-window attention over documents (varlen).

A batch is planned once per window (`plan_attention`) and the plan is shared by every layer, since
masks and tile lists cost more than one layer's attention. The plan names the backend
(ops/_attention_choice.py), which is chosen for the device and the head dims when the first one
is made. A window and lengths are values of tensors: code compiled with a kernel's plan serves them
all. Compiled code of the reference is for one window, which is a shape there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun.ops import _attention_backends as backends
from speedrun.ops._attention_choice import choose, served
from speedrun.ops._library import define, define_gradient
from speedrun.reference._blocks import BlockMask, block_mask
from speedrun.reference.attention import attention as _reference


@dataclass(frozen=True)
class KernelPlan:
    """What the layers of one window share where a kernel serves."""

    backend: str
    cu_seqlens: Tensor  # (N,) int32
    limits: Tensor  # (2,) int32 on the CPU: window, and what no document is longer than
    extra: Tensor  # what the backend's `prepare` made of them
    num_tokens: int


AttentionPlan = BlockMask | KernelPlan  # the reference's, a kernel's


def plan_attention(
    cu_seqlens: Tensor,
    num_tokens: int,
    window: int,
    dtype: torch.dtype,
    head_dims: tuple[int, int] | None = None,
    max_seqlen: int | None = None,
) -> AttentionPlan:
    """What all layers of one window share.

    `cu_seqlens` (N,) int32: rising document starts from 0, padded with num_tokens. Repeated
    entries are documents of length 0. `window` w: token t sees keys t−w … t of its document.
    `dtype`, `head_dims` (K, E): of queries and values; without head dims the plan is the
    reference's. `max_seqlen`: no document is longer; FlashAttention launches for it.
    TypeError, ValueError: another type, or a number out of range. Unavailable: an override asks for
    a backend that can't serve. Source: FlashAttention's varlen interface (arXiv 2307.08691).
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise TypeError(
            f"cu_seqlens must be a 1-D int32 tensor, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}"
        )
    if window < 0 or num_tokens < 1:
        raise ValueError(f"window={window}, num_tokens={num_tokens}: need window >= 0, tokens >= 1")
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"max_seqlen={max_seqlen}: must be at least 1")
    name = "torch"
    if head_dims is not None:
        name = choose(cu_seqlens.device, dtype, num_tokens, head_dims)
    if name == "torch":
        return block_mask(cu_seqlens, num_tokens, window, dtype)
    window = min(window, num_tokens)  # no sum with it leaves int32
    limits = torch.tensor([window, min(max_seqlen or num_tokens, num_tokens)], dtype=torch.int32)
    extra = backends.load(name).prepare(cu_seqlens, num_tokens, window)
    return KernelPlan(name, cu_seqlens.contiguous(), limits, extra, num_tokens)


def attention(
    q_THK: Tensor, k_THK: Tensor, v_THE: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """(T, H, E): softmax(scale·q·kᵀ)·v of queries and keys (T, H, K) and values (T, H, E).

    plan: `plan_attention`'s, which says who sees whom and of which type they are: bfloat16, or any
    floating one if the plan is the reference's. Differentiable in q, k and v.
    ValueError: another shape; TypeError: another type than the plan's.
    Source: FlashAttention (arXiv 2307.08691), with sliding windows over documents.
    """
    if q_THK.shape != k_THK.shape or q_THK.shape[:2] != v_THE.shape[:2]:
        raise ValueError(
            f"attention needs q and k (T, H, K) and v (T, H, E), got {tuple(q_THK.shape)}, "
            f"{tuple(k_THK.shape)}, {tuple(v_THE.shape)}"
        )
    if q_THK.shape[0] != plan.num_tokens:
        raise ValueError(f"the plan is for {plan.num_tokens} tokens, q has {q_THK.shape[0]}")
    if isinstance(plan, BlockMask):
        return _reference(q_THK, k_THK, v_THE, plan, scale)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_THK, k_THK, v_THE))
    if any(t.dtype != backends.DTYPE for t in (q, k, v)):
        raise TypeError(f"this plan needs {backends.DTYPE}, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch = (plan.cu_seqlens, plan.limits, plan.extra)
    return torch.ops.speedrun.attention(q, k, v, *batch, scale, plan.backend)[0]


def attention_backends() -> dict[str, str]:
    """By shape, such as "2048 tokens, heads 96/128", the backend last chosen in this process."""
    return dict(served)


def _batch(cu_seqlens: Tensor, limits: Tensor, extra: Tensor) -> backends.Batch:
    window, max_seqlen = limits.tolist()  # of a CPU tensor: nothing waits for the GPU
    return backends.Batch(cu_seqlens, window, max_seqlen, extra)


def _forward(q, k, v, cu_seqlens, limits, extra, scale: float, backend: str):
    batch = _batch(cu_seqlens, limits, extra)
    out, lse = backends.load(backend).forward(q, k, v, batch, scale)
    return out.contiguous(), lse


def _fake_forward(q, k, v, cu_seqlens, limits, extra, scale, backend):
    return v.new_empty(v.shape), v.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _backward_op(dout, q, k, v, out, lse, cu_seqlens, limits, extra, scale: float, backend: str):
    batch = _batch(cu_seqlens, limits, extra)
    grads = backends.load(backend).backward(dout, q, k, v, out, lse, batch, scale)
    return tuple(grad.contiguous() for grad in grads)


def _fake_backward(dout, q, k, v, *others):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout: Tensor, dlse: Tensor | None):
    """`lse` is for this only: it has no gradient of its own."""
    q, k, v, cu_seqlens, limits, extra, out, lse = ctx.saved_tensors
    batch = (cu_seqlens, limits, extra, ctx.scale, ctx.backend)
    grads = torch.ops.speedrun.attention_bwd(dout.contiguous(), q, k, v, out, lse, *batch)
    return *grads, None, None, None, None, None


_PLAN = "Tensor cu_seqlens, Tensor limits, Tensor extra, float scale, str backend"
define(
    f"attention(Tensor q, Tensor k, Tensor v, {_PLAN}) -> (Tensor, Tensor)",
    fake=_fake_forward,
    python=_forward,
)
define_gradient("attention", _gradient, _setup_context)
define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PLAN}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    python=_backward_op,
)
