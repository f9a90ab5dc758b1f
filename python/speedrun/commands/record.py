"""Judge training logs by a record's rules (check), and make a record's folder (make)."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speedrun._text_table import text_table
from speedrun.record_folder import Title, claim, make_folder, update_table
from speedrun.record_logs import LogError, LoggedRun, read_all
from speedrun.record_report import Report, judge
from speedrun.record_rules import (
    TRACKS,
    RecordError,
    RecordRefused,
    Track,
    guess_track,
    hardware_text,
)

MET, NOT_MET, UNREADABLE = 0, 1, 2  # exit codes
MARKS = {True: "met", False: "NOT MET", None: "unknown"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|make|table")
    check = verbs.add_parser(
        "check",
        help="judge logs",
        description="Statistics of training logs, and the rules of their track. Exit code: 0 all "
        "rules met, 1 some not met, 2 nothing to judge. A rule that the logs don't tell about is "
        "unknown, and counts neither way.",
    )
    _add_judge_arguments(check)
    check.add_argument(
        "--json", action="store_true", help="everything as JSON (keys: Report.to_json, schema 1)"
    )
    check.set_defaults(action=_check)
    make = verbs.add_parser(
        "make",
        help="make a record's folder of run folders",
        description="README with claim, rules and table, config, environment, hashes, logs and "
        "curves, in a new folder. Exit code: 0 made, 1 refused by the rules, 2 nothing to judge.",
    )
    _add_judge_arguments(make)
    make.add_argument("--slug", required=True, help="the folder is named DATE_SLUG")
    make.add_argument("--title", help="heading of its README (default: the slug)")
    make.add_argument("--text", default="", help="a paragraph on what was done")
    make.add_argument("--date", default=f"{datetime.date.today()}", help="default: today")
    _add_out(make)
    make.set_defaults(action=_make)
    table = verbs.add_parser("table", help="write the table of all folders into their README.md")
    _add_out(table)
    table.set_defaults(action=_table)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("records"), metavar="DIR", help="default: records"
    )


def _add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "logs",
        nargs="+",
        metavar="LOG",
        help="run folders, public logs of any age, folders of these, or a record's statistics.md",
    )
    parser.add_argument(
        "--baseline", nargs="+", default=[], metavar="LOG", help="compare with these (Welch's test)"
    )
    parser.add_argument(
        "--track", choices=list(TRACKS), help="whose rules hold (default: by recipe, or by loss)"
    )
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="another target than the track's"
    )
    parser.add_argument(
        "--stop-step", type=int, metavar="STEP", help="count the validation at this step, not last"
    )
    parser.add_argument(
        "--systems-only", action="store_true", help="a change of speed only, of which no p is asked"
    )
    parser.add_argument(
        "--experiment", action="store_true", help="no claim: any hardware, sources and data"
    )


def run(args: argparse.Namespace) -> int:
    try:
        return args.action(args)
    except RecordRefused as error:
        code, message = NOT_MET, error
    except (LogError, RecordError) as error:
        code, message = UNREADABLE, error
    except BrokenPipeError:  # of stdout: for cli
        raise
    except OSError as error:
        code, message = UNREADABLE, f"{error.filename}: can't be read ({error.strerror})"
    print(f"speedrun record: error: {message}", file=sys.stderr)
    return code


def _check(args: argparse.Namespace) -> int:
    report = _judge(args, separator=None if args.json else os.sep)
    if args.json:
        print(json.dumps(report.to_json(), indent=1, allow_nan=False))
    else:
        print(as_text(report))
    return NOT_MET if report.broken else MET


def _make(args: argparse.Namespace) -> int:
    title = Title(args.date, args.slug, args.title or args.slug, args.text)
    report = _judge(args, separator="_")  # the runs' folders are in one folder
    update_table(args.out)  # fails before there is a folder that no table could list
    folder = make_folder(report, title, args.out)
    print(f"{folder}: {claim(report)}")
    return _table(args)


def _table(args: argparse.Namespace) -> int:
    print(f"{update_table(args.out)}: table of all folders")
    return MET


def _judge(args: argparse.Namespace, separator: str | None) -> Report:
    """separator: between the folders of a run's short name; None leaves whole paths."""
    runs, baseline = read_all(args.logs), read_all(args.baseline)
    if separator is not None:
        runs, baseline = _short_names(runs, separator), _short_names(baseline, separator)
    track = choose_track(runs, args.track, args.target)
    track = dataclasses.replace(track, systems_only=args.systems_only)
    experiment = args.experiment or track.name not in TRACKS
    return judge(runs, track, baseline, args.stop_step, experiment)


def _short_names(runs: list[LoggedRun], separator: str) -> list[LoggedRun]:
    """Names without the folder that all are in."""
    if not runs:
        return []
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(run.name)) for run in runs])
    names = [os.path.relpath(run.name, folder).replace(os.sep, separator) for run in runs]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def choose_track(runs: Sequence[LoggedRun], name: str | None, target: float | None) -> Track:
    """The named track or the runs' own, with another target if one is given.

    Runs of no track, of a recipe with a target of its own, need a target: RecordError.
    """
    name = name or guess_track(runs)
    if name is not None:
        return TRACKS[name] if target is None else dataclasses.replace(TRACKS[name], target=target)
    if target is None:
        raise RecordError(
            "these runs are of no track: give --target LOSS, or --track to judge them by its rules"
        )
    return Track("none", target, timed=False)


def as_text(report: Report) -> str:
    found = report.statistics
    lines = [
        f"track {report.track.name}, target {report.track.target}"
        + (": an experiment, no claim" if report.experiment else ""),
        "",
        text_table(
            [
                ("run", "step", "val loss", "time", "hardware"),
                *(
                    (
                        run.name,
                        "" if final.step is None else str(final.step),
                        f"{final.loss:.4f}",
                        _seconds(final.train_time_s, 3),
                        hardware_text(run),
                    )
                    for run, final in report.finished
                ),
            ]
        ),
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in report.excluded.items()]
    std = "" if found.std is None else f", sample std {found.std:.10f}"
    p_value = "" if found.p_value is None else f", one-sided p {found.p_value:.10f}"
    lines += ["", f"{_count(found.num_runs, 'run')}: mean {found.mean:.10f}{std}{p_value}"]
    if found.num_times:
        std = "" if found.std_time_s is None else f", sample std {found.std_time_s:.6f} s"
        lines.append(
            f"{_count(found.num_times, 'time')}: mean {_seconds(found.mean_time_s, 6)}{std}, "
            f"median {_seconds(found.median_time_s, 3)}, "
            f"{found.min_time_s:.3f} to {_seconds(found.max_time_s, 3)}"
        )
    restarts = {run.clock_restart_step for run, _ in report.finished} - {None}
    if restarts:
        steps = ", ".join(map(str, sorted(restarts)))
        lines.append(
            f"their clock started again after step {steps}: the times leave out what was before"
        )
    lines += ["", *_rule_lines(report)]
    lines += _needed_lines(report)
    lines += _comparison_lines(report)
    return "\n".join(lines)


def _rule_lines(report: Report) -> list[str]:
    return [f"{MARKS[rule.met]:8} {rule.name}: {rule.detail}" for rule in report.rules]


def _needed_lines(report: Report) -> list[str]:
    """What the loss rule still asks for."""
    if report.rules[0].met:
        return []
    found, needed = report.statistics, report.runs_needed
    if needed is None:
        return ["", "no number of runs will do with this mean and std"]
    more = max(1, needed - found.num_runs)
    std = "" if report.track.by_margin else " and std"
    assumed = " (std of one run unknown: 0.0013 assumed)" if found.num_runs == 1 and std else ""
    return ["", f"{_count(more, 'more run')} needed, if mean{std} stay as they are{assumed}"]


def _comparison_lines(report: Report) -> list[str]:
    if report.comparison is None:
        return []
    lines = ["", f"against the baseline of {_count(len(report.baseline), 'run')}:"]
    for what, unit in (("loss", ""), ("time_s", " s")):
        row = report.comparison[what]
        if row["difference"] is None:
            continue
        line = f"  {what.removesuffix('_s')} {row['difference']:+.6f}{unit}"
        if what == "time_s":
            line += f" ({100 * row['difference'] / row['baseline_mean']:+.3f} %)"
        if row["p_value"] is not None:
            line += (
                f", 95 % {row['low']:+.6f} to {row['high']:+.6f}, two-sided p {row['p_value']:.3g}"
            )
        lines.append(line)
    lines += [f"  left out: {name}: {why}" for name, why in report.baseline_excluded.items()]
    return lines


def _seconds(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
