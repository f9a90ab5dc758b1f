"""What the kernels for Hopper ask of a call, beside its types."""

from __future__ import annotations

import torch
from torch import Tensor


def is_aligned(x: Tensor) -> bool:
    """Whether x starts, and steps to the next row and matrix, by multiples of 16 bytes: TMA's.

    Compiled code knows no addresses: there the kernel itself refuses one that it can't take.
    """
    start = 0 if torch.compiler.is_compiling() else x.data_ptr()
    steps = [step * x.element_size() for step in x.stride()[:-1]]
    return start % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CPU the one that Triton's interpreter stands in for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


compute_capability._dynamo_marked_constant = True  # as in _dispatch
