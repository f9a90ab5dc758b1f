"""`head_loss(.., form="fused")`: the FP8 head without its logits in memory. See ops/head_logits.py.

T positions, D model dim, V vocabulary, M targets a position; `_VD`, `_VT` are transposed copies.

dX is computed in the forward pass, so that one layout of g (a byte a logit) is left for backward.
What backward brings, grad (T,), comes after g's cast to e5m2: it multiplies rows of dX and, with
the rows' factors, rows of x before their cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops.fp8_matmul import fp8_matmul, fp8_matmul_add_
from speedrun.ops.fp8_quantize import fp8_quantize, fp8_quantize_current
from speedrun.ops.head_logits import (
    add_target_columns_,
    add_target_rows_,
    check_softcap,
    factor_scale,
    head_logits,
    target_terms_,
)
from speedrun.ops.transpose import transpose
from speedrun.reference.softcap_ce import Loss


def fused_head_loss(
    x_TD: Tensor, w_DV: Tensor, dw_sum_DV: Tensor | None, fp8: tuple[Tensor, ...], loss: Loss
) -> Tensor:
    """(T,) float32; arguments as `head_loss` has checked them. ValueError for a loss that it can't
    have."""
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
    return _FusedHeadLoss.apply(
        x_TD.contiguous(),
        w_DV,
        dw_sum_DV,
        *fp8[:-1],
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
        ctx, x_TD, w_DV, dw_sum_DV, w_f8_DV, w_f8_VD, w_scale, x_scale, targets_TM, weights_M, *abc
    ):
        x_f8 = fp8_quantize(x_TD, x_scale)[0]
        operands = (x_f8, w_f8_VD, x_scale, w_scale)
        logits = head_logits(*operands, *abc)
        w_VD = transpose(w_DV.detach().contiguous())
        loss_T, rows_T, sides_TM = target_terms_(
            logits, x_TD.detach(), w_VD, *operands, targets_TM, weights_M, *abc
        )
        g_scale = torch.full((), factor_scale(abc[0]), dtype=torch.float32, device=x_TD.device)
        dx = fp8_matmul(logits.g_TV, w_f8_DV, g_scale, w_scale, row_scale=rows_T)
        add_target_rows_(dx, w_VD, targets_TM, sides_TM)
        ctx.dw_sum_DV = dw_sum_DV
        ctx.save_for_backward(x_TD, dx, logits.g_VT, g_scale, rows_T, sides_TM, targets_TM)
        return loss_T

    @staticmethod
    def backward(ctx, grad_T):
        x_TD, dx, g_VT, g_scale, rows_T, sides_TM, targets_TM = ctx.saved_tensors
        scaled_x = (x_TD * (rows_T * grad_T)[:, None]).to(x_TD.dtype)
        _, x_f8_t, x_scale = fp8_quantize_current(scaled_x, transposed=True)
        dw = ctx.dw_sum_DV
        if dw is None:
            dw = torch.zeros(x_TD.shape[1], len(g_VT), dtype=torch.float32, device=x_TD.device)
        add_target_columns_(dw, x_TD, targets_TM, sides_TM * grad_T[:, None])
        fp8_matmul_add_(dw, x_f8_t, g_VT, x_scale, g_scale)
        dx = (dx * grad_T[:, None]).to(dx.dtype)
        return dx, None if ctx.dw_sum_DV is not None else dw.bfloat16(), *[None] * 10
