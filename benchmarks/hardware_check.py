"""Runs every operator's cases on this GPU once, against the reference, and writes down what passed.

    python -m benchmarks.hardware_check [STEM ...]

Writes records/hardware/<gpu>.json, and in python/speedrun/ops/verdicts.json allows or withdraws the
CUDA kernel of each checked operator for this compute capability. Exit code 0: all passed, 1: some
failed, 2: no GPU, or nothing of ours to check on it. STEM: as for benchmarks.run; its module has
`hardware_cases()`, `serving_backends(device)` and `check(case, backend, device)`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import re
import sys
from pathlib import Path

import torch

from benchmarks.report import ROOT, commit, environment
from benchmarks.run import STEMS
from speedrun.hardware import compute_capability, gpu_name

VERDICTS = ROOT / "python" / "speedrun" / "ops" / "verdicts.json"
RECORDS = ROOT / "records" / "hardware"


def check_operator(stem: str, device: torch.device) -> list[dict]:
    """One row a backend and case: {stem, backend, case, passed, error}."""
    module = importlib.import_module(f"benchmarks.ops.bench_{stem}")
    rows = []
    for backend in module.serving_backends(device):
        for case in module.hardware_cases():
            error = ""
            try:
                module.check(case, backend, device)
                torch.cuda.synchronize(device)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}".splitlines()[0]
                print(f"FAILED {stem} {backend} {case.name}: {error}")
            row = {"stem": stem, "backend": backend, "case": case.name}
            rows.append({**row, "passed": not error, "error": error})
    return rows


def update_verdicts(path: Path, rows: list[dict], where: dict[str, str]) -> None:
    """Of each operator whose CUDA kernel was checked: `where` is listed if every case passed."""
    content = json.loads(path.read_text())
    verdicts = content["verdicts"]
    for stem in sorted({row["stem"] for row in rows if row["backend"] == "cuda"}):
        results = [r["passed"] for r in rows if (r["stem"], r["backend"]) == (stem, "cuda")]
        others = [v for v in verdicts.get(stem, []) if v["capability"] != where["capability"]]
        entries = others + [where] * all(results)
        verdicts[stem] = sorted(entries, key=lambda entry: entry["capability"])
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(STEMS)}")
    args = parser.parse_args()
    if unknown := set(args.stems) - set(STEMS):
        parser.error(f"no checks of {', '.join(sorted(unknown))}; there are {', '.join(STEMS)}")
    if not torch.cuda.is_available():
        print("hardware_check needs a GPU, and torch sees none here; nothing was written.")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [row for stem in args.stems or STEMS for row in check_operator(stem, device)]
    if not rows:
        print("no backend of ours can run here; nothing was written.")
        return 2
    name, today = gpu_name(device.index), datetime.date.today().isoformat()
    record = {"date": today, "environment": environment(), "rows": rows}
    path = RECORDS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    capability = compute_capability(device.index)
    where = {"capability": capability, "commit": commit(), "gpu": name, "date": today}
    update_verdicts(VERDICTS, rows, where)
    failed = sum(not row["passed"] for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed on {name}; written to {path}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
