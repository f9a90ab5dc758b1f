"""Shard files as written, and the two corpora that need no download."""

import errno
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun import corpus, shards
from speedrun._numpy_loader import HEADER_BYTES, Shard
from speedrun.data import BYTES, GPT2, DataError, find_shards, read_format
from speedrun.shards import folder_lock, write_shards, write_splits


def documents_of(paths, format=BYTES):
    """The documents in shards, without their BOS."""
    found = []
    for path in paths:
        shard = Shard(path, format)
        ends = [*shard.find_documents(at_least_one=True)[1:], shard.num_tokens]
        begins = shard.find_documents(at_least_one=True)
        found += [shard.read(b, e)[1:].tolist() for b, e in zip(begins, ends, strict=True)]
    return found


def row(*tokens):
    return np.array(tokens, np.uint16)


def test_header_names_and_manifest(tmp_path):
    write_shards(tmp_path, "a", "train", [row(1, 2), row(3)], BYTES)
    write_shards(tmp_path, "a", "val", [row(4)], BYTES, long_documents="cut")
    content = (tmp_path / "a_train_000001.bin").read_bytes()
    assert np.frombuffer(content[:16], "<i4").tolist() == [20240520, 1, 5, 0]
    assert not any(content[16:HEADER_BYTES])
    assert np.frombuffer(content[HEADER_BYTES:], "<u2").tolist() == [256, 1, 2, 256, 3]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"].keys() == {"a_train_000001.bin", "a_val_000000.bin"}
    assert manifest["files"]["a_train_000001.bin"] == {
        "bytes": len(content),
        "tokens": 5,
        "documents": 2,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert manifest["long_documents"] == "cut"
    assert read_format(tmp_path) == BYTES


@settings(deadline=None)  # it writes files
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), size=st.integers(1, 40))
def test_every_document_arrives_whole(tmp_path_factory, lengths, size):
    folder = tmp_path_factory.mktemp("shards")
    documents = [np.arange(length, dtype=np.uint16) for length in lengths]
    entries = write_shards(folder, "x", "train", documents, BYTES, tokens_per_shard=size)
    assert documents_of(find_shards(folder, "train")) == [d.tolist() for d in documents]
    for entry in entries.values():
        assert entry["tokens"] <= size or entry["documents"] == 1


@pytest.mark.parametrize(
    "document, message",
    [
        (row(257), "token 257 is outside the vocabulary of bytes"),
        (row(1, 256), "holds BOS"),
        (np.array([1]), "uint16"),
    ],
)
def test_bad_document_leaves_nothing(tmp_path, document, message):
    with pytest.raises(DataError, match="document 1: .*" + message):
        write_shards(tmp_path, "x", "train", [row(1), document], BYTES)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_and_older_shards_stay(tmp_path):
    write_shards(tmp_path, "x", "train", [row(1)], BYTES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted():
        yield row(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "x", "train", interrupted(), BYTES, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(DataError, match=f"{tmp_path}: could not be written .*No space left"):
        write_shards(tmp_path, "x", "train", [row(1)], BYTES)
    assert list(tmp_path.iterdir()) == []


def test_older_shards_are_refused_or_replaced(tmp_path):
    many = [row(i) for i in range(5)]
    write_shards(tmp_path, "x", "train", many, BYTES, tokens_per_shard=2)
    write_shards(tmp_path, "y", "train", [row(9)], BYTES)
    with pytest.raises(DataError, match="is there already"):
        write_shards(tmp_path, "x", "train", many, BYTES)
    write_shards(tmp_path, "x", "train", many, BYTES, overwrite=True)
    names = {"x_train_000001.bin", "y_train_000001.bin"}
    assert {path.name for path in find_shards(tmp_path, "train")} == names
    assert json.loads((tmp_path / "manifest.json").read_text())["files"].keys() == names


def test_another_tokenizer_is_refused(tmp_path):
    write_shards(tmp_path / "a", "x", "train", [row(1)], BYTES)
    with pytest.raises(DataError, match="'bytes', and these are 'gpt2'"):
        write_shards(tmp_path / "a", "y", "train", [row(1)], GPT2)
    write_shards(tmp_path / "b", "x", "train", [row(1)], GPT2)
    (tmp_path / "b" / "manifest.json").unlink()  # as with shards that others wrote
    with pytest.raises(DataError, match="'gpt2', and these are 'bytes'"):
        write_shards(tmp_path / "b", "y", "train", [row(1)], BYTES)


def test_bad_names_and_manifests_are_refused(tmp_path):
    with pytest.raises(DataError, match="shard name"):
        write_shards(tmp_path, "../x", "train", [row(1)], BYTES)
    with pytest.raises(DataError, match="train or val"):
        write_shards(tmp_path, "x", "test", [row(1)], BYTES)
    for broken in ("{", "[]", "{}", '{"files": {"x": 3}}'):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(DataError, match=r"manifest\.json: not a (readable )?manifest"):
            write_splits(tmp_path, "x", [("val", row(1))], BYTES)


def test_second_writer_is_told_of_the_first(tmp_path):
    with folder_lock(tmp_path, wait=False):
        with pytest.raises(DataError, match=f"another process \\(pid {os.getpid()}\\)"):
            with folder_lock(tmp_path, wait=False):
                pass


def test_stdlib_corpus(tmp_path):
    began = time.process_time()
    assert corpus.stdlib_corpus(tmp_path / "c") == tmp_path / "c"
    assert time.process_time() - began < 3
    train, val = (find_shards(tmp_path / "c", split) for split in ("train", "val"))
    assert read_format(tmp_path / "c") == BYTES
    bytes_of = {
        split: sum(map(len, documents_of(paths)))
        for split, paths in (("train", train), ("val", val))
    }
    assert corpus.MIN_VAL_BYTES <= bytes_of["val"] <= corpus.MAX_VAL_BYTES
    assert bytes_of["train"] > 2_000_000
    nats = corpus.compressed_nats_per_byte(val)
    assert 0.7 < nats["bz2"] < nats["gzip"] < 1.7

    stamps = {path: path.stat().st_mtime_ns for path in train + val}
    corpus.stdlib_corpus(tmp_path / "c")
    assert {path: path.stat().st_mtime_ns for path in train + val} == stamps


def test_stdlib_corpus_of_another_python_is_built_again(tmp_path):
    corpus.stdlib_corpus(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    for broken in (whole.replace("CPython", "OtherPython"), "{", None):
        path.unlink() if broken is None else path.write_text(broken)
        corpus.stdlib_corpus(tmp_path)
        assert json.loads(path.read_text()) == json.loads(whole)
    find_shards(tmp_path, "train")[0].write_bytes(b"short")
    corpus.stdlib_corpus(tmp_path)
    assert len(documents_of(find_shards(tmp_path, "train"))) > 100


def test_ranks_building_at_once_share_one_corpus(tmp_path):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=corpus.stdlib_corpus, args=(tmp_path,)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="--text FILE"):
        corpus.stdlib_corpus(tmp_path / "c")


def test_text_corpus_splits_at_nine_tenths(tmp_path):
    text = bytes(i % 96 + 32 for i in range(1115))
    (tmp_path / "t.txt").write_bytes(text)
    folder = corpus.text_corpus(tmp_path / "t.txt", tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    cut = int(1115 * 0.9)
    assert documents_of(find_shards(folder, "train")) == [list(text[:cut])]
    assert documents_of(find_shards(folder, "val")) == [list(text[cut:])]
    assert json.loads((folder / "manifest.json").read_text())["long_documents"] == "split"
    assert corpus.text_corpus(tmp_path / "t.txt", tmp_path / "cache") == folder
    (tmp_path / "t.txt").write_bytes(text + b"x")
    assert corpus.text_corpus(tmp_path / "t.txt", tmp_path / "cache") != folder


@given(st.text(st.sampled_from("aé€\U0001f600"), min_size=1, max_size=60))
def test_text_is_never_cut_inside_a_character(text):
    content = text.encode()
    cut = corpus._cut_for_validation(content)
    assert content[:cut].decode() + content[cut:].decode() == text
    assert 0 <= int(len(content) * 0.9) - cut <= 3


def test_bad_texts(tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        corpus.text_corpus(tmp_path / "none.txt", tmp_path)
    with pytest.raises(DataError, match="can't be read"):
        corpus.text_corpus(tmp_path, tmp_path)
    for content in (b"", b"short"):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(DataError, match="too little to train on"):
            corpus.text_corpus(tmp_path / "t.txt", tmp_path)
    (tmp_path / "t.txt").write_bytes(b"\x80" * 2000)
    with pytest.warns(UserWarning, match=r"not UTF-8 \(byte 0\)"):
        folder = corpus.text_corpus(tmp_path / "t.txt", tmp_path)
    assert [len(d) for d in documents_of(find_shards(folder, "train"))] == [1800]


def test_compressed_nats_per_byte(tmp_path):
    text = os.urandom(20_000)
    tokens = corpus.byte_tokens(text)
    write_shards(tmp_path, "x", "val", [tokens[:9000], tokens[9000:]], BYTES)
    nats = corpus.compressed_nats_per_byte(find_shards(tmp_path, "val"))
    assert nats["gzip"] == pytest.approx(8 * math.log(2), rel=0.02)  # noise has 8 bits a byte
    first = corpus.compressed_nats_per_byte(find_shards(tmp_path, "val"), 5001)  # BOS and 5,000
    assert first["gzip"] == pytest.approx(
        len(gzip.compress(text[:5000], 9)) * 8 * math.log(2) / 5000
    )
    write_shards(tmp_path / "gpt2", "x", "val", [row(50000)], GPT2)
    with pytest.raises(DataError, match="not a byte-level shard"):
        corpus.compressed_nats_per_byte(find_shards(tmp_path / "gpt2", "val"))
    with pytest.raises(DataError, match="nothing to compress"):
        corpus.compressed_nats_per_byte([])
    with pytest.raises(DataError, match="can't be read"):
        corpus.compressed_nats_per_byte([Path(tmp_path / "none.bin")])
