"""`speedrun sample`: what it prints, and what it refuses."""

import dataclasses
import io

import pytest
import torch

from speedrun.checkpoint import Trained
from speedrun.commands import sample
from speedrun.data import BYTES, GPT2
from speedrun.runlog import RunError
from speedrun.schedule import Schedule
from test_record_model import RECORD, random_model
from train_helpers import small_config, verb_on

CONFIG = small_config(model=dataclasses.replace(RECORD, vocab_size=BYTES.vocab_size))
END = CONFIG.schedule.total_steps


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG.model, torch.float32)


@pytest.fixture
def write(monkeypatch, capsys, model):
    """Runs the verb on `model`; exit code, stdout, stderr."""
    return verb_on(Trained(model, CONFIG, BYTES, END), sample, monkeypatch, capsys)


def test_text(write):
    """The prompt and the drawn bytes; the same for the same seed."""
    code, text, rate = write("--prompt", "Once", "--tokens", "6", "--seed", "3")
    assert code == 0 and text.startswith("Once") and len(text) > len("Once\n")
    assert "first token after" in rate and "tokens/s" in rate
    assert write("--prompt", "Once", "--tokens", "6", "--seed", "3")[1] == text
    assert write("--prompt", "Once", "--tokens", "6", "--seed", "4")[1] != text


def test_ends_with_the_document(write, model, monkeypatch):
    """A drawn BOS is not printed; characters of two bytes come out whole, half ones as U+FFFD."""
    drawn = [*"dé".encode(), 0xC3, BYTES.bos_id, *b"more"]
    seen = []

    def generate(decoder, tokens, temperature, top_k, generator):
        seen.append((tokens, temperature, top_k))
        return iter(drawn)

    monkeypatch.setattr(sample, "generate", generate)
    words = ("--prompt", "b", "--temperature", "0.5", "--top-k", "7")
    assert write(*words)[1] == "bdé\N{REPLACEMENT CHARACTER}\n"
    assert write(*words, "--tokens", "2")[1] == "bd\N{REPLACEMENT CHARACTER}\n"
    assert seen[0] == ([BYTES.bos_id] * 4 + [ord("b")], 0.5, 7)


@pytest.mark.parametrize("step", [4, END])
def test_windows_are_of_the_models_step(write, model, monkeypatch, step):
    """A model of the first stage was trained with that stage's."""
    seen, make = [], sample.decoder_for
    monkeypatch.setattr(
        sample, "decoder_for", lambda m, windows, bos: seen.append(windows) or make(m, windows, bos)
    )
    trained = Trained(model, CONFIG, BYTES, step)
    assert write("--tokens", "1", load=lambda path, device: trained)[0] == 0
    assert seen == [Schedule(CONFIG.schedule).plan(step).windows]


def test_interactive(write, monkeypatch):
    """Each line is a text of its own; an empty one ends."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    code, text, rates = write("--interactive", "--tokens", "1", "--temperature", "0")
    lines = text.split("\n")
    assert code == 0 and len(rates.splitlines()) == 2
    assert [line[:3] for line in lines if line[:3] in ("one", "two", "thr")] == ["one", "two"]


@pytest.mark.parametrize(
    "words",
    [["--tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "x"]],
)
def test_bad_options(write, words, capsys):
    with pytest.raises(SystemExit):
        write(*words)
    assert words[0] in (error := capsys.readouterr().err) and words[1] in error


def test_bad_checkpoint(write):
    def load(path, device):
        raise RunError(f"{path}: no whole checkpoint")

    code, _, error = write(load=load)
    assert (code, error) == (1, "speedrun sample: error: CKPT: no whole checkpoint\n")


def test_without_a_vocabulary(write, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, error = write(load=lambda path, device: Trained(model, CONFIG, GPT2, END))
    assert code == 1 and "gpt2.tiktoken" in error and "speedrun data fetch" in error
