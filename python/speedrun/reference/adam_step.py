"""Adam with cautious weight decay: RECIPE section 4."""

from __future__ import annotations

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
) -> None:
    """One update in place. `step` counts this parameter's updates from 1.

    u = m/(√v + eps)·lr·√(1−β2^t)/(1−β1^t), v uncorrected inside the root; where u·W > 0 also
    W −= decay·W. Computed in the moments' type (fp32 or wider), rounded once to W's.
    """
    g = grad.to(exp_avg.dtype)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    update = exp_avg / exp_avg_sq.sqrt().add_(eps) * step_size
    if param.dtype == update.dtype:
        if decay:
            update.addcmul_(param, (update * param > 0).to(update.dtype), value=decay)
        param.sub_(update)
        return
    exact = param.to(update.dtype)
    if decay:
        update = update + exact * (update * exact > 0) * decay
    param.copy_(exact - update)
