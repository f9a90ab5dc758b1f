"""Adam with cautious weight decay (RECIPE section 4), and AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdamTensor(NamedTuple):
    """A parameter and what its update needs. R: the product of all its sizes but the last."""

    param: Tensor  # of any shape
    grad: Tensor  # like param
    exp_avg: Tensor  # of param's shape; its type may be another
    exp_avg_sq: Tensor  # like exp_avg
    scalars: Tensor  # (2,) float64: step size lr·√(1−β2^t)/(1−β1^t), and decay
    beta1: float
    beta2: float
    seen: Tensor | None = None  # (R,) bool: which rows have ever had a gradient that wasn't zero


def adam_step(tensors: Sequence[AdamTensor], *, eps: float, cautious: bool = True) -> None:
    """One update in place of each parameter, all that depends on the step's number in `scalars`.

    u = m/(√v + eps)·step size, v uncorrected inside the root; where u·W > 0 (not `cautious`:
    everywhere) also W −= decay·W. Computed in fp32, or float64 if one of the tensors is, operation
    by operation; each result is rounded once to its tensor's type.
    Rows not `seen` must have moments of 0: kernels leave them alone while their gradient is 0,
    which changes nothing if `cautious`. (If not, all of them decay, and are marked as seen.)
    """
    for param, grad, exp_avg, exp_avg_sq, scalars, beta1, beta2, seen in tensors:
        if seen is not None:
            seen |= (grad != 0).any(-1).flatten() if cautious else True
        m, v = _new_moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
        step_size, decay = scalars.to(m.dtype).unbind()
        update = (m / v.sqrt_().add_(eps)).mul_(step_size)
        exact = param.to(m.dtype)
        decayed = (exact * decay).add_(update)
        param.copy_(exact - (decayed.where(update * exact > 0, update) if cautious else decayed))


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    wd: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One update in place, as torch.optim.AdamW's. `lr` may be a tensor for parts of W.

    W ← W·(1 − lr·wd) − lr·m̂/(√v̂ + eps), m̂ = m/(1−β1^t), v̂ = v/(1−β2^t), t = `step` from 1.
    param (...) of any floating type. Computed as `adam_step` is; errors as for PyTorch's functions.
    Source: AdamW (arXiv 1711.05101).
    """
    m, v = _new_moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    root = (v / (1 - beta2**step)).sqrt_().add_(eps)
    exact = param.to(m.dtype)
    param.copy_(exact - exact * (lr * wd) - m / (1 - beta1**step) / root * lr)


def _new_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """m + (g − m)·(1 − β1) and v·β2 + g²·(1 − β2), stored, and as they are before that rounding.

    By operations that round once: lerp and addcmul round once or twice, as the machine likes.
    """
    dtype = torch.promote_types(torch.promote_types(grad.dtype, exp_avg.dtype), torch.float32)
    g, m, v = (x.to(dtype) for x in (grad, exp_avg, exp_avg_sq))
    m = (g - m).mul_(1 - beta1).add_(m)
    v = (g * (1 - beta2)).mul_(g).add_(v * beta2)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    return m, v
