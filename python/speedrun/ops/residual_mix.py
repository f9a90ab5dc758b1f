"""Front door of `residual_mix`: weighted sums of residual streams, with their RMS norm if wanted.

Terms are (factor, stream). Streams have the first one's shape (…, D), or fewer columns, which are
added to the first ones; a factor is a number, a tensor of one element, or one number a token,
(…, 1). Any floating types; kernels have none for float64 and for D above 8192. Streams that are not
contiguous are copied first.

One launch forward and one backward; gradients of factors are summed along rows there, without
atomics, and those of one number for all tokens over the rows by a torch.sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose
from speedrun.ops._library import define, define_gradient
from speedrun.reference import residual_mix as reference

NORM_EPS = 2**-23
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that kernels have
MAX_WIDTH = 8192  # a program has whole rows in registers: 64 numbers a thread
Terms = Sequence[tuple[Tensor | float, Tensor]]


def residual_mix(terms: Terms) -> Tensor:
    """Σ factor·stream, with the first stream's shape and type; differentiable in all tensors.

    Summed in at least fp32, in the order of the terms, rounded once: kernels give the reference's
    bits. A term: (factor, stream (…, D) or of fewer columns); a factor: a number, or a tensor () or
    (…, 1). Any floating types; kernels have float16, bfloat16 and float32.
    TypeError: a type that is not floating; ValueError: no terms, or shapes and devices that don't
    go together. Source: residual weights of the NanoGPT speedrun's record 089.
    """
    backend = _checked_backend(terms)
    if backend == "torch":
        return reference.residual_mix(terms)  # not an operator, so that Inductor can fuse it
    return torch.ops.speedrun.residual_mix(*_flat(terms), None, False)[0].view_as(terms[0][1])


def residual_mix_norm(
    terms: Terms, *, eps: float = NORM_EPS, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, normed, codes): `residual_mix` of the terms; x/√(mean(x²) + eps) along D, x's type; and
    with `fp8` that as e4m3 by the scale `static_scale`, else None.

    The norm is that of x as it was rounded. Differentiable but for the codes. Shapes (…, D), types
    and errors (TypeError, ValueError) as for `residual_mix`. Source: RMSNorm (arXiv 1910.07467).
    """
    backend = _checked_backend(terms)
    if backend == "torch":
        return reference.residual_mix_norm(terms, eps, fp8)
    x, normed, codes = torch.ops.speedrun.residual_mix(*_flat(terms), eps, fp8)
    shape = terms[0][1].shape
    return x.view(shape), normed.view(shape), codes.view(shape) if fp8 else None


static_scale = reference.static_scale


def _checked_backend(terms: Terms) -> str:
    if not terms:
        raise ValueError("residual_mix: no terms; give at least one (factor, stream)")
    first = terms[0][1]
    if first.dim() == 0:
        raise ValueError("residual_mix: streams must be (…, D), got one of shape ()")
    tensors = [first]
    for i, (factor, stream) in enumerate(terms):
        if stream.shape[:-1] != first.shape[:-1] or stream.shape[-1] > first.shape[-1]:
            raise ValueError(
                f"residual_mix: stream {i} must be like the first, {tuple(first.shape)}, or have "
                f"fewer columns; got {tuple(stream.shape)}"
            )
        tensors.append(stream)
        if not isinstance(factor, Tensor):
            continue
        if factor.numel() != 1 and factor.shape != (*first.shape[:-1], 1):
            raise ValueError(
                f"residual_mix: factor {i} must be a number, a tensor of one element, or "
                f"{(*first.shape[:-1], 1)}, one a token; got {tuple(factor.shape)}"
            )
        tensors.append(factor)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"residual_mix: streams and factors are floating, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"residual_mix: all tensors must be on {first.device}, got one on {tensor.device}"
            )
    has_kernel = 0 < first.shape[-1] <= MAX_WIDTH and all(t.dtype in DTYPES for t in tensors)
    return choose("residual_mix", first.device, triton=has_kernel)


def _flat(terms: Terms) -> tuple[list[Tensor], list[Tensor], list[bool], list[float]]:
    """Streams (T, width) contiguous; the factors that are tensors, (T,) or (); by term whether it
    has one of these, and its number, 1 if it has."""
    streams = [stream.reshape(-1, stream.shape[-1]).contiguous() for _, stream in terms]
    tensors = [factor for factor, _ in terms if isinstance(factor, Tensor)]
    factors = [factor.reshape(() if factor.numel() == 1 else -1) for factor in tensors]
    has_factor = [isinstance(factor, Tensor) for factor, _ in terms]
    numbers = [1.0 if isinstance(factor, Tensor) else float(factor) for factor, _ in terms]
    return streams, factors, has_factor, numbers


def _by_term(tensors: Iterable[Tensor], has_factor: list[bool]) -> list[Tensor | None]:
    given = iter(tensors)
    return [next(given) if has else None for has in has_factor]


# Outputs that are not asked for are empty, of shape (0,): operators return no None.
def _empty_outputs(x: Tensor, eps: float | None, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    normed = x.new_empty(0) if eps is None else torch.empty_like(x)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn) if fp8 else x.new_empty(0)
    return torch.empty_like(x), normed, codes


def _mix(
    streams: list[Tensor],
    factors: list[Tensor],
    has_factor: list[bool],
    numbers: list[float],
    eps: float | None,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from speedrun.triton_kernels.residual_mix import residual_mix_out

    x, normed, codes = _empty_outputs(streams[0], eps, fp8)
    residual_mix_out(
        streams,
        _by_term(factors, has_factor),
        numbers,
        eps or 0.0,
        static_scale(streams[0].shape[1], torch.device("cpu")).item(),
        x,
        normed if eps is not None else None,
        codes if fp8 else None,
    )
    return x, normed, codes


def _mix_bwd(
    dx: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor,
    streams: list[Tensor],
    factors: list[Tensor],
    has_factor: list[bool],
    numbers: list[float],
    eps: float | None,
) -> list[Tensor]:
    from speedrun.triton_kernels.residual_mix import residual_mix_bwd_out

    grads = _empty_gradients(dx, dnormed, x, streams, factors)
    by_term, sums = (_by_term(tensors, has_factor) for tensors in (factors, grads[-1]))
    residual_mix_bwd_out(dx, dnormed, x, streams, by_term, numbers, eps or 0.0, grads[:-1], sums)
    return grads


def _empty_gradients(dx, dnormed, x, streams, factors, *others) -> list[Tensor]:
    """Of each stream; and for each factor the sums along rows (factors, T)."""
    sums = x.new_empty(len(factors), len(x), dtype=torch.float32)
    return [*(torch.empty_like(stream) for stream in streams), sums]


def _setup_context(ctx, inputs, output) -> None:
    streams, factors, has_factor, numbers, eps, _ = inputs
    ctx.set_materialize_grads(False)  # nobody reads zeros for an output without a gradient
    ctx.mark_non_differentiable(output[2])
    x = streams[0] if eps is None else output[0]  # only a norm needs its values
    ctx.save_for_backward(x, *streams, *factors)
    ctx.rest = has_factor, numbers, eps


def _backward(ctx, dx, dnormed, dcodes):
    has_factor, numbers, eps = ctx.rest
    x, *tensors = ctx.saved_tensors
    streams, factors = tensors[: len(numbers)], tensors[len(numbers) :]
    if eps is None:
        dnormed = None  # of a tensor without elements
    grads = [None if grad is None else grad.contiguous() for grad in (dx, dnormed)]
    *dstreams, sums = torch.ops.speedrun.residual_mix_bwd(
        *grads, x, streams, factors, has_factor, numbers, eps
    )
    dfactors = [
        (along if f.dim() else along.sum()).to(f.dtype)
        for f, along in zip(factors, sums, strict=True)
    ]
    return dstreams, dfactors, None, None, None, None


_TERMS = "Tensor[] streams, Tensor[] factors, bool[] has_factor, float[] numbers, float? eps"
define(
    f"residual_mix({_TERMS}, bool fp8) -> (Tensor, Tensor, Tensor)",
    fake=lambda streams, factors, has_factor, numbers, eps, fp8: _empty_outputs(
        streams[0], eps, fp8
    ),
    python=_mix,
)
define_gradient("residual_mix", _backward, _setup_context)
define(
    f"residual_mix_bwd(Tensor? dx, Tensor? dnormed, Tensor x, {_TERMS}) -> Tensor[]",
    fake=_empty_gradients,
    python=_mix_bwd,
)
