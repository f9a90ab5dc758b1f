"""A plan beside what a training log shows."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
from pathlib import Path
from typing import Any

from speedrun.config import Config, ConfigError
from speedrun.record_logs import STEP_LINE, TIME, LogError, read_runs, without_source
from speedrun.roofline import StagePlan
from speedrun.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class TrainTimes:
    """Of a log: seconds of training behind each step, and at its last validation, if it has one."""

    path: Path
    gpus: tuple[str, ...]  # a name each; empty: the log doesn't tell
    total_steps: int
    by_step: dict[int, float]
    at_end: float | None


def train_times(path: Path) -> TrainTimes:
    """LogError: not there, no training lines, or a clock that starts again."""
    if path.is_dir():  # of a run of ours
        path = path / "log.txt"
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"--check {path}: {error.strerror}; give a training log") from None
    by_step, validations, totals = {0: 0.0}, {}, set()
    for match in STEP_LINE.finditer(without_source(text)):
        step, total, rest = match.groups()
        time = re.search(rf"\btrain_time:{TIME.pattern}", rest)
        if total is None or time is None:
            continue
        seconds = float(time[1]) / (1000 if time[2] == "ms" else 1)
        times = validations if "val_loss:" in rest else by_step
        times[int(step)] = seconds
        totals.add(int(total))
    if len(by_step) < 2 or len(totals) != 1:
        raise LogError(
            f"--check {path}: a log of one run is needed, with lines such as "
            "'step:7/1390 train_time:288ms' (log_interval=1)"
        )
    ordered = sorted(by_step)
    for before, step in itertools.pairwise(ordered):
        if by_step[step] < by_step[before]:
            raise LogError(
                f"--check {path}: train_time falls at step {step}: in old logs the clock starts "
                "again there, and stages can't be told; give a newer log"
            )
    (total_steps,) = totals
    gpus = read_runs(path)[0].gpus if validations else ()
    return TrainTimes(path, gpus, total_steps, by_step, validations.get(total_steps))


def with_total_steps(config: Config, total_steps: int) -> Config:
    """The recipe at the number of steps of a log, of which its extension has what it had."""
    num_steps = total_steps - config.schedule.extension_steps
    if num_steps < len(config.schedule.stages):
        raise ConfigError(
            f"the log's {total_steps} steps are too few for {config.name}: give its recipe"
        )
    schedule = dataclasses.replace(config.schedule, num_steps=num_steps)
    return dataclasses.replace(config, schedule=schedule)


def check(times: TrainTimes, stages: list[StagePlan], schedule: Schedule) -> dict[str, Any]:
    """Planned beside observed: seconds a step by stage, and of the run.

    By training lines, which the host writes: it is up to a step ahead of the GPU. Where Adam has
    an update on some steps only and every step has its line, also by that.
    """
    rows = []
    for stage in stages:
        first, end = stage.first.step, stage.first.step + stage.num_steps
        missing = [step for step in (first, end) if step not in times.by_step]
        if missing:
            raise LogError(
                f"--check {times.path}: no training line of step {missing[0]}, where a stage of "
                "the recipe ends; give a complete log with a line a step (log_interval=1)"
            )
        steps = {"first_step": first, "last_step": end - 1}
        observed = (times.by_step[end] - times.by_step[first]) / stage.num_steps
        rows.append(steps | {"adam": None} | _compared(stage.step_seconds, observed))
        if len(stage.seconds_by_adam) > 1 and all(n in times.by_step for n in range(first, end)):
            for adam, planned in sorted(stage.seconds_by_adam.items()):
                observed = statistics.fmean(
                    times.by_step[step + 1] - times.by_step[step]
                    for step in range(first, end)
                    if schedule.plan(step).adam == adam
                )
                rows.append(steps | {"adam": adam} | _compared(planned, observed))
    return {
        "log": str(times.path),
        "log_gpus": times.gpus,
        "total_steps": times.total_steps,
        "rows": rows,
        "run": _compared(
            math.fsum(stage.seconds for stage in stages),
            times.at_end or times.by_step[times.total_steps],
        ),
    }


def _compared(planned: float, observed: float) -> dict[str, float]:
    return {
        "planned_seconds": planned,
        "observed_seconds": observed,
        "off": planned / observed - 1,
    }
