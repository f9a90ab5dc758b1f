"""The head's loss and gradients without its logits in memory: KERNELS section d.6.

T positions, D model dim, V vocabulary, B blocks of BLOCK_COLUMNS columns, M targets a position.
With σ = sigmoid((x·W + b)/c), logit l = a·σ and e = exp(l − a), the gradient of a sum of losses
with respect to x·W is

    S·(a/c)/Σe · g  −  (a/c)·Σ_m w[m]·[v = target m]·σ·(1 − σ),      g = e·σ·(1 − σ),

S the sum of the weights that count. g lies between 0 and a number that only `a` decides, so that
one scale serves for its e5m2, before any row's Σe is known; the row's factor comes behind the
product with W, and for dW before the cast of x. The targets' columns go beside it, g is 0 there:
in the numbers of the unquantised x and W, since the difference of S·p and a weight would else be
little but the error of the former.

In at least float32; of float64 inputs (of FP8 values) in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.reference._fp8 import FP8_MAX, to_fp8

E5M2 = torch.float8_e5m2
BLOCK_COLUMNS = 128  # of a partial sum


class HeadLogits(NamedTuple):
    sums_BT: Tensor  # Σ e over a block's columns
    g_TV: Tensor  # e5m2, over factor_scale(a)
    g_VT: Tensor  # its transpose


class TargetTerms(NamedTuple):
    loss_T: Tensor
    rows_T: Tensor  # S·(a/c)/Σe
    sides_TM: Tensor  # the gradient at the targets; 0 where there is none, and at the second of two


def factor_scale(a: float) -> float:
    """The scale of g: its largest value, where a·σ² − (a − 2)·σ − 1 = 0, is e5m2's."""
    sigmoid = (a - 2 + math.sqrt(a * a + 4)) / (2 * a)
    return math.exp(a * (sigmoid - 1)) * sigmoid * (1 - sigmoid) / FP8_MAX[E5M2]


def factors(z: Tensor, a: float, b: float, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """σ, e and g of any shape."""
    sigmoid = torch.sigmoid((z + b) / c)
    e = (a * (sigmoid - 1)).exp()
    return sigmoid, e, e * sigmoid * (1 - sigmoid)


@torch.no_grad()
def head_logits(
    x_TD: Tensor,
    w_VD: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    rows: int,
    out: HeadLogits | None = None,
) -> HeadLogits:
    """Of FP8 x and W with their scales (), into `out` if given; never more than `rows` rows of
    logits at once."""
    (num_tokens, _), num_columns = x_TD.shape, w_VD.shape[0]
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    blocks = -(-num_columns // BLOCK_COLUMNS)
    if out is None:
        g_TV = torch.empty(num_tokens, num_columns, dtype=E5M2, device=x_TD.device)
        sums_BT = torch.empty(blocks, num_tokens, dtype=wide, device=x_TD.device)
        out = HeadLogits(sums_BT, g_TV, g_TV.new_empty(num_columns, num_tokens))
    sums_BT, g_TV, g_VT = out
    scale = sums_BT.new_full((), factor_scale(a))  # a copy from the host would wait
    w_DV = w_VD.to(wide).mT
    for start in range(0, num_tokens, rows):
        of = slice(start, start + rows)
        _, e, g = factors(x_TD[of].to(wide) @ w_DV * (x_scale * w_scale), a, b, c)
        for block, sums_T in enumerate(sums_BT):
            columns = slice(block * BLOCK_COLUMNS, (block + 1) * BLOCK_COLUMNS)
            sums_T[of] = e[:, columns].sum(1)
        g_TV[of] = to_fp8(g, scale, E5M2)
    g_VT.copy_(g_TV.mT)
    return out


@torch.no_grad()
def target_terms_(
    logits: HeadLogits,
    x_TD: Tensor,
    w_VD: Tensor,
    x_f8_TD: Tensor,
    w_f8_VD: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    targets_TM: Tensor,
    weights_M: Tensor,
    a: float,
    b: float,
    c: float,
) -> TargetTerms:
    """The rest of the loss, rows' factors, and the gradient at the targets, of a sum of losses.

    Sets g to 0 there, in place. x_TD and w_VD are not quantised: from them are the targets'
    logits, also in Σe. All that a position's equal targets weigh is at the first of them.
    """
    sums_BT, g_TV, g_VT = logits
    weights_TM = weights_M.to(sums_BT.dtype) * (targets_TM >= 0)
    equal_TMM = (targets_TM[:, :, None] == targets_TM[:, None]) & (targets_TM >= 0)[:, None]
    first_TM = equal_TMM.tril(-1).logical_not().all(2) & (targets_TM >= 0)
    indices_TM = targets_TM.clamp(min=0)
    z_f8_TM = _logits_at(x_f8_TD, w_f8_VD, indices_TM, sums_BT.dtype) * (x_scale * w_scale)
    _, e_f8, _ = factors(z_f8_TM, a, b, c)
    sigmoid, e, g = factors(_logits_at(x_TD, w_VD, indices_TM, sums_BT.dtype), a, b, c)
    sums_T = sums_BT.sum(0) + ((e - e_f8) * first_TM).sum(1)
    rows_T = weights_TM.sum(1) * (a / c) / sums_T
    loss_T = (weights_TM * (a + sums_T.log()[:, None] - a * sigmoid)).sum(1)
    of_column_TM = (equal_TMM * weights_TM[:, None]).sum(2)
    sides_TM = rows_T[:, None] * g - of_column_TM * sigmoid * (1 - sigmoid) * (a / c)
    zeros_TM = (targets_TM < 0).to(torch.uint8) * 255  # codes: 255 changes nothing as a minimum
    g_TV.view(torch.uint8).scatter_reduce_(1, indices_TM, zeros_TM, "amin")
    g_VT.view(torch.uint8).scatter_reduce_(0, indices_TM.mT, zeros_TM.mT, "amin")
    return TargetTerms(loss_T, rows_T, sides_TM * first_TM)


def _logits_at(x_TD: Tensor, w_VD: Tensor, indices_TM: Tensor, wide: torch.dtype) -> Tensor:
    """(T, M): x·W of single columns."""
    x_TD = x_TD.to(wide)
    columns = [(x_TD * w_VD[indices].to(wide)).sum(1) for indices in indices_TM.unbind(1)]
    return torch.stack(columns, 1) if columns else x_TD.new_empty(indices_TM.shape)


@torch.no_grad()
def add_target_rows_(dx_TD: Tensor, w_VD: Tensor, targets_TM: Tensor, sides_TM: Tensor) -> Tensor:
    """dX += Σ_m side[m]·W[target m], in place, rounded once; returns dX."""
    total = dx_TD.to(sides_TM.dtype)
    for targets_T, sides_T in zip(targets_TM.unbind(1), sides_TM.unbind(1), strict=True):
        total = total + sides_T[:, None] * w_VD[targets_T.clamp(min=0)].to(total.dtype)
    return dx_TD.copy_(total)


@torch.no_grad()
def add_target_columns_(
    dw_DV: Tensor, x_TD: Tensor, targets_TM: Tensor, sides_TM: Tensor
) -> Tensor:
    """Column target[t, m] of dW += side[t, m]·x[t], in place; returns dW."""
    for targets_T, sides_T in zip(targets_TM.unbind(1), sides_TM.unbind(1), strict=True):
        sources = x_TD.to(dw_DV.dtype) * sides_T[:, None].to(dw_DV.dtype)
        dw_DV.mT.index_add_(0, targets_T.clamp(min=0), sources)
    return dw_DV
