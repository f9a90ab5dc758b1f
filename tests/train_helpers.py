"""Golden arrays of the public program, small configs and a way to run the training program."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Float64 results of a few hundred operations on numbers around 1: sums in another order differ by
# some hundred ulps at most; a wrong formula by many orders of magnitude more.
FLOAT64_NOISE = dict(rtol=1e-11, atol=1e-11)


@functools.cache
def golden(shared_data: Path, name: str) -> dict[str, np.ndarray]:
    """Arrays of one file of golden_089 (see its README)."""
    with np.load(shared_data / "golden_089" / name) as file:
        return {key: file[key] for key in file.files}


def from_golden(array: np.ndarray) -> Tensor:
    """A tensor of its own; uint16 arrays are the bits of bf16 numbers."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def low_bits(array: np.ndarray) -> Tensor:
    """uint16 low halves of weights, as the int16 with the same bits."""
    return torch.from_numpy(array.view(np.int16).copy())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
