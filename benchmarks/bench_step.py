"""What a training step costs on this machine, stage by stage, and beside the public program.

    python -m benchmarks.bench_step [--recipe NAME] [--data DIR] [--set KEY=VALUE] [--compile HOW]
                                    [--rounds N] [--timelines DIR] [--json FILE]
                                    [--peer FOLDER [--steps-a-round N] [--out DIR]]

Runs the training program itself on a short schedule with all its stages, and watches it
(step_probe.py says how). Tokens: the shards of --data, again and again if there are few; else
made-up ones. A table of the stages and the validation, then the twenty costliest kernels of each;
--timelines keeps a chrome trace of each. On a CPU the same tables, of torch's operators.

With --peer, modded-nanogpt's training program in FOLDER runs beside ours instead, on the same
tokens and the same device, in turns (side_by_side.py): milliseconds a step of both, their ratio
and its spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import bench, report, side_by_side
from benchmarks.bench import Timing
from benchmarks.step_probe import Figures, Probe, stage_steps
from benchmarks.training_check import write_made_up_shards
from speedrun import estimate, hardware, recipes, train
from speedrun.config import NUM_PARTS, Config, ConfigError
from speedrun.data import DataError
from speedrun.estimate import FP8_BYTES, Precision, meta_model
from speedrun.optim import placements
from speedrun.overrides import apply_overrides
from speedrun.record_logs import LogError
from speedrun.roofline import matrix_flops
from speedrun.runlog import RunError
from speedrun.schedule import Schedule, StepPlan
from speedrun.sources import DataSource, shards_of, validation_data, with_vocabulary

NUM_KERNELS = 20  # costliest, in a table
PHASES = (
    "data",
    "forward and backward",
    "forward",
    "backward",
    "optimizer",
    "optimizer with Adam",
)
HEADER = (
    "stage",
    "tokens a micro-batch",
    "ms a step",
    "± IQR",
    *(f"{phase} ms" for phase in PHASES),
    "device busy ms",
    "idle ms",
    "launches",
    "peak GB",
    "tokens/s",
    "% of roof",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage, or the validation. roof_s: least time of a step's matrix products; nan: unknown."""

    name: str
    micro_batch_tokens: int
    tokens: int  # of a step, or of a validation
    figures: Figures
    roof_s: float = math.nan

    @property
    def timing(self) -> Timing:
        return Timing(tuple(1e3 * ms for ms in self.figures.rounds_ms))

    @property
    def ms(self) -> float:
        return self.timing.median_us / 1e3

    @property
    def busy_ms(self) -> float | None:
        busy_us = self.figures.profile.busy_us
        return None if busy_us is None else busy_us / 1e3

    @property
    def roof_frac(self) -> float:
        return self.roof_s * 1e3 / self.ms

    def cells(self) -> tuple[str, ...]:
        def number(value: float | None, digits: int = 2) -> str:
            return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"

        figures, busy = self.figures, self.busy_ms
        peak = figures.peak_bytes
        return (
            self.name,
            f"{self.micro_batch_tokens:,}",
            number(self.ms),
            number(self.timing.iqr_us / 1e3),
            *(number(figures.phase_ms(phase)) for phase in PHASES),
            number(busy),
            number(None if busy is None else self.ms - busy),
            number(figures.profile.launches, 0),
            number(None if peak is None else peak / 1e9, 1),
            number(self.tokens / self.ms * 1e3, 0),
            number(100 * self.roof_frac, 1),
        )

    def as_json(self) -> dict:
        fields = dataclasses.asdict(self) | {
            "median_ms": self.ms,
            "phases_median_ms": {phase: self.figures.phase_ms(phase) for phase in PHASES},
            "busy_ms": self.busy_ms,
            "launches": self.figures.profile.launches,
            "tokens_per_s": self.tokens / self.ms * 1e3,
            "roof_frac": self.roof_frac,
        }
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def products_s(
    config: Config, precision: Precision, plan: StepPlan, roofs: Mapping[str, float]
) -> float:
    """Least time of a step's matrix products on one device, at the measured rates of large ones.

    Of weights, of attention and of the orthogonalisation, forward and backward; nan in float32, of
    which no rate is measured.
    """
    if precision.dtype == torch.float32:
        return math.nan
    model = meta_model(config.model, precision)
    stage = Schedule(config.schedule).stages[plan.stage]
    flops = {"bf16": 0.0, "fp8": 0.0}
    for gemm in estimate.gemms(model, precision):
        for operand_bytes in (gemm.forward_bytes, gemm.dx_bytes, gemm.dw_bytes):
            kind = "fp8" if operand_bytes == FP8_BYTES else "bf16"
            flops[kind] += 2.0 * gemm.num_weights * plan.tokens_per_step
    length = min(plan.max_seq_len, estimate.micro_batch_tokens(config, stage, 1))
    attention = estimate.attention_work(config.model, plan.windows, length, precision)
    flops["bf16"] += sum(work.flops for work in attention.values()) * plan.tokens_per_step
    for place in placements(model.named_parameters(), config.optim, 1):
        if place.kind == "matrices" and config.optim.matrix_rule != "adamw":
            flops["bf16"] += matrix_flops(place, config.optim, 1)
    return sum(count / roofs[kind] for kind, count in flops.items() if count)


def short_schedule(config: Config, steps: int) -> list[str]:
    """--set words: `steps` steps for each stage, and a validation in front of it and at the end."""
    num_stages = len(config.schedule.stages)
    words = [
        f"schedule.num_steps={num_stages * steps}",
        f"schedule.val_interval={steps}",
        "schedule.stage_ends=",
    ]
    if config.schedule.extension is not None:
        words.append(f"schedule.extension_steps={steps}")
    return words


def watch(args: argparse.Namespace, scratch: Path) -> list[Row]:
    """Runs and watches the training. RunError where it fails."""
    config = apply_overrides(recipes.load(args.recipe), args.set)
    changes = short_schedule(config, stage_steps(config.schedule.adam_interval, args.rounds))
    if config.data.val_tokens is not None:  # of --data, which may hold few
        at_most = NUM_PARTS * config.data.val_tokens_per_part
        changes += ["data.val_tokens=None", f"data.val_tokens_at_most={at_most}"]
    data = args.data
    if data is None:
        data = scratch / "data"
        config = apply_overrides(config, changes)
        write_made_up_shards(data, config, config.schedule.total_steps)
        if config.schedule.prefix_loss:  # made-up tokens are no texts
            changes.append("schedule.prefix_loss=false")
    options = argparse.ArgumentParser()
    train.add_arguments(options)
    command = ["--recipe", args.recipe, "--data", str(data), "--repeat-data", "--keep", "0"]
    command += ["--device", args.device, "--out", str(scratch / "run"), "--compile", args.compile]
    command += [f"--set={change}" for change in [*args.set, *changes]]
    train_args = options.parse_args(command)
    config = with_vocabulary(train.configure(train_args))
    schedule, device = Schedule(config.schedule), torch.device(args.device)
    probe = Probe(schedule, device, args.rounds, args.timelines)
    with probe.watching():
        if train.run(train_args):
            raise RunError("the training failed; its message is above")
    return rows_of(probe, config, shards_of(data, config), device)


def rows_of(probe: Probe, config: Config, data: DataSource, device: torch.device) -> list[Row]:
    """What the probe has seen, with the roofs of this device, which are measured here."""
    if config.precision == "auto":
        config = dataclasses.replace(config, precision=hardware.best_precision(device))
    precision, roofs = Precision.of(config), bench.roofs(device)
    rows = []
    for i, (stage, figures) in enumerate(zip(probe.schedule.stages, probe.stages, strict=True)):
        plan = probe.schedule.plan(probe.schedule.starts[i])
        name = "extension" if stage is config.schedule.extension else f"{i + 1}"
        tokens = estimate.micro_batch_tokens(config, stage, 1)
        least_s = products_s(config, precision, plan, roofs)
        rows.append(Row(name, tokens, plan.tokens_per_step, figures, least_s))
    num_parts = sum(1 for _ in validation_data(config, data, rank=0, world_size=1))
    part_tokens = config.data.val_tokens_per_part
    rows.append(Row("validation", part_tokens, num_parts * part_tokens, probe.validation))
    return rows


def kernel_table(row: Row) -> str:
    profile = row.figures.profile
    total_us = sum(kernel.us for kernel in profile.kernels)
    cells = [
        (
            kernel.name[:100].replace("|", "/"),
            f"{kernel.calls:,.1f}",
            f"{kernel.us / kernel.calls:,.1f}",
            f"{kernel.us / 1e3:,.3f}",
            f"{100 * kernel.us / total_us:.1f}",
        )
        for kernel in profile.kernels[:NUM_KERNELS]
    ]
    return report.markdown_table(("kernel", "calls", "µs each", "ms", "%"), cells)


def show_stages(args: argparse.Namespace, facts: dict) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        rows = watch(args, Path(scratch))
    print(report.markdown_table(HEADER, [row.cells() for row in rows]))
    for row in rows:
        print(f"\n{row.name}: the costliest of {len(row.figures.profile.kernels)}")
        print(kernel_table(row))
    return facts | {"rows": [row.as_json() for row in rows]}


def show_comparison(args: argparse.Namespace, facts: dict) -> dict:
    config = apply_overrides(recipes.load(args.recipe), args.set)
    options = [f"--recipe={args.recipe}", f"--device={args.device}", f"--compile={args.compile}"]
    options += [f"--set={change}" for change in args.set]
    side_by_side.check_peer(args.peer)
    folder = Path(args.out or tempfile.mkdtemp(prefix="bench_step_")).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: isn't empty; name another folder")
    print(f"outputs of both programs in {folder}", flush=True)
    sizes = (args.rounds, args.steps_a_round)
    found = side_by_side.compare(folder, args.peer, args.data, config, *sizes, options)
    print(report.markdown_table(side_by_side.COMPARISON_HEADER, found.cells()))
    for name in ("ours", "peer"):
        peak = found.peak_mib[name]
        memory = "" if peak is None else f", {peak:,} MiB of memory at most"
        print(f"{name}: {found.start_s[name]:.1f} s from the command to the first step{memory}")
    print("What is changed of the peer's run, of which no file is touched:")
    for change in found.changes:
        print(f"  {change}")
    return facts | {"comparison": dataclasses.asdict(found)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_step", description=(__doc__ or "").splitlines()[0]
    )
    side_by_side.add_arguments(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of token shards")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each stage (5)")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="modded-nanogpt's, beside ours")
    parser.add_argument(
        "--steps-a-round", type=int, default=4, metavar="N", help="with --peer, an even number (4)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --peer: for both outputs")
    parser.add_argument("--timelines", type=Path, metavar="DIR", help="keep chrome traces there")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    if args.peer is not None and args.data is None:
        parser.error("--peer: needs --data DIR, a folder of real tokens with gpt2.tiktoken")
    if args.steps_a_round < 2 or args.steps_a_round % 2:
        parser.error(
            f"--steps-a-round {args.steps_a_round}: an even number, since Adam updates every other"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = report.environment() | {"recipe": args.recipe, "changes": args.set}
    facts |= {"data": "real" if args.data else "made up", "compile": args.compile}
    try:
        content = show_comparison(args, facts) if args.peer else show_stages(args, facts)
    except (ConfigError, DataError, RunError, LogError) as problem:
        print(f"bench_step: {problem}", file=sys.stderr)
        return 1
    print(f"\n{args.recipe} on {facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}")
    if args.json:
        report.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
