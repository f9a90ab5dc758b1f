"""Training end to end, through the command line: what it writes, repeats, refuses and survives."""

import argparse
import json
import os
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import random_tokens, write_shard
from speedrun import recipes
from speedrun import train as program
from speedrun.data import BYTES
from speedrun.reference.polar_express import COEFFICIENTS
from train_helpers import read_events, read_losses, start_training, tiny_sets, train

STEPS, MUON_LR = 20, 0.02
SETS = tiny_sets(schedule__num_steps=STEPS, optim__muon_lr=MUON_LR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a text of 60 made-up words, some of them frequent."""
    folder = tmp_path_factory.mktemp("train")
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, random.integers(2, 8)).tolist()) for _ in range(60)]
    chosen = np.minimum(random.zipf(1.4, 6000) - 1, 59)
    (folder / "text.txt").write_bytes(b" ".join(words[i] for i in chosen))
    return folder


@pytest.fixture(scope="module")
def first_run(folder):
    words = ["train", "--text", "text.txt", "--recipe", "tiny", "--out", "one", *SETS]
    run = train(folder, *words, module="speedrun.cli")
    assert run.code == 0, run.err
    return run


TIMES = r"train_time:(\d+)ms step_avg:(\d+\.\d\d)ms"
VALIDATION = re.compile(rf"step:(\d+)/{STEPS} val_loss:(\d+\.\d{{4}}) {TIMES}")
TRAINING = re.compile(rf"step:(\d+)/{STEPS} train_loss:(\d+\.\d{{4}}) {TIMES}")


def test_log(first_run, folder):
    """log.txt: a header, then lines in the public format, every loss as in metrics.jsonl."""
    lines = (folder / "one" / "log.txt").read_text().splitlines()
    rule = lines.index("=" * 100)
    header, body = lines[:rule], lines[rule + 1 :]
    for key in (
        "commit",
        "torch",
        "python",
        "seed",
        "device",
        "world_size",
        "tokenizer",
        "sources",
    ):
        assert any(line.startswith(f"{key}: ") for line in header), key
    assert json.loads(header[-1])["model"]["model_dim"] == 32
    found = {"validation": [], "training": []}
    for line in body:
        for kind, pattern in (("validation", VALIDATION), ("training", TRAINING)):
            if match := pattern.fullmatch(line):
                step, loss, time_ms, average_ms = map(float, match.groups())
                found[kind].append((int(step), loss))
                assert average_ms == pytest.approx(time_ms / max(step, 1), abs=0.51)
    losses = read_losses(folder / "one")
    assert [s for s, _ in found["validation"]] == [0, 5, 10, 15, 20]
    assert [s for s, _ in found["training"]] == list(range(2, 21, 2))  # log_interval
    for kind, pairs in found.items():
        events = {step: round(loss, 4) for event, step, loss in losses if event == kind}
        assert all(events[step] == loss for step, loss in pairs)
    assert not any("step:" in line for line in header)


def test_screen(first_run):
    """Every validation, the verdict and what to do next, in lines that can be read."""
    steps = [int(m[1]) for line in first_run.out.splitlines() if (m := VALIDATION.match(line))]
    assert steps == [0, 5, 10, 15, 20]
    assert re.search(r"final val_loss \d\.\d{4}; target \d\.\d{4}, gzip -9", first_run.out)
    assert "next:" in first_run.out and "Traceback" not in first_run.err


def test_metrics(first_run, folder):
    """One header, then every step once and every validation, in order, with rising times."""
    header, *events = read_events(folder / "one")
    assert header["event"] == "header" and header["world_size"] == 1
    assert header["environment"]["torch"] == torch.__version__
    assert header["environment"]["commit"] and header["dtype"] == "torch.float32"
    assert re.fullmatch("[0-9a-f]{64}", header["sources"]["model.py"])
    assert header["config"] == json.loads((folder / "one" / "config.json").read_text())
    order = [(event["event"], event["step"]) for event in events]
    expected = []
    for step in range(STEPS + 1):
        expected += [("training", step)] * (step > 0) + [("validation", step)] * (step % 5 == 0)
    assert order == expected
    times = [event["train_time_s"] for event in events]
    assert times == sorted(times) and times[0] < 0.1


def test_config_file(first_run, folder):
    """What was set, and the vocabulary that came with the data."""
    config = json.loads((folder / "one" / "config.json").read_text())
    assert config["model"]["vocab_size"] == BYTES.vocab_size
    assert config["optim"]["adam_interval"] == 2
    assert [stage["tokens_per_step"] for stage in config["schedule"]["stages"]] == [1024] * len(
        recipes.load("tiny").schedule.stages
    )


def test_picture(first_run, folder):
    pytest.importorskip("matplotlib")
    picture = (folder / "one" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 10_000


def test_it_learns(first_run, folder):
    """From a guess (log 272 = 5.6 nats) to about the entropy of single letters, 3.1 nats."""
    losses = [loss for event, _, loss in read_losses(folder / "one") if event == "validation"]
    assert losses[0] == pytest.approx(np.log(272), abs=0.05)
    assert losses[-1] < losses[0] - 1.5
    assert losses == sorted(losses, reverse=True)


def test_the_same_command_twice(first_run, folder):
    run = train(folder, "--text", "text.txt", "--out", "two", *SETS)
    assert run.code == 0, run.err
    assert read_losses(folder / "two") == read_losses(folder / "one")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_ranks(first_run, folder, ranks):
    """The same losses from every number of ranks, but for the order of float32 sums.

    A loss is the mean of 1,024 float32 numbers in eight parts: 8 ulps. An update adds to that what
    rounding does to it: Polar Express lifts what it leaves in a gradient's smallest singular
    directions by up to the product of its slopes, about 1,000, and the rate brings it to the
    weights. Seen: 1.5 ulps at most, over all steps and numbers of ranks.
    """
    run = train(folder, "--text", "text.txt", "--out", f"of{ranks}", *SETS, ranks=ranks)
    assert run.code == 0, run.err
    eps = torch.finfo(torch.float32).eps
    ulps_an_update = np.prod([a for a, _, _ in COEFFICIENTS]) * MUON_LR
    first, other = read_losses(folder / "one"), read_losses(folder / f"of{ranks}")
    worst = 0.0
    for (event, step, a), (other_event, other_step, b) in zip(first, other, strict=True):
        assert (event, step) == (other_event, other_step)
        num_updates = step - 1 if event == "training" else step
        error = abs(a - b) / a
        assert error <= eps * (8 + ulps_an_update * num_updates), (event, step)
        worst = max(worst, error)
    assert worst > 0  # else the ranks did not do their own sums
    header = read_events(folder / f"of{ranks}")[0]
    assert header["world_size"] == ranks
    assert run.out.count("final val_loss") == 1  # rank 0 alone speaks


def test_recipe_precision_on_a_cpu(first_run, folder):
    """bf16 parameters with 16 hidden bits: near the float32 losses, not equal to them.

    bf16 moves logits by about 0.13 (golden_089/README.md), so a loss by no more. Seen: 0.03.
    """
    run = train(folder, "--text", "text.txt", "--out", "bf16", *tiny_sets(precision="recipe"))
    assert run.code == 0, run.err
    assert read_events(folder / "bf16")[0]["dtype"] == "torch.bfloat16"
    for (*_, a), (*_, b) in zip(
        read_losses(folder / "one"), read_losses(folder / "bf16"), strict=True
    ):
        assert a != b and b == pytest.approx(a, abs=0.13)


def test_gpt2_shards(folder):
    """--data with the public shards' format: no manifest, 50,257 tokens, BOS 50,256."""
    random = np.random.default_rng(0)
    shards = folder / "gpt2"
    shards.mkdir()
    for name, size in (("train_000001", 1000), ("val_000000", 600)):
        tokens = random.choice(np.arange(0, 50257, 1500), size)  # 34 kinds: that can be learnt
        tokens[::50] = 50256
        write_shard(shards / f"fineweb_{name}.bin", tokens)
    sizes = {"data__repeat": "false", "data__val_tokens": 256, "schedule__num_steps": 4}
    stages = range(len(recipes.load("tiny").schedule.stages))
    sizes |= {f"schedule__stages__{i}__tokens_per_step": 256 for i in stages}
    words = ["--data", "gpt2", "--out", "shards", *tiny_sets(**sizes)]
    run = train(folder, *words, "--repeat-data")
    assert run.code == 0, run.err
    header, *_ = read_events(folder / "shards")
    assert header["tokenizer"] == "gpt2" and header["config"]["model"]["vocab_size"] == 50257
    assert "the token stream starts again" in run.out
    assert "nats a token" in run.out  # gzip's figure is per byte: no verdict
    losses = read_losses(folder / "shards")
    assert losses[0][2] == pytest.approx(np.log(50272), abs=0.05)
    assert losses[-1][2] < losses[0][2]


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
        began = time.monotonic()
        assert program.run(parser.parse_args([str(word) for word in words])) == 1
        assert time.monotonic() - began < 5
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
        (["--set", "optim.muon_lr=-1"], "optim.muon_lr=-1.0: must be greater than 0"),
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
    assert message in refused(*source, *SETS, *words)


def test_a_folder_with_a_run_is_refused(first_run, folder, refused):
    before = (folder / "one" / "log.txt").read_bytes()
    message = refused("--text", "text.txt", "--out", "one", *SETS)
    assert "one: holds a run already; choose another folder by --out" in message
    assert (folder / "one" / "log.txt").read_bytes() == before


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_three_ranks_are_refused_on_each(refused, monkeypatch, rank):
    for name, value in dict(RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    message = refused("--text", "text.txt", *SETS)
    assert message.startswith(f"speedrun: rank {rank}: error: 3 ranks: a step has eight parts")


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
            marks=pytest.mark.xfail(
                strict=True,
                reason="train.py preflight reads the parts of rank 0 of 8 only: an eighth of them",
            ),
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
    message = refused(*words, *tiny_sets(optim__muon_lr=1e30))
    found = re.search(r"error: step (\d+): the training loss is (nan|inf)", message)
    # Step 0 trains on the start values; its update is what step 1 shows.
    assert found and found[1] == "1"
    assert "Lower optim.muon_lr" in message
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


@pytest.mark.xfail(
    strict=True,
    reason="runlog.py validation takes a loss of nan: what the last update does is never looked at",
)
def test_a_final_loss_that_is_not_finite_stops_the_run(refused, folder, tmp_path):
    """The last update goes wrong, which only the last validation can see."""
    last = len(recipes.load("tiny").schedule.stages) - 1
    sets = tiny_sets(schedule__num_steps=last + 1, optim__adam_interval=1)
    sets += ["--set", f"schedule.stages.{last}.lr_factor=1e30"]
    refused("--text", "text.txt", "--out", tmp_path / "run", *sets)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help(folder, words):
    run = train(folder, *words, module="speedrun.cli")
    assert run.code == 0 and not run.err
    expected = ["train", "data"] if len(words) == 1 else ["--recipe", "--set", "--text", "--out"]
    assert all(word in run.out for word in expected)
