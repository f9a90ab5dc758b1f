"""Front doors of `softcap_ce`: softcapped cross-entropy against several weighted targets.

z (T, V) is the head's output before the softcap, T positions and V columns, all of which take part
in the softmax. Targets (T, N) int64, weights (N,); a target of −1 counts nothing. The prefix target
(T,) int64 is one more, with a weight of its own. `count_missing_targets` and `round_sigmoid` are
the public kernel's: see the reference. Where compiled code meets another `prefix_weight` at each
step, give it as a tensor (): a float would make it trace again.

Errors: TypeError for a wrong type, ValueError for a wrong shape. `softcap_ce` runs the reference;
`softcap_ce_fp8` has kernels for bf16 and caps that fit: loss and both layouts of the gradient out
of one read of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.reference import softcap_ce as reference
from speedrun.reference.softcap_ce import NO_TARGET, Loss, LossAndGrad, softcap

__all__ = ["NO_TARGET", "Loss", "LossAndGrad", "softcap", "softcap_ce", "softcap_ce_fp8"]

FP8_PATH_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*FP8_PATH_DTYPES, torch.float64)
# The reference has several copies of so many logits in float32. 32 MB are fastest on a CPU, which
# gives larger tensors back to the system each time; GPUs want more work at once.
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}
LARGEST_SOFTCAP = 140.0  # of kernels, which sum exp(logit - a/2) without a search for the largest


def softcap_ce(
    z_TV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    *,
    prefix_targets_T: Tensor | None = None,
    prefix_weight: float | Tensor = 0.0,
    count_missing_targets: bool = False,
    round_sigmoid: bool = False,
) -> Tensor:
    """(T,) float32 (of float64: float64) loss Σ_n weights[n]·CE(a·σ((z + b)/c), targets[:, n]).

    z_TV (T, V) of any floating type, differentiable; targets_TN (T, N) int64, −1 counts nothing;
    weights_N (N,) floating. prefix_targets_T (T,) int64 is one more target, of weight
    prefix_weight, a number or a tensor (). count_missing_targets: missing targets count in the
    gradient; round_sigmoid: σ is rounded to bf16, as the public kernel does both.
    TypeError: another type; ValueError: another shape, or a prefix_weight without targets.
    Source: logit softcapping of Gemma 2 (arXiv 2408.00118) and multi-token prediction (arXiv
    2404.19737), as the NanoGPT speedrun's record 089 has them: a, b, c = 23, 5, 7.5.
    """
    check("softcap_ce", "z_TV", z_TV, targets_TN, weights_N, prefix_targets_T, prefix_weight)
    return reference.softcap_ce(
        z_TV,
        targets_TN,
        weights_N,
        a,
        b,
        c,
        prefix_targets_T=prefix_targets_T,
        prefix_weight=prefix_weight,
        count_missing_targets=count_missing_targets,
        round_sigmoid=round_sigmoid,
    )


def softcap_ce_fp8(
    z_TV: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    a: float,
    b: float,
    c: float,
    dz_scale: Tensor,
    *,
    prefix_targets_T: Tensor | None = None,
    prefix_weight: float | Tensor = 0.0,
    count_missing_targets: bool = False,
    round_sigmoid: bool = False,
    transposed: bool = False,
) -> LossAndGrad:
    """Loss (T,), log-sum-exp of the softcapped logits (T,), both float32, and the gradient of the
    summed losses over `dz_scale` (a float32 tensor of one element) (T, V) e5m2, clamped; if
    `transposed` also (V, T).

    Kernels keep a factor of the gradient in bf16: a byte in a hundred is e5m2's other neighbour.
    z_TV in float16, bfloat16 or float32; all else, errors and source as for `softcap_ce`.
    RuntimeError for a z that asks for a gradient: this is one.
    """
    op = "softcap_ce_fp8"
    check(op, "z_TV", z_TV, targets_TN, weights_N, prefix_targets_T, prefix_weight, FP8_PATH_DTYPES)
    if torch.is_grad_enabled() and z_TV.requires_grad:
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad()")
    if dz_scale.dtype != torch.float32 or dz_scale.numel() != 1:
        raise TypeError(
            f"{op}: dz_scale must be a float32 tensor of one element, got {dz_scale.dtype} "
            f"{tuple(dz_scale.shape)}"
        )
    weight = as_scalar(prefix_weight, z_TV.device)
    flags = (count_missing_targets, round_sigmoid)
    loss = Loss(targets_TN, weights_N, a, b, c, prefix_targets_T, weight, *flags)
    serves = z_TV.dtype == torch.bfloat16 and z_TV.shape[1] > 0
    serves = serves and 0 < a <= LARGEST_SOFTCAP and c > 0
    aligned = serves and z_TV.shape[1] % 16 == 0
    cuda_kernel = "softcap_ce_fp8_out" if aligned else ""
    backend = choose("softcap_ce", z_TV.device, cuda_kernel=cuda_kernel, triton=serves)
    result = torch.ops.speedrun.softcap_ce_fp8(z_TV, *loss, dz_scale, transposed, backend)
    loss_T, lse_T, dz_TV, dz_VT = result
    return LossAndGrad(loss_T, lse_T, dz_TV, dz_VT if transposed else None)


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """`value` as a tensor () on `device`; of a float float64, so that nothing is rounded yet."""
    if isinstance(value, Tensor):
        return value.to(device).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def rows_at_once(num_columns: int, device: torch.device) -> int:
    """How many rows of logits are LOGITS_AT_ONCE, at least 1."""
    return max(1, LOGITS_AT_ONCE.get(device.type, 1 << 26) // max(1, num_columns))


def check(
    op: str,
    name: str,
    x: Tensor,
    targets_TN: Tensor,
    weights_N: Tensor,
    prefix_targets_T: Tensor | None,
    prefix_weight: float | Tensor,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raises unless a loss of the positions of `x` (T, ..), called `name`, can be computed."""
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} has type {x.dtype}; allowed are {allowed}")
    if not weights_N.dtype.is_floating_point:
        raise TypeError(f"{op}: weights_N must be floating, got {weights_N.dtype}")
    for index_name, index in (("targets_TN", targets_TN), ("prefix_targets_T", prefix_targets_T)):
        if index is not None and index.dtype != torch.int64:
            raise TypeError(f"{op}: {index_name} must be int64, got {index.dtype}")
    shape = (*x.shape[:1], *weights_N.shape)
    if x.dim() != 2 or targets_TN.dim() != 2 or targets_TN.shape != shape:
        raise ValueError(
            f"{op} needs {name} with 2 dimensions, targets_TN (T, N) and weights_N (N,), got "
            f"{tuple(x.shape)}, {tuple(targets_TN.shape)} and {tuple(weights_N.shape)}"
        )
    if prefix_targets_T is not None:
        if prefix_targets_T.shape != x.shape[:1]:
            raise ValueError(
                f"{op}: prefix_targets_T must be {tuple(x.shape[:1])} like {name}'s rows, got "
                f"{tuple(prefix_targets_T.shape)}"
            )
    elif isinstance(prefix_weight, Tensor) or prefix_weight != 0:
        raise ValueError(
            f"{op}: prefix_weight={prefix_weight} without prefix_targets_T: give both or none"
        )


def _softcap_ce_fp8(z, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *of_loss, dz_scale, transposed, backend = arguments
    loss = Loss(*of_loss)
    outs = _empty_outputs(z, transposed)
    given = (*outs[:3], outs[3] if transposed else None)
    if backend == "torch":
        softcap_ce_fp8_out(z, *loss, dz_scale, *given)
        return outs
    prefixes = loss.prefix_targets_T
    loss = loss._replace(
        targets_TN=loss.targets_TN.contiguous(),
        weights_N=loss.weights_N.float().contiguous(),
        prefix_weight=loss.prefix_weight.float(),
        prefix_targets_T=None if prefixes is None else prefixes.contiguous(),
    )
    if backend == "cuda":
        torch.ops.speedrun.softcap_ce_fp8_out(z.contiguous(), *loss, dz_scale, *given)
    else:
        from speedrun.triton_kernels import softcap_ce as kernels

        kernels.softcap_ce_fp8_out(z.contiguous(), loss, dz_scale, *given)
    return outs


def _empty_outputs(z: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp, gradient and its transpose, of no elements if it isn't wanted."""
    loss, lse = (z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(2))
    dz_TV = torch.empty(z.shape, dtype=torch.float8_e5m2, device=z.device)
    dz_VT = dz_TV.new_empty(z.mT.shape if transposed else (0,))
    return loss, lse, dz_TV, dz_VT


def softcap_ce_fp8_out(z: Tensor, *arguments) -> None:
    """The reference, into the given outputs."""
    *loss, dz_scale, loss_T, lse_T, dz_TV, dz_VT = arguments
    rows = rows_at_once(z.shape[1], z.device)
    found = reference.softcap_ce_fp8(z, **Loss(*loss)._asdict(), dz_scale=dz_scale, rows=rows)
    for out, result in zip((loss_T, lse_T, dz_TV), found[:3], strict=True):
        out.copy_(result)
    if dz_VT is not None:
        dz_VT.copy_(dz_TV.mT)


_ARGUMENTS = (
    "Tensor z, Tensor targets, Tensor weights, float a, float b, float c, Tensor? prefix_targets, "
    "Tensor prefix_weight, bool count_missing, bool rounded, Tensor dz_scale"
)
# Behind an operator also for the reference: Inductor would leave out the rounding of σ.
define(
    f"softcap_ce_fp8({_ARGUMENTS}, bool transposed, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda z, *arguments: _empty_outputs(z, arguments[-2]),
    python=_softcap_ce_fp8,
)
# The raw kernel, which _C implements for CUDA.
define(
    f"softcap_ce_fp8_out({_ARGUMENTS}, Tensor(a!) loss, Tensor(b!) lse, Tensor(c!) dz, "
    "Tensor(d!)? dz_t) -> ()",
    fake=lambda *arguments: None,
    cpu=softcap_ce_fp8_out,
)
