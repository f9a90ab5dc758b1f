"""What a set of runs shows: statistics, and the rules of its track.

Pure functions from logged runs to numbers. scipy (extra `cli`) computes the tests.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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


class RecordRefused(RecordError):
    """Runs of which the rules allow no folder. The message names the rules."""


@dataclass(frozen=True)
class Track:
    """The rules of one kind of record. by_margin: (target − mean)·√n instead of the t-test.

    systems_only: the runs change nothing but speed, for which no p is asked.
    """

    name: str
    target: float
    by_margin: bool = False
    timed: bool = True  # a claim about seconds, on the record's hardware
    may_stop_early: bool = False
    systems_only: bool = False


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

    stop_step: take the validation at that step, and let a run go on behind it. RecordError for
    logs together with a published list of losses.
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
    if len({final.step is None for _, final in finished}) > 1:
        lists = sorted({run.path.name for run, final in finished if final.step is None})
        raise RecordError(
            f"logs and a list of losses ({', '.join(lists)}): if they are of the same runs, these "
            "would count twice; give one or the other"
        )
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
        p_value = float(scipy_stats().ttest_1samp(losses, target, alternative="less").pvalue)
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


def scipy_stats() -> Any:
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
    t = scipy_stats().t
    for num_runs in range(2, MAX_RUNS_NEEDED + 1):
        distance = (found.mean - track.target) / std * math.sqrt(num_runs)
        if t.cdf(distance, num_runs - 1) < RECORD_P_VALUE:
            return num_runs
    return None


def check_rules(
    finished: Sequence[FinishedRun],
    found: Statistics,
    track: Track,
    experiment: bool = False,
    baseline: Sequence[FinishedRun] = (),
) -> list[Rule]:
    """Every rule of the track, the loss's first; without those of a claim for an experiment."""
    rules = [
        _loss_rule(found, track),
        _finite_rule(finished),
        _distinct_rule(finished),
        _steps_rule(finished),
        _configuration_rule(finished),
    ]
    if not experiment:
        rules += [_validation_rule(finished), _untrained_rule(finished), _tokens_rule(finished)]
        rules += [_sources_rule(finished), _one_piece_rule(finished)]
        rules += [_hardware_rule(finished)] if track.timed else []
        rules += [_faster_rule(finished, baseline)] if track.timed and baseline else []
    return rules


def _loss_rule(found: Statistics, track: Track) -> Rule:
    if track.by_margin:
        # 1e-9: a mean of 3.276 in one run meets the rule, whatever its last bit.
        met = found.margin >= OPTIMIZATION_MARGIN - 1e-9
        detail = f"(target − mean)·√n = {found.margin:.5f}, at least {OPTIMIZATION_MARGIN} needed"
    elif track.systems_only:
        met = found.mean < track.target
        p_value = "none" if found.p_value is None else f"{found.p_value:.10f}"
        detail = f"mean {found.mean:.6f}; p ({p_value}) is not asked of a change of speed only"
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


def _one_piece_rule(finished: Sequence[FinishedRun]) -> Rule:
    """A run that was resumed has a clock of two machines."""
    name = "each run in one piece"
    if not all(run.header for run, _ in finished):
        return Rule(name, None, "these logs don't say", of_claim=True)
    resumed = [run.name for run, _ in finished if run.resumed]
    return Rule(name, not resumed, f"resumed: {', '.join(resumed)}" if resumed else "all are", True)


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


def _faster_rule(finished: Sequence[FinishedRun], baseline: Sequence[FinishedRun]) -> Rule:
    """Mean time below that of the baseline on the same hardware."""
    name = "faster than the baseline on the same hardware"
    ours, theirs = ({hardware_text(run) for run, _ in side} for side in (finished, baseline))
    times = [
        [final.train_time_s for _, final in side if final.train_time_s is not None]
        for side in (finished, baseline)
    ]
    if "" in ours | theirs or not all(times):
        return Rule(name, None, "times or hardware are not given", of_claim=True)
    if ours != theirs:
        detail = f"{'; '.join(sorted(ours))} against {'; '.join(sorted(theirs))}"
        return Rule(name, False, detail, of_claim=True)
    means = [statistics.mean(side) for side in times]
    detail = f"{means[0]:.3f} s against {means[1]:.3f} s"
    return Rule(name, means[0] < means[1], detail, of_claim=True)


def hardware_text(run: LoggedRun) -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3"; "" where the log doesn't say."""
    if not run.gpus:
        return run.header.get("device", "")
    return ", ".join(f"{count} x {name}" for name, count in Counter(run.gpus).items())
