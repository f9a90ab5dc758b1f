"""Casts to fp8 with a scale, so that the real value is fp8 * scale; with amax, transpose and norm.

L layers, F hidden, D model. Scales and amax are float32 tensors on the device of what they scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.reference._fp8 import FP8_MAX, max_abs, to_fp8

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


def scale_of(amax: Tensor, headroom: float = 1.0, dtype: torch.dtype = E4M3) -> Tensor:
    """The scale that puts amax * headroom on the largest number of `dtype`."""
    return amax.clamp(min=MIN_AMAX) * (headroom / FP8_MAX[dtype])


def rms_norm(x: Tensor, eps: float = 2**-23) -> Tensor:
    """x over its root mean square along the last dimension, in float32 (of float64: float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    mean = wide.square().sum(-1, keepdim=True) * (1 / max(1, x.shape[-1]))
    return wide * (1 / (mean + eps).sqrt())


def transposed_copy(x: Tensor) -> Tensor:
    return x.mT.clone(memory_format=torch.contiguous_format)


def fp8_quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype, transposed: bool, amax: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x / scale as fp8 (..., M, N) contiguous, (..., N, M) if asked for, and () max|x| if asked."""
    out = to_fp8(x, scale, dtype).contiguous()
    return out, transposed_copy(out) if transposed else None, max_abs(x) if amax else None


def rms_norm_fp8_quantize(
    x: Tensor, scale: Tensor, eps: float, keep: bool, transposed: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """rms_norm(x) rounded to bf16, if asked for, and that as e4m3 and transposed."""
    y = rms_norm(x, eps).bfloat16().contiguous()
    out, out_t, _ = fp8_quantize(y, scale, E4M3, transposed, False)
    return y if keep else None, out, out_t


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
    quotient = (up.float() / up_scale[:, None, None]).bfloat16()
    up_f8 = to_fp8(quotient, up_scale.new_ones(()), E4M3)
    down_f8 = to_fp8(down, down_scale[:, None, None], E4M3)
    up_f8_t = transposed_copy(up_f8) if up_t else None
    down_row_f8 = down_f8 if down_row else None
    down_f8_t = transposed_copy(down_f8)
    return MlpWeights(up_f8, up_f8_t, up_scale, down_row_f8, down_f8_t, down_scale, own_amax)


def _write(targets: tuple[Tensor | None, ...], values: tuple[Tensor | None, ...]) -> None:
    for target, value in zip(targets, values, strict=True):
        if target is not None:
            target.copy_(value)


def fp8_quantize_out(
    x: Tensor, scale: Tensor, out: Tensor, out_t: Tensor | None, amax: Tensor | None
) -> None:
    """`fp8_quantize` into given tensors; `amax` () is raised to max|x|, never lowered."""
    before = None if amax is None else amax.clone()
    _write((out, out_t, amax), fp8_quantize(x, scale, out.dtype, out_t is not None, True))
    if amax is not None:
        amax.copy_(torch.maximum(amax, before))


def rms_norm_fp8_quantize_out(
    x: Tensor, scale: Tensor, eps: float, y: Tensor | None, out: Tensor, out_t: Tensor | None
) -> None:
    """`rms_norm_fp8_quantize` into given tensors."""
    values = rms_norm_fp8_quantize(x, scale, eps, y is not None, out_t is not None)
    _write((y, out, out_t), values)


def fp8_refresh_out(
    bank_WFD: Tensor,
    down_amax_L: Tensor,
    headroom: bool,
    up: Tensor,
    up_t: Tensor | None,
    down: Tensor | None,
    down_t: Tensor,
    scales_2L: Tensor,
    amax_2L: Tensor,
    progress: Tensor,
) -> None:
    """`refresh_mlp_weights` into given tensors, scales and amax: up's, then down's. `progress` is
    what kernels count their tiles in, not used here."""
    copies = up_t is not None, down is not None
    new = refresh_mlp_weights(bank_WFD, down_amax_L, headroom, *copies)
    _write((up, up_t, scales_2L[0], down, down_t, scales_2L[1], amax_2L[1]), new)
    amax_2L[0].copy_(bank_WFD[0::2].abs().amax((1, 2)))
