"""Weighted sums of residual streams, and their RMS norm: RECIPE section 3, "Layers" and MUDD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.reference._fp8 import FP8_MAX, to_fp8

E4M3 = torch.float8_e4m3fn


def residual_mix(terms: Sequence[tuple[Tensor | float, Tensor]]) -> Tensor:
    """Σ factor·stream over `terms`, with the first stream's shape (…, T, D) and type.

    A factor is a number, a tensor () or one number a token (…, T, 1); a stream narrower than D is
    added to the first columns. Summed in at least fp32, in their order, rounded once.
    """
    (factor, first), *others = terms
    wide = torch.promote_types(first.dtype, torch.float32)
    total = first.to(wide) * factor
    for factor, stream in others:
        product = stream.to(wide) * factor
        total = total + F.pad(product, (0, first.shape[-1] - stream.shape[-1]))
    return total.to(first.dtype)


def static_scale(width: int, device: torch.device) -> Tensor:
    """() float32, √D/448: with it no element of an RMS-normed row of D numbers is above e4m3's."""
    largest = torch.full((), width**0.5, device=device)
    return largest / torch.full((), FP8_MAX[E4M3], device=device)


def residual_mix_norm(
    terms: Sequence[tuple[Tensor | float, Tensor]], eps: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, `residual_mix` of the terms; x/√(mean(x²) + eps) along D, of x as it was rounded; and that
    as e4m3 by `static_scale`, if asked for."""
    x = residual_mix(terms)
    normed = F.rms_norm(x, x.shape[-1:], eps=eps)
    scale = static_scale(x.shape[-1], x.device)
    return x, normed, to_fp8(normed.detach(), scale, E4M3) if fp8 else None
