"""The prefix table: GPT-2's by its hash, others against brute force; what a run needs before it."""

import dataclasses
import hashlib
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.data import BYTES, GPT2, DataError, DataFormat
from speedrun.prefix_table import build_prefix_table, prefix_tokenizer
from speedrun.tokenizer import RANK_FILE, Tokenizer, load_tokenizer
from train_helpers import small_config

GPT2_SHA256 = "36281293860d09f2307c3d2cd503f2e595e24c165fbd49b11f89cfaed71b617c"


class MadeUp(Tokenizer):
    """A vocabulary of the words given, and BOS in the place `bos_id`."""

    def __init__(self, words, bos_id):
        self.words = [*words[:bos_id], b"<|endoftext|>", *words[bos_id:]]
        self.format = DataFormat("made up", len(self.words), bos_id)

    def token_bytes(self, token):
        return self.words[token]


@pytest.fixture(scope="module")
def gpt2(shared_data):
    folder = shared_data / "gpt2_bpe"
    if not (folder / RANK_FILE).exists():
        pytest.skip(f"no {folder / RANK_FILE}")
    return load_tokenizer("gpt2", folder=folder)


def test_gpt2(gpt2):
    started = time.perf_counter()
    table = build_prefix_table(gpt2, 50_304)
    assert time.perf_counter() - started < 0.5  # it is charged to the clock
    assert table.shape == (50_304,) and table.dtype == np.int64
    assert np.count_nonzero(table != -1) == 50_000
    assert hashlib.sha256(table.astype("<i4").tobytes()).hexdigest() == GPT2_SHA256


def brute_force(words, bos_id, size):
    """Every word against every other, by the definition."""
    table = [-1] * size
    for token, word in enumerate(words):
        prefixes = [
            (len(other), i)
            for i, other in enumerate(words)
            if bos_id not in (i, token) and len(other) < len(word) and word.startswith(other)
        ]
        table[token] = max(prefixes, default=(0, -1))[1]
    return table


@settings(deadline=None)
@given(st.sets(st.text("ab", min_size=1, max_size=7), min_size=1), st.randoms())
def test_made_up_vocabularies(words, random):
    words = [word.encode() for word in sorted(words)]
    random.shuffle(words)
    tokenizer = MadeUp(words, bos_id=random.randint(0, len(words)))
    size = len(tokenizer.words) + 3
    wanted = brute_force(tokenizer.words, tokenizer.format.bos_id, size)
    assert build_prefix_table(tokenizer, size).tolist() == wanted


def test_bos_is_no_prefix_and_has_none():
    words = [b"<", b"<|endoftext|>s", b"a", b"ab", b"abcd"]
    table = build_prefix_table(MadeUp(words, bos_id=5), 8)
    assert table.tolist() == [-1, 0, -1, 2, 3, -1, -1, -1]


def test_bytes_have_no_prefixes():
    assert (build_prefix_table(load_tokenizer("bytes"), 272) == -1).all()
    with pytest.raises(ValueError, match="padded_vocab_size=256: bytes has 257 tokens"):
        build_prefix_table(load_tokenizer("bytes"), 256)


def with_prefix_loss(**changes):
    schedule = small_config().schedule
    first = dataclasses.replace(schedule.stages[0], prefix_weight=(0.25, 0.0))
    return dataclasses.replace(schedule, stages=(first, *schedule.stages[1:]), **changes)


def test_a_run_asks_for_the_tokenizer_only_if_its_loss_needs_it(shared_data, tmp_path, gpt2):
    folder = shared_data / "gpt2_bpe"
    found = prefix_tokenizer(with_prefix_loss(), GPT2, folder)
    assert found.token_bytes(15496) == gpt2.token_bytes(15496) == b"Hello"
    assert prefix_tokenizer(with_prefix_loss(), BYTES, tmp_path) is None
    assert prefix_tokenizer(small_config().schedule, GPT2, tmp_path) is None
    assert prefix_tokenizer(with_prefix_loss(prefix_loss=False), GPT2, tmp_path) is None


def test_a_missing_tokenizer_is_named_with_its_fix(tmp_path):
    missing = re.escape(f"{tmp_path / RANK_FILE}: GPT-2's rank file can't be read")
    fix = "in the folder of the shards; --set schedule.prefix_loss=false trains without"
    with pytest.raises(DataError, match=rf"{missing}.*`speedrun data fetch`.*{fix}"):
        prefix_tokenizer(with_prefix_loss(), GPT2, tmp_path)
    unknown = DataFormat("mine", 300, 299)
    with pytest.raises(DataError, match=f"tokenizer 'mine': there are gpt2 and bytes.*{fix}"):
        prefix_tokenizer(with_prefix_loss(), unknown, tmp_path)
