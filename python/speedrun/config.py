"""Every number that changes a result: frozen dataclasses, and the parsing of `--set a.b=value`.

A recipe (`speedrun/recipes/<name>.py`) builds one `Config`. Nothing here knows a device, rank or
file: a config can be printed, compared and stored. Units: tokens for windows and lengths unless a
name says otherwise; steps count from 0.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

# Rules of the game (records README of the public speedrun; RECIPE: task).
TARGET_LOSS_MAIN = 3.28  # nats per token, FineWeb validation
TARGET_LOSS_MEDIUM = 2.92
RECORD_P_VALUE = 0.01
RECORD_VAL_TOKENS = 10_485_760
NUM_PARTS = 8  # a step is always eight parts, whatever the number of ranks


class ConfigError(ValueError):
    """A config value that can't work. The message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class LayerSpec:
    """The role of one layer. `attention=None` leaves the attention out."""

    attention: Literal["causal"] | None = "causal"
    window: Literal["short", "long"] = "short"

    WORDS: typing.ClassVar = {
        "short": {"window": "short"},
        "long": {"window": "long"},
        "none": {"attention": None},
    }

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """Read one layer from words joined by '+', as in "long" or "none"."""
        values: dict[str, Any] = {}
        for word in text.split("+"):
            if word not in cls.WORDS:
                raise ConfigError(
                    f"layer role {word!r} is unknown; allowed: {', '.join(cls.WORDS)}"
                )
            values |= cls.WORDS[word]
        return cls(**values)

    @classmethod
    def parse_many(cls, text: str) -> tuple[LayerSpec, ...]:
        """Read "short*2,long" as two short layers and a long one."""
        layers: list[LayerSpec] = []
        for item in text.split(","):
            role, _, count = item.partition("*")
            if count and not count.isdigit():
                raise ConfigError(f"layers {item!r}: the count after '*' must be a whole number")
            layers += [cls.parse(role)] * int(count or 1)
        return tuple(layers)


@dataclass(frozen=True)
class MLPConfig:
    """Precision of the MLP in training, where `precision` is "recipe". Defaults: record_089's.

    The first six: the type of each GEMM's operands, by what it makes: relu² (up), the output
    (down), the gradient before relu² (dpre), and those of the input, of Up and of Down.
    """

    up: Literal["bf16", "fp8"] = "fp8"
    down: Literal["bf16", "fp8"] = "fp8"
    dpre: Literal["bf16", "fp8"] = "bf16"
    dx: Literal["bf16", "fp8"] = "bf16"
    dup: Literal["bf16", "fp8"] = "bf16"
    ddown: Literal["bf16", "fp8"] = "bf16"
    post: Literal["bf16", "fp8"] = "bf16"  # how relu² is kept for the backward pass
    x_scale: Literal["current", "static"] = "current"  # of the input: its own amax, or √D/448

    @property
    def uses_fp8(self) -> bool:
        return "fp8" in dataclasses.astuple(self)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the GPT. D model_dim, H num_heads, K head_dim, F mlp_hidden, V padded_vocab_size."""

    layers: tuple[LayerSpec, ...]
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_hidden: int
    vocab_size: int | None = None  # None: that of the data's tokenizer
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this
    bigram_rows: int = 0  # rows of the bigram hash table, 0: no table
    bigram_dim: int = 0  # the first bigram_dim columns of x receive the bigram embedding
    bigram_scale: float = 0.05
    sign_rows: int = 0  # rows of the fixed random sign table, 0: no signs
    rotary_base: float = 1024.0
    score_scale: float = 0.1
    softcap_a: float = 23.0  # logits = a * sigmoid((z + b) / c)
    softcap_b: float = 5.0
    softcap_c: float = 7.5
    embed_std: float = 0.005  # embed and lm_head start as the same N(0, embed_std^2)
    mlp: MLPConfig = field(default_factory=MLPConfig)

    @property
    def padded_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is not known yet: it comes with the data")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def num_attentions(self) -> int:
        return sum(layer.attention is not None for layer in self.layers)


@dataclass(frozen=True)
class Stage:
    """One stretch of the schedule. Tuples of two are (start, end), gone through linearly."""

    tokens_per_step: int  # over all eight parts
    max_seq_len: int
    window_short: int
    window_long: int
    lr_factor: float = 1.0
    multi_token_weights: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    prefix_weight: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Stages share the scheduled steps equally unless `stage_ends` (fractions) says otherwise."""

    num_steps: int  # scheduled steps, without the extension
    stages: tuple[Stage, ...]
    stage_ends: tuple[float, ...] = ()
    extension_steps: int = 0
    extension: Stage | None = None  # its lr_factor is the rate itself, not blended
    final_windows: tuple[int, int] | None = None  # (short, long) of the last validation
    val_interval: int = 250  # steps
    lr_cooldown_start_frac: float = 0.4  # of num_steps
    lr_end: float = 0.15
    lr_warmup_steps: int = 0
    momentum_start: float = 0.85
    momentum_peak: float = 0.95
    momentum_warmup_steps: int = 300
    momentum_cooldown_steps: int = 50
    # FP8 copies of the MLP's down weights: by their own amax for so many steps, while they leave
    # zero, then by that of the step before, with headroom.
    fp8_down_own_amax_steps: int = 17

    @property
    def total_steps(self) -> int:
        return self.num_steps + self.extension_steps


@dataclass(frozen=True)
class AdamRow:
    """Adam's numbers for one parameter (RECIPE: optimizer, the table)."""

    name: str
    beta1: float
    beta2: float
    lr_mul: float = 1.0
    wd_mul: float = 0.0


@dataclass(frozen=True)
class MuonRow:
    """NorMuon's numbers for one bank. `lr_muls` repeats over the matrices of the bank."""

    name: str
    lr_muls: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class OptimConfig:
    muon_table: tuple[MuonRow, ...]
    adam_table: tuple[AdamRow, ...]
    muon_lr: float = 0.023
    muon_wd: float = 1.2
    muon_beta2: float = 0.9
    adam_lr: float = 0.008
    adam_wd: float = 0.005
    adam_eps: float = 1e-10
    adam_interval: int = 2  # Adam updates every so many steps, with the sum of their gradients


@dataclass(frozen=True)
class DataConfig:
    default: Literal["fineweb", "stdlib"] = "fineweb"  # what to train on without --data or --text
    train_shards: int = 9  # shards `fineweb` fetches
    long_documents: Literal["cut", "split"] = "cut"
    repeat: bool = False
    cu_seqlens_entries: int | None = None  # None: by the rule of RECIPE section 2
    val_tokens: int | None = RECORD_VAL_TOKENS  # None: all there are, up to val_tokens_at_most
    val_tokens_at_most: int | None = None
    val_tokens_per_part: int = 262_144


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    data: DataConfig = field(default_factory=DataConfig)
    # nats per token; "gzip": what gzip -9 needs for a byte of the same validation text
    target_loss: float | Literal["gzip"] = TARGET_LOSS_MAIN
    # recipe: bf16 parameters, and FP8 as model.mlp says. auto: float32 on CPUs, on GPUs recipe, or
    # bf16 where they have no FP8.
    precision: Literal["auto", "recipe", "bf16", "float32"] = "auto"
    micro_batch_parts: int = 1  # parts of a step that go through the model at once
    log_interval: int = 1  # steps between training lines of the log


LARGEST_NUMBER = 1e15  # squared, it still fits into float32
MAY_BE_NEGATIVE = ("model.softcap_b",)


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
    require_positive(
        model, "model.", "model_dim", "num_heads", "head_dim", "mlp_hidden", "vocab_multiple"
    )
    require_positive(model, "model.", "rotary_base", "score_scale", "softcap_a", "softcap_c")
    require(len(model.layers) > 0, "model.layers", "()", "needs at least one layer")
    require(model.num_heads % 2 == 0, "model.num_heads", model.num_heads, "must be even")
    require(model.head_dim % 4 == 0, "model.head_dim", model.head_dim, "must be divisible by 4")
    require(
        model.num_heads * model.head_dim == model.model_dim,
        "model.model_dim",
        model.model_dim,
        f"must be num_heads * head_dim = {model.num_heads * model.head_dim}",
    )
    require(
        model.vocab_size is None or 0 < model.vocab_size <= 65536,
        "model.vocab_size",
        model.vocab_size,
        "must be in 1..65536 (tokens are 16 bits)",
    )
    for f in dataclasses.fields(model.mlp):
        value = getattr(model.mlp, f.name)
        allowed = ("current", "static") if f.name == "x_scale" else ("bf16", "fp8")
        require(value in allowed, f"model.mlp.{f.name}", value, f"must be {' or '.join(allowed)}")
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

    require_positive(schedule, "schedule.", "num_steps", "val_interval")
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
        require(
            stage.prefix_weight == (0.0, 0.0),
            prefix + "prefix_weight",
            stage.prefix_weight,
            "must be 0,0: the model has no prefix targets yet",
        )
    require_positive(optim, "optim.", "muon_lr", "adam_lr", "adam_eps", "adam_interval")
    require(0 <= optim.muon_beta2 < 1, "optim.muon_beta2", optim.muon_beta2, "must be in [0, 1)")
    for row in optim.muon_table:
        require(bool(row.lr_muls), f"optim.muon_table.{row.name}.lr_muls", "()", "needs a number")
    for row in optim.adam_table:
        ok = 0 <= row.beta1 < 1 and 0 <= row.beta2 < 1
        require(ok, f"optim.adam_table.{row.name}", (row.beta1, row.beta2), "betas are in [0, 1)")
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
    for key, value in _numbers(config):
        ok = abs(value) <= LARGEST_NUMBER and (value >= 0 or key in MAY_BE_NEGATIVE)
        require(ok, key, value, f"must be in 0..{LARGEST_NUMBER:g}")
    if problems:
        lines = "\n  ".join(problems.values())
        raise ConfigError(f"recipe {config.name!r} can't run:\n  {lines}")


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Return `config` with each "a.b=value" applied. Raises ConfigError with the allowed keys."""
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq:
            raise ConfigError(f"--set {override!r}: expected KEY=VALUE, as in model.num_heads=4")
        config = _replace(config, key.strip().split("."), text.strip(), key)
    return config


def _replace(node: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        return _replace_item(node, name, rest, text, key)
    hints = typing.get_type_hints(type(node))
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        raise ConfigError(f"--set {key}: no setting {name!r}; allowed here: {', '.join(names)}")
    value = getattr(node, name)
    if rest:
        if not (dataclasses.is_dataclass(value) or isinstance(value, tuple)):
            raise ConfigError(f"--set {key}: {name!r} is a value and has no settings inside")
        return dataclasses.replace(node, **{name: _replace(value, rest, text, key)})
    return dataclasses.replace(node, **{name: _parse(text, hints[name], key)})


def _replace_item(node: tuple, name: str, rest: list[str], text: str, key: str) -> tuple:
    """Tuples are addressed by index (stages) or by the `name` of their rows (optimizer tables)."""
    keys = [getattr(item, "name", str(i)) for i, item in enumerate(node)]
    if name not in keys or not rest:
        wanted = "one of " + ", ".join(f"{k}.…" for k in keys)
        raise ConfigError(f"--set {key}: expected {wanted} after the table's name")
    i = keys.index(name)
    return (*node[:i], _replace(node[i], rest, text, key), *node[i + 1 :])


def _parse(text: str, hint: Any, key: str) -> Any:
    """Read `text` as the annotated type. Unions try their members in order, None first."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        allowed = []
        for member in sorted(args, key=lambda m: m is not type(None)):
            try:
                return _parse(text, member, key)
            except ConfigError as error:
                allowed.append(str(error).partition("expected ")[2])
        raise ConfigError(f"--set {key}={text!r}: expected {' or '.join(allowed)}")
    if origin is Literal:
        if text not in args:
            raise ConfigError(f"--set {key}={text!r}: expected one of {', '.join(map(str, args))}")
        return text
    if hint is type(None):
        if text.lower() != "none":
            raise ConfigError(f"--set {key}={text!r}: expected none")
        return None
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--set {key}={text!r}: expected true or false")
        return text.lower() in ("true", "1")
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(f"--set {key}={text!r}: expected {kind}") from None
    if hint is str:
        return text
    if origin is tuple and args[0] is LayerSpec:
        try:
            return LayerSpec.parse_many(text)
        except ConfigError as error:
            raise ConfigError(f"--set {key}={text!r}: {error}") from None
    if origin is tuple and args[0] in (int, float):
        values = tuple(_parse(item, args[0], key) for item in text.split(",") if item)
        if args[-1] is not Ellipsis and len(values) != len(args):
            raise ConfigError(f"--set {key}={text!r}: expected {len(args)} numbers, as in 1,2")
        return values
    raise ConfigError(f"--set {key}: can't be set as a whole; set the values inside it")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts and lists, for JSON."""
    return dataclasses.asdict(config)
