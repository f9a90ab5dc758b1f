"""`tiny_plain`: `tiny` with rotary attention, relu² MLP and a bigram table alone."""

from __future__ import annotations

import dataclasses

from speedrun.config import Config, LayerSpec
from speedrun.recipes import tiny


def config() -> Config:
    base = tiny.config()
    model = dataclasses.replace(
        base.model,
        layers=LayerSpec.parse_many("short,long"),
        sign_rows=0,
        smear=False,
        gates="none",
        residual_lambdas=False,
        attention_lambdas=False,
        key_offset=False,
    )
    schedule = dataclasses.replace(base.schedule, yarn=False, untie_frac=0.0, multi_token=False)
    return dataclasses.replace(base, name="tiny_plain", model=model, schedule=schedule)
