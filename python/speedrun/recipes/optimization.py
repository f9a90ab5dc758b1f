"""`optimization`: the public baseline of the track where the score is the number of steps to 3.28.

Model, data and batch size are fixed, one forward-backward pass a step, wall-clock is free; what a
run may change is `optim`, the schedule of its numbers and the start values. The baseline's Muon
with AdamW takes 3,250 steps (mean 3.2787 over 10 runs). RECIPE section 7.

A claim of N steps needs (3.28 - mean)·√n >= 0.004 over n runs that all stop at N.
"""

from __future__ import annotations

from speedrun.config import (
    GRADIENT_DIVISOR,
    AdamRow,
    AdamWConfig,
    BaselineConfig,
    Config,
    DataConfig,
    MuonConfig,
    MuonRow,
    OptimConfig,
    ScheduleConfig,
    Stage,
)


def config() -> Config:
    return Config(
        name="optimization",
        model=BaselineConfig(num_layers=12, model_dim=768, head_dim=128, mlp_hidden=3072),
        optim=OptimConfig(
            matrix_rule="muon",
            vector_rule="adamw",
            muon_table=(MuonRow("*_bank"),),
            adam_table=(
                AdamRow("embed", 0.8, 0.95, lr_mul=0.7, wd_mul=1.0),
                AdamRow("lm_head", 0.8, 0.95, lr_mul=0.004, wd_mul=1.0),
                AdamRow("*_bias", 0.8, 0.95, lr_mul=0.015, wd_mul=1.0),
                AdamRow("*_gain", 0.8, 0.95, lr_mul=0.015, wd_mul=1.0),
            ),
            muon=MuonConfig(lr=0.025, wd=0.05),
            # The rates are in the table. Gradients here are an eighth of the public program's,
            # which sums over all positions; so is eps.
            adamw=AdamWConfig(lr=1.0, wd=0.001, eps=1e-10 / GRADIENT_DIVISOR),
        ),
        schedule=ScheduleConfig(
            num_steps=3250,
            stages=(
                Stage(
                    tokens_per_step=524_288,
                    max_seq_len=1024,
                    window_short=1024,
                    window_long=1024,
                ),
            ),
            adam_interval=1,
            val_interval=125,
            lr_cooldown_start_frac=0.3,
            lr_end=0.0,
            momentum_start=0.95,
            momentum_peak=0.95,
        ),
        data=DataConfig(
            train_shards=18,  # of 100M tokens, each 190 steps
            batching="consecutive",
            val_tokens_per_part=65_536,
        ),
    )
