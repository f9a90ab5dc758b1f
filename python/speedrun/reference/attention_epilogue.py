"""What follows attention: exclusive self-attention and the attention gate, RECIPE section 3."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_epilogue(
    y_THE: Tensor, v_THE: Tensor, xsa_TH: Tensor | None = None, gate_TH: Tensor | None = None
) -> Tensor:
    """(..., T, H, E) attention outputs, for each head and token:

    XSA: y − tanh(α)·(⟨y, v⟩ / max(|v|², 1e−8))·v takes the own value's direction out of y.
    Gate: times `gate_TH`. `xsa_TH` holds α; None leaves a part out. Computed in at least fp32.
    """
    y = y_THE.to(torch.promote_types(y_THE.dtype, torch.float32))
    if xsa_TH is not None:
        v = v_THE.to(y.dtype)
        share = (y * v).sum(-1) / v.square().sum(-1).clamp(min=1e-8)
        y = y - (torch.tanh(xsa_TH.to(y.dtype)) * share)[..., None] * v
    if gate_TH is not None:
        y = y * gate_TH[..., None]
    return y.to(y_THE.dtype)
