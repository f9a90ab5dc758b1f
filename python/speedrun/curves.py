"""Runs as curves of their validation loss: runs that differ in nothing but their seed are one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from speedrun.preflight import flat
from speedrun.record_logs import LogError, LoggedRun, read_events, target_in
from speedrun.record_rules import TRACKS, guess_track

SAME = ("device", "world_size", "dtype", "fp8", "train_data", "val_data")  # but for the seed
MOST_SETTINGS, MOST_LETTERS = 3, 60  # of a label


class Point(NamedTuple):
    """Of one run, after `step` steps. tokens, time: until then; NaN where its log doesn't tell."""

    step: float
    tokens: float
    time: float  # seconds
    loss: float

    def of(self, axis: str) -> float:
        """Where it is on an axis: "step", "tokens" or "time"."""
        return getattr(self, axis)


@dataclass(frozen=True)
class Curve:
    """Runs of one program and config, each with validations at the same steps.

    training: of each run the losses of its steps, where they are known.
    """

    label: str
    runs: tuple[tuple[Point, ...], ...]
    training: tuple[tuple[Point, ...], ...]
    target: float | None

    def means(self) -> list[Point]:
        """Of all runs, at each validation."""
        return [
            Point(*(sum(values) / len(values) for values in zip(*points, strict=True)))
            for points in zip(*self.runs, strict=True)
        ]

    def ranges(self) -> tuple[list[float], list[float]]:
        """Lowest and highest loss of all runs, at each validation."""
        losses = [[point.loss for point in points] for points in zip(*self.runs, strict=True)]
        return [min(row) for row in losses], [max(row) for row in losses]


def curves_of(runs: Sequence[LoggedRun]) -> tuple[list[Curve], list[str]]:
    """Curves in the order of their first runs; and lines on what is left out.

    A run given twice counts once. LogError where no run has a curve.
    """
    groups: dict[tuple, list[LoggedRun]] = {}
    left_out, seen = [], set()
    for run in runs:
        identity = (run.path and run.path.resolve(), run.name.rpartition("#")[2])
        if identity in seen:
            continue
        seen.add(identity)
        steps = tuple(validation.step for validation in run.validations)
        if None in steps:
            left_out.append(f"{run.name}: a list of final losses, so without a curve")
        elif not steps:
            left_out.append(f"{run.name}: no validation yet")
        else:
            groups.setdefault((_program(run), steps), []).append(run)
    if not groups:
        raise LogError("nothing to draw: " + "; ".join(left_out))
    names = _short_names([run for group in groups.values() for run in group])
    differing = _differing([group[0] for group in groups.values()])
    return [_curve(group, names, differing) for group in groups.values()], left_out


def _curve(group: list[LoggedRun], names: dict[str, str], differing: list[str]) -> Curve:
    first = group[0]
    own = [names[run.name] for run in group]
    label = _cut(own[0])
    if len(group) > 1:
        folder = os.path.commonpath([os.path.dirname(name) for name in own])
        label = first.header["config"]["name"] if first.header else _cut(folder or first.name)
    label += _settings_text(first, differing)
    if len(group) > 1:
        label += f", mean and range, n={len(group)}"
    events = [read_events(run.path) if run.header else [] for run in group]
    tokens = [_tokens(lines) for lines in events]
    return Curve(
        label,
        tuple(
            tuple(
                Point(v.step, _known(known, v.step), _or_nan(v.train_time_s), v.loss)
                for v in run.validations
            )
            for run, known in zip(group, tokens, strict=True)
        ),
        tuple(
            tuple(
                Point(e["step"], _known(known, e["step"]), e["train_time_s"], e["train_loss"])
                for e in _by_step(lines)
            )
            for lines, known in zip(events, tokens, strict=True)
        ),
        target_of(first),
    )


def target_of(run: LoggedRun) -> float | None:
    """The loss to reach: a run folder's own, else that of a public log's track."""
    if run.header:
        return target_in(run.header)
    track = guess_track([run])
    return None if track is None else TRACKS[track].target


def _program(run: LoggedRun) -> tuple | str:
    """Equal for runs that may differ in their seed alone; of a log that doesn't say, its name."""
    if run.header:
        return tuple(sorted((key, str(value)) for key, value in _settings(run).items()))
    return run.source_sha256 or run.name


def _settings(run: LoggedRun) -> dict[str, Any]:
    """All that a run of ours computes by but the seed, by short names."""
    header = run.header
    sources = hashlib.sha256(json.dumps(header["sources"]).encode()).hexdigest()[:7]
    config = {key.removeprefix("."): value for key, value in flat("", header["config"])}
    return config | {key: header[key] for key in SAME} | {"sources": sources}


def _differing(runs: list[LoggedRun]) -> list[str]:
    """Settings in which runs of ours differ."""
    settings = [_settings(run) for run in runs if run.header]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]


def _settings_text(run: LoggedRun, differing: list[str]) -> str:
    if not (run.header and differing):
        return ""
    settings = _settings(run)
    shown = [f"{key}={settings.get(key, 'none')}" for key in differing[:MOST_SETTINGS]]
    more = ["…"] if len(differing) > MOST_SETTINGS else []
    return f" ({', '.join([*shown, *more])})"


def _short_names(runs: Sequence[LoggedRun]) -> dict[str, str]:
    """By whole names: names without the folder that all are in."""
    whole = {run.name: os.path.abspath(run.name) for run in runs}
    folder = os.path.commonpath([os.path.dirname(path) for path in whole.values()])
    return {name: os.path.relpath(path, folder) for name, path in whole.items()}


def _cut(name: str) -> str:
    """Of a long name the last part; of a long one of these both ends."""
    if len(name) > MOST_LETTERS:
        name = os.path.basename(name)
    half = MOST_LETTERS // 2
    return name if len(name) <= MOST_LETTERS else f"{name[:half]}…{name[-half:]}"


def _by_step(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Training events in order; of steps that a resumed run has twice, the later ones."""
    steps = {event["step"]: event for event in events if event["event"] == "training"}
    return (steps[step] for step in sorted(steps))


def _tokens(events: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, tokens trained on until then) where an event says so, and at the start."""
    found = [(e["step"], float(e["tokens"])) for e in _by_step(events) if "tokens" in e]
    return [(0, 0.0), *found] if found else []


def _known(tokens: list[tuple[int, float]], step: int) -> float:
    """Of the last event up to `step`: a step whose update was left out has none."""
    return next((count for at, count in reversed(tokens) if at <= step), math.nan)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
