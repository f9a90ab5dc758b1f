"""Weighted sums of residual streams: RECIPE section 3, "Layers" and MUDD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_mix(terms: Sequence[tuple[Tensor | float, Tensor]]) -> Tensor:
    """Σ factor·stream over `terms`, with the first stream's shape (…, T, D) and type.

    A factor is a number, a tensor () or one number a token (…, T, 1); a stream narrower than D is
    added to the first columns. Summed in at least fp32, rounded once.
    """
    (factor, first), *others = terms
    wide = torch.promote_types(first.dtype, torch.float32)
    total = first.to(wide) * factor
    for factor, stream in others:
        product = stream.to(wide) * factor
        total = total + F.pad(product, (0, first.shape[-1] - stream.shape[-1]))
    return total.to(first.dtype)
