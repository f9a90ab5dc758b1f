"""Triton version of `attention_epilogue`: a launch forward, a launch backward.

A row is one head of one token; a program has ROWS of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.triton_kernels._fp8 import (
    bytes_of,
    casts_in_software,
    fp8_bits,
    max_bits,
    round_to_bf16,
    store_rounded,
    to_float,
)

NUM_WARPS = 4
ROWS = 32  # of 128 numbers: 32 a thread, in pieces of 16 bytes
MIN_SQUARE = 1e-8  # as in the reference, which this may not import


@triton.jit
def _tanh(x):
    """Within some ulps of float32: near 0 by the polynomial of Cephes' tanhf, since the other
    formula cancels there."""
    square = x * x
    p = -5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, 2 / (1 + tl.exp(-2 * x)) - 1)


@triton.jit
def _by_row(ptr, row, valid, H: tl.constexpr, token_stride, head_stride, SOFTWARE: tl.constexpr):
    """Float32 of a gate (T, H) of any layout."""
    ptrs = ptr + (row // H).to(tl.int64) * token_stride + row % H * head_stride
    return to_float(tl.load(ptrs, mask=valid, other=0.0), SOFTWARE)


@triton.jit
def attention_epilogue_kernel(
    y_ptr,
    v_ptr,
    xsa_ptr,
    gate_ptr,
    scale_ptr,
    out_ptr,
    out_f8_ptr,
    amax_ptr,
    num_rows,
    xsa_token_stride,
    xsa_head_stride,
    gate_token_stride,
    gate_head_stride,
    min_square,
    H: tl.constexpr,
    E: tl.constexpr,
    SOFTWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out like y (num_rows, E), and e4m3 bytes out_f8 of out / scale, with amax () raised.

    None: v with α (xsa), gate, the copy. amax points to the bits of a float32 that isn't negative.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    valid = row < num_rows
    mask = valid[:, None] & (col[None, :] < E)
    at = row.to(tl.int64)[:, None] * E + col[None, :]
    y = to_float(tl.load(y_ptr + at, mask=mask, other=0.0), SOFTWARE)
    if xsa_ptr is not None:
        v = to_float(tl.load(v_ptr + at, mask=mask, other=0.0), SOFTWARE)
        alpha = _by_row(xsa_ptr, row, valid, H, xsa_token_stride, xsa_head_stride, SOFTWARE)
        share = tl.sum(y * v, axis=1) / tl.maximum(tl.sum(v * v, axis=1), min_square)
        y -= (_tanh(alpha) * share)[:, None] * v
    if gate_ptr is not None:
        gate = _by_row(gate_ptr, row, valid, H, gate_token_stride, gate_head_stride, SOFTWARE)
        y *= gate[:, None]
    store_rounded(out_ptr + at, y, mask, SOFTWARE)
    if out_f8_ptr is not None:
        if out_ptr.dtype.element_ty == tl.bfloat16:
            y = to_float(round_to_bf16(y, SOFTWARE), SOFTWARE)
        else:
            y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.atomic_max(amax_ptr, max_bits(y))
        code = fp8_bits(tl.div_rn(y, tl.load(scale_ptr)), 3, SOFTWARE)
        tl.store(out_f8_ptr + at, code, mask=mask)


@triton.jit
def attention_epilogue_bwd_kernel(
    y_ptr,
    v_ptr,
    xsa_ptr,
    gate_ptr,
    grad_ptr,
    dy_ptr,
    dv_ptr,
    dxsa_ptr,
    dgate_ptr,
    num_rows,
    xsa_token_stride,
    xsa_head_stride,
    gate_token_stride,
    gate_head_stride,
    min_square,
    H: tl.constexpr,
    E: tl.constexpr,
    SOFTWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dy, dv (num_rows, E), dα and dgate (num_rows,), with the reference's names and formulas."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    valid = row < num_rows
    mask = valid[:, None] & (col[None, :] < E)
    at = row.to(tl.int64)[:, None] * E + col[None, :]
    z = to_float(tl.load(y_ptr + at, mask=mask, other=0.0), SOFTWARE)
    grad = to_float(tl.load(grad_ptr + at, mask=mask, other=0.0), SOFTWARE)
    g = grad
    if gate_ptr is not None:
        gate = _by_row(gate_ptr, row, valid, H, gate_token_stride, gate_head_stride, SOFTWARE)
        g = grad * gate[:, None]
    if xsa_ptr is not None:
        y = z
        v = to_float(tl.load(v_ptr + at, mask=mask, other=0.0), SOFTWARE)
        alpha = _by_row(xsa_ptr, row, valid, H, xsa_token_stride, xsa_head_stride, SOFTWARE)
        tau = _tanh(alpha)
        square = tl.sum(v * v, axis=1)
        n = tl.maximum(square, min_square)
        s = tl.sum(y * v, axis=1) / n
        inner = tl.sum(g * v, axis=1)
        z = y - (tau * s)[:, None] * v
        store_rounded(dxsa_ptr + row, (tau * tau - 1) * s * inner, valid, SOFTWARE)
        b = (tau * inner / n)[:, None]
        twice = tl.where(square < min_square, 0.0, 2 * s)[:, None]
        dv = -(tau * s)[:, None] * g - b * (y - twice * v)
        store_rounded(dv_ptr + at, dv, mask, SOFTWARE)
        store_rounded(dy_ptr + at, g - b * v, mask, SOFTWARE)
    else:
        store_rounded(dy_ptr + at, g, mask, SOFTWARE)
    if gate_ptr is not None:
        store_rounded(dgate_ptr + row, tl.sum(grad * z, axis=1), valid, SOFTWARE)


def _launch(kernel, tensors, y: Tensor, xsa: Tensor | None, gate: Tensor | None) -> None:
    num_tokens, H, E = y.shape
    num_rows = num_tokens * H
    if y.numel() == 0:
        return
    strides = [s for x in (xsa, gate) for s in ((0, 0) if x is None else x.stride())]
    with torch.cuda.device_of(y):  # a launch goes to the current device
        kernel[(triton.cdiv(num_rows, ROWS),)](
            *tensors,
            num_rows,
            *strides,
            MIN_SQUARE,
            H=H,
            E=E,
            SOFTWARE=casts_in_software(y.device),
            ROWS=ROWS,
            BLOCK=triton.next_power_of_2(E),
            num_warps=NUM_WARPS,
        )


def attention_epilogue_out(y, v, xsa, gate, scale, out, out_f8, amax) -> None:
    """y and v (T, H, E) contiguous, α and gate (T, H); see ops/attention_epilogue.py."""
    amax = None if amax is None else amax.view(torch.int32)
    tensors = (y, v, xsa, gate, scale, out, bytes_of(out_f8), amax)
    _launch(attention_epilogue_kernel, tensors, y, xsa, gate)


def attention_epilogue_bwd_out(y, v, xsa, gate, grad, dy, dv, dxsa, dgate) -> None:
    """Gradients where that of the result is `grad`, contiguous; None for what isn't there."""
    tensors = (y, v, xsa, gate, grad, dy, dv, dxsa, dgate)
    _launch(attention_epilogue_bwd_kernel, tensors, y, xsa, gate)


def static_variants():
    """What benchmarks/static_check.py compiles: layers of the record (README: format)."""
    scalars = {"num_rows": "i32:16", "min_square": "fp32"}
    scalars |= {f"{g}_{s}_stride": "i32" for g in ("xsa", "gate") for s in ("token", "head")}
    xsa, gate = ("v", "xsa", "dv", "dxsa"), ("gate", "dgate")
    forward = ("y", "v", "xsa", "gate", "scale", "out", "out_f8", "amax")
    backward = ("y", "v", "xsa", "gate", "grad", "dy", "dv", "dxsa", "dgate")
    types = {"scale": "fp32", "out_f8": "u8", "amax": "i32"}
    for name, dtype, absent in (
        ("bf16 xsa", "bf16", gate),
        ("bf16 gate", "bf16", xsa),
        ("bf16 xsa and gate", "bf16", ()),
        ("fp32 xsa and gate", "fp32", ()),
    ):
        for what, kernel, names in (
            ("forward", attention_epilogue_kernel, forward[:6]),
            ("forward fp8", attention_epilogue_kernel, forward),
            ("backward", attention_epilogue_bwd_kernel, backward),
        ):
            every = backward if what == "backward" else forward
            gone = [n for n in every if n in absent or n not in names]
            gone += ["scale"] if what == "forward" else []
            signature = {f"{n}_ptr": f"*{types.get(n, dtype)}:16" for n in every if n not in gone}
            constexprs = {f"{n}_ptr": None for n in gone}
            constexprs |= {"H": 6, "E": 128, "SOFTWARE": False, "ROWS": ROWS, "BLOCK": 128}
            yield (
                f"{what} {name}",
                kernel,
                signature | scalars,
                constexprs,
                {"num_warps": NUM_WARPS},
            )
