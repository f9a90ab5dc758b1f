"""Front door of `normuon_step`: what surrounds the orthogonalisation. Backend: the reference.

B matrices of M × N in a bank.
"""

from __future__ import annotations

from torch import Tensor

from speedrun.reference import normuon_step as reference
from speedrun.reference.normuon_step import (
    Fp8Copies,
    join_bits,
    momentum_step,
    split_bits,
    variance_rescale,
    weight_update,
)

__all__ = [
    "Fp8Copies",
    "join_bits",
    "momentum_step",
    "normuon_step",
    "split_bits",
    "variance_rescale",
    "weight_update",
]


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
    """From the orthogonalised update O to new weights, in place; the formulas are the reference's.

    weight_BMN bf16 with the exact weights' low bits in low_BMN (int16), or without them bf16,
    float32 or float64; o_BMN fp16, bf16, float32 or float64. `second` (B, M, 1), or (B, 1, N) where
    M < N, in float32 or wider: NorMuon's state; None: O is taken as it is. lr_B, decay_lr_B (B,)
    and wd () are float64 on the device, so that nothing waits for it and calls can be captured in a
    CUDA graph; wd may be a number too. decay_lr_B None: lr_B.
    fp8: tensors that take e4m3 copies of the new weights for a given scale, and their amax.
    """
    if weight_BMN.numel() == 0:
        return
    reference.normuon_step(
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
