"""`tiny`: byte-level text on a laptop CPU in under three minutes, no download.

Every technique of the record that applies to bytes, in two layers. At this size and in this time
the plain model, `tiny_plain`, learns faster (records/LOG.md): this recipe is for looking at the
techniques, not for winning. Numbers that differ from the record's were chosen on Tiny Shakespeare
and the standard library.
"""

from __future__ import annotations

from speedrun.config import (
    AdamRow,
    Config,
    DataConfig,
    LayerSpec,
    ModelConfig,
    MuonRow,
    NorMuonConfig,
    OptimConfig,
    ScheduleConfig,
    Stage,
)
from speedrun.recipes.record_089 import SMALL_ROWS

LAYERS = (
    "short+paired+ve+xsa+save",
    "long+ve+gated+dc+mudd+shared+skip+post",
)


def config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            layers=LayerSpec.parse_many(",".join(LAYERS)),
            model_dim=128,
            num_heads=2,
            head_dim=64,
            mlp_hidden=512,
            vocab_multiple=16,
            bigram_rows=8192,
            bigram_dim=128,
            bigram_scale=1.0,
            sign_rows=8192,
            smear=True,
            gates="network",
            gate_hidden=32,
            residual_lambdas=True,
            attention_lambdas=True,
            key_offset=True,
            score_scale=0.2,
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
                AdamRow("bigram_embed", 0.75, 0.95, lr_mul=8.0, wd_mul=5.0, sparse=True),
                AdamRow("value_embeds", 0.75, 0.95, lr_mul=8.0, wd_mul=5.0),
                *SMALL_ROWS,
            ),
            normuon=NorMuonConfig(lr=0.03),
        ),
        schedule=ScheduleConfig(
            num_steps=400,
            adam_interval=1,
            stages=(
                # Small steps first: early on, the number of updates counts.
                Stage(
                    tokens_per_step=2048,
                    max_seq_len=256,
                    window_short=64,
                    window_long=64,
                    multi_token_weights=((1.0, 1.0), (0.25, 0.0)),
                ),
                Stage(tokens_per_step=4096, max_seq_len=512, window_short=128, window_long=256),
            ),
            stage_ends=(0.4, 1.0),
            yarn=True,
            untie_frac=2 / 3,
            val_interval=10,  # every 1.4 to 1.8 s of training on 2 cores, in the first stage
            lr_cooldown_start_frac=0.3,
            lr_end=0.05,
            momentum_peak=0.9,
            momentum_warmup_steps=50,
            momentum_cooldown_steps=20,
        ),
        data=DataConfig(
            default="stdlib",
            repeat=True,
            val_tokens=None,
            val_tokens_at_most=120_000,  # of a book, or shards: 2 s; Tiny Shakespeare's 10 % fit
            val_tokens_per_part=8192,
        ),
        target_loss="gzip",
        micro_batch_parts=4,
    )
