"""`speedrun watch`: what it says of a run that goes on, ends, hangs or is no run."""

import json
import os
import time

import pytest

from record_helpers import without_slow_facts, write_run
from speedrun import cli, run_state
from speedrun.commands import watch
from speedrun.record_logs import LogError
from speedrun.run_state import Follower, RunState, sparkline
from speedrun.runlog import BadLoss, RunLog
from train_helpers import read_events


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 20 steps, of which 10 are done: each takes 2 s, and trains on 100 tokens."""
    without_slow_facts(monkeypatch)
    return write_run(tmp_path / "runs" / "one", 0, 3.27, last=10)


def say(run, event, **values):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")


def training(run, step):
    say(run, "training", step=step, train_loss=3.3, train_time_s=2.0 * step, tokens=100 * step)


@pytest.fixture
def watched(run, monkeypatch, capsys):
    """Runs the verb on `run`, where a function of `meanwhile` is called in each of its pauses."""

    def call(*words, meanwhile=()):
        capsys.readouterr()
        calls = iter(meanwhile)
        monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(calls)())
        monkeypatch.setattr(watch, "PLAIN_S", 0.0)
        code = cli.main(["watch", *map(str, words or [run])])
        return code, *capsys.readouterr()

    return call


def test_until_its_end(run, watched):
    """A line for what is new. It ends at the last validation, without the end's event."""

    def end():
        say(run, "validation", step=20, val_loss=3.2712, train_time_s=40.0)

    code, out, _ = watched(meanwhile=[lambda: training(run, 11), lambda: None, end])
    title, first, second, last = out.splitlines()
    assert code == 0 and title == f"{run}: record_089, seed 0, 8 x NVIDIA H100 80GB HBM3"
    assert first == (
        "step 10 of 20 (50%), 20 s of training; training loss 3.6500; validation loss 3.6600 at "
        "step 8, 0.3800 above the target 3.2800; 50 tokens/s, 2000 ms a step, 20 s left"
    )
    assert second.startswith("step 11 of 20 (55%), 22 s of training; training loss 3.3000; ")
    assert last.startswith("step 20 of 20 (100%)")
    assert last.endswith("step 20; the target 3.2800 was reached at step 20; done")


@pytest.mark.parametrize(("reason", "code"), [(None, 0), ("step 11: the loss is nan", 1)])
def test_end_event(run, watched, reason, code):
    say(run, "end", reason=reason)
    found, out, _ = watched()
    assert found == code and out.endswith(f"ended early: {reason}\n" if reason else "; done\n")


def test_a_run_that_goes_on_after_a_stop(run, watched):
    """What it did behind its checkpoint, of step 8, is done again."""
    header = read_events(run)[0]
    say(run, "end", reason="stopped before step 10")
    del header["event"]
    say(run, "resumed", step=8, **header)
    code, out, _ = watched("--once", run)
    assert code == 0 and "step 8 of 20" in out and "training loss 3.7200" in out


def test_in_a_terminal(run, watched, monkeypatch):
    """The lines are drawn over the ones before; none is longer than the terminal is wide."""
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    ends = [lambda: training(run, 11), lambda: say(run, "end", reason=None)]
    code, out, _ = watched(meanwhile=ends)
    first, second, third = out.split("\x1b[")[0], *out.split("\x1b[6A\x1b[J")[1:]
    assert code == 0 and len(first.splitlines()) == 6
    assert second.splitlines()[1].startswith("step 11 of 20")
    assert "of the last 7 steps" in first and third.endswith("\ndone\n")
    assert all(len(line) < 40 for line in first.splitlines())


@pytest.mark.parametrize(
    ("age_s", "num_events", "text"),
    [
        (30, None, None),
        (100, None, "nothing for 1 min 40 s: it hangs, or its process is gone"),
        (100, 1, "warming up: kernels are compiled, which may take minutes"),
        (2000, 1, "nothing for 33 min 20 s: it hangs, or its process is gone"),
    ],
)
def test_quiet_run(run, watched, monkeypatch, age_s, num_events, text):
    """In its warm-up nothing is expected for long."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[:num_events]
    path.write_text("".join(lines))
    os.utime(path, (1000, 1000))
    monkeypatch.setattr(run_state.time, "time", lambda: 1000.0 + age_s)
    code, out, _ = watched("--once", run)
    assert code == 0 and out.strip().endswith(text or "left")
    (run / "errors").mkdir()
    (run / "errors" / "rank3.txt").write_text("Traceback")
    assert ("see " in watched("--once", run)[1]) == (text is not None and "nothing" in text)


def test_long_steps(run, watched):
    """Ten of the longest so far are waited for."""
    say(run, "training", step=11, train_loss=3.3, train_time_s=50.0, tokens=1100)
    os.utime(run / "metrics.jsonl", (time.time() - 200,) * 2)
    assert "nothing for" not in watched("--once", run)[1]


def test_warnings(run, watched):
    say(run, "outlier", step=9, train_loss=5.0, z=13.0)
    assert f"1 outliers or steps left out: see {run}/log.txt" in watched("--once", run)[1]


def test_interrupted(run, watched):
    def press():
        raise KeyboardInterrupt

    code, out, error = watched(meanwhile=[press])
    assert code == 0 and out.endswith("\n") and error == ""


def test_newest_run(run, watched, monkeypatch, tmp_path):
    other = write_run(tmp_path / "runs" / "two", 1, 3.27, last=4)
    os.utime(run / "metrics.jsonl", (1, 1))
    monkeypatch.chdir(tmp_path)
    assert f"runs/{other.name}: " in watched("--once")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metrics.jsonl: No such file or directory; give the folder of a run that has begun"),
        ("", "has no header, or not yet"),
        ("{\n", "metrics.jsonl: damaged, a line is no JSON"),
    ],
)
def test_refusals(tmp_path, watched, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    code, out, error = watched("--once", tmp_path)
    assert (code, out) == (1, "") and error.startswith("speedrun watch: error: ")
    assert message in error


def test_no_run_yet(watched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs" / "one")
    code, _, error = cli.main(["watch"]), *watched("--once")[1:]
    assert code == 1 and "runs/: no run in it" in error


def test_half_a_line_waits_for_its_end(run):
    follower, state = Follower(run), RunState()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tr')
        file.flush()
        for event in follower.new_events():
            state.add(event)
        assert state.step == 10 and follower.new_events() == []
        file.write('aining", "step": 11}\n')
        file.flush()
        assert follower.new_events() == [{"event": "training", "step": 11}]


def test_waits_for_a_header(tmp_path, watched, run):
    """Of a run that has just made its file."""
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")

    def begin():
        (run / "metrics.jsonl").write_text(text)

    code, out, _ = watched(meanwhile=[begin, lambda: say(run, "end", reason=None)])
    assert code == 0 and "step 10 of 20" in out


def test_how_a_log_ends(tmp_path):
    """An exception in the training is the end's reason; its log goes on without one."""
    log = RunLog(tmp_path, 1, 1)
    with log:
        pass
    with pytest.raises(BadLoss), log:
        raise BadLoss("step 3: the loss is nan", 3)
    with pytest.raises(ZeroDivisionError), log:
        raise ZeroDivisionError
    log.end()
    log.close()
    reasons = [event["reason"] for event in read_events(tmp_path)]
    assert reasons == ["step 3: the loss is nan", "ZeroDivisionError", None]


def test_sparkline():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 3, 8, 8], 2) == "▁█" and sparkline([5, 5], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(range(1000), 50)) == 50


def test_damage_is_said(run):
    (run / "metrics.jsonl").write_text("no\n")
    with pytest.raises(LogError):
        Follower(run).new_events()


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6, "10 s"), (65, "1 min 05 s"), (7400, "2 h 03 min")]
)
def test_duration(seconds, text):
    assert watch.duration(seconds) == text
