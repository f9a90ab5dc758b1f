"""Front door of `relu2_mlp`: MLP(h) = relu(h·Upᵀ)²·Down, forward and backward, with or without FP8.

Six GEMMs, named by what they make: up (post = relu²), down (y), dpre, dx, dup, ddown. With `fp8`
each is "bf16" or "fp8" by `Gemms`. T tokens, D model dim, F hidden; `_DF` is a transposed copy.

Scales of FP8 operands. Up, Down and post: they come with `fp8`, post's from the forward pass before
this one. h: its own amax's, or the static √D/448, which an RMS-normed row can't exceed. Gradients
are e5m2, by their own amax. But where dpre's GEMM and both readers of dpre are FP8, dpre leaves its
GEMM quantised, so its scale must be known before: it is that of the bound |dpre| <= 2·D·max|grad|·
max|Down|·√max(post), from numbers that are on the device already. It never saturates and needs no
state. It lies some 2^8 above the largest |dpre|, and e5m2 is equally precise over 2^30: numbers
become coarser only 2^20 below the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.ops._relu2_mlp_kernels import backend_of, drelu2, relu2_up
from speedrun.ops.fp8_matmul import fp8_matmul, fp8_matmul_drelu2, fp8_matmul_relu2
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.reference import relu2_mlp as reference
from speedrun.reference._fp8 import FP8_MAX
from speedrun.reference.fp8_quantize import MIN_AMAX, max_abs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Gemms(NamedTuple):
    """The type of each GEMM's operands, "bf16" or "fp8". The defaults are record_089's."""

    up: str = "fp8"
    down: str = "fp8"
    dpre: str = "bf16"
    dx: str = "bf16"
    dup: str = "bf16"
    ddown: str = "bf16"
    post: str = "bf16"  # what the backward pass keeps of relu²
    x_scale: str = "current"  # or "static": for h that is RMS-normed


@dataclass
class Fp8Layer:
    """One layer's weights in e4m3 and its scales, float32 tensors (). See `refresh_mlp_weights`."""

    gemms: Gemms
    up_f8_FD: Tensor
    up_f8_DF: Tensor | None  # None unless dx is fp8
    up_scale: Tensor
    down_f8_FD: Tensor | None  # None unless dpre is fp8
    down_f8_DF: Tensor
    down_scale: Tensor
    post_scale: Tensor  # `delayed_scale` of the post_amax of the forward pass before; 1 at first
    # Set by `relu2_mlp`: the largest post () of its forward pass, before the clamp. It is not
    # written into a tensor, since the backward pass wants the old scale, and compiled code would
    # compute it again from what was overwritten.
    post_amax: Tensor | None = None


_NO_FP8 = (Gemms(up="bf16", down="bf16"), *[None] * 7)


def relu2_mlp(h: Tensor, up_FD: Tensor, down_FD: Tensor, fp8: Fp8Layer | None = None) -> Tensor:
    """(..., D) of `h` (..., D), `up_FD` and `down_FD` (F, D); differentiable in these three.

    relu(h·Upᵀ)²·Down. Without `fp8` any floating type. With it, or on backend cuda or triton,
    bfloat16 and contiguous, else TypeError or ValueError.
    Source: relu² of Primer (arXiv 2109.08668); FP8 of the NanoGPT speedrun's record 089.
    """
    if fp8 is None and backend_of(h, up_FD) == "torch":
        return reference.relu2_mlp(h, up_FD, down_FD)
    _check(h, up_FD, down_FD)
    h_TD = h.flatten(0, -2)
    if fp8 is None:
        return _Relu2MLP.apply(h_TD, up_FD, down_FD, *_NO_FP8)[0].view_as(h)
    _check_layer(fp8)
    y_TD, fp8.post_amax = _Relu2MLP.apply(
        h_TD,
        up_FD,
        down_FD,
        fp8.gemms,
        fp8.up_f8_FD,
        fp8.up_f8_DF,
        fp8.up_scale,
        fp8.down_f8_FD,
        fp8.down_f8_DF,
        fp8.down_scale,
        fp8.post_scale,
    )
    return y_TD.view_as(h)


def _check(h: Tensor, up_FD: Tensor, down_FD: Tensor) -> None:
    for name, x in (("h", h), ("up_FD", up_FD), ("down_FD", down_FD)):
        if x.dtype != torch.bfloat16:
            raise TypeError(f"relu2_mlp: {name} has type {x.dtype}; this path takes bfloat16")
        if not x.is_contiguous():
            raise ValueError(
                f"relu2_mlp: {name} must be contiguous, got shape {tuple(x.shape)} with strides "
                f"{x.stride()}; call {name}.contiguous() first"
            )
    if (
        h.dim() < 2
        or up_FD.dim() != 2
        or up_FD.shape[1:] != h.shape[-1:] != ()
        or (up_FD.shape != down_FD.shape)
    ):
        raise ValueError(
            "relu2_mlp needs h (..., D), up_FD and down_FD (F, D), got "
            f"{tuple(h.shape)}, {tuple(up_FD.shape)}, {tuple(down_FD.shape)}"
        )


def _check_layer(fp8: Fp8Layer) -> None:
    for name, value in fp8.gemms._asdict().items():
        allowed = ("current", "static") if name == "x_scale" else ("bf16", "fp8")
        if value not in allowed:
            raise ValueError(f"Gemms: {name}={value!r}; allowed are {' and '.join(allowed)}")
    for gemm, name in (("dx", "up_f8_DF"), ("dpre", "down_f8_FD")):
        if getattr(fp8.gemms, gemm) == "fp8" and getattr(fp8, name) is None:
            raise ValueError(f"relu2_mlp: {name} of Fp8Layer is missing: {gemm} is fp8")


def _quantized(
    x: Tensor, dtype: torch.dtype, transposed: bool, static: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`x` (T, N) in FP8, its transpose if wanted, and the scale: of x's amax, or static √N."""
    largest = torch.full((), x.shape[1] ** 0.5, device=x.device)
    if not static:
        largest = max_abs(x).clamp(min=MIN_AMAX)
    # By a tensor: GPUs would multiply by the reciprocal of a number, which rounds otherwise.
    scale = largest / torch.full((), FP8_MAX[dtype], device=x.device)
    return *fp8_quantize(x, scale, dtype=dtype, transposed=transposed)[:2], scale


def _dpre_bound(grad_scale: Tensor, down_scale: Tensor, post_amax: Tensor, width: int) -> Tensor:
    """Scale of dpre in e5m2: see the top. grad and Down are what their FP8 copies can hold."""
    grad_max, down_max = grad_scale * FP8_MAX[E5M2], down_scale * FP8_MAX[E4M3]
    bound = 2 * width * grad_max * down_max * post_amax.clamp(min=MIN_AMAX).sqrt()
    return bound / FP8_MAX[E5M2]


class _Relu2MLP(torch.autograd.Function):
    """y (T, D) and the largest post (). Nothing in here is in place (PyTorch issue 180642)."""

    @staticmethod
    def forward(
        ctx,
        h_TD,
        up_FD,
        down_FD,
        gemms,
        up_f8_FD,
        up_f8_DF,
        up_scale,
        down_f8_FD,
        down_f8_DF,
        down_scale,
        post_scale,
    ):
        x_f8 = x_f8_t = x_scale = post_f8 = post_f8_t = None
        if "fp8" in (gemms.up, gemms.dup):
            transposed, static = gemms.dup == "fp8", gemms.x_scale == "static"
            x_f8, x_f8_t, x_scale = _quantized(h_TD, E4M3, transposed, static)
        transposed = gemms.ddown == "fp8"
        if gemms.up == "fp8":
            post, post_f8, post_f8_t, post_amax = fp8_matmul_relu2(
                x_f8,
                up_f8_FD,
                x_scale,
                up_scale,
                post_scale=post_scale,
                keep_post="bf16" in (gemms.post, gemms.down),
                transposed=transposed,
                fast_accum=True,
            )
        else:
            post = relu2_up(h_TD, up_FD)
            post_amax = max_abs(post) if post_scale is not None else h_TD.new_zeros(())
            if "fp8" in (gemms.post, gemms.down, gemms.ddown):
                post_f8, post_f8_t, _ = fp8_quantize(post, post_scale, transposed=transposed)
        if gemms.down == "fp8":
            y = fp8_matmul(post_f8, down_f8_DF, post_scale, down_scale, fast_accum=True)
        else:
            y = post @ down_FD
        ctx.gemms = gemms
        ctx.save_for_backward(
            h_TD if gemms.dup == "bf16" else x_f8_t,
            x_scale,
            up_FD if gemms.dx == "bf16" else up_f8_DF,
            up_scale,
            down_FD if gemms.dpre == "bf16" else down_f8_FD,
            down_scale,
            post if gemms.post == "bf16" else post_f8,
            post_f8_t,
            post_scale,
            post_amax,
        )
        ctx.mark_non_differentiable(post_amax)
        return y, post_amax

    @staticmethod
    def backward(ctx, grad, _):
        gemms, saved = ctx.gemms, ctx.saved_tensors
        h, x_scale, up, up_scale, down, down_scale, kept, post_f8_t, post_scale, post_amax = saved
        grad = grad.contiguous()
        if "fp8" in (gemms.dpre, gemms.ddown):
            grad_f8, grad_f8_t, grad_scale = _quantized(grad, E5M2, gemms.ddown == "fp8")
        post = kept
        if gemms.post == "fp8" and "bf16" in (gemms.dpre, gemms.ddown):
            post = (kept.float() * post_scale).to(grad.dtype)

        dpre_scale = None
        if gemms.dpre == "fp8":
            if gemms.dx == gemms.dup == "fp8":
                dpre_scale = _dpre_bound(grad_scale, down_scale, post_amax, grad.shape[1])
            dpre, dpre_f8_t, _ = fp8_matmul_drelu2(
                grad_f8,
                down,
                grad_scale,
                down_scale,
                kept,
                post_scale=post_scale if gemms.post == "fp8" else None,
                out_scale=dpre_scale,
                transposed=dpre_scale is not None,
            )
            dpre_f8 = dpre
        else:
            dpre = drelu2(grad, down, post)
        if dpre_scale is None and "fp8" in (gemms.dx, gemms.dup):
            dpre_f8, dpre_f8_t, dpre_scale = _quantized(dpre, E5M2, gemms.dup == "fp8")

        if gemms.dx == "fp8":
            dx = fp8_matmul(dpre_f8, up, dpre_scale, up_scale)
        else:
            dx = dpre @ up
        if gemms.dup == "fp8":
            dup = _weight_gradient(dpre_f8_t, h, dpre_scale, x_scale)
        else:
            dup = dpre.mT @ h
        if gemms.ddown == "fp8":
            ddown = _weight_gradient(post_f8_t, grad_f8_t, post_scale, grad_scale)
        else:
            ddown = post.mT @ grad
        return dx, dup, ddown, *[None] * 8


def _weight_gradient(a_t: Tensor, b_t: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """(M, N) bf16 of (M, T) and (N, T), summed in float32: so T may be cut in parts (split-K)."""
    return fp8_matmul(a_t, b_t, scale_a, scale_b, out_dtype=torch.float32).bfloat16()
