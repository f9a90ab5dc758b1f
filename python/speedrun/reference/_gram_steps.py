"""Steps of the Gram form on R = XXᵀ alone: what polar_express and polar_chain share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrun.reference._polar_coefficients import Quintic


def gram_steps(r_BNN: Tensor, coefficients: Sequence[Quintic], dtype: torch.dtype) -> Tensor:
    """Q (B, N, N): what the steps from R on multiply X by. R and Q: `dtype`'s numbers, in fp32 or
    wider (Gram Newton–Schulz; KERNELS section b.5).

    With Z = b·R + c·R² a step is Q ← (Z + a·I)·Q, R ← (Z + a·I)·R·(Z + a·I), each product rounded
    to `dtype`. a is never added to a rounded Z whose entries it would drown: it multiplies what Z
    does. All of R, Z and Q are symmetric; of their products only the lower triangle is used.
    """

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(r_BNN.dtype)

    def mirrored(t: Tensor) -> Tensor:
        return t.tril() + t.tril(-1).mT

    r, q = r_BNN, None
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    for step, (a, b, c) in enumerate(coefficients):
        z = rounded(torch.baddbmm(r, r, r, beta=b, alpha=c))
        q = rounded(z + a * eye if q is None else mirrored(torch.baddbmm(q, q, z, beta=a)))
        if step + 1 < len(coefficients):
            rz = rounded(mirrored(torch.baddbmm(r, r, z, beta=a)))
            r = rounded(mirrored(torch.baddbmm(rz, z, rz, beta=a)))
    return q
