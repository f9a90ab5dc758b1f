"""Checks that front doors share; messages name the value and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    where: str,
    x: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Of this type, shape and device, and contiguous. `where`: operator and argument, for errors.

    TypeError: another type; ValueError: anything else.
    """
    if x.dtype != dtype:
        raise TypeError(f"{where} must be {dtype}, got {x.dtype}")
    if x.shape != tuple(shape) or x.device != device:
        raise ValueError(
            f"{where} must be {tuple(shape)} on {device}, got {tuple(x.shape)} on {x.device}"
        )
    if contiguous and not x.is_contiguous():
        raise ValueError(
            f"{where} must be contiguous, got strides {x.stride()} for {tuple(x.shape)}; make it "
            "so where it is allocated"
        )
