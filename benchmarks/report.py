"""What a run of benchmarks found: checks and rows of times, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.bench import Timing
from speedrun.hardware import compute_capability, gpu_name, gpu_peaks

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "stem",
    "case",
    "name",
    "mode",
    "µs",
    "rate",
    "% of roof",
    "± IQR µs",
    "peak MB",
    "× others",
)


@dataclasses.dataclass(frozen=True)
class Check:
    """Whether one function (backend or peer) gave the right result; skip: it can't run here."""

    stem: str
    case: str
    name: str
    verdict: str  # "pass", "fail" or "skip"
    error: str = ""

    def line(self) -> str:
        return f"{self.stem} {self.case} {self.name}: {self.error}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One function on one case. `roof_us`: the least time, by the rates measured in this run;
    `peak_bytes`: allocated at most beyond the inputs, nan where a benchmark doesn't ask."""

    stem: str
    case: str
    name: str
    mode: str
    timing: Timing
    num_bytes: float
    num_flops: float = 0
    roof_us: float = math.nan
    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)  # other's time / ours
    peak_bytes: float = math.nan

    @property
    def rate_per_s(self) -> float:
        return (self.num_flops or self.num_bytes) / (self.timing.median_us * 1e-6)

    @property
    def roof_frac(self) -> float:
        return self.roof_us / self.timing.median_us

    def cells(self) -> tuple[str, ...]:
        rate = self.rate_per_s / (1e12 if self.num_flops else 1e9)
        return (
            self.stem,
            self.case,
            self.name,
            self.mode,
            f"{self.timing.median_us:.1f}",
            f"{rate:.1f} {'TFLOP/s' if self.num_flops else 'GB/s'}",
            "-" if math.isnan(self.roof_frac) else f"{100 * self.roof_frac:.0f} %",
            f"{self.timing.iqr_us:.1f}",
            "-" if math.isnan(self.peak_bytes) else f"{self.peak_bytes / 1e6:.1f}",
            ", ".join(f"{ratio:.2f} {other}" for other, ratio in self.ratios.items()) or "-",
        )

    def as_json(self) -> dict:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["timing"] = {"unit": "us", "samples": self.timing.samples_us}
        fields |= {"median_us": self.timing.median_us, "rate_per_s": self.rate_per_s}
        return _without_nan({**fields, "roof_frac": self.roof_frac})


@dataclasses.dataclass
class Report:
    """All of a run. `roofs`: "copy" in bytes a second, "bf16" and "fp8" in operations a second."""

    environment: dict[str, object]
    roofs: dict[str, float] = dataclasses.field(default_factory=dict)
    checks: list[Check] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        units = {"copy": (1e9, "GB/s")}
        lines = []
        for kind, roof in self.roofs.items():
            scale, unit = units.get(kind, (1e12, "TFLOP/s"))
            lines.append(f"roof {kind}: {roof / scale:.2f} {unit}, measured in this run")
        lines += [table(self.rows)] if self.rows else []
        skipped: dict[str, int] = {}
        for check in self.checks:
            if check.verdict == "skip":
                key = f"{check.stem} {check.name}: {check.error}"
                skipped[key] = skipped.get(key, 0) + 1
        lines += [f"left out: {key} ({count} cases)" for key, count in skipped.items()]
        wrong = [check for check in self.checks if check.verdict == "fail"]
        lines += [f"WRONG, not timed: {check.line()}" for check in wrong]
        passed = sum(check.verdict == "pass" for check in self.checks)
        lines.append(f"{passed} right, {len(wrong)} wrong, {len(skipped)} kinds left out")
        return "\n".join(lines)

    def as_json(self) -> dict:
        return {
            "environment": self.environment,
            "roofs": _without_nan(self.roofs),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "rows": [row.as_json() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        write_json(path, self.as_json())


def _without_nan(fields: Mapping) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def write_json(path: Path, content: dict) -> None:
    """Replaces `path` at once: a reader, or a kill, never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def table(rows: list[Row]) -> str:
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"{'  '.join(line[:4])} | {' | '.join(line[4:])}".rstrip() for line in padded)


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(text: str, name: str, content: str) -> str:
    """`text` with what stands between the comments `name` and `/name` replaced; both must be."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"no lines {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def commit() -> str:
    """Short hash of the checkout, "-dirty" where files differ from it; "unknown" outside git.

    What hardware_check itself writes doesn't count.
    """
    outputs = (":!records/hardware", ":!python/speedrun/ops/verdicts.json")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *outputs)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str:
    """Version of the NVIDIA driver, or "none"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return run.stdout.strip() or "none"
    except (OSError, subprocess.TimeoutExpired):
        return "none"


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
        "driver": driver(),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "data_sheet": peaks,
    }
