"""QK-norm, half rotary, partial key offset and the layout of paired heads: RECIPE section 3.

P parts, T tokens a part, H heads, K head dim; the first half of the head dim rotates in adjacent
pairs, the other half, the stationary one, does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 2.0**-23


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """(K/4,) float64: (1/base)^linspace(0, 1, K/4)."""
    return (1 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def yarn(frequencies: Tensor, window: int, new_window: int) -> tuple[Tensor, float]:
    """Frequencies for a window grown from `window` to `new_window` tokens, and the score's factor.

    YaRN (arXiv 2309.00071): what turns less than once in the old window is slowed down by its
    growth, what turns 32 times or more stays, the rest is blended.
    """
    rotations = window * frequencies / (2 * math.pi)
    blend = ((rotations - 1) / (32 - 1)).clamp(0, 1)
    ratio = window / new_window
    return frequencies * (ratio + blend * (1 - ratio)), 0.2 * math.log(1 / ratio) + 1


def rotary_positions(num_tokens: int, num_paired_heads: int = 0) -> Tensor:
    """(T, 1) positions of tokens; for H paired heads (T, H): 2t + (h mod 2) for head h."""
    positions = torch.arange(num_tokens)[:, None]
    return 2 * positions + torch.arange(num_paired_heads) % 2 if num_paired_heads else positions


def rotary_table(
    frequencies: Tensor, positions_TH: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1 or H, K/4) of position * frequency; angles in at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    theta = positions_TH.to(wide)[..., None] * frequencies.to(wide)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def qk_norm_rope(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """norm(x) over the head dim, then pairs (a, b) -> (a cos + b sin, b cos - a sin).

    `x_THK` (..., T, H, K); `cos`, `sin` (T, 1 or H, K/4). The norm is computed in at least fp32.
    """
    x = F.rms_norm(x_THK, (x_THK.shape[-1],), eps=NORM_EPS)
    half = x.shape[-1] // 2
    a, b = x[..., :half:2], x[..., 1:half:2]
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., half:]], dim=-1)


def key_offset(k_PTHK: Tensor, first_PT: Tensor | None = None) -> Tensor:
    """Keys whose stationary half is that of the token before; the first token keeps its own.

    `first_PT` bool: tokens that begin a document keep theirs too.
    """
    half = k_PTHK.shape[-1] // 2
    still = k_PTHK[..., half:]
    before = torch.cat([still[:, :1], still[:, :-1]], dim=1)
    if first_PT is not None:
        before = torch.where(first_PT[..., None, None], still, before)
    return torch.cat([k_PTHK[..., :half], before], dim=-1)


def pair_heads(x_THK: Tensor) -> Tensor:
    """(T, H, K) -> (2T, H/2, K): heads j and j + H/2 of token t at places 2t and 2t + 1."""
    return x_THK.unflatten(1, (2, -1)).flatten(0, 1)


def unpair_heads(x_SJK: Tensor) -> Tensor:
    """(2T, H/2, K) -> (T, H, K): undoes `pair_heads`."""
    return x_SJK.unflatten(0, (-1, 2)).flatten(1, 2)
