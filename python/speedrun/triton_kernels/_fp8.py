"""Conversions of FP8 and bf16 for all Triton kernels, on a GPU and in Triton's interpreter.

SOFTWARE, in all of them: in integer arithmetic. Triton's own casts are wrong in its interpreter
(FP8: ties away from zero, lost carries, no saturation; bf16: cut off, subnormal numbers lost), go
to FP8 by way of fp16 for sm_89 (Triton 3.6), and there is no FP8 before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def interprets() -> bool:
    """Whether kernels run in the interpreter."""
    return triton.knobs.runtime.interpret


def casts_in_software(device: torch.device) -> bool:
    """The value of SOFTWARE for kernels that write FP8 on `device`: True before sm_90."""
    if interprets() or device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) < (9, 0)


@triton.jit
def to_float(x, SOFTWARE: tl.constexpr):
    """float32 of 16 or 32 bits."""
    if SOFTWARE and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_to_bf16(x, SOFTWARE: tl.constexpr):
    """Nearest bf16 of float32, ties to even."""
    if SOFTWARE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest, bits | 0x400000)  # NaN stays NaN
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def round_as(x, DTYPE: tl.constexpr, SOFTWARE: tl.constexpr):
    """float32 as a type of 16 or 32 bits, rounded to nearest even."""
    if DTYPE == tl.bfloat16:
        x = round_to_bf16(x, SOFTWARE)
    return x.to(DTYPE)


@triton.jit
def store_rounded(ptrs, x, mask, SOFTWARE: tl.constexpr):
    """float32 x, rounded once to the tensor's type, fp16, bf16 or fp32."""
    tl.store(ptrs, round_as(x, ptrs.dtype.element_ty, SOFTWARE), mask=mask)


@triton.jit
def fp8_bits(x, MANTISSA: tl.constexpr, SOFTWARE: tl.constexpr):
    """Bytes of the fp8 numbers (3 bits of mantissa: e4m3fn, 2: e5m2) nearest to float32 x.

    Ties to even, saturating, NaN kept.
    """
    if SOFTWARE:
        BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
        SHIFT: tl.constexpr = 23 - MANTISSA
        LARGEST: tl.constexpr = 0x43E00000 if MANTISSA == 3 else 0x47600000  # 448, 57344
        SMALLEST_NORMAL: tl.constexpr = (128 - BIAS) << 23
        # A float32 whose last bit weighs as much as the smallest subnormal.
        ROUNDER: tl.constexpr = (151 - BIAS - MANTISSA) << 23
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        clamped = tl.minimum(magnitude, LARGEST)
        half = (1 << (SHIFT - 1)) - 1 + ((clamped >> SHIFT) & 1)
        normal = ((clamped + half) >> SHIFT) - ((127 - BIAS) << MANTISSA)
        rounder = tl.full(x.shape, ROUNDER, tl.uint32)
        total = clamped.to(tl.float32, bitcast=True) + rounder.to(tl.float32, bitcast=True)
        subnormal = total.to(tl.uint32, bitcast=True) - rounder
        code = tl.where(clamped < SMALLEST_NORMAL, subnormal, normal)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:  # cvt.rn.satfinite: one instruction for two numbers
        if MANTISSA == 3:
            code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def round_to_fp8(x, DTYPE: tl.constexpr, SOFTWARE: tl.constexpr):
    """`x` float32 as `DTYPE`, tl.float8e4nv or tl.float8e5: see fp8_bits."""
    MANTISSA: tl.constexpr = 2 if DTYPE == tl.float8e5 else 3
    return fp8_bits(x, MANTISSA, SOFTWARE).to(DTYPE, bitcast=True)


@triton.jit
def max_bits(x):
    """Greatest |x| of a tile as the bits of a float32, NaN above all: integers keep that order."""
    return tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)


@triton.jit
def store_codes(code, out_ptr, out_t_ptr, offset, row, col, rows, cols):
    """A tile into a matrix (rows, cols) at `offset` and into its transpose; both may be None."""
    if out_ptr is not None:
        mask = (row[:, None] < rows) & (col[None, :] < cols)
        tl.store(out_ptr + offset + row[:, None] * cols + col[None, :], code, mask=mask)
    if out_t_ptr is not None:
        mask = (col[:, None] < cols) & (row[None, :] < rows)
        ptrs = out_t_ptr + offset + col[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(ptrs, tl.trans(code), mask=mask)


def bytes_of(codes: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 as uint8, which is what kernels write."""
    return None if codes is None else codes.view(torch.uint8)
