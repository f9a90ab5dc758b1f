"""Front doors of `head_logits`: the head's loss and gradients without its logits in memory.

T positions, D model dim, V vocabulary, B blocks of columns, M targets a position. `_VD` and `_VT`
are transposed copies. With l = a·σ((x·W + b)/c), e = exp(l − a): `head_logits` multiplies, keeps
sums of e, and g = e·σ·(1 − σ) as e5m2 in both layouts, one scale for all of it; `target_terms_`
makes of them the loss, and what the gradient of x·W is made of: rows[t]·g[t, v], where g is 0 from
then on at the targets, and sides[t, m] there. The products of g with W and x are `fp8_matmul`'s;
`add_target_rows_` and `add_target_columns_` add the sides. `head_loss(.., form="fused")` is all of
it.

There are no kernels yet: the reference serves on every device, in chunks of rows, so that this is
for its numbers and its memory, not for speed. Everything is in fp32 behind the products. Nothing
waits for the host, and shapes don't depend on data. A target of −1 counts nothing; V or more is an
error.

Errors: TypeError for a wrong type, ValueError for a wrong shape, layout, device or number. No
gradients: they are made here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._library import define
from speedrun.ops.softcap_ce import rows_at_once
from speedrun.reference import head_logits as reference
from speedrun.reference.head_logits import (
    BLOCK_COLUMNS,
    HeadLogits,
    TargetTerms,
    factor_scale,
)

__all__ = [
    "LARGEST_SOFTCAP",
    "HeadLogits",
    "TargetTerms",
    "add_target_columns_",
    "add_target_rows_",
    "factor_scale",
    "head_logits",
    "target_terms_",
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP32 = torch.bfloat16, torch.float32
# e5m2 has numbers for g down to 2^-32 of its largest, so that logits more than 20 below `a` vanish
# from a gradient; with a = 23 these are too small to matter whatever the others are.
LARGEST_SOFTCAP = 32.0


def head_logits(
    x_f8_TD: Tensor,
    w_f8_VD: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    a: float,
    b: float,
    c: float,
) -> HeadLogits:
    """Of z = x·W·x_scale·w_scale: sums (B, T) float32 of e over blocks of 128 columns, g (T, V) and
    (V, T) e5m2 over `factor_scale(a)`, to nearest even.

    x_f8_TD (T, D) and w_f8_VD (V, D) e4m3, contiguous; scales: float32 tensors of one element.
    `a` in (0, LARGEST_SOFTCAP], c above 0.
    Source: KERNELS section d.6; softcap as in the NanoGPT speedrun's record 089.
    """
    op, device = "head_logits", x_f8_TD.device
    if x_f8_TD.dim() != 2 or w_f8_VD.dim() != 2 or x_f8_TD.shape[1] != w_f8_VD.shape[1]:
        raise ValueError(
            f"{op} needs x_f8_TD (T, D) and w_f8_VD (V, D), got {tuple(x_f8_TD.shape)} and "
            f"{tuple(w_f8_VD.shape)}"
        )
    check_tensor(f"{op}: x_f8_TD", x_f8_TD, x_f8_TD.shape, E4M3, device)
    check_tensor(f"{op}: w_f8_VD", w_f8_VD, w_f8_VD.shape, E4M3, device)
    for name, scale in (("x_scale", x_scale), ("w_scale", w_scale)):
        check_tensor(f"{op}: {name}", scale.reshape(()), (), FP32, device)
    check_softcap(op, a, c)
    return HeadLogits(*torch.ops.speedrun.head_logits(x_f8_TD, w_f8_VD, x_scale, w_scale, a, b, c))


def check_softcap(op: str, a: float, c: float) -> None:
    """ValueError unless g fits into e5m2."""
    if not 0 < a <= LARGEST_SOFTCAP:
        raise ValueError(
            f"{op}: a={a}: must be above 0 and at most {LARGEST_SOFTCAP}, or e5m2 with one scale "
            'has no numbers for small gradients; head_loss(form="logits") takes larger ones'
        )
    if not c > 0:
        raise ValueError(f"{op}: c={c}: must be above 0")


def target_terms_(
    logits: HeadLogits,
    x_TD: Tensor,
    w_VD: Tensor,
    x_f8_TD: Tensor,
    w_f8_VD: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    targets_TM: Tensor,
    weights_M: Tensor,
    a: float,
    b: float,
    c: float,
) -> TargetTerms:
    """Loss (T,), rows (T,), sides (T, M), float32, from `head_logits`'s results, where g becomes 0
    at the targets, and its arguments.

    x_TD (T, D) and w_VD (V, D): bf16, contiguous, not quantised: from them are the targets' logits.
    targets_TM (T, M) int64, weights_M (M,) float32. Loss Σ_m weights[m]·CE(.., targets[:, m]).
    Source: as for `head_logits`.
    """
    op, device = "target_terms_", x_TD.device
    (num_tokens, dim), num_columns = x_TD.shape, w_VD.shape[0]
    check_tensor(f"{op}: x_TD", x_TD, x_TD.shape, BF16, device)
    check_tensor(f"{op}: w_VD", w_VD, (num_columns, dim), BF16, device)
    check_tensor(f"{op}: x_f8_TD", x_f8_TD, x_TD.shape, E4M3, device)
    check_tensor(f"{op}: w_f8_VD", w_f8_VD, w_VD.shape, E4M3, device)
    check_tensor(f"{op}: g_TV", logits.g_TV, (num_tokens, num_columns), E5M2, device)
    check_tensor(f"{op}: g_VT", logits.g_VT, (num_columns, num_tokens), E5M2, device)
    _check_targets(op, targets_TM, num_tokens, device)
    check_tensor(f"{op}: weights_M", weights_M, targets_TM.shape[1:], FP32, device)
    arguments = (*logits, x_TD, w_VD, x_f8_TD, w_f8_VD, x_scale, w_scale)
    found = torch.ops.speedrun.head_target_terms_(*arguments, targets_TM, weights_M, a, b, c)
    return TargetTerms(*found)


def add_target_rows_(dx_TD: Tensor, w_VD: Tensor, targets_TM: Tensor, sides_TM: Tensor) -> Tensor:
    """dX[t] += Σ_m sides[t, m]·W[targets[t, m]] in place, summed in fp32, rounded once; returns dX.

    dx_TD (T, D) and w_VD (V, D) bf16, targets_TM (T, M) int64, sides_TM (T, M) float32, all
    contiguous. Source: as for `head_logits`.
    """
    op, device = "add_target_rows_", dx_TD.device
    check_tensor(f"{op}: dx_TD", dx_TD, dx_TD.shape, BF16, device)
    check_tensor(f"{op}: w_VD", w_VD, (w_VD.shape[0], dx_TD.shape[1]), BF16, device)
    _check_targets(op, targets_TM, len(dx_TD), device, sides_TM)
    torch.ops.speedrun.head_add_target_rows_(dx_TD, w_VD, targets_TM, sides_TM)
    return dx_TD


def add_target_columns_(
    dw_DV: Tensor, x_TD: Tensor, targets_TM: Tensor, sides_TM: Tensor
) -> Tensor:
    """dW[:, targets[t, m]] += sides[t, m]·x[t] in place, in fp32; returns dW. On a GPU the order of
    the sums is fixed only under torch.use_deterministic_algorithms, as `index_add_` has it.

    dw_DV (D, V) float32, x_TD (T, D) bf16, targets_TM (T, M) int64, sides_TM (T, M) float32, all
    contiguous. Source: as for `head_logits`.
    """
    op, device = "add_target_columns_", x_TD.device
    check_tensor(f"{op}: x_TD", x_TD, x_TD.shape, BF16, device)
    check_tensor(f"{op}: dw_DV", dw_DV, (x_TD.shape[1], dw_DV.shape[1]), FP32, device)
    _check_targets(op, targets_TM, len(x_TD), device, sides_TM)
    torch.ops.speedrun.head_add_target_columns_(dw_DV, x_TD, targets_TM, sides_TM)
    return dw_DV


def _check_targets(
    op: str,
    targets_TM: Tensor,
    num_tokens: int,
    device: torch.device,
    sides_TM: Tensor | None = None,
) -> None:
    if targets_TM.dim() != 2:
        raise ValueError(f"{op}: targets_TM must be (T, M), got {tuple(targets_TM.shape)}")
    shape = (num_tokens, targets_TM.shape[1])
    check_tensor(f"{op}: targets_TM", targets_TM, shape, torch.int64, device)
    if sides_TM is not None:
        check_tensor(f"{op}: sides_TM", sides_TM, shape, FP32, device)


# ---- Operators -------------------------------------------------------------------------------
# Behind one also the reference: a compiler would leave out its rounding to e5m2.


def _empty_logits(x: Tensor, w: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-w.shape[0] // BLOCK_COLUMNS)
    return (
        x.new_empty((blocks, x.shape[0]), dtype=FP32),
        x.new_empty((x.shape[0], w.shape[0]), dtype=E5M2),
        x.new_empty((w.shape[0], x.shape[0]), dtype=E5M2),
    )


def _head_logits(x: Tensor, w: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_at_once(w.shape[0], w.device)
    sums, g, g_t = reference.head_logits(x, w, *arguments, rows=rows)
    return sums, g, g_t


def _empty_terms(sums: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = sums.shape[1:], arguments[8]
    return sums.new_empty(rows), sums.new_empty(rows), sums.new_empty(targets.shape)


def _target_terms_(sums: Tensor, g: Tensor, g_t: Tensor, *arguments) -> tuple[Tensor, ...]:
    return tuple(reference.target_terms_(HeadLogits(sums, g, g_t), *arguments))


def _add_rows_(*arguments: Tensor) -> None:
    reference.add_target_rows_(*arguments)


def _add_columns_(*arguments: Tensor) -> None:
    reference.add_target_columns_(*arguments)


define(
    "head_logits(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, float a, float b, float c) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty_logits,
    python=_head_logits,
)
define(
    "head_target_terms_(Tensor sums, Tensor(a!) g, Tensor(b!) g_t, Tensor x, Tensor w, "
    "Tensor x_f8, Tensor w_f8, Tensor x_scale, Tensor w_scale, Tensor targets, Tensor weights, "
    "float a, float b, float c) -> (Tensor, Tensor, Tensor)",
    fake=_empty_terms,
    python=_target_terms_,
)
define(
    "head_add_target_rows_(Tensor(a!) dx, Tensor w, Tensor targets, Tensor sides) -> ()",
    fake=lambda *arguments: None,
    python=_add_rows_,
)
define(
    "head_add_target_columns_(Tensor(a!) dw, Tensor x, Tensor targets, Tensor sides) -> ()",
    fake=lambda *arguments: None,
    python=_add_columns_,
)
