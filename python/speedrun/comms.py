"""Reductions between ranks. World size 1 is the same code path without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Comms:
    """The ranks of a run. `rank` of `world_size`; collectives are called by all in one order."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place. One message for each dtype among them."""
        if self.world_size == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            pieces = flat.split([t.numel() for t in same])
            for t, piece in zip(same, pieces, strict=True):
                t.copy_(piece.view_as(t))

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Small picklable objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
