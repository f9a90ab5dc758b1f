"""Training that can't go on: refused before it starts, or stopped on every rank with the cause."""

import argparse
import json
import os
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from data_helpers import random_tokens, write_shard
from speedrun import recipes
from speedrun import train as program
from speedrun.data import BYTES
from train_helpers import read_losses, start_training, tiny_sets, write_text

SETS = tiny_sets()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a text."""
    folder = tmp_path_factory.mktemp("train_errors")
    write_text(folder / "text.txt")
    return folder


def made_shards(folder, train_sizes, val_size=2100) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(vars(BYTES)))
    for i, size in enumerate(train_sizes):
        write_shard(folder / f"made_train_{i:06d}.bin", random_tokens(size, seed=i))
    write_shard(folder / "made_val_000000.bin", random_tokens(val_size, seed=99))
    return folder


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Runs the program here, which must fail with one readable message; returns that."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it

    def run(*words):
        parser = argparse.ArgumentParser()
        program.add_arguments(parser)
        assert program.run(parser.parse_args([str(word) for word in words])) == 1
        message = capsys.readouterr().err
        assert message.count("error: ") == 1 and "Traceback" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "tinny"], "no recipe 'tinny'; recipes: "),
        (["--set", "optim.lr=1"], "no setting 'lr'; allowed here: muon_table, adam_table"),
        (["--set", "model.num_heads"], "expected KEY=VALUE"),
        (["--set", "optim.normuon.lr=-1"], "optim.normuon.lr=-1.0: must be greater than 0"),
        (["--set", "model.model_dim=-32"], "model.model_dim=-32: must be greater than 0"),
        (["--steps", "-5"], "--steps -5: this schedule needs at least"),
        (["--data", "nowhere"], "nowhere: not a folder"),
        (["--text", "nothing.txt"], "nothing.txt: can't be read"),
        (["--set", "model.vocab_size=300"], "but the data's tokenizer 'bytes' has 257 tokens"),
        (["--set", "data.val_tokens=1000000"], "lower data.val_tokens"),
        (["--out", "text.txt/run"], "text.txt/run: can't be written"),
    ],
)
def test_refusals(refused, words, message):
    source = [] if words[0] in ("--data", "--text") else ["--text", "text.txt"]
    began = time.monotonic()
    assert message in refused(*source, *SETS, *words)
    assert time.monotonic() - began < 5  # takes a hundredth of that


def test_a_folder_with_a_run_is_refused(folder, refused):
    log = folder / "one" / "log.txt"
    log.parent.mkdir()
    log.write_text("of an earlier run")
    message = refused("--text", "text.txt", "--out", "one", *SETS)
    assert "one: holds a run already; choose another folder by --out" in message
    assert log.read_text() == "of an earlier run"
    assert list(log.parent.iterdir()) == [log]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_three_ranks_are_refused_on_each(refused, monkeypatch, rank):
    for name, value in dict(RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    message = refused("--text", "text.txt", *SETS)
    assert message.startswith(f"speedrun: rank {rank}: error: 3 ranks: a step has 8 parts")


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_settings_stop_every_rank(refused, monkeypatch, rank):
    """Before the ranks meet, so that none waits for another."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("--set", "optim.lr=1").startswith(
        f"speedrun: rank {rank}: error: --set optim.lr"
    )


def test_too_few_tokens_are_refused_with_the_numbers(refused, tmp_path):
    shards = made_shards(tmp_path / "short", [6000, 3000])
    message = refused("--data", shards, *tiny_sets(schedule__num_steps=20, data__repeat="false"))
    assert "the schedule needs 20 steps, 20,480 tokens; its 2 shard(s) with 9,000 tokens" in message
    assert "use these again (--repeat-data)" in message


def spoil(path, how):
    """Make a shard bad in place, as a full disk or another process would."""
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
        return
    content = np.memmap(path, "<u2", "r+")
    if how == "magic":
        content[0] = 1
    else:
        content[-100:] = 60_000
    content.flush()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("made_train_000001.bin", "truncated"),
        ("made_train_000001.bin", "magic"),
        ("made_train_000001.bin", "token out of range"),
        ("made_val_000000.bin", "truncated"),
        ("made_val_000000.bin", "magic"),
        pytest.param(
            "made_val_000000.bin",
            "token out of range",
        ),
    ],
)
def test_bad_shards_are_refused_before_training(refused, tmp_path, name, how):
    shards = made_shards(tmp_path / "bad", [15_000, 15_000])
    spoil(shards / name, how)
    message = refused("--data", shards, "--out", tmp_path / "run", *SETS)
    assert str(shards / name) in message
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(refused, folder, tmp_path):
    words = ["--text", "text.txt", "--out", tmp_path / "run"]
    message = refused(*words, *tiny_sets(optim__normuon__lr=1e15))
    found = re.search(r"error: step (\d+): the training loss is (nan|inf)", message)
    # Step 0 trains on the start values; its update is what step 1 shows.
    assert found and found[1] == "1"
    assert "Lower optim.normuon.lr" in message
    assert "step:0/" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    "how", ["truncated", pytest.param("token out of range", marks=pytest.mark.slow)]
)
def test_a_shard_that_goes_bad_stops_every_rank(folder, tmp_path, how):
    """The second shard is spoilt while two ranks train on the first one."""
    shards = made_shards(tmp_path / "going", [150_000, 150_000])
    sets = tiny_sets(schedule__num_steps=200, schedule__val_interval=1000, data__repeat="false")
    process = start_training(folder, "--data", shards, "--out", tmp_path / "run", *sets, ranks=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and "training" in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        spoil(shards / "made_train_000001.bin", how)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    last_step = read_losses(tmp_path / "run")[-1][1]
    assert time.time() - metrics.stat().st_mtime < 15
    assert process.returncode != 0 and 100 < last_step < 200
    assert re.search(r"speedrun: rank [01]: error: .*made_train_000001\.bin", err)


def test_a_final_loss_that_is_not_finite_stops_the_run(refused, folder, tmp_path):
    """The last update goes wrong, which only the last validation can see."""
    last = len(recipes.load("tiny").schedule.stages) - 1
    sets = tiny_sets(schedule__num_steps=last + 1, schedule__adam_interval=1)
    sets += ["--set", f"schedule.stages.{last}.lr_factor=1e15"]
    refused("--text", "text.txt", "--out", tmp_path / "run", *sets)
