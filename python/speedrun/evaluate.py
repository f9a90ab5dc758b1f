"""Validation: the mean loss over the same tokens, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from speedrun.batch import MicroBatch
from speedrun.comms import Comms
from speedrun.config import Windows
from speedrun.model import GPT


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], windows: Windows, comms: Comms) -> float:
    """Mean cross-entropy (nats a token) of this and all other ranks' `batches`.

    Sums are kept in float64 and reduced once.
    """
    total = torch.zeros(2, dtype=torch.float64, device=model.embed.device)
    for batch in batches:
        plans = model.plan_windows(batch, windows)
        total[0] += model.validation_loss(batch, plans)
        total[1] += batch.inputs_PT.numel()
    comms.all_reduce_sum([total])
    loss_sum, num_tokens = total.tolist()
    return loss_sum / num_tokens
