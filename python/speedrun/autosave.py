"""When a run writes checkpoints, and from which of them it goes on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun import checkpoint
from speedrun.checkpoint import CheckpointError, Damaged, Manifest
from speedrun.comms import Comms
from speedrun.config import Config, ConfigError, to_dict
from speedrun.data import LoaderPosition
from speedrun.estimate import Precision
from speedrun.failures import Stopped
from speedrun.guards import Guard
from speedrun.optim import Optimizer
from speedrun.preflight import MOST_DIFFERENCES, flat, shard_facts
from speedrun.runlog import Clock, LossQueue, RunLog, environment
from speedrun.schedule import StepPlan
from speedrun.sources import DataSource

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAVE_S = 600.0  # that writing may take, before a run counts as hanging
SMALL_BYTES = 100_000_000  # of state: the end of such a run is saved without being asked for
# Settings that a run may go on with otherwise: what it shows and looks at, not what it computes.
FREE = ("config.log_interval", "config.guards.", "config.target_loss", "config.schedule.val_")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: anew, or behind a checkpoint.

    folder: of the run that goes on; None: a new one. notes: for its log.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return 0 if self.manifest is None else self.manifest.step

    @property
    def position(self) -> LoaderPosition:
        return LoaderPosition() if self.manifest is None else self.manifest.position


def find_start(args: argparse.Namespace, comms: Comms) -> Start:
    """What --resume means, for all ranks: rank 0 looks. ConfigError, CheckpointError on all."""
    resume, out = args.resume, args.out
    if min(args.save_every, args.keep) < 0 or args.save_every > 0 == args.keep:
        raise ConfigError(
            f"--save-every {args.save_every} --keep {args.keep}: they can't be negative, and what "
            "is saved has to be kept: --keep 1 or more"
        )
    if resume is None:
        return Start()
    if resume == "auto" and out is None:
        raise ConfigError("--resume auto: needs --out, the folder of the run to go on with")
    found: Start | CheckpointError | None = None
    if comms.rank == 0:
        try:
            found = _find(resume, out)
        except CheckpointError as error:
            found = error
    found = comms.gather_objects(found)[0]
    if isinstance(found, CheckpointError):
        raise found
    return found


def _find(resume: str, out: str | None) -> Start:
    path = Path(out if resume == "auto" else resume)
    if checkpoint.NAME.fullmatch(path.name):
        return Start(None, path, checkpoint.verified(path))
    notes: list[str] = []
    goes_on = resume == "auto" or out is None or Path(out).resolve() == path.resolve()
    if goes_on:
        checkpoint.clean(path)
    for folder in checkpoint.checkpoints_of(path):
        try:
            manifest = checkpoint.verified(folder)
        except Damaged as error:
            notes.append(f"left out: {error}")
            if goes_on:
                _put_aside(folder)
        else:
            return Start(path if goes_on else None, folder, manifest, tuple(notes))
    if resume != "auto":
        why = "; ".join(notes) or "neither a checkpoint (step-…) nor the folder of a run with one"
        raise CheckpointError(f"--resume {path}: {why}")
    return Start(path if (path / "log.txt").exists() else None, notes=tuple(notes))


def _put_aside(folder: Path) -> None:
    """A damaged checkpoint, so that it doesn't count among the newest, which are kept."""
    bad = folder.with_name(folder.name + checkpoint.BAD)
    shutil.rmtree(bad, ignore_errors=True)
    os.replace(folder, bad)


def describe(
    seed: int, config: Config, data: DataSource, precision: Precision, comms: Comms
) -> Manifest:
    """The manifest of a run at its start."""
    facts = dict(flat("config", to_dict(config))) | {"--seed": seed, **vars(precision)}
    facts |= shard_facts(data)
    return Manifest(
        step=0,
        world_size=comms.world_size,
        elapsed_s=0.0,
        position=LoaderPosition(),
        config=config,
        format=data.format,
        precision=precision,
        facts={key: str(value) for key, value in facts.items() if not key.startswith(FREE)},
        trends={},
        environment=environment(),
    )


def check_same_run(where: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """CheckpointError that lists what isn't the same."""
    keys = dict.fromkeys([*saved, *now])
    lines = [
        f"{key.removeprefix('config.')}: {saved.get(key, 'missing')} in the checkpoint, "
        f"{now.get(key, 'missing')} now"
        for key in keys
        if saved.get(key) != now.get(key)
    ]
    if lines:
        more = len(lines) - MOST_DIFFERENCES
        lines = [*lines[:MOST_DIFFERENCES], *([f"{more} more"] if more > 0 else [])]
        raise CheckpointError(
            f"{where}: is of another run; go on with the recipe, --set, --seed and data that it "
            "was made with, or start anew without --resume\n  " + "\n  ".join(lines)
        )


class Checkpoints:
    """Saves a run, in a thread beside it, one checkpoint at a time.

    args: save_every, of steps; 0: when it is stopped, and at the end if it is small; keep, of the
    newest ones; 0: nothing is ever saved. described: of `describe`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        described: Manifest,
        optimizer: Optimizer,
        guard: Guard,
        log: RunLog,
    ) -> None:
        self.every, self.keep, self.described = args.save_every, args.keep, described
        self.optimizer, self.guard, self.log = optimizer, guard, log
        self.comms, self.folder = guard.comms, guard.folder
        self.saved_step: int | None = None  # of the newest, or of that on its way
        if self.every > 0:  # takes a second, which no step should
            import torch.distributed.checkpoint  # noqa: F401
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    @functools.cached_property
    def group(self) -> ProcessGroup | None:
        """Made where it is first needed, by all ranks at once."""
        return self.comms.host_group()

    def restore(self, start: Start, clock: Clock) -> None:
        """Put the state of a checkpoint into the run. CheckpointError where it is another's."""
        if start.manifest is None:
            return
        check_same_run(start.checkpoint, start.manifest.facts, self.described.facts)
        where = (self.comms.rank, self.comms.world_size, self.group)
        notes = checkpoint.load(start.checkpoint, start.manifest, self.optimizer, *where)
        self.guard.trend.restore(start.manifest.trends["checked"])
        self.guard.logged_trend.restore(start.manifest.trends["logged"])
        clock.elapsed_s = start.manifest.elapsed_s
        self.saved_step = None if start.folder is None else start.step
        for note in notes:
            self.log.say(note)

    def before_step(
        self, plan: StepPlan, position: LoaderPosition, clock: Clock, losses: LossQueue
    ) -> None:
        """Save the run where that is due. Stopped, when it is saved, where a rank is to stop.

        CheckpointError if the checkpoint on its way has failed.
        """
        if self._pending is not None and self._pending[1].done():
            self.wait()
        stops = losses.stop and not plan.last
        if stops and self.keep == 0:
            raise Stopped(f"stopped before step {plan.step}; nothing is saved (--keep 0)")
        if stops or (self.every > 0 and plan.step % self.every == 0 and plan.step > 0):
            losses.log_all(self.log)  # a loss that isn't finite ends the run here, unsaved
            self.save(plan.step, position, clock)
        if stops:
            self.wait()
            raise Stopped(
                f"stopped before step {plan.step}; saved: the same command with "
                f"--resume {self.folder} goes on"
            )

    def save(self, step: int, position: LoaderPosition, clock: Clock) -> None:
        """Copy the state of the run before `step`, and begin to write it. position: its batch's.

        Waits for the checkpoint before; CheckpointError if that has failed.
        """
        if step == self.saved_step:
            return
        self.wait()
        manifest = dataclasses.replace(
            self.described,
            step=step,
            position=position,
            elapsed_s=clock.now_s(),
            trends={
                "checked": self.guard.trend.state(),
                "logged": self.guard.logged_trend.state(),
            },
        )
        folder, self.saved_step = checkpoint.folder_of(self.folder, step), step
        with self.guard.watchdog.phase("copying for a checkpoint", allowed_s=SAVE_S):
            state = checkpoint.host_copy(self.optimizer, self.comms.rank, self.group)
        inputs = (folder, state, manifest, self.comms.rank, self.group)
        self._pending = folder, self._thread.submit(self._write, *inputs)

    def _write(self, folder: Path, *inputs) -> None:
        checkpoint.write(folder, *inputs)
        if self.comms.rank == 0:
            checkpoint.keep_newest(self.folder, self.keep)

    def wait(self) -> None:
        """For the checkpoint on its way. CheckpointError if it has failed."""
        if self._pending is not None:
            (folder, future), self._pending = self._pending, None
            with self.guard.watchdog.phase("writing a checkpoint", allowed_s=SAVE_S):
                future.result()
            self.log.say(f"checkpoint: {folder}")

    def finish(self, plan: StepPlan, position: LoaderPosition, clock: Clock) -> None:
        """Save the end of a run that is saved at all, or is small.

        CheckpointError if that fails; where nobody asked for it, a line in the log.
        """
        num_bytes = sum(state.tensor.nbytes for state in self.optimizer.state().values())
        if self.keep > 0 and (self.every > 0 or num_bytes < SMALL_BYTES):
            self.save(plan.step, position, clock)
        try:
            self.wait()
        except CheckpointError as error:
            if self.every > 0:
                raise
            self.log.say(f"warning: {error}")
