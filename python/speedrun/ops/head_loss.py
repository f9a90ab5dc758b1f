"""Front door of the head: z = x·W and its softcapped cross-entropy, with or without FP8.

T positions, D model dim, V vocabulary, N targets a position; `_VD` is a transposed copy.

Without FP8, of any floating type: up to LOGITS_AT_ONCE logits (T·V) in plain PyTorch, so that a
compiler can fuse it. Above that all logits in float32, and what autograd keeps of them, would be
gigabytes, and rows are taken in chunks of so many logits; both give the same but for rounding. The
chunks compute their gradients in the forward pass, for losses that are weighed alike, as a sum's or
a mean's are. If they turn out not to be, the backward pass computes them again.

With FP8 (RECIPE section 3, "FP8"): x and W as e4m3, logits in bf16, their gradient as e5m2; dX in
bf16; dW summed in float32 and rounded to bf16, or added unrounded to a buffer. Scales are
constants, made from the largest values that are expected. The gradient of the logits is quantised
as that of the plain sum of losses, in the forward pass; what backward brings, g (T,), comes after:
dX's row t is multiplied by g[t], and for dW row t of x by g[t]/max|g|, which is 1 where losses are
weighed alike. So the FP8 numbers don't depend on such a factor: the public program's grad_scale is
one.

form="fused", with FP8 only, has no logits in memory: ops/_fused_head_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.ops._fused_head_loss import fused_head_loss
from speedrun.ops._library import define
from speedrun.ops.fp8_matmul import fp8_matmul, fp8_matmul_add_
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.softcap_ce import as_scalar, check, rows_at_once, softcap_ce, softcap_ce_fp8
from speedrun.ops.transpose import transpose
from speedrun.reference import softcap_ce as reference
from speedrun.reference._fp8 import FP8_MAX
from speedrun.reference.fp8_quantize import MIN_AMAX, max_abs
from speedrun.reference.softcap_ce import Loss

E4M3 = torch.float8_e4m3fn
FORMS = ("logits", "fused")


class Fp8Head(NamedTuple):
    """The head's weight in e4m3, the scales, float32 tensors (), and for form="fused" the weight
    in bf16, transposed, which that makes itself where there is none. See `quantize_head`."""

    w_f8_DV: Tensor
    w_f8_VD: Tensor
    w_scale: Tensor
    x_scale: Tensor
    dz_scale: Tensor
    w_VD: Tensor | None = None


def quantize_head(
    w_DV: Tensor,
    *,
    x_amax: float = 100.0,
    w_amax: float = 1.6,
    grad_amax: float = 0.75,
    form: str = "logits",
) -> Fp8Head:
    """FP8 copies of `w_DV` (D, V) bf16, to be made once for all micro-batches of a step.

    The largest values of x, W and of the logits' gradient, of a sum of losses, that their scales
    are made for; x and W are clamped there. The gradient's is over 448 too, as the record has it,
    so that e5m2 clamps it only at 128 times `grad_amax`. `form`: that of `head_loss`; "fused" has
    a copy more, 2 bytes a weight. ValueError for a number that is not positive or another form,
    TypeError for another w_DV. Source: the head of the NanoGPT speedrun's record 089.
    """
    if form not in FORMS:
        raise ValueError(f"quantize_head: form={form!r}: must be {' or '.join(FORMS)}")
    largest = {"w_amax": w_amax, "x_amax": x_amax, "grad_amax": grad_amax}
    for name, value in largest.items():
        if not value > 0:
            raise ValueError(f"quantize_head: {name}={value}: must be above 0")
    if w_DV.dtype != torch.bfloat16 or w_DV.dim() != 2:
        raise TypeError(
            f"quantize_head: w_DV must be bfloat16 (D, V), got {w_DV.dtype} {tuple(w_DV.shape)}"
        )
    w_scale, x_scale, dz_scale = (
        torch.full((), value / FP8_MAX[E4M3], dtype=torch.float32, device=w_DV.device)
        for value in largest.values()
    )
    w_f8_DV, w_f8_VD, _ = fp8_quantize(w_DV, w_scale, transposed=True)
    assert w_f8_VD is not None  # it was asked for
    w_VD = transpose(w_DV.detach().contiguous()) if form == "fused" else None
    return Fp8Head(w_f8_DV, w_f8_VD, w_scale, x_scale, dz_scale, w_VD)


def head_loss(
    x_TD: Tensor,
    w_DV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    prefix_targets_T: Tensor | None = None,
    prefix_weight: float | Tensor = 0.0,
    count_missing_targets: bool = False,
    round_sigmoid: bool = False,
    fp8: Fp8Head | None = None,
    dw_sum_DV: Tensor | None = None,
    form: str = "logits",
) -> Tensor:
    """(T,) loss `softcap_ce` of x·W, float32 (of float64: float64); differentiable in x and W.

    x_TD (T, D) and w_DV (D, V) of any floating type; targets and what else there is of the loss, as
    for `softcap_ce`, which is also its source.
    With `fp8`, the copies of this `w_DV`, both are bf16. `dw_sum_DV`, only with `fp8` and outside
    compiled code: a float32 buffer to which backward adds dW, unrounded, instead of giving W a
    gradient, for all micro-batches and steps between two updates. `form`: "logits", or with `fp8`
    "fused", which keeps no logits in memory and has targets in bf16 (a at most 32, neither
    count_missing_targets nor round_sigmoid). TypeError for another type, ValueError for another
    shape or form, RuntimeError in compiled code.
    """
    check("head_loss", "x_TD", x_TD, targets_TN, weights_N, prefix_targets_T, prefix_weight)
    if w_DV.dtype != x_TD.dtype or (fp8 is not None and x_TD.dtype != torch.bfloat16):
        wanted = "one type" if fp8 is None else "bfloat16 with fp8"
        raise TypeError(
            f"head_loss: x_TD and w_DV must be of {wanted}, got {x_TD.dtype} and {w_DV.dtype}"
        )
    if w_DV.dim() != 2 or w_DV.shape[0] != x_TD.shape[1]:
        raise ValueError(
            f"head_loss needs x_TD (T, D) and w_DV (D, V), got {tuple(x_TD.shape)} and "
            f"{tuple(w_DV.shape)}"
        )
    if fp8 is None and dw_sum_DV is not None:
        raise ValueError("head_loss: dw_sum_DV is of the FP8 head: give fp8 too, or neither")
    if form not in FORMS or (form == "fused" and fp8 is None):
        raise ValueError(
            f'head_loss: form={form!r}: must be "logits", or "fused", which is of the FP8 head and '
            "needs fp8"
        )
    if fp8 is None and x_TD.shape[0] <= rows_at_once(w_DV.shape[1], w_DV.device):
        return softcap_ce(
            x_TD @ w_DV,
            targets_TN,
            weights_N,
            a,
            b,
            c,
            prefix_targets_T=prefix_targets_T,
            prefix_weight=prefix_weight,
            count_missing_targets=count_missing_targets,
            round_sigmoid=round_sigmoid,
        )
    weight = as_scalar(prefix_weight, x_TD.device)
    flags = (count_missing_targets, round_sigmoid)
    loss = Loss(targets_TN, weights_N, a, b, c, prefix_targets_T, weight, *flags)
    if fp8 is not None:
        if fp8.w_f8_DV.shape != w_DV.shape:
            raise ValueError(
                f"head_loss: fp8 is of a weight {tuple(fp8.w_f8_DV.shape)}, w_DV has shape "
                f"{tuple(w_DV.shape)}; make it anew by quantize_head"
            )
        if dw_sum_DV is not None:
            _check_dw_sum(dw_sum_DV, w_DV)
        if form == "fused":
            return fused_head_loss(x_TD, w_DV, dw_sum_DV, fp8, loss)
        return _Fp8HeadLoss.apply(x_TD, w_DV, dw_sum_DV, *fp8[:-1], *loss)
    if torch.is_grad_enabled() and (x_TD.requires_grad or w_DV.requires_grad):
        return _ChunkedHeadLoss.apply(x_TD, w_DV, *loss)
    return torch.ops.speedrun.linear_softcap_ce(x_TD, w_DV, *loss)


def _check_dw_sum(dw_sum_DV: Tensor, w_DV: Tensor) -> None:
    if torch.compiler.is_compiling():  # writes in place in a backward pass: PyTorch issue 180642
        raise RuntimeError("head_loss: dw_sum_DV is not for compiled code: leave it out there")
    if dw_sum_DV.dtype != torch.float32:
        raise TypeError(f"head_loss: dw_sum_DV must be float32, got {dw_sum_DV.dtype}")
    if dw_sum_DV.shape != w_DV.shape or not dw_sum_DV.is_contiguous():
        raise ValueError(
            f"head_loss: dw_sum_DV must be contiguous and {tuple(w_DV.shape)} like w_DV, got "
            f"{tuple(dw_sum_DV.shape)} with strides {dw_sum_DV.stride()}"
        )


class _Fp8HeadLoss(torch.autograd.Function):
    """Loss (T,) float32. Only `dw_sum_DV` is written in place (PyTorch issue 180642)."""

    @staticmethod
    def forward(ctx, x_TD, w_DV, dw_sum_DV, w_f8_DV, w_f8_VD, w_scale, x_scale, dz_scale, *loss):
        x_f8, _, _ = fp8_quantize(x_TD, x_scale)
        z_TV = fp8_matmul(x_f8, w_f8_VD, x_scale, w_scale, fast_accum=True)
        options = {**Loss(*loss)._asdict(), "dz_scale": dz_scale, "transposed": True}
        if options["prefix_targets_T"] is None:
            options["prefix_weight"] = 0.0
        loss_T, _, dz_f8, dz_f8_t = softcap_ce_fp8(z_TV, **options)
        ctx.dw_sum_DV = dw_sum_DV
        ctx.save_for_backward(x_TD, w_f8_DV, w_scale, x_scale, dz_f8, dz_f8_t, dz_scale)
        return loss_T

    @staticmethod
    def backward(ctx, grad_T):
        x_TD, w_f8_DV, w_scale, x_scale, dz_f8, dz_f8_t, dz_scale = ctx.saved_tensors
        grad_T = grad_T.contiguous()
        dx = fp8_matmul(dz_f8, w_f8_DV, dz_scale, w_scale, row_scale=grad_T)
        largest = max_abs(grad_T).clamp(min=MIN_AMAX)
        _, x_f8_t, _ = fp8_quantize(x_TD * (grad_T / largest)[:, None], x_scale, transposed=True)
        dw_scale = dz_scale * largest
        operands = (x_f8_t, dz_f8_t, x_scale, dw_scale)
        dw = None
        if ctx.dw_sum_DV is None:
            dw = fp8_matmul(*operands, out_dtype=torch.float32).bfloat16()
        else:
            fp8_matmul_add_(ctx.dw_sum_DV, *operands)
        return dx, dw, *[None] * (len(Fp8Head._fields) + len(Loss._fields))


class _ChunkedHeadLoss(torch.autograd.Function):
    """Loss (T,). What backward needs is computed in the forward pass, dX and dW, but not logits."""

    @staticmethod
    def forward(ctx, x_TD, w_DV, *loss):
        loss_T, dx, dw = torch.ops.speedrun.linear_softcap_ce_grad(x_TD, w_DV, *loss)
        targets, weights, *numbers, prefixes, prefix_weight, counted, rounded = loss
        ctx.save_for_backward(x_TD, w_DV, dx, dw, targets, weights, prefixes, prefix_weight)
        ctx.numbers, ctx.flags = numbers, (counted, rounded)
        return loss_T

    @staticmethod
    def backward(ctx, grad_T):
        x_TD, w_DV, dx, dw, targets, weights, prefixes, prefix_weight = ctx.saved_tensors
        loss = Loss(targets, weights, *ctx.numbers, prefixes, prefix_weight, *ctx.flags)
        backward = torch.ops.speedrun.linear_softcap_ce_backward
        return *backward(grad_T, dx, dw, x_TD, w_DV, *loss), *[None] * len(Loss._fields)


def _in_chunks(function: Callable, x_TD: Tensor, w_DV: Tensor, *loss, **more):
    """A function of the reference; results as operators want them."""
    rows = rows_at_once(w_DV.shape[1], w_DV.device)
    result = function(x_TD, w_DV, **Loss(*loss)._asdict(), rows=rows, **more)
    return result if isinstance(result, Tensor) else tuple(result)


def _backward(grad_T: Tensor, dx_TD: Tensor, dw_DV: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Gradients times `grad_T`; where its numbers differ, computed again.

    A sum's are one number, expanded: only where they are not the host waits for a comparison.
    """
    if grad_T.stride(0) == 0 or (grad_T == grad_T[:1]).all():
        return (dx_TD * grad_T[:, None]).to(dx_TD.dtype), (dw_DV * grad_T[0]).to(dw_DV.dtype)
    return _in_chunks(reference.linear_softcap_ce_grad, *arguments, loss_grads_T=grad_T)[1:]


_ARGUMENTS = (
    "Tensor x, Tensor w, Tensor targets, Tensor weights, float a, float b, float c, "
    "Tensor? prefix_targets, Tensor prefix_weight, bool count_missing, bool rounded"
)
# Operators, so that a compiler doesn't unroll their loops over chunks.
define(
    f"linear_softcap_ce({_ARGUMENTS}) -> Tensor",
    fake=lambda x, *arguments: x.new_empty(x.shape[0], dtype=reference.wide_dtype(x)),
    python=partial(_in_chunks, reference.linear_softcap_ce),
)
define(
    f"linear_softcap_ce_grad({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, w, *arguments: (
        x.new_empty(x.shape[0], dtype=reference.wide_dtype(x)),
        x.new_empty(x.shape),
        w.new_empty(w.shape),
    ),
    python=partial(_in_chunks, reference.linear_softcap_ce_grad),
)
define(
    f"linear_softcap_ce_backward(Tensor grad, Tensor dx, Tensor dw, {_ARGUMENTS}) "
    "-> (Tensor, Tensor)",
    fake=lambda grad, dx, dw, *arguments: (dx.new_empty(dx.shape), dw.new_empty(dw.shape)),
    python=_backward,
)
