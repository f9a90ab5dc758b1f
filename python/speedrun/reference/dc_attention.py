"""Dynamically composed attention (arXiv 2405.08553), the form of RECIPE section 3.

T tokens, H heads, K and E head dims of keys and values, B blocks of w tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.reference._blocks import BlockMask, in_blocks

DC_NORM_EPS = 1e-6


def dc_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THE: Tensor,
    w1_TH: Tensor,
    w2_TH: Tensor,
    mask: BlockMask,
    scale: float,
) -> Tensor:
    """(T, H, E): what is added to head h's output, w2[t,h]·Σ_s A[t,s]·v_h[s].

    A[t,s] = Σ_h w1[t,h]·P_h[t,s] mixes the heads' own softmaxes P_h over the keys that `mask`
    shows; w1 is RMS-normed over the heads (computed in at least fp32, rounded to q's type).
    """
    wide = torch.promote_types(w1_TH.dtype, torch.float32)
    w1 = F.rms_norm(w1_TH.to(wide), (w1_TH.shape[-1],), eps=DC_NORM_EPS).to(q_THK.dtype)
    q_BHwK, k_BHxK, v_BHxE = in_blocks(q_THK, k_THK, v_THE, mask)
    scores = (q_BHwK @ k_BHxK.mT).to(torch.promote_types(q_THK.dtype, torch.float32))
    weights_BHwx = (scores * scale + mask.bias_B1wx.to(scores.dtype)).softmax(-1)
    tail = -mask.num_tokens % mask.block
    w1_BHw = F.pad(w1, (0, 0, 0, tail)).unflatten(0, (-1, mask.block)).transpose(1, 2)
    mixed_B1wx = (weights_BHwx * w1_BHw[..., None]).sum(1, keepdim=True)
    y_BHwE = mixed_B1wx.to(v_THE.dtype) @ v_BHxE
    y_THE = y_BHwE.transpose(1, 2).flatten(0, 1)[: mask.num_tokens]
    return (y_THE * w2_TH[..., None]).to(v_THE.dtype)
