"""Every number that changes a result, as frozen dataclasses.

A recipe (`speedrun/recipes/<name>.py`) builds one `Config`. Nothing here knows a device, rank or
file: a config can be printed, compared and stored. Units: tokens for windows and lengths unless a
name says otherwise; steps count from 0.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Rules of the game (records README of the public speedrun; RECIPE: task).
TARGET_LOSS_MAIN = 3.28  # nats per token, FineWeb validation
TARGET_LOSS_MEDIUM = 2.92
RECORD_P_VALUE = 0.01
RECORD_VAL_TOKENS = 10_485_760
NUM_PARTS = 8  # of a step, on 1 to 8 ranks: all of them see the same tokens in the same parts
GRADIENT_DIVISOR = 8  # gradients are those of the step's summed loss / 8, on any number of ranks


def num_parts(world_size: int) -> int:
    """Parts of a step, dealt to the ranks like cards: eight, or one a rank where ranks are more."""
    return max(NUM_PARTS, world_size)


class ConfigError(ValueError):
    """A config value that can't work. The message names the key, the value and what is allowed."""


class Windows(NamedTuple):
    """Attention windows of one step, in tokens: a window of w shows keys t−w … t.

    `yarn`: the long windows (from, to) over which rotary frequencies were stretched so far.
    """

    short: int
    long: int
    yarn: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """The roles of one layer (RECIPE section 3). `ModelConfig` has a switch for each of them."""

    attention: Literal["causal"] | None = "causal"  # None: no attention in this layer
    window: Literal["short", "long"] = "short"
    paired: bool = False  # heads j and j + H/2 attend as one sequence of twice the length
    value_embed: bool = False  # gated rows of a table of its own are added to the values
    xsa: bool = False  # exclusive self-attention: the own value's direction is taken out
    gated: bool = False  # a factor for each head and token behind attention
    dc: bool = False  # dynamically composed attention: heads share their weights' mixture
    shared_input: bool = False  # attention reads x as last saved instead of its own
    skip: bool = False  # a gated share of x as last saved is added first
    save: bool = False  # x behind this layer is kept for skip, shared_input and mudd
    mudd: bool = False  # a network mixes saved x into values, residual and MLP; at most one layer
    gate_net: Literal["pre", "post"] = "pre"  # whose gates: of x0, or of x before the first "post"

    WORDS: typing.ClassVar[dict[str, dict[str, Any]]] = {
        "short": {"window": "short"},
        "long": {"window": "long"},
        "none": {"attention": None},
        "paired": {"paired": True},
        "ve": {"value_embed": True},
        "xsa": {"xsa": True},
        "gated": {"gated": True},
        "dc": {"dc": True},
        "shared": {"shared_input": True},
        "skip": {"skip": True},
        "save": {"save": True},
        "mudd": {"mudd": True},
        "post": {"gate_net": "post"},
    }

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """Read one layer from words joined by '+', as in "long" or "paired+ve"."""
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
class AttentionConfig:
    """Precision of attention's projections in training, where `precision` is "recipe".

    Off by default, as in record_089. Gradients of the weights are always made of bf16.
    """

    qkv: Literal["bf16", "fp8"] = "bf16"  # operands of the product for Q, K and V
    out: Literal["bf16", "fp8"] = "bf16"  # and for attention's output
    dx: Literal["bf16", "fp8"] = "bf16"  # for the inputs' gradients of those that are fp8
    x_scale: Literal["current", "static"] = "static"  # of QKV's input: its own amax, or √D/448

    @property
    def uses_fp8(self) -> bool:
        return "fp8" in (self.qkv, self.out)


@dataclass(frozen=True)
class HeadConfig:
    """Numerics of the head in training. The largest values are what FP8's scales are made for."""

    fp8: bool = True  # where `precision` is "recipe"
    # "fused": the FP8 head without logits in memory, and with targets in bf16. Where `precision` is
    # another (on a CPU "auto" is), and in validation, both forms are the same head without FP8.
    form: Literal["logits", "fused"] = "logits"
    x_amax: float = 100.0
    w_amax: float = 1.6
    grad_amax: float = 0.75
    # What the public kernel does: its gradient counts the weights of targets behind the batch's
    # end, and it rounds the softcap's sigmoid to bf16 (here in FP8 training only).
    count_missing_targets: bool = False
    round_sigmoid: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and techniques of the GPT.

    D model_dim, H num_heads, K qk_dim, E head_dim, F mlp_hidden, V padded_vocab_size. Each
    technique is one field. Those that are a role of layers are on by default and do nothing until a
    layer has it.
    """

    layers: tuple[LayerSpec, ...]
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_hidden: int
    qk_head_dim: int | None = None  # of queries and keys, where it isn't that of the values
    vocab_size: int | None = None  # None: that of the data's tokenizer
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this
    bigram_rows: int = 0  # rows of the bigram hash table, 0: no table
    bigram_dim: int = 0  # the first bigram_dim columns of x receive the bigram embedding
    bigram_scale: float = 0.05  # its factor; with gates their start value
    sign_rows: int = 0  # rows of the fixed random sign table, 0: no signs
    smear: bool = False  # the token before is mixed into each embedding
    # Factors for each token on x0, bigram embedding, attention, XSA, skip and DC: by a small
    # network; learned but the same for all tokens; or none.
    gates: Literal["network", "constant", "none"] = "none"
    gate_hidden: int = 64  # of these networks and MUDD's
    residual_lambdas: bool = False  # learned factors on residual stream and on layers' outputs
    attention_lambdas: bool = False  # learned factors on the weights of QKV and of the output
    key_offset: bool = False  # long windows: half of each key is that of the token before
    paired_heads: bool = True
    value_embeds: bool = True
    value_embed_std: float = 0.01
    xsa: bool = True
    attention_gate: bool = True
    dc: bool = True
    dc_window: int = 112  # positions that DC sees: t−111 … t
    skip: bool = True
    shared_attention_input: bool = True
    mudd: bool = True
    isolate_documents: bool = False  # also what looks at neighbouring tokens stays in a document
    rotary_base: float = 1024.0
    score_scale: float = 0.1
    softcap_a: float = 23.0  # logits = a * sigmoid((z + b) / c)
    softcap_b: float = 5.0
    softcap_c: float = 7.5
    embed_std: float = 0.005  # embed and lm_head start as the same N(0, embed_std^2)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    head: HeadConfig = field(default_factory=HeadConfig)

    @property
    def active_layers(self) -> tuple[LayerSpec, ...]:
        """The layers without the roles that are switched off."""
        off = {
            "paired": not self.paired_heads,
            "value_embed": not self.value_embeds,
            "xsa": not self.xsa,
            "gated": not self.attention_gate,
            "dc": not self.dc,
            "skip": not self.skip,
            "shared_input": not self.shared_attention_input,
            "mudd": not self.mudd,
        }
        without: dict[str, Any] = {role: False for role, is_off in off.items() if is_off}
        return tuple(dataclasses.replace(layer, **without) for layer in self.layers)

    @property
    def padded_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is not known yet: it comes with the data")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def qk_dim(self) -> int:
        return self.head_dim if self.qk_head_dim is None else self.qk_head_dim

    @property
    def num_attentions(self) -> int:
        return sum(layer.attention is not None for layer in self.layers)


@dataclass(frozen=True)
class BaselineConfig:
    """Sizes of `BaselineGPT`, the plain GPT of the track `optimization` (RECIPE section 7)."""

    num_layers: int
    model_dim: int
    head_dim: int
    mlp_hidden: int
    vocab_size: int | None = None  # None: that of the data's tokenizer
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this
    rotary_base: float = 1024.0
    score_scale: float = 0.12
    softcap: float = 15.0  # logits = softcap * z / sqrt(z^2 + softcap^2)
    embed_std: float = 1.0
    weight_variance: float = 0.33  # matrices start as N(0, weight_variance / fan_in)

    bigram_rows: typing.ClassVar[int] = 0  # it has no tables, whose rows come with the batches
    sign_rows: typing.ClassVar[int] = 0

    padded_vocab_size = ModelConfig.padded_vocab_size

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def qk_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True)
class Stage:
    """One stretch of the schedule. Tuples of two are (start, end), gone through linearly."""

    tokens_per_step: int  # over all parts
    max_seq_len: int
    window_short: int
    window_long: int
    lr_factor: float = 1.0
    multi_token_weights: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    prefix_weight: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Stages share the scheduled steps equally unless `stage_ends` (fractions) says otherwise.

    Techniques: multi_token, prefix_loss, window_warmup, yarn, untie_frac.
    """

    num_steps: int  # scheduled steps, without the extension
    stages: tuple[Stage, ...]
    stage_ends: tuple[float, ...] = ()
    extension_steps: int = 0
    extension: Stage | None = None  # its lr_factor is the rate itself, not blended
    final_windows: tuple[int, int] | None = None  # (short, long) of the last validation
    multi_token: bool = True  # False: only the next token is a target
    prefix_loss: bool = True  # False: prefix weights are 0
    window_warmup: bool = True  # False: every stage has the last training stage's windows
    yarn: bool = False  # rotary frequencies are stretched whenever the long window grows
    # embed and lm_head are one parameter for this share of num_steps, and part at the first Adam
    # step from there on. 0: two parameters from the start, 1: one to the end.
    untie_frac: float = 0.0
    adam_interval: int = 2  # Adam updates every so many steps, with the sum of their gradients
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
    """Numbers of the parameters that `name` matches, such as "mudd_*_W?", for `vector_rule`."""

    name: str
    beta1: float
    beta2: float
    lr_mul: float = 1.0
    wd_mul: float = 0.0
    # A table of whose rows a batch reads few. Only a model that names them may have it.
    sparse: bool = False
    moments: Literal["fp32", "bf16"] = "fp32"  # of adam: in bf16 they take half of the memory


@dataclass(frozen=True)
class MuonRow:
    """Numbers of the banks of matrices that `name` matches, for `matrix_rule`.

    `lr_muls` repeats over the matrices of the bank.
    """

    name: str
    lr_muls: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class NorMuonConfig:
    """The record's. A step's decay is wd · lr · lr.

    polar_*: how Polar Express is computed (ops/polar_express.py): over the long side ("standard")
    or the short one ("gram"); in which type, "weight" being the weights' own; normalised by the
    Frobenius norm, or by a tighter bound that saves one of the five steps ("s4").
    """

    lr: float = 0.023
    wd: float = 1.2
    beta2: float = 0.9
    polar_form: Literal["standard", "gram"] = "standard"
    polar_precision: Literal["weight", "bf16", "fp16"] = "weight"
    polar_norm: Literal["frobenius", "s4"] = "frobenius"


@dataclass(frozen=True)
class MuonConfig:
    """The public baseline's of the track `optimization`. A step's decay is wd · lr."""

    lr: float = 0.025
    wd: float = 0.05
    ns_steps: int = 12  # of Newton–Schulz
    ns_coefficients: tuple[float, float, float] = (2.0, -1.5, 0.5)
    ns_precision: Literal["bf16", "weight"] = "bf16"  # of its matrices; "weight": the weights' type


@dataclass(frozen=True)
class AdamConfig:
    """The record's. A step's decay is wd · lr · lr."""

    lr: float = 0.008
    wd: float = 0.005
    eps: float = 1e-10


@dataclass(frozen=True)
class AdamWConfig:
    """torch.optim.AdamW's. A step's decay is wd · lr. Banks of matrices have numbers of their own:
    the defaults are the public Adam baseline's of the track `optimization`."""

    lr: float = 0.015
    wd: float = 0.001
    eps: float = 1e-10
    matrix_lr: float = 0.0015
    matrix_betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class OptimConfig:
    """Each parameter matches one row of the two tables; a row may match none, or many.

    The order of the rows is that in which gradients are sent and parameters updated: first the
    small ones together, then muon_table, then adam_table. Techniques: cautious_decay,
    variance_rescale, exact_weights.
    """

    muon_table: tuple[MuonRow, ...]  # banks of matrices
    adam_table: tuple[AdamRow, ...]  # all others
    matrix_rule: Literal["normuon", "muon", "adamw"] = "normuon"
    vector_rule: Literal["adam", "adamw"] = "adam"
    normuon: NorMuonConfig = field(default_factory=NorMuonConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    cautious_decay: bool = True  # normuon, adam: only where the step goes towards zero too
    variance_rescale: bool = True  # normuon: by row or column; False: Polar Express's direction
    # normuon, muon: bf16 matrices with 16 more bits beside them, which the model doesn't see: it
    # has the upper half, cut off as in the public program, or rounded.
    exact_weights: bool = True
    weight_rounding: Literal["truncate", "nearest"] = "truncate"
    # How the step runs; no number of the training depends on it, but for rounding.
    cuda_graph: bool = False  # the step's launches are captured once and replayed (on a GPU)
    replicate_below: int = 2**16  # elements: smaller parameters are updated by every rank
    sparse_rows_threshold: int = 2**17  # sparse tables of so many rows: read rows alone; 0: never


@dataclass(frozen=True)
class DataConfig:
    default: Literal["fineweb", "stdlib"] = "fineweb"  # what to train on without --data or --text
    train_shards: int = 9  # shards `fineweb` fetches
    # Whole documents from their BOS, or all tokens in order, in sequences of max_seq_len, in
    # training and validation.
    batching: Literal["documents", "consecutive"] = "documents"
    long_documents: Literal["cut", "split"] = "cut"
    repeat: bool = False
    cu_seqlens_entries: int | None = None  # None: by the rule of RECIPE section 2
    val_tokens: int | None = RECORD_VAL_TOKENS  # None: all there are, up to val_tokens_at_most
    val_tokens_at_most: int | None = None
    val_tokens_per_part: int = 262_144


@dataclass(frozen=True)
class GuardConfig:
    """What is looked at for numbers that aren't finite and losses off their trend (`guards`)."""

    # loss: each loss when it comes in, which costs nothing; gradient: the gradients too, which are
    # read once more for that; step: both before the update, for which the host waits: only so can
    # the first bad tensor be named. auto: step on CPUs or with a skip_…, else loss.
    check: Literal["auto", "loss", "gradient", "step"] = "auto"
    skip_nonfinite: bool = False  # such a step's update is left out, instead of the run stopped
    # Standard deviations by which a loss is above its trend, at least: 0 is never. Batches have
    # heavy tails: of 1,000 losses of good public runs 2.7 are above 6, and 0.26 above 12.
    alarm_z: float = 12.0  # said in the log
    skip_z: float = 0.0  # that step's update is left out


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig | BaselineConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    data: DataConfig = field(default_factory=DataConfig)
    # nats per token; "gzip": what gzip -9 needs for a byte of the same validation text
    target_loss: float | Literal["gzip"] = TARGET_LOSS_MAIN
    # recipe: bf16 parameters, and FP8 as model.attention, mlp and head say. auto: float32 on CPUs,
    # on GPUs recipe, or bf16 where they have no FP8.
    precision: Literal["auto", "recipe", "bf16", "float32"] = "auto"
    micro_batch_parts: int = 1  # parts of a step that go through the model at once
    # Each kind of forward and backward pass is captured once and replayed (on a GPU).
    cuda_graph: bool = False
    log_interval: int = 1  # steps between training lines of the log
    guards: GuardConfig = field(default_factory=GuardConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts and lists, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` gave, also from JSON. ConfigError names a key that doesn't fit."""
    return _typed(Config, values, "config")


def _typed(hint: Any, value: Any, key: str) -> Any:
    """A plain value as the annotated type; of a union's members, as the first that fits."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        names = {f.name for f in dataclasses.fields(hint)}
        if isinstance(value, dict) and value.keys() == names:
            hints = typing.get_type_hints(hint)
            return hint(**{n: _typed(hints[n], value[n], f"{key}.{n}") for n in names})
    elif origin in (typing.Union, types.UnionType):
        for member in args:
            try:
                return _typed(member, value, key)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            items = zip(inner, value, strict=True)
            return tuple(_typed(hint, item, f"{key}.{i}") for i, (hint, item) in enumerate(items))
    elif (origin is typing.Literal and value in args) or type(value) is hint:
        return value
    elif hint is float and type(value) is int:
        return value
    raise ConfigError(f"{key}={value!r}: not a value of this version's configs")
