"""Front doors of `head_logits`: the head's loss and gradients without its logits in memory.

T positions, D model dim, V vocabulary, B blocks of columns, M targets a position. `_VD` and `_VT`
are transposed copies. With l = a·σ((x·W + b)/c), e = exp(l − a): `head_logits` multiplies, keeps
sums of e, and g = e·σ·(1 − σ) as e5m2 in both layouts, one scale for all of it; `target_terms_`
makes of them the loss, and what the gradient of x·W is made of: rows[t]·g[t, v], where g is 0 from
then on at the targets, and sides[t, m] there. The products of g with W and x are `fp8_matmul`'s;
`add_target_rows_` and `add_target_columns_` add the sides. `head_loss(.., form="fused")` is all of
it.

Kernels are the stem head_logits for all four; of the reference, in chunks of rows, are all other
calls. Everything is in fp32 behind the products. Nothing waits for the host, and shapes don't
depend on data. A target of −1 counts nothing; V or more is an error, of which kernels make the loss
NaN.

Errors: TypeError for a wrong type, ValueError for a wrong shape, layout, device or number. No
gradients: they are made here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._dispatch import choose
from speedrun.ops._hopper import has_e4m3, is_aligned, is_hopper
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
MOST_TARGETS = 8  # of a position, in kernels


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
    _check_scales(op, x_scale, w_scale, device)
    check_softcap(op, a, c)
    operands = (x_f8_TD, w_f8_VD)
    sizes = (*x_f8_TD.shape, len(w_f8_VD))
    served = all(size > 0 and size % 16 == 0 for size in sizes) and is_hopper(device)
    served = served and all(map(is_aligned, operands))
    cuda_kernel = "head_logits_out" if served else ""
    backend = choose(op, device, cuda_kernel=cuda_kernel, triton=has_e4m3(device))
    found = torch.ops.speedrun.head_logits(*operands, x_scale, w_scale, a, b, c, backend)
    return HeadLogits(*found)


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
    _check_scales(op, x_scale, w_scale, device)
    operands = (x_TD, w_VD, x_f8_TD, w_f8_VD)
    backend = _choose("head_target_terms_out", targets_TM, *operands, triton=has_e4m3(device))
    arguments = (*logits, *operands, x_scale, w_scale, targets_TM, weights_M, a, b, c)
    return TargetTerms(*torch.ops.speedrun.head_target_terms_(*arguments, backend))


def add_target_rows_(dx_TD: Tensor, w_VD: Tensor, targets_TM: Tensor, sides_TM: Tensor) -> Tensor:
    """dX[t] += Σ_m sides[t, m]·W[targets[t, m]] in place, summed in fp32, rounded once; returns dX.

    dx_TD (T, D) and w_VD (V, D) bf16, targets_TM (T, M) int64, sides_TM (T, M) float32, all
    contiguous. Source: as for `head_logits`.
    """
    op, device = "add_target_rows_", dx_TD.device
    check_tensor(f"{op}: dx_TD", dx_TD, dx_TD.shape, BF16, device)
    check_tensor(f"{op}: w_VD", w_VD, (w_VD.shape[0], dx_TD.shape[1]), BF16, device)
    _check_targets(op, targets_TM, len(dx_TD), device, sides_TM)
    backend = _choose("head_add_target_rows_out", targets_TM, dx_TD, w_VD)
    torch.ops.speedrun.head_add_target_rows_(dx_TD, w_VD, targets_TM, sides_TM, backend)
    return dx_TD


def add_target_columns_(
    dw_DV: Tensor, x_TD: Tensor, targets_TM: Tensor, sides_TM: Tensor
) -> Tensor:
    """dW[:, targets[t, m]] += sides[t, m]·x[t] in place, in fp32; returns dW. Kernels sum in a
    fixed order; the reference does on a GPU only under torch.use_deterministic_algorithms, as
    `index_add_` has it.

    dw_DV (D, V) float32, x_TD (T, D) bf16, targets_TM (T, M) int64, sides_TM (T, M) float32, all
    contiguous. Source: as for `head_logits`.
    """
    op, device = "add_target_columns_", x_TD.device
    check_tensor(f"{op}: x_TD", x_TD, x_TD.shape, BF16, device)
    check_tensor(f"{op}: dw_DV", dw_DV, (x_TD.shape[1], dw_DV.shape[1]), FP32, device)
    _check_targets(op, targets_TM, len(x_TD), device, sides_TM)
    fits = dw_DV.shape[1] % 4 == 0
    kernel = "head_add_target_columns_out" if fits else ""
    backend = _choose(kernel, targets_TM, x_TD, dw_DV)
    torch.ops.speedrun.head_add_target_columns_(dw_DV, x_TD, targets_TM, sides_TM, backend)
    return dw_DV


def _choose(cuda_kernel: str, targets_TM: Tensor, *tensors: Tensor, triton: bool = True) -> str:
    """The backend of what has a part for each target; the first of `tensors` is (T, D)."""
    num_targets, dim = targets_TM.shape[1], tensors[0].shape[1]
    served = 0 < num_targets <= MOST_TARGETS and dim % 8 == 0
    # Rows follow from the sizes: what is left to ask is where each tensor starts.
    served = served and all(x.numel() > 0 and is_aligned(x.view(-1)) for x in tensors)
    return choose(
        "head_logits",
        targets_TM.device,
        cuda_kernel=cuda_kernel if served else "",
        triton=triton and num_targets <= MOST_TARGETS,
    )


def _check_scales(op: str, x_scale: Tensor, w_scale: Tensor, device: torch.device) -> None:
    for name, scale in (("x_scale", x_scale), ("w_scale", w_scale)):
        check_tensor(f"{op}: {name}", scale.reshape(()), (), FP32, device)


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


def _kernel(backend: str, name: str) -> Callable[..., None]:
    """What writes into outputs that it is given."""
    if backend == "torch":
        return _REFERENCES[name]
    if backend == "cuda":
        return getattr(torch.ops.speedrun, name)
    from speedrun.triton_kernels import head_logits as kernels

    return getattr(kernels, name)


def _empty_logits(x: Tensor, w: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-w.shape[0] // BLOCK_COLUMNS)
    return (
        x.new_empty((blocks, x.shape[0]), dtype=FP32),
        x.new_empty((x.shape[0], w.shape[0]), dtype=E5M2),
        x.new_empty((w.shape[0], x.shape[0]), dtype=E5M2),
    )


def _head_logits(x, w, x_scale, w_scale, a, b, c, backend) -> tuple[Tensor, Tensor, Tensor]:
    outs = _empty_logits(x, w)
    more = (factor_scale(a),) if backend == "triton" else ()  # its file may not import this
    _kernel(backend, "head_logits_out")(x, w, x_scale, w_scale, a, b, c, *outs, *more)
    return outs


def _head_logits_out(x: Tensor, w: Tensor, *arguments) -> None:
    *others, sums, g, g_t = arguments
    rows = rows_at_once(w.shape[0], w.device)
    reference.head_logits(x, w, *others, rows=rows, out=HeadLogits(sums, g, g_t))


def _empty_terms(sums: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = sums.shape[1:], arguments[8]
    return sums.new_empty(rows), sums.new_empty(rows), sums.new_empty(targets.shape)


def _target_terms_(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *of_reference, backend = arguments
    outs = _empty_terms(*of_reference)
    _kernel(backend, "head_target_terms_out")(*of_reference, *outs)
    return outs


def _target_terms_out(sums: Tensor, g: Tensor, g_t: Tensor, *arguments) -> None:
    *others, loss, rows, sides = arguments
    found = reference.target_terms_(HeadLogits(sums, g, g_t), *others)
    for out, result in zip((loss, rows, sides), found, strict=True):
        out.copy_(result)


def _add_rows_(dx: Tensor, w: Tensor, targets: Tensor, sides: Tensor, backend: str) -> None:
    _kernel(backend, "head_add_target_rows_out")(w, targets, sides, dx)


def _add_rows_out(w: Tensor, targets: Tensor, sides: Tensor, dx: Tensor) -> None:
    reference.add_target_rows_(dx, w, targets, sides)


def _add_columns_(dw: Tensor, x: Tensor, targets: Tensor, sides: Tensor, backend: str) -> None:
    if backend == "torch":
        reference.add_target_columns_(dw, x, targets, sides)
    else:
        keys, order = targets.view(-1).int().sort(stable=True)
        _kernel(backend, "head_add_target_columns_out")(x, keys, order, sides, dw)


_REFERENCES: dict[str, Callable[..., None]] = {
    "head_logits_out": _head_logits_out,
    "head_target_terms_out": _target_terms_out,
    "head_add_target_rows_out": _add_rows_out,
}
_SOFTCAP = "float a, float b, float c"
_TERMS = (
    "Tensor sums, Tensor(a!) g, Tensor(b!) g_t, Tensor x, Tensor w, Tensor x_f8, Tensor w_f8, "
    f"Tensor x_scale, Tensor w_scale, Tensor targets, Tensor weights, {_SOFTCAP}"
)
define(
    f"head_logits(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, {_SOFTCAP}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty_logits,
    python=_head_logits,
)
define(
    f"head_target_terms_({_TERMS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_empty_terms,
    python=_target_terms_,
)
define(
    "head_add_target_rows_(Tensor(a!) dx, Tensor w, Tensor targets, Tensor sides, str backend) "
    "-> ()",
    fake=lambda *arguments: None,
    python=_add_rows_,
)
define(
    "head_add_target_columns_(Tensor(a!) dw, Tensor x, Tensor targets, Tensor sides, str backend) "
    "-> ()",
    fake=lambda *arguments: None,
    python=_add_columns_,
)
# The raw kernels, which _C implements for CUDA.
_RAW = {
    "head_logits_out": f"Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, {_SOFTCAP}, "
    "Tensor(a!) sums, Tensor(b!) g, Tensor(c!) g_t",
    "head_target_terms_out": f"{_TERMS}, Tensor(c!) loss, Tensor(d!) rows, Tensor(e!) sides",
    "head_add_target_rows_out": "Tensor w, Tensor targets, Tensor sides, Tensor(a!) dx",
    # keys: the targets (T·M,) int32, sorted; order: where each was, int64; of equal ones the first
    # comes first.
    "head_add_target_columns_out": "Tensor x, Tensor keys, Tensor order, Tensor sides, "
    "Tensor(a!) dw",
}
for _name, _arguments in _RAW.items():
    define(
        f"{_name}({_arguments}) -> ()",
        fake=lambda *arguments: None,
        cpu=_REFERENCES.get(_name),
    )
