"""Benchmarks of the operators, against their peers, on this machine.

    python -m benchmarks.run [--op STEM] [--shapes record|all] [--json FILE]

Every case is checked before it is timed: what gives a wrong result is reported and not timed.
Then all of a case's functions are timed in turn (benchmarks/bench.py says how), beside the rates
of a copy and of bf16 and fp8 matrix products, measured in the same run. benchmarks/README.md says
how to read the table. Exit code 0; 1: a backend of ours was wrong or failed; 2: bad arguments.

The interface for an operator, benchmarks/ops/bench_<stem>.py:

    def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:

yields one Benchmark a case: shapes "record" the shapes of training (tests/cases.py), "all" those
and more. It is a generator, so that the inputs of one case are freed before the next. Each case is
a call of the operator's front door, which is run here once for each of our backends (cuda, triton,
torch), under `use_backend`:

    x, w, scale = random_inputs(case, device)             # random values: zeros run faster
    yield Benchmark(
        stem="fp8_matmul",
        case=case.name,
        call=lambda: ops.fp8_matmul(x, w, scale, scale),  # no host synchronisation inside
        check=check,                                      # check(name, result), see below
        num_bytes=...,                                    # that must be read and written once
        num_flops={"fp8": 2 * m * n * k},                 # by type of matrix product; {}: none
        peers={"cublaslt": lambda: peers.scaled_mm(x, w, scale, scale)},
    )

check(name, result) gets what one call returned; it raises AssertionError unless that is right by
tests/numerics.py (against the reference in float64). `name` is "cuda", "triton", "torch" or a
peer's, which may follow another law. A peer's entry makes, when called, the function to be timed
(set-up and compilation happen there), or raises peers.Missing with the reason. A call that changes
its inputs in place names `reset`, which puts them back before each checked call. Forward and
gradient: let `call` return torch.autograd.grad(...) of the forward's result.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from benchmarks import bench, peers, report
from speedrun import ops
from speedrun.ops._dispatch import BACKENDS, Unavailable

STEMS = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("ops/bench_*.py"))
MAX_CPU_BYTES = 256 << 20  # larger cases are left out on a CPU
MAX_CPU_FLOPS = 4e9


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One case of one operator; the fields are explained at the top of this file."""

    stem: str
    case: str
    call: Callable[[], object]
    check: Callable[[str, object], None]
    num_bytes: int
    num_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)  # "bf16", "fp8"
    peers: Mapping[str, Callable[[], Callable[[], object]]] = dataclasses.field(
        default_factory=dict
    )
    reset: Callable[[], None] = lambda: None
    peak: bool = False  # whether rows say how much memory a call takes

    def roof_us(self, roofs: Mapping[str, float]) -> float:
        """The least time: of the bytes by a copy, or of the products, whichever is more."""
        copy = self.num_bytes / roofs["copy"]
        products = math.fsum(flops / roofs[kind] for kind, flops in self.num_flops.items())
        return max(copy, products) * 1e6 if products == products else math.nan


def on_backend(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def function() -> object:
        with ops.use_backend(backend):
            return call()

    return function


@contextmanager
def _memory_full_of_nan() -> Iterator[None]:
    """New tensors hold NaN or the largest integer, so that an element never written is seen."""
    before, memory = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before)


def functions_of(
    benchmark: Benchmark, backends: list[str], device: torch.device
) -> tuple[dict[str, Callable[[], object]], list[report.Check]]:
    """What can run and is right, by name; and of everything else, and of these, a Check."""
    makers = {b: functools.partial(on_backend, b, benchmark.call) for b in backends}
    makers |= benchmark.peers
    functions, checks = {}, []
    for name, make in makers.items():
        verdict, error = "pass", ""
        try:
            function = make()
            benchmark.reset()
            # Inductor would compile anew for this setting: what is timed must be what was checked.
            with _memory_full_of_nan() if name in backends else nullcontext():
                result = function()
            bench.synchronize(device)
            benchmark.check(name, result)
            functions[name] = function
        except (Unavailable, peers.Missing) as reason:
            verdict, error = "skip", str(reason)
        except Exception as problem:
            lines = [line for line in str(problem).splitlines() if line.strip()]
            verdict, error = "fail", f"{type(problem).__name__}: {lines[0] if lines else ''}"
        checks.append(report.Check(benchmark.stem, benchmark.case, name, verdict, error))
    return functions, checks


def measure(
    benchmark: Benchmark,
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    roofs: Mapping[str, float],
) -> list[report.Row]:
    """One row a mode and function. A function that can't be captured has no rows of graphs."""
    rows, peaks = [], {}
    if benchmark.peak:
        peaks = {name: bench.peak_bytes(call, device) for name, call in functions.items()}
    for mode in bench.modes(device):
        timings = bench.time_interleaved(functions, device, mode, repeats)
        medians = {name: timing.median_us for name, timing in timings.items()}
        rows += [
            report.Row(
                benchmark.stem,
                benchmark.case,
                name,
                mode,
                timing,
                benchmark.num_bytes,
                math.fsum(benchmark.num_flops.values()),
                benchmark.roof_us(roofs),
                {other: us / timing.median_us for other, us in medians.items() if other != name},
                peaks.get(name, math.nan),
            )
            for name, timing in timings.items()
        ]
    return rows


def run(
    stems: list[str],
    shapes: str,
    backends: list[str],
    device: torch.device,
    repeats: int,
    timed: bool,
    path: Path | None,
) -> report.Report:
    """Checks, and times where `timed`; writes `path` after each case, for who must survive us."""
    result = report.Report(report.environment(), bench.roofs(device) if timed else {})
    for stem in stems:
        module = importlib.import_module(f"benchmarks.ops.bench_{stem}")
        for benchmark in module.benchmarks(device, shapes):
            functions, checks = functions_of(benchmark, backends, device)
            result.checks += checks
            if timed:
                result.rows += measure(benchmark, functions, device, repeats, result.roofs)
            if path:
                result.write(path)
            for check in checks:
                if check.verdict == "fail":
                    print(f"WRONG {check.line()}", file=sys.stderr)
            print(f"done: {stem} {benchmark.case}", file=sys.stderr, flush=True)
    return result


def too_large_for_cpu(device: torch.device, num_bytes: float, num_flops: float = 0) -> bool:
    """Whether a case with this much to do is left out on `device`."""
    return device.type == "cpu" and (num_bytes > MAX_CPU_BYTES or num_flops > MAX_CPU_FLOPS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=STEMS, help="one stem (default: all)")
    parser.add_argument("--shapes", choices=("record", "all"), default="record")
    parser.add_argument("--json", type=Path, help="write checks and rows, with all samples")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: all")
    parser.add_argument("--repeats", type=int, default=30, help="samples of each (30)")
    parser.add_argument("--no-timing", action="store_true", help="only check")
    parser.add_argument("--no-peers", action="store_true", help="only our backends")
    parser.add_argument(
        "--modded-nanogpt", type=Path, metavar="FOLDER", help="with its triton_kernels.py"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    peers.configure(modded_nanogpt=args.modded_nanogpt, enabled=not args.no_peers)
    for name, value in report.environment().items():
        print(f"{name}: {value}")
    if device.type == "cpu":
        print("No GPU: timed with perf_counter on the CPU; says nothing about any GPU.")
    backends = args.backend or list(BACKENDS)
    stems, timed = args.op or STEMS, not args.no_timing
    result = run(stems, args.shapes, backends, device, args.repeats, timed, args.json)
    print(result.text())
    return int(any(c.verdict == "fail" and c.name in BACKENDS for c in result.checks))


if __name__ == "__main__":
    sys.exit(main())
