"""Newton–Schulz orthogonalisation; Polar Express (arXiv 2505.16932) as in RECIPE section 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# 5 steps on [1e-3, 1], safety factor 1.02 on all but the last, cushion 0.02.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(g_BMN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, M, N) in `dtype`: each matrix with its singular values driven to about 1.

    `orthogonalize` with the coefficients above; X = G/(‖G‖_F·1.02 + 1e−6).
    """
    return orthogonalize(g_BMN, COEFFICIENTS, dtype, norm_factor=1.02, eps=1e-6)


def orthogonalize(
    g_BMN: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype | None = None,
    *,
    norm_factor: float = 1.0,
    eps: float = 1e-7,
) -> Tensor:
    """(B, M, N) in `dtype`: a Newton–Schulz iteration with its own (a, b, c) at each step.

    X = G/(‖G‖_F·norm_factor + eps) in at least fp32, rounded once to `dtype` (default: G's own);
    then per step A = XXᵀ, B = b·A + c·A², X ← a·X + B·X, each summed in at least fp32 and rounded.
    Tall matrices (M > N) take A = XᵀX from the right; above 1,024 rows the product is rounded
    before a·X is added (the public kernels' order).
    """
    dtype = dtype or g_BMN.dtype
    wide = torch.promote_types(dtype, torch.float32)
    tall = g_BMN.shape[-2] > g_BMN.shape[-1]
    two_roundings = tall and g_BMN.shape[-2] > 1024 and dtype != wide
    g = g_BMN.to(torch.promote_types(g_BMN.dtype, torch.float32))
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) * norm_factor + eps)).to(dtype)

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(wide)

    x = x.to(wide)
    for a, b, c in coefficients:
        gram = rounded(x.mT @ x if tall else x @ x.mT)
        poly = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        if two_roundings:
            x = rounded(a * x + rounded(x @ poly))
        else:
            x = rounded(torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a))
    return x.to(dtype)
