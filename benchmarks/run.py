"""Benchmarks of the operators, against their peers, on this machine.

    python -m benchmarks.run [STEM ...] [--repeats 30] [--json FILE]

Each case is checked before it is timed. STEM: benchmarks/ops/bench_<stem>.py; none: all of them,
which have a function `benchmarks(device)` that yields Benchmark objects one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import bench, report

STEMS = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("ops/bench_*.py"))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One case of one operator: `functions` by backend, the first of them the baseline."""

    stem: str
    case: str
    functions: dict[str, Callable[[], object]]
    num_bytes: int  # that must be read and written
    check: Callable[[str], None]  # raises AssertionError if that backend's result is wrong


def measure(
    benchmark: Benchmark, device: torch.device, repeats: int, roof: float
) -> list[report.Row]:
    for backend in benchmark.functions:
        benchmark.check(backend)
    rows = []
    for mode in bench.modes(device):
        timings = bench.time_interleaved(benchmark.functions, device, mode, repeats)
        baseline = next(iter(timings.values()))
        for backend, timing in timings.items():
            rows.append(
                report.Row(
                    benchmark.stem,
                    benchmark.case,
                    backend,
                    mode,
                    timing,
                    baseline,
                    benchmark.num_bytes,
                    roof_per_s=roof,
                )
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(STEMS)}")
    parser.add_argument("--repeats", type=int, default=30, help="samples of each (30)")
    parser.add_argument("--json", type=Path, help="write rows with all samples to this file")
    args = parser.parse_args()
    if unknown := set(args.stems) - set(STEMS):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(STEMS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in report.environment().items():
        print(f"{name}: {value}")
    roof = bench.copy_rate(device)
    print(f"roof: {roof / 1e9:.1f} GB/s, measured by a copy on this device")
    if device.type == "cpu":
        print("No GPU: timed with perf_counter on the CPU; says nothing about any GPU.")
    rows = []
    for stem in args.stems or STEMS:
        module = importlib.import_module(f"benchmarks.ops.bench_{stem}")
        for benchmark in module.benchmarks(device):
            rows += measure(benchmark, device, args.repeats, roof)
            print(f"measured {stem} {benchmark.case}", file=sys.stderr)
    print(report.table(rows))
    if args.json:
        report.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
