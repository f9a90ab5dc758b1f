"""Training end to end, through the command line: what it writes, repeats, refuses and survives."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from speedrun import recipes
from speedrun.data import BYTES
from speedrun.reference.polar_express import COEFFICIENTS
from train_helpers import read_events, read_losses, tiny_sets, train

STEPS = 20


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
    words = ["train", "--text", "text.txt", "--recipe", "tiny", "--out", "one", *tiny_sets()]
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
    run = train(folder, "--text", "text.txt", "--out", "two", *tiny_sets())
    assert run.code == 0, run.err
    assert read_losses(folder / "two") == read_losses(folder / "one")


def test_another_seed(first_run, folder):
    run = train(folder, "--text", "text.txt", "--out", "seed", "--seed", "1", *tiny_sets())
    assert run.code == 0, run.err
    first, other = read_losses(folder / "one"), read_losses(folder / "seed")
    assert all(a[2] != b[2] for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks(first_run, folder, ranks):
    """The same losses from every number of ranks, but for the order of float32 sums.

    Before the first update: the mean of 1,024 float32 losses, eight sums in another order. After
    it, Polar Express lifts what rounding leaves in a gradient's smallest singular directions by up
    to the product of its slopes, about 1,000, to the size of the others: 1,000 ulps of change to
    each update's direction, and each step adds one.
    """
    run = train(folder, "--text", "text.txt", "--out", f"of{ranks}", *tiny_sets(), ranks=ranks)
    assert run.code == 0, run.err
    eps = torch.finfo(torch.float32).eps
    slopes = np.prod([a for a, _, _ in COEFFICIENTS])
    first, other = read_losses(folder / "one"), read_losses(folder / f"of{ranks}")
    worst = 0.0
    for (event, step, a), (other_event, other_step, b) in zip(first, other, strict=True):
        assert (event, step) == (other_event, other_step)
        num_updates = step - 1 if event == "training" else step
        error = abs(a - b) / a
        assert error <= eps * (8 + slopes * num_updates), (event, step)
        worst = max(worst, error)
    assert worst > 0  # else the ranks did not do their own sums
    header = read_events(folder / f"of{ranks}")[0]
    assert header["world_size"] == ranks
    assert run.out.count("final val_loss") == 1  # rank 0 alone speaks


def test_recipe_precision_on_a_cpu(first_run, folder):
    """bf16 parameters with 16 hidden bits: near the float32 losses, not equal to them."""
    run = train(folder, "--text", "text.txt", "--out", "bf16", *tiny_sets(precision="recipe"))
    assert run.code == 0, run.err
    assert read_events(folder / "bf16")[0]["dtype"] == "torch.bfloat16"
    for (*_, a), (*_, b) in zip(
        read_losses(folder / "one"), read_losses(folder / "bf16"), strict=True
    ):
        assert a != b and b == pytest.approx(a, rel=0.05)
