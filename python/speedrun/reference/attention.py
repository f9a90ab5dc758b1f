"""Causal sliding-window attention over documents, in blocks: O(T * window), any dtype.

RECIPE section 3, "Attention": token t sees keys t-window … t of its own document.
T tokens, H heads, K head dim of queries and keys, E head dim of values.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from speedrun.reference._blocks import BlockMask, in_blocks


def attention(q_THK: Tensor, k_THK: Tensor, v_THE: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """(T, H, E): softmax of scale * q·k over the keys that `mask` shows, times v."""
    q, k, v = in_blocks(q_THK, k_THK, v_THE, mask)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias_B1wx.to(q.dtype), scale=scale)
    return y.transpose(1, 2).flatten(0, 1)[: mask.num_tokens]
