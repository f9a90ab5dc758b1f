"""Signals, failures and hangs: a run stops between steps, or all its ranks leave within seconds.

A thread beside the training watches three things, four times a second:

* SIGINT and SIGTERM. They ask the loop to stop between steps (`stop_requested`; runlog.LossQueue
  lets all ranks do so before the same step). If that doesn't happen within `UNSERVED_S`, or
  one and a half of the longest round of the loop so far, the process leaves without saving.
* The other ranks (peers.py): one that failed, or whose process is gone.
* Progress: each step, and each batch of a validation, is a beat. Where none came for `HANG_S`, or
  ten times the longest gap so far, on every rank that can still say so, the run hangs. Before the
  training nothing is expected, since compilation may take minutes; until a phase has a gap of its
  own, the whole warm-up's time is the limit.

Who leaves writes what it knows to RUN/errors/rankN.txt and to torchrun's error file, waits a moment
for the others on its machine and kills those that can't leave by themselves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import speedrun
from speedrun.comms import Comms
from speedrun.config import ConfigError
from speedrun.data import DataError
from speedrun.peers import Failure, Peers, Position
from speedrun.runlog import RunError

PACKAGE = Path(speedrun.__file__).parent

EXIT_ERROR = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command may go on
EXIT_SIGNAL = 128  # + the signal's number, as shells say it: left without saving
EXIT_CODES = (
    "exit codes: 0 done; 1 failed; 2 wrong usage; 75 stopped between two steps by SIGINT or "
    "SIGTERM; 130, 143 left at once by SIGINT, SIGTERM"
)

POLL_S = 0.25
UNSERVED_S = 5.0
HANG_S = 10.0
HANG_FACTOR = 10.0
WATCH_FRAC = 0.5  # of the limit, from which on the other ranks' positions are followed
GRACE_S = 1.5  # for the other ranks of this machine to leave by themselves
CAUSE_S = 2.0  # how long a rank whose collective broke looks for the rank that broke it
AGAIN_S = 1.0  # torchrun passes a terminal's Ctrl-C on, which its ranks have had already


FOR_USERS = (ConfigError, DataError, RunError)  # their messages need no traceback


class Stopped(Exception):
    """The run stopped between two steps, as a signal asked. The message says what was saved."""


class RankFailure(Exception):
    """For torchrun's error file: the first failure of the run."""


class Watchdog:
    """One a process, in `with`. Its methods are for the main thread.

    rank: as torchrun numbers it, for messages; None without torchrun. hang_timeout_s: seconds
    without progress; None: as the module says, where there are several ranks; 0: never.
    """

    def __init__(self, rank: int | None = None, hang_timeout_s: float | None = None) -> None:
        self.hang_timeout_s = hang_timeout_s
        self._stop_since: float | None = None  # when a signal asked for it
        self._peers: Peers | None = None
        self._rank, self._comms = rank, Comms()
        self._has_store = False
        self._step, self._phase, self._allowed_s = -1, "start", None
        self._began = self._beat = self._round = time.monotonic()
        self._longest: dict[str, float] = {}  # gap between two beats, by phase
        self._longest_round = 0.0  # of the training loop
        self._signal: tuple[signal.Signals, float] | None = None
        self._leaving = threading.Lock()  # taken once, by the thread that ends the process
        self._file: TextIO | None = None
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Watchdog:
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a crash in C prints its traceback
        self._main = threading.current_thread()
        self._wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        self._wake_end = wake_end
        # Python's handlers wait for the main thread, which may be inside a collective; the byte
        # that they put into this pipe does not.
        self._old_wakeup = signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The process may end now, at its own pace."""
        self._leaving.acquire()
        self._end_thread()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._wake_end)
        if self._peers is not None:
            self._peers.leave_in_peace()
        if self._file is not None:
            faulthandler.unregister(signal.SIGUSR1)
            _close_if_empty(self._file)

    # What the program asks and tells.

    @property
    def stop_requested(self) -> bool:
        """Whether this rank had a signal that asks the loop to stop."""
        return self._stop_since is not None

    def join(self, peers: Peers, comms: Comms) -> None:
        """Watch these ranks from now on."""
        self._peers, self._comms, self._has_store = peers, comms, True

    def log_to(self, folder: Path) -> None:
        """Tracebacks go to `folder`/errors, on SIGUSR1 too."""
        path = folder / "errors" / f"rank{self._rank or 0}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1, encoding="utf-8")
        except OSError as error:  # on a host without the run's folder
            self._print(f"warning: no tracebacks in {path} ({error.strerror})", self._rank)
            return
        faulthandler.register(signal.SIGUSR1, self._file, all_threads=True)

    def step(self, step: int) -> None:
        """The loop begins this step. From the first call on, progress is expected."""
        now = time.monotonic()
        if self._step < 0:
            self._longest["start"] = now - self._began
        else:
            self._longest_round = max(self._longest_round, now - self._round)
        self._round = now
        self._enter("training")
        self._step = step

    def beat(self) -> None:
        """Progress inside a phase."""
        now = time.monotonic()
        self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), now - self._beat)
        self._beat = now

    @contextlib.contextmanager
    def phase(self, name: str, allowed_s: float | None = None) -> Iterator[None]:
        """What the loop does for a while; `allowed_s` without a beat, where that is known."""
        before = self._phase
        self._enter(name, allowed_s)
        yield
        self._enter(before)

    def _enter(self, phase: str, allowed_s: float | None = None) -> None:
        if phase == self._phase:
            self.beat()
        self._beat, self._phase, self._allowed_s = time.monotonic(), phase, allowed_s

    def fail(self, error: BaseException) -> int:
        """End the run by this exception; gives the exit code, where there are no other ranks.

        Otherwise they hear of it, and the process ends here without destructors, which might wait
        for them. What isn't for the user is shown with its traceback.
        """
        code, message = EXIT_ERROR, str(error)
        if isinstance(error, KeyboardInterrupt):
            code = EXIT_SIGNAL + signal.Signals[str(error) or "SIGINT"]
            message = f"interrupted ({error}); nothing is saved"
        elif not isinstance(error, FOR_USERS):
            message = f"{type(error).__name__}: {error}"
        if self._step >= 0 and not message.startswith("step "):
            message = f"step {self._step}: {message}"
        self._leaving.acquire()
        self._end_thread(1.0)  # what it asks a lost store would be printed behind the cause
        try:
            own = Failure(self._rank or 0, message, self._rank or 0)
            if self._peers is None:
                self._show(own, error)
                return code
            try:
                cause = self._other_cause(self._patience(error))
            except RuntimeError:  # dist.DistError
                cause = self._lost_store()
            self._leave(cause or self._report(own), code, error)
        finally:
            self._leaving.release()

    def _patience(self, error: BaseException) -> float:
        """Seconds in which another rank may say something better.

        What a collective says is seldom the cause; and what all ranks find, rank 0 says best.
        """
        if isinstance(error, FOR_USERS):
            return CAUSE_S if self._rank and isinstance(error, RunError) else 0.0
        return CAUSE_S if isinstance(error, RuntimeError) else 0.0

    # The thread.

    def _end_thread(self, limit_s: float | None = None) -> None:
        """The caller holds `_leaving`."""
        os.write(self._wake_end, b"\0")
        self._thread.join(limit_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread. Before the training and at the second Ctrl-C it leaves at once."""
        if self._leaving.locked():
            return
        first = self._stop_since is None
        again = number == signal.SIGINT and not first
        if self._step < 0 or (again and time.monotonic() - self._stop_since > AGAIN_S):
            raise KeyboardInterrupt(signal.Signals(number).name)
        if first:
            self._stop_since = time.monotonic()

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._leaving.locked():
            readable, *_ = select.select([self._wake], [], [], POLL_S)
            if readable:
                self._note_signals(os.read(self._wake, 64))
            # A process that was stopped itself (Ctrl-Z, a machine asleep) has missed nothing.
            missed = time.monotonic() - seen - POLL_S
            self._beat += missed if missed > 4 * POLL_S else 0.0
            seen = time.monotonic()
            try:
                found = self._look()
            except RuntimeError:  # dist.DistError: who kept the store has ended
                found = self._lost_store(), EXIT_ERROR
            if found is not None and self._leaving.acquire(blocking=False):
                self._leave(*found)

    def _note_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in self._old_handlers and self._signal is None:
                self._signal = signal.Signals(number), time.monotonic()
                if not self._rank and self._step >= 0 and not self._leaving.locked():
                    self._print(
                        f"{self._signal[0].name}: the run stops after this step; "
                        "Ctrl-C once more leaves at once"
                    )

    def _look(self) -> tuple[Failure, int] | None:
        """A reason to leave, and the exit code."""
        if self._peers is not None:
            if (cause := self._other_cause()) is not None:
                return cause, EXIT_ERROR
            self._peers.publish(self._position())
            if self._overdue(WATCH_FRAC):
                self._peers.positions()  # so that it is known who is silent
        if (failure := self._unserved()) is not None:
            return failure, EXIT_SIGNAL + self._signal[0]
        if self._overdue() and (failure := self._hang()) is not None:
            return self._report(failure), EXIT_ERROR
        return None

    def _unserved(self) -> Failure | None:
        if self._signal is None:
            return None
        number, since = self._signal
        limit = max(UNSERVED_S, 1.5 * self._longest_round, self._allowed_s or 0.0)
        if self._phase == "validation":  # the first takes longer than any round before: it goes on
            since = max(since, self._beat)
        if time.monotonic() - since < limit:
            return None
        where = f"{self._at()}, in {self._where()}"
        message = f"{where}: {number.name} not served within {limit:.0f} s; nothing is saved"
        return Failure(self._rank or 0, message, self._rank or 0)

    def _limit(self) -> float | None:
        """Seconds without a beat after which this rank is overdue; None: any number."""
        if self._step < 0 or self.hang_timeout_s == 0:
            return None
        if self._allowed_s is not None or self.hang_timeout_s is not None:
            return self._allowed_s or self.hang_timeout_s
        if self._peers is None:
            return None
        usual = self._longest.get(self._phase)
        return max(HANG_S, self._longest["start"] if usual is None else HANG_FACTOR * usual)

    def _overdue(self, frac: float = 1.0) -> bool:
        """Whether this part of the limit is over."""
        limit = self._limit()
        return limit is not None and time.monotonic() - self._beat > frac * limit

    def _hang(self) -> Failure | None:
        """The rank that hangs; None while another one is busy with something that may take long."""
        problem = f"{self._at()}: no progress for {time.monotonic() - self._beat:.0f} s"
        if self._peers is None:
            return Failure(0, f"{problem}: it hangs in {self._where()}", 0)
        ranks, silent = self._peers.positions(), self._peers.silent()
        if not all(p.overdue or r in silent for r, p in ranks.items()):
            return None

        def innocence(rank: int) -> tuple[bool, bool, int]:
            p = ranks[rank]
            return rank not in silent, p.waiting_for is not None, p.num_collectives

        rank = min(ranks, key=innocence)
        where = f"it hangs in {ranks[rank].where}"
        if rank in silent:
            where = f"its process stands still, or is in a call to C; last {ranks[rank].where}"
        lines = [f"{problem}: {where}"]
        lines += [f"rank {r} {p.collectives()}" for r, p in ranks.items()]
        return Failure(rank, "\n  ".join(lines), self._rank)

    def _position(self) -> Position:
        return Position(
            phase=self._phase,
            step=self._step,
            where=self._where(),
            waiting_for=self._comms.calls.waiting_for,
            last_collective=self._comms.calls.last,
            num_collectives=self._comms.calls.num_begun,
            overdue=self._overdue(),
            time_s=time.time(),
        )

    def _at(self) -> str:
        """For messages, like "step 7, validation"."""
        if self._step < 0:
            return "before the training"
        return f"step {self._step}" + (f", {self._phase}" if self._phase != "training" else "")

    def _where(self) -> str:
        """The main thread's innermost function, and the innermost two of this package."""
        stack = traceback.extract_stack(sys._current_frames()[self._main.ident])
        own = [frame for frame in stack if Path(frame.filename).parent == PACKAGE]
        frames = [stack[-1], *reversed(own[-2:])]
        names = [f"{f.name} ({Path(f.filename).name}:{f.lineno})" for f in frames]
        return ", called by ".join(dict.fromkeys(names))

    # The end.

    def _other_cause(self, limit_s: float = 0.0) -> Failure | None:
        """The failure or the loss of another rank, if it is known within this time."""
        deadline = time.monotonic() + limit_s
        while True:
            if (first := self._peers.first_failure()) is not None:
                return first
            if gone := self._peers.vanished():
                return self._report(self._killed(gone[0]))
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S / 10)

    def _report(self, failure: Failure) -> Failure:
        """Tell the other ranks; gives the first failure."""
        try:
            return self._peers.report(failure)
        except (AttributeError, RuntimeError):  # there are none, or no store any more
            return failure

    def _killed(self, rank: int) -> Failure:
        message = "was killed, or ended without a word (out of memory? a crash? see dmesg)"
        return Failure(rank, f"{self._at()}: {message}", self._rank)

    def _lost_store(self) -> Failure:
        self._has_store = False  # each further question would print a trace of C++
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline:  # a process that dies loses its connections first
            if gone := self._peers.vanished():
                return self._killed(gone[0])
            time.sleep(POLL_S / 10)
        message = f"{self._at()}: torchrun, or rank 0, which kept the ranks' store, is gone"
        return Failure(self._rank, message, self._rank)

    def _leave(self, first: Failure, code: int, error: BaseException | None = None) -> NoReturn:
        """Say why, take the ranks of this machine along, end the process. Holds `_leaving`.

        error: what this rank raised, if it did.
        """
        positions = {}
        if self._has_store:
            with contextlib.suppress(RuntimeError):
                self._peers.say_end()
                positions = self._peers.positions()
        if self._file is not None:
            lines = [str(first), *(f"rank {r}: {p}" for r, p in positions.items())]
            lines += traceback.format_exception(error) if error else []
            self._file.write("\n".join(lines) + "\n")
            faulthandler.dump_traceback(self._file, all_threads=True)
        self._show(first, error)
        if self._peers is not None:
            self._take_along()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def _take_along(self) -> None:
        """Kill the ranks of this machine that can't leave; they write their tracebacks first."""
        left = self._peers.neighbours
        if self._has_store:
            with contextlib.suppress(RuntimeError):
                left = self._peers.wait_for_ends(left, GRACE_S)
        else:
            time.sleep(GRACE_S)
        for number in (signal.SIGUSR1, signal.SIGKILL) if left else ():
            for rank in left:
                self._peers.send(rank, number)
            time.sleep(POLL_S)

    def _show(self, first: Failure, error: BaseException | None) -> None:
        """On the screen, once a machine, and to torchrun's error file, on every rank.

        With the traceback of a bug, where this rank is the first cause.
        """
        if first.rank != (self._rank or 0) or isinstance(error, (*FOR_USERS, KeyboardInterrupt)):
            error = None
        try:
            raise RankFailure(str(first)) from error
        except RankFailure as failure:
            get_error_handler().record_exception(failure)
        if self._peers is None or self._peers.speaks_for_machine(first):
            trace = "".join(traceback.format_exception(error)) if error else ""
            self._print(f"error: {first.message}", first.rank, trace)

    def _print(self, line: str, rank: int | None = None, trace: str = "") -> None:
        who = "speedrun" if self._rank is None else f"speedrun: rank {rank or 0}"
        with contextlib.suppress(OSError):
            print(f"{trace}{who}: {line}", file=sys.stderr, flush=True)


def _close_if_empty(file: TextIO) -> None:
    """Close it; a file without a word is removed, and its folder with the last one."""
    file.close()
    path = Path(file.name)
    if path.stat().st_size == 0:
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()
