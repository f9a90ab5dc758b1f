"""Where a run is, from the events that it has written so far."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun.record_logs import LogError, target_in

RECENT_STEPS = 20  # of which speed and time left are
BARS = "▁▂▃▄▅▆▇█"
# Without an event for longer than this something is wrong, or a validation takes so long.
QUIET_S = 60.0
QUIET_STEPS = 10  # of the longest step so far
WARM_UP_S = 900.0  # before the first validation: kernels are compiled there


class Follower:
    """The whole lines of a run's metrics.jsonl as they come."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._read = 0  # bytes

    def new_events(self) -> list[dict[str, Any]]:
        """Since the last call. LogError for a damaged line, or where there is no such file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise LogError(
                f"{self.path}: {error.strerror}; give the folder of a run that has begun"
            ) from None
        self._read += len(whole) + len(newline)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise LogError(f"{self.path}: damaged, a line is no JSON ({error})") from None

    def quiet_s(self) -> float:
        """Since the run wrote last, by the file's own time."""
        return time.time() - self.path.stat().st_mtime


@dataclasses.dataclass
class RunState:
    """What the events so far tell. Losses in nats a token, times in seconds of training."""

    header: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # training events
    validations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_warnings: int = 0  # outliers, and steps left out
    ended: bool = False
    reason: str | None = None  # of an end before the last step

    def add(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("header", "resumed"):
            self.header, self.ended, self.reason = event, False, None
            first = event.get("step", 0)  # what an earlier piece did behind it, is done again
            self.steps = [step for step in self.steps if step["step"] <= first]
            self.validations = [v for v in self.validations if v["step"] < first]
        elif kind == "training":
            self.steps.append(event)
        elif kind == "validation":
            self.validations.append(event)
        elif kind in ("left_out", "outlier"):
            self.num_warnings += 1
        elif kind == "end":
            self.ended, self.reason = True, event["reason"]

    @property
    def total_steps(self) -> int:
        schedule = self.header["config"]["schedule"]
        return schedule["num_steps"] + schedule["extension_steps"]

    @property
    def step(self) -> int:
        """How many steps are done."""
        return max((e["step"] for e in [*self.steps[-1:], *self.validations[-1:]]), default=0)

    @property
    def target(self) -> float | None:
        return target_in(self.header)

    @property
    def finished(self) -> bool:
        """It has its last validation, or says that it ended."""
        done = bool(self.validations) and self.validations[-1]["step"] == self.total_steps
        return self.ended or done

    def recent(self, key: str) -> float | None:
        """Of `tokens` or `step`, how many a second lately; None before there are two steps."""
        last = self.steps[-RECENT_STEPS - 1 :]
        if len(last) < 2 or key not in last[0]:
            return None
        seconds = last[-1]["train_time_s"] - last[0]["train_time_s"]
        return (last[-1][key] - last[0][key]) / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Of training, at the recent speed."""
        rate = self.recent("step")
        return None if rate is None else (self.total_steps - self.step) / rate

    def quiet_limit_s(self) -> float:
        """How long nothing may come before something seems wrong."""
        if not self.validations:
            return WARM_UP_S
        times = [event["train_time_s"] for event in self.steps]
        longest = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
        return max(QUIET_S, QUIET_STEPS * longest)


def sparkline(values: Sequence[float], width: int) -> str:
    """A character for each of at most `width` equal parts of the values: their means."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
