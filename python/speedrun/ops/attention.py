"""Front door of `attention`: causal sliding-window attention over documents (varlen).

A batch is planned once per window (`plan_attention`) and the plan is shared by every layer, since
masks and tile lists cost more than one layer's attention. Backend: the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.reference._blocks import BlockMask, block_mask
from speedrun.reference.attention import attention as _reference

AttentionPlan = BlockMask


def plan_attention(
    cu_seqlens: Tensor, num_tokens: int, window: int, dtype: torch.dtype
) -> AttentionPlan:
    """What all layers of one window share.

    `cu_seqlens` (N,) int32: rising document starts from 0, padded with num_tokens. Repeated
    entries are documents of length 0. `window` w: token t sees keys t−w … t of its document.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise TypeError(
            f"cu_seqlens must be a 1-D int32 tensor, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}"
        )
    if window < 0 or num_tokens < 1:
        raise ValueError(f"window={window}, num_tokens={num_tokens}: need window >= 0, tokens >= 1")
    return block_mask(cu_seqlens, num_tokens, window, dtype)


def attention(
    q_THK: Tensor, k_THK: Tensor, v_THE: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """(T, H, E) attention output of queries and keys (T, H, K) and values (T, H, E)."""
    if q_THK.shape != k_THK.shape or q_THK.shape[:2] != v_THE.shape[:2]:
        raise ValueError(
            f"attention needs q and k (T, H, K) and v (T, H, E), got {tuple(q_THK.shape)}, "
            f"{tuple(k_THK.shape)}, {tuple(v_THE.shape)}"
        )
    if q_THK.shape[0] != plan.num_tokens:
        raise ValueError(f"the plan is for {plan.num_tokens} tokens, q has {q_THK.shape[0]}")
    return _reference(q_THK, k_THK, v_THE, plan, scale)
