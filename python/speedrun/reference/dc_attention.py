"""Dynamically composed attention (arXiv 2405.08553), the form of RECIPE section 3.

T tokens, H heads, K and E head dims of keys and values, B blocks of w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.reference._blocks import BlockMask, in_blocks

DC_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DcPlan:
    """Who sees whom: each token the last `window` of its document, itself included."""

    start_T: Tensor  # (T,) int32: where each token's document starts
    window: int

    def block_mask(self, dtype: torch.dtype) -> BlockMask:
        """The same in blocks of as many queries as a token sees others."""
        num_tokens = len(self.start_T)
        block = max(1, min(self.window - 1, num_tokens))
        tail = -num_tokens % block
        query = torch.arange(num_tokens + tail, device=self.start_T.device)
        # Tokens that fill the last block see themselves: no row of the softmax is empty.
        start = torch.cat([self.start_T, query[num_tokens:].to(self.start_T.dtype)])
        query, start = (x.view(-1, block, 1) for x in (query, start))
        key = query[:, :1] + torch.arange(-block, block, device=query.device)  # (B, 1, 2w)
        seen = (key <= query) & (key > query - self.window) & (key >= start)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return BlockMask(bias.masked_fill_(~seen, -torch.inf)[:, None], num_tokens)


def normed_over_heads(w1_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """w1 over its RMS along the heads, computed in at least fp32, rounded to `dtype`."""
    wide = torch.promote_types(w1_TH.dtype, torch.float32)
    return F.rms_norm(w1_TH.to(wide), (w1_TH.shape[-1],), eps=DC_NORM_EPS).to(dtype)


def dc_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THE: Tensor,
    w1_TH: Tensor,
    w2_TH: Tensor,
    plan: DcPlan,
    scale: float,
) -> Tensor:
    """(T, H, E): what is added to head h's output, w2[t,h]·Σ_s A[t,s]·v_h[s].

    A[t,s] = Σ_h w1[t,h]·P_h[t,s] mixes the heads' own softmaxes P_h over the keys that t sees; w1
    is `normed_over_heads` to q's type.
    """
    w1 = normed_over_heads(w1_TH, q_THK.dtype)
    scores_dtype = torch.promote_types(q_THK.dtype, torch.float32)
    mask = plan.block_mask(scores_dtype)
    q_BHwK, k_BHxK, v_BHxE = in_blocks(q_THK, k_THK, v_THE, mask)
    scores = (q_BHwK @ k_BHxK.mT).to(scores_dtype)
    weights_BHwx = (scores * scale + mask.bias_B1wx).softmax(-1)
    tail = -mask.num_tokens % mask.block
    w1_BHw = F.pad(w1, (0, 0, 0, tail)).unflatten(0, (-1, mask.block)).transpose(1, 2)
    mixed_B1wx = (weights_BHwx * w1_BHw[..., None]).sum(1, keepdim=True)
    y_BHwE = mixed_B1wx.to(v_THE.dtype) @ v_BHxE
    y_THE = y_BHwE.transpose(1, 2).flatten(0, 1)[: mask.num_tokens]
    return (y_THE * w2_TH[..., None]).to(v_THE.dtype)
