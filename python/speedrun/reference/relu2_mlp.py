"""MLP(h) = relu(h·Upᵀ)²·Down, plain and with FP8: RECIPE section 3.

T tokens, D model dim, F hidden. An FP8 tensor's real value is the tensor times a float32 scale ().
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.reference._fp8 import FP8_MAX, to_fp8

_E4M3 = torch.float8_e4m3fn


def relu2_mlp(h_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
    """(T, D) of `h_TD` (T, D), `up_FD` and `down_FD` (F, D)."""
    return (h_TD @ up_FD.mT).relu().square() @ down_FD


def relu2_up(h_TD: Tensor, up_FD: Tensor) -> Tensor:
    """post (T, F) = relu(h·Upᵀ)²; product and square are each rounded to h's type."""
    return (h_TD @ up_FD.mT).relu().square()


def drelu2(grad_TD: Tensor, down_FD: Tensor, post_TF: Tensor) -> Tensor:
    """dpre (T, F) = 2·(grad·Downᵀ)·√post: the gradient before relu², of `grad_TD` behind Down.

    The product is rounded to grad's type, then, with √post in at least float32, the whole again.
    """
    root = post_TF.to(torch.promote_types(post_TF.dtype, torch.float32)).sqrt()
    return (2 * (grad_TD @ down_FD.mT) * root).to(grad_TD.dtype)


def relu2_up_out(h_TD: Tensor, up_FD: Tensor, post_TF: Tensor) -> None:
    post_TF.copy_(relu2_up(h_TD, up_FD))


def drelu2_out(grad_TD: Tensor, down_FD: Tensor, post_TF: Tensor, dpre_TF: Tensor) -> None:
    dpre_TF.copy_(drelu2(grad_TD, down_FD, post_TF))


class Fp8Forward(NamedTuple):
    """What the forward pass of record_089 computes."""

    x_f8: Tensor  # (T, D) e4m3
    x_scale: Tensor  # () amax of x / 448
    pre: Tensor  # (T, F) bf16
    post: Tensor  # (T, F) bf16
    post_f8: Tensor  # (T, F) e4m3
    post_amax: Tensor  # () not clamped: the next scale of post comes from it
    y: Tensor  # (T, D) bf16


def relu2_mlp_fp8(
    x_TD: Tensor,
    up_f8_FD: Tensor,
    up_scale: Tensor,
    down_f8_DF: Tensor,
    down_scale: Tensor,
    post_scale: Tensor,
) -> Fp8Forward:
    """record_089's forward pass: both GEMMs of e4m3 operands, sums in float32."""
    amax = x_TD.abs().amax().float().clamp(min=1e-12)
    limit, one = FP8_MAX[_E4M3], torch.ones_like(amax)
    x_f8, x_scale = to_fp8(x_TD.float() * (limit / amax), one, _E4M3), amax / limit
    pre = (x_f8.float() @ up_f8_FD.float().mT * (up_scale * x_scale)).bfloat16()
    post = pre.relu().square()
    post_f8 = to_fp8(post.float() * (1 / post_scale), one, _E4M3)
    y = (post_f8.float() @ down_f8_DF.float().mT * (post_scale * down_scale)).bfloat16()
    return Fp8Forward(x_f8, x_scale, pre, post, post_f8, post.amax().float(), y)


def relu2_mlp_backward(
    grad_TD: Tensor, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, post_TF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dpre (T, F) and the gradients of x, Up and Down, from x, W and post as they were."""
    dpre_TF = drelu2(grad_TD, down_FD, post_TF)
    return dpre_TF, dpre_TF @ up_FD, dpre_TF.mT @ x_TD, post_TF.mT @ grad_TD
