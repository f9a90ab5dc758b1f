"""What a run leaves behind: log.txt (the public format), metrics.jsonl, config.json, loss.png.

Only rank 0 writes. Lines are flushed as they are made, so that a run that dies keeps them; with the
header and with each validation they are on the disk, so that a machine that dies keeps them too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
from torch import Tensor

import speedrun
from speedrun import _stdout, hardware
from speedrun.comms import Comms
from speedrun.config import Config, to_dict
from speedrun.schedule import StepPlan

STEPS_AHEAD = 4  # that the host may launch before the device has done the first of them
CONSOLE_INTERVAL_S = 5.0  # between training lines on a console without a progress bar


class RunError(RuntimeError):
    """A run that can't go on. The message names the step or the file, and the fix."""


class BadLoss(RunError):
    """A loss that isn't finite. `trained_step`: the last step that went into it."""

    def __init__(self, problem: str, trained_step: int) -> None:
        super().__init__(problem)
        self.trained_step = trained_step


class Clock:
    """Training time. Runs from `start` on, stops inside `paused` (RECIPE: task).

    On a GPU the device is waited for on both sides of each stretch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_s = 0.0
        self._since: float | None = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self._synchronize()
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._synchronize()
        self.elapsed_s = self.now_s()
        self._since = None
        yield
        self.start()

    def now_s(self) -> float:
        """Seconds so far, without waiting for the device."""
        return self.elapsed_s + (0.0 if self._since is None else time.perf_counter() - self._since)


def new_run_folder(out: str | None, recipe: str) -> Path:
    """Make the run's folder; RunError if it holds a run already or can't be written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(out) if out else Path("runs") / f"{stamp}_{recipe}"
    try:
        check_run_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
    except OSError as error:
        raise RunError(
            f"{folder}: can't be written ({error.strerror}); choose another folder by --out"
        ) from None
    return folder


def check_run_folder(folder: Path) -> None:
    """RunError if the folder holds a run already."""
    if os.path.lexists(folder / "log.txt"):
        raise RunError(f"{folder}: holds a run already; choose another folder by --out")


def source_hashes() -> dict[str, str]:
    """sha256 of every source and compiled file of the package, by path inside it."""
    root = Path(speedrun.__file__).parent
    files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".so", ".json"))
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def git_commit() -> str:
    """The commit of the checkout that the package runs from, "-dirty" if changed, or "none"."""
    command = ["git", "-C", str(Path(speedrun.__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return result.stdout.strip() or "none"


def triton_version() -> str:
    """Of the installed package, or "none"; importing it would take a second."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def environment() -> dict[str, Any]:
    """Versions and machine, for the log's header."""
    has_gpu = torch.cuda.is_available()
    return {
        "speedrun": speedrun.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": hardware.cpu_model(),
        "cpus": hardware.num_cpus(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if has_gpu
        else [],
        "command": " ".join(sys.argv),
    }


def format_line(step: int, total_steps: int, name: str, loss: float, train_time_s: float) -> str:
    """`step:10/100 val_loss:4.1234 train_time:1234ms step_avg:12.34ms`, the public format."""
    time_ms = train_time_s * 1e3
    return (
        f"step:{step}/{total_steps} {name}:{loss:.4f} "
        f"train_time:{time_ms:.0f}ms step_avg:{time_ms / max(step, 1):.2f}ms"
    )


class RunLog:
    """Writes the files of one run and shows its progress. On other ranks than 0 it is silent.

    A folder that has logs already is that of a run that goes on: these are appended to.
    """

    def __init__(self, folder: Path | None, total_steps: int, log_interval: int) -> None:
        self.folder, self.total_steps, self.log_interval = folder, total_steps, log_interval
        self.val_loss: float | None = None
        self._text = self._metrics = self._bar = None
        self._last_shown_s = 0.0
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []  # of each event
        if folder is not None:
            self._text = _whole_lines(folder / "log.txt")
            self._metrics = _whole_lines(folder / "metrics.jsonl")

    def header(self, config: Config, facts: dict[str, Any], step: int = 0) -> None:
        """Config, versions, machine and hashes of the sources, before the first step.

        Where the logs go on, it is an event "resumed", at this step.
        """
        if self.folder is None:
            return
        resumed = self._metrics.tell() > 0
        values = {
            "config": to_dict(config),
            "environment": environment() | {"gpu_states": hardware.gpu_states()},
            "sources": source_hashes(),
            **facts,
        }
        (self.folder / "config.json").write_text(json.dumps(values["config"], indent=1) + "\n")
        if resumed:
            self._event("resumed", step=step, **values)
        else:
            self._event("header", **values)
        for key, value in {**values["environment"], **facts}.items():
            self._write(f"{key}: {value}")
        digest = hashlib.sha256(json.dumps(values["sources"]).encode()).hexdigest()
        self._write(f"sources: {len(values['sources'])} files, sha256 {digest} of their hashes")
        self._write(json.dumps(values["config"]))
        self._write("=" * 100)
        self._to_disk()

    def kernels(self, used: dict[str, tuple[str, ...]], attention: dict[str, str]) -> None:
        """What serves each operator, known after the warm-up; attention's backends by shape too."""
        self._event("kernels", backends=used, attention=attention)
        found: dict[str, list[str]] = {}
        for op, backends in used.items():
            for backend in backends:
                found.setdefault(backend, []).append(op)
        for backend, served in found.items():
            if len(used.get("attention", ())) > 1 and "attention" in served:
                shapes = [shape for shape, name in attention.items() if name == backend]
                served[served.index("attention")] = f"attention of {' and '.join(shapes)}"
        by_backend = (f"{backend} ({', '.join(served)})" for backend, served in found.items())
        self.say(f"kernels: {', '.join(by_backend)}")

    def say(self, line: str) -> None:
        """One line to the log and to the screen."""
        if self.folder is not None:
            self._write(line)
            self._show(line)

    def note(self, kind: str, line: str, **values: Any) -> None:
        """An event, and a line about it."""
        self._event(kind, **values)
        self.say(line)

    def validation(self, step: int, loss: float, train_time_s: float) -> None:
        """The validation before `step`; BadLoss, on every rank, where the loss is not finite."""
        if not math.isfinite(loss):
            raise BadLoss(f"step {step}: the validation loss is {loss}", step - 1)
        self.val_loss = loss
        self._event("validation", step=step, val_loss=loss, train_time_s=train_time_s)
        self.say(format_line(step, self.total_steps, "val_loss", loss, train_time_s))
        self._to_disk()

    def training(self, step: int, loss: float, train_time_s: float, tokens_done: int) -> None:
        """After `step` steps: the last one's mean loss, and the training tokens seen so far."""
        if self.folder is None:
            return
        line = format_line(step, self.total_steps, "train_loss", loss, train_time_s)
        self._event(
            "training", step=step, train_loss=loss, train_time_s=train_time_s, tokens=tokens_done
        )
        if step % self.log_interval == 0:
            self._write(line)
        tokens_per_s = tokens_done / max(train_time_s, 1e-9)
        if self._bar is None:
            self._bar = _progress_bar(self.total_steps)
        if self._bar:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s")
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_shown_s > CONSOLE_INTERVAL_S:
            left_s = train_time_s / step * (self.total_steps - step)
            self._print(f"{line} {tokens_per_s:,.0f} tokens/s, {left_s:.0f} s left")
            self._last_shown_s = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """An exception is written as the run's end. Without one it goes on."""
        if error is not None:
            self.end(str(error) or kind.__name__)

    def end(self, reason: str | None = None) -> None:
        """The last event. reason: why the run ended before its last step."""
        self._event("end", reason=reason)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        for file in (self._text, self._metrics):
            if file is not None:
                file.close()

    def _event(self, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps({"event": kind, **values}) + "\n")
            for listener in self.listeners:
                listener(kind, values)

    def _to_disk(self) -> None:
        """What was written so far outlives the machine; while the clock stands still."""
        for file in (self._text, self._metrics):
            if file is not None:
                os.fsync(file.fileno())

    def _write(self, line: str) -> None:
        self._text.write(line + "\n")

    def _show(self, line: str) -> None:
        if self._bar:
            self._bar.write(line, file=sys.stdout)
        else:
            self._print(line)

    def _print(self, line: str) -> None:
        """Where nobody reads it any more, the run stops as by SIGTERM, so that it is saved."""
        try:
            print(line, flush=True)
        except BrokenPipeError:
            _stdout.discard()
            reason = "nobody reads the output any more (broken pipe): as by SIGTERM"
            self._write(reason)
            print(f"speedrun: {reason}", file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGTERM)


def _whole_lines(path: Path) -> TextIO:
    """The file, to be appended to; a piece of a line, where a run was killed, is taken away."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", buffering=1, encoding="utf-8")


def _progress_bar(total_steps: int) -> Any:
    """A tqdm bar on a terminal; False without tqdm or without a terminal."""
    if not sys.stderr.isatty():
        return False
    try:
        from tqdm import tqdm
    except ImportError:
        return False
    return tqdm(total=total_steps, unit="step", dynamic_ncols=True)


class LossQueue:
    """Losses on their way from the device to the log, and with them whether a rank wants to stop.

    The host waits for the device only where it is `STEPS_AHEAD` steps ahead. All ranks read the
    same sums before the same step, whichever of them is faster: so a non-finite loss raises
    BadLoss on all ranks at the same place, and `stop` becomes true there on all of them, within
    `STEPS_AHEAD` + 1 steps of a rank's wish. `look` sees each step's mean loss.
    """

    def __init__(self, look: Callable[[StepPlan, float], None], tokens_done: int = 0) -> None:
        self.stop = False
        self._look = look
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, StepPlan, float]] = deque()
        self._tokens_done = tokens_done  # before

    def push(
        self,
        loss: Tensor,
        plan: StepPlan,
        train_time_s: float,
        comms: Comms,
        wants_stop: bool = False,
    ) -> None:
        """loss: (), this rank's sum over the step."""
        sums = torch.stack([loss, torch.full_like(loss, float(wants_stop))])
        comms.all_reduce_sum([sums])
        event = None
        if sums.is_cuda:
            host = torch.empty(2, dtype=sums.dtype, pin_memory=True)
            sums = host.copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((sums, event, plan, train_time_s))

    def log_ready(self, log: RunLog, ahead: int = STEPS_AHEAD) -> None:
        """All but the last `ahead` steps, on a CPU all."""
        while self._pending:
            sums, event, plan, train_time_s = self._pending[0]
            if event is not None:
                if len(self._pending) <= ahead:
                    return
                event.synchronize()
            self._pending.popleft()
            loss, wishes = sums.tolist()
            self.stop = self.stop or wishes > 0
            mean = loss / plan.tokens_per_step
            if not math.isfinite(mean):
                raise BadLoss(f"step {plan.step}: the training loss is {mean}", plan.step)
            self._tokens_done += plan.tokens_per_step
            log.training(plan.step + 1, mean, train_time_s, self._tokens_done)
            self._look(plan, mean)

    def log_all(self, log: RunLog) -> None:
        self.log_ready(log, ahead=0)
