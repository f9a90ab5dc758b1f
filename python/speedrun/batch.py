"""What goes into the model: the tokens of a micro-batch, and what is derived from them alone.

P parts of a micro-batch, T tokens a part, N targets a position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.ops.softcap_ce import NO_TARGET

BIGRAM_HASH = (36313, 27191)  # factors of a token and of the one before


@dataclass(frozen=True)
class MicroBatch:
    """Some parts of a step on the model's device. Rows of tables are None without the table."""

    inputs_PT: Tensor  # int32
    targets_PT: Tensor  # int64
    cu_seqlens: Tensor  # (P * entries,) int32: document starts in the P*T tokens
    bigram_rows_PT: Tensor | None = None  # int32
    sign_rows_PT: Tensor | None = None  # int32
    max_seqlen: int | None = None  # no document is longer, if that is known


@dataclass(frozen=True)
class LossWeights:
    """Weights of the targets t+1, t+2, … in the training loss, and of the next token's prefix."""

    multi_token: tuple[float, ...] = (1.0,)
    prefix: float = 0.0
    prefix_table_V: Tensor | None = None  # int64: a token's longest proper prefix, −1 for none
    tensor: Tensor | None = None  # (N + 1,) float64 on the device: multi_token, prefix

    def on(self, device: torch.device) -> LossWeights:
        """With `tensor`, which the loss reads. The host doesn't wait for the device."""
        if self.tensor is not None:
            return self
        values = torch.tensor([*self.multi_token, self.prefix], dtype=torch.float64)
        return dataclasses.replace(self, tensor=to_device(values, device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host there. Through pinned memory, since the host waits for a copy from any
    other, and so for all work that the device has before it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def shifted_targets(targets_PT: Tensor, num_targets: int, first_PT: Tensor | None = None) -> Tensor:
    """(P*T, N) int64: column n is the target n positions on; past the end of its part −1.

    `first_PT`: −1 also where a document begins between this position and that target's.
    """
    columns = []
    for n in range(num_targets):
        column = F.pad(targets_PT[:, n:], (0, min(n, targets_PT.shape[1])), value=NO_TARGET)
        for ahead in range(1, n + 1) if first_PT is not None else ():
            crossed = F.pad(first_PT[:, ahead:], (0, min(ahead, first_PT.shape[1])))
            column = column.masked_fill(crossed, NO_TARGET)
        columns.append(column.flatten())
    return torch.stack(columns, dim=1)


def previous(x: Tensor) -> Tensor:
    """(P, T, …): each token's predecessor in its part, zeros for the first."""
    return F.pad(x[:, :-1], (0, 0) * (x.dim() - 2) + (1, 0))


def document_starts(batch: MicroBatch) -> Tensor:
    """(P, T) bool: tokens that begin a document."""
    num_tokens = batch.inputs_PT.numel()
    first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=batch.inputs_PT.device)
    first.index_fill_(0, batch.cu_seqlens.long(), True)
    return first[:num_tokens].view(batch.inputs_PT.shape)


def isolated_rows(
    batch: MicroBatch, first_PT: Tensor, num_rows: int
) -> tuple[Tensor, Tensor | None]:
    """Rows of bigram and sign table as if each document began its part (RECIPE section 2)."""
    multiplier, previous_multiplier = BIGRAM_HASH

    def wrapped(x: Tensor | int) -> Tensor | int:  # to signed 32-bit numbers
        return (x + 2**31) % 2**32 - 2**31

    tokens = wrapped(batch.inputs_PT.long() * multiplier)
    hashed = (tokens ^ wrapped(previous_multiplier * (num_rows - 1))) % (num_rows - 1)
    rows = torch.where(
        previous(first_PT), hashed.to(batch.bigram_rows_PT.dtype), batch.bigram_rows_PT
    )
    signs = batch.sign_rows_PT
    return (
        rows.masked_fill(first_PT, num_rows - 1),
        None if signs is None else signs.masked_fill(first_PT, 0),
    )
