"""Experiment trackers by one flag each: TensorBoard, Weights & Biases, trackio. None is needed.

Rank 0 alone imports and feeds them, in a thread of its own: a slow service delays no step, and one
that fails costs a warning. They get what metrics.jsonl does, which the host has anyway.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from speedrun.runlog import RunError, RunLog

PROJECT = "speedrun"
END_S, FAILED_END_S = 30.0, 3.0  # for what is on its way when the run is done; when it failed
FLUSH_S = 10  # until TensorBoard's file has it


class Tracker(Protocol):
    """Opened with a run's folder and settings."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=FLUSH_S)
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run named as the folder; a resumed one is a run of its own. Its variables hold."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # which would put itself before stdout
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run named as the folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=folder.name, config=dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {  # by their packages' names
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    wheres = {
        "tensorboard": "to RUN/tensorboard, for `tensorboard --logdir runs`",
        "wandb": "to Weights & Biases (WANDB_MODE=offline: to RUN/wandb)",
        "trackio": "to trackio, for `trackio show`",
    }
    for name, where in wheres.items():
        parser.add_argument(
            f"--{name}",
            dest="trackers",
            action="append_const",
            const=name,
            default=[],
            help=f"losses, tokens and time {where} too",
        )


def check(names: Sequence[str]) -> None:
    """RunError where one isn't installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        flags = " ".join(f"--{name}" for name in missing)
        raise RunError(f"{flags}: not installed here: pip install {' '.join(missing)}")


def attach(names: Sequence[str], log: RunLog, settings: Mapping[str, Any]) -> None:
    """Open the trackers and let them follow the log, where there is one: on rank 0."""
    if log.folder is None:
        return
    for name in names:
        try:
            tracker = TRACKERS[name](log.folder, settings)
        except Exception as error:
            _give_up(name, error)
        else:
            log.listeners.append(Feed(name, tracker))


class Feed:
    """A listener of RunLog that hands events to one tracker, in a thread until the run's end."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if kind in ("training", "validation"):
            numbers = {key: value for key, value in values.items() if key != "step"}
            self._events.put((numbers, values["step"]))
        elif kind == "end":
            allowed_s = END_S if values["reason"] is None else FAILED_END_S
            self._events.put(None)
            self._thread.join(allowed_s)
            if self._thread.is_alive():
                reason = f"not done after {allowed_s:.0f} s; the rest is left out"
                warnings.warn(f"{self.name}: {reason}", stacklevel=2)

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self.tracker.log(*event)
            self.tracker.close()
        except Exception as error:
            _give_up(self.name, error)


def _give_up(name: str, error: Exception) -> None:
    reason = str(error).partition("\n")[0] or type(error).__name__
    warnings.warn(f"{name}: {reason}; the run goes on without it", stacklevel=2)
