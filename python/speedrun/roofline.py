"""How long a step takes, from its counted work and the rates that a GPU reaches.

Pure functions: work is counted by `estimate` and `traffic`, a `Figure` is a rate or a cost with
where it comes from. Each part of a step takes its FLOPs or its bytes, whichever need longer, at a
figure's rate; parts run one after another. T tokens of a micro-batch, W GPUs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from speedrun import estimate, traffic
from speedrun.comms import rows_per_rank
from speedrun.config import AdamRow, BaselineConfig, Config, ConfigError, OptimConfig
from speedrun.estimate import FP8_BYTES, FP32_BYTES, Gemm, Precision, Work
from speedrun.hardware import GpuPeaks
from speedrun.optim import Placement, placements
from speedrun.schedule import Schedule, StepPlan

ATTENTION_SOURCE = (
    "public FlashAttention 3 on H100, 4 causal sequences of 1,024 tokens, 48 heads of 128,"
)
TILE = 128  # rows or columns of a product's tile, queries and keys of attention's
POLAR_STEPS = {"frobenius": 5, "s4": 4}

PRODUCT = ("bf16", "fp8", "half length", "memory")
# Parts of a step: what bounds them, and the figures that their times rest on.
PARTS = {
    "attention: projections": ("compute", PRODUCT),
    "attention": (
        "compute",
        ("attention forward", "attention backward", "attention traffic", "memory"),
    ),
    "MLP: products": ("compute", PRODUCT),
    "head: products": ("compute", PRODUCT),
    "small networks": ("compute", ("bf16", "half length", "memory")),
    "head: loss": ("memory", ("memory",)),
    "between products": ("memory", ("memory",)),
    "tables and gradients": ("memory", ("memory",)),
    "matrix update": ("compute", ("matrix update",)),
    "Adam": ("memory", ("memory",)),
    "messages, exposed": ("communication", ("link", "network", "collective", "hop")),
    "starting kernels": ("latency", ("kernel",)),
    "waiting for the host": ("latency", ("host",)),
}


@dataclass(frozen=True)
class Figure:
    """A rate or a cost: `value` in `unit`, and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Cluster:
    """W GPUs, at most `gpus_per_node` of them in a machine."""

    num_gpus: int
    gpus_per_node: int
    num_sms: float

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)


def figures(peaks: GpuPeaks, network_gbit: float, roofs: dict[str, float]) -> dict[str, Figure]:
    """What is assumed of a GPU; without "fp8" if it has none. Shares of its data sheet are those
    that were published for H100 and H800.

    network_gbit: of each GPU to other machines. roofs: bytes and FLOPs a second measured on this
    GPU ("copy", "bf16", "fp8"), which replace assumptions.
    """

    def rate(roof: str, peak: float, share: float, unit: str, source: str) -> Figure:
        if roof in roofs:
            return Figure(roofs[roof], unit, f"measured on this GPU: roof {roof}")
        return Figure(share * peak, unit, f"assumed: {share:g} of the data sheet, {source}")

    bf16 = peaks.bf16_flops_per_s
    found = {
        "bf16": rate("bf16", bf16, 0.82, "FLOP/s", "public bf16 products of 8192³ on H100"),
        "fp8": rate("fp8", peaks.fp8_flops_per_s, 0.78, "FLOP/s", "DeepGEMM at K = 16,384 on H800"),
        "half length": Figure(
            450,
            "of K",
            "assumed: a product over K terms reaches K/(K + 450) of that; public bf16 products on "
            "H100 of K = 1,024 and 8,192 give 446, FP8 ones of DeepGEMM on H800 428 to 719",
        ),
        "memory": rate(
            "copy", peaks.memory_bytes_per_s, 0.84, "B/s", "public transposes of FP8 on H100"
        ),
        "attention forward": Figure(
            0.41 * bf16,
            "FLOP/s",
            f"assumed: 0.41 of the data sheet, {ATTENTION_SOURCE} in 142 µs; tiles of {TILE} keys",
        ),
        "attention backward": Figure(
            0.29 * bf16,
            "FLOP/s",
            f"assumed: 0.29 of the data sheet, {ATTENTION_SOURCE} in 710 µs, of which its traffic "
            "takes 304 (what it computes again isn't counted)",
        ),
        "attention traffic": Figure(
            17 / 8,
            "times",
            "counted: gradients by FlashAttention 3 move 17 passes, and 8 are needed",
        ),
        "matrix update": Figure(
            0.11 * bf16,
            "FLOP/s",
            "assumed: 0.11 of the data sheet, Polar Express and all around it in 1.1 ms a step of "
            "public traces on 8 H100",
        ),
        "link": Figure(0.8 * peaks.link_bytes_per_s, "B/s", "assumed: 0.8 of the data sheet"),
        "network": Figure(
            0.8 * network_gbit * 1e9 / 8,
            "B/s",
            f"assumed: 0.8 of {network_gbit:g} Gbit/s for each GPU (--network-gbit)",
        ),
        "collective": Figure(20e-6, "s", "assumed: start of each collective in a machine"),
        "hop": Figure(5e-6, "s", "assumed: and for each further machine in its ring"),
        "kernel": Figure(3e-6, "s", "assumed: start and end of each kernel"),
        "host": Figure(6e-6, "s", "assumed: the host starts a kernel so often, without graphs"),
    }
    return {name: figure for name, figure in found.items() if not math.isnan(figure.value)}


def read_roofs(folder: Path, gpu: str) -> dict[str, float]:
    """Medians of the roofs that hardware_check measured on a GPU of that name; {} without any.

    ConfigError: a file there isn't one of its records.
    """
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            steps = record["steps"].values() if record["gpu"] == gpu else ()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path}: not a record of hardware_check; name another folder by --records"
            ) from None
        for step in steps:
            for roof, rate in step.get("roofs", {}).items():
                if rate is not None:
                    found.setdefault(roof, []).append(rate)
    return {roof: statistics.median(rates) for roof, rates in found.items()}


def tile_keys(length: int, window: int) -> float:
    """Keys a query in a document of `length` has to be multiplied with, by tiles: on average."""
    tiles = range(math.ceil(length / TILE))
    return TILE * statistics.fmean(i - max(0, i * TILE - window) // TILE + 1 for i in tiles)


def tile_fill(rows: int, columns: int, num_sms: float) -> float:
    """Share of the SMs that have a tile of a product's result, on average over its waves."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return tiles / (math.ceil(tiles / num_sms) * num_sms)


def product_seconds(
    gemm: Gemm, num_tokens: int, precision: Precision, cluster: Cluster, by: dict[str, Figure]
) -> float:
    """Of `gemm.count` products, forward and backward."""
    flops, half_length = 2.0 * num_tokens * gemm.num_weights, by["half length"].value

    def seconds(operand_bytes: int, length: int, fill: float) -> float:
        rate = by["fp8" if operand_bytes == FP8_BYTES else "bf16"].value
        return flops / (rate * fill * length / (length + half_length))

    forward_fill, dx_fill = (
        tile_fill(num_tokens, columns, cluster.num_sms) for columns in (gemm.outputs, gemm.inputs)
    )
    work = estimate.gemm_work(gemm, num_tokens, precision)
    forward = seconds(gemm.forward_bytes, gemm.inputs, forward_fill)
    # The weight's gradient is a long sum, which is cut so that every SM has a part of it.
    backward = seconds(gemm.dx_bytes, gemm.outputs, dx_fill)
    backward += seconds(gemm.dw_bytes, num_tokens, 1.0)
    memory = by["memory"].value
    return max(forward, num_tokens * work.forward_bytes / memory) + max(
        backward, num_tokens * work.backward_bytes / memory
    )


def attention_seconds(work: Work, by: dict[str, Figure]) -> tuple[float, float]:
    """(forward, backward) of one token. The backward pass is three kernels, of which the two
    around the products only move bytes."""
    memory, traffic_bytes = by["memory"].value, work.backward_bytes * by["attention traffic"].value
    forward = max(work.forward_flops / by["attention forward"].value, work.forward_bytes / memory)
    backward = work.backward_flops / by["attention backward"].value + traffic_bytes / memory
    return forward, backward


def matrix_flops(place: Placement, optim: OptimConfig, world_size: int) -> float:
    """FLOPs of the orthogonalisation of the matrices that rank 0 owns: n short side, m long side.

    Polar Express forms one triangle of symmetric products (KERNELS b.4); Muon's Newton–Schulz not.
    """
    num_matrices, *sides = place.rows_shape
    n, m = sorted(sides)
    num_matrices = rows_per_rank(num_matrices, world_size)
    if optim.matrix_rule == "muon":
        return num_matrices * optim.muon.ns_steps * (4 * m + 2 * n) * n * n
    steps = POLAR_STEPS[optim.normuon.polar_norm]
    if optim.normuon.polar_form == "gram" and n < m:  # restarted once
        return num_matrices * (4 * steps * n + 6 * (m - n)) * n * n
    return num_matrices * steps * (3 * m + n) * n * n


def vector_bytes(place: Placement, world_size: int) -> float:
    """Bytes of Adam's update of the rows that rank 0 owns: weight and moments twice, gradient."""
    own = 1.0
    if place.kind != "replicated":
        own = rows_per_rank(place.rows_shape[0], world_size) / place.rows_shape[0]
    narrow = isinstance(place.row, AdamRow) and place.row.moments == "bf16"
    moment_bytes = 2 if narrow else FP32_BYTES
    return own * place.param.numel() * (3 * place.param.itemsize + 4 * moment_bytes)


def message_seconds(
    sent: Counter[str], num_collectives: int, cluster: Cluster, by: dict[str, Figure]
) -> tuple[float, float]:
    """(transfer, latency) of messages of which a rank sends `sent` bytes by collective.

    A ring passes between two machines over the network of all their GPUs together; what goes from
    each to all leaves by a GPU's own.
    """
    transfer = 0.0
    for kind, num_bytes in sent.items():
        seconds = num_bytes / by["link"].value
        if cluster.num_nodes > 1:
            paths = 1 if kind == "all_to_all" else cluster.gpus_per_node
            seconds = max(seconds, num_bytes / (paths * by["network"].value))
        transfer += seconds
    hops = (cluster.num_nodes - 1) * by["hop"].value
    return transfer, num_collectives * (by["collective"].value + hops) * bool(sent)


def num_launches(config: Config, micro_batches: int, due: list[Placement]) -> int:
    """Kernels of a step, by hand from layer.py's operators and the optimizer's (records/LOG.md):
    forward and backward, 12 a layer and 24 for its attention, 80 beside the layers; 60 for the
    update's products, 5 a parameter for its update and its messages."""
    model = config.model
    if isinstance(model, BaselineConfig):
        layers = attentions = model.num_layers
    else:
        layers, attentions = len(model.layers), model.num_attentions
    return micro_batches * (12 * layers + 24 * attentions + 80) + 60 + 5 * len(due)


def step_seconds(
    config: Config,
    model: nn.Module,
    precision: Precision,
    plan: StepPlan,
    cluster: Cluster,
    by: dict[str, Figure],
) -> dict[str, float]:
    """Seconds of each of PARTS in the step of `plan`. model: on the meta device."""
    stage, world_size = Schedule(config.schedule).stages[plan.stage], cluster.num_gpus
    num_tokens = estimate.micro_batch_tokens(config, stage, world_size)
    micro_batches = plan.tokens_per_step // (num_tokens * world_size)
    memory = by["memory"].value
    parts = dict.fromkeys(PARTS, 0.0)
    for gemm in estimate.gemms(model, precision):
        kind = gemm.group.partition(":")[0]
        part = {"attention": "attention: projections"}.get(kind, f"{kind}: products")
        seconds = product_seconds(gemm, num_tokens, precision, cluster, by)
        parts[part if part in PARTS else "small networks"] += micro_batches * seconds
    tokens = micro_batches * num_tokens  # of this GPU, in this step
    length = min(plan.max_seq_len, num_tokens)
    attention = estimate.attention_work(config.model, plan.windows, length, precision, tile_keys)
    for work in attention.values():
        parts["attention"] += tokens * sum(attention_seconds(work, by))
    parts["head: loss"] = tokens * traffic.loss_bytes(config.model, precision) / memory
    for work in traffic.between_products(config.model, precision).values():
        moved = work.forward_bytes + work.backward_bytes
        parts["between products"] += tokens * moved / memory
    rows = estimate.lookup_work(model, precision)
    moved = tokens * (rows.forward_bytes + rows.backward_bytes)
    moved += traffic.gradient_bytes(model, config, micro_batches)
    parts["tables and gradients"] = moved / memory

    places = placements(model.named_parameters(), config.optim, world_size)
    due = [place for place in places if place.is_due(plan.adam, plan.tied)]
    for place in due:
        if place.kind == "matrices" and config.optim.matrix_rule != "adamw":
            flops = matrix_flops(place, config.optim, world_size)
            parts["matrix update"] += flops / by["matrix update"].value
        else:
            parts["Adam"] += vector_bytes(place, world_size) / memory
    sent = estimate.step_messages(config, model, plan, world_size)
    transfer, latency = message_seconds(sent, _num_collectives(due), cluster, by)
    hidden = parts["matrix update"] + parts["Adam"]
    parts["messages, exposed"] = max(0.0, transfer - hidden) + latency
    launches = num_launches(config, micro_batches, due)
    parts["starting kernels"] = launches * by["kernel"].value
    host = launches * by["host"].value
    parts["waiting for the host"] = max(0.0, host - math.fsum(parts.values()))
    return parts


def _num_collectives(due: list[Placement]) -> int:
    """Small parameters share one for each type; others have two, or four if sent by rows."""
    sharded = [place for place in due if place.kind != "replicated"]
    types = {place.param.dtype for place in due if place.kind == "replicated"}
    return len(types) + sum(4 if place.sparse else 2 for place in sharded)


@dataclass(frozen=True)
class StagePlan:
    """One stage: `parts`, seconds a step on average, and of steps by whether Adam has an update."""

    first: StepPlan
    num_steps: int
    parts: dict[str, float]
    seconds_by_adam: dict[bool, float]

    @property
    def step_seconds(self) -> float:
        return math.fsum(self.parts.values())

    @property
    def seconds(self) -> float:
        return self.num_steps * self.step_seconds

    @property
    def bound_by(self) -> str:
        """compute, memory, communication or latency: where most of the time goes."""
        sums: Counter[str] = Counter()
        for part, seconds in self.parts.items():
            sums[PARTS[part][0]] += seconds
        return max(sums, key=lambda kind: sums[kind])


def stage_plans(
    config: Config,
    model: nn.Module,
    precision: Precision,
    cluster: Cluster,
    by: dict[str, Figure],
) -> Iterator[StagePlan]:
    """Every stage of the schedule, in order."""
    kinds: dict[int, Counter[tuple[bool, bool]]] = {}
    examples: dict[tuple[int, bool, bool], StepPlan] = {}
    for plan in Schedule(config.schedule):
        if not plan.last:
            kinds.setdefault(plan.stage, Counter())[plan.adam, plan.tied] += 1
            examples.setdefault((plan.stage, plan.adam, plan.tied), plan)
    for stage, counts in kinds.items():
        num_steps, parts, by_adam = counts.total(), Counter(), {}
        for (adam, tied), count in counts.items():
            step = step_seconds(config, model, precision, examples[stage, adam, tied], cluster, by)
            for part, seconds in step.items():
                parts[part] += count / num_steps * seconds
            by_adam.setdefault(adam, []).append((count, math.fsum(step.values())))
        seconds_by_adam = {
            adam: sum(n * s for n, s in found) / sum(n for n, _ in found)
            for adam, found in by_adam.items()
        }
        first = min((p for (s, *_), p in examples.items() if s == stage), key=lambda p: p.step)
        yield StagePlan(first, num_steps, dict(parts), seconds_by_adam)
