"""Front doors of `attention_epilogue`: XSA and the attention gate, with or without an fp8 copy.

T tokens, H heads, E head dim of the values. Un-pairing heads (`unpair_heads`) costs nothing before
it: of contiguous tensors it is a view.

Accepted: float16, bfloat16, float32, float64 (float64 on the torch backend alone), one type for all
tensors. y and v are copied first where they aren't contiguous; α and gate may have any layout.

Errors: TypeError for another type, ValueError for another shape or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._checks import check_tensor
from speedrun.ops._dispatch import choose
from speedrun.ops._library import define, define_gradient
from speedrun.reference import attention_epilogue as reference

__all__ = ["attention_epilogue", "attention_epilogue_fp8"]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def attention_epilogue(
    y_THE: Tensor, v_THE: Tensor, xsa_TH: Tensor | None = None, gate_TH: Tensor | None = None
) -> Tensor:
    """(..., T, H, E) gate·(y − tanh(α)·(⟨y, v⟩ / max(|v|², 1e−8))·v), `xsa_TH` holding α.

    xsa_TH and gate_TH (..., T, H); None leaves a part out; without both the result is y itself.
    float16, bfloat16, float32 or float64, one type for all; computed in at least float32, rounded
    once. Differentiable in all four. TypeError: another type; ValueError: another shape or device.
    Source: exclusive self-attention (arXiv 2603.09078) and head gates, as record 089 has them.
    """
    _check("attention_epilogue", y_THE, v_THE, xsa_TH, gate_TH)
    if xsa_TH is None and gate_TH is None:
        return y_THE
    backend = _choose(y_THE)
    if backend == "torch":
        return reference.attention_epilogue(y_THE, v_THE, xsa_TH, gate_TH)
    return _call(y_THE, v_THE, xsa_TH, gate_TH, None, backend)[0]


def attention_epilogue_fp8(
    y_THE: Tensor,
    v_THE: Tensor,
    scale: Tensor,
    xsa_TH: Tensor | None = None,
    gate_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, out_f8 like it, () float32 max|out|): `attention_epilogue`, and out / scale in e4m3.

    `scale`: a float32 tensor (), such as `delayed_scale` of an earlier max. The copy
    is made of out as it was rounded, as `fp8_quantize` makes it. Only out has a gradient. Shapes,
    types, errors (TypeError, ValueError) and source as for `attention_epilogue`.
    """
    _check("attention_epilogue_fp8", y_THE, v_THE, xsa_TH, gate_TH)
    check_tensor("attention_epilogue_fp8: scale", scale, (), torch.float32, y_THE.device)
    backend = _choose(y_THE)
    if backend == "torch":
        return reference.attention_epilogue_fp8(y_THE, v_THE, xsa_TH, gate_TH, scale.detach())
    return _call(y_THE, v_THE, xsa_TH, gate_TH, scale.detach(), backend)


def _choose(y: Tensor) -> str:
    """CUDA's kernel has a row of up to 128 numbers in half a warp, in groups of 8."""
    has_kernel = y.dtype in KERNEL_DTYPES
    E = y.shape[-1]
    cuda_kernel = "attention_epilogue_out" if has_kernel and E % 8 == 0 and E <= 128 else ""
    return choose("attention_epilogue", y.device, cuda_kernel=cuda_kernel, triton=has_kernel)


def _call(y, v, xsa, gate, scale, backend) -> tuple[Tensor, Tensor, Tensor]:
    """The operator takes one dimension of tokens, and v only for XSA."""
    rows, values = (x.flatten(0, -3).contiguous() for x in (y, v))
    by_token = [None if x is None else x.flatten(0, -2) for x in (xsa, gate)]
    out, out_f8, amax = torch.ops.speedrun.attention_epilogue(
        rows, None if xsa is None else values, *by_token, scale, backend
    )
    return out.view(y.shape), out_f8 if scale is None else out_f8.view(y.shape), amax


def _check(op: str, y: Tensor, v: Tensor, xsa: Tensor | None, gate: Tensor | None) -> None:
    if y.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: y_THE has type {y.dtype}; allowed are {allowed}")
    if y.dim() < 3:
        raise ValueError(f"{op}: y_THE must be (..., T, H, E), got {tuple(y.shape)}")
    wanted = {"v_THE": (v, y.shape), "xsa_TH": (xsa, y.shape[:-1]), "gate_TH": (gate, y.shape[:-1])}
    for name, (x, shape) in wanted.items():
        if x is not None:
            check_tensor(f"{op}: {name}", x, shape, y.dtype, y.device, contiguous=False)


def _run(name: str, backend: str, arguments: tuple) -> None:
    if backend == "cuda":
        getattr(torch.ops.speedrun, name)(*arguments)
    else:
        from speedrun.triton_kernels import attention_epilogue as kernels

        getattr(kernels, name)(*arguments)


def _fake(y, v, xsa, gate, scale, backend) -> tuple[Tensor, Tensor, Tensor]:
    """out, and with a scale the copy and its max; else these have no elements."""
    if scale is None:
        return y.new_empty(y.shape), y.new_empty(0), y.new_empty(0)
    amax = y.new_zeros((), dtype=torch.float32)
    return y.new_empty(y.shape), y.new_empty(y.shape, dtype=reference.E4M3), amax


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    out, out_f8, amax = _fake(*arguments)
    copy = (None, None) if inputs[4] is None else (out_f8, amax)
    _run("attention_epilogue_out", backend, (*inputs, out, *copy))
    return out, out_f8, amax


def _fake_bwd(y, v, xsa, gate, grad, backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, v, α and gate; of what isn't there without elements."""
    return tuple(y.new_empty(0 if x is None else x.shape) for x in (y, v, xsa, gate))


def _bwd(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    grads = _fake_bwd(*arguments)
    wanted = (None if x is None else g for x, g in zip(inputs, grads, strict=False))
    _run("attention_epilogue_bwd_out", backend, (*inputs, *wanted))
    return grads


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # nobody reads zeros for the copy
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor, *of_copy):
    tensors = ctx.saved_tensors
    grads = torch.ops.speedrun.attention_epilogue_bwd(*tensors, grad.contiguous(), ctx.backend)
    found = (None if x is None else g for x, g in zip(tensors, grads, strict=True))
    return *found, None, None


_INPUTS = "Tensor y, Tensor? v, Tensor? xsa, Tensor? gate"
# The raw kernels: _C implements them for CUDA.
define(
    f"attention_epilogue_out({_INPUTS}, Tensor? scale, Tensor(a!) out, Tensor(b!)? out_f8, "
    "Tensor(c!)? amax) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.attention_epilogue_out,
)
define(
    f"attention_epilogue_bwd_out({_INPUTS}, Tensor grad, Tensor(a!) dy, Tensor(b!)? dv, "
    "Tensor(c!)? dxsa, Tensor(d!)? dgate) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.attention_epilogue_bwd_out,
)
define(
    f"attention_epilogue({_INPUTS}, Tensor? scale, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    python=_forward,
)
define(
    f"attention_epilogue_bwd({_INPUTS}, Tensor grad, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    python=_bwd,
)
define_gradient("attention_epilogue", _backward, _setup_context)
