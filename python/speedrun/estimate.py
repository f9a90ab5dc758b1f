"""What a recipe costs, from its config alone: parameters, work a token, memory and messages.

Models are built on the meta device, which has shapes and no memory. D model dim, H heads, K head
dim of queries and keys, F MLP hidden, V padded vocabulary, T tokens of a micro-batch, G outputs of
a small network.

How work is counted. A multiply-add is 2 FLOPs, and only matrix products and attention count. Each
query sees as many keys as its window shows in a document of max_seq_len tokens (so it is an upper
bound, documents may be shorter). Bytes: each product reads its operands and writes its result
once, a weight once a micro-batch; attention reads q, k, v and writes its output, and nothing in
between. What is computed again in the backward pass doesn't count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from speedrun.baseline_model import LOGITS_AT_ONCE, BaselineGPT
from speedrun.comms import Comms, rows_per_rank
from speedrun.config import (
    BaselineConfig,
    Config,
    LayerSpec,
    ModelConfig,
    MuonRow,
    OptimConfig,
    Stage,
    Windows,
    num_parts,
)
from speedrun.model import GPT
from speedrun.ops.softcap_ce import rows_at_once
from speedrun.optim import Optimizer, communication_bytes, placements
from speedrun.schedule import StepPlan

FP8_BYTES, FP32_BYTES = 1, 4
GPU = torch.device("cuda")
TABLES = ("embed", "value_embeds", "bigram_embed")  # rows are looked up


@dataclass(frozen=True)
class Precision:
    """Of parameters and activations, and whether training uses FP8 where the config says so."""

    dtype: torch.dtype
    fp8: bool

    @classmethod
    def of(cls, config: Config) -> Precision:
        """`precision` "auto" is that of a GPU with FP8. The baseline model has none."""
        dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
        has_fp8 = not isinstance(config.model, BaselineConfig)
        return cls(dtype, fp8=has_fp8 and config.precision in ("auto", "recipe"))


def meta_model(config: ModelConfig | BaselineConfig, precision: Precision) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config, BaselineConfig):
            return BaselineGPT(config, precision.dtype)
        return GPT(config, precision.dtype)


class ParameterRow(NamedTuple):
    name: str
    shape: tuple[int, ...]
    count: int
    dtype: str
    num_bytes: int
    rule: str  # of its update, with what its row multiplies
    kind: str  # of Placement: how it is dealt to the ranks


def parameter_rows(
    model: nn.Module, config: OptimConfig, world_size: int = 1
) -> list[ParameterRow]:
    """One row a parameter, in the model's order. ConfigError where the optimizer would refuse."""
    by_name = {p.name: p for p in placements(model.named_parameters(), config, world_size)}
    rows = []
    for name, param in model.named_parameters():
        place = by_name[name]
        if isinstance(place.row, MuonRow):
            rule = f"{config.matrix_rule}, lr × {', '.join(f'{x:g}' for x in place.row.lr_muls)}"
        else:
            row = place.row
            rule = f"{config.vector_rule} {row.beta1:g} {row.beta2:g}, lr × {row.lr_mul:g}"
            rule += f", decay × {row.wd_mul:g}" if row.wd_mul else ""
        dtype = str(param.dtype).removeprefix("torch.")
        shape = tuple(param.shape)
        rows.append(ParameterRow(name, shape, param.numel(), dtype, param.nbytes, rule, place.kind))
    return rows


class Gemm(NamedTuple):
    """`count` products of a token's `inputs` numbers with a weight, giving `outputs` numbers.

    Bytes of an operand's number: in the forward pass, for the input's gradient, for the weight's.
    """

    group: str
    count: int
    inputs: int
    outputs: int
    forward_bytes: int
    dx_bytes: int
    dw_bytes: int

    @property
    def num_weights(self) -> int:
        return self.count * self.inputs * self.outputs


class Work(NamedTuple):
    """Of one token. `+` adds."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops


def gemms(model: nn.Module, precision: Precision) -> list[Gemm]:
    """Every product with a weight that a token goes through."""
    config, size = model.config, precision.dtype.itemsize
    D, F, V = config.model_dim, config.mlp_hidden, config.padded_vocab_size
    plain = (size, size, size)

    def operands(*types: str) -> tuple[int, ...]:
        return tuple(FP8_BYTES if precision.fp8 and t == "fp8" else size for t in types)

    if isinstance(config, BaselineConfig):
        L = A = config.num_layers
        qkv = out = up = down = head = plain
    else:
        L, A, mlp = len(config.layers), config.num_attentions, config.mlp
        qkv, out = (
            operands(kind, kind if kind == "bf16" else config.attention.dx, "bf16")
            for kind in (config.attention.qkv, config.attention.out)
        )
        up, down = operands(mlp.up, mlp.dx, mlp.dup), operands(mlp.down, mlp.dpre, mlp.ddown)
        head = operands(*["fp8" if config.head.fp8 else "bf16"] * 3)
    found = [
        Gemm("attention: QKV", A, D, 2 * config.num_heads * config.qk_dim + D, *qkv),
        Gemm("attention: output", A, D, D, *out),
        Gemm("MLP: up", L, D, F, *up),
        Gemm("MLP: down", L, F, D, *down),
        Gemm("head", 1, D, V, *head),
    ]
    for name, param in model.named_parameters():
        small = {"w_smear": "smear", "ve_gate": "value embedding gates"}.get(name)
        if fnmatchcase(name, "gate_*_W?") or fnmatchcase(name, "mudd_*_W?"):
            small = "gate networks" if name.startswith("gate") else "MUDD networks"
        if small is not None:
            count, outputs, inputs = (1, 1, 1, *param.shape)[-3:]
            found.append(Gemm(small, count, inputs, outputs, *plain))
    return found


def gemm_work(gemm: Gemm, num_tokens: int, precision: Precision) -> Work:
    """num_tokens: of a micro-batch, T."""
    size, weights = precision.dtype.itemsize, gemm.num_weights / num_tokens
    x, y = gemm.count * gemm.inputs, gemm.count * gemm.outputs
    dx_bytes = (y + weights) * gemm.dx_bytes + x * size
    dw_bytes = (x + y) * gemm.dw_bytes + weights * size
    return Work(
        2.0 * gemm.num_weights,
        4.0 * gemm.num_weights,
        (x + weights) * gemm.forward_bytes + y * size,
        dx_bytes + dw_bytes,
    )


def mean_keys(length: int, window: int) -> float:
    """Keys that a query sees on average in a document of `length`: t−w … t, so at most w + 1."""
    reach = min(window, length)
    return (reach * (reach + 1) / 2 + (length - reach) * (reach + 1)) / length


def attention_work(
    config: ModelConfig | BaselineConfig,
    windows: Windows,
    length: int,
    precision: Precision,
    keys_of: Callable[[int, int], float] = mean_keys,
) -> dict[str, Work]:
    """By kind of attention, summed over the layers. A pair of heads is one of twice the length.

    keys_of(length, window): keys that count for a query.
    """
    # Numbers of a token's queries (or keys), and of its values (or outputs), together.
    size, widths = precision.dtype.itemsize, config.num_heads * (config.qk_dim + config.head_dim)
    layers = (
        [LayerSpec(window="long")] * config.num_layers
        if isinstance(config, BaselineConfig)
        else config.active_layers
    )
    found: dict[str, Work] = {}

    def add(group: str, flops_a_key: float, keys: float) -> None:
        flops, num_bytes = flops_a_key * keys, 2.0 * widths * size
        work = Work(flops, 2 * flops, num_bytes, 2 * num_bytes)
        found[group] = found.get(group, Work()) + work

    for layer in layers:
        if layer.attention is None:
            continue
        window = getattr(windows, layer.window)
        group = f"attention: {layer.window}, {window} back{', paired' if layer.paired else ''}"
        keys = keys_of(length * (2 if layer.paired else 1), window)
        add(group, 2.0 * widths, keys)  # q·k and weights·v
        if layer.dc:  # its own q·k, the heads' weights mixed, weights·v
            keys = keys_of(length, config.dc_window - 1)
            add("attention: DC", 2.0 * (widths + config.num_heads), keys)
    return found


def lookup_work(model: nn.Module, precision: Precision) -> Work:
    """Rows of tables: read and handed on; in the backward pass added to the gradient's row."""
    numbers = 0
    for name, param in model.named_parameters():
        if name in TABLES:
            numbers += math.prod(param.shape[:-2]) * param.shape[-1]
    size = precision.dtype.itemsize
    return Work(0.0, 0.0, 2.0 * numbers * size, 3.0 * numbers * size)


def micro_batch_tokens(config: Config, stage: Stage, world_size: int) -> int:
    """T."""
    all_parts = num_parts(world_size)
    parts = min(config.micro_batch_parts, all_parts // world_size)
    return stage.tokens_per_step // all_parts * parts


def work_a_token(
    config: Config,
    model: nn.Module,
    stage: Stage,
    windows: Windows,
    precision: Precision,
    world_size: int = 1,
) -> dict[str, Work]:
    """By group, in one stage."""
    num_tokens = micro_batch_tokens(config, stage, world_size)
    found = {"rows of tables": lookup_work(model, precision)}
    for gemm in gemms(model, precision):
        work = gemm_work(gemm, num_tokens, precision)
        found[gemm.group] = found.get(gemm.group, Work()) + work
    return found | attention_work(config.model, windows, stage.max_seq_len, precision)


def activation_numbers(config: ModelConfig | BaselineConfig) -> int:
    """Numbers that one token leaves for the backward pass, without the head's logits.

    An estimate: with kernels that keep each tensor once and compute elementwise results again.
    """
    D, F = config.model_dim, config.mlp_hidden
    # q, k, v as the product gives them; q and k turned; x, its norm, attention's output
    attention = 4 * config.num_heads * config.qk_dim + 4 * D
    mlp = 2 * D + F  # x, its norm, and relu²
    if isinstance(config, BaselineConfig):
        return 3 * D + config.num_layers * (attention + mlp)  # embedding; last x and its norm
    # Embedding, x0, last x and its norm; bigram rows, and these with their signs.
    numbers = 4 * D + config.bigram_dim * (2 if config.sign_rows else 1)
    for layer in config.active_layers:
        factors = config.residual_lambdas or layer.mudd  # their gradients want what they multiply
        numbers += mlp + D * factors + D * layer.mudd  # x behind MUDD's layer is mixed once more
        if layer.attention is not None:
            numbers += attention + D * factors
            numbers += D * (layer.value_embed + (layer.value_embed or layer.mudd))  # row; v with it
            numbers += D * (layer.dc + (layer.xsa or layer.gated))  # y, changed step by step
    return numbers


def head_bytes(config: ModelConfig | BaselineConfig, num_tokens: int, precision: Precision) -> int:
    """Of logits and of what is kept with them, at their peak."""
    V = config.padded_vocab_size
    if isinstance(config, BaselineConfig):
        return 2 * min(num_tokens, max(1, LOGITS_AT_ONCE // V)) * V * FP32_BYTES
    if precision.fp8 and config.head.fp8:  # a gradient of all tokens in two layouts, and logits
        logits = 0 if config.head.form == "fused" else precision.dtype.itemsize
        return num_tokens * V * (2 * FP8_BYTES + logits)
    rows = rows_at_once(V, GPU)
    if num_tokens <= rows:
        return 2 * num_tokens * V * FP32_BYTES
    return 2 * rows * V * FP32_BYTES + config.model_dim * V * FP32_BYTES  # dW, a sum over chunks


def fp8_copies_bytes(model: nn.Module, precision: Precision) -> int:
    """The FP8 weights beside the parameters: those of projections and MLP, and the head's in two
    layouts; for the head's form "fused" also one in the parameters' type."""
    config = model.config
    if not precision.fp8:
        return 0
    half_vo = model.vo_bank.numel() // 2
    projections = (model.qk_bank.numel() + half_vo) * (config.attention.qkv == "fp8")
    projections += half_vo * (config.attention.out == "fp8")
    projections *= 1 + (config.attention.dx == "fp8")
    copies, mlp = 0.0, config.mlp
    if mlp.uses_fp8:  # of one half of the bank each: up, its transpose, down's transpose, down
        copies = 0.5 * (2 + (mlp.dx == "fp8") + (mlp.dpre == "fp8"))
    copied = projections + int(copies * model.mlp_bank.numel())
    copied += 2 * model.lm_head.numel() * config.head.fp8
    fused = config.head.fp8 and config.head.form == "fused"
    return FP8_BYTES * copied + model.lm_head.nbytes * fused


def memory_bytes(
    config: Config, model: nn.Module, precision: Precision, world_size: int
) -> dict[str, int]:
    """Of one GPU (rank 0) in the largest stage, by what it is for. Messages come on top."""
    stages = [*config.schedule.stages, *filter(None, [config.schedule.extension])]
    num_tokens = max(micro_batch_tokens(config, stage, world_size) for stage in stages)
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms(0, world_size))
    state = [t for rule in optimizer.rules.values() for t in rule.state.values()]
    parameters = sum(param.nbytes for param in model.parameters())
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": sum(t.nbytes for t in state),
        "fixed tables": sum(buffer.nbytes for buffer in model.buffers()),
        "FP8 weights": fp8_copies_bytes(model, precision),
        "activations": num_tokens * activation_numbers(config.model) * precision.dtype.itemsize,
        "logits": head_bytes(config.model, num_tokens, precision),
    }


def step_messages(
    config: Config, model: nn.Module, plan: StepPlan, world_size: int
) -> Counter[str]:
    """Bytes that a rank sends in a step, by collective. Tables sent by rows: at most so many.

    A rank touches at most a row of a table for each of its tokens since Adam's last update.
    """
    tokens = plan.tokens_per_step // world_size * config.schedule.adam_interval
    sparse_rows = {}
    for place in placements(model.named_parameters(), config.optim, world_size):
        if place.sparse:
            num_rows, num_tables = place.rows_shape[0], math.prod(place.param.shape[:-2])
            of_others = num_rows - rows_per_rank(num_rows, world_size)
            sparse_rows[place.name] = min(tokens * num_tables, of_others)
    return communication_bytes(
        model.named_parameters(),
        config.optim,
        world_size,
        adam=plan.adam,
        tied=plan.tied,
        sparse_rows=sparse_rows,
    )
