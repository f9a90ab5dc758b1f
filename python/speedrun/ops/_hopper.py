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


def is_hopper(device: torch.device) -> bool:
    """A CPU counts as one: it is what Triton's interpreter stands in for."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def has_e4m3(device: torch.device) -> bool:
    """Whether Triton compiles e4m3 for it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


# As in _dispatch. They return booleans: torch 2.11 can't compare a tuple that came so.
is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_e4m3._dynamo_marked_constant = True  # type: ignore[attr-defined]
