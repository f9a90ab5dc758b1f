"""30 training steps of the largest recipe: does the loss fall, how long does a step take.

    python -m benchmarks.training_check --json FILE [--data DIR] [--device cpu|cuda] [--recipe NAME]
                                        [--compile off|regional|full] [--set KEY=VALUE]

Tokens: the shards of --data, again and again if there are few; else made-up ones, of 200 words that
come up as rarely as their rank, so that there is something to learn. Validates before the first and
after the last step, on eight parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import write_json
from speedrun import recipes, train
from speedrun.config import NUM_PARTS, Config, ModelConfig
from speedrun.data import BYTES, GPT2
from speedrun.runlog import Clock
from speedrun.schedule import Schedule
from speedrun.shards import write_splits

NUM_STEPS = 30
DOCUMENT_TOKENS = 700
STARTED = time.monotonic()


def largest_recipe() -> str:
    """By the tokens of its largest step times the width and depth of its model; of the recipes with
    the model that the operators are for."""
    sizes = {}
    for name in recipes.names():
        config = recipes.load(name)
        if isinstance(config.model, ModelConfig):
            tokens = max(stage.tokens_per_step for stage in config.schedule.stages)
            sizes[name] = tokens * config.model.model_dim**2 * len(config.model.layers)
    return min(sizes, key=lambda name: (-sizes[name], name))


def write_made_up_shards(folder: Path, config: Config, num_steps: int = NUM_STEPS) -> None:
    """Enough for no token to come twice, in the recipe's own format; bytes where it takes any."""
    largest = max(stage.tokens_per_step for stage in config.schedule.stages)
    validation = NUM_PARTS * config.data.val_tokens_per_part
    format = GPT2 if config.data.default == "fineweb" else BYTES
    random = np.random.default_rng(0)
    words = np.arange(1, 201)
    shares = 1 / words / (1 / words).sum()
    for split, tokens in (("train", num_steps * largest), ("val", 2 * validation)):
        documents = (
            (split, random.choice(words, DOCUMENT_TOKENS, p=shares).astype(np.uint16))
            for _ in range(NUM_PARTS + tokens // DOCUMENT_TOKENS)
        )
        write_splits(folder, "madeup", documents, format, splits=(split,))


def step_times_ms(events: list[dict], schedule: Schedule) -> dict[str, float]:
    """Stage -> median time of its steps."""
    times = [0.0] + [e["train_time_s"] for e in events if e["event"] == "training"]
    by_stage: dict[str, list[float]] = {}
    for step, (before, after) in enumerate(itertools.pairwise(times)):
        by_stage.setdefault(str(schedule.stage_of(step)), []).append((after - before) * 1e3)
    return {stage: statistics.median(values) for stage, values in by_stage.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of token shards")
    parser.add_argument("--recipe", choices=recipes.names(), default=largest_recipe())
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--compile", default="auto", help="as of speedrun train (auto)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    started: list[float] = []

    class NotedClock(Clock):
        """Notes when training time first starts: all shapes are compiled and tried by then."""

        def start(self) -> None:
            super().start()
            started.append(time.monotonic())

    train.Clock = NotedClock
    config = recipes.load(args.recipe)
    changes = [f"schedule.val_interval={config.schedule.total_steps}", *args.set]
    if config.data.val_tokens is not None:
        at_most = NUM_PARTS * config.data.val_tokens_per_part  # of --data, which may hold few
        changes[:0] = ["data.val_tokens=None", f"data.val_tokens_at_most={at_most}"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if folder is None:
            folder = Path(scratch, "data")
            write_made_up_shards(folder, config)
            if config.schedule.prefix_loss:  # made-up tokens are no texts
                changes.insert(0, "schedule.prefix_loss=false")
        options = argparse.ArgumentParser()
        train.add_arguments(options)
        command = ["--recipe", args.recipe, "--steps", str(NUM_STEPS), "--data", str(folder)]
        command += ["--repeat-data", "--device", args.device, "--out", f"{scratch}/run"]
        command += ["--compile", args.compile]
        command += [f"--set={change}" for change in changes]
        train_args = options.parse_args(command)
        code = train.run(train_args)
        if code:
            return code
        lines = Path(scratch, "run", "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    losses = [e["val_loss"] for e in events if e["event"] == "validation"]
    train_losses = [e["train_loss"] for e in events if e["event"] == "training"]
    result = {
        "recipe": args.recipe,
        "changes": changes,
        "data": "real" if args.data else "made up",
        "compile": args.compile,
        "steps": NUM_STEPS,
        "first_val_loss": losses[0],
        "last_val_loss": losses[-1],
        "train_losses": train_losses,
        "step_ms_by_stage": step_times_ms(events, Schedule(train.configure(train_args).schedule)),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "seconds_to_first_step": started[0] - STARTED,
    }
    write_json(args.json, result)
    print(json.dumps(result, indent=1))
    if not losses[-1] < losses[0]:
        print(f"the loss did not fall: {losses[0]} to {losses[-1]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
