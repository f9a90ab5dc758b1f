"""What a recipe costs before it runs: parameters, work, schedule, memory, messages."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from speedrun import estimate, recipes, train
from speedrun._text_table import text_table
from speedrun.config import Config, ConfigError
from speedrun.estimate import Precision, Work
from speedrun.schedule import Schedule, StepPlan
from speedrun.sources import with_vocabulary
from speedrun.world_size import check_world_size

NOTES = """\
FLOPs: a multiply-add is 2; matrix products and attention only, nothing that is computed again.
Attention: documents of max_seq_len tokens, so an upper bound. Bytes: products read their operands
and write their results once, weights once a micro-batch; attention reads q, k, v and writes y.
Memory: kernels that keep each tensor once for the backward pass; buffers of messages come on top.
Messages: sent by each rank of a ring; tables of which only touched rows travel: at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="tiny", help=f"one of: {', '.join(recipes.names())}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a config value"
    )
    parser.add_argument("--steps", type=int, help="total steps; the schedule scales with it")
    parser.add_argument("--world-size", type=int, default=8, help="GPUs (default: 8)")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    parser.set_defaults(repeat_data=False)


def run(args: argparse.Namespace) -> int:
    """0; 1 for a config that can't run, with the reason on stderr."""
    try:
        config = train.configure(args)
        check_world_size(config, args.world_size)
        report = explain(config, args.world_size)
    except ConfigError as error:
        print(f"speedrun explain: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def explain(config: Config, world_size: int) -> dict[str, Any]:
    """Everything that is shown, in bytes, FLOPs, tokens and steps."""
    config = with_vocabulary(config)
    precision = Precision.of(config)
    model = estimate.meta_model(config.model, precision)
    schedule = Schedule(config.schedule)
    plans = [plan for plan in schedule if not plan.last]
    stages = [
        _stage(config, model, schedule, list(in_stage), precision, world_size)
        for _, in_stage in groupby(plans, key=lambda plan: plan.stage)
    ]
    parameters = estimate.parameter_rows(model, config.optim, world_size)
    memory = estimate.memory_bytes(config, model, precision, world_size)
    return {
        "recipe": config.name,
        "world_size": world_size,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "fp8": precision.fp8,
        "padded_vocab_size": config.model.padded_vocab_size,
        "parameters": [row._asdict() for row in parameters],
        "total_parameters": sum(row.count for row in parameters),
        "stages": stages,
        "total_steps": len(plans),
        "total_tokens": sum(plan.tokens_per_step for plan in plans),
        "total_flops": sum(stage["flops"] for stage in stages),
        "memory_bytes": memory,
        "total_memory_bytes": sum(memory.values()),
        "messages": _messages(config, model, plans, world_size),
    }


def _stage(
    config: Config,
    model: nn.Module,
    schedule: Schedule,
    plans: list[StepPlan],
    precision: Precision,
    world_size: int,
) -> dict[str, Any]:
    first, last = plans[0], plans[-1]
    stage = schedule.stages[first.stage]
    work = estimate.work_a_token(config, model, stage, first.windows, precision, world_size)
    total = sum(work.values(), Work())
    tokens = sum(plan.tokens_per_step for plan in plans)
    return {
        "first_step": first.step,
        "last_step": last.step,
        "tokens_per_step": first.tokens_per_step,
        "micro_batch_tokens": estimate.micro_batch_tokens(config, stage, world_size),
        "max_seq_len": first.max_seq_len,
        "windows": [first.windows.short, first.windows.long],
        "lr": [first.lr, last.lr],
        "multi_token_weights": [list(p.multi_token_weights) for p in (first, last)],
        "prefix_weight": [first.prefix_weight, last.prefix_weight],
        "work_a_token": {group: work[group]._asdict() for group in work},
        "flops_a_token": total.flops,
        "flops": total.flops * tokens,
    }


def _messages(
    config: Config, model: nn.Module, plans: Iterable[StepPlan], world_size: int
) -> list[dict[str, Any]]:
    """For each kind of step its first step and what a rank sends, by collective."""
    kinds: dict[tuple[int, bool, bool], StepPlan] = {}
    for plan in plans:
        kinds.setdefault((plan.tokens_per_step, plan.adam, plan.tied), plan)
    return [
        {
            "first_step": plan.step,
            "tokens_per_step": tokens,
            "adam": adam,
            "tied": tied,
            "sent_bytes": dict(estimate.step_messages(config, model, plan, world_size)),
        }
        for (tokens, adam, tied), plan in kinds.items()
    ]


def as_text(report: dict[str, Any]) -> str:
    """The report as tables."""
    last = report["stages"][-1]
    kind = report["dtype"] + (" and FP8" if report["fp8"] else "")
    title = (
        f"{report['recipe']}: {report['total_steps']:,} steps, {report['world_size']} GPU"
        f"{'s' * (report['world_size'] > 1)}, {kind}, "
        f"{report['padded_vocab_size']:,} rows of vocabulary"
    )
    total = (
        f"{report['total_tokens']:,} tokens, {report['total_flops']:.3e} FLOPs, "
        f"{report['total_parameters']:,} parameters"
    )
    parts = [
        title,
        total,
        text_table(_parameter_table(report)),
        f"a token, in steps {last['first_step']} to {last['last_step']} (micro-batches of "
        f"{last['micro_batch_tokens']:,} tokens):\n{text_table(_work_table(last))}",
        text_table(_schedule_table(report)),
        text_table(_memory_table(report)),
        text_table(_message_table(report)),
        NOTES,
    ]
    return "\n\n".join(parts)


def _parameter_table(report: dict[str, Any]) -> list[list[str]]:
    table = [["parameter", "shape", "numbers", "type", "MB", "update"]]
    for row in report["parameters"]:
        shape = " × ".join(map(str, row["shape"])) or "1"
        size = f"{row['num_bytes'] / 1e6:,.2f}"
        table.append([row["name"], shape, f"{row['count']:,}", row["dtype"], size, row["rule"]])
    total = sum(row["num_bytes"] for row in report["parameters"]) / 1e6
    return [*table, ["all", "", f"{report['total_parameters']:,}", "", f"{total:,.2f}", ""]]


def _work_table(stage: dict[str, Any]) -> list[list[str]]:
    groups = {**stage["work_a_token"]}
    groups["all"] = sum((Work(**work) for work in groups.values()), Work())._asdict()
    table = [["", "MFLOP forward", "backward", "kB forward", "backward"]]
    for group, work in groups.items():
        flops = [f"{work[f'{way}_flops'] / 1e6:,.3f}" for way in ("forward", "backward")]
        sizes = [f"{work[f'{way}_bytes'] / 1e3:,.2f}" for way in ("forward", "backward")]
        table.append([group, *flops, *sizes])
    return table


def _schedule_table(report: dict[str, Any]) -> list[list[str]]:
    names = "steps", "tokens a step", "length", "windows", "lr ×", "targets", "prefix", "MFLOP"
    table = [[*names, "PFLOP"]]
    for stage in report["stages"]:
        targets = [",".join(f"{w:.3g}" for w in ws) for ws in stage["multi_token_weights"]]
        table.append(
            [
                f"{stage['first_step']}-{stage['last_step']}",
                f"{stage['tokens_per_step']:,}",
                f"{stage['max_seq_len']:,}",
                "{:,}, {:,}".format(*stage["windows"]),
                _from_to(*(f"{lr:.3g}" for lr in stage["lr"])),
                _from_to(*targets),
                _from_to(*(f"{w:.3g}" for w in stage["prefix_weight"])),
                f"{stage['flops_a_token'] / 1e6:,.1f} a token",
                f"{stage['flops'] / 1e15:.3g}",
            ]
        )
    return table


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} → {last}"


def _memory_table(report: dict[str, Any]) -> list[list[str]]:
    sizes = {**report["memory_bytes"], "all": report["total_memory_bytes"]}
    rows = [[name, f"{size / 2**30:,.3f}"] for name, size in sizes.items()]
    return [["memory of a GPU", "GiB"], *rows]


def _message_table(report: dict[str, Any]) -> list[list[str]]:
    kinds = sorted({kind for row in report["messages"] for kind in row["sent_bytes"]})
    table = [["messages, MB a step and rank", "tokens a step", *kinds, "all"]]
    for row in report["messages"]:
        update = "without Adam" if not row["adam"] else "with Adam"
        name = f"from step {row['first_step']}: {update}{', tied' if row['tied'] else ''}"
        sent = [row["sent_bytes"].get(kind, 0) for kind in kinds]
        sizes = [f"{size / 1e6:,.2f}" for size in (*sent, sum(sent))]
        table.append([name, f"{row['tokens_per_step']:,}", *sizes])
    return table
