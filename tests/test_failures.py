"""Signals, failures and hangs: how a run of one process and of several ends, and how fast."""

import argparse
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from speedrun import failures, hardware, peers
from speedrun import train as program
from speedrun.comms import Comms
from speedrun.failures import EXIT_STOPPED, Watchdog
from speedrun.peers import Failure, Peers, Position
from speedrun.runlog import LossQueue, RunError
from train_helpers import (
    SPLIT_PLANS,
    read_events,
    read_losses,
    start_training,
    tiny_sets,
    write_text,
)

LIMIT_S = 15  # from a fault to the end of all processes
SETS = tiny_sets(schedule__num_steps=5000, schedule__val_interval=5000)

# The training program with a fault on one rank, in the forward pass of step 7.
FAULTY = """
import argparse, ctypes, os, signal, sys, time
from pathlib import Path
from speedrun import train

FAULTS = {
    "raises": lambda: [].made_up,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(0),
    "crashes": lambda: ctypes.string_at(0),
    "sleeps": lambda: time.sleep(3600),
    "holds the GIL": lambda: ctypes.PyDLL(None).sleep(3600),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
compute = train.forward_backward

def with_fault(model, optimizer, batches, plan, *rest):
    rank, fault = os.environ["FAULT"].split(" ", 1)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (os.environ.get("RANK", "0"), plan.step, attempt) == (rank, 7, "0"):
        Path("fault").write_text(str(time.time()))
        FAULTS[fault]()
    return compute(model, optimizer, batches, plan, *rest)

train.forward_backward = with_fault
parser = argparse.ArgumentParser()
train.add_arguments(parser)
sys.exit(train.run(parser.parse_args()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a text and the faulty program."""
    folder = tmp_path_factory.mktemp("failures")
    write_text(folder / "text.txt")
    (folder / "faulty.py").write_text(FAULTY)
    return folder


# ---- What the ranks tell each other -------------------------------------------------------------


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))


def two_peers(store):
    """Of one machine, met."""
    both = [Peers(rank, 2, dist.PrefixStore("test", store), keeps_store=False) for rank in (0, 1)]
    threads = [threading.Thread(target=p.meet) for p in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return both


def test_the_first_failure_counts(store):
    a, b = two_peers(store)
    assert a.first_failure() is None
    first = Failure(1, "was first", reporter=0)
    assert a.report(first) == first
    assert b.report(Failure(0, "came later", reporter=1)) == first
    assert b.first_failure() == first
    assert a.speaks_for_machine(first) and not b.speaks_for_machine(first)


def test_missing_ranks_are_named(store):
    with pytest.raises(RunError, match=r"after 0 s there is no rank 0, 2 of 3: "):
        Peers(1, 3, dist.PrefixStore("test", store), keeps_store=False).meet(limit_s=0.1)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_process_that_ends_is_seen(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    key = dist.PrefixStore("test", store)
    value = {"machine": peers._machine(), "pid": child.pid}
    key.set("rank/1", json.dumps(value))
    one = Peers(0, 2, key, keeps_store=False)
    one.meet()
    assert one.neighbours == {1} and one.vanished() == []
    child.communicate(b"\n")
    assert one.vanished() == [1]
    Peers(1, 2, key, keeps_store=False).say_end()
    assert one.vanished() == []


def test_silence_is_measured_by_the_own_clock(store, monkeypatch):
    """Clocks of two machines may differ by more than a rank may be silent."""
    monkeypatch.setattr(peers, "STALE_S", 0.2)
    a, b = two_peers(store)
    an_hour_ago = Position("training", 3, "", None, None, 0, False, time.time() - 3600)
    b.publish(an_hour_ago)
    assert a.positions() == {1: an_hour_ago}
    assert a.silent() == set()
    time.sleep(0.3)
    b.publish(dataclasses.replace(an_hour_ago, time_s=an_hour_ago.time_s + 0.3))
    a.positions()
    assert a.silent() == set()
    time.sleep(0.3)
    a.positions()
    assert a.silent() == {1}


# ---- One process --------------------------------------------------------------------------------
@pytest.fixture
def run_here(folder, monkeypatch):
    """Runs the program in this process; a thread calls `act` with the folder once it trains."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
    monkeypatch.setattr(hardware, "num_cpus", lambda: 1)  # spinning threads disturb each other
    monkeypatch.setattr(failures, "UNSERVED_S", 60.0)  # what isn't served ends this process
    threads = torch.get_num_threads()

    def run(out, act, *words):
        def wait_and_act():
            metrics = out / "metrics.jsonl"
            while not (metrics.exists() and '"training"' in metrics.read_text()):
                time.sleep(0.01)
            act()

        parser = argparse.ArgumentParser()
        program.add_arguments(parser)
        thread = threading.Thread(target=wait_and_act, daemon=True)
        thread.start()
        words = ["--text", "text.txt", "--out", str(out), *SETS, *words]
        return program.run(parser.parse_args(words))

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_stops_between_two_steps(run_here, tmp_path, capfd, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    out = tmp_path / "run"
    assert run_here(out, lambda: os.kill(os.getpid(), number)) == EXIT_STOPPED
    err = capfd.readouterr().err
    stopped = int(re.search(r"speedrun: stopped before step (\d+)", err)[1])
    assert f"{number.name}: the run stops after this step" in err
    assert read_losses(out)[-1][:2] == ("training", stopped)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (out / "errors").exists()


def test_a_second_ctrl_c_leaves_at_once(capfd, monkeypatch):
    """But not the one that torchrun passes on when a terminal has sent it to the ranks already."""
    with Watchdog() as watchdog:
        watchdog.step(3)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert watchdog.stop_requested
        monkeypatch.setattr(failures, "AGAIN_S", 0.0)
        with pytest.raises(KeyboardInterrupt) as raised:
            signal.raise_signal(signal.SIGINT)
        assert watchdog.fail(raised.value) == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert err.endswith("speedrun: error: step 3: interrupted (SIGINT); nothing is saved\n")


def test_a_validation_that_goes_on_serves_a_signal_later():
    """The first one after many short steps: what they have trained must not be lost."""
    watchdog = Watchdog()  # not entered: no thread looks
    watchdog._main = threading.current_thread()
    watchdog.step(3)
    with watchdog.phase("validation"):
        watchdog._signal = signal.SIGTERM, time.monotonic() - 100
        watchdog.beat()
        assert watchdog._unserved() is None
        watchdog._beat -= 100
        assert "SIGTERM not served within 5 s" in watchdog._unserved().message


def test_a_signal_before_the_training_leaves_at_once():
    with Watchdog() as watchdog:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        assert not watchdog.stop_requested


# ---- Several ranks ------------------------------------------------------------------------------


class WithAnother(Comms):
    """Two ranks, of which the other one sends these losses and wishes."""

    def __init__(self, other):
        super().__init__(0, 2)
        self.other = iter(other)

    def all_reduce_sum(self, tensors):
        for tensor in tensors:
            tensor += torch.tensor(next(self.other))


class SilentLog:
    def training(self, *_):
        pass


def test_ranks_agree_to_stop():
    """Another rank's wish is known behind the step in which it came."""
    comms = WithAnother([(1.0, 0.0), (1.0, 1.0), (1.0, 0.0)])
    losses = LossQueue(lambda *_: None)
    stops = []
    for plan in list(SPLIT_PLANS)[:3]:
        losses.push(torch.tensor(1.0), plan, 0.0, comms)
        losses.log_ready(SilentLog())
        stops.append(losses.stop)
    assert stops == [False, True, True]


def run_with_fault(folder, monkeypatch, out, fault, *words):
    """(exit code, stderr, seconds from the fault to the end)"""
    monkeypatch.setenv("FAULT", fault)
    (folder / "fault").unlink(missing_ok=True)
    process = start_training(
        folder, "--text", "text.txt", "--out", out, *SETS, *words, ranks=2, module="faulty"
    )
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, err, time.time() - float((folder / "fault").read_text())


ENDS = r"was killed, or ended without a word"
HANGS = r"no progress for \d+ s: "
FAULTS = {
    "raises": r"AttributeError: 'list' object has no attribute 'made_up'",
    "is killed": ENDS,
    "exits": ENDS,
    "crashes": ENDS,
    "sleeps": HANGS + r"it hangs in <lambda> \(faulty\.py:\d+\), called by ",
    "holds the GIL": HANGS + r"its process stands still, or is in a call to C",
    "is stopped": HANGS + r"its process stands still",
}


QUICK = ("is killed", 0)


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param(fault, rank, marks=() if (fault, rank) == QUICK else pytest.mark.slow)
        for fault in FAULTS
        for rank in (0, 1)
    ],
)
def test_a_fault_ends_all_ranks(folder, monkeypatch, tmp_path, fault, rank):
    out = tmp_path / "run"
    code, err, seconds = run_with_fault(folder, monkeypatch, out, f"{rank} {fault}")
    assert code != 0 and seconds < LIMIT_S
    cause = f"step 7: {FAULTS[fault]}"
    ours = [line for line in err.splitlines() if line.startswith("speedrun: rank")]
    assert len(ours) == 1 and re.match(rf"speedrun: rank {rank}: error: {cause}", ours[0])
    # torchrun's own report comes behind it, with the same cause.
    assert re.search(rf"RankFailure: rank {rank}: {cause}", "\n".join(err.splitlines()[-30:]))
    for r in (0, 1):
        file = (out / "errors" / f"rank{r}.txt").read_text()
        dies = r == rank and fault in ("is killed", "exits", "crashes", "is stopped")
        assert dies or re.search(r"train\.py\", line \d+,? in main", file)
    if HANGS in FAULTS[fault]:
        assert re.search(rf"rank {1 - rank} waits for all_reduce of \(2,\) float32", err)


def wait_for_training(process, out):
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"training"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "Ctrl-C", "SIGTERM to rank 1"])
def test_signals_stop_all_ranks_at_the_same_step(folder, tmp_path, how):
    """A terminal's Ctrl-C reaches torchrun and the ranks, and torchrun passes it on once more."""
    out = tmp_path / "run"
    process = start_training(folder, "--text", "text.txt", "--out", out, *SETS, ranks=2)
    try:
        wait_for_training(process, out)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children]
        began = time.monotonic()
        for pid in {"Ctrl-C": [process.pid, *ranks], "SIGTERM to rank 1": [max(ranks)]}.get(
            how, [process.pid]
        ):
            os.kill(pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - began < LIMIT_S
    stopped = re.findall(r"speedrun: rank (\d): stopped before step (\d+)", err)
    assert sorted(rank for rank, _ in stopped) == ["0", "1"]
    assert {int(step) for _, step in stopped} == {read_losses(out)[-1][1]}
    assert " error: " not in err


@pytest.mark.slow
def test_a_signal_that_is_not_served(folder, monkeypatch, tmp_path):
    """One process that hangs leaves by itself, and says where it was."""
    monkeypatch.setenv("FAULT", "0 sleeps")
    (folder / "fault").unlink(missing_ok=True)
    out = tmp_path / "run"
    process = start_training(folder, "--text", "text.txt", "--out", out, *SETS, module="faulty")
    try:
        while not (folder / "fault").exists():
            assert process.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < LIMIT_S
    where = r"step 7, in <lambda> \(faulty\.py:\d+\), called by "
    assert re.search(rf"speedrun: error: {where}.*: SIGTERM not served within 5 s", err)
    assert "in with_fault" in (out / "errors" / "rank0.txt").read_text()


def start_rank(folder, port, rank, *words, module="speedrun.train"):
    """Of two, without torchrun."""
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
    return subprocess.Popen(
        [sys.executable, "-m", module, "--text", "text.txt", *map(str, words)],
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_without_torchrun(folder, monkeypatch, tmp_path, rank):
    """Rank 0 keeps the store that the ranks speak through: the other one sees it all the same."""
    monkeypatch.setenv("FAULT", f"{rank} is killed")
    port, out = free_port(), tmp_path / "run"
    processes = [start_rank(folder, port, r, "--out", out, *SETS, module="faulty") for r in (0, 1)]
    try:
        _, err = processes[1 - rank].communicate(timeout=120)
        seconds = time.time() - float((folder / "fault").read_text())
        processes[rank].communicate(timeout=10)
    finally:
        for process in processes:
            process.kill()
    assert seconds < LIMIT_S and processes[1 - rank].returncode == 1
    assert re.search(rf"speedrun: rank {rank}: error: step 7: {ENDS}.*\n$", err)


@pytest.mark.slow
def test_a_rank_that_never_comes(folder, monkeypatch, tmp_path):
    code = "import sys, speedrun.peers\nspeedrun.peers.MEET_LIMIT_S = 3.0\n" + FAULTY
    (folder / "impatient.py").write_text(code)
    monkeypatch.setenv("FAULT", "none")
    process = start_rank(folder, free_port(), 0, "--out", tmp_path / "run", module="impatient")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "speedrun: rank 0: error: after 3 s there is no rank 1 of 2: look at" in err


@pytest.mark.slow
def test_an_elastic_run_goes_on_from_its_last_checkpoint(folder, monkeypatch, tmp_path):
    """By torchrun's --max-restarts, here as its variable. The second attempt has no fault."""
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    out, sets = tmp_path / "run", tiny_sets(schedule__num_steps=20)
    code, err, _ = run_with_fault(folder, monkeypatch, out, "1 is killed", *sets, "--save-every", 2)
    assert code == 0, err
    assert re.search(rf"speedrun: rank 1: error: step 7: {ENDS}", err)
    resumed = [event["step"] for event in read_events(out) if event["event"] == "resumed"]
    assert resumed in ([4], [6])  # a checkpoint is written while training goes on
    assert read_losses(out)[-1][:2] == ("validation", 20)
