"""Adam with cautious weight decay (RECIPE section 4), and AdamW (arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    cautious: bool = True,
) -> None:
    """One update in place. `step` counts this parameter's updates from 1.

    u = m/(√v + eps)·lr·√(1−β2^t)/(1−β1^t), v uncorrected inside the root; where u·W > 0 (not
    `cautious`: everywhere) also W −= decay·W. Computed in the moments' type (fp32 or wider),
    rounded once to W's.
    """
    _update_moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    update = exp_avg / exp_avg_sq.sqrt().add_(eps) * step_size
    exact = param.to(update.dtype)
    if decay:
        shrinks = (update * exact > 0).to(update.dtype) if cautious else torch.ones_like(update)
        update.addcmul_(exact, shrinks, value=decay)
    param.copy_(exact - update)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float | Tensor,
    wd: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One update in place, as torch.optim.AdamW's. `lr` may be a tensor for parts of W.

    W ← W·(1 − lr·wd) − lr·m̂/(√v̂ + eps), m̂ = m/(1−β1^t), v̂ = v/(1−β2^t). Computed in the moments'
    type (fp32 or wider), rounded once to W's.
    """
    _update_moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    exact = param.to(exp_avg.dtype)
    param.copy_(exact - exact * (lr * wd) - exp_avg / (1 - beta1**step) / root * lr)


def _update_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float
) -> None:
    g = grad.to(exp_avg.dtype)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
