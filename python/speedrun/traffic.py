"""Bytes that move between matrix products and attention, from the config alone.

Counted for the package's operators, by hand from `layer.py` and `model.py`: each reads what it
needs and writes what it makes, once; gradients of a stream that several layers read are added up
outside, in 3 passes each. A pass is one read or write of a stream. The same notation as in
`estimate`.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from speedrun.config import BaselineConfig, Config, LayerSpec, ModelConfig
from speedrun.estimate import FP8_BYTES, FP32_BYTES, TABLES, Precision, Work
from speedrun.reference.head_logits import BLOCK_COLUMNS

MLP_PRODUCTS = ("up", "down", "dpre", "dx", "dup", "ddown")  # fields of MLPConfig


def _bytes(forward: float, backward: float, size: int) -> Work:
    """Of so many numbers."""
    return Work(0.0, 0.0, forward * size, backward * size)


def _mix(num_terms: int, norm: bool = True, shared: int = 0) -> tuple[int, int]:
    """Passes of `residual_mix(_norm)`, forward and backward.

    Backward: the gradients of x and of its norm, x, and each stream, for its factor's gradient;
    then each stream's own. shared: streams that other layers read too.
    """
    return num_terms + 1 + norm, 1 + 2 * norm + 2 * num_terms + 3 * shared


def _total(*passes: tuple[int, int]) -> tuple[int, int]:
    forward, backward = zip(*passes, strict=True)
    return sum(forward), sum(backward)


def _attention_numbers(
    config: ModelConfig | BaselineConfig, value_embed: bool
) -> tuple[float, float]:
    """Of `qk_norm_rope`: q, k, v in and out; backward their gradients, and q and k again."""
    D, turned = config.model_dim, 2 * config.num_heads * config.qk_dim
    moved = 2 * (turned + D)
    return moved + D * value_embed, moved + turned + 2 * D * value_embed


def between_products(config: ModelConfig | BaselineConfig, precision: Precision) -> dict[str, Work]:
    """Of one token, by what it is for."""
    size, D = precision.dtype.itemsize, config.model_dim
    found: dict[str, Work] = {}

    def add(group: str, forward: float, backward: float, num_bytes: int = size) -> None:
        found[group] = found.get(group, Work()) + _bytes(forward, backward, num_bytes)

    def add_passes(group: str, *passes: tuple[int, int]) -> None:
        forward, backward = _total(*passes)
        add(group, D * forward, D * backward)

    if isinstance(config, BaselineConfig):
        add_passes("embedding", _mix(1))
        for _ in range(config.num_layers):
            add("queries, keys, values", *_attention_numbers(config, value_embed=False))
            add_passes("residual streams", _mix(2), _mix(2))
            # relu² is an operator of its own here: reads and writes F; then F, the gradient, and F.
            add("relu²", 2 * config.mlp_hidden, 3 * config.mlp_hidden)
        return found

    smear = [(3, 4)] if config.smear else []
    add_passes("embedding", *smear, _mix(1), _mix(1 + (config.bigram_dim > 0)))
    if config.sign_rows:  # rows and signs read, their product written
        add("embedding", 3 * config.bigram_dim, 2 * config.bigram_dim)
    for i, layer in enumerate(config.active_layers):
        if layer.attention is not None:
            add("queries, keys, values", *_attention_numbers(config, layer.value_embed))
            if layer.xsa or layer.gated:
                add_passes("behind attention", (3, 5) if layer.xsa else (2, 3))
            if layer.dc:
                add_passes("behind attention", (6, 14))
            if precision.fp8:
                _add_projections(config, layer, add)
        add_passes("residual streams", *_layer_mixes(config, layer, first=i == 0))
        _add_mlp(config, precision, add)
    if any(layer.mudd for layer in config.active_layers):
        add_passes("residual streams", _mix(6, shared=5))
    return found


def _layer_mixes(config: ModelConfig, layer: LayerSpec, first: bool) -> list[tuple[int, int]]:
    """Passes of one layer's mixes: for MUDD, behind attention or the skip, behind the MLP."""
    mixes = [_mix(2)]
    if layer.mudd:  # what its values and its residual stream get of earlier streams
        mixes += [_mix(3, norm=False, shared=3), _mix(3, norm=False, shared=2)]
    if layer.skip and config.gates != "none":
        mixes.append(_mix(2, shared=1))
    if layer.attention is not None:
        streams = (config.gates != "none") + (config.bigram_dim > 0 and not first)
        mixes.append(_mix(2 + streams, shared=streams))
    return mixes


def _add_projections(config: ModelConfig, layer: LayerSpec, add: Callable) -> None:
    """FP8 copies of what goes into attention's projections, and of the gradients behind them.

    XSA's and the gate's kernel writes the copy of the output's input itself.
    """
    D, qkv = config.model_dim, 2 * config.num_heads * config.qk_dim + config.model_dim
    attention = config.attention
    read = written = gradients = 0
    if attention.qkv == "fp8":
        read += 2 * D if attention.x_scale == "current" else D
        written += D
    if attention.out == "fp8":
        read += 0 if layer.xsa or layer.gated else D
        written += D
    if attention.dx == "fp8":  # by their own maximum
        gradients = qkv * (attention.qkv == "fp8") + D * (attention.out == "fp8")
    add("FP8 copies", read, 2 * gradients)
    add("FP8 copies", written, gradients, FP8_BYTES)


def _add_mlp(config: ModelConfig, precision: Precision, add: Callable) -> None:
    """What the MLP's products don't count as operands and results: relu² again for its gradient,
    and FP8 copies, of which those of relu² and of its gradient are written by a product."""
    D, F, size, mlp = config.model_dim, config.mlp_hidden, precision.dtype.itemsize, config.mlp
    fp8 = {name for name in MLP_PRODUCTS if precision.fp8 and getattr(mlp, name) == "fp8"}
    kept = FP8_BYTES if precision.fp8 and mlp.post == "fp8" else size
    add("relu² again", 0, F, kept)
    if "up" in fp8 and mlp.x_scale == "current":  # read for its maximum, and to be converted
        add("FP8 copies", 2 * D, 0)
    layouts = (
        D * (("up" in fp8) + ("dup" in fp8)) + F * (("down" in fp8) + ("ddown" in fp8)),
        F * (("dx" in fp8) + ("dup" in fp8)) + D * (("dpre" in fp8) + ("ddown" in fp8)),
    )
    add("FP8 copies", *layouts, FP8_BYTES)
    if fp8 & {"dpre", "ddown"}:  # the gradient that comes in is read to be converted
        add("FP8 copies", 0, D)


def loss_bytes(config: ModelConfig | BaselineConfig, precision: Precision) -> float:
    """Of one token, beside the head's products: its logits for the loss and their gradient."""
    V = config.padded_vocab_size
    if precision.fp8 and config.head.fp8:
        if config.head.form == "fused":  # both layouts are the product's result, as large as logits
            return V / BLOCK_COLUMNS * 2 * FP32_BYTES  # sums of blocks, written and read
        # read in bf16 once, the gradient written in two layouts
        return V * (precision.dtype.itemsize + 2 * FP8_BYTES)
    return V * 3 * FP32_BYTES  # read, read again for the gradient, and that written


def gradient_bytes(model: nn.Module, config: Config, micro_batches: int) -> float:
    """Of one step, as a mean over an Adam interval: gradients of tables begin as zeros, and every
    gradient but an interval's first one is added (two reads, one write)."""
    total = 0.0
    matrices = [row.name for row in config.optim.muon_table]
    for name, param in model.named_parameters():
        is_matrix = any(fnmatchcase(name, pattern) for pattern in matrices)
        interval = 1 if is_matrix else config.schedule.adam_interval
        backwards = micro_batches * interval
        zeros = backwards if name in TABLES else 0
        total += (zeros + 3 * (backwards - 1)) * param.nbytes / interval
    return total
