"""Front door of `transpose`: the last two dimensions swapped, moved or added.

Accepted: 2-D (M, N) or 3-D (B, M, N) of uint8, int8, float8_e4m3fn, float8_e5m2, float16, bfloat16,
int32 or float32, with a contiguous last dimension; row and batch strides are free (slices, expanded
batches). Anything else is refused on every backend, so that code which runs on one runs on all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define, define_gradient
from speedrun.reference import transpose as reference

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
)
ADD_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def transpose(x: Tensor) -> Tensor:
    """(B, N, M) contiguous copy of `x` (B, M, N), or (N, M) of (M, N), bit for bit; differentiable.

    uint8, int8, FP8, float16, bfloat16, int32 or float32. TypeError: another type; ValueError:
    another number of dimensions, or a last one that isn't contiguous.
    Source: x.mT.contiguous() of PyTorch.
    """
    _check(x, "x", DTYPES)
    backend = choose("transpose", x.device, cuda_kernel="transpose_out", triton=True)
    if backend == "torch":
        return reference.transpose(x)  # not behind an operator, so that Inductor can fuse it
    return torch.ops.speedrun.transpose(x, backend)


def transpose_add_(out: Tensor, x: Tensor) -> Tensor:
    """Adds `x` (B, M, N) transposed to `out` (B, N, M) in place and returns it; also without B.

    One type for both: float16, bfloat16 or float32; summed in float32, rounded once. Not
    differentiable. Errors as for `transpose`, TypeError and ValueError, and RuntimeError for
    tensors that ask for gradients. Source: out.add_(x.mT) of PyTorch.
    """
    _check(x, "x", ADD_DTYPES)
    _check(out, "out", ADD_DTYPES)
    if out.dtype != x.dtype or out.device != x.device or out.shape != x.mT.shape:
        raise ValueError(
            f"transpose_add_: out must be like x transposed, {tuple(x.mT.shape)} {x.dtype} on "
            f"{x.device}; got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (out.requires_grad or x.requires_grad):
        raise RuntimeError("transpose_add_ has no gradient: call it under torch.no_grad()")
    backend = choose("transpose", x.device, cuda_kernel="transpose_out", triton=True)
    if backend == "torch":
        return reference.transpose_add_(out, x)
    torch.ops.speedrun.transpose_add_(out, x, backend)
    return out


def _check(x: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"transpose: {name} has type {x.dtype}; allowed are {allowed}")
    if x.dim() not in (2, 3):
        raise ValueError(f"transpose: {name} must be (M, N) or (B, M, N), got {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"transpose: the last dimension of {name} must be contiguous, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}; call {name}.contiguous() first"
        )


def _run(x: Tensor, out: Tensor, add: bool, backend: str) -> None:
    if backend == "cuda":
        torch.ops.speedrun.transpose_out(x, out, add)
    elif backend == "triton":
        from speedrun.triton_kernels.transpose import transpose as triton_transpose

        triton_transpose(x, out, add)
    else:
        reference.transpose_out(x, out, add)


def _transpose(x: Tensor, backend: str) -> Tensor:
    out = _fake_transpose(x, backend)
    _run(x, out, False, backend)
    return out


def _fake_transpose(x: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-2]))


def _setup_context(ctx, inputs, output) -> None:
    ctx.backend = inputs[1]


def _backward(ctx, grad: Tensor):
    return torch.ops.speedrun.transpose(grad.contiguous(), ctx.backend), None


# The raw kernel: _C implements it for CUDA.
define(
    "transpose_out(Tensor x, Tensor(a!) out, bool add) -> ()",
    fake=lambda x, out, add: None,
    cpu=reference.transpose_out,
)
define("transpose(Tensor x, str backend) -> Tensor", fake=_fake_transpose, python=_transpose)
define_gradient("transpose", _backward, _setup_context)
define(
    "transpose_add_(Tensor(a!) out, Tensor x, str backend) -> ()",
    fake=lambda out, x, backend: None,
    python=lambda out, x, backend: _run(x, out, True, backend),
)
