"""`tiny`: byte-level text on a laptop CPU in under three minutes, no download."""

from __future__ import annotations

from speedrun.config import (
    AdamRow,
    Config,
    DataConfig,
    LayerSpec,
    ModelConfig,
    MuonRow,
    OptimConfig,
    ScheduleConfig,
    Stage,
)


def config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            layers=LayerSpec.parse_many("short*2"),
            model_dim=128,
            num_heads=4,
            head_dim=32,
            mlp_hidden=512,
            vocab_multiple=16,
            bigram_rows=8192,
            bigram_dim=64,
            bigram_scale=1.0,
        ),
        optim=OptimConfig(
            muon_table=(
                MuonRow("qk_bank"),
                MuonRow("vo_bank"),
                MuonRow("mlp_bank", lr_muls=(1.0, 2.0)),  # up, down
            ),
            adam_table=(
                AdamRow("lm_head", 0.5, 0.95, wd_mul=150.0),
                AdamRow("embed", 0.5, 0.95, wd_mul=150.0),
                AdamRow("bigram_embed", 0.75, 0.95, wd_mul=5.0),
            ),
            adam_interval=1,
        ),
        schedule=ScheduleConfig(
            num_steps=400,
            stages=(
                Stage(tokens_per_step=4096, max_seq_len=256, window_short=64, window_long=128),
            ),
            val_interval=20,
            momentum_warmup_steps=50,
            momentum_cooldown_steps=20,
        ),
        data=DataConfig(default="stdlib", val_tokens=None, val_tokens_per_part=4096),
        target_loss="gzip",
        micro_batch_parts=8,
    )
