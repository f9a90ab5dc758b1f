"""Watches the training program while it runs: what its phases cost, and on which kernels.

The program is `speedrun.train` as it is; the functions that its loop calls are wrapped, so that
whatever path they take (compiled, replayed from a graph, …) is what is timed. The steps of a stage,
in units of `adam_interval`, so that each unit has the same mix of updates:

    1        lead-in: nothing is noted
    rounds   timed between two synchronisations of the device, one unit each: milliseconds a step
    2        timed phase by phase, with a synchronisation around each phase
    1        under torch.profiler: kernels, launches, how long the device works

Phases alone sum to more than a step, in which the host runs ahead of the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import bench
from speedrun import train
from speedrun.baseline_model import BaselineGPT
from speedrun.data import TokenLoader
from speedrun.model import GPT
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule, StepPlan

LEAD_IN, PHASED, PROFILED = 1, 2, 1  # units of steps


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Of one kernel (on a CPU: one of torch's operators) in a step, or in a validation."""

    name: str
    calls: float
    us: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Costliest first. busy_us: that at least one kernel ran; None on a CPU."""

    kernels: tuple[KernelCost, ...]
    busy_us: float | None

    @property
    def launches(self) -> float:
        return sum(kernel.calls for kernel in self.kernels)


@dataclasses.dataclass
class Figures:
    """What was seen of one stage (or of a validation, which is a round alone)."""

    rounds_ms: list[float] = dataclasses.field(default_factory=list)  # a step
    phases_ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    profile: Profile | None = None
    peak_bytes: int | None = None

    def phase_ms(self, name: str) -> float | None:
        """The median; None where the phase was not seen."""
        return statistics.median(self.phases_ms[name]) if self.phases_ms.get(name) else None


def stage_steps(adam_interval: int, rounds: int) -> int:
    """Steps that a stage needs for all that is noted of it."""
    return adam_interval * (LEAD_IN + rounds + PHASED + PROFILED)


class Profiler:
    """torch.profiler around some steps. On a GPU it records the device and the calls to it alone:
    to record the host's operators too would slow a host that is behind as it is."""

    def __init__(self, device: torch.device) -> None:
        from torch.profiler import ProfilerActivity, profile

        on_gpu = device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        self.device, self.profiler = device, profile(activities=[activity], acc_events=True)

    def start(self) -> None:
        bench.synchronize(self.device)
        self.profiler.start()

    def stop(self, count: int, timeline: Path | None) -> Profile:
        """Costs are divided by `count`; the timeline is a chrome trace, packed if it ends so."""
        bench.synchronize(self.device)
        self.profiler.stop()
        if timeline is not None:
            timeline.parent.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(timeline))
        if self.device.type == "cpu":
            costs = [(e.key, e.count, e.self_cpu_time_total) for e in self.profiler.key_averages()]
            return Profile(_sorted(costs, count), None)
        on_gpu = torch.autograd.DeviceType.CUDA
        return device_profile(
            [
                (event.name, event.time_range.start, event.time_range.end)
                for event in self.profiler.events()
                if event.device_type == on_gpu
            ],
            count,
        )


def device_profile(events: list[tuple[str, float, float]], count: int) -> Profile:
    """Of (kernel, start, end) in microseconds, in `count` steps."""
    calls, us = Counter(), Counter()
    for name, start, end in events:
        calls[name] += 1
        us[name] += end - start
    costs = [(name, calls[name], us[name]) for name in calls]
    return Profile(_sorted(costs, count), covered([span for _, *span in events]) / count)


def _sorted(costs: list[tuple[str, int, float]], count: int) -> tuple[KernelCost, ...]:
    found = [KernelCost(name, calls / count, us / count) for name, calls, us in costs]
    return tuple(sorted(found, key=lambda kernel: (-kernel.us, kernel.name)))


def covered(spans: list[list[float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Probe:
    """Wraps the training loop. schedule: of the run, each stage with `stage_steps` steps.

    timelines: a folder for traces, or None. stages[i] are the figures of stage i; validation those
    of the last one, with the final windows.
    """

    def __init__(
        self, schedule: Schedule, device: torch.device, rounds: int, timelines: Path | None
    ) -> None:
        self.schedule, self.device, self.timelines = schedule, device, timelines
        self.unit, self.rounds = schedule.config.adam_interval, rounds
        self.stages = [Figures() for _ in schedule.stages]
        self.validation = Figures()
        self.step = -1  # of the training; before it everything passes through
        self.running = False  # whether a step is under way
        self.started = 0.0
        self.seconds: Counter[str] = Counter()  # of the step's phases
        self.profiler: Profiler | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def wrap(owner: Any, name: str, wrapper: Callable) -> None:
                original = getattr(owner, name)

                def call(*args: Any, **kwargs: Any) -> Any:
                    return wrapper(original, *args, **kwargs)

                stack.enter_context(mock.patch.object(owner, name, call))

            wrap(TokenLoader, "next_step", self._next_step)
            wrap(train, "to_micro_batches", self._phase("data"))
            wrap(train, "forward_backward", self._phase("forward and backward"))
            for model in (GPT, BaselineGPT):
                wrap(model, "training_loss", self._phase("forward"))
            wrap(Optimizer, "step", self._optimizer_step)
            wrap(train, "validate", self._validate)
            wrap(train, "finish", lambda original, config, data, log: log.close())  # no picture
            yield

    @property
    def figures(self) -> Figures:
        return self.stages[self.schedule.stage_of(self.step)]

    @property
    def place(self) -> int:
        """Of the step in its stage."""
        return self.step - self.schedule.starts[self.schedule.stage_of(self.step)]

    @property
    def part(self) -> str:
        unit = self.place // self.unit - LEAD_IN
        if unit < 0:
            return "lead-in"
        if unit < self.rounds:
            return "rounds"
        return "phases" if unit < self.rounds + PHASED else "profile"

    def _now(self) -> float:
        bench.synchronize(self.device)
        return time.perf_counter()

    def _begin(self) -> None:
        self.step += 1
        self.running = True
        self.seconds.clear()
        if self.place == self.unit * LEAD_IN and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.place % self.unit:
            return
        if self.part == "rounds":
            self.started = self._now()
        elif self.part == "profile":
            self.profiler = Profiler(self.device)
            self.profiler.start()

    def _end(self) -> None:
        if not self.running:
            return
        self.running = False
        figures, is_last_of_unit = self.figures, (self.place + 1) % self.unit == 0
        if self.part == "rounds" and is_last_of_unit:
            figures.rounds_ms.append((self._now() - self.started) * 1e3 / self.unit)
        if self.part == "phases":
            whole, forward = self.seconds["forward and backward"], self.seconds["forward"]
            if forward:  # a replayed graph has no forward pass that could be seen from here
                self.seconds["backward"] = whole - forward
            for name, seconds in self.seconds.items():
                figures.phases_ms.setdefault(name, []).append(seconds * 1e3)
        if self.part == "profile" and is_last_of_unit:
            stage = self.schedule.stage_of(self.step) + 1
            figures.profile = self.profiler.stop(self.unit, self._timeline(f"stage_{stage}"))
            if self.device.type == "cuda":
                figures.peak_bytes = torch.cuda.max_memory_allocated(self.device)

    def _timeline(self, name: str) -> Path | None:
        return self.timelines and self.timelines / f"{name}.json.gz"

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if not (self.running and self.part == "phases") or _capturing(self.device):
            yield
            return
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _phase(self, name: str) -> Callable:
        def wrapper(original: Callable, *args: Any, **kwargs: Any) -> Any:
            with self._timed(name):
                return original(*args, **kwargs)

        return wrapper

    def _next_step(self, original: Callable, *args: Any) -> Any:
        self._end()
        self._begin()
        with self._timed("data"):
            return original(*args)

    def _optimizer_step(self, original: Callable, optimizer: Optimizer, plan: StepPlan) -> None:
        with self._timed("optimizer with Adam" if plan.adam else "optimizer"):
            original(optimizer, plan)

    def _validate(
        self, original: Callable, model: Any, config: Any, data: Any, plan: StepPlan, *rest: Any
    ) -> float:
        self._end()
        inputs = (model, config, data, plan, *rest)
        if not plan.last:
            return original(*inputs)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        original(*inputs)  # the final windows are new: what there is to compile is compiled
        start = self._now()
        loss = original(*inputs)
        self.validation.rounds_ms.append((self._now() - start) * 1e3)
        profiler = Profiler(self.device)
        profiler.start()
        original(*inputs)
        self.validation.profile = profiler.stop(1, self._timeline("validation"))
        if self.device.type == "cuda":
            self.validation.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        return loss


def _capturing(device: torch.device) -> bool:
    """Whether a graph is being captured, in which nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
