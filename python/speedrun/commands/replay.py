"""Run a step that went wrong again, from its dump, and name the first tensor that isn't finite."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import torch
from torch import nn

from speedrun import nonfinite, step_dump, train
from speedrun._text_table import text_table
from speedrun.comms import Comms
from speedrun.config import Config, ConfigError
from speedrun.estimate import Precision
from speedrun.nonfinite import Findings
from speedrun.runlog import RunError
from speedrun.schedule import Schedule
from speedrun.sources import model_for, to_micro_batches
from speedrun.step_dump import Origin, StepDump

MOST_GRADIENTS = 3  # of the bad ones, that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a run's folder bad_step_…")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the run's config, as in precision=float32: is the step finite then?",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where a GPU is visible",
    )


def run(args: argparse.Namespace) -> int:
    """0: the step ran, whatever was found; 1: it can't, with the reason on stderr."""
    try:
        dump = step_dump.read(args.dump)
        config, seed = configured(dump.origin, args.set)
        print(f"{args.dump}: {dump.problem}")
        findings = replay(dump, config, seed, torch.device(args.device))
    except (ConfigError, RunError) as error:
        print(f"speedrun replay: error: {error}", file=sys.stderr)
        return 1
    print(as_text(findings))
    return 0


def configured(origin: Origin, overrides: list[str]) -> tuple[Config, int]:
    """The run's config, with the vocabulary of its data and these changes, and its seed."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    train.add_arguments(parser)
    try:
        args, unknown = parser.parse_known_args([*origin.argv, *(f"--set={s}" for s in overrides)])
    except argparse.ArgumentError as error:
        raise RunError(f"the dump's run had other options: {error}") from None
    if unknown:
        raise RunError(f"the dump's run had other options: no {unknown[0]} here")
    config = train.configure(args)
    return dataclasses.replace(config, model=model_for(config, origin.format)), args.seed


def replay(dump: StepDump, config: Config, seed: int, device: torch.device) -> Findings:
    """The step on one device, with all parts that its ranks had."""
    # "auto" was settled on the run's device, and other settings say it themselves.
    wanted = dump.origin.precision if config.precision == "auto" else Precision.of(config)
    where = train.Run(Comms(), device, wanted.dtype, wanted.fp8)
    model = train.build_model(config, where, seed)
    if dump.weights is not None:
        load(model, dump)
        print("weights: those of that step")
    else:
        print(
            f"weights: the start values of seed {seed}, since the dump has none: the step was not "
            "checked before its update (--set guards.check=step)"
        )
    if len(dump.batch.inputs) % config.micro_batch_parts:
        config = dataclasses.replace(config, micro_batch_parts=1)
    batches = to_micro_batches(dump.batch, config, device)
    table = None if dump.prefix_table is None else torch.from_numpy(dump.prefix_table).to(device)
    plan = Schedule(config.schedule).plan(dump.step)
    inputs = (model, None, batches, plan, table)
    try:
        return nonfinite.find(model, functools.partial(train.forward_backward, *inputs))
    except torch.OutOfMemoryError as error:
        raise RunError(f"{error}; --set micro_batch_parts=1 needs less memory") from None


def load(model: nn.Module, dump: StepDump) -> None:
    """The dump's weights, in the model's type; scales of FP8 only where both have them."""
    try:
        result = model.load_state_dict(dump.weights, strict=False)
    except RuntimeError as error:
        raise RunError(f"the dump's weights don't fit the config: {error}") from None
    missing = [name for name in result.missing_keys if "." not in name]
    if missing:
        raise RunError(f"the dump has no weights for {', '.join(missing)}")


def as_text(findings: Findings) -> str:
    table = [("behind", "largest |x|", "largest |gradient|")]
    for row in findings.rows:
        values = (row.largest, row.largest_gradient)
        table.append((row.part, *("" if value is None else f"{value:.4g}" for value in values)))
    lines = [text_table(table)]
    if findings.bad_gradients:
        names = "; ".join(findings.bad_gradients[:MOST_GRADIENTS])
        more = len(findings.bad_gradients) - MOST_GRADIENTS
        lines.append(f"gradients that aren't finite: {names}{f'; {more} more' * (more > 0)}")
    if findings.first is None:
        lines.append("everything is finite")
    else:
        lines.append(f"not finite first: {findings.first}")
    return "\n".join(lines)
