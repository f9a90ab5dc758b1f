"""What a set of runs shows: statistics, the rules of its track, comparison with other runs.

Pure functions from logged runs to numbers. scipy (extra `cli`) computes the tests.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from speedrun.config import (
    RECORD_P_VALUE,
    RECORD_VAL_TOKENS,
    TARGET_LOSS_MAIN,
    TARGET_LOSS_MEDIUM,
)
from speedrun.record_logs import LoggedRun, Validation

# The optimization track takes the std of final losses as known, and asks for
# (target − mean)·√n >= 0.004, which is p < 0.001 at that std.
OPTIMIZATION_MARGIN = 0.004
ASSUMED_STD = 0.0013
RECORD_GPU, RECORD_NUM_GPUS = "NVIDIA H100", 8
VALIDATION_SHARD = "fineweb_val_000000.bin"
UNTRAINED_SLACK = 0.1  # nats below log(vocabulary), where no model without training is
MAX_RUNS_NEEDED = 1000


class RecordError(ValueError):
    """Runs that can't be judged. The message says why, and what to give instead."""


@dataclass(frozen=True)
class Track:
    """The rules of one kind of record. by_margin: (target − mean)·√n instead of the t-test."""

    name: str
    target: float
    by_margin: bool = False
    timed: bool = True  # a claim about seconds, on the record's hardware
    may_stop_early: bool = False


TRACKS = {
    track.name: track
    for track in (
        Track("main", TARGET_LOSS_MAIN),
        Track("medium", TARGET_LOSS_MEDIUM),
        Track("optimization", TARGET_LOSS_MAIN, by_margin=True, timed=False, may_stop_early=True),
    )
}


@dataclass(frozen=True)
class Rule:
    """met: None where the logs don't tell. of_claim: asked of a record, not of an experiment."""

    name: str
    met: bool | None
    detail: str
    of_claim: bool = False


class FinishedRun(NamedTuple):
    run: LoggedRun
    final: Validation


@dataclass(frozen=True)
class Statistics:
    """std: of a sample, None for one run. p_value: one-sided, mean < target. margin: by √n."""

    num_runs: int
    mean: float
    std: float | None
    p_value: float | None
    margin: float
    num_times: int  # runs whose time is known
    mean_time_s: float | None
    std_time_s: float | None
    median_time_s: float | None
    min_time_s: float | None
    max_time_s: float | None


def guess_track(runs: Sequence[LoggedRun]) -> str | None:
    """By recipe or target for runs of ours, by folder or loss for public logs; None: of no track.

    RecordError where the runs are of several.
    """
    ended = [run for run in runs if run.validations and math.isfinite(run.validations[-1].loss)]
    found = {_guess_track(run) for run in ended}
    if len(found) > 1:
        raise RecordError(
            f"runs of several tracks ({', '.join(sorted(map(str, found)))}): give those of one, or "
            "say which by --track"
        )
    return found.pop() if found else None


def _guess_track(run: LoggedRun) -> str | None:
    if run.header:
        config = run.header["config"]
        if config["name"].startswith("optimization"):
            return "optimization"
        targets = {track.target: track.name for track in TRACKS.values() if track.timed}
        return targets.get(config["target_loss"])
    if any("track_3" in part for part in run.path.absolute().parts):
        return "optimization"
    middle = (TARGET_LOSS_MAIN + TARGET_LOSS_MEDIUM) / 2
    return "main" if run.validations[-1].loss > middle else "medium"


def select_finished(
    runs: Sequence[LoggedRun], track: Track, stop_step: int | None = None
) -> tuple[list[FinishedRun], dict[str, str]]:
    """The runs that count, with the validation that counts; why the others don't, by name.

    stop_step: take the validation at that step, and let a run go on behind it.
    """
    finished, excluded, paths = [], {}, set()
    for run in runs:
        key = (run.path.resolve(), run.name.rpartition("#")[2])
        if key in paths:
            continue  # given twice, by itself and in its folder
        paths.add(key)
        final = _final_validation(run, track, stop_step)
        if isinstance(final, str):
            excluded[run.name] = final
        else:
            finished.append(FinishedRun(run, final))
    return finished, excluded


def _final_validation(run: LoggedRun, track: Track, stop_step: int | None) -> Validation | str:
    if not run.validations:
        return "no validation in it"
    last = run.validations[-1]
    if last.step is None:
        return last
    if stop_step is not None:
        at_step = [v for v in run.validations if v.step == stop_step]
        return at_step[-1] if at_step else f"no validation at step {stop_step}"
    total = run.total_steps or run.last_step
    if run.last_step < total and (last.step < run.last_step or last.step == 0):
        return f"cut short: it ends at step {run.last_step} of {total}"
    if last.step < run.last_step:
        return f"cut short: no validation after the last step, {run.last_step}"
    if last.step < total and not track.may_stop_early:
        return f"it stopped at step {last.step} of {total}; only `--track optimization` allows that"
    return last


def summarize(finished: Sequence[FinishedRun], target: float) -> Statistics:
    """Of the final losses and times. RecordError without any run."""
    if not finished:
        raise RecordError("no finished run among these logs")
    losses = [final.loss for _, final in finished]
    times = [final.train_time_s for _, final in finished if final.train_time_s is not None]
    several = len(losses) > 1
    std = statistics.stdev(losses) if several and all(map(math.isfinite, losses)) else None
    p_value = None
    if std:
        p_value = float(_scipy_stats().ttest_1samp(losses, target, alternative="less").pvalue)
    mean = math.fsum(losses) / len(losses)
    return Statistics(
        num_runs=len(losses),
        mean=mean,
        std=std,
        p_value=p_value,
        margin=(target - mean) * math.sqrt(len(losses)),
        num_times=len(times),
        mean_time_s=statistics.mean(times) if times else None,
        std_time_s=statistics.stdev(times) if len(times) > 1 else None,
        median_time_s=statistics.median(times) if times else None,
        min_time_s=min(times, default=None),
        max_time_s=max(times, default=None),
    )


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise RecordError(
            "the t-test needs scipy, which is missing: pip install 'nanogpt-speedrun[cli]'"
        ) from None
    return stats


def runs_needed(found: Statistics, track: Track) -> int | None:
    """Runs in all until the loss rule is met, if mean and std stay as they are; None: never.

    The std of a single run is unknown: ASSUMED_STD then.
    """
    if not found.mean < track.target:
        return None
    if track.by_margin:
        needed = math.ceil((OPTIMIZATION_MARGIN / (track.target - found.mean)) ** 2 - 1e-9)
        return needed if needed <= MAX_RUNS_NEEDED else None
    std = ASSUMED_STD if found.std is None else found.std
    if std == 0:
        return None
    t = _scipy_stats().t
    for num_runs in range(2, MAX_RUNS_NEEDED + 1):
        distance = (found.mean - track.target) / std * math.sqrt(num_runs)
        if t.cdf(distance, num_runs - 1) < RECORD_P_VALUE:
            return num_runs
    return None


def check_rules(
    finished: Sequence[FinishedRun], found: Statistics, track: Track, experiment: bool = False
) -> list[Rule]:
    """Every rule of the track; without those of a claim for an experiment."""
    rules = [
        _loss_rule(found, track),
        _finite_rule(finished),
        _distinct_rule(finished),
        _steps_rule(finished),
        _configuration_rule(finished),
    ]
    if not experiment:
        rules += [_validation_rule(finished), _untrained_rule(finished), _tokens_rule(finished)]
        rules += [_sources_rule(finished)]
        rules += [_hardware_rule(finished)] if track.timed else []
    return rules


def _loss_rule(found: Statistics, track: Track) -> Rule:
    if track.by_margin:
        # 1e-9: a mean of 3.276 in one run meets the rule, whatever its last bit.
        met = found.margin >= OPTIMIZATION_MARGIN - 1e-9
        detail = f"(target − mean)·√n = {found.margin:.5f}, at least {OPTIMIZATION_MARGIN} needed"
    elif found.p_value is None:
        met = False
        detail = "one run has no std" if found.num_runs == 1 else "these losses have no std"
    else:
        met = found.p_value < RECORD_P_VALUE
        detail = f"p = {found.p_value:.10f}, below {RECORD_P_VALUE} needed"
    return Rule(f"mean loss below {track.target}", met, detail)


def _finite_rule(finished: Sequence[FinishedRun]) -> Rule:
    bad = [run.name for run, final in finished if not math.isfinite(final.loss)]
    return Rule("every loss is finite", not bad, ", ".join(bad) or "all are")


def _distinct_rule(finished: Sequence[FinishedRun]) -> Rule:
    """No run counts twice: no two with one seed, or with the same curve to the last digit."""
    name = "every run has its own seed"
    groups: dict[Any, list[str]] = {}
    for run, _ in finished:
        losses = tuple((v.step, v.loss) for v in run.validations if v.step)
        if run.seed is not None:
            groups.setdefault(f"seed {run.seed}", []).append(run.name)
        elif len(losses) > 1:
            groups.setdefault(losses, []).append(run.name)
        else:
            return Rule(name, None, "one final loss a run: these can't tell")
    same = [names for names in groups.values() if len(names) > 1]
    if same:
        why = "; ".join(f"{', '.join(names)}: same seed or losses" for names in same)
        return Rule(name, False, why)
    seeds = [run.seed for run, _ in finished]
    known = None not in seeds
    detail = f"seeds {', '.join(map(str, seeds))}" if known else "no two curves are the same"
    return Rule(name, True, detail)


def _steps_rule(finished: Sequence[FinishedRun]) -> Rule:
    name = "all runs stop at one step"
    steps = {final.step for _, final in finished}
    if None in steps:
        return Rule(name, None, "the steps are not given")
    detail = f"step {', '.join(map(str, sorted(steps)))}"
    return Rule(name, len(steps) == 1, detail)


def _configuration_rule(finished: Sequence[FinishedRun]) -> Rule:
    """Same config, sources and machine type: otherwise it's no sample of one thing."""
    name = "all runs have one configuration"
    if not all(run.header for run, _ in finished):
        return Rule(name, None, "these logs hold no configuration")
    first = finished[0].run
    for run, _ in finished[1:]:
        for key in ("config", "sources", "world_size", "device", "dtype", "fp8", "train_data"):
            if run.header[key] != first.header[key]:
                return Rule(name, False, f"{run.name} and {first.name} differ in {key}")
    return Rule(name, True, f"config and {len(first.header['sources'])} source files are the same")


def _validation_rule(finished: Sequence[FinishedRun]) -> Rule:
    name = f"validation on the first {RECORD_VAL_TOKENS:,} tokens of {VALIDATION_SHARD}"
    if not all(run.header for run, _ in finished):
        return Rule(name, None, "these logs don't say", of_claim=True)
    for run, _ in finished:
        num_tokens = run.header["config"]["data"]["val_tokens"]
        files = [Path(path).name for path in run.header["val_data"]]
        if num_tokens != RECORD_VAL_TOKENS or files[:1] != [VALIDATION_SHARD]:
            tokens = "all" if num_tokens is None else f"{num_tokens:,}"
            detail = f"{run.name}: {tokens} tokens of {', '.join(files)}"
            return Rule(name, False, detail, of_claim=True)
    return Rule(name, True, "by the runs' configs", of_claim=True)


def _tokens_rule(finished: Sequence[FinishedRun]) -> Rule:
    """The token stream is given: in order, each token once, in the parts of 1 to 8 ranks."""
    name = "training tokens in order, without repeats"
    if not all(run.header for run, _ in finished):
        return Rule(name, None, "these logs don't say", of_claim=True)
    for run, _ in finished:
        obstacles = run.header["record_obstacles"]
        if run.header["config"]["data"]["repeat"]:
            obstacles = [*obstacles, "the stream may start again (data.repeat)"]
        if obstacles:
            return Rule(name, False, f"{run.name}: {'; '.join(obstacles)}", of_claim=True)
    return Rule(name, True, "by the runs' configs", of_claim=True)


def _untrained_rule(finished: Sequence[FinishedRun]) -> Rule:
    """Before the clock kernels may get warm, but nothing may be learned."""
    name = "nothing learned before the clock"
    firsts = {run.name: run.validations[0] for run, _ in finished}
    if any(first.step != 0 for first in firsts.values()):
        return Rule(name, None, "no validation before the first step", of_claim=True)
    for run, _ in finished:
        vocab_size = run.header["config"]["model"]["vocab_size"] if run.header else 50_257
        if firsts[run.name].loss < math.log(vocab_size) - UNTRAINED_SLACK:
            detail = f"{run.name} begins at {firsts[run.name].loss:.4f}"
            return Rule(name, False, detail, of_claim=True)
    lowest = min(first.loss for first in firsts.values())
    return Rule(name, True, f"validation before the first step: at least {lowest:.4f}", True)


def _sources_rule(finished: Sequence[FinishedRun]) -> Rule:
    name = "the sources are those of a commit"
    if not all(run.header for run, _ in finished):
        return Rule(name, None, "these logs don't say", of_claim=True)
    commits = sorted({run.header["environment"]["commit"] for run, _ in finished})
    met = not any(commit == "none" or commit.endswith("-dirty") for commit in commits)
    return Rule(name, met, ", ".join(commits), of_claim=True)


def _hardware_rule(finished: Sequence[FinishedRun]) -> Rule:
    name = f"{RECORD_NUM_GPUS} x {RECORD_GPU}"
    for run, _ in finished:
        known = bool(run.gpus or run.header)
        if not known:
            return Rule(name, None, f"{run.name} doesn't say", of_claim=True)
        right = len(run.gpus) == RECORD_NUM_GPUS and all(
            gpu.startswith(RECORD_GPU) for gpu in run.gpus
        )
        if not right:
            detail = f"{run.name}: {hardware_text(run)}: its time is not comparable"
            return Rule(name, False, detail, of_claim=True)
    return Rule(name, True, "; ".join(sorted({hardware_text(run) for run, _ in finished})), True)


def hardware_text(run: LoggedRun) -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3"; "" where the log doesn't say."""
    if not run.gpus:
        return run.header.get("device", "")
    return ", ".join(f"{count} x {name}" for name, count in Counter(run.gpus).items())


def compare(
    finished: Sequence[FinishedRun], baseline: Sequence[FinishedRun]
) -> dict[str, dict[str, float | None]]:
    """Welch's t-test of losses and times against the baseline's, by "loss" and "time_s".

    difference: ours minus theirs, with its 95 % interval and the two-sided p; None with fewer
    than two values on a side.
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
    spread = min(len(ours), len(theirs)) > 1 and len({*ours}) + len({*theirs}) > 2
    if spread:
        test = _scipy_stats().ttest_ind(ours, theirs, equal_var=False)
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
        rules=tuple(check_rules(finished, found, track, experiment)),
        runs_needed=runs_needed(found, track),
        baseline=tuple(base),
        baseline_excluded=base_excluded,
        comparison=compare(finished, base) if base else None,
        experiment=experiment,
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
