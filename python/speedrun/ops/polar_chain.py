"""Front door of `polar_chain`: the Gram form's steps between two restarts, in one launch.

`polar_express` calls it in place of products one by one (_polar_express_banks.py) where it has
passed on this GPU, or where an override names it: use_backend("cuda", "polar_chain"). An override
of all operators at once leaves the products one by one, so that what is tried is one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from speedrun.ops._dispatch import choose, decide, forced_backend, named_override
from speedrun.ops._hopper import is_hopper
from speedrun.ops._library import define
from speedrun.ops.sym_matmul import DTYPES
from speedrun.reference import polar_chain as reference
from speedrun.reference._polar_coefficients import Quintic

STEM = "polar_chain"
SQUARE, MAX_STEPS = 128, 8  # of the kernel: its tile, and the steps of one launch


def num_slots(num_steps: int) -> int:
    """Matrices of a bank in work: R, Z, Q and R·Z of each step; the last has no R·Z."""
    return 4 * num_steps - 1


def polar_chain(work: Tensor, coefficients: Sequence[Quintic]) -> Tensor:
    """Q (B, N, N), the last of work's slots: what the steps multiply X by; R = work[0] stays.

    work: (4·S − 1, B, N, N) for S steps (a, b, c), contiguous float16, and on the torch backend
    bfloat16, float32 or float64; R symmetric, the rest is scratch. With Q = I at first and
    Z = b·R + c·R² a step is Q ← (Z + a·I)·Q, R ← (Z + a·I)·R·(Z + a·I); each product is summed in
    at least float32 and rounded once. Not differentiable.
    TypeError: another type; ValueError: another shape or layout, or no steps.
    Source: Gram Newton–Schulz (github.com/Dao-AILab/gram-newton-schulz).
    """
    steps = len(coefficients)
    if work.dtype not in DTYPES:
        raise TypeError(
            f"polar_chain: work has type {work.dtype}; allowed are float16, bfloat16, float32 and "
            f"float64"
        )
    if not steps or work.dim() != 4 or len(work) != num_slots(steps) or not _is_square(work):
        raise ValueError(
            f"polar_chain: work for {steps} steps must be (4·steps − 1, B, N, N), of at least one "
            f"step, got {tuple(work.shape)}"
        )
    if not work.is_contiguous():
        raise ValueError(
            f"polar_chain: work must be contiguous, got strides {work.stride()} for "
            f"{tuple(work.shape)}"
        )
    B, N = work.shape[1:3]
    kernel = _kernel(work.device, work.dtype, N, steps) if work.numel() else ""
    counters = work.new_empty(len(work), B, -(-N // SQUARE), dtype=torch.int32)
    numbers = [*chain.from_iterable(coefficients)]
    if choose(STEM, work.device, kernel) == "torch":
        reference.polar_chain_out(work, counters, numbers)
    else:
        torch.ops.speedrun.polar_chain_out(work, counters, numbers)
    return work[-1]


def serves_polar_express(
    device: torch.device, dtype: torch.dtype, n: int, chains: Sequence[Sequence[Quintic]]
) -> bool:
    """Whether `polar_express` takes it for (B, n, n) of `dtype`; errors as for `choose`."""
    if named_override(STEM) is None and forced_backend(STEM) is not None:
        return False
    return decide(STEM, device, _kernel(device, dtype, n, max(map(len, chains)))) == "cuda"


def _kernel(device: torch.device, dtype: torch.dtype, n: int, num_steps: int) -> str:
    """Name of the operator that _C has for such a call, or ""."""
    fits = dtype == torch.float16 and n % SQUARE == 0 and num_steps <= MAX_STEPS
    return "polar_chain_out" if fits and is_hopper(device) else ""


def _is_square(work: Tensor) -> bool:
    return work.shape[-1] == work.shape[-2]


# The raw kernel: _C implements it for CUDA. counters: (4·S − 1, B, ⌈N/128⌉) int32, scratch.
define(
    "polar_chain_out(Tensor(a!) work, Tensor(b!) counters, float[] coefficients) -> ()",
    fake=lambda *arguments: None,
    cpu=reference.polar_chain_out,
)
