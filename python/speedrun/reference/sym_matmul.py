"""Products of matrices with their own transpose, and others that are known to be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor


def sym_matmul_out(
    a_BNK: Tensor,
    b_BNK: Tensor,
    c_BNN: Tensor | None,
    out_BNN: Tensor,
    trans: bool,
    alpha: float,
    beta: float,
) -> None:
    """Writes alpha·A·Bᵀ + beta·C (trans: a and b are (B, K, N), and it is alpha·Aᵀ·B + beta·C).

    On a CPU 16-bit types are multiplied and summed in fp32 and rounded once. On a GPU cuBLAS does
    the same. Both triangles are computed; where b isn't a, the lower one counts and is mirrored:
    rounded matrices commute only nearly, and what isn't symmetric grows from product to product.
    """
    left, right = (a_BNK.mT, b_BNK) if trans else (a_BNK, b_BNK.mT)
    wide = out_BNN
    if out_BNN.device.type == "cpu" and out_BNN.element_size() == 2:
        left, right = left.float(), right.float()
        wide = torch.empty_like(out_BNN, dtype=torch.float32)
    start = wide if c_BNN is None else c_BNN.to(wide.dtype)  # not read where beta is 0
    beta = 0.0 if c_BNN is None else beta
    torch.baddbmm(start, left, right, beta=beta, alpha=alpha, out=wide)
    if b_BNK is not a_BNK:
        mirror_(wide)
    if wide is not out_BNN:
        out_BNN.copy_(wide)


def mirror_(x_BNN: Tensor) -> None:
    """Copies the lower triangle into the upper one."""
    x_BNN.tril_().add_(x_BNN.tril(-1).mT)
