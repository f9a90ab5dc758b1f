"""The recipe's techniques by name, and the overrides that switch each of them off."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from speedrun.config import (
    AttentionConfig,
    Config,
    ConfigError,
    HeadConfig,
    MLPConfig,
    ModelConfig,
    ScheduleConfig,
)
from speedrun.config_check import check
from speedrun.overrides import apply_overrides
from speedrun.schedule import Schedule, StepPlan

_MLP_TYPES = tuple(f.name for f in dataclasses.fields(MLPConfig) if f.name != "x_scale")

# As words of --set.
TECHNIQUES: dict[str, tuple[str, ...]] = {
    "smear": ("model.smear=false",),
    "bigram": ("model.bigram_rows=0", "model.bigram_dim=0", "model.sign_rows=0"),
    "signs": ("model.sign_rows=0",),
    "value_embeds": ("model.value_embeds=false",),
    "paired_heads": ("model.paired_heads=false",),
    "key_offset": ("model.key_offset=false",),
    "xsa": ("model.xsa=false",),
    "attention_gate": ("model.attention_gate=false",),
    "dc": ("model.dc=false",),
    "gate_networks": ("model.gates=constant",),
    "mudd": ("model.mudd=false",),
    "skip": ("model.skip=false",),
    "shared_attention_input": ("model.shared_attention_input=false",),
    "residual_lambdas": ("model.residual_lambdas=false",),
    "attention_lambdas": ("model.attention_lambdas=false",),
    # a·σ(z/c) is symmetric around its value at 0, and the softmax doesn't see that value
    "asymmetric_softcap": ("model.softcap_b=0",),
    "fp8_head": ("model.head.fp8=false", "model.head.form=logits"),
    "fp8_mlp": tuple(f"model.mlp.{name}=bf16" for name in _MLP_TYPES),
    "fp8_projections": ("model.attention.qkv=bf16", "model.attention.out=bf16"),
    "multi_token": ("schedule.multi_token=false",),
    "prefix_loss": ("schedule.prefix_loss=false",),
    "window_warmup": ("schedule.window_warmup=false",),
    "yarn": ("schedule.yarn=false",),
    "tie": ("schedule.untie_frac=0",),
    "untie": ("schedule.untie_frac=1",),
    "cautious_decay": ("optim.cautious_decay=false",),
    "variance_rescale": ("optim.variance_rescale=false",),
    "exact_weights": ("optim.exact_weights=false",),
}

# Settings that are no technique. Keys are those of --set; "name.*" is all of a section.
NOT_TECHNIQUES: dict[str, str] = dict.fromkeys(
    (
        *("model.layers", "model.model_dim", "model.num_heads", "model.head_dim"),
        *("model.qk_head_dim", "model.mlp_hidden", "model.vocab_size", "model.vocab_multiple"),
        *("model.gate_hidden", "model.dc_window"),
        *("schedule.num_steps", "schedule.stages", "schedule.stage_ends"),
        *("schedule.extension_steps", "schedule.extension", "schedule.final_windows"),
    ),
    "a size",
) | dict.fromkeys(
    (
        *("model.bigram_scale", "model.value_embed_std", "model.embed_std", "model.rotary_base"),
        *("model.score_scale", "model.softcap_a", "model.softcap_c", "model.mlp.x_scale"),
        *("model.attention.dx", "model.attention.x_scale"),
        *("model.head.x_amax", "model.head.w_amax", "model.head.grad_amax"),
        *("schedule.adam_interval", "schedule.fp8_down_own_amax_steps"),
        *(f"schedule.lr_{name}" for name in ("cooldown_start_frac", "end", "warmup_steps")),
        *(f"schedule.momentum_{name}" for name in ("start", "peak")),
        *(f"schedule.momentum_{name}_steps" for name in ("warmup", "cooldown")),
        *("optim.muon_table", "optim.adam_table", "optim.normuon.*", "optim.muon.*"),
        *("optim.adam.*", "optim.adamw.*"),
    ),
    "a number to tune, with no value that means off",
)
NOT_TECHNIQUES |= {
    "model.isolate_documents": "closes the recipe's own leaks over documents' boundaries",
    "model.head.count_missing_targets": "agreement with the public kernel",
    "model.head.round_sigmoid": "agreement with the public kernel",
    "schedule.val_interval": "what is measured, not what is trained",
    "optim.matrix_rule": "a choice between optimizers",
    "optim.vector_rule": "a choice between optimizers",
    "optim.weight_rounding": "agreement with the public program",
    "optim.cuda_graph": "how the step runs",
    "optim.replicate_below": "how gradients travel",
    "optim.sparse_rows_threshold": "how gradients travel",
}

_ROLE_SWITCHES = (
    "paired_heads",
    "value_embeds",
    "xsa",
    "attention_gate",
    "dc",
    "skip",
    "shared_attention_input",
    "mudd",
)


def in_use(config: Config, *, precision: str, tokenizer: str) -> dict[str, Config]:
    """By name each technique that `config` has, with the config that lacks only that one.

    precision: that of the run, "float32", "bf16" or "recipe"; tokenizer: of its data. A switch
    that changes nothing there (FP8 in float32, prefixes of bytes, a role that no layer has) is
    left out. ConfigError for a model that has no switches.
    """
    if not isinstance(config.model, ModelConfig):
        raise ConfigError(
            f"recipe {config.name!r}: its model is fixed, there is nothing to switch off"
        )
    computed = _computed(config, precision, tokenizer)
    found = {}
    for name, overrides in TECHNIQUES.items():
        if name == "gate_networks" and config.model.gates == "none":
            continue  # constants would be something new
        without = apply_overrides(config, list(overrides))
        if _computed(without, precision, tokenizer) != computed:
            try:
                check(without)
            except ConfigError as error:
                raise ConfigError(f"without technique {name!r}, {error}") from None
            found[name] = without
    return found


def _computed(config: Config, precision: str, tokenizer: str) -> tuple[Any, ...]:
    """Equal for configs that compute the same: without switches of what isn't there."""
    model, optim = config.model, config.optim
    layers = model.active_layers
    model = dataclasses.replace(model, layers=layers, **dict.fromkeys(_ROLE_SWITCHES, True))
    if not any(layer.window == "long" and layer.attention for layer in layers):
        model = dataclasses.replace(model, key_offset=False)
    if not model.bigram_rows:
        model = dataclasses.replace(model, sign_rows=0)
    if precision != "recipe":
        plain = dict(attention=AttentionConfig(), mlp=MLPConfig(), head=HeadConfig())
        model = dataclasses.replace(model, **plain)
    if precision == "float32" or optim.matrix_rule == "adamw":
        optim = dataclasses.replace(optim, exact_weights=False)
    if optim.matrix_rule != "normuon":
        optim = dataclasses.replace(optim, variance_rescale=False)
        if optim.vector_rule != "adam":
            optim = dataclasses.replace(optim, cautious_decay=False)
    schedule = config.schedule
    if tokenizer == "bytes":
        schedule = dataclasses.replace(schedule, prefix_loss=False)
    return model, optim, _plans(schedule)


@functools.cache
def _plans(config: ScheduleConfig) -> tuple[StepPlan, ...]:
    """Once for the many configs that differ in other things."""
    return tuple(Schedule(config))
