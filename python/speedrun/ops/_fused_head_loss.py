"""`head_loss(.., form="fused")`: the FP8 head without its logits in memory. See ops/head_logits.py.

T positions, D model dim, V vocabulary, M targets a position; `_VD`, `_VT` are transposed copies.

dX is computed in the forward pass, so that one layout of g (a byte a logit) is left for backward.
What backward brings, grad (T,), comes after g's cast to e5m2: it multiplies rows of dX and, with
the rows' factors, rows of x before their cast, whose scale is made for max|x| times the largest
factor: x is not read for it again.

Beside the products, the targets and what has a number a row, a call passes over (T, D), a launch
each, with so many bytes a number: forward x's cast (3); backward rows of x times factors (4), its
cast (4; it has two layouts, dW reads one), rows of dX times grad (4). And over (D, V): W's
transpose (4), unless `fp8` has it; dW rounded to bf16 (6), unless it is added to a buffer. With
D = 768 and V = 50,304, at T = 16,384, that is 38 and 151 MB, and 155 and 232 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops.fp8_matmul import fp8_matmul, fp8_matmul_add_
from speedrun.ops.fp8_quantize import E4M3, fp8_quantize
from speedrun.ops.head_logits import (
    add_target_columns_,
    add_target_rows_,
    check_softcap,
    factor_scale,
    head_logits,
    target_terms_,
)
from speedrun.ops.transpose import transpose
from speedrun.reference.fp8_quantize import max_abs, scale_of
from speedrun.reference.softcap_ce import Loss


def fused_head_loss(
    x_TD: Tensor, w_DV: Tensor, dw_sum_DV: Tensor | None, fp8: tuple[Tensor | None, ...], loss: Loss
) -> Tensor:
    """(T,) float32; arguments as `head_loss` has checked them, `fp8` an Fp8Head. ValueError for a
    loss that it can't have."""
    for name in ("count_missing_targets", "round_sigmoid"):
        if getattr(loss, name):
            raise ValueError(
                f'head_loss: {name}=True is the public kernel\'s, which form="fused" does not '
                'follow: give False, or form="logits"'
            )
    check_softcap("head_loss", loss.a, loss.c)
    targets_TM, weights_M = loss.targets_TN, loss.weights_N.float()
    if loss.prefix_targets_T is not None:
        targets_TM = torch.cat([targets_TM, loss.prefix_targets_T[:, None]], dim=1)
        weights_M = torch.cat([weights_M, loss.prefix_weight.float().reshape(1)])
    *copies_and_scales, _, w_VD = fp8
    if w_VD is None:
        w_VD = transpose(w_DV.detach().contiguous())
    return _FusedHeadLoss.apply(
        x_TD.contiguous(),
        w_DV,
        dw_sum_DV,
        *copies_and_scales,
        w_VD,
        targets_TM.contiguous(),
        weights_M.contiguous(),
        loss.a,
        loss.b,
        loss.c,
    )


class _FusedHeadLoss(torch.autograd.Function):
    """Loss (T,) float32. Of what it is given only `dw_sum_DV` is written (PyTorch issue 180642)."""

    @staticmethod
    def forward(
        ctx,
        x_TD,
        w_DV,
        dw_sum_DV,
        w_f8_DV,
        w_f8_VD,
        w_scale,
        x_scale,
        w_VD,
        targets_TM,
        weights_M,
        *abc,
    ):
        x_f8, _, x_amax = fp8_quantize(x_TD, x_scale, amax=True)
        operands = (x_f8, w_f8_VD, x_scale, w_scale)
        logits = head_logits(*operands, *abc)
        loss_T, rows_T, sides_TM = target_terms_(
            logits, x_TD.detach(), w_VD, *operands, targets_TM, weights_M, *abc
        )
        g_scale = torch.full((), factor_scale(abc[0]), dtype=torch.float32, device=x_TD.device)
        dx = fp8_matmul(logits.g_TV, w_f8_DV, g_scale, w_scale, row_scale=rows_T)
        add_target_rows_(dx, w_VD, targets_TM, sides_TM)
        ctx.dw_sum_DV = dw_sum_DV
        kept = (x_TD, x_amax, dx, logits.g_VT, g_scale, rows_T, sides_TM, targets_TM)
        ctx.save_for_backward(*kept)
        return loss_T

    @staticmethod
    def backward(ctx, grad_T):
        x_TD, x_amax, dx, g_VT, g_scale, rows_T, sides_TM, targets_TM = ctx.saved_tensors
        factors_T, dw_sum_DV = rows_T * grad_T, ctx.dw_sum_DV
        scale = scale_of(x_amax * max_abs(factors_T), 1.0, E4M3)
        _, x_f8_t, _ = fp8_quantize(_rows_times(x_TD, factors_T), scale, transposed=True)
        operands = (x_f8_t, g_VT, scale, g_scale)
        if dw_sum_DV is None:
            dw = fp8_matmul(*operands, out_dtype=torch.float32)
        else:
            dw = fp8_matmul_add_(dw_sum_DV, *operands)
        add_target_columns_(dw, x_TD, targets_TM, sides_TM * grad_T[:, None])
        dw = dw.bfloat16() if dw_sum_DV is None else None
        return _rows_times(dx, grad_T), dw, *[None] * 11


def _rows_times(x_TD: Tensor, factors_T: Tensor) -> Tensor:
    """In fp32, rounded to x's type in the same launch: `out` spares a float32 result."""
    return torch.mul(x_TD, factors_T[:, None], out=torch.empty_like(x_TD))
