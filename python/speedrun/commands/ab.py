"""Is command B faster than command A on this machine? Interleaved runs, and a verdict."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speedrun import hardware
from speedrun._text_table import text_table
from speedrun.ab_statistics import (
    FALSE_POSITIVE_RATE,
    NOT_SHOWN,
    Comparison,
    block_log_ratio,
    compare,
    plan_blocks,
)
from speedrun.record_logs import TIME
from speedrun.record_rules import RecordError, scipy_stats
from speedrun.runlog import environment

METRICS = ("wall", "train_time", "step_avg")
OUTPUT_LINES = 20  # of a failed command, that are shown
STOP_TIMEOUT_S = 20  # for a command to end by itself after SIGTERM
GPU_INTERVAL_S = 5.0
GPU_KEYS = ("clocks.sm", "temperature.gpu")


class AbError(ValueError):
    """What the comparison can't go on with; the message names it and the fix."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"On equal commands at most {FALSE_POSITIVE_RATE:.0%} of the verdicts are other than "
        "'not shown'. That holds for a number of runs that was chosen before: looking and going "
        "on until a verdict comes has no such rate, so a file goes on only with its own options."
    )
    parser.add_argument("--a", required=True, metavar="CMD", help="what to compare with, for sh")
    parser.add_argument("--b", required=True, metavar="CMD", help="what may be faster")
    parser.add_argument(
        "--runs",
        type=int,
        default=10,
        metavar="N",
        help="of each in the A/B blocks, two a block (default: 10)",
    )
    parser.add_argument(
        "--noise-blocks",
        type=int,
        default=3,
        metavar="N",
        help="A/A blocks, of four runs of A each (default: 3)",
    )
    parser.add_argument(
        "--warm-up", type=int, default=1, metavar="N", help="runs of each, discarded (default: 1)"
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="wall",
        help="the command's whole time (default), or the last 'train_time:…' or 'step_avg:…' that "
        "it prints",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="every run, written after each; the same command with this file goes on "
        "(default: runs/ab_TIME.json)",
    )


def run(args: argparse.Namespace) -> int:
    """0 with any verdict; 1 if a command failed or the comparison can't be; 130 if stopped."""
    path = args.json or Path("runs", time.strftime("ab_%Y-%m-%d_%H%M%S.json"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return _ab(args, path)
    except (AbError, RecordError) as error:
        print(f"speedrun ab: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"; the same command with --json {path} goes on" if path.exists() else ""
        print(f"speedrun ab: stopped{kept}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _ab(args: argparse.Namespace, path: Path) -> int:
    if args.runs < 4 or args.runs % 2:
        raise AbError(f"--runs {args.runs}: must be even, two a block, and at least 4")
    if args.noise_blocks < 2:
        raise AbError(f"--noise-blocks {args.noise_blocks}: must be at least 2")
    if args.warm_up < 0:
        raise AbError(f"--warm-up {args.warm_up}: must be 0 or more")
    scipy_stats()  # that it is missing is known before the hours of runs
    state = _open_state(args, path)
    commands = {"A": args.a, "B": args.b}
    blocks = plan_blocks(args.runs // 2, args.noise_blocks)[len(state["blocks"]) :]
    warm_up = "AB" * args.warm_up if blocks else ""
    num_runs = len(warm_up) + 4 * len(blocks)
    print(
        f"{num_runs} runs: {len(warm_up)} to warm up, {args.runs // 2} A/B blocks, "
        f"{args.noise_blocks} A/A blocks ({len(state['blocks'])} blocks measured before); "
        f"metric {args.metric}; in {path}",
        flush=True,
    )
    began, done = time.monotonic(), 0

    def measure(what: str, side: str) -> dict[str, Any]:
        nonlocal done
        measured, output = run_once(side, commands[side], args.metric)
        done += 1
        left_s = (time.monotonic() - began) / done * (num_runs - done)
        print(
            f"run {done} of {num_runs}, {what}, {side}: {measured['seconds']:.4g} s; "
            f"about {left_s:.0f} s left",
            flush=True,
        )
        if done == 1 and args.metric == "wall" and last_time("train_time", output):
            print("it prints train_time: --metric train_time leaves start and compilation out")
        return measured

    for side in warm_up:
        state["warm_up"].append({"side": side, **measure("warm-up", side)})
        _write(path, state)
    for kind, order in blocks:
        block = {"kind": kind, "order": order, "runs": []}
        state["blocks"].append(block)
        for place in order:
            side = "A" if kind == "A/A" else place
            block["runs"].append({"side": side, **measure(f"{kind} block {order}", side)})
            _write(path, state)
    result = judge(state["blocks"])
    state["result"] = dataclasses.asdict(result)
    _write(path, state)
    print(format_report(state, result))
    print(f"every run: {path}")
    return 0


def _open_state(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What is in the file, without an unfinished block, or a new state. AbError: of another one."""
    plan = {
        key: getattr(args, key) for key in ("a", "b", "metric", "runs", "noise_blocks", "warm_up")
    }
    plan["folder"] = os.getcwd()
    plan["environment"] = {k: v for k, v in environment().items() if k != "command"}
    new = {"plan": plan, "warm_up": [], "blocks": [], "interrupted_blocks": []}
    if not path.exists():
        _write(path, new)
        return new
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        before = {**state["plan"], **state["plan"]["environment"]}
        blocks = [(block, len(block["runs"]) == 4) for block in state["blocks"]]
    except (ValueError, KeyError, TypeError, OSError):
        raise AbError(
            f"--json {path}: is there and no file of speedrun ab; name another, or delete it"
        ) from None
    now = {**plan, **plan["environment"]}
    different = [
        f"{key} {before.get(key)!r}, not {now[key]!r}"
        for key in now
        if key != "environment" and before.get(key) != now[key]
    ]
    if different:
        raise AbError(
            f"--json {path}: holds runs with {'; '.join(different)}: what isn't alike can't be "
            "compared; name another file"
        )
    # A pause within a block may change the machine's speed: such a block is measured again.
    state["blocks"] = [block for block, finished in blocks if finished]
    state["interrupted_blocks"] += [block for block, finished in blocks if not finished]
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    """The whole file or the one before, never a part."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise AbError(
            f"--json {path}: can't be written ({error.strerror}); name another file"
        ) from None


def run_once(side: str, command: str, metric: str) -> tuple[dict[str, Any], str]:
    """Run a shell command. Gives its time, the GPUs' state meanwhile, and what it printed.

    AbError, with the end of its output, if it fails or doesn't print the metric's time. If this is
    interrupted, the command and all that it started are stopped too.
    """
    with tempfile.TemporaryFile() as file, GpuWatch() as gpus:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, shell=True, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait()
            wall_s = time.perf_counter() - began
        finally:
            if process.returncode is None:
                _stop(process)
        file.seek(0)
        output = file.read().decode(errors="replace")
    tail = "\n".join(output.splitlines()[-OUTPUT_LINES:])
    if process.returncode:
        raise AbError(f"--{side.lower()} {command!r} failed, code {process.returncode}:\n{tail}")
    seconds, resolution_s = wall_s, 0.0
    if metric != "wall":
        found = last_time(metric, output)
        if found is None or not found[0] > 0:
            raise AbError(
                f"--{side.lower()} {command!r}: prints no {metric} above 0, such as "
                f"'{metric}:1234ms'; choose another --metric. Its output ends:\n{tail}"
            )
        seconds, resolution_s = found
    measured = {
        "seconds": seconds,
        "resolution_s": resolution_s,
        "wall_s": wall_s,
        "gpus": gpus.summary(),
    }
    return measured, output


def _stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(STOP_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue


def last_time(metric: str, output: str) -> tuple[float, float] | None:
    """Seconds of the last `METRIC:12.34ms` or `METRIC:1.234s`, and of its last digit; or None."""
    *_, last = [None, *re.finditer(rf"\b{metric}:{TIME.pattern}", output)]
    if last is None:
        return None
    unit_s = 1e-3 if last[2] == "ms" else 1.0
    decimals = len(last[1].partition(".")[2])
    return float(last[1]) * unit_s, unit_s / 10**decimals


class GpuWatch:
    """Asks the driver for clocks and temperatures while a command runs; nothing without GPUs."""

    def __enter__(self) -> GpuWatch:
        self.samples: list[list[dict[str, str]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ended = self._ended.wait(GPU_INTERVAL_S)
            if not ended or not self.samples:  # of a short command at its end
                self.samples.append(hardware.gpu_states(GPU_KEYS))
            if ended or not self.samples[-1]:
                return

    def summary(self) -> list[dict[str, float | None]]:
        """For each GPU the median clock in MHz and the highest temperature in °C; None: unknown."""
        found = []
        for gpu in zip(*self.samples, strict=False):
            clocks, temperatures = (_numbers(state[key] for state in gpu) for key in GPU_KEYS)
            found.append(
                {
                    "sm_clock_mhz": statistics.median(clocks) if clocks else None,
                    "temperature_c": max(temperatures, default=None),
                }
            )
        return found


def _numbers(values: Iterable[str]) -> list[float]:
    """Of "1980 MHz"; without those that the driver doesn't know ("[N/A]")."""
    found = [re.match(r"\d+(\.\d+)?", value) for value in values]
    return [float(number[0]) for number in found if number]


def judge(blocks: Sequence[dict[str, Any]]) -> Comparison:
    """The verdict on measured blocks, as they are in the file."""
    ratios: dict[str, list[float]] = {"A/B": [], "A/A": []}
    for block in blocks:
        seconds = [r["seconds"] for r in block["runs"]]
        ratios[block["kind"]].append(block_log_ratio(block["order"], seconds))
    runs = [r for block in blocks for r in block["runs"]]
    resolution = max(r["resolution_s"] / r["seconds"] for r in runs)
    return compare(ratios["A/B"], ratios["A/A"], resolution)


def format_report(state: dict[str, Any], result: Comparison) -> str:
    """Lines for the screen: a row a side, the ratio, the verdict."""
    metric = state["plan"]["metric"]
    rows = [("", "runs", "median s", "min s", "max s", "SM clock MHz", "hottest °C")]
    kinds = [block["kind"] for block in state["blocks"]]
    for kind, side in (("A/B", "A"), ("A/B", "B"), ("A/A", "A")):
        runs = [
            r
            for block in state["blocks"]
            if block["kind"] == kind
            for r in block["runs"]
            if r["side"] == side
        ]
        times = [r["seconds"] for r in runs]
        clocks, temperatures = (
            [gpu[key] for r in runs for gpu in r["gpus"] if gpu[key] is not None]
            for key in ("sm_clock_mhz", "temperature_c")
        )
        rows.append(
            (
                f"{side} in {kind} blocks",
                str(len(runs)),
                *(f"{value:.5g}" for value in (statistics.median(times), min(times), max(times))),
                f"{statistics.mean(clocks):.0f}" if clocks else "-",
                f"{max(temperatures):.0f}" if temperatures else "-",
            )
        )
    return (
        f"{text_table(rows)}\n"
        f"{metric} of B / A: {result.ratio:.4f}, {1 - FALSE_POSITIVE_RATE:.0%} interval "
        f"{result.low:.4f} to {result.high:.4f} ({kinds.count('A/B')} A/B blocks); noise floor "
        f"±{result.noise_floor:.2%} ({kinds.count('A/A')} A/A blocks)\n"
        + verdict_text(result, kinds.count("A/B"), kinds.count("A/A"))
    )


def verdict_text(result: Comparison, num_ab: int, num_aa: int) -> str:
    """And of NOT_SHOWN, which effects would have been found, and what it takes for that found."""
    if result.verdict != NOT_SHOWN:
        return f"verdict: B is {result.verdict}"
    hides = "the noise floor hides" if result.floor_limits else "the scatter of A/B blocks hides"
    found = f"{math.expm1(abs(math.log(result.ratio))):.2%}, as here"
    if result.blocks_needed is None:
        more = f"no number of runs here would show one of {found}"
    else:
        planned = zip(result.blocks_needed, (num_ab, num_aa), strict=True)
        blocks, noise_blocks = (max(needed, before) for needed, before in planned)
        more = (
            f"for one of {found}, if it is real: a new comparison with --runs {2 * blocks} "
            f"--noise-blocks {noise_blocks} ({2 * (blocks - num_ab)} and {noise_blocks - num_aa} "
            "more)"
        )
    return (
        f"verdict: {NOT_SHOWN}; so many runs show an effect of {result.detectable:.2%} or more "
        f"about 4 times in 5, {hides} smaller ones\n{more}"
    )
