"""Train a recipe with each technique off: what each one is worth."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from speedrun import hardware, train
from speedrun._text_table import text_table
from speedrun.config import Config, ConfigError, to_dict
from speedrun.data import DataError
from speedrun.estimate import Precision, meta_model
from speedrun.optim import placements
from speedrun.prefix_table import prefix_tokenizer
from speedrun.runlog import RunError, environment
from speedrun.schedule import Schedule
from speedrun.sources import DataSource, check_data, model_for, open_data
from speedrun.techniques import TECHNIQUES, in_use

ALL_ON = "all_on"  # the arm without a technique off
ERROR_LINES = 5  # of a failed run's stderr, that are shown


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: without `technique` (or ALL_ON), from one seed."""

    technique: str
    seed: int
    device: str
    config: Config
    folder: Path  # only of a finished run; until then the next one
    argv: tuple[str, ...]

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.unfinished")


@dataclasses.dataclass(frozen=True)
class Result:
    """The last validation of a finished run."""

    val_loss: float
    train_time_s: float


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one run at a time goes: some cores, and with GPUs one of them."""

    cores: tuple[int, ...]  # empty where the system can't bind a process to some
    gpu: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """train's own; --seed is the first seed, --out the folder of all runs."""
    train.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each (default: 3)")
    parser.add_argument(
        "--techniques", metavar="A,B", help="only these (default: all that the recipe has)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """0; 1 if the ablation can't be, or a run of it failed, with the cause on stderr."""
    try:
        return _ablate(args)
    except (ConfigError, DataError, RunError) as error:
        print(f"speedrun ablate: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("speedrun ablate: stopped; the same command goes on", file=sys.stderr)
        return 130


def _ablate(args: argparse.Namespace) -> int:
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise ConfigError(f"--seeds {args.seeds}, --jobs {args.jobs}: must be at least 1")
    config = train.configure(args)
    data = open_data(args.data, args.text, config)
    config = dataclasses.replace(config, model=model_for(config, data.format))
    check_data(config, data, Schedule(config.schedule))
    prefix_tokenizer(config.schedule, data.format, data.folder)
    arms = {ALL_ON: config} | _chosen(args, config, data)
    for name, arm in arms.items():
        _check_optimizer(name, arm)
    out = Path(args.out or Path("runs", f"ablation_{args.recipe}"))
    runs = [  # each seed for all arms, so that a run that is stopped has something to compare
        _planned(args, name, arm, seed, out)
        for seed in range(args.seed, args.seed + args.seeds)
        for name, arm in arms.items()
    ]
    waiting = [r for r in runs if read_result(r, data) is None]
    slots = _slots(args)
    print(
        f"recipe {args.recipe}: {len(arms) - 1} techniques, {len(runs)} runs, "
        f"{len(runs) - len(waiting)} of them finished before; {len(slots)} at once; in {out}",
        flush=True,
    )
    failed = run_all(waiting, slots)
    results = {r: result for r in runs if (result := read_result(r, data)) is not None}
    rows = compare(results)
    print(format_table(rows))
    for r, error in failed.items():
        print(f"{r.technique}, seed {r.seed}: failed, {r.unfinished}\n{error}", file=sys.stderr)
    report = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "jobs")},
        "jobs": len(slots),
        "train_data": [str(path) for path in data.train],
        "environment": environment(),
        "rows": rows,
        "failed": [{"technique": r.technique, "seed": r.seed, "error": failed[r]} for r in failed],
    }
    (out / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"every run: {out / 'ablation.json'}")
    return 1 if failed else 0


def _chosen(args: argparse.Namespace, config: Config, data: DataSource) -> dict[str, Config]:
    """The arms with a technique off, by its name."""
    precision = config.precision
    if precision == "auto":
        precision = hardware.best_precision(torch.device(args.device))
    found = in_use(config, precision=precision, tokenizer=data.format.tokenizer)
    if not found:
        raise ConfigError(f"recipe {args.recipe!r} has no technique to switch off here")
    if args.techniques is None:
        return found
    names = args.techniques.split(",")
    for name in names:
        if name not in TECHNIQUES:
            raise ConfigError(f"--techniques {name}: there are {', '.join(TECHNIQUES)}")
        if name not in found:
            raise ConfigError(
                f"--techniques {name}: off or without effect in this recipe, with this data and "
                f"precision {precision}; it has {', '.join(found)}"
            )
    return {name: found[name] for name in names}


def _check_optimizer(technique: str, config: Config) -> None:
    """ConfigError if the optimizer's tables don't fit the arm's parameters."""
    model = meta_model(config.model, Precision.of(config))
    try:
        placements(model.named_parameters(), config.optim, world_size=1)
    except ConfigError as error:
        what = "" if technique == ALL_ON else f"without technique {technique!r}: "
        raise ConfigError(f"{what}{error}") from None


def _planned(args: argparse.Namespace, technique: str, config: Config, seed: int, out: Path) -> Run:
    folder = out / technique / f"seed_{seed}"
    planned = Run(technique, seed, args.device, config, folder, ())
    own = {"set": [*args.set, *TECHNIQUES.get(technique, ())], "seed": seed}
    words = argparse.Namespace(**{**vars(args), **own, "out": planned.unfinished})
    return dataclasses.replace(planned, argv=tuple(train.to_argv(words)))


def read_result(planned: Run, data: DataSource) -> Result | None:
    """The result in the run's folder, None without one. RunError if it is of another run."""
    try:
        text = (planned.folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    header, *events = map(json.loads, text.splitlines())
    wanted = {
        "config": json.loads(json.dumps(to_dict(planned.config))),
        "seed": planned.seed,
        "train_data": [str(path) for path in data.train],
    }
    different = [key for key, value in wanted.items() if header[key] != value]
    if header["device"].startswith("CPU") != (planned.device == "cpu"):
        different.append("device")
    if different:
        raise RunError(
            f"{planned.folder}: holds a run with another {', '.join(different)}; choose "
            "another folder by --out, or delete it"
        )
    last = [event for event in events if event["event"] == "validation"][-1]
    return Result(last["val_loss"], last["train_time_s"])


def _slots(args: argparse.Namespace) -> list[Slot]:
    """One a run at once; cores and GPUs are dealt to them, and shared where they are fewer."""
    gpus = _visible_gpus() if args.device == "cuda" else []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    num_slots = args.jobs or len(gpus) or hardware.num_cpus()
    slots = []
    for i in range(num_slots):
        own = cores[i::num_slots] or cores[i % max(1, len(cores)) :][:1]
        slots.append(Slot(tuple(own), gpus[i % len(gpus)] if gpus else None))
    return slots


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))


def run_all(runs: Iterable[Run], slots: Sequence[Slot]) -> dict[Run, str]:
    """Train them, one a slot at a time. Gives the last lines of those that failed."""
    waiting, running, failed = deque(runs), {}, {}
    total, free = len(waiting), list(slots)
    try:
        while waiting or running:
            while waiting and free:
                planned, slot = waiting.popleft(), free.pop(0)
                running[planned] = slot, _start(planned, slot)
            for planned, (slot, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[planned]
                free.append(slot)
                if process.returncode == 0:
                    planned.unfinished.rename(planned.folder)
                else:
                    lines = (planned.unfinished / "stderr.txt").read_text().splitlines()
                    failed[planned] = "\n".join(lines[-ERROR_LINES:])
                done = total - len(waiting) - len(running)
                state = "failed" if planned in failed else "finished"
                print(f"{planned.technique}, seed {planned.seed}: {state} ({done} of {total})")
            time.sleep(0.05)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
    return failed


def _start(planned: Run, slot: Slot) -> subprocess.Popen:
    """A process for it, which takes as many threads as the slot has cores."""
    shutil.rmtree(planned.unfinished, ignore_errors=True)
    planned.unfinished.mkdir(parents=True)
    gpu = {} if slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu}
    with open(planned.unfinished / "stderr.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "speedrun.train", *planned.argv],
            env={**os.environ, **gpu},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    if slot.cores:
        os.sched_setaffinity(process.pid, slot.cores)  # its threads inherit it
    return process


def compare(results: dict[Run, Result]) -> list[dict[str, Any]]:
    """A row for each arm, ALL_ON first, then by what the technique is worth.

    std: of a sample. difference: mean loss without the technique minus that of all on, positive
    where it helps; its standard error is that of two independent samples (Welch). None: unknown.
    """
    arms: dict[str, list[tuple[int, Result]]] = {}
    for r, result in results.items():
        arms.setdefault(r.technique, []).append((r.seed, result))
    rows = []
    for name, runs in arms.items():
        losses = [result.val_loss for _, result in runs]
        times = [result.train_time_s for _, result in runs]
        rows.append(
            {
                "technique": name,
                "overrides": list(TECHNIQUES.get(name, ())),
                "seeds": [seed for seed, _ in runs],
                "val_losses": losses,
                "train_times_s": times,
                "mean": statistics.mean(losses),
                "std": statistics.stdev(losses) if len(losses) > 1 else None,
                "mean_time_s": statistics.mean(times),
            }
        )
    base = next((row for row in rows if row["technique"] == ALL_ON), None)
    for row in rows:
        known = base is not None
        spread_known = known and row["std"] is not None and base["std"] is not None
        row["difference"] = row["mean"] - base["mean"] if known else None
        row["standard_error"] = (
            math.hypot(*(r["std"] / len(r["seeds"]) ** 0.5 for r in (row, base)))
            if spread_known
            else None
        )
        row["time_ratio"] = row["mean_time_s"] / base["mean_time_s"] if known else None
    return sorted(rows, key=lambda row: (row is not base, -(row["difference"] or 0.0)))


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lines for the screen; what isn't known is left empty."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    table = [("technique off", "runs", "val loss", "± std", "- all on", "± s.e.", "time")]
    for row in rows:
        is_base = row["technique"] == ALL_ON
        table.append(
            (
                "none" if is_base else row["technique"],
                str(len(row["seeds"])),
                cell(row["mean"], "{:.4f}"),
                cell(row["std"], "± {:.4f}"),
                "" if is_base else cell(row["difference"], "{:+.4f}"),
                "" if is_base else cell(row["standard_error"], "± {:.4f}"),
                cell(row["time_ratio"], "× {:.2f}"),
            )
        )
    return text_table(table)
