"""The time and the launches of the optimizer's step alone, on this machine.

    python -m benchmarks.bench_optimizer [--recipe NAME] [--set KEY=VALUE] [--world-size N]
                                         [--repeats N] [--json FILE]

Each kind of step that the recipe has (with and without Adam, tied and not), as it is launched and,
on a GPU, as a CUDA graph. With --world-size N, rank 0's share of N ranks,
without the time of communication: its collectives return at once, and all of them are dense.
Gradients are random numbers.

launches: kernels and copies that the GPU runs in one step, counted by torch's profiler; on a CPU,
calls of torch's operators. Graphs add one fill a parameter: gradients keep their memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench, report
from speedrun import recipes
from speedrun.comms import Comms
from speedrun.config import Config, OptimConfig
from speedrun.estimate import Precision, meta_model
from speedrun.optim import Optimizer
from speedrun.overrides import apply_overrides
from speedrun.schedule import Schedule, StepPlan
from speedrun.sources import with_vocabulary

MODES = {"cuda": ("launched", "graph"), "cpu": ("launched",)}


@dataclasses.dataclass(frozen=True)
class Row:
    kind: str
    mode: str
    launches: int
    timing: bench.Timing

    def cells(self) -> tuple[str, ...]:
        figures = (self.timing.median_us / 1e3, self.timing.iqr_us / 1e3)
        return (self.kind, self.mode, str(self.launches), *(f"{x:.3f}" for x in figures))


HEADER = ("optimizer step", "mode", "launches", "ms", "± IQR")


class Stepper:
    """Steps of an optimizer on random gradients."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], config: OptimConfig, comms: Comms
    ) -> None:
        self.parameters = parameters
        self.device = next(iter(parameters.values())).device
        self.optimizer = Optimizer(parameters.items(), config, comms)
        self.gradients = {n: 1e-3 * torch.randn_like(p) for n, p in parameters.items()}

    def refill(self) -> None:
        """Every gradient, in its place where it has one; a step has cleared it."""
        for name, p in self.parameters.items():
            if p.grad is None:
                p.grad = self.gradients[name].clone()
            else:
                p.grad.copy_(self.gradients[name])
        for name, rows in self.optimizer.sparse.items():
            rows.clear()
            num_rows = self.parameters[name].shape[:-1].numel()
            self.optimizer.touched(name, torch.arange(num_rows, device=self.device))

    def step_us(self, plan: StepPlan) -> float:
        self.refill()
        bench.synchronize(self.device)
        if self.device.type == "cpu":
            start = time.perf_counter()
            self.optimizer.step(plan)
            return (time.perf_counter() - start) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.optimizer.step(plan)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def launches(self, plan: StepPlan) -> int:
        self.refill()
        bench.synchronize(self.device)
        return count_launches(lambda: self.optimizer.step(plan), self.device)


class _Calls(TorchDispatchMode):
    """Counts calls of operators, but for those that only make a view."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def count_launches(function: Callable[[], object], device: torch.device) -> int:
    if device.type == "cpu":
        with _Calls() as calls:
            function()
        return calls.number
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        bench.synchronize(device)
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_gpu)


def kinds_of(schedule: Schedule) -> dict[str, StepPlan]:
    """A plan for each kind of step that the schedule has, but for the split itself."""
    found = {}
    for plan in schedule:
        name = ("Muon and Adam" if plan.adam else "Muon") + (", tied" if plan.tied else "")
        if not plan.split and not plan.last:
            found.setdefault(name, plan)
    return found


def make_parameters(config: Config, device: torch.device) -> dict[str, nn.Parameter]:
    """The recipe's, at their full size, without the rest of the model."""
    named = meta_model(config.model, Precision.of(config)).named_parameters()
    return {
        name: nn.Parameter(0.02 * torch.randn(p.shape, dtype=p.dtype, device=device))
        for name, p in named
    }


def measure(config: Config, device: torch.device, comms: Comms, repeats: int) -> list[Row]:
    parameters = make_parameters(config, device)
    plans = kinds_of(Schedule(config.schedule))
    rows = []
    for mode in MODES[device.type]:
        optim = dataclasses.replace(config.optim, cuda_graph=mode == "graph")
        stepper = Stepper(parameters, optim, comms)
        for plan in plans.values():
            for _ in range(3):  # compilation; the second step of a kind is captured
                stepper.step_us(plan)
        # Kinds in turn, so that a clock that drifts hits all alike.
        samples = {kind: [] for kind in plans}
        for _ in range(repeats):
            for kind, plan in plans.items():
                samples[kind].append(stepper.step_us(plan))
        for kind, plan in plans.items():
            timing = bench.Timing(tuple(samples[kind]))
            rows.append(Row(kind, mode, stepper.launches(plan), timing))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_optimizer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--recipe", default="record_089")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = apply_overrides(recipes.load(args.recipe), args.set)
    config = with_vocabulary(config)
    if args.world_size > 1:  # nobody says how many rows the others would send
        optim = dataclasses.replace(config.optim, sparse_rows_threshold=0)
        config = dataclasses.replace(config, optim=optim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", FakeStore(), rank=0, world_size=args.world_size)
    rows = measure(config, device, Comms(0, args.world_size), args.repeats)
    gpu = report.environment()["gpu"] or "CPU"
    print(f"{config.name}, rank 0 of {args.world_size} on {gpu}, torch {torch.__version__}")
    print(report.markdown_table(HEADER, [row.cells() for row in rows]))
    if args.json:
        entries = [dataclasses.asdict(row) for row in rows]
        report.write_json(args.json, report.environment() | {"rows": entries})
    return 0


if __name__ == "__main__":
    sys.exit(main())
