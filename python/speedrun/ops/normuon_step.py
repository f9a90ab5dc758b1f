"""Front door of `normuon_step`: from the orthogonalised update to new weights, in place.

Accepted: banks of B matrices M × N, weights bfloat16, float32 or float64, bfloat16 ones with or
without the low 16 bits of exact weights; O in float16, bfloat16, float32 or float64 (float64
anywhere on the torch backend alone). What is updated in place must be contiguous; O of another
layout is copied first.

Backends have the same bits where O isn't rescaled: kernels round each IEEE operation on its own, as
the reference does. With a state they agree up to the order of the sums of squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.reference import normuon_step as reference
from speedrun.reference.normuon_step import (
    Fp8Copies,
    join_bits,
    split_bits,
    variance_rescale,
    weight_update,
)

__all__ = [
    "Fp8Copies",
    "join_bits",
    "normuon_step",
    "split_bits",
    "variance_rescale",
    "weight_update",
]

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
O_DTYPES = (torch.float16, *DTYPES)
PARTIAL_LINES = 16  # rows or columns of which a block of a kernel finds the variance
E4M3 = torch.float8_e4m3fn


def normuon_step(
    weight_BMN: Tensor,
    low_BMN: Tensor | None,
    o_BMN: Tensor,
    second: Tensor | None,
    lr_B: Tensor,
    wd: float | Tensor,
    *,
    beta2: float,
    decay_lr_B: Tensor | None = None,
    cautious: bool = True,
    nearest: bool = False,
    fp8: Fp8Copies | None = None,
) -> None:
    """W ← (W − [O·W ≥ 0]·W·wd·decay_lr) − O·lr, O rescaled first; the formulas are the reference's.

    weight_BMN (B, M, N) bfloat16, float32 or float64, in place; o_BMN like it, or float16.
    low_BMN int16: the exact weights' low bits, None: there are none, and W is rounded to nearest.
    second (B, M, 1), or (B, 1, N) where M < N, in float32 (float64 of float64): NorMuon's state;
    None: O is taken as it is. lr_B, decay_lr_B (B,) and wd () are float64 on the device, so that
    nothing waits for it and calls can be captured in a CUDA graph; wd may be a number. decay_lr_B
    None: lr_B. cautious False: W decays everywhere. nearest: the upper half of an exact weight is
    rounded, not cut off. fp8: takes e4m3 copies of the new weights, and their amax.
    TypeError: another type; ValueError: another shape, layout or device, or beta2 out of range;
    RuntimeError for weights that ask for gradients, unless under torch.no_grad().
    Source: NorMuon (arXiv 2510.05491), as the NanoGPT speedrun's record 089 has it.
    """
    decay_lr_B = lr_B if decay_lr_B is None else decay_lr_B
    _check(weight_BMN, low_BMN, o_BMN, second, lr_B, decay_lr_B, wd, fp8)
    if not 0 <= beta2 < 1:
        raise ValueError(f"normuon_step: beta2 must be in [0, 1), got {beta2}")
    if torch.is_grad_enabled() and (weight_BMN.requires_grad or o_BMN.requires_grad):
        raise RuntimeError("normuon_step has no gradient: call it under torch.no_grad()")
    if fp8 is not None:
        fp8.amax.zero_()
    if weight_BMN.numel() == 0:
        return
    has_kernel = torch.float64 not in (weight_BMN.dtype, o_BMN.dtype)
    cuda_kernel = "normuon_step_out" if has_kernel else ""
    backend = choose("normuon_step", weight_BMN.device, cuda_kernel=cuda_kernel, triton=has_kernel)
    if backend == "torch":
        return reference.normuon_step(
            weight_BMN,
            low_BMN,
            o_BMN,
            second,
            lr_B,
            wd,
            beta2=beta2,
            decay_lr_B=decay_lr_B,
            cautious=cautious,
            nearest=nearest,
            fp8=fp8,
        )
    if not isinstance(wd, Tensor):
        wd = torch.full((), wd, dtype=torch.float64, device=weight_BMN.device)
    partials = None
    if second is not None:
        num_partials = -(-max(weight_BMN.shape[1:]) // PARTIAL_LINES)
        partials = second.new_empty(len(second), num_partials, 2)
    tensors = (weight_BMN, low_BMN, o_BMN.contiguous(), second, partials)
    rates = (lr_B.contiguous(), decay_lr_B.contiguous(), wd)
    torch.ops.speedrun.normuon_step(
        *tensors, *rates, beta2, cautious, nearest, *(fp8 or (None,) * 4), backend
    )


def _check(weight, low, o, second, lr, decay_lr, wd, fp8) -> None:
    if weight.dtype not in DTYPES or o.dtype not in O_DTYPES:
        raise TypeError(
            "normuon_step: weight_BMN must be bfloat16, float32 or float64 and o_BMN one of these "
            f"or float16, got {weight.dtype} and {o.dtype}"
        )
    if weight.dim() != 3:
        raise ValueError(f"normuon_step: weight_BMN must be (B, M, N), got {tuple(weight.shape)}")
    if low is not None and weight.dtype != torch.bfloat16:
        raise TypeError(f"normuon_step: low_BMN goes with bfloat16 weights, not {weight.dtype}")
    shape, (B, M, N) = weight.shape, weight.shape
    state_dtype = torch.promote_types(weight.dtype, torch.float32)
    wanted = {
        "weight_BMN": (weight, shape, weight.dtype),
        "low_BMN": (low, shape, torch.int16),
        "o_BMN": (o, shape, o.dtype),
        "second": (second, (B, M, 1) if M >= N else (B, 1, N), state_dtype),
        "lr_B": (lr, (B,), torch.float64),
        "decay_lr_B": (decay_lr, (B,), torch.float64),
        "wd": (wd if isinstance(wd, Tensor) else None, (), torch.float64),
    }
    if fp8 is not None:
        wanted |= {
            "fp8.scale": (fp8.scale, (B,), torch.float32),
            "fp8.row": (fp8.row, shape, E4M3),
            "fp8.transposed": (fp8.transposed, (B, N, M), E4M3),
            "fp8.amax": (fp8.amax, (B,), torch.float32),
        }
    copied = ("o_BMN", "lr_B", "decay_lr_B")  # where they aren't contiguous
    for name, (x, x_shape, dtype) in wanted.items():
        if x is not None:
            where = f"normuon_step: {name}"
            check_tensor(where, x, x_shape, dtype, weight.device, contiguous=name not in copied)


def _reference_out(
    weight, low, o, second, partials, lr, decay_lr, wd, beta2, cautious, nearest, *fp8
) -> None:
    options = {"beta2": beta2, "decay_lr_B": decay_lr, "cautious": cautious, "nearest": nearest}
    copies = None if fp8[0] is None else Fp8Copies(*fp8)
    reference.normuon_step(weight, low, o, second, lr, wd, **options, fp8=copies)


def _run(*arguments) -> None:
    *inputs, backend = arguments
    if backend == "cuda":
        torch.ops.speedrun.normuon_step_out(*inputs)
    elif backend == "triton":
        from speedrun.triton_kernels.normuon_step import normuon_step_out

        normuon_step_out(*inputs)
    else:
        _reference_out(*inputs)


# The first is the raw kernel: _C implements it for CUDA.
_ARGUMENTS = (
    "Tensor(a!) weight, Tensor(b!)? low, Tensor o, Tensor(c!)? second, Tensor(d!)? partials, "
    "Tensor lr, Tensor decay_lr, Tensor wd, float beta2, bool cautious, bool nearest, "
    "Tensor? scale, Tensor(e!)? row, Tensor(f!)? transposed, Tensor(g!)? amax"
)
define(f"normuon_step_out({_ARGUMENTS}) -> ()", fake=lambda *arguments: None, cpu=_reference_out)
define(
    f"normuon_step({_ARGUMENTS}, str backend) -> ()",
    fake=lambda *arguments: None,
    python=_run,
)
