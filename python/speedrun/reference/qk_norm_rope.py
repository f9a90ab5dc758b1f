"""QK-norm and half rotary: RECIPE section 3, "Attention".

T tokens, H heads, K head dim; the first half of the head dim rotates in adjacent pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 2.0**-23


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """(K/4,) float64: (1/base)^linspace(0, 1, K/4)."""
    return (1 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def rotary_table(
    frequencies: Tensor, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, K/4) of position * frequency; angles in the frequencies' own type."""
    theta = positions.to(frequencies.dtype)[:, None, None] * frequencies
    return theta.cos().to(dtype), theta.sin().to(dtype)


def qk_norm_rope(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """norm(x) over the head dim, then pairs (a, b) -> (a cos + b sin, b cos - a sin).

    `x_THK` (..., T, H, K); `cos`, `sin` (T, 1, K/4). The norm is computed in at least fp32.
    """
    x = F.rms_norm(x_THK, (x_THK.shape[-1],), eps=NORM_EPS)
    half = x.shape[-1] // 2
    a, b = x[..., :half:2], x[..., 1:half:2]
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., half:]], dim=-1)
