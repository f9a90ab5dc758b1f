"""Front door of `adam_step`: Adam with cautious weight decay, and AdamW (torch only).

Accepted by `adam_step`: parameters of bfloat16, float32 or float64, moments of one of these types
(float64 ones on the torch backend alone), any number of dimensions and elements, all on one device;
whatever is updated in place must be contiguous. A gradient of another layout is copied first.

Kernels compute each IEEE operation on its own, as the reference does, so backends agree in every
bit but for the square root, in which torch errs by up to an ulp on a CPU. CUDA: one launch for 40
tensors; Triton: one a tensor, since its kernels take no table of pointers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.reference import adam_step as reference
from speedrun.reference.adam_step import AdamTensor, adamw_step

__all__ = ["AdamTensor", "adam_step", "adamw_step"]

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


def adam_step(tensors: Sequence[AdamTensor], *, eps: float, cautious: bool = True) -> None:
    """One update of each parameter in place: u = m/(√v + eps)·size, W ← W − u − [u·W > 0]·decay·W.

    m, v: moments of (g, g²) by beta1 and beta2; size and decay are `scalars` (2,) float64. Shapes
    (...) are free; bfloat16, float32 or float64, moments of another of these if wanted.
    Give each parameter once. `seen`: its rows that have never had a gradient must have moments of
    0, and cost the read of their gradient only. Nothing waits for the device, and no number of the
    step is the host's, so calls can be captured in a CUDA graph. Not differentiable.
    TypeError: another type; ValueError: another shape, layout or device, or a number out of range;
    RuntimeError for parameters that ask for gradients, unless under torch.no_grad().
    Source: Adam (arXiv 1412.6980), decay where the step goes towards 0 (arXiv 2510.12402).
    """
    if not tensors:
        return
    device = tensors[0].param.device
    for index, tensor in enumerate(tensors):
        _check(tensor, index, device)
    if not eps > 0:
        raise ValueError(f"adam_step: eps must be above 0, got {eps}: where v is 0 it divides")
    has_kernel = all(
        t.param.dtype in KERNEL_DTYPES and t.exp_avg.dtype in KERNEL_DTYPES for t in tensors
    )
    cuda_kernel = "adam_step_out" if has_kernel else ""
    backend = choose("adam_step", device, cuda_kernel=cuda_kernel, triton=has_kernel)
    if backend == "torch":
        return reference.adam_step(tensors, eps=eps, cautious=cautious)
    params, grads, *states, beta1s, beta2s, seen = zip(*tensors, strict=True)
    dense = [grad.contiguous() for grad in grads]
    none = torch.empty(0, dtype=torch.bool, device=device)
    flags = [none if rows is None else rows for rows in seen]
    columns = (list(column) for column in (params, dense, *states, flags, beta1s, beta2s))
    torch.ops.speedrun.adam_step(*columns, eps, cautious, backend)


def _check(tensor: AdamTensor, index: int, device: torch.device) -> None:
    param, grad, exp_avg, exp_avg_sq, scalars, beta1, beta2, seen = tensor
    where = f"adam_step: tensor {index}:"
    for name, dtype in (("param", param.dtype), ("exp_avg", exp_avg.dtype)):
        if dtype not in DTYPES:
            raise TypeError(
                f"{where} {name} has type {dtype}; allowed are bfloat16, float32, float64"
            )
    shape, num_rows = param.shape, math.prod(param.shape[:-1])
    wanted: dict[str, tuple[Tensor | None, torch.Size | tuple[int, ...], torch.dtype]] = {
        "param": (param, shape, param.dtype),
        "grad": (grad, shape, param.dtype),
        "exp_avg": (exp_avg, shape, exp_avg.dtype),
        "exp_avg_sq": (exp_avg_sq, shape, exp_avg.dtype),
        "scalars": (scalars, (2,), torch.float64),
        "seen": (seen, (num_rows,), torch.bool),
    }
    for name, (x, x_shape, dtype) in wanted.items():
        if x is not None:  # seen may be
            check_tensor(f"{where} {name}", x, x_shape, dtype, device, contiguous=name != "grad")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{where} {name} must be in [0, 1), got {beta}")
    if torch.is_grad_enabled() and param.requires_grad:
        raise RuntimeError(f"{where} adam_step has no gradient: call it under torch.no_grad()")


def _reference_out(*arguments) -> None:
    *columns, eps, cautious = arguments
    params, grads, *states, seen, beta1s, beta2s = columns
    seen = [rows if rows.numel() else None for rows in seen]
    rows = zip(params, grads, *states, beta1s, beta2s, seen, strict=True)
    reference.adam_step([AdamTensor(*row) for row in rows], eps=eps, cautious=cautious)


def _run(*arguments) -> None:
    *inputs, backend = arguments
    if backend == "cuda":
        torch.ops.speedrun.adam_step_out(*inputs)
    elif backend == "triton":
        from speedrun.triton_kernels.adam_step import adam_step_out

        adam_step_out(*inputs)
    else:
        _reference_out(*inputs)


# `seen` is empty where a tensor has none. The first is the raw kernel: _C implements it for CUDA.
_ARGUMENTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] scalars, Tensor(d!)[] seen, float[] beta1s, float[] beta2s, float eps, bool cautious"
)
define(
    f"adam_step_out({_ARGUMENTS}) -> ()",
    fake=lambda *arguments: None,
    cpu=_reference_out,
)
define(
    f"adam_step({_ARGUMENTS}, str backend) -> ()",
    fake=lambda *arguments: None,
    python=_run,
)
