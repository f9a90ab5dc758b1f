"""From the QKV projection to what attention takes: QK-norm, half rotary, partial key offset, value
embedding: RECIPE section 3, "Attention".

P parts, T tokens a part, H heads, K head dim of queries and keys, E of values; N = H·(2K + E). The
first half of K rotates in adjacent pairs, the other half, the stationary one, does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 2.0**-23


def qk_norm_rope(
    qkv_PTN: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    offset_keys: bool = False,
    first_PT: Tensor | None = None,
    ve_PTD: Tensor | None = None,
    ve_gate_PTH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (P, T, H, K) and v (P, T, H, E): q and k normed and turned, keys offset if asked for,
    v + gate·ve; `ve_PTD` is (P, T, H·E), None: v as it is, and without a gate it counts 1."""
    q, k, v = split_heads(qkv_PTN, num_heads, 4 * cos.shape[-1])
    q, k = norm_rope(q, cos, sin), norm_rope(k, cos, sin)
    if offset_keys:
        k = key_offset(k, first_PT)
    if ve_PTD is not None:
        ve = ve_PTD.unflatten(-1, (num_heads, -1))
        v = v + (ve if ve_gate_PTH is None else ve * ve_gate_PTH[..., None])
    return q, k, v


def split_heads(qkv_PTN: Tensor, num_heads: int, head_dim: int) -> list[Tensor]:
    """Views q, k (P, T, H, K) and v (P, T, H, E)."""
    width = num_heads * head_dim
    parts = qkv_PTN.split([width, width, qkv_PTN.shape[-1] - 2 * width], dim=-1)
    return [part.unflatten(-1, (num_heads, -1)) for part in parts]


def norm_rope(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """norm(x) over the head dim, then pairs (a, b) -> (a cos + b sin, b cos - a sin).

    `x_THK` (..., T, H, K); `cos`, `sin` (T, 1 or H, K/4). The norm is computed in at least fp32.
    """
    return turn(F.rms_norm(x_THK, (x_THK.shape[-1],), eps=NORM_EPS), cos, sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of the first half of x (..., T, H, K) turned."""
    half = x.shape[-1] // 2
    a, b = x[..., :half:2], x[..., 1:half:2]
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., half:]], dim=-1)


def key_offset(k_PTHK: Tensor, first_PT: Tensor | None = None) -> Tensor:
    """Keys whose stationary half is that of the token before; the first token keeps its own.

    `first_PT` bool: tokens that begin a document keep theirs too.
    """
    half = k_PTHK.shape[-1] // 2
    still = k_PTHK[..., half:]
    before = torch.cat([still[:, :1], still[:, :-1]], dim=1)
    if first_PT is not None:
        before = torch.where(first_PT[..., None, None], still, before)
    return torch.cat([k_PTHK[..., :half], before], dim=-1)


def pair_heads(x_THK: Tensor) -> Tensor:
    """(T, H, K) -> (2T, H/2, K): heads j and j + H/2 of token t at places 2t and 2t + 1.

    Of a contiguous tensor a view: both have head h of token t at row t·H + h.
    """
    return x_THK.unflatten(1, (2, -1)).flatten(0, 1)


def unpair_heads(x_SJK: Tensor) -> Tensor:
    """(2T, H/2, K) -> (T, H, K): undoes `pair_heads`."""
    return x_SJK.unflatten(0, (-1, 2)).flatten(1, 2)


# ---- Gradients, as kernels compute them ----------------------------------------------------------


def norm_rope_bwd(x: Tensor, cos: Tensor, sin: Tensor, grad: Tensor) -> Tensor:
    """Gradient of x where that of `norm_rope` is `grad`: turned back, then with y = x/r the normed
    and r the root: (g − y·mean(g·y))/r. In at least fp32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_x, g = x.to(wide), turn(grad.to(wide), cos.to(wide), -sin.to(wide))
    inverse = (wide_x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    y = wide_x * inverse
    return ((g - y * (g * y).mean(-1, keepdim=True)) * inverse).to(x.dtype)


def key_offset_bwd(grad_PTHK: Tensor, first_PT: Tensor | None = None) -> Tensor:
    """Gradient of the keys before `key_offset`: of the stationary half that of the token behind,
    and of tokens that keep their own that too."""
    half = grad_PTHK.shape[-1] // 2
    still = grad_PTHK[..., half:]
    keeps = torch.zeros(still.shape[:2], dtype=torch.bool, device=still.device)
    if first_PT is not None:
        keeps |= first_PT
    keeps[:, :1] = True
    own = still * keeps[..., None, None]
    behind = F.pad((still - own)[:, 1:], (0, 0, 0, 0, 0, 1))
    return torch.cat([grad_PTHK[..., :half], own + behind], dim=-1)


# ---- Into given tensors --------------------------------------------------------------------------


def qk_norm_rope_out(qkv, cos, sin, num_heads, offset_keys, first, ve, ve_gate, q, k, v) -> None:
    """`qk_norm_rope` into q, k and v."""
    values = qk_norm_rope(qkv, cos, sin, num_heads, offset_keys, first, ve, ve_gate)
    for out, value in zip((q, k, v), values, strict=True):
        out.copy_(value)


def qk_norm_rope_bwd_out(
    qkv, cos, sin, num_heads, offset_keys, first, ve, ve_gate, dq, dk, dv, dqkv, dve, dve_gate
) -> None:
    """Into dqkv like qkv, and with a gate into dve (P, T, H·E) and dve_gate (P, T, H), the
    gradients where those of q, k and v are dq, dk and dv. Without a gate ve's is dv."""
    q, k, _ = split_heads(qkv, num_heads, 4 * cos.shape[-1])
    if offset_keys:
        dk = key_offset_bwd(dk, first)
    parts = [norm_rope_bwd(q, cos, sin, dq), norm_rope_bwd(k, cos, sin, dk), dv]
    dqkv.copy_(torch.cat([part.flatten(-2) for part in parts], dim=-1))
    if ve_gate is not None:
        dve.copy_((dv * ve_gate[..., None]).flatten(-2))
        wide = torch.promote_types(ve.dtype, torch.float32)
        products = dv.to(wide) * ve.unflatten(-1, (num_heads, -1)).to(wide)
        dve_gate.copy_(products.sum(-1))
