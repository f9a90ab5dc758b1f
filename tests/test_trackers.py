"""--tensorboard, --wandb, --trackio, with stand-ins for the packages: what they get, and what a run
does where they are missing, fail or hang."""

import argparse
import sys
import threading
import types
import warnings

import pytest

from speedrun import cli, trackers
from speedrun.runlog import RunError, RunLog
from train_helpers import tiny_sets, write_text

NAMES = list(trackers.TRACKERS)


class StandIn:
    """All three packages: what was called, with what, in which thread."""

    def __init__(self):
        self.opened, self.logged, self.closed, self.threads = [], [], 0, set()
        self.fail = {"open": None, "log": None}

    def init(self, *args, **options):
        if self.fail["open"]:
            raise self.fail["open"]
        self.opened.append((args, options))
        return self

    def log(self, values, step):
        self.threads.add(threading.current_thread().name)
        if self.fail["log"]:
            raise self.fail["log"]
        self.logged.append((step, values))

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def add_text(self, name, text):
        pass

    def finish(self):
        self.closed += 1

    close = finish


@pytest.fixture
def packages(monkeypatch):
    """By name; importable, and found."""
    found = {}
    for name in NAMES:
        stand_in = found[name] = StandIn()
        module = types.ModuleType("torch.utils.tensorboard" if name == "tensorboard" else name)
        module.init = module.SummaryWriter = stand_in.init
        module.Settings = dict
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name in found or None)
    return found


@pytest.fixture
def log(tmp_path):
    (tmp_path / "one").mkdir()
    log = RunLog(tmp_path / "one", 10, 1)
    yield log
    log.close()


def values_at(stand_in, step):
    return {
        key: value for at, values in stand_in.logged if at == step for key, value in values.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_it_gets(packages, log, name):
    """Losses, time and tokens by step, in another thread, and all before the end."""
    trackers.attach([name], log, {"seed": 3})
    log.validation(0, 5.5, 0.0)
    log.training(1, 4.5, 2.0, 100)
    log.note("outlier", "a line", step=1, train_loss=9.0)
    log.end()
    (tracker,) = [packages[name]]
    assert values_at(tracker, 0) == {"val_loss": 5.5, "train_time_s": 0.0}
    assert values_at(tracker, 1) == {"train_loss": 4.5, "train_time_s": 2.0, "tokens": 100}
    assert tracker.closed == 1 and tracker.threads == {f"tracker {name}"}
    assert [len(packages[other].opened) for other in NAMES] == [n == name for n in NAMES]
    (((*args,), options),) = tracker.opened
    if name == "tensorboard":
        assert args == [str(log.folder / "tensorboard")]
    else:
        assert options["name"] == "one" and options["config"] == {"seed": 3}


def test_other_ranks_open_nothing(packages):
    log = RunLog(None, 10, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that one couldn't be opened
        trackers.attach(NAMES, log, {})
    assert log.listeners == [] and all(not package.opened for package in packages.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", ["open", "log"])
def test_one_that_fails(packages, log, name, when):
    """One warning, and the others go on."""
    packages[name].fail[when] = ConnectionError("no route\nmore")
    with pytest.warns(UserWarning) as caught:
        trackers.attach(NAMES, log, {})
        for step in range(1, 5):
            log.training(step, 4.5, 2.0 * step, 100 * step)
        log.end()
    assert [str(w.message) for w in caught] == [f"{name}: no route; the run goes on without it"]
    for other in set(NAMES) - {name}:
        assert {step for step, _ in packages[other].logged} == {1, 2, 3, 4}


@pytest.mark.parametrize("reason", [None, "step 3: the loss is nan"])
def test_one_that_hangs(packages, log, monkeypatch, reason):
    """No step waits for it, and the run's end only so long."""
    monkeypatch.setattr(trackers, "END_S" if reason is None else "FAILED_END_S", 0.05)
    released = threading.Event()
    packages["wandb"].log = lambda values, step: released.wait()
    trackers.attach(["wandb"], log, {})
    log.training(1, 4.5, 2.0, 100)
    with pytest.warns(UserWarning, match="wandb: not done after 0 s; the rest is left out"):
        log.end(reason)
    released.set()


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check([])
    with pytest.raises(
        RunError, match=r"--trackio: not installed here: pip install wandb trackio$"
    ):
        trackers.check(["wandb", "trackio"])


def test_training_without_its_package(tmp_path, monkeypatch, capsys):
    """Said before anything is made."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    words = ["--text", "text.txt", "--out", "run", "--device", "cpu", "--wandb", *tiny_sets()]
    assert cli.main(["train", *words]) == 1
    assert "--wandb: not installed here: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training(packages, tmp_path, monkeypatch, capsys):
    """A run hands over what is in its metrics.jsonl, and its settings."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    sets = tiny_sets(schedule__num_steps=3, schedule__val_interval=3)
    words = ["--text", "text.txt", "--out", "run", "--device", "cpu", "--seed", "5", "--trackio"]
    with warnings.catch_warnings():  # train has a way of its own to show them
        assert cli.main(["train", *words, *sets]) == 0
    tracker = packages["trackio"]
    assert [step for step, _ in tracker.logged] == [0, 1, 2, 3, 3] and tracker.closed == 1
    settings = tracker.opened[0][1]["config"]
    assert settings["seed"] == 5 and settings["schedule"]["num_steps"] == 3


def test_flags():
    """Also as a command line again, for the processes of torchrun."""
    from speedrun import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(["--wandb", "--tensorboard"])
    assert args.trackers == ["wandb", "tensorboard"] and parser.parse_args([]).trackers == []
    assert parser.parse_args(train.to_argv(args)).trackers == args.trackers
