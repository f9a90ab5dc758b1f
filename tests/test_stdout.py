"""`speedrun … | head`: a verb whose output nobody reads any more ends quietly."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from record_helpers import public_log
from speedrun import cli
from speedrun._stdout import EXIT_NO_READER
from speedrun.failures import EXIT_STOPPED
from speedrun.runlog import RunLog
from train_helpers import start_training, tiny_sets, write_text


@contextlib.contextmanager
def no_reader(buffered=True):
    """Standard output is a pipe whose other end is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stdout, contextlib.redirect_stdout(stdout):
        stdout.reconfigure(line_buffering=not buffered)
        yield


@pytest.mark.parametrize("words", [[verb, "--help"] for verb in cli.verbs()] + [[], ["--version"]])
def test_help(words):
    with no_reader():
        assert cli.main(words) == EXIT_NO_READER
        print("nobody sees this", flush=True)  # as Python does at its end


@pytest.mark.parametrize(
    "words", [["explain"], ["explain", "--json"], ["record", "check", "a.txt"]], ids=" ".join
)
@pytest.mark.parametrize("buffered", [True, False])
def test_output(words, buffered, tmp_path, monkeypatch, capsys):
    """Whether it is noticed at the end or within the verb, which has errors of its own."""
    (tmp_path / "a.txt").write_text(public_log(3.27))
    monkeypatch.chdir(tmp_path)
    with no_reader(buffered):
        assert cli.main(words) == EXIT_NO_READER
    assert capsys.readouterr().err == ""


def test_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "speedrun.cli", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == EXIT_NO_READER


def test_training_is_told_to_stop(tmp_path, monkeypatch, capsys):
    """As by SIGTERM, once; what it says later is in its log alone."""
    signals = []
    monkeypatch.setattr(signal, "raise_signal", signals.append)
    log = RunLog(tmp_path, 10, 1)
    with no_reader():
        log.say("first")
        log.say("second")
    log.close()
    assert signals == [signal.SIGTERM]
    first, reason, second = (tmp_path / "log.txt").read_text().splitlines()
    assert (first, second) == ("first", "second") and "broken pipe" in reason
    assert "broken pipe" in capsys.readouterr().err


@pytest.mark.slow
def test_training_saves(tmp_path):
    write_text(tmp_path / "text.txt")
    sets = tiny_sets(schedule__num_steps=2000)
    process = start_training(tmp_path, "--text", "text.txt", "--out", "run", *sets)
    while "step:0/" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    with process:
        error = process.stderr.read()
    assert (
        process.returncode == EXIT_STOPPED and "broken pipe" in error and "Traceback" not in error
    )
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
