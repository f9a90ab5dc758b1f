"""What the ranks tell each other outside of collectives: where they are, and who failed first.

They write to a key-value store: torchrun's, or rank 0's where another launcher started the ranks.
Every attempt of an elastic run has keys of its own. The processes on this machine are also watched
through the kernel (pidfd, Linux), so that one that is killed is seen at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from speedrun.runlog import RunError

MEET_LIMIT_S = 120.0  # from this rank's arrival to the last one's: imports may differ by this much
GROUP_LIMIT_S = 1800.0  # of one collective; a backstop, since ranks may compile for long
ANSWER_LIMIT_S = 5.0  # of one question to the store
LAST_WAIT_S = 10.0  # of who keeps the store, for ranks that end later
STALE_S = 3.0  # a rank that was silent for longer can't run its Python threads


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a rank is."""

    phase: str
    step: int
    where: str
    waiting_for: str | None  # a collective
    last_collective: str | None  # that it began
    num_collectives: int  # begun so far
    overdue: bool
    time_s: float  # since the epoch, on that machine's clock, which others may not share

    def collectives(self) -> str:
        if self.waiting_for:
            return f"waits for {self.waiting_for} (its collective {self.num_collectives})"
        return f"began {self.num_collectives} collectives, {self.last_collective} the last"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first cause: what happened to `rank`, as `reporter` saw it."""

    rank: int
    message: str
    reporter: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}"


class Peers:
    """The ranks of a run that have met. Methods raise dist.DistError where the store is gone."""

    def __init__(self, rank: int, world_size: int, store: dist.Store, keeps_store: bool) -> None:
        self.rank, self.world_size, self.keeps_store = rank, world_size, keeps_store
        self._group_store = store
        # Another connection: a question of the process group may keep its own one busy.
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=ANSWER_LIMIT_S))
        self.machines: list[str] = []
        self._processes: dict[int, int] = {}  # pidfd of each other rank on this machine
        self._news: dict[int, tuple[Position, float]] = {}  # and when this rank first saw it

    def meet(self, limit_s: float | None = None) -> None:
        """Wait until every rank is there; RunError names those that are not."""
        limit_s = MEET_LIMIT_S if limit_s is None else limit_s
        own = {"machine": _machine(), "pid": os.getpid()}
        self._store.set(f"rank/{self.rank}", json.dumps(own))
        missing, deadline = set(range(self.world_size)), time.monotonic() + limit_s
        while missing := {r for r in missing if not self._store.check([f"rank/{r}"])}:
            if time.monotonic() > deadline:
                raise RunError(
                    f"after {limit_s:.0f} s there is no rank {', '.join(map(str, sorted(missing)))}"
                    f" of {self.world_size}: look at that machine, or start fewer ranks"
                )
            time.sleep(0.02)
        found = [json.loads(self._store.get(f"rank/{r}")) for r in range(self.world_size)]
        self.machines = [entry["machine"] for entry in found]
        for r, entry in enumerate(found):
            if r != self.rank and entry["machine"] == own["machine"] and hasattr(os, "pidfd_open"):
                try:
                    self._processes[r] = os.pidfd_open(entry["pid"])
                except ProcessLookupError:
                    raise RunError(f"rank {r} ended as soon as it was there") from None

    def init_process_group(self, backend: str) -> None:
        """With all of them, over this store; RunError names ranks that never came."""
        self.meet()
        dist.init_process_group(
            backend,
            store=self._group_store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=GROUP_LIMIT_S),
        )

    def report(self, failure: Failure) -> Failure:
        """Tell the others; gives the first failure, which may be another one."""
        value = json.dumps(dataclasses.asdict(failure))
        return Failure(**json.loads(self._store.compare_set("first", "", value)))

    def first_failure(self) -> Failure | None:
        if not self._store.check(["first"]):
            return None
        return Failure(**json.loads(self._store.get("first")))

    def publish(self, position: Position) -> None:
        self._store.set(f"at/{self.rank}", json.dumps(dataclasses.asdict(position)))

    def positions(self) -> dict[int, Position]:
        """By rank, of those that published one."""
        ranks = [r for r in range(self.world_size) if self._store.check([f"at/{r}"])]
        found = {r: Position(**json.loads(self._store.get(f"at/{r}"))) for r in ranks}
        for r, position in found.items():
            if r not in self._news or self._news[r][0] != position:
                self._news[r] = position, time.monotonic()
        return found

    def silent(self) -> set[int]:
        """Ranks without a new position for `STALE_S`, by this rank's clock.

        Counted from the first call of `positions`, which must be called all the while.
        """
        now = time.monotonic()
        return {r for r, (_, since) in self._news.items() if now - since > STALE_S}

    def say_end(self) -> None:
        """Say that this rank is about to end and knows it."""
        self._store.set(f"ended/{self.rank}", "")
        self.has_ended(self.rank)  # `set` doesn't wait for the server, an answer comes behind it

    def has_ended(self, rank: int) -> bool:
        return self._store.check([f"ended/{rank}"])

    def wait_for_ends(self, ranks: set[int], limit_s: float) -> set[int]:
        """Those of them that didn't say that they end within the limit."""
        deadline = time.monotonic() + limit_s
        while ranks := {r for r in ranks if not self.has_ended(r)}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return ranks

    def vanished(self) -> list[int]:
        """Ranks of this machine whose process is gone without having said so."""
        poll = select.poll()
        rank_of = {pidfd: rank for rank, pidfd in self._processes.items()}
        for pidfd in rank_of:
            poll.register(pidfd, select.POLLIN)
        gone = sorted(rank_of[pidfd] for pidfd, _ in poll.poll(0))
        try:
            return [r for r in gone if not self.has_ended(r)]
        except dist.DistError:
            return gone

    @property
    def neighbours(self) -> set[int]:
        """The other ranks on this machine that can be signalled."""
        return set(self._processes)

    def speaks_for_machine(self, failure: Failure) -> bool:
        """Whether this rank shows the failure: who reports it, and one rank of other machines."""
        if not self.machines:  # they didn't meet
            return True
        machine = self.machines[self.rank]
        if self.machines[failure.reporter] == machine:
            return self.rank == failure.reporter
        return self.rank == self.machines.index(machine)

    def send(self, rank: int, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._processes[rank], number)
        except ProcessLookupError:
            pass

    def leave_in_peace(self) -> None:
        """This rank is done. Who keeps the store waits for the others, who may still ask it."""
        with contextlib.suppress(dist.DistError):
            self.say_end()
            if self.keeps_store:
                self.wait_for_ends(set(range(self.world_size)), LAST_WAIT_S)
        for pidfd in self._processes.values():
            os.close(pidfd)


def connect(rank: int, world_size: int, environment: Mapping[str, str]) -> Peers:
    """The store at MASTER_ADDR and MASTER_PORT; RunError where there is none."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    hosts = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=hosts,
            timeout=timedelta(seconds=MEET_LIMIT_S),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        what = "is the port taken?" if hosts else f"is rank 0 there, on {address}?"
        raise RunError(
            f"no store for the ranks at MASTER_ADDR={address} MASTER_PORT={port}; {what} "
            f"({str(error).splitlines()[0]})"
        ) from None
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Peers(rank, world_size, dist.PrefixStore(f"speedrun/{attempt}", store), hosts)


def _machine() -> str:
    """Equal for processes that see each other's process numbers."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
