"""Softcapped cross-entropy against several weighted targets: RECIPE section 3, "Loss".

T positions, D model dim, V vocabulary (padded columns take part in the softmax), N targets a
position, M = N targets and the prefix target. Everything is in at least float32; of float64 inputs
in float64, and that is the oracle.

Two switches make it what the public kernel computes. `round_sigmoid`: σ((z + b)/c) is rounded to
bf16, and the rounded value is used in the loss and in the gradient. `count_missing_targets`: a
position that has its first target counts the weights of those that it lacks (they lie behind the
batch's end) in its gradient's softmax term; the loss is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.reference._fp8 import to_fp8

NO_TARGET = -1


class Loss(NamedTuple):
    """Arguments of `softcap_ce` behind z, in the operators' order."""

    targets_TN: Tensor
    weights_N: Tensor
    a: float
    b: float
    c: float
    prefix_targets_T: Tensor | None
    prefix_weight: Tensor
    count_missing_targets: bool
    round_sigmoid: bool


class LossAndGrad(NamedTuple):
    """In at least float32; but the gradient of `softcap_ce_fp8`."""

    loss_T: Tensor
    lse_T: Tensor  # log Σ_v exp(logit)
    dz_TV: Tensor  # gradient of the sum of losses with respect to z
    dz_VT: Tensor | None = None  # its transpose, where asked for


class LinearLossAndGrads(NamedTuple):
    loss_T: Tensor  # in at least float32
    dx_TD: Tensor  # in x's type
    dw_DV: Tensor  # in w's type


def softcap(z_TV: Tensor, a: float, b: float, c: float, round_sigmoid: bool = False) -> Tensor:
    """Logits a·σ((z + b)/c), in at least fp32."""
    u = (_wide(z_TV) + b) / c
    return a * (_RoundedSigmoid.apply(u) if round_sigmoid else torch.sigmoid(u))


def softcap_ce(
    z_TV: Tensor,
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
) -> Tensor:
    """(T,) loss: Σ_n weights[n]·CE(softcap(z), targets[:, n]); a target of −1 counts nothing.

    The prefix target is one more, of `prefix_weight`. Differentiable in z.
    """
    logits = softcap(z_TV, a, b, c, round_sigmoid)
    targets_TM, weights_TM, missing_T = _all_targets(
        targets_TN, weights_N, prefix_targets_T, prefix_weight, count_missing_targets, logits
    )
    lse_T = torch.logsumexp(logits, dim=1)
    loss_T = _losses(logits, lse_T, targets_TM, weights_TM)
    if missing_T is None:
        return loss_T
    return loss_T + missing_T * (lse_T - lse_T.detach())  # adds 0, and the gradient of lse


@torch.no_grad()
def softcap_ce_grad(
    z_TV: Tensor,
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
) -> LossAndGrad:
    """`softcap_ce` and its gradient dz = (a/c)·σ·(1 − σ)·(S·p − Σ_n weights[n]·[v = target n]).

    S is the sum of the weights that count, p the softmax. No autograd; one result for each bit of
    the input, since targets are taken off one after the other.
    """
    sigmoid = _sigmoid((_wide(z_TV) + b) / c, round_sigmoid)
    logits = a * sigmoid
    targets_TM, weights_TM, missing_T = _all_targets(
        targets_TN, weights_N, prefix_targets_T, prefix_weight, count_missing_targets, logits
    )
    lse_T = torch.logsumexp(logits, dim=1)
    loss_T = _losses(logits, lse_T, targets_TM, weights_TM)
    total_T = weights_TM.sum(1) if missing_T is None else weights_TM.sum(1) + missing_T
    dlogits = (logits - lse_T[:, None]).exp() * total_T[:, None]
    for target, weight in zip(targets_TM.split(1, 1), weights_TM.split(1, 1), strict=True):
        dlogits.scatter_add_(1, target, -weight)
    return LossAndGrad(loss_T, lse_T, dlogits * sigmoid * (1 - sigmoid) * (a / c))


@torch.no_grad()
def linear_softcap_ce(
    x_TD: Tensor,
    w_DV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    rows: int,
    prefix_targets_T: Tensor | None = None,
    **loss_options: float | Tensor | bool,
) -> Tensor:
    """(T,) loss of z = x·W, of which it never holds more than `rows` rows; no gradient."""
    loss_T = x_TD.new_empty(x_TD.shape[0], dtype=wide_dtype(x_TD))
    for x, targets, prefixes, loss in _chunks(rows, x_TD, targets_TN, prefix_targets_T, loss_T):
        options = {"prefix_targets_T": prefixes, **loss_options}
        loss.copy_(softcap_ce(x @ w_DV, targets, weights_N, a, b, c, **options))
    return loss_T


@torch.no_grad()
def linear_softcap_ce_grad(
    x_TD: Tensor,
    w_DV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    rows: int,
    prefix_targets_T: Tensor | None = None,
    loss_grads_T: Tensor | None = None,
    **loss_options: float | Tensor | bool,
) -> LinearLossAndGrads:
    """That loss, and the gradients of Σ_t loss_grads[t]·loss[t]; without `loss_grads_T` 1 each.

    dW is summed over the chunks in at least float32.
    """
    dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    dw = torch.zeros_like(w_DV, dtype=wide_dtype(w_DV), memory_format=torch.contiguous_format)
    loss_T = dw.new_empty(x_TD.shape[0])
    chunks = _chunks(rows, x_TD, targets_TN, prefix_targets_T, loss_grads_T, loss_T, dx_TD)
    for x, targets, prefixes, loss_grads, loss, dx in chunks:
        result = softcap_ce_grad(
            x @ w_DV, targets, weights_N, a, b, c, prefix_targets_T=prefixes, **loss_options
        )
        loss.copy_(result.loss_T)
        dz = result.dz_TV if loss_grads is None else result.dz_TV * loss_grads[:, None]
        dz = dz.to(x.dtype)
        dx.copy_(dz @ w_DV.mT)
        _add_product_(dw, x.mT, dz)
    return LinearLossAndGrads(loss_T, dx_TD, dw.to(w_DV.dtype))


@torch.no_grad()
def softcap_ce_fp8(
    z_TV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    dz_scale: Tensor,
    *,
    rows: int,
    prefix_targets_T: Tensor | None = None,
    **loss_options: float | Tensor | bool,
) -> LossAndGrad:
    """`softcap_ce_grad` with dz_TV / `dz_scale` () as e5m2, clamped; `rows` rows at a time."""
    dz_TV = torch.empty(z_TV.shape, dtype=torch.float8_e5m2, device=z_TV.device)
    loss_T, lse_T = (z_TV.new_empty(z_TV.shape[0], dtype=wide_dtype(z_TV)) for _ in range(2))
    chunks = _chunks(rows, z_TV, targets_TN, prefix_targets_T, loss_T, lse_T, dz_TV)
    for z, targets, prefixes, *outs in chunks:
        loss, lse, dz, _ = softcap_ce_grad(
            z, targets, weights_N, a, b, c, prefix_targets_T=prefixes, **loss_options
        )
        results = (loss, lse, to_fp8(dz, dz_scale, torch.float8_e5m2))
        for out, result in zip(outs, results, strict=True):
            out.copy_(result)
    return LossAndGrad(loss_T, lse_T, dz_TV)


class _RoundedSigmoid(torch.autograd.Function):
    """σ(u) rounded to bf16, in u's type; its derivative is taken from the rounded value."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        sigmoid = _sigmoid(u, True)
        ctx.save_for_backward(sigmoid)
        return sigmoid

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (sigmoid,) = ctx.saved_tensors
        return grad * sigmoid * (1 - sigmoid)


def _sigmoid(u: Tensor, rounded: bool) -> Tensor:
    sigmoid = torch.sigmoid(u)
    return sigmoid.bfloat16().to(u.dtype) if rounded else sigmoid


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def _all_targets(
    targets_TN: Tensor,
    weights_N: Tensor,
    prefix_targets_T: Tensor | None,
    prefix_weight: float | Tensor,
    count_missing_targets: bool,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Targets (T, M) and weights (T, M) in logits' type, 0 for none; missing targets' (T,)."""
    exists = targets_TN >= 0
    weights_N, missing_T = weights_N.to(logits.dtype), None
    if count_missing_targets:
        missing_T = (weights_N * (exists[:, :1] & ~exists)).sum(1)
    if prefix_targets_T is not None:
        targets_TN = torch.cat([targets_TN, prefix_targets_T[:, None]], dim=1)
        exists = targets_TN >= 0
        if not isinstance(prefix_weight, Tensor):
            prefix_weight = logits.new_full((1,), prefix_weight)
        weights_N = torch.cat([weights_N, prefix_weight.to(logits).reshape(1)])
    return targets_TN.clamp(min=0), weights_N * exists, missing_T


def _losses(logits: Tensor, lse_T: Tensor, targets_TM: Tensor, weights_TM: Tensor) -> Tensor:
    return ((lse_T[:, None] - logits.gather(1, targets_TM)) * weights_TM).sum(1)


def _chunks(rows: int, *tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Views of `rows` rows of each tensor in turn, None where that is one; of no rows none."""
    for start in range(0, tensors[0].shape[0], rows):
        yield [None if x is None else x[start : start + rows] for x in tensors]


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b; the product is first rounded to its own type where total is wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
