"""Front door of `polar_express`: orthogonalises banks of matrices.

On a CPU the reference. On a GPU its steps run over `sym_matmul`, which has backends of its own
(_polar_express_banks.py), and what this stem's backends serve is the prologue: momentum, Nesterov
gradient, norm and cast, in two kernels a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.ops._polar_express_banks import run_banks
from speedrun.ops.sym_matmul import KERNEL_DTYPES
from speedrun.reference import polar_express as reference
from speedrun.reference._polar_coefficients import polar_coefficients
from speedrun.reference.polar_express import (
    RECORD,
    S4,
    SUM_CHUNK,
    PolarExpress,
    momentum_step,
)

__all__ = [
    "RECORD",
    "S4",
    "PolarExpress",
    "momentum_polar_express",
    "momentum_step",
    "polar_coefficients",
    "polar_express",
]

GRAD_DTYPES = (torch.bfloat16, torch.float32)


def polar_express(
    g: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None, spec: PolarExpress = RECORD
) -> Tensor | list[Tensor]:
    """The bank `g` (B, M, N) in `dtype` (default: its own), singular values driven to about 1.

    float16, bfloat16 (for which there are kernels), float32 or float64. A list of banks gives a
    list of results; those of equal short side share launches. spec: polynomials, norm and form.
    Not differentiable. ValueError: another shape; TypeError: another type; RuntimeError for tensors
    that ask for gradients, unless under torch.no_grad().
    Source: Polar Express (arXiv 2505.16932), five steps as in the NanoGPT speedrun's record 089.
    """
    banks = [g] if isinstance(g, Tensor) else list(g)
    for bank in banks:
        _check_bank(bank, dtype)
    if all(_by_reference(bank, dtype) for bank in banks):
        found = [reference.polar_express(bank, dtype, spec) for bank in banks]
    else:
        xs = [reference.normalized(bank, dtype or bank.dtype, spec) for bank in banks]
        found = run_banks([x.contiguous() for x in xs], spec)
    return found[0] if isinstance(g, Tensor) else found


def momentum_polar_express(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    mu: float | Tensor,
    dtype: torch.dtype | None = None,
    spec: PolarExpress = RECORD,
) -> list[Tensor]:
    """M ← lerp(M, G, 1−μ) in place for each bank, then `polar_express` of lerp(G, M, μ).

    grads: (B, M, N) each; momenta: the same, contiguous, in fp32 or wider; mu: a number or a 0-d
    float64 tensor on their device, which is read there. dtype: that of the results (default: each
    gradient's own). Errors as for `polar_express`, and for momenta or mu that aren't so.
    Source: Muon's momentum (kellerjordan.github.io/posts/muon).
    """
    if len(grads) != len(momenta):
        raise ValueError(
            f"momentum_polar_express: {len(grads)} gradients and {len(momenta)} momenta; give one "
            f"momentum for each gradient"
        )
    for grad, momentum in zip(grads, momenta, strict=True):
        _check_bank(grad, dtype)
        _check_momentum(grad, momentum, mu)
    pairs = [*zip(grads, momenta, strict=True)]
    backends = [_prologue_backend(*pair, dtype or pair[0].dtype) for pair in pairs]
    if all(_by_reference(grad, dtype) for grad in grads) and {*backends} <= {"torch"}:
        return [
            reference.polar_express(momentum_step(grad, momentum, mu), dtype or grad.dtype, spec)
            for grad, momentum in pairs
        ]
    xs = [
        _prologue(grad.contiguous(), momentum, mu, dtype or grad.dtype, spec, backend)
        for (grad, momentum), backend in zip(pairs, backends, strict=True)
    ]
    return run_banks(xs, spec)


def _by_reference(bank: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether all of it is plain PyTorch on a CPU."""
    has_kernel = (dtype or bank.dtype) in KERNEL_DTYPES
    kernel = "sym_matmul_out" if has_kernel else ""
    on_cpu = bank.device.type == "cpu"
    return on_cpu and choose("sym_matmul", bank.device, kernel, triton=has_kernel) == "torch"


def _prologue_backend(grad: Tensor, momentum: Tensor, dtype: torch.dtype) -> str:
    has_kernel = grad.dtype in GRAD_DTYPES and momentum.dtype == torch.float32
    has_kernel = has_kernel and dtype in KERNEL_DTYPES
    kernel = "polar_express_momentum_out" if has_kernel else ""
    return choose("polar_express", grad.device, kernel, triton=has_kernel)


def _prologue(
    grad: Tensor,
    momentum: Tensor,
    mu: float | Tensor,
    dtype: torch.dtype,
    spec: PolarExpress,
    backend: str,
) -> Tensor:
    """Normalised X (B, M, N) of the Nesterov gradient, in `dtype`."""
    if backend == "torch":
        return reference.normalized(momentum_step(grad, momentum, mu), dtype, spec)
    if not isinstance(mu, Tensor):
        mu = torch.full((), mu, dtype=torch.float64, device=grad.device)
    x = torch.empty_like(grad, dtype=dtype)
    num_sums = -(-grad.shape[1] * grad.shape[2] // SUM_CHUNK)
    sums = grad.new_empty(len(grad), num_sums, dtype=torch.float32)
    options = (spec.norm_factor, spec.eps, backend)
    torch.ops.speedrun.polar_express_prologue(grad, momentum, mu, sums, x, *options)
    return x


def _check_bank(bank: Tensor, dtype: torch.dtype | None) -> None:
    if bank.dim() != 3:
        raise ValueError(f"polar_express: a bank must be (B, M, N), got {tuple(bank.shape)}")
    for name, found in (("a bank has", bank.dtype), ("dtype is", dtype or bank.dtype)):
        if found not in (*KERNEL_DTYPES, torch.float32, torch.float64):
            raise TypeError(
                f"polar_express: {name} type {found}; allowed are float16, bfloat16, float32 and "
                f"float64"
            )
    if torch.is_grad_enabled() and bank.requires_grad:
        raise RuntimeError("polar_express has no gradient: call it under torch.no_grad()")


def _check_momentum(grad: Tensor, momentum: Tensor, mu: float | Tensor) -> None:
    if momentum.shape != grad.shape or momentum.device != grad.device:
        raise ValueError(
            f"momentum_polar_express: a momentum must be like its gradient, {tuple(grad.shape)} on "
            f"{grad.device}, got {tuple(momentum.shape)} on {momentum.device}"
        )
    if momentum.dtype not in (torch.float32, torch.float64) or not momentum.is_contiguous():
        raise ValueError(
            f"momentum_polar_express: a momentum must be contiguous float32 or float64, got "
            f"{momentum.dtype} with strides {momentum.stride()}"
        )
    if isinstance(mu, Tensor):
        if mu.dim() or mu.dtype != torch.float64 or mu.device != grad.device:
            raise ValueError(
                f"momentum_polar_express: mu must be a number or a 0-d float64 tensor on "
                f"{grad.device}, got {tuple(mu.shape)} {mu.dtype} on {mu.device}"
            )
    elif not 0 <= mu <= 1:
        raise ValueError(f"momentum_polar_express: mu must be in [0, 1], got {mu}")


def _run_prologue(grad, momentum, mu, sums, x, norm_factor, eps, backend) -> None:
    if backend == "cuda":
        momentum_out: Callable = torch.ops.speedrun.polar_express_momentum_out
        normalize_out: Callable = torch.ops.speedrun.polar_express_normalize_out
    else:
        from speedrun.triton_kernels import polar_express as kernels

        momentum_out, normalize_out = kernels.momentum_out, kernels.normalize_out
    momentum_out(grad, momentum, mu, sums)
    normalize_out(grad, momentum, mu, sums, norm_factor, eps, x)


# The first two are the raw kernels: _C implements them for CUDA. sums: (B, P) fp32, sums of squares
# of each SUM_CHUNK elements of a matrix. mu is rounded to fp32 before it is subtracted from 1.
define(
    "polar_express_momentum_out(Tensor grad, Tensor(a!) momentum, Tensor mu, Tensor(b!) sums) "
    "-> ()",
    fake=lambda *arguments: None,
    cpu=reference.momentum_out,
)
define(
    "polar_express_normalize_out(Tensor grad, Tensor momentum, Tensor mu, Tensor sums, "
    "float norm_factor, float eps, Tensor(a!) x) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.normalize_out,
)
define(
    "polar_express_prologue(Tensor grad, Tensor(a!) momentum, Tensor mu, Tensor(b!) sums, "
    "Tensor(c!) x, float norm_factor, float eps, str backend) -> ()",
    fake=lambda *arguments: None,
    python=_run_prologue,
)
