"""Everything that `speedrun record` says about a set of runs, as one value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from speedrun.record_logs import LoggedRun
from speedrun.record_rules import (
    FinishedRun,
    RecordError,
    Rule,
    Statistics,
    Track,
    check_rules,
    hardware_text,
    runs_needed,
    scipy_stats,
    select_finished,
    summarize,
)


def compare(
    finished: Sequence[FinishedRun], baseline: Sequence[FinishedRun]
) -> dict[str, dict[str, float | None]]:
    """Welch's t-test of losses and times against the baseline's, by "loss" and "time_s".

    difference: ours minus theirs, with its 95 % interval and the two-sided p; None where a
    side has no spread.
    """
    both = (finished, baseline)
    return {
        "loss": _welch(*([final.loss for _, final in side] for side in both)),
        "time_s": _welch(
            *(
                [final.train_time_s for _, final in side if final.train_time_s is not None]
                for side in both
            )
        ),
    }


def _welch(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    result = dict.fromkeys(("baseline_mean", "difference", "low", "high", "p_value"))
    if theirs:
        result["baseline_mean"] = statistics.mean(theirs)
    if ours and theirs:
        result["difference"] = statistics.mean(ours) - statistics.mean(theirs)
    if len({*ours}) > 1 and len({*theirs}) > 1:
        test = scipy_stats().ttest_ind(ours, theirs, equal_var=False)
        interval = test.confidence_interval(0.95)
        result |= {
            "low": float(interval.low),
            "high": float(interval.high),
            "p_value": float(test.pvalue),
        }
    return result


def judge(
    runs: Sequence[LoggedRun],
    track: Track,
    baseline: Sequence[LoggedRun] = (),
    stop_step: int | None = None,
    experiment: bool = False,
) -> Report:
    """Everything at once. RecordError where no run, or no run of the baseline, is finished."""
    finished, excluded = select_finished(runs, track, stop_step)
    if not finished:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in excluded.items())
        raise RecordError(f"no finished run among these logs{reasons}")
    found = summarize(finished, track.target)
    base, base_excluded = select_finished(baseline, track)
    if baseline and not base:
        raise RecordError(f"--baseline: no finished run; {'; '.join(base_excluded.values())}")
    return Report(
        track=track,
        finished=tuple(finished),
        excluded=excluded,
        statistics=found,
        rules=tuple(check_rules(finished, found, track, experiment, base)),
        runs_needed=runs_needed(found, track),
        baseline=tuple(base),
        baseline_excluded=base_excluded,
        comparison=compare(finished, base) if base else None,
        experiment=experiment,
        stop_step=stop_step,
    )


@dataclass(frozen=True)
class Report:
    track: Track
    finished: tuple[FinishedRun, ...]
    excluded: dict[str, str]
    statistics: Statistics
    rules: tuple[Rule, ...]
    runs_needed: int | None
    baseline: tuple[FinishedRun, ...]
    baseline_excluded: dict[str, str]
    comparison: dict[str, dict[str, float | None]] | None
    experiment: bool
    stop_step: int | None

    @property
    def broken(self) -> list[Rule]:
        return [rule for rule in self.rules if rule.met is False]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without NaN. The keys are a contract (schema 1)."""
        return {
            "schema": 1,
            "track": self.track.name,
            "target": self.track.target,
            "experiment": self.experiment,
            "systems_only": self.track.systems_only,
            "stop_step": self.stop_step,
            "met": not self.broken,
            "statistics": {k: _finite_or_none(v) for k, v in asdict(self.statistics).items()},
            "rules": [
                {"name": rule.name, "met": rule.met, "detail": rule.detail} for rule in self.rules
            ],
            "runs_needed": self.runs_needed,
            "runs": [_run_json(entry) for entry in self.finished],
            "excluded": [{"name": n, "reason": r} for n, r in self.excluded.items()],
            "baseline": [_run_json(entry) for entry in self.baseline],
            "baseline_excluded": [
                {"name": n, "reason": r} for n, r in self.baseline_excluded.items()
            ],
            "comparison": self.comparison
            and {
                what: {key: _finite_or_none(value) for key, value in row.items()}
                for what, row in self.comparison.items()
            },
        }


def _run_json(entry: FinishedRun) -> dict[str, Any]:
    run, final = entry
    return {
        "name": run.name,
        "step": final.step,
        "total_steps": run.total_steps,
        "val_loss": _finite_or_none(final.loss),
        "train_time_s": final.train_time_s,
        "seed": run.seed,
        "hardware": hardware_text(run),
        "clock_restart_step": run.clock_restart_step,
    }


def _finite_or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
