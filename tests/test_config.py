"""`--set` and the check of a config: what is taken, and what is refused in which words."""

import dataclasses
import json

import pytest

from speedrun import recipes
from speedrun.config import (
    AdamRow,
    AttentionConfig,
    ConfigError,
    LayerSpec,
    MLPConfig,
    MuonConfig,
    MuonRow,
    NorMuonConfig,
    to_dict,
)
from speedrun.config_check import check
from speedrun.overrides import apply_overrides
from speedrun.schedule import Schedule, scaled
from train_helpers import small_config

SHORT, LONG, NONE = LayerSpec(), LayerSpec(window="long"), LayerSpec(attention=None)


def read(config, path):
    """The value at "a.0.b"; rows of tables are named, stages counted."""
    for name in path.split("."):
        if isinstance(config, tuple):
            config = next(
                item for i, item in enumerate(config) if getattr(item, "name", str(i)) == name
            )
        else:
            config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("micro_batch_parts", "4", 4),
        ("schedule.num_steps", "1_000", 1000),
        ("optim.normuon.lr", "0.05", 0.05),
        ("optim.adam.eps", "1e-8", 1e-8),
        ("optim.normuon.lr", "2", 2.0),
        ("data.repeat", "true", True),
        ("data.repeat", "1", True),
        ("data.repeat", "False", False),
        ("data.val_tokens", "none", None),
        ("data.val_tokens", "4096", 4096),
        ("model.vocab_size", "None", None),
        ("precision", "recipe", "recipe"),
        ("precision", "bf16", "bf16"),
        ("model.mlp.dx", "fp8", "fp8"),
        ("model.attention.qkv", "fp8", "fp8"),
        ("model.mlp.x_scale", "static", "static"),
        ("target_loss", "3.5", 3.5),
        ("target_loss", "gzip", "gzip"),
        ("name", "mine", "mine"),
        ("model.layers", "short*2,long", (SHORT, SHORT, LONG)),
        ("model.layers", "none,long*3", (NONE, LONG, LONG, LONG)),
        ("schedule.final_windows", "32,96", (32, 96)),
        ("schedule.final_windows", "none", None),
        ("schedule.stage_ends", "0.25,1.0", (0.25, 1.0)),
        ("optim.adam_table.embed.lr_mul", "2", 2.0),
        ("optim.muon_table.mlp_bank.lr_muls", "1,2", (1.0, 2.0)),
        ("optim.matrix_rule", "muon", "muon"),
        ("optim.vector_rule", "adamw", "adamw"),
        ("optim.muon.ns_coefficients", "3,-4,2", (3.0, -4.0, 2.0)),
        ("optim.exact_weights", "false", False),
        ("optim.weight_rounding", "nearest", "nearest"),
        ("optim.normuon.polar_form", "gram", "gram"),
        ("optim.adam_table.embed.moments", "bf16", "bf16"),
        ("schedule.stages.0.tokens_per_step", "2048", 2048),
        ("schedule.stages.1.window_long", "40", 40),
        ("schedule.extension.lr_factor", "0.2", 0.2),
    ],
)
def test_set(key, text, value):
    before = small_config()
    after = apply_overrides(before, [f"{key}={text}"])
    found = read(after, key)
    assert found == value and type(found) is type(value)
    assert to_dict(before) == to_dict(small_config())
    changed = [
        name
        for name in ("model", "optim", "schedule", "data")
        if getattr(before, name) != getattr(after, name)
    ]
    assert changed in ([], [key.split(".")[0]])


def test_later_overrides_win_and_others_stay():
    config = apply_overrides(
        small_config(),
        ["optim.normuon.lr=1", "optim.adam_table.embed.wd_mul=3", "optim.normuon.lr=2"],
    )
    assert config.optim.normuon.lr == 2.0
    assert read(config, "optim.adam_table.embed.wd_mul") == 3.0
    assert read(config, "optim.adam_table.lm_head.wd_mul") == 0.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optim.muonlr=1",
            "no setting 'muonlr'; allowed here: muon_table, adam_table, matrix_rule",
        ),
        ("modle.layers=short", "no setting 'modle'; allowed here: name, model, optim, schedule"),
        ("model.num_heads", "expected KEY=VALUE"),
        ("model.num_heads.x=2", "'num_heads' is a value and has no settings inside"),
        ("model.num_heads=2.5", "expected a whole number"),
        ("optim.normuon.lr=fast", "expected a number"),
        ("data.repeat=maybe", "expected true or false"),
        ("data.val_tokens=all", "expected none or a whole number"),
        ("precision=fp8", "expected one of auto, recipe, bf16, float32"),
        ("model.mlp.up=fp16", "expected one of bf16, fp8"),
        ("model.attention.out=fp16", "expected one of bf16, fp8"),
        ("optim.matrix_rule=adam", "expected one of normuon, muon, adamw"),
        ("optim.vector_rule=muon", "expected one of adam, adamw"),
        ("optim.weight_rounding=up", "expected one of truncate, nearest"),
        ("optim.muon.ns_precision=fp16", "expected one of bf16, weight"),
        ("optim.cautious_decay=maybe", "expected true or false"),
        ("model.mlp.x_scale=delayed", "expected one of current, static"),
        ("model=small", "can't be set as a whole; set the values inside it"),
        ("model.mlp=bf16", "can't be set as a whole; set the values inside it"),
        ("target_loss=low", "expected a number or one of gzip"),
        ("model.layers=short,medium", "role 'medium' is unknown; allowed: short, long, none"),
        ("model.layers=short*x", "the count after '*' must be a whole number"),
        ("optim.adam_table.wte.lr_mul=1", "expected one of embed.…, lm_head.…, bigram_embed.…"),
        ("optim.adam_table.embed.lr=1", "allowed here: name, beta1, beta2, lr_mul, wd_mul"),
        ("optim.adam_table=1", "can't be set as a whole; set the values inside it"),
        ("schedule.stages.2.max_seq_len=9", "expected one of 0.…, 1.…"),
        ("schedule.stages.0.tokens=9", "allowed here: tokens_per_step, max_seq_len"),
    ],
)
def test_refused_overrides(override, words):
    with pytest.raises(ConfigError) as error:
        apply_overrides(small_config(), [override])
    assert words in str(error.value)


@pytest.mark.parametrize("override", ["final_windows=5", "stages.0.prefix_weight=0.1"])
def test_pairs_need_two_values(override):
    with pytest.raises(ConfigError):
        apply_overrides(small_config(), [f"schedule.{override}"])


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_possible(name):
    config = recipes.load(name)
    check(config)
    plans = list(Schedule(config.schedule))
    assert plans[-1].last and plans[-1].step == config.schedule.total_steps
    assert config.name == name
    # JSON turns tuples into lists; nothing else may be lost in config.json.
    text = json.dumps(to_dict(config))
    assert json.loads(text) == json.loads(json.dumps(to_dict(recipes.load(name))))


def test_unknown_recipe():
    with pytest.raises(ConfigError, match=r"no recipe 'tinny'; recipes: .*tiny"):
        recipes.load("tinny")


IMPOSSIBLE = [
    ("model.num_heads=3", "model.num_heads=3: must be even"),
    ("model.num_heads=-2", "model.num_heads=-2: must be greater than 0"),
    ("model.head_dim=6", "model.head_dim=6: must be divisible by 4"),
    ("model.qk_head_dim=6", "model.qk_head_dim=6: must be divisible by 4"),
    ("model.qk_head_dim=0", "model.qk_head_dim=0: must be greater than 0, or None for head_dim"),
    ("model.model_dim=20", "model.model_dim=20: must be num_heads * head_dim = 16"),
    ("model.mlp_hidden=0", "model.mlp_hidden=0: must be greater than 0"),
    ("model.layers=short*0", "model.layers=(): needs at least one layer"),
    ("model.vocab_size=70000", "model.vocab_size=70000: must be in 1..65536"),
    ("model.bigram_dim=17", "model.bigram_dim=17: must be in 0..model_dim = 16"),
    ("model.bigram_rows=1", "model.bigram_rows=1: the table needs at least 2 rows"),
    ("model.bigram_rows=0", "model.bigram_rows=0: the table needs"),
    ("model.sign_rows=-1", "model.sign_rows=-1: must be in 0..1e+15"),
    ("model.softcap_c=0", "model.softcap_c=0.0: must be greater than 0"),
    ("schedule.num_steps=0", "schedule.num_steps=0: must be greater than 0"),
    ("schedule.val_interval=0", "schedule.val_interval=0: must be greater than 0"),
    ("schedule.lr_warmup_steps=-1", "schedule.lr_warmup_steps=-1: must be in 0..1e+15"),
    (
        "schedule.fp8_down_own_amax_steps=0",
        "schedule.fp8_down_own_amax_steps=0: must be at least 1: before the first step",
    ),
    ("schedule.extension_steps=0", "schedule.extension_steps=0: goes with schedule.extension"),
    ("schedule.stage_ends=0.5", "schedule.stage_ends=(0.5,): needs 2 rising fractions"),
    ("schedule.stage_ends=0.5,0.9", "needs 2 rising fractions, the last 1.0"),
    ("schedule.stage_ends=1.5,1.0", "needs 2 rising fractions"),
    ("schedule.stages.1.tokens_per_step=1001", "tokens_per_step=1001: must be divisible by 8"),
    ("schedule.stages.0.max_seq_len=0", "schedule.stages[0].max_seq_len=0: must be greater"),
    ("schedule.stages.0.window_long=7", "window_long=7: must be at least window_short = 8"),
    ("optim.normuon.lr=nan", "optim.normuon.lr=nan: must be greater than 0"),
    ("optim.adam.lr=-1", "optim.adam.lr=-1.0: must be greater than 0"),
    ("optim.normuon.beta2=1", "optim.normuon.beta2=1.0: must be in [0, 1)"),
    ("optim.muon.lr=0", "optim.muon.lr=0.0: must be greater than 0"),
    ("optim.muon.wd=-1", "optim.muon.wd=-1.0: must be in 0..1e+15"),
    ("optim.muon.ns_steps=0", "optim.muon.ns_steps=0: must be greater than 0"),
    (
        "optim.muon.ns_coefficients=-2,-1,1",
        "optim.muon.ns_coefficients.0=-2.0: must be in 0..1e+15",
    ),
    ("optim.adam.eps=0", "optim.adam.eps=0.0: must be greater than 0"),
    ("optim.adamw.lr=0", "optim.adamw.lr=0.0: must be greater than 0"),
    ("optim.adamw.eps=0", "optim.adamw.eps=0.0: must be greater than 0"),
    ("optim.adamw.wd=-1", "optim.adamw.wd=-1.0: must be in 0..1e+15"),
    ("optim.adamw.matrix_lr=0", "optim.adamw.matrix_lr=0.0: must be greater than 0"),
    ("optim.adamw.matrix_betas=0.9,1", "optim.adamw.matrix_betas=(0.9, 1.0): betas are in [0, 1)"),
    ("optim.replicate_below=-1", "optim.replicate_below=-1: must be in 0..1e+15"),
    ("optim.sparse_rows_threshold=-1", "optim.sparse_rows_threshold=-1: must be in 0..1e+15"),
    ("schedule.adam_interval=0", "schedule.adam_interval=0: must be greater than 0"),
    ("optim.adam_table.embed.beta2=1", "optim.adam_table.embed=(0.9, 1.0): betas are in [0, 1)"),
    ("data.val_tokens=0", "data.val_tokens=0: must be greater than 0, or None for all"),
    ("data.val_tokens_per_part=-8", "data.val_tokens_per_part=-8: must be greater than 0"),
    ("micro_batch_parts=3", "micro_batch_parts=3: must be 1, 2, 4 or 8"),
    ("log_interval=0", "log_interval=0: must be greater than 0"),
]


@pytest.mark.parametrize(("override", "words"), IMPOSSIBLE)
def test_impossible_values(override, words):
    check(small_config())
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(small_config(), [override]))
    assert words in str(error.value)


def test_impossible_gemms():
    """A recipe is Python: nothing reads its values before the check."""
    mlp = MLPConfig(dx="fp16", post="float32", x_scale="fp8")
    attention = AttentionConfig(out="fp4", x_scale="delayed")
    config = dataclasses.replace(small_config().model, mlp=mlp, attention=attention)
    with pytest.raises(ConfigError) as error:
        check(small_config(model=config))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "model.attention.out=fp4: must be bf16 or fp8",
        "model.attention.x_scale=delayed: must be current or static",
        "model.mlp.dx=fp16: must be bf16 or fp8",
        "model.mlp.post=float32: must be bf16 or fp8",
        "model.mlp.x_scale=fp8: must be current or static",
    ]


def test_impossible_update_rules():
    """The same for the optimizer's, and a table that can't be tied as the schedule has it."""
    base = small_config()
    optim = dataclasses.replace(
        base.optim,
        muon_table=(MuonRow("*_bank"), MuonRow("emb*")),
        matrix_rule="adam",
        vector_rule="muon",
        weight_rounding="up",
        muon=MuonConfig(ns_precision="fp8"),
        normuon=NorMuonConfig(polar_form="fast", polar_precision="fp8", polar_norm="max"),
        adam_table=(AdamRow("table", 0.9, 0.95, moments="fp8"),),
    )
    schedule = dataclasses.replace(base.schedule, untie_frac=0.5)
    with pytest.raises(ConfigError) as error:
        check(small_config(optim=optim, schedule=schedule))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "optim.matrix_rule=adam: must be normuon or muon or adamw",
        "optim.vector_rule=muon: must be adam or adamw",
        "optim.weight_rounding=up: must be truncate or nearest",
        "optim.normuon.polar_form=fast: must be standard or gram",
        "optim.normuon.polar_precision=fp8: must be weight or bf16 or fp16",
        "optim.normuon.polar_norm=max: must be frobenius or s4",
        "optim.muon.ns_precision=fp8: must be bf16 or weight",
        "optim.adam_table.table.moments=fp8: must be fp32 or bf16",
        "optim.muon_table.emb*=embed: can't be tied there; move it to optim.adam_table, or set "
        "schedule.untie_frac=0",
    ]
    check(small_config(schedule=schedule))


def test_all_problems_at_once():
    overrides = ["model.num_heads=3", "schedule.val_interval=0", "data.val_tokens=-1"]
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(small_config(), [*overrides, "log_interval=-2"]))
    first, *lines = str(error.value).splitlines()
    assert first == "recipe 'small' can't run:"
    keys = [line.strip().partition("=")[0] for line in lines]
    assert keys == [
        "model.num_heads",
        "model.model_dim",  # which no longer is num_heads * head_dim
        "schedule.val_interval",
        "data.val_tokens",
        "log_interval",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "optim.normuon.lr=inf",
        "optim.normuon.wd=-1",
        "optim.normuon.wd=nan",
        "optim.adam.wd=-1",
        "optim.adam_table.embed.lr_mul=-1",
        "optim.muon_table.mlp_bank.lr_muls=",  # ZeroDivisionError in optim.py
        "schedule.momentum_peak=2",
        "schedule.stages.0.lr_factor=nan",
        "schedule.final_windows=0,-1",
        "model.embed_std=-1",
        "model.bigram_scale=nan",
        "data.cu_seqlens_entries=-4",
    ],
)
def test_impossible_values_that_pass(override):
    with pytest.raises(ConfigError):
        check(apply_overrides(small_config(), [override]))


def test_steps_of_an_empty_schedule():
    config = apply_overrides(small_config(), ["schedule.num_steps=0", "schedule.extension_steps=0"])
    with pytest.raises(ConfigError):
        scaled(config.schedule, 10)


def test_vocabulary_is_padded():
    model = small_config().model
    assert model.padded_vocab_size == 32
    assert dataclasses.replace(model, vocab_size=32).padded_vocab_size == 32
    with pytest.raises(ConfigError, match="comes with the data"):
        _ = dataclasses.replace(model, vocab_size=None).padded_vocab_size
