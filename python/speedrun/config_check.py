"""Whether a config can work: `check` lists every value that can't, with its key and the rule."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from speedrun.config import (
    NUM_PARTS,
    BaselineConfig,
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
)

LARGEST_NUMBER = 1e15  # squared, it still fits into float32
MAY_BE_NEGATIVE = ("model.softcap_b", "optim.muon.ns_coefficients.1")


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a config, with its key."""
    if dataclasses.is_dataclass(node):
        for f in dataclasses.fields(node):
            yield from _numbers(getattr(node, f.name), f"{key}.{f.name}" if key else f.name)
    elif isinstance(node, tuple):
        for i, item in enumerate(node):
            yield from _numbers(item, f"{key}.{getattr(item, 'name', i)}")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield key, node


def check(config: Config) -> None:
    """Raise ConfigError, listing every value of `config` that can't work."""
    problems: dict[str, str] = {}  # by key: one line for each

    def require(ok: bool, key: str, value: Any, rule: str) -> None:
        if not ok:
            problems.setdefault(key, f"{key}={value}: {rule}")

    def require_positive(section: Any, prefix: str, *names: str) -> None:
        for name in names:
            value = getattr(section, name)
            require(value > 0, f"{prefix}{name}", value, "must be greater than 0")

    model, schedule, optim, data = config.model, config.schedule, config.optim, config.data
    require_positive(model, "model.", "model_dim", "head_dim", "mlp_hidden", "vocab_multiple")
    require_positive(model, "model.", "rotary_base", "score_scale")
    qk_key = "model.head_dim" if model.qk_dim == model.head_dim else "model.qk_head_dim"
    require(model.qk_dim % 4 == 0, qk_key, model.qk_dim, "must be divisible by 4")
    require(
        model.vocab_size is None or 0 < model.vocab_size <= 65536,
        "model.vocab_size",
        model.vocab_size,
        "must be in 1..65536 (tokens are 16 bits)",
    )
    if isinstance(model, BaselineConfig):
        _check_baseline(config, require, require_positive)
    else:
        _check_gpt(model, require, require_positive)

    require_positive(schedule, "schedule.", "num_steps", "val_interval", "adam_interval")
    require(schedule.untie_frac <= 1, "schedule.untie_frac", schedule.untie_frac, "must be in 0..1")
    for name in ("momentum_start", "momentum_peak"):
        value = getattr(schedule, name)
        require(value <= 1, f"schedule.{name}", value, "must be at most 1")
    require_positive(schedule, "schedule.", "momentum_warmup_steps", "momentum_cooldown_steps")
    require(
        schedule.fp8_down_own_amax_steps > 0,
        "schedule.fp8_down_own_amax_steps",
        schedule.fp8_down_own_amax_steps,
        "must be at least 1: before the first step there is no other amax",
    )
    require(len(schedule.stages) > 0, "schedule.stages", "()", "needs at least one stage")
    require(
        not schedule.stage_ends
        or (
            len(schedule.stage_ends) == len(schedule.stages)
            and list(schedule.stage_ends) == sorted(schedule.stage_ends)
            and schedule.stage_ends[-1] == 1.0
        ),
        "schedule.stage_ends",
        schedule.stage_ends,
        f"needs {len(schedule.stages)} rising fractions, the last 1.0",
    )
    require(
        (schedule.extension is None) == (schedule.extension_steps == 0),
        "schedule.extension_steps",
        schedule.extension_steps,
        "goes with schedule.extension: both or neither",
    )
    stages = list(schedule.stages) + ([schedule.extension] if schedule.extension else [])
    for i, stage in enumerate(stages):
        prefix = f"schedule.stages[{i}]."
        require_positive(stage, prefix, "tokens_per_step", "max_seq_len", "window_short")
        require(
            stage.tokens_per_step % NUM_PARTS == 0,
            prefix + "tokens_per_step",
            stage.tokens_per_step,
            f"must be divisible by {NUM_PARTS}",
        )
        require(
            stage.window_long >= stage.window_short,
            prefix + "window_long",
            stage.window_long,
            f"must be at least window_short = {stage.window_short}",
        )
    _check_optim(optim, schedule.untie_frac > 0, require)
    require_positive(data, "data.", "val_tokens_per_part", "train_shards")
    require(
        data.cu_seqlens_entries is None or data.cu_seqlens_entries > 1,
        "data.cu_seqlens_entries",
        data.cu_seqlens_entries,
        "must be at least 2, or None for the recipe's rule",
    )
    require(
        data.val_tokens is None or data.val_tokens > 0,
        "data.val_tokens",
        data.val_tokens,
        "must be greater than 0, or None for all",
    )
    require(
        data.val_tokens_at_most is None or data.val_tokens_at_most > 0,
        "data.val_tokens_at_most",
        data.val_tokens_at_most,
        "must be greater than 0, or None for no limit",
    )
    require(
        config.micro_batch_parts in (1, 2, 4, 8),
        "micro_batch_parts",
        config.micro_batch_parts,
        "must be 1, 2, 4 or 8",
    )
    require_positive(config, "", "log_interval")
    skips = config.guards.skip_nonfinite or config.guards.skip_z > 0
    require(
        not skips or config.guards.check in ("auto", "step"),
        "guards.check",
        config.guards.check,
        "must be step (or auto) to leave updates out by guards.skip_nonfinite or guards.skip_z",
    )
    for key, value in _numbers(config):
        ok = abs(value) <= LARGEST_NUMBER and (value >= 0 or key in MAY_BE_NEGATIVE)
        require(ok, key, value, f"must be in 0..{LARGEST_NUMBER:g}")
    if problems:
        lines = "\n  ".join(problems.values())
        raise ConfigError(f"recipe {config.name!r} can't run:\n  {lines}")


def _check_gpt(model: ModelConfig, require: Callable, require_positive: Callable) -> None:
    require_positive(model, "model.", "num_heads", "softcap_a", "softcap_c")
    require(
        model.qk_dim > 0,
        "model.qk_head_dim",
        model.qk_head_dim,
        "must be greater than 0, or None for head_dim",
    )
    require(len(model.layers) > 0, "model.layers", "()", "needs at least one layer")
    require(model.num_heads % 2 == 0, "model.num_heads", model.num_heads, "must be even")
    require(
        model.num_heads * model.head_dim == model.model_dim,
        "model.model_dim",
        model.model_dim,
        f"must be num_heads * head_dim = {model.num_heads * model.head_dim}",
    )
    for section in ("attention", "mlp"):
        values = getattr(model, section)
        for f in dataclasses.fields(values):
            value, key = getattr(values, f.name), f"model.{section}.{f.name}"
            allowed = ("current", "static") if f.name == "x_scale" else ("bf16", "fp8")
            require(value in allowed, key, value, f"must be {' or '.join(allowed)}")
    gate_kinds = ("network", "constant", "none")
    require(
        model.gates in gate_kinds, "model.gates", model.gates, f"must be {' or '.join(gate_kinds)}"
    )
    require_positive(model, "model.", "gate_hidden", "dc_window")
    head_numbers = ("x_amax", "w_amax", "grad_amax")
    require_positive(model.head, "model.head.", *head_numbers)
    _check_head_form(model, require)
    _check_layers(model, require)
    require(
        0 <= model.bigram_dim <= model.model_dim,
        "model.bigram_dim",
        model.bigram_dim,
        f"must be in 0..model_dim = {model.model_dim}",
    )
    require(
        (model.bigram_rows > 1) == (model.bigram_dim > 0),
        "model.bigram_rows",
        model.bigram_rows,
        "the table needs at least 2 rows and bigram_dim > 0, or both 0",
    )


def _check_head_form(model: ModelConfig, require: Callable) -> None:
    """What the head without logits in memory can't do."""
    head, key = model.head, "model.head.form"
    require(head.form in ("logits", "fused"), key, head.form, "must be logits or fused")
    if head.form != "fused":
        return
    from speedrun.ops.head_logits import LARGEST_SOFTCAP  # with torch: not for every recipe

    require(
        head.fp8, key, "fused", "is a form of the FP8 head: set model.head.fp8=true, or form=logits"
    )
    for name in ("count_missing_targets", "round_sigmoid"):
        require(
            not getattr(head, name),
            f"model.head.{name}",
            "true",
            "is the public kernel's way, which model.head.form=fused doesn't follow: "
            "set it to false, or form=logits",
        )
    require(
        model.softcap_a <= LARGEST_SOFTCAP,
        "model.softcap_a",
        model.softcap_a,
        f"must be at most {LARGEST_SOFTCAP:g} with model.head.form=fused, whose e5m2 has no "
        "numbers for the gradients of more: lower it, or set form=logits",
    )


def _check_baseline(config: Config, require: Callable, require_positive: Callable) -> None:
    """The track `optimization` fixes the architecture: what others have, it does not."""
    model, schedule = config.model, config.schedule
    require_positive(model, "model.", "num_layers", "softcap")
    require(
        model.head_dim <= 0 or model.model_dim % model.head_dim == 0,
        "model.model_dim",
        model.model_dim,
        f"must be divisible by head_dim = {model.head_dim}",
    )
    require(schedule.untie_frac == 0, "schedule.untie_frac", schedule.untie_frac, "must be 0")
    require(not schedule.yarn, "schedule.yarn", schedule.yarn, "must be false")
    for i, stage in enumerate([*schedule.stages, *filter(None, [schedule.extension])]):
        prefix = f"schedule.stages[{i}]."
        require(
            stage.window_long >= stage.max_seq_len - 1,
            prefix + "window_long",
            stage.window_long,
            f"must reach over a whole sequence: at least max_seq_len - 1 = {stage.max_seq_len - 1}",
        )
        require(
            not schedule.multi_token or stage.multi_token_weights == ((1.0, 1.0),),
            prefix + "multi_token_weights",
            stage.multi_token_weights,
            "must be ((1, 1),): the next token is the only target",
        )
        require(
            not schedule.prefix_loss or stage.prefix_weight == (0.0, 0.0),
            prefix + "prefix_weight",
            stage.prefix_weight,
            "must be (0, 0): the next token is the only target",
        )


def _check_optim(optim: OptimConfig, tied: bool, require: Callable) -> None:
    for rule in (optim.normuon, optim.muon, optim.adam, optim.adamw):
        prefix = f"optim.{type(rule).__name__.removesuffix('Config').lower()}."
        for name in ("lr", "eps", "ns_steps", "matrix_lr"):
            value = getattr(rule, name, 1)
            require(value > 0, prefix + name, value, "must be greater than 0")
    for section, key, name in (
        (optim, "optim.", "matrix_rule"),
        (optim, "optim.", "vector_rule"),
        (optim, "optim.", "weight_rounding"),
        (optim.normuon, "optim.normuon.", "polar_form"),
        (optim.normuon, "optim.normuon.", "polar_precision"),
        (optim.normuon, "optim.normuon.", "polar_norm"),
        (optim.muon, "optim.muon.", "ns_precision"),
        *((row, f"optim.adam_table.{row.name}.", "moments") for row in optim.adam_table),
    ):
        value = getattr(section, name)
        allowed = typing.get_args(typing.get_type_hints(type(section))[name])
        require(value in allowed, key + name, value, f"must be {' or '.join(allowed)}")
    beta2 = optim.normuon.beta2
    require(0 <= beta2 < 1, "optim.normuon.beta2", beta2, "must be in [0, 1)")
    betas = {"optim.adamw.matrix_betas": optim.adamw.matrix_betas}
    betas |= {f"optim.adam_table.{row.name}": (row.beta1, row.beta2) for row in optim.adam_table}
    for key, pair in betas.items():
        require(all(0 <= beta < 1 for beta in pair), key, pair, "betas are in [0, 1)")
    for row in optim.muon_table:
        require(bool(row.lr_muls), f"optim.muon_table.{row.name}.lr_muls", "()", "needs a number")
        for name in ("embed", "lm_head"):
            require(
                not (tied and fnmatchcase(name, row.name)),
                f"optim.muon_table.{row.name}",
                name,
                "can't be tied there; move it to optim.adam_table, or set schedule.untie_frac=0",
            )


def _check_layers(model: ModelConfig, require: Callable) -> None:
    """Roles that a layer can't have: each needs something before it, or beside it."""
    saved, last_net, num_mudd = False, "pre", 0
    for i, layer in enumerate(model.active_layers):
        roles = [name for name in ("gated", "xsa", "dc", "skip") if getattr(layer, name)]
        if layer.attention is None:
            roles = [name for name in roles if name == "skip"]
        key = f"model.layers[{i}]"
        require(
            not roles or model.gates != "none",
            key,
            "+".join(roles),
            "needs model.gates=network or constant",
        )
        needs_saved = [n for n in ("skip", "shared_input", "mudd") if getattr(layer, n)]
        require(
            not needs_saved or saved,
            key,
            "+".join(needs_saved),
            'needs an earlier layer with the word "save"',
        )
        require(
            not layer.mudd or layer.attention is not None,
            key,
            "mudd",
            "needs a layer with attention",
        )
        require(
            (last_net, layer.gate_net) != ("post", "pre"),
            key,
            "pre",
            'comes after a layer with "post"; the gates of x come last',
        )
        saved, last_net, num_mudd = saved or layer.save, layer.gate_net, num_mudd + layer.mudd
    require(
        num_mudd <= 1, "model.layers", f"{num_mudd} layers with mudd", "at most one can have it"
    )
