"""The last two dimensions swapped, moved or added."""

from __future__ import annotations

import torch
from torch import Tensor


def transpose(x: Tensor) -> Tensor:
    """(..., N, M) contiguous copy of `x` (..., M, N), never a view of it. Any type."""
    return x.mT.clone(memory_format=torch.contiguous_format)


def transpose_add_(out: Tensor, x: Tensor) -> Tensor:
    """Adds `x` (..., M, N) transposed to `out` (..., N, M): torch sums 16-bit types in float32."""
    return out.add_(x.mT)


def transpose_out(x: Tensor, out: Tensor, add: bool) -> None:
    """Writes into `out` what the two functions above return."""
    if add:
        transpose_add_(out, x)
    else:
        out.copy_(x.mT)
