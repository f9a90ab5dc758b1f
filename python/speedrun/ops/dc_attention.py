"""Front door of `dc_attention`: dynamically composed attention. Backend: the reference.

The plan is `attention.plan_attention`'s, of a window of one position less than DC sees.
"""

from __future__ import annotations

from torch import Tensor

from speedrun.ops.attention import AttentionPlan
from speedrun.reference.dc_attention import dc_attention as _reference


def dc_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THE: Tensor,
    w1_TH: Tensor,
    w2_TH: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """(T, H, E): what is added to attention's output, heads' weights mixed by w1 and shared by w2.

    Queries and keys (T, H, K), values (T, H, E), weights (T, H).
    """
    heads = q_THK.shape[:2]
    if any(t.shape[:2] != heads for t in (k_THK, v_THE)) or w1_TH.shape != w2_TH.shape:
        raise ValueError(f"dc_attention: all need the same tokens and heads, q has {tuple(heads)}")
    if w1_TH.shape != heads:
        raise ValueError(f"dc_attention: w1 and w2 need shape {tuple(heads)}, got {w1_TH.shape}")
    return _reference(q_THK, k_THK, v_THE, w1_TH, w2_TH, plan, scale)
