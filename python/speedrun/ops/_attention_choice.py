"""Which backend computes `attention`: chosen by trying them, in this order.

    fa3     FlashAttention-3: flash_attn_interface, or by the package kernels, which downloads it
    fa4     FlashAttention-4: flash_attn.cute
    triton  ours, where verdicts.json lets it serve (ops/_dispatch.py)
    fa2     FlashAttention-2: flash_attn, else the one that torch carries
    flex    torch's FlexAttention with a block mask of windows and documents; its gradient
            computes the forward pass again
    sdpa    torch's attention with a dense mask, up to SDPA_MAX_TOKENS
    torch   the reference

On a GPU each of them runs once on a small problem in bf16, and the first whose output and gradients
are right serves all calls of these head dims. One that is installed but can't be imported, fails or
is wrong is passed over with a warning. What kills the process or hangs can't be passed over:
SPEEDRUN_BACKEND=attention=NAME names another. Elsewhere, and in other types, the reference serves.
"""

from __future__ import annotations

import functools
import warnings

import torch

from speedrun.ops import _dispatch
from speedrun.ops._attention_backends import (
    DTYPE,
    LOADERS,
    ON_CPUS,
    Backend,
    Batch,
    NotInstalled,
    load,
)
from speedrun.reference._blocks import block_mask
from speedrun.reference.attention import attention as reference

STEM = "attention"
SDPA_MAX_TOKENS = 2048  # a mask of 4 MiB

# By shape, such as "2048 tokens, heads 96/128": tokens, and widths of queries and of values.
served: dict[str, str] = {}


def choose(
    device: torch.device, dtype: torch.dtype, num_tokens: int, head_dims: tuple[int, int]
) -> str:
    """Name of the backend for a batch; Unavailable: an override asks for one that can't serve."""
    forced = _dispatch.forced_backend(STEM)
    if forced in LOADERS and forced != "triton":
        if problem := _problem(forced, device, dtype):
            raise _dispatch.Unavailable(f"{STEM}: the override asks for {forced!r}, but {problem}")
        name = forced
    else:
        name = _dispatch.decide(STEM, device, triton=dtype == DTYPE)
        if forced is None and device.type == "cuda" and dtype == DTYPE:
            left_out = {"triton"} if name != "triton" else set()
            left_out |= {"sdpa"} if num_tokens > SDPA_MAX_TOKENS else set()
            name = first_right(device, head_dims, frozenset(left_out))
    _dispatch.note(STEM, name)
    served[f"{num_tokens} tokens, heads {'/'.join(map(str, head_dims))}"] = name
    return name


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an override can't have this backend; empty if it may try."""
    if device.type != "cuda" and name not in ON_CPUS:
        return f"its tensors are on {device}"
    if dtype != DTYPE:
        return f"the tensors are {dtype}; it takes {DTYPE}"
    try:
        load(name)
    except NotInstalled as problem:
        return f"{problem} is not installed"
    except Exception as problem:
        return f"it can't be loaded: {problem}"
    return ""


@functools.cache
def first_right(
    device: torch.device, head_dims: tuple[int, int], left_out: frozenset[str] = frozenset()
) -> str:
    """The first of LOADERS, but for those left out, that computes the trial right, or "torch"."""
    for name in LOADERS:
        if name not in left_out and passes(name, device, head_dims):
            return name
    return "torch"


@functools.cache
def passes(name: str, device: torch.device, head_dims: tuple[int, int]) -> bool:
    """Whether `name` is right on `device`; a warning says why not, unless it is not installed."""
    try:
        backend = load(name)
        trial(backend, device, head_dims)
    except NotInstalled:
        return False
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        warnings.warn(
            f"attention: {name} is passed over on {device}, head dims {head_dims}: "
            f"{type(problem).__name__}: {lines[0]}",
            stacklevel=2,
        )
        return False
    return True


TRIAL_STARTS = (0, 0, 1, 2, 67, 67, 195, 300, 333, 333)  # also of length 0 and 1, and padding
TRIAL_WINDOWS = (40, 128, 333)  # within a tile, over several, beyond every document


def trial(backend: Backend, device: torch.device, head_dims: tuple[int, int]) -> None:
    """AssertionError, or whatever it raises, unless output and gradients are right.

    The law of tests/numerics.py, widened to 3 times the reference's error in bf16 and four ulps,
    since products inside the reference may be of another type. A window or a document that is off
    by one token errs by ten times as much.
    """
    generator = torch.Generator().manual_seed(0)  # leaves the state of all others alone
    num_tokens, (K, E) = TRIAL_STARTS[-1], head_dims
    sizes = {"q": K, "k": K, "v": E, "dout": E}
    q, k, v, dout = (
        torch.randn(num_tokens, 2, width, generator=generator).to(device, DTYPE)
        for width in sizes.values()
    )
    cu_seqlens = torch.tensor(TRIAL_STARTS, dtype=torch.int32, device=device)
    scale = K**-0.5
    for window in TRIAL_WINDOWS:
        extra = backend.prepare(cu_seqlens, num_tokens, window)
        batch = Batch(cu_seqlens, window, num_tokens, extra)
        out, lse = backend.forward(q, k, v, batch, scale)
        assert lse.shape == (2, num_tokens), f"lse has shape {tuple(lse.shape)}"
        found = (out, *backend.backward(dout, q, k, v, out, lse, batch, scale))
        results = []
        for dtype in (DTYPE, torch.float64):
            mask = block_mask(cu_seqlens, num_tokens, window, dtype)
            with torch.enable_grad():
                leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
                expected = reference(leaves[0], leaves[1], leaves[2], mask, scale)
                grads = torch.autograd.grad(expected, leaves, dout.to(dtype))
            results.append((expected.detach(), *grads))
        for name, mine, same, exact in zip(("out", "dq", "dk", "dv"), found, *results, strict=True):
            assert (mine.shape, mine.dtype) == (same.shape, DTYPE), f"{name}: {tuple(mine.shape)}"
            error = (mine.double() - exact).abs().max()
            limit = 3 * (same.double() - exact).abs().max() + exact.abs().max() * 2**-6
            assert error <= limit, f"{name} errs by {error:.2g}, allowed are {limit:.2g}"
