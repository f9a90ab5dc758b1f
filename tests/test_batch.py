"""What is derived from the tokens of a micro-batch alone, in and out of documents."""

import numpy as np
import pytest
import torch

from speedrun.batch import BIGRAM_HASH, MicroBatch, isolated_rows, previous, shifted_targets
from train_helpers import make_batch, small_config


def signed32(x):
    return (x + 2**31) % 2**32 - 2**31


def hash_row(tokens, t, R):
    """RECIPE section 2, in Python's integers: position 0 of a sequence gets R−1, and position 1
    uses R−1 in the place of the first token; products wrap, the remainder is not negative."""
    if t == 0:
        return R - 1
    before = R - 1 if t == 1 else tokens[t - 1]
    return (signed32(36313 * tokens[t]) ^ signed32(27191 * before)) % (R - 1)


def sign_row(tokens, t, rows):
    return 0 if t == 0 else (tokens[t - 1] ^ tokens[t]) % rows


def first_of(starts, num_parts, num_tokens):
    first = torch.zeros(num_parts, num_tokens, dtype=torch.bool)
    for part, own in enumerate(starts):
        first[part, own] = True
    return first


@pytest.mark.parametrize("vocab_size", [300, 50_257])
@pytest.mark.parametrize("R", [31, 377_280])
def test_rows_of_isolated_documents(R, vocab_size):
    """As if each document began its part; R = 377,280 makes 27191·(R−1) wrap."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (2, 12)).astype(np.int32)
    tokens[0, 1] = 50_256 % vocab_size
    starts = [[0, 1, 2, 7, 11], [0, 6]]
    config = small_config().model
    whole = make_batch(config, 2, [0, 12])  # its rows are there to be left where they are right
    rows = torch.tensor([[hash_row(part, t, R) for t in range(12)] for part in tokens.tolist()])
    signs = torch.tensor([[sign_row(part, t, 8) for t in range(12)] for part in tokens.tolist()])
    batch = MicroBatch(
        torch.from_numpy(tokens), whole.targets_PT, whole.cu_seqlens, rows.int(), signs.int()
    )
    found_rows, found_signs = isolated_rows(batch, first_of(starts, 2, 12), R)
    assert found_rows.dtype == found_signs.dtype == torch.int32
    for part, own in enumerate(starts):
        for start, end in zip(own, [*own[1:], 12], strict=True):
            document = tokens[part, start:end].tolist()
            expected = [hash_row(document, t, R) for t in range(len(document))]
            assert found_rows[part, start:end].tolist() == expected
            expected = [sign_row(document, t, 8) for t in range(len(document))]
            assert found_signs[part, start:end].tolist() == expected


def test_rows_without_signs():
    batch = make_batch(small_config().model, 1, [0, 4])
    without = MicroBatch(batch.inputs_PT, batch.targets_PT, batch.cu_seqlens, batch.bigram_rows_PT)
    rows, signs = isolated_rows(without, first_of([[0]], 1, 4), 31)
    assert torch.equal(rows, batch.bigram_rows_PT) and signs is None


def test_factors_of_the_hash():
    assert BIGRAM_HASH == (36313, 27191)


def test_loaders_rows_are_those_of_one_document():
    """The batch's own rows ignore documents (RECIPE section 2)."""
    config = small_config().model
    batch = make_batch(config, 2, [0, 5, 9])
    for part in range(2):
        tokens = batch.inputs_PT[part].tolist()
        assert batch.bigram_rows_PT[part].tolist() == [hash_row(tokens, t, 31) for t in range(9)]
        assert batch.sign_rows_PT[part].tolist() == [sign_row(tokens, t, 8) for t in range(9)]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 1, 2)], ids=str)
def test_previous(shape):
    x = torch.randn(shape)
    found = previous(x)
    assert found.shape == x.shape
    for part in range(shape[0]):
        for t in range(shape[1]):
            expected = torch.zeros_like(x[part, t]) if t == 0 else x[part, t - 1]
            assert torch.equal(found[part, t], expected)


@pytest.mark.parametrize("num_targets", [1, 2, 3])
@pytest.mark.parametrize("isolated", [False, True], ids=["over documents", "isolated"])
def test_targets(num_targets, isolated):
    """Target n of position t is token t + n of its part. In a document only those up to its last
    position's next token, the start of the next document, which is that position's target too."""
    tokens = torch.arange(20).view(2, 10)  # inputs; each token is its own number
    targets = torch.stack([torch.cat([part[1:], part[-1:] + 100]) for part in tokens])
    starts = [[0, 1, 4, 9], [0, 5, 6]]
    first = first_of(starts, 2, 10) if isolated else None
    found = shifted_targets(targets, num_targets, first).view(2, 10, num_targets)
    for part in range(2):
        for t in range(10):
            end = min((s for s in starts[part] if s > t), default=10) if isolated else 10
            for n in range(num_targets):
                expected = targets[part, t + n].item() if t + n < end else -1
                assert found[part, t, n] == expected, (part, t, n)
    assert found.dtype == torch.int64


def test_targets_of_a_part_shorter_than_their_number():
    assert shifted_targets(torch.tensor([[7]]), 3).tolist() == [[7, -1, -1]]
    first = torch.tensor([[True]])
    assert shifted_targets(torch.tensor([[7]]), 3, first).tolist() == [[7, -1, -1]]
