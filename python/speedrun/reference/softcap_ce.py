"""Softcapped cross-entropy against several weighted targets: RECIPE section 3, "Loss".

T positions, V vocabulary (padded columns take part in the softmax), N targets a position.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_TARGET = -1


def softcap(z_TV: Tensor, a: float, b: float, c: float) -> Tensor:
    """Logits a·σ((z + b)/c), in at least fp32."""
    wide = torch.promote_types(z_TV.dtype, torch.float32)
    return a * torch.sigmoid((z_TV.to(wide) + b) / c)


def softcap_ce(
    z_TV: Tensor, targets_TN: Tensor, weights_N: Tensor, a: float, b: float, c: float
) -> Tensor:
    """(T,) loss: Σ_n weights[n]·CE(softcap(z), targets[:, n]); a target of −1 counts nothing."""
    logits = softcap(z_TV, a, b, c)
    picked = logits.gather(1, targets_TN.clamp(min=0))
    losses = torch.logsumexp(logits, dim=1, keepdim=True) - picked
    return (losses * (targets_TN != NO_TARGET) * weights_N).sum(1)
