"""Whether our program and modded-nanogpt's learn alike: from the same weights, on the same tokens.

    python -m benchmarks.loss_parity --peer FOLDER --data DIR --out DIR [--steps 200,50,50,50]
                                     [--seeds 2] [--recipe NAME] [--set KEY=VALUE] [--json FILE]

For each seed the peer trains first, and its start weights are saved (peer_program.py); ours starts
from them. --steps are those of each stage, the extension's last. A table by stage: how far the
training losses are apart, beside how far two seeds of the same program are; and loss_parity.png.

Each run that is complete stays in --out: the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import peer_program, report
from benchmarks.side_by_side import (
    ShortSchedule,
    add_arguments,
    check_peer,
    our_arguments,
    peer_arguments,
    started,
    write_tokens,
)
from speedrun import recipes
from speedrun.config import Config, ConfigError
from speedrun.data import DataError
from speedrun.overrides import apply_overrides
from speedrun.plot import COLORS
from speedrun.runlog import RunError

PROGRAMS = ("peer", "ours")  # in this order, for each seed
Losses = dict[tuple[str, int], list[float]]  # of each training step, by program and seed
HEADER = (
    "stage",
    "ours − peer",
    "|ours − peer|",
    "largest",
    "|seed − seed| of the peer",
    "of ours",
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of training losses in a stage: means over steps and seeds."""

    stage: str
    signed: float  # ours less the peer's, of the same start weights
    absolute: float
    largest: float
    between_seeds: Mapping[str, float | None]  # |difference| of two, by program; None: of one seed

    def cells(self) -> tuple[str, ...]:
        numbers = (self.absolute, self.largest, *(self.between_seeds[p] for p in PROGRAMS))
        shown = ("-" if number is None else f"{number:.5f}" for number in numbers)
        return (self.stage, f"{self.signed:+.5f}", *shown)


def differences(losses: Losses, schedule: ShortSchedule) -> list[Difference]:
    """By stage. RunError where a run has another number of losses than steps."""
    for (program, seed), values in losses.items():
        if len(values) != schedule.ends[-1]:
            raise RunError(
                f"{program}, seed {seed}: {len(values)} training losses in its log, not "
                f"{schedule.ends[-1]}; delete its folder and run it again"
            )
    seeds = sorted({seed for _, seed in losses})
    found = []
    starts = [0, *schedule.ends[:-1]]
    for i, (start, end) in enumerate(zip(starts, schedule.ends, strict=True)):

        def apart(one: tuple[str, int], other: tuple[str, int], start=start, end=end):
            pairs = zip(losses[one][start:end], losses[other][start:end], strict=True)
            return [a - b for a, b in pairs]

        paired = [d for seed in seeds for d in apart(("ours", seed), ("peer", seed))]
        absolute = [abs(d) for d in paired]
        between = {}
        for program in PROGRAMS:
            pairs = itertools.combinations([(program, seed) for seed in seeds], 2)
            spread = [abs(d) for pair in pairs for d in apart(*pair)]
            between[program] = statistics.fmean(spread) if spread else None
        stage = "extension" if end == schedule.ends[-1] else f"{i + 1}"
        figures = (statistics.fmean(paired), statistics.fmean(absolute), max(absolute))
        found.append(Difference(stage, *figures, between))
    return found


def arguments_of(
    args: argparse.Namespace, config: Config, schedule: ShortSchedule, program: str, seed: int
) -> list[str]:
    """Of a run, for `started`."""
    tokens, weights = args.out / "tokens", args.out / f"seed_{seed}_weights.pt"
    if program == "ours":
        data = tokens / "data" / "fineweb10B"
        options = [f"--weights={weights}", f"--data={data}", f"--recipe={args.recipe}", "--keep=0"]
        options += [f"--device={args.device}", f"--compile={args.compile}"]
        return our_arguments([*args.set, *schedule.our_words(config)], *options)
    settings = peer_program.Settings(
        program=str(check_peer(args.peer)),
        tokens=str(tokens),
        changes="changes.json",
        hyperparameters=schedule.peer_fields(config),
        durations=schedule.peer_durations,
        seed=seed,
        weights=str(weights),
        losses="losses.json",
    )
    return peer_arguments(folder_of(args.out, program, seed), settings)


def folder_of(out: Path, program: str, seed: int) -> Path:
    return out / f"seed_{seed}_{program}"


def run_both(args: argparse.Namespace, config: Config, schedule: ShortSchedule) -> Losses:
    """The losses of all runs, of which those that are missing are made."""
    tokens = args.out / "tokens"
    if not tokens.exists():
        unfinished = args.out / "tokens_unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_tokens(args.data, unfinished, config, schedule)
        unfinished.rename(tokens)
    found = {}
    for seed, program in itertools.product(range(args.seeds), PROGRAMS):
        folder = folder_of(args.out, program, seed)
        if not (folder / "losses.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            print(f"{program}, seed {seed}, in {folder}", flush=True)
            arguments = arguments_of(args, config, schedule, program, seed)
            with started(program, folder, arguments) as running:
                running.wait_for_end()
            if program == "ours":
                write_losses(folder)
        found[program, seed] = json.loads((folder / "losses.json").read_text())
    return found


def write_losses(folder: Path) -> None:
    """Of our run in `folder`, as the peer's are written."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    losses = [event["train_loss"] for event in events if event["event"] == "training"]
    (folder / "losses.json").write_text(json.dumps(losses) + "\n")


def draw(losses: Losses, schedule: ShortSchedule, path: Path) -> None:
    """The curves, and below them the differences. ImportError where matplotlib is absent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, apart = figure.subplots(nrows=2, sharex=True)
    seeds = sorted({seed for _, seed in losses})
    for (program, seed), values in losses.items():
        color, style = COLORS[PROGRAMS.index(program)], "-" if seed == seeds[0] else ":"
        curves.plot(values, color=color, linestyle=style, label=f"{program}, seed {seed}")
    pairs = [(f"ours − peer, seed {seed}", ("ours", seed), ("peer", seed)) for seed in seeds]
    for program in PROGRAMS:
        pairs += [(f"{program}, seed {s} − seed 0", (program, s), (program, 0)) for s in seeds[1:]]
    for i, (label, one, other) in enumerate(pairs):
        values = [a - b for a, b in zip(losses[one], losses[other], strict=True)]
        apart.plot(values, color=COLORS[i % len(COLORS)], linewidth=1, label=label)
    for axes in (curves, apart):
        for end in schedule.ends[:-1]:
            axes.axvline(end, color="gray", linewidth=0.5)
        axes.grid(alpha=0.3)
        axes.legend()
    curves.set_ylabel("training loss (nats per token)")
    apart.set_ylabel("difference")
    apart.set_xlabel("step; lines: stages")
    figure.savefig(path, dpi=120)


def same_settings(folder: Path, settings: dict) -> None:
    """Keeps what --out is of. ConfigError where it is of something else."""
    path = folder / "settings.json"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        different = [name for name in settings if old.get(name) != settings[name]]
        raise ConfigError(
            f"--out {folder}: holds runs of other {', '.join(different)}; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def steps_of(text: str) -> tuple[int, ...]:
    """ArgumentTypeError unless it is a list of even numbers."""
    try:
        steps = tuple(int(word) for word in text.split(","))
    except ValueError:
        steps = ()
    if not steps or any(number < 2 or number % 2 for number in steps):
        raise argparse.ArgumentTypeError(
            f"{text!r}: even numbers, one a stage and one for the extension, such as 200,50,50,50"
        )
    return steps


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.loss_parity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--peer", type=Path, required=True, metavar="FOLDER", help="modded-nanogpt")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="token shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all runs")
    parser.add_argument("--steps", type=steps_of, default=(200, 50, 50, 50), help="200,50,50,50")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each (2)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    args.out, args.peer, args.data = (p.resolve() for p in (args.out, args.peer, args.data))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    schedule = ShortSchedule(args.steps, math.gcd(*args.steps))
    settings = {"recipe": args.recipe, "set": args.set, "steps": list(args.steps)}
    settings |= {"peer": str(args.peer), "data": str(args.data), "device": args.device}
    try:
        config = apply_overrides(recipes.load(args.recipe), args.set)
        schedule.our_words(config)  # whether its stages fit
        check_peer(args.peer)
        same_settings(args.out, settings)
        losses = run_both(args, config, schedule)
        found = differences(losses, schedule)
    except (ConfigError, DataError, RunError) as problem:
        print(f"loss_parity: {problem}", file=sys.stderr)
        return 1
    print(report.markdown_table(HEADER, [difference.cells() for difference in found]))
    try:
        draw(losses, schedule, args.out / "loss_parity.png")
        print(f"curves: {args.out / 'loss_parity.png'}")
    except ImportError:
        print("no picture: matplotlib is missing (pip install 'nanogpt-speedrun[cli]')")
    if args.json:
        by_run = {f"{program}, seed {seed}": values for (program, seed), values in losses.items()}
        content = {"stages": [dataclasses.asdict(one) for one in found], "losses": by_run}
        changes = json.loads((args.out / "seed_0_peer" / "changes.json").read_text())
        facts = report.environment() | settings | {"changes_of_the_peer": changes}
        report.write_json(args.json, facts | content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
