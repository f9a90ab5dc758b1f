"""Casts to fp8 with a scale, so that the real value is fp8 * scale; with amax, transpose and norm.

L layers, F hidden, D model. Scales and amax are float32 tensors on the device of what they scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
MIN_AMAX = 1e-12
# Scales from an older amax leave room for growth until now (RECIPE section 3).
POST_HEADROOM = 1.80  # the MLP's activations: amax of the forward pass before
DOWN_HEADROOM = 1.12  # the MLP's down weights: amax of one optimizer step before


class MlpWeights(NamedTuple):
    """The MLP weights of all layers in fp8; `_t` are transposed copies, contiguous."""

    up_f8: Tensor  # (L, F, D) e4m3
    up_f8_t: Tensor | None  # (L, D, F)
    up_scale: Tensor  # (L,) float32
    down_f8: Tensor | None  # (L, F, D) e4m3
    down_f8_t: Tensor  # (L, D, F): K-major for post @ down
    down_scale: Tensor  # (L,) float32
    down_amax: Tensor  # (L,) float32, of these weights: the next refresh wants it


def round_to_fp8(quotient: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """Nearest number of `dtype`, ties to even; beyond its largest that one, NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return quotient.clamp(-largest, largest).to(dtype)  # torch versions differ without the clamp


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale with one rounding after the float32 quotient; `scale` broadcasts."""
    return round_to_fp8(x.float() / scale, dtype)


def max_abs(x: Tensor) -> Tensor:
    """() float32: max|x|, 0 for no elements, NaN if there is one."""
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def scale_of(amax: Tensor, headroom: float = 1.0, dtype: torch.dtype = E4M3) -> Tensor:
    """The scale that puts amax * headroom on the largest number of `dtype`."""
    return amax.clamp(min=MIN_AMAX) * headroom / torch.finfo(dtype).max


def rms_norm(x: Tensor, eps: float = 2**-23) -> Tensor:
    """x over its root mean square along the last dimension, in float32 (of float64: float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * (1 / (wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt())


def transposed_copy(x: Tensor) -> Tensor:
    return x.mT.clone(memory_format=torch.contiguous_format)


def refresh_mlp_weights(
    bank_WFD: Tensor, down_amax_L: Tensor, headroom: bool, up_t: bool = True, down_row: bool = True
) -> MlpWeights:
    """fp8 copies of a bank (2L, F, D) bf16 of up, down, up, down, ... matrices, for all layers.

    up: by its own amax, scale and quotient rounded to bf16. down: by `down_amax_L`, that of one
    step before, with headroom; without: by its own amax, the scale rounded to bf16.
    """
    up, down = bank_WFD[0::2], bank_WFD[1::2]
    up_amax, own_amax = (w.abs().amax((1, 2)).float() for w in (up, down))
    up_scale = scale_of(up_amax).bfloat16().float()
    down_scale = scale_of(own_amax).bfloat16().float()
    if headroom:
        down_scale = scale_of(down_amax_L, DOWN_HEADROOM)
    up_f8 = round_to_fp8((up.float() / up_scale[:, None, None]).bfloat16())
    down_f8 = to_fp8(down, down_scale[:, None, None])
    up_f8_t = transposed_copy(up_f8) if up_t else None
    down_row_f8 = down_f8 if down_row else None
    down_f8_t = transposed_copy(down_f8)
    return MlpWeights(up_f8, up_f8_t, up_scale, down_row_f8, down_f8_t, down_scale, own_amax)
