"""NorMuon behind the orthogonalisation (arXiv 2510.05491): RECIPE section 4, steps 3 and 4.

B matrices of M × N in a bank. `low_BMN` holds the low 16 bits of weights whose upper 16 bits are
the bf16 parameter; it is None where the parameter itself is exact (float32, float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedrun.reference._fp8 import to_fp8


class Fp8Copies(NamedTuple):
    """Outputs: the new weights as e4m3, so that the real value is fp8 * scale, and their amax."""

    scale: Tensor  # (B,) float32, an input
    row: Tensor | None  # (B, M, N)
    transposed: Tensor | None  # (B, N, M)
    amax: Tensor  # (B,) float32


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
    """From the orthogonalised update O to new weights, in place: the functions below in turn.

    `second` None: O is not rescaled. `decay_lr_B`: the decay's rate where it isn't the step's.
    """
    if second is not None:
        o_BMN = variance_rescale(o_BMN, second, beta2)
    wide = torch.promote_types(weight_BMN.dtype, torch.float32)
    lr_B11 = lr_B.to(wide).view(-1, 1, 1)
    decay_lr_B11 = lr_B11 if decay_lr_B is None else decay_lr_B.to(wide).view(-1, 1, 1)
    weight_update(
        weight_BMN,
        low_BMN,
        o_BMN,
        lr_B11,
        wd,
        decay_lr_B11=decay_lr_B11,
        cautious=cautious,
        nearest=nearest,
    )
    if fp8 is not None:
        codes = to_fp8(weight_BMN, fp8.scale.view(-1, 1, 1), torch.float8_e4m3fn)
        fp8.amax.copy_(weight_BMN.abs().amax((1, 2)))
        for target, source in ((fp8.row, codes), (fp8.transposed, codes.mT)):
            if target is not None:
                target.copy_(source)


def variance_rescale(o_BMN: Tensor, second: Tensor, beta2: float) -> Tensor:
    """O/√S per row (M ≥ N) or column, rescaled to its old norm; S ← lerp(S, mean O², 1−β2).

    `second` is (B, M, 1) or (B, 1, N), updated in place. One rounding to O's type at the end.
    """
    o = o_BMN.to(second.dtype)
    axis = -1 if o.shape[-2] >= o.shape[-1] else -2
    v = o.square().mean(axis, keepdim=True)
    second.lerp_(v, 1 - beta2)
    scale = second.clamp(min=1e-10).rsqrt()
    size = o.shape[axis]
    norm = (v.sum((-2, -1), keepdim=True) * size).sqrt()
    new_norm = ((v * size * scale.square()).sum((-2, -1), keepdim=True)).sqrt()
    return (o * (scale * (norm / new_norm.clamp(min=1e-10)))).to(o_BMN.dtype)


def weight_update(
    weight_BMN: Tensor,
    low_BMN: Tensor | None,
    o_BMN: Tensor,
    lr_B11: Tensor,
    wd: float | Tensor,
    *,
    decay_lr_B11: Tensor | None = None,
    cautious: bool = True,
    nearest: bool = False,
) -> None:
    """W ← (W − [O·W ≥ 0]·W·wd·lr) − O·lr on the exact weight, in place, in at least fp32.

    `cautious` False: W decays everywhere. The bf16 of an exact weight is cut off, or with `nearest`
    rounded; without low bits a bf16 weight is rounded to nearest.
    """
    wide = torch.promote_types(weight_BMN.dtype, torch.float32)
    exact = weight_BMN.to(wide) if low_BMN is None else join_bits(weight_BMN, low_BMN, nearest)
    o = o_BMN.to(exact.dtype)
    shrinks = torch.where(o * exact >= 0, exact, 0) if cautious else exact
    decay_lr_B11 = lr_B11 if decay_lr_B11 is None else decay_lr_B11
    exact = exact - shrinks * wd * decay_lr_B11 - o * lr_B11
    if low_BMN is None:
        weight_BMN.copy_(exact)
    else:
        split_bits(exact, weight_BMN, low_BMN, nearest)


def join_bits(weight: Tensor, low: Tensor, nearest: bool = False) -> Tensor:
    """The exact float32 weight: bf16 upper half, int16 lower half.

    The lower half is the bits of a uint16, but the signed distance from the upper one if `nearest`.
    """
    upper = weight.view(torch.int16).to(torch.int32) << 16
    low = low.to(torch.int32)
    return (upper + (low if nearest else low & 0xFFFF)).view(torch.float32)


def split_bits(exact: Tensor, weight: Tensor, low: Tensor, nearest: bool = False) -> None:
    """Write the upper half of `exact` to `weight` and the lower half to `low`, in place.

    `nearest`: the upper half is rounded (of two equally near the larger one), not cut off. The
    lower half has the same bits, since 2^16 more or less above it are none of its own.
    """
    bits = exact.view(torch.int32)
    upper = bits + 0x8000 if nearest else bits
    weight.copy_((upper >> 16).to(torch.int16).view(torch.bfloat16))
    low.copy_(bits.to(torch.int16))
