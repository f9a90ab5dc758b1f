"""Operators: one front door per file, with its schema, fake implementation and gradient.

They take tensors of any device: on a GPU the kernel that has passed its tests there serves, on a
CPU, and wherever there is none, plain PyTorch; `use_backend` chooses, `backends_used` tells.
help(name) has shapes, types, errors and the source.

    attention        plan_attention, attention; plan_dc_attention, dc_attention; qk_norm_rope before
                     it, attention_epilogue and attention_epilogue_fp8 behind it
    MLP and head     relu2_mlp; softcap_ce, and softcap_ce_fp8 with the gradient; head_loss with the
                     product before it, quantize_head
    residual stream  residual_mix, residual_mix_norm
    FP8              fp8_quantize, fp8_quantize_current, rms_norm_fp8_quantize, delayed_scale,
                     refresh_mlp_weights; fp8_matmul, fp8_matmul_add_, fp8_matmul_relu2,
                     fp8_matmul_drelu2, fp8_linear
    optimizers       polar_express, momentum_polar_express, normuon_step, adam_step, adamw_step (as
                     a torch.optim.Optimizer: speedrun.optim.NorMuon)
    matrices         sym_matmul, transpose, transpose_add_
    their arguments  AdamTensor, Fp8Head, Fp8Layer, Fp8Weight, Gemms, PolarExpress
"""

from speedrun.ops._dispatch import backends_used, use_backend
from speedrun.ops.adam_step import AdamTensor, adam_step, adamw_step
from speedrun.ops.attention import attention, plan_attention
from speedrun.ops.attention_epilogue import attention_epilogue, attention_epilogue_fp8
from speedrun.ops.dc_attention import dc_attention, plan_dc_attention
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
from speedrun.ops.normuon_step import normuon_step
from speedrun.ops.polar_express import PolarExpress, momentum_polar_express, polar_express
from speedrun.ops.qk_norm_rope import qk_norm_rope
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms, relu2_mlp
from speedrun.ops.residual_mix import residual_mix, residual_mix_norm
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
    "adamw_step",
    "attention",
    "attention_epilogue",
    "attention_epilogue_fp8",
    "backends_used",
    "dc_attention",
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
    "normuon_step",
    "plan_attention",
    "plan_dc_attention",
    "polar_express",
    "qk_norm_rope",
    "quantize_head",
    "refresh_mlp_weights",
    "relu2_mlp",
    "residual_mix",
    "residual_mix_norm",
    "rms_norm_fp8_quantize",
    "softcap_ce",
    "softcap_ce_fp8",
    "sym_matmul",
    "transpose",
    "transpose_add_",
    "use_backend",
]
