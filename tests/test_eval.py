"""`speedrun eval`: loss, bits per byte and HellaSwag of a model, and what it refuses."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

import train_helpers
from data_helpers import write_shard
from speedrun import cli, train
from speedrun.checkpoint import Trained
from speedrun.commands import eval as command
from speedrun.comms import Comms
from speedrun.data import BYTES, GPT2
from speedrun.decode import CachedDecoder
from speedrun.reference.softcap_ce import softcap
from speedrun.runlog import RunError
from speedrun.schedule import Schedule
from speedrun.sources import open_data
from speedrun.tokenizer import ByteTokenizer
from test_record_model import RECORD, random_model
from train_helpers import read_losses, small_config, tiny_sets, verb_on, write_text

CONFIG = small_config(model=dataclasses.replace(RECORD, vocab_size=BYTES.vocab_size))
CONFIG = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, val_tokens=None, val_tokens_per_part=256)
)
END = CONFIG.schedule.total_steps


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG.model, torch.float32)


@pytest.fixture
def measure(monkeypatch, capsys, model, tmp_path):
    """Runs the verb on `model` in a folder with book.txt; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "book.txt")
    return verb_on(Trained(model, CONFIG, BYTES, END), command, monkeypatch, capsys)


def test_validation(measure, model, tmp_path):
    """The loss of the training program's validation; one byte a token here, but for BOS."""
    code, text, _ = measure("--text", "book.txt", "--tokens", "500", "--json", "found.json")
    assert code == 0
    results = json.loads((tmp_path / "found.json").read_text())
    found = results["validation"]
    plan = Schedule(CONFIG.schedule).plan(33)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, val_tokens=500))
    data = open_data(None, tmp_path / "book.txt", config)
    where = train.Run(Comms(), torch.device("cpu"), torch.float32)
    loss = train.validate(model, config, data, plan, where, lambda: None)
    assert found["loss"] == loss and found["num_tokens"] == 500
    tokens = np.fromfile(data.val[0], np.uint16, offset=1024)[1:501]
    assert found["num_bytes"] == (tokens != BYTES.bos_id).sum()
    bits = loss * 500 / found["num_bytes"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert f"{loss:.4f} nats a token over 500 tokens, {bits:.4f} bits a byte" in text
    assert results["windows"] == {"short": 24, "long": 64, "yarn": []}
    assert "hellaswag" not in results


def test_all_tokens_by_default(measure, tmp_path):
    assert measure("--text", "book.txt", "--json", "found.json")[0] == 0
    data = open_data(None, tmp_path / "book.txt", CONFIG)
    num_tokens = np.fromfile(data.val[0], np.uint16, offset=1024).size
    assert json.loads((tmp_path / "found.json").read_text())["validation"]["num_tokens"] == (
        num_tokens - 1
    )


def test_hellaswag(measure, model, tmp_path):
    """Sums of log-probabilities that incremental decoding gives too."""
    tasks = [("It was", 1, ["a", "far", "so so", "no."]), ("He", 0, ["is.", "ran far", "t", "zz"])]
    lines = [str(line) for context, label, ends in tasks for line in (context, label, *ends)]
    (tmp_path / "tasks.txt").write_text("\n".join(lines))
    code, text, _ = measure(
        "--skip-validation", "--hellaswag", "tasks.txt", "--tasks", "1", "--json", "found.json"
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and "validation" not in found
    context, label, endings = tasks[0]
    windows, bos = Schedule(CONFIG.schedule).plan(33).windows, BYTES.bos_id
    sums = []
    for ending in endings:
        begin = 4 + len(context)
        tokens = [bos] * 4 + list(f"{context} {ending}".encode())
        z_TV = CachedDecoder(model, windows, bos).states(tokens) @ model.lm_head
        softcap_numbers = (RECORD.softcap_a, RECORD.softcap_b, RECORD.softcap_c)
        log_p = softcap(z_TV, *softcap_numbers).log_softmax(-1)
        places = range(begin, len(tokens))
        sums.append(sum(log_p[place - 1, tokens[place]].item() for place in places))
    lengths = [len(ending) for ending in endings]
    assert found["hellaswag"]["acc"] == float(np.argmax(sums) == label)
    assert found["hellaswag"]["acc_norm"] == float(np.argmax(np.divide(sums, lengths)) == label)
    assert found["hellaswag"]["num_tasks"] == 1 and "1 tasks" in text


def test_byte_counts():
    counts = command.byte_counts(ByteTokenizer())
    assert counts.tolist() == [1] * 256 + [0]


class Vocabulary:
    """GPT-2's format; token t has 1 + t mod 7 bytes."""

    format = GPT2

    def token_bytes(self, token):
        return b"x" * (1 + token % 7)


def test_tokens_of_several_bytes(measure, monkeypatch, tmp_path):
    """Bits per byte are of the text's bytes, not of tokens; without a vocabulary there are none,
    and the loss is there all the same."""
    config = dataclasses.replace(RECORD, vocab_size=GPT2.vocab_size, gates="constant")
    config = dataclasses.replace(CONFIG, model=config)
    other = random_model(config.model, torch.float32)
    tokens = np.random.default_rng(0).integers(0, GPT2.vocab_size, 300)
    tokens[[0, 9, 20]] = GPT2.bos_id
    for split in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"some_{split}.bin", tokens)
    words = ("--data", ".", "--tokens", "40", "--json", "found.json")

    def measured(*more):
        return measure(*words, *more, load=lambda *_: Trained(other, config, GPT2, END))

    code, text, error = measured()
    assert (code, error) == (0, "") and "no bits per byte: " in text and "gpt2.tiktoken" in text
    without = json.loads((tmp_path / "found.json").read_text())["validation"]
    assert without["num_tokens"] == 40 and without["loss"] > 0
    assert without["bits_per_byte"] is None and without["num_bytes"] is None
    code, _, error = measured("--rank-file", "absent")
    assert code == 1 and "absent" in error

    monkeypatch.setattr(command, "load_tokenizer", lambda *_: Vocabulary())
    assert measured()[0] == 0
    found = json.loads((tmp_path / "found.json").read_text())["validation"]
    num_bytes = sum(1 + token % 7 for token in tokens[1:41].tolist() if token != GPT2.bos_id)
    assert found["loss"] == without["loss"] and found["num_bytes"] == num_bytes != 40
    expected = 40 * found["loss"] / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "absent.txt"], "absent.txt"),
        (["--text", "book.txt", "--tokens", "10000000"], "10,000,000"),
        (["--text", "book.txt", "--json", "no/found.json"], "no/found.json.*make it"),
        (["--skip-validation"], "add --hellaswag"),
        (["--hellaswag", "absent.bz2"], "absent.bz2"),
    ],
)
def test_refusals(measure, words, message):
    code, _, error = measure(*words)
    assert code == 1 and error.startswith("speedrun eval: error: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_tokens_of_another_kind(measure, model):
    """The checkpoint's model can't read them."""
    code, _, error = measure(
        "--text", "book.txt", load=lambda *_: Trained(model, CONFIG, GPT2, END)
    )
    assert code == 1 and "'bytes'" in error and "'gpt2'" in error


def test_bad_checkpoint(measure):
    def load(path, device):
        raise RunError(f"{path}: no whole checkpoint")

    code, _, error = measure("--text", "book.txt", load=load)
    assert (code, error) == (1, "speedrun eval: error: CKPT: no whole checkpoint\n")


# ---- A run's checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run that wrote checkpoints at steps 5, 10, 15 and 20; rotary frequencies change
    at step 10."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "book.txt")
    changes = {"schedule__stages__1__window_long": 64, "schedule__yarn": "true"}
    words = ["--text", "book.txt", "--out", "run", "--save-every", "5", "--keep", "9"]
    done = train_helpers.train(folder, *words, "--recipe", "tiny", *tiny_sets(**changes))
    assert done.code == 0, done.err
    return folder


def test_a_run(trained, monkeypatch, capsys):
    """The losses in its log, of the run's end, of a checkpoint in its first stage and of an export
    of that; and text."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(trained)
    early = "run/checkpoints/step-000005"
    assert cli.main(["export", early, "--out", "early"]) == 0
    logged = {step: loss for event, step, loss in read_losses(trained / "run") if "val" in event}
    for path, step in (("run", 20), (early, 5), ("early", 5)):
        code = cli.main(
            ["eval", path, "--text", "book.txt", "--json", "found.json", "--device", "cpu"]
        )
        assert code == 0, capsys.readouterr().err
        found = json.loads((trained / "found.json").read_text())
        assert found["validation"]["loss"] == pytest.approx(logged[step], rel=1e-6)
        assert found["windows"]["yarn"] == ([[32, 64]] if step == 20 else [])
    capsys.readouterr()
    code = cli.main(["sample", "run", "--prompt", "ab", "--tokens", "8", "--device", "cpu"])
    assert code == 0 and capsys.readouterr().out.startswith("ab")
