"""Operators: one front door per file, with its schema, fake implementation and gradient."""

from speedrun.ops._dispatch import backends_used, use_backend
from speedrun.ops.adam_step import AdamTensor, adam_step
from speedrun.ops.fp8_linear import Fp8Weight, fp8_linear
from speedrun.ops.fp8_matmul import (
    fp8_matmul,
    fp8_matmul_add_,
    fp8_matmul_drelu2,
    fp8_matmul_relu2,
)
from speedrun.ops.fp8_quantize import (
    delayed_scale,
    fp8_quantize,
    fp8_quantize_current,
    refresh_mlp_weights,
    rms_norm_fp8_quantize,
)
from speedrun.ops.head_loss import Fp8Head, head_loss, quantize_head
from speedrun.ops.polar_express import PolarExpress, momentum_polar_express, polar_express
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms, relu2_mlp
from speedrun.ops.softcap_ce import softcap_ce, softcap_ce_fp8
from speedrun.ops.sym_matmul import sym_matmul
from speedrun.ops.transpose import transpose, transpose_add_

__all__ = [
    "AdamTensor",
    "Fp8Head",
    "Fp8Layer",
    "Fp8Weight",
    "Gemms",
    "PolarExpress",
    "adam_step",
    "backends_used",
    "delayed_scale",
    "fp8_linear",
    "fp8_matmul",
    "fp8_matmul_add_",
    "fp8_matmul_drelu2",
    "fp8_matmul_relu2",
    "fp8_quantize",
    "fp8_quantize_current",
    "head_loss",
    "momentum_polar_express",
    "polar_express",
    "quantize_head",
    "refresh_mlp_weights",
    "relu2_mlp",
    "rms_norm_fp8_quantize",
    "softcap_ce",
    "softcap_ce_fp8",
    "sym_matmul",
    "transpose",
    "transpose_add_",
    "use_backend",
]
