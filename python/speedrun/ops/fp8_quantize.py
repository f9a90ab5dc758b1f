"""Front door of `fp8_quantize`: casts to fp8 with a scale, so that the real value is fp8 * scale.

fp8 = x / scale, the quotient in float32 and rounded once to nearest even; beyond the type's
largest number that one, and NaN stays NaN (its sign is free). All backends give the same bytes;
only where Inductor fuses the torch backend's cast with what makes x, it leaves x's own rounding
out. `scale` is a float32 tensor of one element on x's device: nothing waits for the GPU.

Accepted: 2-D (M, N) or 3-D (B, M, N) of float16, bfloat16 or float32 with a contiguous last
dimension; row and batch strides are free. Outputs are contiguous. Nothing here has a gradient: the
results are detached, and the autograd functions that use them (relu2_mlp, softcap_ce) know theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define
from speedrun.reference import fp8_quantize as reference
from speedrun.reference.fp8_quantize import POST_HEADROOM, MlpWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3 = torch.float8_e4m3fn


def fp8_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = E4M3,
    transposed: bool = False,
    amax: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x_f8 like x, its transpose (N, M) or None, () float32 max|x| or None), in one read of x.

    x (M, N) or (B, M, N) in float16, bfloat16 or float32; scale: a float32 tensor of one element.
    x_f8 is x / scale, clamped, to nearest even, in dtype: float8_e4m3fn or float8_e5m2. Results
    have no gradient.
    TypeError: another type; ValueError: another number of dimensions or layout, a scale of more
    than one element or on another device.
    Source: FP8 formats (arXiv 2209.05433), scaled as by the NanoGPT speedrun's record 089.
    """
    _check(x, scale, dtype)
    x, scale = x.detach(), scale.detach()
    backend = choose("fp8_quantize", x.device, cuda_kernel="fp8_quantize_out", triton=True)
    if backend == "torch":
        return reference.fp8_quantize(x, scale, dtype, transposed, amax)
    out, out_t = _empty(x, dtype), _empty(x.mT, dtype) if transposed else None
    found = x.new_zeros((), dtype=torch.float32) if amax else None
    torch.ops.speedrun.fp8_quantize(x, scale, out, out_t, found, backend)
    return out, out_t, found


def fp8_quantize_current(
    x: Tensor, *, dtype: torch.dtype = E4M3, margin: float = 1.0, transposed: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x_f8, its transpose or None, () scale) by x's own amax: max(amax, 1e-12) * margin / largest.

    x (M, N) or (B, M, N). Reads x twice. Types, errors (TypeError, ValueError) and source as for
    `fp8_quantize`.
    """
    _check(x, None, dtype)
    scale = reference.scale_of(reference.max_abs(x.detach()), margin, dtype)
    out, out_t, _ = fp8_quantize(x, scale, dtype=dtype, transposed=transposed)
    return out, out_t, scale


def delayed_scale(
    amax: Tensor, *, headroom: float = POST_HEADROOM, dtype: torch.dtype = E4M3
) -> Tensor:
    """The scale (float32, like `amax`) for values that an earlier `amax` foretells.

    amax of any shape, such as (L,). max(amax, 1e-12) * headroom / largest of dtype; headroom 1.80
    is the record's for the MLP's activations. TypeError: another type. Source: delayed scaling of
    Transformer Engine, with the last amax alone.
    """
    if dtype not in FP8_DTYPES or amax.dtype != torch.float32:
        raise TypeError(f"delayed_scale: wants float32 and an fp8 type, got {amax.dtype}, {dtype}")
    return reference.scale_of(amax.detach(), headroom, dtype)


def rms_norm_fp8_quantize(
    x: Tensor, scale: Tensor, *, keep: bool = False, transposed: bool = False, eps: float = 2**-23
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(y bf16 or None, x_f8 e4m3, its transpose or None), y the RMS norm of x's last dimension.

    y is computed in float32 and rounded to bf16, then quantised. |y| is at most sqrt(N), so a scale
    of sqrt(N) / 448 fits always, without a pass for the amax. x (M, N) or (B, M, N); types, errors
    (TypeError, ValueError) and source as for `fp8_quantize`; the norm: arXiv 1910.07467.
    """
    _check(x, scale, E4M3)
    x, scale = x.detach(), scale.detach()
    kernel = "rms_norm_fp8_quantize_out"
    backend = choose("fp8_quantize", x.device, cuda_kernel=kernel, triton=True)
    if backend == "torch" and not torch.compiler.is_compiling():  # Inductor: see _implementation
        return reference.rms_norm_fp8_quantize(x, scale, eps, keep, transposed)
    y = _empty(x, torch.bfloat16) if keep else None
    out, out_t = _empty(x, E4M3), _empty(x.mT, E4M3) if transposed else None
    torch.ops.speedrun.rms_norm_fp8_quantize(x, scale, eps, y, out, out_t, backend)
    return y, out, out_t


def refresh_mlp_weights(
    mlp_bank: Tensor,
    down_amax: Tensor,
    headroom: bool,
    *,
    up_t: bool = False,
    down_row: bool = False,
) -> MlpWeights:
    """The fp8 weights of all L layers after an optimizer step, in one launch (RECIPE section 3).

    mlp_bank (2L, F, D) bf16 contiguous: up, down, up, down, ...; down_amax (L,) float32: the
    `down_amax` of the refresh before, read only with `headroom` (the record: from step 17 on).
    up_t, down_row: whether to make the optional copies too. TypeError, ValueError: another type,
    shape or layout. Source: the MLP of the NanoGPT speedrun's record 089.
    """
    if mlp_bank.dtype != torch.bfloat16 or down_amax.dtype != torch.float32:
        raise TypeError(
            f"refresh_mlp_weights: mlp_bank must be bfloat16 and down_amax float32, got "
            f"{mlp_bank.dtype} and {down_amax.dtype}"
        )
    shape = tuple(mlp_bank.shape)
    if len(shape) != 3 or shape[0] % 2 or not mlp_bank.is_contiguous():
        raise ValueError(
            f"refresh_mlp_weights: mlp_bank must be (2L, F, D) and contiguous, got {shape} with "
            f"strides {mlp_bank.stride()}"
        )
    num_layers = shape[0] // 2
    if tuple(down_amax.shape) != (num_layers,) or down_amax.device != mlp_bank.device:
        raise ValueError(
            f"refresh_mlp_weights: down_amax must be ({num_layers},) on {mlp_bank.device}, got "
            f"{tuple(down_amax.shape)} on {down_amax.device}"
        )
    if mlp_bank.numel() == 0:
        raise ValueError(f"refresh_mlp_weights: mlp_bank has no elements: {shape}")
    bank, old_amax = mlp_bank.detach(), down_amax.detach().contiguous()
    backend = choose("fp8_quantize", bank.device, cuda_kernel="fp8_refresh_out", triton=True)
    if backend == "torch" and not torch.compiler.is_compiling():
        return reference.refresh_mlp_weights(bank, old_amax, headroom, up_t, down_row)
    half = bank[:num_layers]
    up, up_copy = _empty(half, E4M3), _empty(half.mT, E4M3) if up_t else None
    down_copy, down = _empty(half, E4M3) if down_row else None, _empty(half.mT, E4M3)
    scales, amax = old_amax.new_empty(2, num_layers), old_amax.new_zeros(2, num_layers)
    progress = torch.zeros(1 + 2 * num_layers, dtype=torch.int32, device=bank.device)
    torch.ops.speedrun.fp8_refresh(
        bank, old_amax, headroom, up, up_copy, down_copy, down, scales, amax, progress, backend
    )
    return MlpWeights(up, up_copy, scales[0], down_copy, down, scales[1], amax[1])


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _check(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"fp8_quantize: x has type {x.dtype}; allowed are {allowed}")
    if dtype not in FP8_DTYPES:
        raise TypeError(
            f"fp8_quantize: dtype is {dtype}; allowed are float8_e4m3fn and float8_e5m2"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"fp8_quantize: x must be (M, N) or (B, M, N), got {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"fp8_quantize: the last dimension of x must be contiguous, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}; call x.contiguous() first"
        )
    if scale is None:
        return
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        what = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"fp8_quantize: scale must be a float32 tensor, got {what}")
    if scale.numel() != 1 or scale.dim() > 1 or scale.device != x.device:
        raise ValueError(
            f"fp8_quantize: scale must have one element on {x.device}, got shape "
            f"{tuple(scale.shape)} on {scale.device}"
        )


def _implementation(name: str):
    """Runs kernel `<name>` of the backend that is the last argument.

    Compiled code comes here for the reference too where it rounds to bf16 on the way: Inductor
    leaves such a rounding out if it sees it.
    """

    def run(*arguments):
        *arguments, backend = arguments
        if backend == "cuda":
            getattr(torch.ops.speedrun, f"{name}_out")(*arguments)
        elif backend == "triton":
            from speedrun.triton_kernels import fp8_quantize as kernels

            getattr(kernels, f"{name}_out")(*arguments)
        else:
            getattr(reference, f"{name}_out")(*arguments)

    return run


# Each twice: the raw kernel, which _C implements for CUDA, and the choice of a backend before it.
for _name, _arguments in {
    "fp8_quantize": "Tensor x, Tensor scale, Tensor(a!) out, Tensor(b!)? out_t, Tensor(c!)? amax",
    "rms_norm_fp8_quantize": "Tensor x, Tensor scale, float eps, Tensor(a!)? y, Tensor(b!) out, "
    "Tensor(c!)? out_t",
    "fp8_refresh": "Tensor bank, Tensor down_amax, bool headroom, Tensor(a!) up, Tensor(b!)? up_t, "
    "Tensor(c!)? down, Tensor(d!) down_t, Tensor(e!) scales, Tensor(f!) amax, Tensor(g!) progress",
}.items():
    define(
        f"{_name}_out({_arguments}) -> ()",
        fake=lambda *arguments: None,
        cpu=getattr(reference, f"{_name}_out"),
    )
    define(
        f"{_name}({_arguments}, str backend) -> ()",
        fake=lambda *arguments: None,
        python=_implementation(_name),
    )
