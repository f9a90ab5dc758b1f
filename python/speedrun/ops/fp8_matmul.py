"""Front doors of `fp8_matmul`: products of FP8 matrices, and what is fused behind them.

s = A·Bᵀ·scale_a·scale_b with A (M, K) and B (N, K), each e4m3 or e5m2, K contiguous ("K-major");
row strides are free. An FP8 number is its byte times a scale; scales are float32 tensors of one
element on the device of the operands, so that nothing waits for the host. FP8 results are
quantised(x, scale): x / scale clamped to the type's largest value, to nearest even, NaN kept.

Sums are in float32. `fast_accum` allows the tensor cores' own sums of about 14 bits throughout;
without it they are added up in float32 every 128 of K. All but fp8_matmul_add_ give the same bits
in every run. No gradients: FP8 tensors are somebody's rounded copies, and theirs are the gradients.

Errors: TypeError for a wrong type, ValueError for a wrong shape, layout or device, RuntimeError for
tensors that ask for gradients; each says what was expected. M, N and K may be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._hopper import has_e4m3, is_aligned, is_hopper
from speedrun.ops._library import define
from speedrun.reference import fp8_matmul as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = (E4M3, E5M2)
BF16, FP32 = torch.bfloat16, torch.float32
OUT_DTYPES = (BF16, FP32, *FP8)

# What speedrun._C is compiled for: kTable of csrc/kernels/fp8_matmul_tiles.h without the tile
# sizes. Types of (a, b, result), and whether only calls that allow fast sums are served.
_CUDA_KERNELS = {
    "store": {(E4M3, E4M3, BF16): False, (E5M2, E4M3, BF16): False, (E4M3, E4M3, E4M3): False},
    "add": {(E4M3, E5M2, FP32): False, (E5M2, E4M3, FP32): False},
    "relu2": {(E4M3, E4M3, E4M3): True},
    "drelu2": {(E5M2, E4M3, BF16): False, (E5M2, E4M3, E5M2): False},
}


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype = BF16,
    fast_accum: bool = False,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """s (M, N) = A·Bᵀ·scale_a·scale_b, in `out_dtype`: bfloat16, float32, or FP8.

    a (M, K) and b (N, K), or (L, M, K) and (L, N, K) for (L, M, N): float8_e4m3fn or float8_e5m2,
    contiguous along K, strides of rows are free. scale_a, scale_b: float32 tensors of one element
    on the same device; a number is its byte times the scale. row_scale (M,) float32: row m is also
    times its element m. out_scale, like scale_a: what an FP8 result is quantised by, which is
    s / out_scale, clamped, to nearest even. fast_accum: sums of about 14 bits, as torch._scaled_mm
    has them; else they are in float32 at least every 128 of K. No gradient.
    TypeError: another type; ValueError: another shape, layout or device, or out_scale without an
    FP8 out_dtype; RuntimeError: tensors that ask for gradients, unless under torch.no_grad().
    Source: torch._scaled_mm, and FP8 of the NanoGPT speedrun's record 089.
    """
    _check_operands("fp8_matmul", a, b, scale_a, scale_b, dims=(2, 3))
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"fp8_matmul: out_dtype must be one of {OUT_DTYPES}, got {out_dtype}")
    if (out_scale is not None) != (out_dtype in FP8):
        raise ValueError("fp8_matmul: out_scale belongs to an FP8 out_dtype, and only to one")
    if out_scale is not None:
        _check_scale("fp8_matmul", out_scale, "out_scale", a)
    if row_scale is not None:
        _check_like("fp8_matmul", row_scale, "row_scale", a.shape[-2:-1], FP32, a)
    _check_no_gradient("fp8_matmul", a, b, scale_a, scale_b, row_scale, out_scale)
    epilogue = "add" if out_dtype == FP32 else "store"
    plain = out_dtype != FP32 or (row_scale is None and a.dim() == 2)
    backend = _choose("fp8_matmul_out" if plain else "", epilogue, a, b, out_dtype, fast_accum)
    return torch.ops.speedrun.fp8_matmul(
        a, b, scale_a, scale_b, row_scale, out_scale, out_dtype, fast_accum, backend
    )


def fp8_matmul_add_(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    fast_accum: bool = False,
) -> Tensor:
    """Adds s (M, N) of `fp8_matmul` to `c` (M, N), float32 and contiguous, in place; returns c.

    On a GPU K may be cut into parts that are added in any order: not the same bits in every run.
    a, b (2-D) and scales as for `fp8_matmul`; errors as for it. Source: weights' gradients in FP8.
    """
    _check_operands("fp8_matmul_add_", a, b, scale_a, scale_b)
    _check_like("fp8_matmul_add_", c, "c", (a.shape[0], b.shape[0]), FP32, a)
    _check_no_gradient("fp8_matmul_add_", a, b, scale_a, scale_b, c)
    backend = _choose("fp8_matmul_out", "add", a, b, FP32, fast_accum, c)
    torch.ops.speedrun.fp8_matmul_add_(c, a, b, scale_a, scale_b, fast_accum, backend)
    return c


def fp8_matmul_relu2(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    post_scale: Tensor,
    keep_post: bool = True,
    transposed: bool = False,
    fast_accum: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """post = bf16(relu(bf16(s))²) (M, N), or None without `keep_post`; quantised(post, post_scale)
    (M, N) e4m3; the same (N, M), contiguous, or None without `transposed`; max(post) () float32.

    s, a, b (2-D) and scales are those of `fp8_matmul`, errors as for it. post_scale: a float32
    tensor of one element. Source: the MLP of the NanoGPT speedrun's record 089.
    """
    _check_operands("fp8_matmul_relu2", a, b, scale_a, scale_b)
    _check_scale("fp8_matmul_relu2", post_scale, "post_scale", a)
    _check_no_gradient("fp8_matmul_relu2", a, b, scale_a, scale_b, post_scale)
    kernel = "fp8_matmul_relu2_out"
    backend = _choose(kernel, "relu2", a, b, E4M3, fast_accum, transposed=transposed)
    post, post_f8, post_f8_t, amax = torch.ops.speedrun.fp8_matmul_relu2(
        a, b, scale_a, scale_b, post_scale, keep_post, transposed, fast_accum, backend
    )
    return post if keep_post else None, post_f8, post_f8_t if transposed else None, amax


def fp8_matmul_drelu2(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    post: Tensor,
    *,
    post_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    transposed: bool = False,
    fast_accum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dpre = 2·s·√post (M, N): what relu² passes back of a gradient s. `post` (M, N), contiguous,
    is bfloat16, or e4m3 times `post_scale`. Without `out_scale`: dpre in bfloat16, None, None.
    With it quantised(dpre, out_scale) in e5m2; the same (N, M), contiguous, or None without
    `transposed`; max|dpre| () float32.

    s, a, b (2-D) and scales are those of `fp8_matmul`, errors as for it; ValueError also for
    transposed without out_scale. Source: the gradient of `fp8_matmul_relu2`.
    """
    _check_operands("fp8_matmul_drelu2", a, b, scale_a, scale_b)
    post_dtype = BF16 if post_scale is None else E4M3
    _check_like("fp8_matmul_drelu2", post, "post", (a.shape[0], b.shape[0]), post_dtype, a)
    for name, scale in (("post_scale", post_scale), ("out_scale", out_scale)):
        if scale is not None:
            _check_scale("fp8_matmul_drelu2", scale, name, a)
    if transposed and out_scale is None:
        raise ValueError("fp8_matmul_drelu2: only an FP8 dpre is transposed: give an out_scale")
    _check_no_gradient("fp8_matmul_drelu2", a, b, scale_a, scale_b, post, post_scale, out_scale)
    out_dtype = BF16 if out_scale is None else E5M2
    # Compiled for all in bf16 or all in FP8.
    kernel = "fp8_matmul_drelu2_out" if (post_scale is None) == (out_scale is None) else ""
    backend = _choose(kernel, "drelu2", a, b, out_dtype, fast_accum, post, transposed=transposed)
    dpre, dpre_t, amax = torch.ops.speedrun.fp8_matmul_drelu2(
        a, b, scale_a, scale_b, post, post_scale, out_scale, transposed, fast_accum, backend
    )
    if out_scale is None:
        return dpre, None, None
    return dpre, dpre_t if transposed else None, amax


def _choose(
    cuda_kernel: str,
    epilogue: str,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    *others: Tensor,
    transposed: bool = False,
) -> str:
    """The backend; `cuda_kernel`: what would serve the call, if compiled for its types."""
    only_fast = _CUDA_KERNELS[epilogue].get((a.dtype, b.dtype, out_dtype))
    compiled = only_fast is not None and (fast_accum or not only_fast) and is_hopper(a.device)
    # TMA: addresses, and strides and row lengths in bytes, are multiples of 16.
    rows = (a.shape[-2] if transposed else 0, b.shape[-2])
    aligned = all(is_aligned(x) for x in (a, b, *others)) and a.shape[-1] > 0
    aligned = aligned and all(size % 16 == 0 for size in rows)
    return choose(
        "fp8_matmul",
        a.device,
        cuda_kernel=cuda_kernel if compiled and aligned else "",
        triton=has_e4m3(a.device),
    )


def _check_operands(
    op: str,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dims: tuple[int, ...] = (2,),
) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in FP8:
            raise TypeError(f"{op}: {name} must be float8_e4m3fn or float8_e5m2, got {x.dtype}")
        if x.dim() not in dims:
            shapes = "(rows, K)" + " or (L, rows, K)" * (3 in dims)
            raise ValueError(f"{op}: {name} must be {shapes}, got {tuple(x.shape)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} must be K-major (its last dimension contiguous), got shape "
                f"{tuple(x.shape)} with strides {x.stride()}"
            )
    if a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{op}: a (.., M, K) and b (.., N, K) must agree in all but the rows, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.device != b.device:
        raise ValueError(f"{op}: a and b must be on one device, got {a.device} and {b.device}")
    _check_scale(op, scale_a, "scale_a", a)
    _check_scale(op, scale_b, "scale_b", a)


def _check_scale(op: str, scale: Tensor, name: str, a: Tensor) -> None:
    if not isinstance(scale, Tensor) or scale.dtype != FP32 or scale.numel() != 1:
        found = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise TypeError(f"{op}: {name} must be a float32 tensor of one element, got {found}")
    if scale.device != a.device:
        raise ValueError(f"{op}: {name} must be on {a.device} like a, got {scale.device}")


def _check_like(
    op: str, x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, a: Tensor
) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {x.dtype}")
    if x.shape != shape or x.device != a.device or not x.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be {tuple(shape)}, contiguous, on {a.device}; got "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad()")


def _kernels(backend: str):
    """Where the raw kernels are, by their names. The reference is behind the operators too:
    compiled into one kernel with what surrounds it, it would lose its roundings to bf16."""
    if backend == "cuda":
        return torch.ops.speedrun
    if backend == "torch":
        return reference
    from speedrun.triton_kernels import fp8_matmul as triton_kernels

    return triton_kernels


def _fake_matmul(
    a, b, scale_a, scale_b, row_scale, out_scale, out_dtype, fast_accum, backend
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)


def _matmul(a, b, scale_a, scale_b, row_scale, out_scale, out_dtype, fast_accum, backend) -> Tensor:
    out = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)
    scales = (scale_a, scale_b, row_scale, out_scale)
    _kernels(backend).fp8_matmul_out(a, b, *scales, out, fast_accum, False)
    return out


def _add_(c, a, b, scale_a, scale_b, fast_accum, backend) -> None:
    _kernels(backend).fp8_matmul_out(a, b, scale_a, scale_b, None, None, c, fast_accum, True)


def _fake_relu2(
    a, b, scale_a, scale_b, post_scale, keep_post, transposed, fast_accum, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results that are not asked for have no elements: an operator can't return None."""
    m, n = a.shape[0], b.shape[0]
    return (
        a.new_empty((m, n) if keep_post else (0,), dtype=BF16),
        a.new_empty((m, n), dtype=E4M3),
        a.new_empty((n, m) if transposed else (0,), dtype=E4M3),
        a.new_zeros((), dtype=FP32),
    )


def _relu2(a, b, scale_a, scale_b, post_scale, keep_post, transposed, fast_accum, backend):
    flags = (keep_post, transposed, fast_accum, backend)
    post, post_f8, post_f8_t, amax = _fake_relu2(a, b, scale_a, scale_b, post_scale, *flags)
    _kernels(backend).fp8_matmul_relu2_out(
        a,
        b,
        scale_a,
        scale_b,
        post_scale,
        post if keep_post else None,
        post_f8,
        post_f8_t if transposed else None,
        amax,
        fast_accum,
    )
    return post, post_f8, post_f8_t, amax


def _fake_drelu2(
    a, b, scale_a, scale_b, post, post_scale, out_scale, transposed, fast_accum, backend
) -> tuple[Tensor, Tensor, Tensor]:
    m, n = a.shape[0], b.shape[0]
    return (
        a.new_empty((m, n), dtype=BF16 if out_scale is None else E5M2),
        a.new_empty((n, m) if transposed else (0,), dtype=E5M2),
        a.new_zeros((), dtype=FP32),
    )


def _drelu2(a, b, scale_a, scale_b, post, post_scale, out_scale, transposed, fast_accum, backend):
    scales = (scale_a, scale_b, post, post_scale, out_scale)
    dpre, dpre_t, amax = _fake_drelu2(a, b, *scales, transposed, fast_accum, backend)
    _kernels(backend).fp8_matmul_drelu2_out(
        a,
        b,
        *scales,
        dpre,
        dpre_t if transposed else None,
        None if out_scale is None else amax,
        fast_accum,
    )
    return dpre, dpre_t, amax


def _no_result(*arguments) -> None:
    """Of kernels that only write into their arguments."""


# The raw kernels: _C implements them for CUDA. They raise amax, which the caller has set to 0.
define(
    "fp8_matmul_out(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? row_scale, "
    "Tensor? out_scale, Tensor(a!) out, bool fast_accum, bool accumulate) -> ()",
    fake=_no_result,
    cpu=reference.fp8_matmul_out,
)
define(
    "fp8_matmul_relu2_out(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor post_scale, "
    "Tensor(a!)? post, Tensor(b!) post_f8, Tensor(c!)? post_f8_t, Tensor(d!) amax, "
    "bool fast_accum) -> ()",
    fake=_no_result,
    cpu=reference.fp8_matmul_relu2_out,
)
define(
    "fp8_matmul_drelu2_out(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor post, "
    "Tensor? post_scale, Tensor? out_scale, Tensor(a!) dpre, Tensor(b!)? dpre_t, "
    "Tensor(c!)? amax, bool fast_accum) -> ()",
    fake=_no_result,
    cpu=reference.fp8_matmul_drelu2_out,
)
define(
    "fp8_matmul(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? row_scale, "
    "Tensor? out_scale, ScalarType out_dtype, bool fast_accum, str backend) -> Tensor",
    fake=_fake_matmul,
    python=_matmul,
)
define(
    "fp8_matmul_add_(Tensor(a!) c, Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, "
    "bool fast_accum, str backend) -> ()",
    fake=_no_result,
    python=_add_,
)
define(
    "fp8_matmul_relu2(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor post_scale, "
    "bool keep_post, bool transposed, bool fast_accum, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_relu2,
    python=_relu2,
)
define(
    "fp8_matmul_drelu2(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor post, "
    "Tensor? post_scale, Tensor? out_scale, bool transposed, bool fast_accum, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_drelu2,
    python=_drelu2,
)
