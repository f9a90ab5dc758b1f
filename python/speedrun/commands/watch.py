"""Follow a run in the terminal: step, losses beside the target, speed, time left."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from speedrun.record_logs import LogError
from speedrun.run_state import Follower, RunState, sparkline

PLAIN_S = 10.0  # between two lines, where the output is no terminal
POLL_S = 1.0
SPARK_WIDTH = 50  # of the last two thirds of the steps: the fall before would flatten them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit code: 0 where the run is done, or Ctrl-C ended the watching; 1 where it ended early."
    )
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="folder of the run (default: the one in runs/ that wrote last)",
    )
    parser.add_argument("--once", action="store_true", help="say where it is, and end")


def run(args: argparse.Namespace) -> int:
    """1 where there is no run, or it ended early, else 0."""
    try:
        folder = args.run or newest_run(Path("runs"))
        return watch(folder, args.once, sys.stdout.isatty())
    except LogError as error:
        print(f"speedrun watch: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 0


def newest_run(folder: Path) -> Path:
    """LogError where there is none."""
    found = list(folder.glob("*/metrics.jsonl"))
    if not found:
        raise LogError(f"{folder}/: no run in it; give the folder of one")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def watch(folder: Path, once: bool, terminal: bool) -> int:
    """Until the run ends; 1 if that was early, else 0."""
    follower, state = Follower(folder), RunState()
    num_drawn, said, said_s = 0, "", float("-inf")
    while True:
        for event in follower.new_events():
            state.add(event)
        if not state.header:
            if once or state.steps or state.validations:
                raise LogError(f"{follower.path}: has no header, or not yet, so it is no run's")
            time.sleep(POLL_S)
            continue
        title, where, warning = status(folder, state, follower.quiet_s())
        if terminal and not once:
            lines = [title, *where, spark_line(state), *warning]
            width = shutil.get_terminal_size().columns - 1  # a longer line would take two
            back = f"\x1b[{num_drawn}A\x1b[J" * bool(num_drawn)
            print(back + "\n".join(line[:width] for line in lines), flush=True)
            num_drawn = len(lines)
        else:
            line = "; ".join([*where, *warning])
            due = once or state.finished or time.monotonic() - said_s >= PLAIN_S
            if due and line != said:
                print(f"{title}\n{line}" if not said else line, flush=True)
                said, said_s = line, time.monotonic()
        if once or state.finished:
            return 1 if state.ended and state.reason else 0
        time.sleep(POLL_S)


def status(folder: Path, state: RunState, quiet_s: float) -> tuple[str, list[str], list[str]]:
    """What run it is; how it goes, a line a subject; what is wrong or how it ended, if anything."""
    header = state.header
    title = (
        f"{folder}: {header['config']['name']}, seed {header['seed']}, {header['world_size']} x "
        f"{header['device']}"
    )
    where = [f"step {state.step} of {state.total_steps} ({state.step / state.total_steps:.0%})"]
    if state.steps:
        last = state.steps[-1]
        where[0] += f", {duration(last['train_time_s'])} of training"
        where.append(f"training loss {last['train_loss']:.4f}")
    if state.validations:
        where.append(validation_text(state))
    tokens_per_s, left_s = state.recent("tokens"), state.seconds_left()
    if left_s is not None and not state.finished:
        speed = "" if tokens_per_s is None else f"{tokens_per_s:,.0f} tokens/s, "
        where.append(f"{speed}{1e3 / state.recent('step'):.4g} ms a step, {duration(left_s)} left")
    return title, where, [*warnings(folder, state, quiet_s)]


def validation_text(state: RunState) -> str:
    """The last one, beside the target, which the last of all has to reach."""
    last, target = state.validations[-1], state.target
    text = f"validation loss {last['val_loss']:.4f} at step {last['step']}"
    if target is None:
        return text
    above = last["val_loss"] - target
    if above > 0:
        return f"{text}, {above:.4f} above the target {target:.4f}"
    first = next(v["step"] for v in state.validations if v["val_loss"] <= target)
    return f"{text}; the target {target:.4f} was reached at step {first}"


def warnings(folder: Path, state: RunState, quiet_s: float) -> Iterator[str]:
    if state.num_warnings:
        yield f"{state.num_warnings} outliers or steps left out: see {folder}/log.txt"
    if state.finished:
        yield f"ended early: {state.reason}" if state.reason else "done"
    elif quiet_s > state.quiet_limit_s():
        errors = sorted(folder.glob("errors/rank*.txt"))
        where = f"; see {errors[0]}" if errors else ""
        yield f"nothing for {duration(quiet_s)}: it hangs, or its process is gone{where}"
    elif not state.validations:
        yield "warming up: kernels are compiled, which may take minutes"


def spark_line(state: RunState) -> str:
    losses = [event["train_loss"] for event in state.steps]
    shown = losses[len(losses) // 3 :]
    return f"{sparkline(shown, SPARK_WIDTH)} of the last {len(shown)} steps" if shown else ""


def duration(seconds: float) -> str:
    """ "59 s", "1 min 05 s", "2 h 03 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {seconds - 60 * minutes:02.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
