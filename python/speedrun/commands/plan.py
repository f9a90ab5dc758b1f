"""How long a recipe would take on so many GPUs, part by part, and what that rests on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from speedrun import estimate, hardware, recipes, roofline, train
from speedrun._text_table import text_table
from speedrun.config import Config, ConfigError
from speedrun.estimate import Precision
from speedrun.plan_check import check, train_times, with_total_steps
from speedrun.record_logs import LogError
from speedrun.roofline import PARTS, Cluster, StagePlan
from speedrun.schedule import Schedule
from speedrun.sources import with_vocabulary
from speedrun.world_size import check_world_size

RECORDS = Path("records", "hardware")  # of a checkout
WORLD_SIZES = tuple(2**i for i in range(10))  # 1 to 512
WORTH_IT = 0.25  # of the time, that twice the GPUs must save: half of what they could

NOTES = """\
Parts run one after another; only messages run beside updates. Work is counted from the config as
`speedrun explain` does, for the package's kernels, documents of max_seq_len tokens and no time to
load data. Validation is not in it, as the clock stops there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="tiny", help=f"one of: {', '.join(recipes.names())}")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument("--gpu", default="h100", help="such as h100, h200, 'h100 pcie', a100 or l4")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="machines' (8)")
    parser.add_argument(
        "--network-gbit", type=float, default=400.0, metavar="X", help="of each GPU, in Gbit/s"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a config value"
    )
    parser.add_argument("--steps", type=int, help="total steps; the schedule scales with it")
    parser.add_argument(
        "--records",
        type=Path,
        default=RECORDS,
        metavar="DIR",
        help=f"what hardware_check measured, in place of assumptions ({RECORDS}, where it is)",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="LOG",
        help="a log with a line a step, ours or a public one: how far off the plan is, at the "
        "log's number of steps, of which the extension has the recipe's (or by --set "
        "schedule.extension_steps=N)",
    )
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    parser.set_defaults(repeat_data=False)


def run(args: argparse.Namespace) -> int:
    """0; 1 for what can't be planned or read, with the reason on stderr."""
    try:
        report = make_report(args)
    except (ConfigError, LogError) as error:
        print(f"speedrun plan: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is shown; seconds, tokens and steps."""
    gpu = gpu_named(args.gpu)
    peaks = hardware.gpu_peaks(gpu)
    for option, value in (("--gpus-per-node", args.gpus_per_node), ("--gpus", args.gpus)):
        if value < 1:
            raise ConfigError(f"{option} {value}: must be at least 1")
    if not 0 < args.network_gbit < math.inf:
        raise ConfigError(
            f"--network-gbit {args.network_gbit}: must be greater than 0, such as 400"
        )
    config = with_vocabulary(train.configure(args))
    times = None
    if args.check is not None:
        if args.steps is not None:
            raise ConfigError("--steps: leave it out with --check, which takes the log's steps")
        times = train_times(args.check)
        config = with_total_steps(config, times.total_steps)
    config = for_gpu(config, gpu)
    check_world_size(config, args.gpus)
    if args.records != RECORDS and not args.records.is_dir():
        raise ConfigError(f"--records {args.records}: there is no such folder")
    roofs = roofline.read_roofs(args.records, gpu)
    figures = roofline.figures(peaks, args.network_gbit, roofs)
    precision = Precision.of(config)
    model = estimate.meta_model(config.model, precision)
    plans = {}
    for n in sorted({*WORLD_SIZES, args.gpus}):
        if is_possible(config, n):
            cluster = Cluster(n, args.gpus_per_node, peaks.num_sms)
            plans[n] = list(roofline.stage_plans(config, model, precision, cluster, figures))
    memory = estimate.memory_bytes(config, model, precision, args.gpus)
    stages = plans[args.gpus]
    report = {
        "recipe": config.name,
        "gpu": gpu,
        "gpus": args.gpus,
        "gpus_per_node": args.gpus_per_node,
        "data_sheet": peaks.source,
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "stages": [stage_report(stage) for stage in stages],
        "total_steps": sum(stage.num_steps for stage in stages),
        "total_tokens": sum(stage.num_steps * stage.first.tokens_per_step for stage in stages),
        "total_seconds": total_seconds(stages),
        "memory_bytes": sum(memory.values()),
        "scaling": scaling(plans),
        "warnings": warnings(config, args.gpus),
    }
    if times is not None:
        report["check"] = check(times, stages, Schedule(config.schedule))
    return report


def gpu_named(text: str) -> str:
    """The name of the first GPU with all of the words of `text`. ConfigError: there is none."""
    words = set(re.findall(r"\w+", text.lower()))
    for name in hardware.GPU_PEAKS:
        if words and words <= set(re.findall(r"\w+", name.lower())):
            return name
    known = "\n  ".join(hardware.GPU_PEAKS)
    raise ConfigError(
        f"--gpu {text!r}: of this one no rates are known. Words of these names are:\n  {known}\n"
        "On a CPU a short run tells more: speedrun train --recipe tiny --steps 20"
    )


def for_gpu(config: Config, gpu: str) -> Config:
    """The config with the precision that the GPU has. ConfigError: it asks for another."""
    if config.precision == "float32":
        raise ConfigError("precision=float32: no rate of GPUs is known for it; use bf16")
    if not math.isnan(hardware.gpu_peaks(gpu).fp8_flops_per_s):
        return config
    if config.precision == "recipe":
        raise ConfigError(f"precision=recipe: {gpu} has no FP8; use auto or bf16")
    return dataclasses.replace(config, precision="bf16")


def is_possible(config: Config, num_gpus: int) -> bool:
    try:
        check_world_size(config, num_gpus)
    except ConfigError:
        return False
    return True


def total_seconds(stages: list[StagePlan]) -> float:
    return math.fsum(stage.seconds for stage in stages)


def stage_report(stage: StagePlan) -> dict[str, Any]:
    first = stage.first
    return {
        "first_step": first.step,
        "last_step": first.step + stage.num_steps - 1,
        "tokens_per_step": first.tokens_per_step,
        "parts_seconds": stage.parts,
        "step_seconds": stage.step_seconds,
        "step_seconds_without_adam": stage.seconds_by_adam.get(False),
        "step_seconds_with_adam": stage.seconds_by_adam.get(True),
        "seconds": stage.seconds,
        "bound_by": stage.bound_by,
    }


def scaling(plans: dict[int, list[StagePlan]]) -> list[dict[str, Any]]:
    """For each number of GPUs the run's seconds, GPU hours and what bounds most of its time."""
    rows = []
    for gpus, stages in plans.items():
        seconds = total_seconds(stages)
        by_kind = {kind: 0.0 for kind, _ in PARTS.values()}
        for stage in stages:
            by_kind[stage.bound_by] += stage.seconds
        bound_by = max(by_kind, key=by_kind.__getitem__)
        rows.append(
            {
                "gpus": gpus,
                "seconds": seconds,
                "gpu_hours": gpus * seconds / 3600,
                "bound_by": bound_by,
            }
        )
    return rows


def most_worth(rows: list[dict[str, Any]]) -> int:
    """The number of GPUs from which twice as many save less than WORTH_IT of the time."""
    seconds = {row["gpus"]: row["seconds"] for row in rows}
    for gpus, now in seconds.items():
        if 2 * gpus in seconds and seconds[2 * gpus] > (1 - WORTH_IT) * now:
            return gpus
    return max(seconds)


def warnings(config: Config, num_gpus: int) -> list[str]:
    """Stages whose documents so many GPUs would cut shorter than the recipe does."""
    found = []
    stages = Schedule(config.schedule).stages
    for i, stage in enumerate(stages):
        tokens = stage.tokens_per_step / num_gpus
        if tokens < stage.max_seq_len:
            last = i == len(stages) - 1 and config.schedule.extension is not None
            key = "schedule.extension" if last else f"schedule.stages.{i}"
            enough = num_gpus * stage.max_seq_len
            found.append(
                f"{key}: {num_gpus} GPUs have {tokens:,.0f} tokens each, so documents end there "
                f"and not at max_seq_len={stage.max_seq_len}: at most "
                f"{stage.tokens_per_step // stage.max_seq_len} GPUs, or "
                f"--set {key}.tokens_per_step={enough}"
            )
    return found


def as_text(report: dict[str, Any]) -> str:
    gpus = f"{report['gpus']} × {report['gpu']}"
    title = (
        f"{report['recipe']} on {gpus}: {report['total_steps']:,} steps, "
        f"{report['total_tokens']:,} tokens in {report['total_seconds']:.1f} s, predicted\n"
        f"memory of a GPU without messages: {report['memory_bytes'] / 2**30:.1f} GiB, estimated"
    )
    parts = [title, *(f"Warning: {text}" for text in report["warnings"]), _part_table(report)]
    if "check" in report:
        parts.append(_check_table(report["check"]))
    return "\n\n".join([*parts, _scaling_table(report), _figure_list(report), NOTES])


def _part_table(report: dict[str, Any]) -> str:
    stages = report["stages"]
    head = [f"{stage['first_step']}-{stage['last_step']}" for stage in stages]
    table = [["ms a step, in steps", *head]]
    for part in PARTS:
        table.append([part, *(f"{1e3 * stage['parts_seconds'][part]:.2f}" for stage in stages)])
    for name, key in (
        ("all, on average", "step_seconds"),
        ("without Adam", "step_seconds_without_adam"),
        ("with Adam", "step_seconds_with_adam"),
    ):
        cells = ("-" if s[key] is None else f"{1e3 * s[key]:.2f}" for s in stages)
        table.append([name, *cells])
    rates = (f"{s['tokens_per_step'] / s['step_seconds'] / 1e6:.2f}" for s in stages)
    table.append(["million tokens/s", *rates])
    table.append(["seconds", *(f"{stage['seconds']:.2f}" for stage in stages)])
    table.append(["bound by", *(stage["bound_by"] for stage in stages)])
    names = list(report["figures"])
    basis = ["rests on"]
    for _, used in PARTS.values():  # FP8's rate isn't there where the GPU has none
        numbers = sorted(names.index(name) + 1 for name in used if name in names)
        basis.append(f"[{', '.join(map(str, numbers))}]")
    basis += [""] * (len(table) - len(basis))
    lines = text_table(table).splitlines()
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, basis, strict=True))


def _figure_list(report: dict[str, Any]) -> str:
    scales = {"FLOP/s": (1e12, "TFLOP/s"), "B/s": (1e9, "GB/s"), "s": (1e-6, "µs")}
    lines = [f"figures, of the data sheet: {report['data_sheet']}"]
    for i, (name, figure) in enumerate(report["figures"].items(), start=1):
        scale, unit = scales.get(figure["unit"], (1, figure["unit"]))
        lines.append(f"[{i}] {name}: {figure['value'] / scale:.5g} {unit}; {figure['source']}")
    return "\n".join(lines)


def _scaling_table(report: dict[str, Any]) -> str:
    rows = report["scaling"]
    table = [["GPUs", "seconds", "GPU hours", "bound by"]]
    for row in rows:
        figures = (f"{row['seconds']:.1f}", f"{row['gpu_hours']:.3f}", row["bound_by"])
        table.append([f"{row['gpus']}", *figures])
    gpus = most_worth(rows)
    verdict = f"Up to {gpus} GPUs each doubling saves at least {WORTH_IT:.0%} of the time"
    verdict += "." if gpus == rows[-1]["gpus"] else "; more of them hardly pay."
    return f"{text_table(table)}\n{verdict}"


def _check_table(check: dict[str, Any]) -> str:
    table = [["ms a step, in steps", "planned", "observed", "off"]]
    updates = {None: "", False: "  without Adam", True: "  with Adam"}
    for row in check["rows"]:
        name = updates[row["adam"]] or f"{row['first_step']}-{row['last_step']}"
        table.append([name, *_compared(row, 1e3)])
    table.append(["run, s", *_compared(check["run"], 1)])
    machines = Counter(check["log_gpus"]).items()
    on = ", ".join(f"{count} × {gpu}" for gpu, count in machines) or "an unknown machine"
    name = Path(check["log"]).name
    return f"against {name}, of {check['total_steps']:,} steps on {on}:\n{text_table(table)}"


def _compared(row: dict[str, Any], scale: float) -> list[str]:
    times = (f"{scale * row[f'{kind}_seconds']:.1f}" for kind in ("planned", "observed"))
    return [*times, f"{row['off']:+.1%}"]
