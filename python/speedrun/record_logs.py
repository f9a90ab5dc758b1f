"""Training logs as runs: folders of ours, public logs of every age, published lists of losses.

Public logs differ by age. 2024, llm.c: `s:250 tel:4.1234`, without times. Then `step:250/1390
val_loss:4.1234 train_time:7930ms step_avg:31.72ms`, with `nanms` in the first steps and a clock
that starts again after step 10; the optimization track prints seconds (`train_time:503.169s`) and
stops where it likes. Most begin with a listing of their own source, whose text looks like a log.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class LogError(ValueError):
    """A file that is no log. The message names it and what would be one."""


class Validation(NamedTuple):
    """One validation. step: training steps before it; None in a published list of losses."""

    step: int | None
    loss: float
    train_time_s: float | None


@dataclass(frozen=True)
class LoggedRun:
    """What one run's log holds."""

    name: str
    validations: tuple[Validation, ...]
    total_steps: int | None = None  # that the run was to make
    last_step: int | None = None  # that it made
    gpus: tuple[str, ...] = ()  # a name each; empty: unknown
    clock_restart_step: int | None = None  # the printed time leaves out the steps up to here
    resumed: bool = False  # from a checkpoint, so in two pieces
    header: dict[str, Any] = field(default_factory=dict)  # of a run of ours, else empty
    path: Path | None = None
    source_sha256: str | None = None  # of a public program, where its log begins with it

    @property
    def seed(self) -> int | None:
        return self.header.get("seed")


def target_in(header: dict[str, Any]) -> float | None:
    """The loss that a run of ours is to reach; None: of gzip, which its version didn't write."""
    target = header.get("target_loss", header["config"]["target_loss"])
    return target if isinstance(target, float) else None


SOURCE_END = re.compile(r"^={100}\n(?=running p)", re.MULTILINE | re.IGNORECASE)
STEP_LINE = re.compile(r"^step:(\d+)(?:/(\d+))? (?=\w+:)(.*)$", re.MULTILINE)
LLMC_LINE = re.compile(r"^s:(\d+) (tel|trl):(\d+\.\d{4,}|nan|inf)\b", re.MULTILINE)
GPU_ROW = re.compile(r"^\|\s+\d+\s+(\w[^|]*?)\s+(?:On|Off|N/A)\s+\|", re.MULTILINE)
TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
HEADER_KEYS = (  # of a run of ours: what the rules ask for
    "config",
    "environment",
    "sources",
    "seed",
    "device",
    "world_size",
    "record_obstacles",
    "dtype",
    "fp8",
    "train_data",
    "val_data",
)
LOG_SUFFIXES = (".txt", ".log")


def read_all(words: Sequence[str]) -> list[LoggedRun]:
    """`read_runs` of paths, or of patterns that a shell hasn't expanded."""
    found = []
    for word in words:
        matches = [] if Path(word).exists() else sorted(glob.glob(word))
        for path in matches or [word]:
            found += read_runs(Path(path))
    return found


def read_runs(path: Path) -> list[LoggedRun]:
    """The runs of a log, of a folder of ours, of a folder of logs, or of a statistics file (.md).

    In a folder, files without any step are runs without validations. Raises LogError for a path
    that isn't there or holds nothing of these.
    """
    if not path.exists():
        raise LogError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _read_folder(path)
    if path.name in ("metrics.jsonl", "log.txt") and (path.parent / "metrics.jsonl").exists():
        return [read_run_folder(path.parent)]
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    if path.suffix == ".md":
        return parse_statistics(text, str(path))
    runs = parse_log(text, str(path))
    if not any(run.validations for run in runs):
        raise LogError(
            f"{path}: no line such as 'step:250/1390 val_loss:4.4888 train_time:7930ms'; give "
            "training logs, run folders, or a statistics file (.md)"
        )
    return runs


def _read_folder(folder: Path) -> list[LoggedRun]:
    if (folder / "metrics.jsonl").exists():
        return [read_run_folder(folder)]
    runs = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "metrics.jsonl").exists():
            runs.append(read_run_folder(path))
        elif path.is_file() and path.suffix in LOG_SUFFIXES:
            text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            runs += parse_log(text, str(path))
    if not runs:
        raise LogError(
            f"{folder}: neither a run (no metrics.jsonl) nor a folder of runs or logs "
            f"({', '.join(LOG_SUFFIXES)})"
        )
    return runs


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Of a run of ours, also while it writes. A last line without its end is left out."""
    path = folder / "metrics.jsonl"
    events = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line end: nothing, or a
        try:  # piece of a line
            events.append(json.loads(line))
        except ValueError:
            raise LogError(
                f"{path}: line {number} is no JSON; the file is damaged, leave this run out"
            ) from None
    if not events:
        raise LogError(f"{path}: empty; the run has not begun, or ended before")
    return events


def read_run_folder(folder: Path) -> LoggedRun:
    """A run of ours."""
    path, events = folder / "metrics.jsonl", read_events(folder)
    try:
        return _run_of_events(folder, events)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise LogError(
            f"{path}: not as this version writes it ({error!r}); leave this run out, or judge its "
            "log.txt from another folder"
        ) from None


def _run_of_events(folder: Path, events: list[dict[str, Any]]) -> LoggedRun:
    header = events[0]
    missing = [key for key in HEADER_KEYS if key not in header]
    if missing:
        raise KeyError(f"no {', '.join(missing)} in its header")
    schedule = header["config"]["schedule"]
    # A resumed run has steps twice: the later ones count.
    validations = {
        event["step"]: Validation(event["step"], event["val_loss"], event["train_time_s"])
        for event in events
        if event["event"] == "validation"
    }
    on_gpu = not header["device"].startswith("CPU")
    return LoggedRun(
        name=str(folder),
        validations=tuple(validations[step] for step in sorted(validations)),
        total_steps=schedule["num_steps"] + schedule["extension_steps"],
        last_step=max((event["step"] for event in events if "step" in event), default=None),
        gpus=(header["device"],) * header["world_size"] if on_gpu else (),
        resumed=any(event["event"] == "resumed" for event in events),
        header=header,
        path=folder,
    )


def without_source(text: str) -> str:
    """A public log from behind the listing of its own source, if it has one."""
    found = SOURCE_END.search(text)
    return text[found.start() :] if found else text


def parse_log(text: str, name: str) -> list[LoggedRun]:
    """The runs in the text of a public log; more than one where the step number goes back."""
    listing = text
    text = without_source(text)
    listing = listing[: len(listing) - len(text)]
    digest = hashlib.sha256(listing.encode()).hexdigest() if listing else None
    gpus = tuple(match.group(1) for match in GPU_ROW.finditer(text))
    runs: list[list[_Line]] = []
    for line in _lines(text):
        if not runs or line.step < runs[-1][-1].step:
            runs.append([])
        runs[-1].append(line)
    if not runs:
        return [LoggedRun(name, (), gpus=gpus, path=Path(name))]
    names = [name] if len(runs) == 1 else [f"{name}#{i}" for i in range(1, len(runs) + 1)]
    return [
        _logged_run(lines, own_name, gpus, Path(name), digest)
        for lines, own_name in zip(runs, names, strict=True)
    ]


class _Line(NamedTuple):
    step: int
    total_steps: int | None
    val_loss: float | None
    train_time_s: float | None


def _lines(text: str) -> Iterator[_Line]:
    """Lines with a step. One whose end is missing, and with it its time or loss, is left out."""
    for match in LLMC_LINE.finditer(text):
        step, kind, loss = match.groups()
        yield _Line(int(step), None, float(loss) if kind == "tel" else None, None)
    for match in STEP_LINE.finditer(text):
        step, total, rest = match.groups()
        values = dict(word.split(":", 1) for word in rest.split() if ":" in word)
        time = TIME.fullmatch(values.get("train_time", ""))
        if time is None:
            continue
        train_time_s = float(time[1]) / (1000 if time[2] == "ms" else 1)
        loss = values.get("val_loss")
        yield _Line(
            int(step), total and int(total), None if loss is None else float(loss), train_time_s
        )


def _logged_run(
    lines: list[_Line], name: str, gpus: tuple[str, ...], path: Path, source_sha256: str | None
) -> LoggedRun:
    restart = None
    for before, line in itertools.pairwise(lines):
        if (line.train_time_s or 0.0) < (before.train_time_s or 0.0):
            restart = before.step
    return LoggedRun(
        name=name,
        validations=tuple(
            Validation(
                line.step,
                line.val_loss,
                line.train_time_s if restart is None or line.step > restart else None,
            )
            for line in lines
            if line.val_loss is not None
        ),
        total_steps=lines[-1].total_steps,
        last_step=lines[-1].step,
        gpus=gpus,
        clock_restart_step=restart,
        path=path,
        source_sha256=source_sha256,
    )


def parse_statistics(text: str, name: str) -> list[LoggedRun]:
    """Runs from the lists `losses = [...]` and `times = [...]` (seconds) of a record's statistics.

    LogError without losses, or with a time for some of them only.
    """
    losses = _number_list(text, r"(?:losses|accs)")
    times = _number_list(text, "times")
    if not losses:
        raise LogError(f"{name}: no list such as 'losses = [3.2791, 3.2773]' in it")
    if times and len(times) != len(losses):
        raise LogError(f"{name}: {len(losses)} losses but {len(times)} times; each run has both")
    return [
        LoggedRun(f"{name}#{i}", (Validation(None, loss, time),), path=Path(name))
        for i, (loss, time) in enumerate(
            zip(losses, times or [None] * len(losses), strict=True), start=1
        )
    ]


def _number_list(text: str, word: str) -> list[float]:
    """The first list of numbers behind the word; [] without one."""
    found = re.search(rf"\b{word}\b[^\[\]]*?(\[[\d.,\s]+\])", text, re.IGNORECASE)
    return [float(number) for number in ast.literal_eval(found[1])] if found else []
