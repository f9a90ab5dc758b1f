"""D = A·Bᵀ·scale_a·scale_b of FP8 matrices, and what is fused behind it: KERNELS section a.

The sum is in float32, of float32 copies. Given `a` and `b` as float64 tensors (of FP8 values), the
whole computation is in float64 and nothing is rounded before the results, which are then float64
(FP8 ones: quotients by their scale, clamped); that is the oracle. `fast_accum` is the hardware's
business: here every sum is a float32 or float64 one.

A (M, K), B (N, K), also with a batch dimension (L, M, K), (L, N, K) in the first function; scales
are float32 tensors of one element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.reference._fp8 import FP8_MAX, to_fp8


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """(..., M, N) of `out_dtype`; row m also times `row_scale` (M,); FP8: over `out_scale`."""
    product = _product(a, b, scale_a, scale_b)
    if row_scale is not None:
        product = product * row_scale[:, None]
    return _rounded(product, out_dtype, out_scale)


def fp8_matmul_add_(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    fast_accum: bool = False,
) -> Tensor:
    """Adds the product to `c` (M, N) in place and returns it."""
    return c.add_(_product(a, b, scale_a, scale_b))


def fp8_matmul_relu2(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    post_scale: Tensor,
    keep_post: bool = True,
    transposed: bool = False,
    fast_accum: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """post = relu(product)² (M, N) bf16, its e4m3 (M, N) and (N, M), its largest value ().

    The product is rounded to bf16 first. The largest value is not clamped; 0 of nothing.
    """
    pre = _rounded(_product(a, b, scale_a, scale_b), torch.bfloat16)
    post = _rounded(_wide(pre).relu().square(), torch.bfloat16)
    post_f8 = _rounded(post, torch.float8_e4m3fn, post_scale)
    post_f8_t = post_f8.mT.contiguous() if transposed else None
    return post if keep_post else None, post_f8, post_f8_t, _amax(post)


def fp8_matmul_drelu2(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    post: Tensor,
    *,
    post_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    transposed: bool = False,
    fast_accum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dpre = 2·product·√post (M, N): the gradient of relu² from `post`, bf16 or e4m3·`post_scale`.

    bf16, None, None; with `out_scale` e5m2 (M, N), (N, M) and the largest |dpre| ().
    """
    product = _product(a, b, scale_a, scale_b)
    value = post.to(product.dtype)
    dpre = 2 * product * (value if post_scale is None else value * post_scale).sqrt()
    if out_scale is None:
        return _rounded(dpre, torch.bfloat16), None, None
    out = _rounded(dpre, torch.float8_e5m2, out_scale)
    return out, out.mT.contiguous() if transposed else None, _amax(dpre)


def fp8_matmul_out(
    a, b, scale_a, scale_b, row_scale, out_scale, out, fast_accum, accumulate
) -> None:
    """Writes into `out` what the first function returns, or the second."""
    if accumulate:
        fp8_matmul_add_(out, a, b, scale_a, scale_b)
        return
    scales = {"row_scale": row_scale, "out_scale": out_scale}
    out.copy_(fp8_matmul(a, b, scale_a, scale_b, out_dtype=out.dtype, **scales))


def fp8_matmul_relu2_out(
    a, b, scale_a, scale_b, post_scale, post, post_f8, post_f8_t, amax, fast_accum
) -> None:
    """Writes what the third function returns; `amax` becomes the larger of itself and its own."""
    results = fp8_matmul_relu2(
        a, b, scale_a, scale_b, post_scale=post_scale, transposed=post_f8_t is not None
    )
    _store((post, post_f8, post_f8_t), results[:3])
    amax.copy_(torch.maximum(amax, results[3]))


def fp8_matmul_drelu2_out(
    a, b, scale_a, scale_b, post, post_scale, out_scale, dpre, dpre_t, amax, fast_accum
) -> None:
    """Writes what the fourth function returns; `amax` as above."""
    scales = {"post_scale": post_scale, "out_scale": out_scale}
    transposed = dpre_t is not None
    results = fp8_matmul_drelu2(a, b, scale_a, scale_b, post, **scales, transposed=transposed)
    _store((dpre, dpre_t), results[:2])
    if amax is not None:
        amax.copy_(torch.maximum(amax, results[2]))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """A·Bᵀ·(scale_a·scale_b) in float32, or in float64 of float64."""
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    scale = scale_a.to(wide) * scale_b.to(wide)
    return (a.to(wide) @ b.to(wide).mT) * scale


def _rounded(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """x in `dtype`, or x / scale; in float64 not rounded, only clamped."""
    if x.dtype != torch.float64:
        return x.to(dtype) if scale is None else to_fp8(x, scale, dtype)
    return x if scale is None else (x / scale).clamp(-FP8_MAX[dtype], FP8_MAX[dtype])


def _amax(x: Tensor) -> Tensor:
    """The largest |x| as a tensor of one element, 0 of nothing; NaN if there is one."""
    return _wide(x.abs().amax() if x.numel() else x.new_zeros(()))


def _store(outs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]) -> None:
    for out, result in zip(outs, results, strict=True):
        if out is not None:
            out.copy_(result)
