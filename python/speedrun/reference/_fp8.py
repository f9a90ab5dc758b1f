"""FP8 numbers: the largest value of each type, and the saturating cast and amax that all references
share."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (any shape) / `scale` (), clamped to ±FP8_MAX[dtype], rounded once to nearest even.

    The quotient is in float32 (float64 of float64). A NaN stays one: torch's own cast is not used
    above the largest value, where its versions differ.
    """
    limit = FP8_MAX[dtype]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) / scale).clamp(-limit, limit).to(dtype)


def max_abs(x: Tensor) -> Tensor:
    """() float32: max|x|, 0 for no elements, NaN if there is one."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)  # one pass, no copy
