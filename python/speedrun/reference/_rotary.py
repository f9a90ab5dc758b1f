"""Positions, frequencies and tables of rotary embeddings: RECIPE section 3, "Attention" and YaRN.

T tokens, H heads, K head dim; K/4 frequencies, since half of the head dim rotates in pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
