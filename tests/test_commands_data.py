"""`speedrun data fetch | tokenize | check`, as the command line runs them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from speedrun import _text_documents
from speedrun._numpy_loader import Shard
from speedrun.commands import data
from speedrun.data import BYTES, GPT2, find_shards
from speedrun.shards import write_shards

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("SPEEDRUN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
RANK_FILE = SHARED_DATA / "gpt2_bpe" / "gpt2.tiktoken"


def speedrun_data(*words):
    """The exit code of `speedrun data WORDS`."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in words]))


def texts_of(folder, split):
    """The texts of a byte-level split."""
    texts = []
    for path in find_shards(folder, split):
        shard = Shard(path, BYTES)
        tokens = shard.read(0, shard.num_tokens)
        texts += [
            bytes(d[1:].tolist()) for d in np.split(tokens, np.flatnonzero(tokens == 256))[1:]
        ]
    return texts


@pytest.fixture
def library(tmp_path):
    """A folder of texts, and what a user would find in one."""
    folder = tmp_path / "library"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "a.txt").write_text("first")
    (folder / "c.md").write_text("zweite §")
    (folder / "b" / "d.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth\\ud800"}\n')
    (folder / "b" / "e.png").write_bytes(b"\x89PNG\0\0")
    (folder / "b" / "f.txt").write_text("")
    return folder


def test_tokenize_a_folder(library, tmp_path, capsys):
    out = tmp_path / "out"
    args = ("tokenize", library, "--out", out, "--tokenizer", "bytes", "--val-documents", 1)
    assert speedrun_data(*args) == 0
    assert texts_of(out, "val") == [b"first"]
    assert texts_of(out, "train") == ["zweite §".encode(), b"third", b"fourth?"]
    said = capsys.readouterr().out
    assert f"not UTF-8 text: {library / 'b' / 'e.png'}" in said
    assert "empty: 1 documents" in said
    assert "4 documents, 26 bytes, 30 tokens in" in said and "tokens/s" in said
    assert speedrun_data("check", out) == 0

    assert speedrun_data(*args) == 1
    assert "is there already" in capsys.readouterr().err
    assert speedrun_data(*args, "--name", "more") == 0
    assert len(list(out.glob("*.bin"))) == 4


def jsonl(path, num_documents, words=400):
    with path.open("w") as file:
        for index in range(num_documents):
            file.write(json.dumps({"body": f"document {index} " + "word " * words}) + "\n")
    return path


def test_validation_fraction_is_spread_evenly(tmp_path):
    source = jsonl(tmp_path / "s.jsonl", 40, words=1)
    out = tmp_path / "out"
    words = ("tokenize", source, "--out", out, "--tokenizer", "bytes", "--field", "body")
    assert speedrun_data(*words, "--val-frac", 0.1) == 0
    numbers = [int(text.split()[1]) for text in texts_of(out, "val")]
    assert numbers == [9, 19, 29, 39]
    assert len(texts_of(out, "train")) == 36
    assert speedrun_data(*words, "--val-frac", 0, "--name", "all") == 0
    assert not list(out.glob("all_val*"))


def test_same_shards_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(_text_documents, "_BATCH_BYTES", 20_000)  # so that a pool starts
    source = jsonl(tmp_path / "s.jsonl", 200)
    contents = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        words = ("--out", out, "--tokenizer", "bytes", "--field", "body", "--workers", workers)
        assert speedrun_data("tokenize", source, *words) == 0
        contents.append({path.name: path.read_bytes() for path in out.glob("*.bin")})
    assert len(contents[0]) == 2 and contents[0] == contents[1]


def test_tokenize_gpt2(library, tmp_path, capsys):
    pytest.importorskip("tiktoken")
    if not RANK_FILE.exists():
        pytest.skip(f"no {RANK_FILE}; SPEEDRUN_SHARED_DATA names the folder")
    (library / "a.txt").write_text("Hello world")
    out = tmp_path / "out"
    words = ("tokenize", library, "--out", out, "--tokenizer", "gpt2", "--val-documents", 1)
    assert speedrun_data(*words) == 1
    assert "speedrun data fetch" in capsys.readouterr().err
    assert speedrun_data(*words, "--rank-file", RANK_FILE) == 0
    assert Shard(find_shards(out, "val")[0], GPT2).read(0, 3).tolist() == [50256, 15496, 995]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": \n', r"s.jsonl:2: not a JSON object with the field 'text'"),
        ('{"text": "a"}\n{"txet": "b"}\n', "s.jsonl:2: not a JSON object with the field 'text'"),
        ('["a"]\n', "s.jsonl:1: not a JSON object"),
        ('{"text": 3}\n', "s.jsonl:1: field 'text' is a int, not a text"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, capsys, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    out = tmp_path / "out"
    words = ("tokenize", tmp_path / "s.jsonl", "--out", out, "--tokenizer", "bytes")
    assert speedrun_data(*words) == 1
    assert message in capsys.readouterr().err
    assert not list(out.glob("*.bin")) and not list(out.glob(".*.tmp"))


def test_tokenize_refuses_what_makes_no_sense(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_bytes(b"abc\xff")
    out = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    for words, message in (
        ((tmp_path / "none", *out), "no such file or folder"),
        ((text, *out), "1 documents leave none for val"),
        ((text, *out, "--val-documents", 1), "1 documents leave none for train"),
        ((text, *out, "--val-frac", 1), "0 <= --val-frac < 1"),
        ((text, *out, "--workers", 0), "--workers 1 or more"),
        ((tmp_path, "--out", tmp_path, "--tokenizer", "bytes"), "is an input too"),
        ((text, *out, "--name", "a/b"), "shard name 'a/b'"),
    ):
        assert speedrun_data("tokenize", *words) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*.bin"))
    assert speedrun_data("tokenize", text, *out, "--val-frac", 0) == 0
    assert texts_of(tmp_path / "out", "train") == [b"abc\xff"]


def test_text_that_gpt2_cannot_take_is_named(tmp_path, capsys):
    pytest.importorskip("tiktoken")
    if not RANK_FILE.exists():
        pytest.skip(f"no {RANK_FILE}; SPEEDRUN_SHARED_DATA names the folder")
    options = ("--out", tmp_path / "out", "--tokenizer", "gpt2", "--rank-file", RANK_FILE)
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    assert speedrun_data("tokenize", tmp_path / "t.txt", *options) == 1
    assert f"{tmp_path / 't.txt'}: not UTF-8 text (byte 3)" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text(" " * 1_000_000 + "x")
    assert speedrun_data("tokenize", tmp_path / "t.txt", *options) == 1
    assert f"{tmp_path / 't.txt'}: 1,000,000 white-space" in capsys.readouterr().err


def test_ctrl_c_while_tokenizing_leaves_no_shard(tmp_path):
    program = (
        "import sys, argparse, time; from speedrun import shards; "
        "from speedrun.commands import data; "
        # A document takes its time, so that the signal comes in the middle of the work.
        "checked = shards._checked; "
        "shards._checked = lambda *words: (time.sleep(0.02), checked(*words))[1]; "
        "p = argparse.ArgumentParser(); data.add_arguments(p); "
        "sys.exit(data.run(p.parse_args(sys.argv[1:])))"
    )
    (tmp_path / "in").mkdir()
    source = jsonl(tmp_path / "in" / "big.jsonl", 3000, words=40)
    out = tmp_path / "out"
    words = ["tokenize", source, "--field", "body", "--out", out, "--tokenizer", "bytes"]
    running = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words), "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        start_new_session=True,
    )
    began = time.monotonic()
    while not list(out.glob(".*.tmp")) and time.monotonic() - began < 30:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    error = running.communicate(timeout=30)[1]
    assert running.returncode == 130
    assert error == "speedrun data tokenize: stopped\n"
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    documents = [np.arange(n, dtype=np.uint16) % 256 for n in (3, 5, 9)]
    write_shards(folder, "x", "train", documents, BYTES, tokens_per_shard=10)
    write_shards(folder, "x", "val", documents[:1], BYTES)
    return folder


def test_check_prints_a_table(shards, capsys):
    assert speedrun_data("check", shards, shards / "x_val_000000.bin") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "tokens", "documents", "mean", "length", "sha256"]
    assert [line.split()[1:] for line in lines[1:]] == [
        ["10", "2", "5.0", "ok"],
        ["10", "1", "10.0", "ok"],
        ["4", "1", "4.0", "ok"],
    ]


def test_check_lists_every_problem(shards, capsys):
    first, second = find_shards(shards, "train")
    content = bytearray(first.read_bytes())
    content[-2:] = b"\xff\xff"
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-2])
    (shards / "x_val_000000.bin").unlink()
    (shards / "y_val_000000.bin").write_bytes(b"short")
    assert speedrun_data("check", shards, shards / "none", shards.parent) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 5
    assert [out.count(state) for state in ("WRONG", "missing", "not listed")] == [2, 2, 1]
    for problem in (
        "token 65535 at offset 9, outside the bytes vocabulary of 257",
        f"{second}: {second.stat().st_size} bytes, but 10 tokens",
        f"{first}: sha256",
        "x_val_000000.bin: no such file",
        "y_val_000000.bin: 5 bytes, less than the header's",
        f"{shards / 'none'}: no such file",
        f"{shards.parent}: no .bin shard in it",
    ):
        assert problem in err


def test_check_without_or_with_a_bad_manifest(shards, tmp_path, capsys):
    write_shards(tmp_path / "gpt2", "x", "val", [np.array([1], np.uint16)], GPT2)
    (tmp_path / "gpt2" / "manifest.json").unlink()
    assert speedrun_data("check", tmp_path / "gpt2") == 0
    assert "no manifest" in capsys.readouterr().out
    (shards / "manifest.json").write_text("{")
    assert speedrun_data("check", shards) == 1
    assert "bad manifest" in capsys.readouterr().out


def test_check_shard_without_bos(tmp_path, capsys):
    entries = write_shards(tmp_path, "x", "val", [np.array([1, 2], np.uint16)], GPT2)
    path = tmp_path / next(iter(entries))
    content = bytearray(path.read_bytes())
    content[1024:1026] = b"\0\0"
    path.write_bytes(content)
    assert speedrun_data("check", path) == 1
    assert "no document start (token 50256)" in capsys.readouterr().err


def test_fetch_from_a_folder(tmp_path, capsys):
    write_shards(tmp_path / "in", "fineweb", "val", [np.array([1], np.uint16)], GPT2)
    write_shards(tmp_path / "in", "fineweb", "train", [np.array([2], np.uint16)], GPT2)
    words = ("fetch", "--out", tmp_path / "out", "--source", tmp_path / "in", "--train-shards")
    assert speedrun_data(*words, 1) == 0
    assert "2 shards are there" in capsys.readouterr().out
    assert speedrun_data("check", tmp_path / "out") == 0
    assert speedrun_data(*words, 2) == 1
    assert "lacks fineweb_train_000002.bin" in capsys.readouterr().err


def test_check_says_whether_the_data_serve_a_recipe(tmp_path, capsys):
    folder = tmp_path / "few"
    documents = [np.full(5_000, 65, np.uint16)] * 20
    for split in ("train", "val"):
        write_shards(folder, "few", split, iter(documents), BYTES)
    assert speedrun_data("check", folder, "--recipe", "tiny") == 0  # tiny repeats its data
    assert "enough for recipe tiny" in capsys.readouterr().out
    short = tmp_path / "short"
    for split in ("train", "val"):
        write_shards(short, "short", split, iter(documents[:1]), BYTES)
    (short / "short_val_000000.bin").unlink()
    assert speedrun_data("check", short, "--recipe", "tiny") == 1
    assert "short" in capsys.readouterr().err
    assert speedrun_data("check", folder, "--recipe", "unknown") == 1
    assert "no recipe 'unknown'; recipes: " in capsys.readouterr().err
