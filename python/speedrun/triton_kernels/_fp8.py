"""Rounding to FP8 and bf16 for all Triton kernels, on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


def interprets() -> bool:
    """Whether kernels run in the interpreter: the value of their SOFTWARE argument."""
    return triton.knobs.runtime.interpret


@triton.jit
def round_to_fp8(x, DTYPE: tl.constexpr, SOFTWARE: tl.constexpr):
    """`x` float32 as `DTYPE`, tl.float8e4nv or tl.float8e5: to nearest even, saturating, NaN kept.

    SOFTWARE: in integer arithmetic. The interpreter's own cast rounds ties away from zero, loses
    carries and does not saturate. The hardware's is one instruction for two numbers (sm_89 on).
    """
    if SOFTWARE:
        if DTYPE == tl.float8e5:
            LARGEST: tl.constexpr = 57344.0
            DROPPED: tl.constexpr = 21  # bits of the mantissa
            BIAS_CHANGE: tl.constexpr = 112
            MIN_NORMAL: tl.constexpr = 0.00006103515625  # 2^-14
            TO_UNITS: tl.constexpr = 128.0  # its ulp is the smallest subnormal, 2^-16
        else:
            LARGEST: tl.constexpr = 448.0
            DROPPED: tl.constexpr = 20
            BIAS_CHANGE: tl.constexpr = 120
            MIN_NORMAL: tl.constexpr = 0.015625  # 2^-6
            TO_UNITS: tl.constexpr = 16384.0  # 2^-9
        size = tl.minimum(tl.abs(x), LARGEST)
        bits = size.to(tl.int32, bitcast=True)
        bits += ((bits >> DROPPED) & 1) + ((1 << (DROPPED - 1)) - 1)
        normal = (bits >> DROPPED) - (BIAS_CHANGE << (23 - DROPPED))
        units = tl.full(x.shape, TO_UNITS, tl.float32)
        subnormal = (size + units).to(tl.int32, bitcast=True) - units.to(tl.int32, bitcast=True)
        code = tl.where(size < MIN_NORMAL, subnormal, normal)
        code = tl.where(x != x, 0x7F, code)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (code | sign).to(tl.uint8).to(DTYPE, bitcast=True)
    return x.to(DTYPE)  # cvt.rn.satfinite


@triton.jit
def round_to_bf16(x, SOFTWARE: tl.constexpr):
    """`x` float32 as bf16, to nearest even. The interpreter's own cast cuts off (SOFTWARE)."""
    if SOFTWARE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, 0x7FC00000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)
