"""Rows of measurements: one line each, and all of them as JSON with what they were measured on."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.bench import Timing
from speedrun.hardware import compute_capability, gpu_name, gpu_peaks

ROOT = Path(__file__).resolve().parents[1]
HEADER = ("stem", "case", "backend", "mode", "µs", "rate", "% of roof", "× baseline", "± IQR µs")


@dataclasses.dataclass(frozen=True)
class Row:
    """One backend on one case. `roof_per_s`: bytes (or, if num_flops, operations) a second."""

    stem: str
    case: str
    backend: str
    mode: str
    timing: Timing
    baseline: Timing
    num_bytes: int
    num_flops: int = 0
    roof_per_s: float = math.nan

    @property
    def rate_per_s(self) -> float:
        return (self.num_flops or self.num_bytes) / (self.timing.median_us * 1e-6)

    def cells(self) -> tuple[str, ...]:
        rate = self.rate_per_s / (1e12 if self.num_flops else 1e9)
        share = self.rate_per_s / self.roof_per_s
        speedup = self.baseline.median_us / self.timing.median_us
        return (
            self.stem,
            self.case,
            self.backend,
            self.mode,
            f"{self.timing.median_us:.1f}",
            f"{rate:.1f} {'TFLOP/s' if self.num_flops else 'GB/s'}",
            "-" if math.isnan(share) else f"{100 * share:.0f} %",
            f"{speedup:.2f}",
            f"{self.timing.iqr_us:.1f}",
        )

    def as_json(self) -> dict:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields.pop("baseline")
        fields["timing"] = {"unit": "us", "samples": self.timing.samples_us}
        roof = None if math.isnan(self.roof_per_s) else self.roof_per_s
        return {**fields, "roof_per_s": roof, "rate_per_s": self.rate_per_s}


def table(rows: list[Row]) -> str:
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"{'  '.join(line[:4])} | {' | '.join(line[4:])}".rstrip() for line in padded)


def commit() -> str:
    """Short hash of the checkout, "-dirty" where files differ from it; "unknown" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, object]:
    """What a row was measured on; a figure means nothing without it."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = gpu_name()
    peaks = {k: v for k, v in dataclasses.asdict(gpu_peaks(name)).items() if v == v}  # no nan
    return {
        "gpu": name,
        "compute_capability": compute_capability(),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "data_sheet": peaks,
    }


def write_json(path: Path, rows: list[Row]) -> None:
    content = {"environment": environment(), "rows": [row.as_json() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
