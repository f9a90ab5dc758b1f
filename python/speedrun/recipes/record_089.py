"""`record_089`: the public record number 89 (July 2026), 1,270 + 15 steps on FineWeb.

Every technique of it; RECIPE sections 3 to 5 say what each computes. 8 x H100 were used.
"""

from __future__ import annotations

from speedrun.config import (
    AdamRow,
    Config,
    HeadConfig,
    LayerSpec,
    ModelConfig,
    MuonRow,
    OptimConfig,
    ScheduleConfig,
    Stage,
)

LAYERS = (
    "short+paired",
    "short+ve+xsa",
    "short+ve+paired",
    "long+xsa+gated+save",
    "short+xsa+post",
    "short+paired+post",
    "none+skip+post",
    "short+xsa+post+save",
    "short+ve+shared+post",
    "short+ve+paired+shared+post",
    "long+ve+gated+dc+mudd+shared+post",
)

# Adam's numbers for factors, gates and small networks.
SMALL_ROWS = (
    AdamRow("lambda_*", 0.9, 0.99, lr_mul=5.0),
    AdamRow("w_smear", 0.9, 0.99, lr_mul=0.01),
    AdamRow("ve_gate", 0.9, 0.99, wd_mul=1.0),
    AdamRow("p_*", 0.9, 0.95),
    AdamRow("r_*", 0.9, 0.95, lr_mul=5.0),
    AdamRow("mudd_*_W?", 0.9, 0.99, lr_mul=0.25, wd_mul=1.0),
    AdamRow("mudd_*_c", 0.9, 0.99, lr_mul=0.25),
    AdamRow("gate_*_W?", 0.9, 0.99, lr_mul=0.1, wd_mul=1.0),
    AdamRow("gate_*_c", 0.9, 0.99, lr_mul=0.1),
    AdamRow("gate_s", 0.9, 0.99, lr_mul=0.1),
)


def config() -> Config:
    return Config(
        name="record_089",
        model=ModelConfig(
            layers=LayerSpec.parse_many(",".join(LAYERS)),
            model_dim=768,
            num_heads=6,
            head_dim=128,
            mlp_hidden=3072,
            bigram_rows=377_280,  # 50,304 * 15/2
            bigram_dim=768,
            sign_rows=8192,
            smear=True,
            gates="network",
            residual_lambdas=True,
            attention_lambdas=True,
            key_offset=True,
            head=HeadConfig(count_missing_targets=True, round_sigmoid=True),
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
                AdamRow("value_embeds", 0.75, 0.95, lr_mul=75.0, wd_mul=5.0),
                AdamRow("bigram_embed", 0.75, 0.95, lr_mul=75.0, wd_mul=5.0, sparse=True),
                *SMALL_ROWS,
            ),
        ),
        schedule=ScheduleConfig(
            num_steps=1270,
            stages=(
                Stage(
                    tokens_per_step=131_072,
                    max_seq_len=896,
                    window_short=1 * 128,
                    window_long=3 * 128,
                    multi_token_weights=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0)),
                    prefix_weight=(0.25, 0.25),
                ),
                Stage(
                    tokens_per_step=262_144,
                    max_seq_len=2048,
                    window_short=3 * 128,
                    window_long=7 * 128,
                    lr_factor=1.52,
                    multi_token_weights=((1.0, 1.0), (0.5, 0.0)),
                    prefix_weight=(0.25, 0.0),
                ),
                Stage(
                    tokens_per_step=393_216,
                    max_seq_len=2048,
                    window_short=5 * 128,
                    window_long=11 * 128,
                    lr_factor=1.73,
                ),
            ),
            extension_steps=15,
            extension=Stage(
                tokens_per_step=393_216,
                max_seq_len=2048,
                window_short=6 * 128,
                window_long=13 * 128,
                lr_factor=0.15,
            ),
            final_windows=(6 * 128, 20 * 128),
            yarn=True,
            untie_frac=2 / 3,
        ),
    )
