"""MLP(h) = relu(h·Upᵀ)²·Down: RECIPE section 3. T tokens, D model dim, F hidden."""

from __future__ import annotations

from torch import Tensor


def relu2_mlp(h_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
    """(T, D) of `h_TD` (T, D), `up_FD` and `down_FD` (F, D)."""
    return (h_TD @ up_FD.mT).relu().square() @ down_FD
