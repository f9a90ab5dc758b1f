"""Front door of `fp8_linear`: y = x·Wᵀ from FP8 copies of x and W, and its gradients.

T tokens, D inputs, N outputs; `_DN` is a transposed copy. The product for y takes e4m3. That for
x's gradient takes W's transposed copy and y's gradient as e5m2, by its own amax; or, without such a
copy, both in bf16. W's gradient is always made of bf16: it would need transposed FP8 copies of x
and of y's gradient, which cost more than a product of this size saves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.ops.fp8_matmul import fp8_matmul
from speedrun.ops.fp8_quantize import fp8_quantize_current
from speedrun.reference._fp8 import FP8_MAX

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Weight(NamedTuple):
    """W in e4m3: a number is its byte times `scale`, a float32 tensor ()."""

    f8_ND: Tensor
    f8_DN: Tensor | None  # None: the gradient of x is made of bf16
    scale: Tensor

    def times(self, factor: Tensor | None) -> Fp8Weight:
        """factor·W, of a float32 tensor (); None is 1. It has no gradient here."""
        return self if factor is None else self._replace(scale=self.scale * factor.detach())


def normed_scale(num_columns: int, device: torch.device) -> Tensor:
    """() float32: the scale √D/448 of e4m3, which fits every RMS-normed row of D columns."""
    return torch.full((), num_columns**0.5 / FP8_MAX[E4M3], device=device)


def fp8_linear(
    x_TD: Tensor, w_ND: Tensor, x_f8_TD: Tensor, x_scale: Tensor, fp8: Fp8Weight
) -> Tensor:
    """(T, N) bf16 of the FP8 copies; differentiable in x_TD and w_ND, bf16, which they are copies
    of. Scales are float32 tensors (). TypeError for another type, ValueError for another shape.
    Source: FP8 of attention's projections, in public records of the NanoGPT speedrun after 089.
    """
    for name, tensor, dtype in (
        ("x_TD", x_TD, torch.bfloat16),
        ("w_ND", w_ND, torch.bfloat16),
        ("x_f8_TD", x_f8_TD, E4M3),
        ("fp8.f8_ND", fp8.f8_ND, E4M3),
        ("fp8.f8_DN", fp8.f8_DN, E4M3),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"fp8_linear: {name} must be {dtype}, got {tensor.dtype}")
    copies = [fp8.f8_ND, *(() if fp8.f8_DN is None else (fp8.f8_DN.mT,))]
    if (
        x_TD.dim() != 2
        or x_f8_TD.shape != x_TD.shape
        or w_ND.shape[1:] != x_TD.shape[1:]
        or any(copy.shape != w_ND.shape for copy in copies)
    ):
        found = ", ".join(str(tuple(t.shape)) for t in (x_TD, x_f8_TD, w_ND, *copies))
        raise ValueError(
            "fp8_linear needs x_TD and x_f8_TD (T, D), w_ND and its copies (N, D), the second one "
            f"stored as (D, N); got {found}"
        )
    return _Fp8Linear.apply(x_TD, w_ND, x_f8_TD, x_scale, *fp8)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_ND, x_f8_TD, x_scale, f8_ND, f8_DN, scale):
        ctx.fp8 = f8_DN is not None
        ctx.save_for_backward(x_TD, f8_DN if ctx.fp8 else w_ND, scale)
        return fp8_matmul(x_f8_TD, f8_ND, x_scale, scale, fast_accum=True)

    @staticmethod
    def backward(ctx, grad_TN):
        x_TD, weight, scale = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        if ctx.fp8:
            grad_f8_TN, _, grad_scale = fp8_quantize_current(grad_TN, dtype=E5M2)
            dx_TD = fp8_matmul(grad_f8_TN, weight, grad_scale, scale)
        else:
            dx_TD = grad_TN @ weight
        return dx_TD, grad_TN.mT @ x_TD, *[None] * 5
