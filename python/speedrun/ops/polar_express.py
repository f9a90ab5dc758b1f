"""Front door of `polar_express`: orthogonalises banks of matrices. Backend: the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrun.reference import polar_express as reference
from speedrun.reference._polar_coefficients import polar_coefficients
from speedrun.reference.polar_express import (
    RECORD,
    S4,
    PolarExpress,
    momentum_step,
    orthogonalize,
)

__all__ = [
    "RECORD",
    "S4",
    "PolarExpress",
    "momentum_polar_express",
    "orthogonalize",
    "polar_coefficients",
    "polar_express",
]


def polar_express(
    g: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None, spec: PolarExpress = RECORD
) -> Tensor | list[Tensor]:
    """The bank `g` (B, M, N) in `dtype` (default: its own), singular values driven to about 1.

    A list of banks gives a list of results.
    """
    banks = [g] if isinstance(g, Tensor) else g
    found = [reference.polar_express(bank, dtype, spec) for bank in banks]
    return found[0] if isinstance(g, Tensor) else found


def momentum_polar_express(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    mu: float | Tensor,
    dtype: torch.dtype | None = None,
    spec: PolarExpress = RECORD,
) -> list[Tensor]:
    """M ← lerp(M, G, 1−μ) in place for each bank, then `polar_express` of lerp(G, M, μ).

    grads: (B, M, N) each; momenta: the same in fp32 or wider; mu: a number or a 0-d float64 tensor,
    which is read by the device. dtype: that of the results (default: each gradient's own).
    """
    return [
        reference.polar_express(momentum_step(grad, momentum, mu), dtype or grad.dtype, spec)
        for grad, momentum in zip(grads, momenta, strict=True)
    ]
