"""Front door of `qk_norm_rope`: from the QKV projection to queries, keys and values, in one pass.

P parts, T tokens a part, H heads, K head dim of queries and keys, E of values; N = H·(2K + E).
Pairing heads (`pair_heads`) costs nothing behind it: of contiguous tensors it is a view.

Accepted: float16, bfloat16, float32, float64 (float64 on the torch backend alone), one type for all
but `first_PT`. Kernels read contiguous tensors; others are copied first. They compute in float32
and round each result once, where the reference rounds after each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._dispatch import choose
from speedrun.ops._library import define, define_gradient
from speedrun.reference import qk_norm_rope as reference
from speedrun.reference._rotary import (
    rotary_frequencies,
    rotary_positions,
    rotary_table,
    yarn,
)
from speedrun.reference.qk_norm_rope import (
    NORM_EPS,
    key_offset,
    norm_rope,
    pair_heads,
    unpair_heads,
)

__all__ = [
    "NORM_EPS",
    "key_offset",
    "norm_rope",
    "pair_heads",
    "qk_norm_rope",
    "rotary_frequencies",
    "rotary_positions",
    "rotary_table",
    "unpair_heads",
    "yarn",
]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def qk_norm_rope(
    qkv_PTN: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *,
    offset_keys: bool = False,
    first_PT: Tensor | None = None,
    ve_PTD: Tensor | None = None,
    ve_gate_PTH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (P, T, H, K) and v (P, T, H, E) of qkv: all heads' queries, then keys, then values.

    Queries and keys are normed over K and turned by the tables cos and sin (T, 1 or H, K/4).
    offset_keys: the stationary half of a key is that of the token before, but for the first token
    of a part and where `first_PT` (P, T) bool, read only then, is true. v += gate·ve: ve_PTD
    (P, T, H·E), ve_gate_PTH (P, T, H); without a gate it counts 1.
    float16, bfloat16, float32 or float64, one type for all. Differentiable in qkv, ve and gate.
    TypeError, ValueError: another type, shape or device.
    Source: query-key norm (arXiv 2302.05442), rotary embeddings (arXiv 2104.09864) on half the
    dims, value embeddings, as the NanoGPT speedrun's record 089 has them.
    """
    named = {"cos": cos, "sin": sin, "ve_PTD": ve_PTD, "ve_gate_PTH": ve_gate_PTH}
    _check(qkv_PTN, cos, named, first_PT, num_heads)
    first = first_PT if offset_keys else None
    cuda_kernel = "qk_norm_rope_out" if _cuda_takes(qkv_PTN, cos, num_heads) else ""
    has_kernel = qkv_PTN.dtype in KERNEL_DTYPES
    backend = choose("qk_norm_rope", qkv_PTN.device, cuda_kernel=cuda_kernel, triton=has_kernel)
    arguments = (qkv_PTN, cos, sin, num_heads, offset_keys, first, ve_PTD, ve_gate_PTH)
    if backend == "torch":
        return reference.qk_norm_rope(*arguments)
    dense = (x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
    return torch.ops.speedrun.qk_norm_rope(*dense, backend)


def _cuda_takes(qkv: Tensor, cos: Tensor, num_heads: int) -> bool:
    """Whether rows fit in half a warp and halves of heads are whole groups of 8 elements."""
    K = 4 * cos.shape[-1]
    E = qkv.shape[-1] // num_heads - 2 * K
    return qkv.dtype in KERNEL_DTYPES and K % 16 == 0 and E % 8 == 0 and max(K, E) <= 128


def _check(
    qkv: Tensor,
    cos: Tensor,
    named: dict[str, Tensor | None],
    first: Tensor | None,
    num_heads: int,
) -> None:
    """`named`: all tensors but qkv and first, cos too, by their names in messages."""
    if qkv.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"qk_norm_rope: qkv_PTN has type {qkv.dtype}; allowed are {allowed}")
    if qkv.dim() != 3 or cos.dim() != 3 or num_heads < 1:
        raise ValueError(
            f"qk_norm_rope needs qkv_PTN (P, T, N), cos (T, 1 or H, K/4) and a head; got "
            f"{tuple(qkv.shape)}, {tuple(cos.shape)} and num_heads={num_heads}"
        )
    P, T, N = qkv.shape
    v_width = N - 2 * num_heads * 4 * cos.shape[-1]
    if v_width <= 0 or v_width % num_heads:
        raise ValueError(
            f"qk_norm_rope: {N} columns of qkv_PTN are not {num_heads} heads' queries and keys of "
            f"{4 * cos.shape[-1]} (4 times the tables' columns) and values of one width"
        )
    table_heads = num_heads if cos.shape[1] == num_heads else 1
    shapes = {"qkv_PTN": (P, T, N), "ve_PTD": (P, T, v_width), "ve_gate_PTH": (P, T, num_heads)}
    shapes |= dict.fromkeys(("cos", "sin"), (T, table_heads, cos.shape[-1]))
    for name, x in {"qkv_PTN": qkv, **named, "first_PT": first}.items():
        if x is None:
            continue
        shape, dtype = shapes.get(name, (P, T)), torch.bool if name == "first_PT" else qkv.dtype
        check_tensor(f"qk_norm_rope: {name}", x, shape, dtype, qkv.device, contiguous=False)
    if named["ve_gate_PTH"] is not None and named["ve_PTD"] is None:
        raise ValueError("qk_norm_rope: ve_gate_PTH without ve_PTD: give both or none")


def _run(name: str, backend: str, arguments: tuple) -> None:
    if backend == "cuda":
        getattr(torch.ops.speedrun, name)(*arguments)
    else:
        from speedrun.triton_kernels import qk_norm_rope as kernels

        getattr(kernels, name)(*arguments)


def _fake(qkv, cos, sin, num_heads, *_) -> tuple[Tensor, Tensor, Tensor]:
    P, T, N = qkv.shape
    K = 4 * cos.shape[-1]
    q, k = (qkv.new_empty(P, T, num_heads, K) for _ in range(2))
    return q, k, qkv.new_empty(P, T, num_heads, N // num_heads - 2 * K)


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    out = _fake(*inputs)
    _run("qk_norm_rope_out", backend, (*inputs, *out))
    return out


def _fake_bwd(qkv, cos, sin, num_heads, offset_keys, first, ve, gate, *_):
    """Gradients of qkv, ve and gate; without a gate the last two have no elements."""
    pairs = (qkv, qkv) if gate is None else (ve, gate)
    return qkv.new_empty(qkv.shape), *(x.new_empty(0 if gate is None else x.shape) for x in pairs)


def _bwd(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    dqkv, dve, dgate = _fake_bwd(*inputs)
    own = (None, None) if inputs[7] is None else (dve, dgate)
    _run("qk_norm_rope_bwd_out", backend, (*inputs, dqkv, *own))
    return dqkv, dve, dgate


def _setup_context(ctx, inputs, output) -> None:
    qkv, cos, sin, ctx.num_heads, ctx.offset_keys, first, ve, gate, ctx.backend = inputs
    ctx.adds_ve = ve is not None
    ctx.save_for_backward(qkv, cos, sin, first, None if gate is None else ve, gate)


def _backward(ctx, *grads: Tensor):
    qkv, cos, sin, first, ve, gate = ctx.saved_tensors
    dq, dk, dv = (grad.contiguous() for grad in grads)
    options = (ctx.num_heads, ctx.offset_keys, first, ve, gate)
    dqkv, dve, dgate = torch.ops.speedrun.qk_norm_rope_bwd(
        qkv, cos, sin, *options, dq, dk, dv, ctx.backend
    )
    if gate is None:
        dve, dgate = dv.flatten(-2) if ctx.adds_ve else None, None
    return dqkv, None, None, None, None, None, dve, dgate, None


_INPUTS = (
    "Tensor qkv, Tensor cos, Tensor sin, int num_heads, bool offset_keys, Tensor? first, "
    "Tensor? ve, Tensor? ve_gate"
)
_GRADS = "Tensor dq, Tensor dk, Tensor dv"
# The raw kernels: _C implements them for CUDA.
define(
    f"qk_norm_rope_out({_INPUTS}, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.qk_norm_rope_out,
)
define(
    f"qk_norm_rope_bwd_out({_INPUTS}, {_GRADS}, Tensor(a!) dqkv, Tensor(b!)? dve, "
    "Tensor(c!)? dve_gate) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.qk_norm_rope_bwd_out,
)
define(
    f"qk_norm_rope({_INPUTS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    python=_forward,
)
define(
    f"qk_norm_rope_bwd({_INPUTS}, {_GRADS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    python=_bwd,
)
define_gradient("qk_norm_rope", _backward, _setup_context)
