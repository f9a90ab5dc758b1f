"""A record's folder: claim, rules, runs, curves, environment and hashes; and the table of all.

A folder is written under another name and renamed when all of it is there. What `speedrun record
check` says about the logs in it is what its README says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speedrun.plot import plot_runs
from speedrun.record_logs import LoggedRun, without_source
from speedrun.record_report import Report
from speedrun.record_rules import TRACKS, FinishedRun, RecordError, RecordRefused, hardware_text

SCHEMA = 1  # of record.json
RUN_FILES = ("metrics.jsonl", "log.txt")
TABLE_BEGIN, TABLE_END = "<!-- records -->", "<!-- end of records -->"
MARKS = {True: "x", False: " ", None: "?"}


@dataclass(frozen=True)
class Title:
    """What the logs don't say. text: one or more paragraphs on what was done.

    RecordError for a date or slug that can't name a folder.
    """

    date: str  # YYYY-MM-DD
    slug: str
    title: str
    text: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", self.date):
            raise RecordError(f"--date {self.date}: write it as 2026-11-26")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.slug):
            raise RecordError(
                f"--slug {self.slug!r}: letters, digits, - and _ only; it names a folder"
            )


def make_folder(report: Report, title: Title, out: Path) -> Path:
    """Write out/DATE_SLUG for these runs.

    RecordError, with nothing left behind, for a claim whose rules aren't all met, an experiment
    whose runs are no sample of one thing, runs that aren't this package's, or a folder that exists.
    """
    check_runs(report)
    folder = out / f"{title.date}_{title.slug}"
    if os.path.lexists(folder):
        raise RecordError(f"{folder}: is there already; choose another --slug or move it away")
    unfinished = out / f".{folder.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        _write(report, title, unfinished)
        unfinished.rename(folder)
    except ImportError:
        raise RecordError(
            "the curves need matplotlib, which is missing: pip install 'nanogpt-speedrun[cli]'"
        ) from None
    except OSError as error:
        raise RecordError(f"{folder}: can't be written ({error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def check_runs(report: Report) -> None:
    """RecordRefused naming every rule that stands in the way; RecordError for other logs.

    An experiment may miss its target: that is a result too. But its runs must be a sample of one
    thing, each counted once.
    """
    strangers = [run.name for run, _ in report.finished if not run.header]
    if strangers:
        raise RecordError(
            f"{', '.join(strangers)}: not a run folder of this package, so without config, "
            "environment and hashes; `record check` judges such logs"
        )
    if report.experiment:
        refused = [rule for rule in report.rules[1:] if rule.met is False]
    else:
        refused = [rule for rule in report.rules if not rule.met]
    if refused:
        reasons = "".join(f"\n  {rule.name}: {rule.detail}" for rule in refused)
        claims = any(rule.of_claim for rule in refused) or report.rules[0] in refused
        way_out = "; --experiment makes a folder without a claim" if claims else ""
        raise RecordRefused(f"refused by the rules{way_out}{reasons}")


def _write(report: Report, title: Title, folder: Path) -> None:
    _copy_runs(report.finished, folder / "runs")
    if report.baseline:
        _copy_runs(report.baseline, folder / "baseline")
    plot_runs(
        report.finished, report.baseline, report.track.target, title.title, folder / "curves.png"
    )
    first = report.finished[0].run.header
    environments = {run.name: run.header["environment"] for run, _ in report.finished}
    for name, value in (
        ("config.json", first["config"]),
        ("environment.json", environments),
        ("sources.json", first["sources"]),
    ):
        _write_json(folder / name, value)
    (folder / "README.md").write_text(readme(report, title), encoding="utf-8")
    record = {
        "schema": SCHEMA,
        **asdict(title),
        "commit": first["environment"]["commit"],
        "report": report.to_json(),
        "sha256": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    _write_json(folder / "record.json", record)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _copy_runs(runs: Sequence[FinishedRun], folder: Path) -> None:
    """The logs, public ones without the listing of their source."""
    folder.mkdir()
    for run, _ in runs:
        if run.header:
            (folder / run.name).mkdir()
            for name in RUN_FILES:
                shutil.copyfile(run.path / name, folder / run.name / name)
        else:  # several runs may be of one file
            text = without_source(run.path.read_bytes().decode("utf-8", errors="replace"))
            (folder / _file_name(run)).write_text(text, encoding="utf-8")


def _file_name(run: LoggedRun) -> str:
    return run.name.rpartition("#")[0] or run.name


def claim(report: Report) -> str:
    """One sentence: what was reached, on what."""
    found = report.statistics
    runs = "one run" if found.num_runs == 1 else f"{found.num_runs} runs"
    what = f"Mean validation loss {found.mean:.5f} over {runs}"
    if found.std is not None:
        what += f" (sample std {found.std:.5f})"
    if report.track.by_margin:
        what += f", (target − mean)·√n = {found.margin:.5f} against {report.track.target}"
    elif found.p_value is not None:
        what += f", one-sided p {found.p_value:.2g} against {report.track.target}"
    step = report.finished[0].final.step
    what += f"; {step} steps"
    if found.mean_time_s is not None:
        what += f", mean time {found.mean_time_s:.3f} s on {_hardware(report)}"
    return what + "."


def _hardware(report: Report) -> str:
    return "; ".join(sorted({hardware_text(run) for run, _ in report.finished}))


def readme(report: Report, title: Title) -> str:
    kind = (
        "**An experiment, no claim of a record.**"
        if report.experiment
        else f"Claim: a record of track `{report.track.name}`."
    )
    lines = [f"# {title.title}", "", f"{kind} {claim(report)}", ""]
    lines += [title.text, ""] if title.text else []
    lines += ["## Rules", ""]
    lines += [f"- [{MARKS[rule.met]}] {rule.name}: {rule.detail}" for rule in report.rules]
    lines += ["", "## Runs", "", *_run_table(report.finished)]
    if report.excluded:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in report.excluded.items()]
    if report.baseline:
        lines += ["", "## Against the baseline", "", *_comparison(report), ""]
        lines += _run_table(report.baseline)
    lines += ["", "![validation curves](curves.svg)", "", "## Files", "", *_files(report), ""]
    command = report.finished[0].run.header["environment"]["command"]
    check = _check_command(report)
    lines += ["## Again", "", "```", f"{check}  # these figures", f"{command}  # the first run"]
    return "\n".join([*lines, "```", ""])


def _check_command(report: Report) -> str:
    """What judges the folder's logs as they were judged when it was made."""
    words = ["speedrun record check runs/*"]
    words += ["--baseline baseline/*"] if report.baseline else []
    words += [f"--track {report.track.name}"] if report.track.name in TRACKS else []
    words += [f"--target {report.track.target}"]
    words += [] if report.stop_step is None else [f"--stop-step {report.stop_step}"]
    words += ["--systems-only"] if report.track.systems_only else []
    words += ["--experiment"] if report.experiment else []
    return " ".join(words)


def _run_table(runs: Sequence[FinishedRun]) -> list[str]:
    lines = ["| run | seed | step | validation loss | time |", "|---|---:|---:|---:|---:|"]
    for run, final in runs:
        time = "" if final.train_time_s is None else f"{final.train_time_s:.3f} s"
        cells = ("" if value is None else str(value) for value in (run.seed, final.step))
        lines.append(f"| {' | '.join((run.name, *cells, f'{final.loss:.5f}', time))} |")
    return lines


def _comparison(report: Report) -> list[str]:
    lines = ["| | baseline | difference | 95 % interval | two-sided p (Welch) |"]
    lines.append("|---|---:|---:|---:|---:|")
    for what, name in (("loss", "mean loss"), ("time_s", "mean time, s")):
        row = report.comparison[what]
        if row["difference"] is None:
            continue
        tested = row["p_value"] is not None
        interval = f"{row['low']:+.6f} to {row['high']:+.6f}" if tested else ""
        p_value = f"{row['p_value']:.3g}" if tested else ""
        numbers = (f"{row['baseline_mean']:.6f}", f"{row['difference']:+.6f}", interval, p_value)
        lines.append(f"| {' | '.join((name, *numbers))} |")
    return lines


def _files(report: Report) -> list[str]:
    lines = [
        "- `runs/`: each run's `metrics.jsonl` (all digits) and `log.txt` (the public format)",
        "- `config.json`: every number of the recipe, the same in all runs",
        "- `environment.json`: versions, GPUs, driver and clocks at each run's start",
        "- `sources.json`: sha256 of each source and binary of the package",
        "- `record.json`: these figures, and sha256 of the files here",
    ]
    return [*lines, "- `baseline/`: logs it is compared with"] if report.baseline else lines


def table(out: Path) -> str:
    """Markdown table of all folders with a record.json, the newest first."""
    found = []
    for path in sorted(out.glob("*/record.json"), reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append(_table_row(path.parent.name, record))
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: not written by `record make` ({error!r})") from None
    if not found:
        return "No record run yet."
    head = "| date | what | track | runs | mean loss | p | time | hardware |"
    return "\n".join([head, "|---|---|---|---:|---:|---:|---:|---|", *found])


def _table_row(folder: str, record: dict[str, Any]) -> str:
    report = record["report"]
    found = report["statistics"]
    track = "experiment" if report["experiment"] else report["track"]
    p_value = "" if found["p_value"] is None else f"{found['p_value']:.2g}"
    time = "" if found["mean_time_s"] is None else f"{found['mean_time_s']:.3f} s"
    hardware = "; ".join(sorted({run["hardware"] for run in report["runs"]}))
    what = f"[{record['title'].replace('|', '/')}]({folder}/README.md)"
    numbers = (str(found["num_runs"]), f"{found['mean']:.5f}", p_value, time, hardware)
    return f"| {' | '.join((record['date'], what, track, *numbers))} |"


def update_table(out: Path) -> Path:
    """Put the table between the markers of out/README.md, which is made if there is none.

    RecordError without markers, or where it can't be written.
    """
    path = out / "README.md"
    text = f"# Records\n\n{TABLE_BEGIN}\n{TABLE_END}\n"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not (begin and end):
        raise RecordError(f"{path}: no lines {TABLE_BEGIN} and {TABLE_END}; put them in")
    unfinished = out / f".README.md.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(f"{before}{begin}\n{table(out)}\n{end}{after}", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise RecordError(f"{path}: can't be written ({error})") from None
    return path
