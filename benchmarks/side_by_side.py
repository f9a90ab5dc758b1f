"""Our training program and modded-nanogpt's on the same tokens and the same device, in turns.

Each program is started once, since the peer compiles for minutes: first ours, up to its first
validation, then the peer. From there on one of them waits in a validation, when its clock stands,
while the other trains up to its next one. So the stretches between validations are interleaved
rounds, and each is timed by the program's own clock, which waits for the device at both ends. Both
are in the device's memory at once.

A stage's first stretch isn't counted: the first of the run has the prefix table in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np
import torch

from benchmarks import peer_program
from benchmarks.report import ROOT
from speedrun._numpy_loader import HEADER_BYTES
from speedrun.config import NUM_PARTS, Config, ConfigError
from speedrun.data import DataFormat, find_shards, read_format
from speedrun.record_logs import LoggedRun, read_runs
from speedrun.runlog import RunError
from speedrun.shards import MAX_SHARD_TOKENS, write_shards

PROGRAM_FILES = ("train_gpt.py", "triton_kernels.py", "dc_triton_kernels.py")
SHARD_END_TOKENS = 100_000  # more than are left at a shard's end: none is reached
LIMIT_S = 3600.0  # that a turn may take; the peer's first one compiles
PEAK = re.compile(r"^peak memory allocated: (\d+) MiB", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ShortSchedule:
    """Steps of each stage, the extension's last, and of a stretch between two validations."""

    stage_steps: tuple[int, ...]
    val_interval: int

    @property
    def num_steps(self) -> int:
        """Scheduled ones, as both programs say: without the extension."""
        return sum(self.stage_steps[:-1])

    @property
    def ends(self) -> list[int]:
        return list(itertools.accumulate(self.stage_steps))

    def our_words(self, config: Config) -> list[str]:
        """Values for --set. ConfigError for a recipe with other stages than the peer's."""
        schedule = config.schedule
        if schedule.extension is None or len(schedule.stages) != len(self.stage_steps) - 1:
            raise ConfigError(
                f"recipe {config.name} has {len(schedule.stages)} stages and "
                f"{'no' if schedule.extension is None else 'an'} extension; beside the peer it "
                f"needs {len(self.stage_steps) - 1} and an extension, as record_089 has"
            )
        fracs = [end / self.num_steps for end in self.ends[:-1]]
        words = [
            f"schedule.num_steps={self.num_steps}",
            f"schedule.extension_steps={self.stage_steps[-1]}",
            f"schedule.stage_ends={','.join(map(repr, fracs))}",
            f"schedule.val_interval={self.val_interval}",
            f"data.val_tokens={self.val_tokens(config)}",
        ]
        if 0 < schedule.untie_frac < 1:  # the peer parts head and embedding at its last stage
            words.append(f"schedule.untie_frac={fracs[-2]!r}")
        return words

    def peer_fields(self, config: Config) -> dict[str, int]:
        return {
            "num_scheduled_iterations": self.num_steps,
            "num_extension_iterations": self.stage_steps[-1],
            "val_loss_every": self.val_interval,
            "val_tokens": self.val_tokens(config),
        }

    @property
    def peer_durations(self) -> tuple[float, ...]:
        return tuple(steps / self.num_steps for steps in self.stage_steps[:-1])

    @staticmethod
    def val_tokens(config: Config) -> int:
        """Of a validation: one part for each micro-batch, the least that both can do."""
        return NUM_PARTS * config.data.val_tokens_per_part


# ---- Tokens ----------------------------------------------------------------------------------


def write_tokens(source: Path, root: Path, config: Config, schedule: ShortSchedule) -> Path:
    """The shards of `source`, again and again if they are few, as one that lasts for the schedule.

    One, since the programs treat what is left at a shard's end differently. In
    root/data/fineweb10B, where the peer looks, with a second one that it loads ahead, and the
    vocabulary; returns that folder. DataError for shards that aren't.
    """
    folder, data_format = root / "data" / "fineweb10B", read_format(source)
    train, val = (find_shards(source, split) for split in ("train", "val"))
    lengths = np.array([len(document) + 1 for document in _documents(train[:1], data_format)])
    needed = 0.0  # a stage cuts documents at its own length, and a part its last one
    stages = [*config.schedule.stages, config.schedule.extension]
    for stage, steps in zip(stages, schedule.stage_steps, strict=True):
        dealt, part = np.minimum(lengths, stage.max_seq_len), stage.tokens_per_step / NUM_PARTS
        cut = lengths.sum() / dealt.sum() * (1 + dealt.mean() / part)
        needed += 1.1 * steps * stage.tokens_per_step * cut
    needed += SHARD_END_TOKENS
    options = dict(format=data_format, tokens_per_shard=MAX_SHARD_TOKENS)
    write_shards(folder, "fineweb", "train", _repeated(train, data_format, needed), **options)
    shutil.copy(train[0], folder / "fineweb_train_999999.bin")
    needed = schedule.val_tokens(config) + SHARD_END_TOKENS
    write_shards(folder, "fineweb", "val", _repeated(val, data_format, needed), **options)
    for path in source.glob("*.tiktoken"):
        shutil.copy(path, folder)
    return folder


def _documents(shards: list[Path], data_format: DataFormat) -> Iterator[np.ndarray]:
    """uint16 tokens without their BOS."""
    for path in shards:
        tokens = np.fromfile(path, "<u2", offset=HEADER_BYTES)
        starts = np.flatnonzero(tokens == data_format.bos_id)
        for start, end in itertools.pairwise([*starts, len(tokens)]):
            yield tokens[start + 1 : end]


def _repeated(
    shards: list[Path], data_format: DataFormat, num_tokens: float
) -> Iterator[np.ndarray]:
    """Documents until they have so many tokens."""
    written = 0
    while True:
        for document in _documents(shards, data_format):
            yield document
            written += len(document) + 1
            if written >= num_tokens:
                return


# ---- Programs --------------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    """One that runs in `folder`, whose output is in the file output.txt there."""

    name: str
    folder: Path
    process: subprocess.Popen
    turns: Connection
    started: float = dataclasses.field(default_factory=time.monotonic)
    seconds_to_turn: float = math.nan  # the first one

    def wait_for_turn(self) -> bool:
        """Until it has reached its next turn, or its end (False). RunError where it fails."""
        deadline = time.monotonic() + LIMIT_S
        while not self.turns.poll(0.1) and self.process.poll() is None:
            if time.monotonic() > deadline:
                raise RunError(f"{self.name}: no turn after {LIMIT_S:.0f} s; {self._output()}")
        try:
            if not self.turns.poll():
                raise EOFError
            self.turns.recv()
        except (EOFError, ConnectionError):
            self.wait_for_end()
            return False
        if math.isnan(self.seconds_to_turn):
            self.seconds_to_turn = time.monotonic() - self.started
        return True

    def wait_for_end(self) -> None:
        """RunError where it fails."""
        if code := self.process.wait():
            raise RunError(f"{self.name}: exit code {code}; {self._output()}")

    def _output(self) -> str:
        """Where it is, and its last lines."""
        path = self.folder / "output.txt"
        lines = path.read_text(errors="replace").splitlines()[-12:]
        return "\n  ".join([f"the end of {path}:", *lines])

    @property
    def peak_mib(self) -> int | None:
        found = PEAK.search((self.folder / "output.txt").read_text(errors="replace"))
        return found and int(found[1])

    @property
    def changes(self) -> list[str]:
        """What the peer was given that the record's run has otherwise."""
        return json.loads((self.folder / "changes.json").read_text())

    def run(self) -> LoggedRun:
        """Its log. LogError where there is none."""
        (run,) = read_runs(self.folder / LOG_FOLDERS[self.name])
        return run


LOG_FOLDERS = {"ours": "run", "peer": "logs"}


@contextlib.contextmanager
def started(name: str, folder: Path, arguments: list[str]) -> Iterator[Program]:
    """`python -m` the arguments in `folder`; `{turn}` in them is the connection to it. Ended with
    all its children when the block is left, by SIGTERM too: nothing stays on the device."""
    folder.mkdir(parents=True)
    ours, theirs = Pipe()
    command = [part.replace("{turn}", str(theirs.fileno())) for part in arguments]
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    theirs.close()  # so that its end shows in ours
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield Program(name, folder, process, ours)
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ours.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of programs that run our training: what is trained, how, and where the results go."""
    parser.add_argument("--recipe", default="record_089")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--compile", default="auto", help="as of speedrun train (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )


def our_arguments(words: list[str], *options: str) -> list[str]:
    """words: for --set; options: of training and of our_program."""
    return ["benchmarks.our_program", "--out=run", *options, *(f"--set={word}" for word in words)]


def peer_arguments(folder: Path, settings: peer_program.Settings, *options: str) -> list[str]:
    """Writes the settings beside the folder that the program is to be started in."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(folder.name + "_settings.json")
    path.write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    return ["benchmarks.peer_program", *options, str(path.resolve())]


def check_peer(folder: Path) -> Path:
    """Its program. ConfigError where a file isn't there."""
    for name in PROGRAM_FILES:
        if not (folder / name).is_file():
            raise ConfigError(
                f"--peer {folder}: there is no {name}; name a folder with modded-nanogpt's "
                f"{', '.join(PROGRAM_FILES)}"
            )
    return (folder / PROGRAM_FILES[0]).resolve()


def take_turns(ours: Program, start_peer: Callable[[], Program]) -> Program:
    """Both to their ends, one at a time; gives the peer's. It starts when ours waits first."""
    running = [ours] if ours.wait_for_turn() else []
    peer = start_peer()
    running += [peer] if peer.wait_for_turn() else []
    while running:
        for program in list(running):
            program.turns.send(None)
            if not program.wait_for_turn():
                running.remove(program)
    return peer


def rounds_ms(run: LoggedRun, schedule: ShortSchedule) -> list[list[float]]:
    """By stage: milliseconds a step of each stretch between validations, but the stage's first.

    RunError where the log lacks a validation.
    """
    times_s = {v.step: v.train_time_s for v in run.validations}
    found = []
    for end, steps in zip(schedule.ends, schedule.stage_steps, strict=True):
        at = range(end - steps + schedule.val_interval, end + 1, schedule.val_interval)
        if missing := [step for step in at if times_s.get(step) is None]:
            raise RunError(f"{run.name}: no time of a validation at step {missing[0]}")
        found.append(
            [
                (times_s[after] - times_s[before]) * 1e3 / (after - before)
                for before, after in itertools.pairwise(at)
            ]
        )
    return found


# ---- The comparison --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Milliseconds a step, by stage and round, of the two programs."""

    stages: tuple[str, ...]
    ours_ms: list[list[float]]
    peer_ms: list[list[float]]
    start_s: dict[str, float]  # from the command to the end of the first validation
    peak_mib: dict[str, int | None]
    changes: list[str]

    def ratios(self, stage: int) -> list[float]:
        """Our time over the peer's, round by round."""
        pairs = zip(self.ours_ms[stage], self.peer_ms[stage], strict=True)
        return [ours / peer for ours, peer in pairs]

    def cells(self) -> list[tuple[str, ...]]:
        rows = []
        for i, stage in enumerate(self.stages):
            ratios = self.ratios(i)
            figures = []
            for samples in (self.ours_ms[i], self.peer_ms[i]):
                low, high = min(samples), max(samples)
                figures.append(f"{statistics.median(samples):.2f} ({low:.2f} to {high:.2f})")
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            rows.append((stage, *figures, f"{statistics.median(ratios):.3f}", spread))
        return rows


COMPARISON_HEADER = ("stage", "ours, ms a step", "peer, ms a step", "ours / peer", "of rounds")


def compare(
    folder: Path,
    peer: Path,
    source: Path,
    config: Config,
    rounds: int,
    steps_a_round: int,
    options: list[str],
) -> Comparison:
    """Both programs in `folder`, on the tokens of `source`. options: of our training program.

    ConfigError, DataError and RunError say what is wrong and where the outputs are.
    """
    num_stages = len(config.schedule.stages) + 1
    schedule = ShortSchedule((steps_a_round * (rounds + 1),) * num_stages, steps_a_round)
    words, program = schedule.our_words(config), check_peer(peer)
    tokens = write_tokens(source, folder / "tokens", config, schedule)
    with contextlib.ExitStack() as stack:
        command = our_arguments(words, "--turn={turn}", f"--data={tokens}", "--keep=0", *options)
        ours = stack.enter_context(started("ours", folder / "ours", command))

        def start_peer() -> Program:
            settings = peer_program.Settings(
                program=str(program),
                tokens=str(folder / "tokens"),
                changes="changes.json",
                hyperparameters=schedule.peer_fields(config),
                durations=schedule.peer_durations,
            )
            command = peer_arguments(folder / "peer", settings, "--turn={turn}")
            return stack.enter_context(started("peer", folder / "peer", command))

        programs = {"ours": ours, "peer": take_turns(ours, start_peer)}
    return Comparison(
        stages=(*(str(i + 1) for i in range(num_stages - 1)), "extension"),
        ours_ms=rounds_ms(programs["ours"].run(), schedule),
        peer_ms=rounds_ms(programs["peer"].run(), schedule),
        start_s={name: program.seconds_to_turn for name, program in programs.items()},
        peak_mib={name: program.peak_mib for name, program in programs.items()},
        changes=programs["peer"].changes,
    )
