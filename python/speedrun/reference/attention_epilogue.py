"""What follows attention: exclusive self-attention and the attention gate, RECIPE section 3.

T tokens, H heads, E head dim of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.reference._fp8 import max_abs, to_fp8

E4M3 = torch.float8_e4m3fn
MIN_SQUARE = 1e-8  # below which |v|² counts as that


def attention_epilogue(
    y_THE: Tensor, v_THE: Tensor, xsa_TH: Tensor | None = None, gate_TH: Tensor | None = None
) -> Tensor:
    """(..., T, H, E) attention outputs, for each head and token:

    XSA: y − tanh(α)·(⟨y, v⟩ / max(|v|², 1e−8))·v takes the own value's direction out of y.
    Gate: times `gate_TH`. `xsa_TH` holds α; None leaves a part out. Computed in at least fp32.
    """
    y = y_THE.to(torch.promote_types(y_THE.dtype, torch.float32))
    if xsa_TH is not None:
        v = v_THE.to(y.dtype)
        share = (y * v).sum(-1) / v.square().sum(-1).clamp(min=MIN_SQUARE)
        y = y - (torch.tanh(xsa_TH.to(y.dtype)) * share)[..., None] * v
    if gate_TH is not None:
        y = y * gate_TH[..., None]
    return y.to(y_THE.dtype)


def attention_epilogue_fp8(
    y_THE: Tensor,
    v_THE: Tensor,
    xsa_TH: Tensor | None,
    gate_TH: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_epilogue`, its e4m3 copy of out / scale, and () float32 max|out|."""
    out = attention_epilogue(y_THE, v_THE, xsa_TH, gate_TH)
    return out, to_fp8(out.detach(), scale, E4M3), max_abs(out.detach())


def attention_epilogue_out(y, v, xsa, gate, scale, out, out_f8, amax) -> None:
    """Into `out`; with a scale into `out_f8` too, and `amax` () is raised, never lowered."""
    if scale is None:
        out.copy_(attention_epilogue(y, v, xsa, gate))
        return
    values = attention_epilogue_fp8(y, v, xsa, gate, scale)
    for tensor, value in zip((out, out_f8), values, strict=False):
        tensor.copy_(value)
    amax.copy_(torch.maximum(amax, values[2]))


def attention_epilogue_bwd_out(y, v, xsa, gate, grad, dy, dv, dxsa, dgate) -> None:
    """Gradients where that of the result is `grad`, as kernels compute them. With s = ⟨y,v⟩/n,
    n = max(|v|², 1e−8), τ = tanh(α), z = y − τ·s·v, G = gate·grad and b = ⟨G,v⟩/n:

    dgate = ⟨grad,z⟩, dα = −(1 − τ²)·s·⟨G,v⟩, dy = G − τ·b·v, dv = −τ·(s·G + b·(y − 2·s·v)), and
    without 2·s·v where |v|² < 1e−8. What has no α or no gate has no such gradient (None).
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    z, g = y.to(wide), grad.to(wide)
    scaled = g if gate is None else g * gate[..., None]
    dy.copy_(scaled)
    if xsa is not None:
        wide_y, wide_v, tau = z, v.to(wide), torch.tanh(xsa.to(wide))
        square = wide_v.square().sum(-1)
        n = square.clamp(min=MIN_SQUARE)
        s, inner = (wide_y * wide_v).sum(-1) / n, (scaled * wide_v).sum(-1)
        z = wide_y - (tau * s)[..., None] * wide_v
        dxsa.copy_(-(1 - tau.square()) * s * inner)
        b = (tau * inner / n)[..., None]
        twice = torch.where(square < MIN_SQUARE, 0, 2 * s)[..., None]
        dy.copy_(scaled - b * wide_v)
        dv.copy_(-(tau * s)[..., None] * scaled - b * (wide_y - twice * wide_v))
    if gate is not None:
        dgate.copy_((g * z).sum(-1))
