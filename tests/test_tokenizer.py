"""Tokenizers: bytes, and GPT-2's from its local rank file."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.data import BYTES, GPT2, DataError
from speedrun.tokenizer import (
    MERGES_SHA256,
    RANK_FILE,
    RANK_FILE_SHA256,
    ByteTokenizer,
    load_tokenizer,
    ranks_from_merges,
)

SHARED_DATA = Path(
    os.environ.get("SPEEDRUN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
)
BPE_FOLDER = SHARED_DATA / "gpt2_bpe"


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("tiktoken")
    if not (BPE_FOLDER / RANK_FILE).exists():
        pytest.skip(f"no {BPE_FOLDER / RANK_FILE}; SPEEDRUN_SHARED_DATA names the folder")
    return load_tokenizer("gpt2", folder=BPE_FOLDER)


@settings(deadline=None)  # the first example builds Hypothesis's tables
@given(st.text())
def test_bytes_round_trip(text):
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == np.uint16
    assert bytes(tokens.tolist()) == text.encode()
    assert ByteTokenizer().decode(tokens) == text


def test_bytes_take_any_bytes_and_half_surrogates():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.format == BYTES
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert tokenizer.encode("\ud800x").tolist() == [63, 120]
    assert tokenizer.decode([65, 256, 66]) == "A<|endoftext|>B"
    with pytest.raises(DataError, match=r"token 257 is outside .* \(0 to 256\)"):
        tokenizer.token_bytes(257)


def test_gpt2_known_tokens(gpt2):
    assert gpt2.format == GPT2
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(b"Hello world").dtype == np.uint16
    assert gpt2.decode([50256, 15496, 995]) == "<|endoftext|>Hello world"
    assert gpt2.token_bytes(995) == b" world"
    assert gpt2.encode("").tolist() == []


def test_gpt2_special_text_is_ordinary(gpt2):
    assert GPT2.bos_id not in gpt2.encode("a<|endoftext|>b")


@settings(deadline=None)  # the first example builds the encoding
@given(text=st.text())
def test_gpt2_round_trip(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_refuses_what_it_cannot_encode(gpt2):
    with pytest.raises(DataError, match="byte 1 of the text is not UTF-8"):
        gpt2.encode(b"a\xff")
    with pytest.raises(DataError, match="white-space characters in a row at character 1"):
        gpt2.encode("a" + " " * 1_000_000)


def test_rank_file_can_be_made_from_the_merges():
    merges = BPE_FOLDER / "vocab.bpe"
    if not merges.exists():
        pytest.skip(f"no {merges}; SPEEDRUN_SHARED_DATA names the folder")
    content = merges.read_bytes()
    assert hashlib.sha256(content).hexdigest() == MERGES_SHA256
    assert hashlib.sha256(ranks_from_merges(content)).hexdigest() == RANK_FILE_SHA256


def test_rank_file_is_checked(tmp_path):
    with pytest.raises(DataError, match="speedrun data fetch"):
        load_tokenizer("gpt2")
    with pytest.raises(DataError, match=r"gpt2\.tiktoken: .*can't be read.*speedrun data fetch"):
        load_tokenizer("gpt2", folder=tmp_path)
    (tmp_path / RANK_FILE).write_text("IQ== 0\n")
    with pytest.raises(DataError, match="not GPT-2's public rank file: 1 lines of"):
        load_tokenizer("gpt2", folder=tmp_path)
    with pytest.raises(DataError, match="there are gpt2 and bytes"):
        load_tokenizer("words")


def test_missing_tiktoken_names_the_extra(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = load_tokenizer("gpt2", BPE_FOLDER / RANK_FILE)
    assert tokenizer.decode([15496]) == "Hello"
    with pytest.raises(DataError, match=r"nanogpt-speedrun\[cli\]"):
        tokenizer.encode("Hello")


def test_gpt2_encodes_public_documents_as_published(gpt2):
    path = SHARED_DATA / "fineweb_sample" / "fineweb_legal_val_000000.bin"
    if not path.exists():
        pytest.skip(f"no {path}; SPEEDRUN_SHARED_DATA names the folder")
    tokens = np.fromfile(path, "<u2", offset=1024)
    documents = np.split(tokens, np.flatnonzero(tokens == GPT2.bos_id))[1:]
    for document in documents[:50]:
        again = gpt2.encode(gpt2.decode(document[1:]))
        np.testing.assert_array_equal(again, document[1:])
