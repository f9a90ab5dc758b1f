"""`record_listed`: `record_089` with the techniques that the public list of records had before it.

No dynamically composed attention, no prefix loss, no FP8 in the MLP's down projection, and a bigram
embedding a quarter as wide as the model.
"""

from __future__ import annotations

import dataclasses

from speedrun.config import Config
from speedrun.recipes import record_089


def config() -> Config:
    base = record_089.config()
    model = dataclasses.replace(
        base.model,
        dc=False,
        bigram_dim=base.model.model_dim // 4,
        mlp=dataclasses.replace(base.model.mlp, down="bf16"),
    )
    schedule = dataclasses.replace(base.schedule, prefix_loss=False)
    return dataclasses.replace(base, name="record_listed", model=model, schedule=schedule)
