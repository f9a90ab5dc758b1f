"""Front door of `sym_matmul`: symmetric products, of which kernels compute one triangle.

Accepted: 2-D or 3-D (batches) float16 and bfloat16, and on the torch backend float32 and float64,
with a contiguous last dimension; row and batch strides are free. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._hopper import is_aligned, is_hopper
from speedrun.ops._library import define
from speedrun.reference import sym_matmul as reference

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*KERNEL_DTYPES, torch.float32, torch.float64)


def sym_matmul(
    a: Tensor,
    b: Tensor | None = None,
    *,
    trans: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    c: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(B, N, N) alpha·A·Aᵀ + beta·C of `a` (B, N, K); also without B. Summed in at least float32.

    float16 or bfloat16, and on the torch backend float32 or float64, one type for all.
    trans: alpha·Aᵀ·A + beta·C of `a` (B, K, N). b: alpha·A·Bᵀ instead, for a `b` like `a` with
    which the caller knows that to be symmetric but for roundings, such as commuting symmetric
    matrices; its lower triangle counts, and the result is symmetric in every bit. c: (B, N, N),
    symmetric; may be a or b, and isn't read where beta is 0. out: what is written to and returned;
    allocated if None.
    TypeError: another type; ValueError: another shape or layout, beta without c, b with trans, or
    an out that shares memory with an operand or itself; RuntimeError for tensors that ask for
    gradients, unless under torch.no_grad().
    Source: BLAS's syrk, as Muon's Newton–Schulz steps need it.
    """
    if a.dim() not in (2, 3):
        raise ValueError(f"sym_matmul: a must be (N, K) or (B, N, K), got {tuple(a.shape)}")
    if b is not None and trans:
        raise ValueError("sym_matmul: b can't be given with trans; transpose both and leave it")
    if c is None and beta != 0:
        raise ValueError(f"sym_matmul: beta is {beta}, which needs c")
    c = None if beta == 0 else c
    n = a.shape[-1 if trans else -2]
    square = (*a.shape[:-2], n, n)
    if out is None:
        out = a.new_empty(square)
    shapes = {"a": (a, a.shape), "b": (b, a.shape), "c": (c, square), "out": (out, square)}
    for name, (x, shape) in shapes.items():
        if x is not None:
            _check(name, x, shape, a)
    a, out_3d = (x if x.dim() == 3 else x[None] for x in (a, out))
    b, c = (x if x is None or x.dim() == 3 else x[None] for x in (b, c))
    b = a if b is None else b
    has_kernels = a.dtype in KERNEL_DTYPES
    compiled = has_kernels and is_hopper(a.device) and a.numel() > 0
    compiled = compiled and all(is_aligned(x) for x in (a, b, c, out_3d) if x is not None)
    kernel = "sym_matmul_out" if compiled else ""
    backend = choose("sym_matmul", a.device, cuda_kernel=kernel, triton=has_kernels)
    if backend == "torch":
        _check_overlap(out_3d, a, b, c)
        reference.sym_matmul_out(a, b, c, out_3d, trans, alpha, beta)
    else:
        torch.ops.speedrun.sym_matmul(a, b, c, out_3d, trans, alpha, beta, backend)
    return out


def _check(name: str, x: Tensor, shape: tuple[int, ...], a: Tensor) -> None:
    if x.dtype not in DTYPES or x.dtype != a.dtype:
        raise TypeError(
            f"sym_matmul: {name} has type {x.dtype} and a {a.dtype}; allowed are float16, "
            f"bfloat16, float32 and float64, one for all"
        )
    if x.shape != shape or x.device != a.device:
        raise ValueError(
            f"sym_matmul: {name} must be {tuple(shape)} on {a.device}, got {tuple(x.shape)} on "
            f"{x.device}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"sym_matmul: the last dimension of {name} must be contiguous, got strides "
            f"{x.stride()} for {tuple(x.shape)}; call {name}.contiguous() first"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("sym_matmul has no gradient: call it under torch.no_grad()")


def _check_overlap(out: Tensor, *operands: Tensor | None) -> None:
    """On the memory that is there: nothing to see while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"sym_matmul: out is expanded, {tuple(out.shape)} with strides {out.stride()}; it must "
            f"have memory of its own for each element"
        )
    for name, x in zip("abc", operands, strict=True):
        if x is not None and _overlap(out, x):
            raise ValueError(f"sym_matmul: out shares memory with {name}; give it its own")


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the spans of memory of both have a byte in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (start, end), (other, other_end) = (
        (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + _last_offset(t))) for t in (x, y)
    )
    return start < other_end and other < end


def _last_offset(x: Tensor) -> int:
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


def _run(a, b, c, out, trans, alpha, beta, backend) -> None:
    _check_overlap(out, a, b, c)
    if backend == "cuda":
        torch.ops.speedrun.sym_matmul_out(a, b, c, out, trans, alpha, beta)
    elif backend == "triton":
        from speedrun.triton_kernels.sym_matmul import sym_matmul_out

        sym_matmul_out(a, b, c, out, trans, alpha, beta)
    else:
        reference.sym_matmul_out(a, b, c, out, trans, alpha, beta)


# The first is the raw kernel: _C implements it for CUDA. b is a where there is none.
_ARGUMENTS = "Tensor a, Tensor b, Tensor? c, Tensor(a!) out, bool trans, float alpha, float beta"
define(
    f"sym_matmul_out({_ARGUMENTS}) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.sym_matmul_out,
)
define(
    f"sym_matmul({_ARGUMENTS}, str backend) -> ()",
    fake=lambda *arguments: None,
    python=_run,
)
