"""The 16-bit GEMMs of `relu2_mlp` that carry relu² or its gradient, on their backends.

T tokens, D model dim, F hidden. All tensors bf16, 2-D and contiguous: `relu2_mlp` has checked it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.reference import relu2_mlp as reference


def backend_of(x: Tensor, weight_FD: Tensor) -> str:
    """Backend of both GEMMs; types other than bf16 have the reference only."""
    bf16 = x.dtype == torch.bfloat16
    # TMA: rows of 16 bytes or a multiple.
    aligned = all(size % 8 == 0 and size > 0 for size in weight_FD.shape)
    kernel = "relu2_up_out" if bf16 and aligned else ""
    return choose("relu2_mlp", x.device, cuda_kernel=kernel, triton=bf16)


def relu2_up(h_TD: Tensor, up_FD: Tensor) -> Tensor:
    """post (T, F) = relu(h·Upᵀ)². No gradient."""
    backend = backend_of(h_TD, up_FD)
    if backend == "torch":
        return reference.relu2_up(h_TD, up_FD)
    return torch.ops.speedrun.relu2_up(h_TD, up_FD, backend)


def drelu2(grad_TD: Tensor, down_FD: Tensor, post_TF: Tensor) -> Tensor:
    """dpre (T, F) = 2·(grad·Downᵀ)·√post. No gradient."""
    backend = backend_of(grad_TD, down_FD)
    if backend == "torch":
        return reference.drelu2(grad_TD, down_FD, post_TF)
    return torch.ops.speedrun.drelu2(grad_TD, down_FD, post_TF, backend)


def _relu2_up(h: Tensor, up: Tensor, backend: str) -> Tensor:
    post = h.new_empty(h.shape[0], up.shape[0])
    if backend == "cuda":
        torch.ops.speedrun.relu2_up_out(h, up, post)
    else:
        from speedrun.triton_kernels import relu2_mlp as kernels

        kernels.relu2_up(h, up, post)
    return post


def _drelu2(grad: Tensor, down: Tensor, post: Tensor, backend: str) -> Tensor:
    dpre = torch.empty_like(post)
    if backend == "cuda":
        torch.ops.speedrun.drelu2_out(grad, down, post, dpre)
    else:
        from speedrun.triton_kernels import relu2_mlp as kernels

        kernels.drelu2(grad, down, post, dpre)
    return dpre


# The raw kernels: _C implements them for CUDA.
define(
    "relu2_up_out(Tensor h, Tensor up, Tensor(a!) post) -> ()",
    fake=lambda h, up, post: None,
    cpu=reference.relu2_up_out,
)
define(
    "drelu2_out(Tensor grad, Tensor down, Tensor post, Tensor(a!) dpre) -> ()",
    fake=lambda grad, down, post, dpre: None,
    cpu=reference.drelu2_out,
)
define(
    "relu2_up(Tensor h, Tensor up, str backend) -> Tensor",
    fake=lambda h, up, backend: h.new_empty(h.shape[0], up.shape[0]),
    python=_relu2_up,
)
define(
    "drelu2(Tensor grad, Tensor down, Tensor post, str backend) -> Tensor",
    fake=lambda grad, down, post, backend: torch.empty_like(post),
    python=_drelu2,
)
