"""Incremental decoding: token by token and in pieces, the states of one pass over all tokens."""

import dataclasses
import itertools

import pytest
import torch

from speedrun import decode
from speedrun.config import Windows
from speedrun.decode import CachedDecoder, decoder_for, draw, generate
from speedrun.reference.softcap_ce import softcap
from test_record_model import ALONE, RECORD, random_model
from train_helpers import micro_batch, random_baseline

BOS = 1
WINDOWS = Windows(5, 9, yarn=((4, 9),))  # odd: in pairs a window ends inside a token
ISOLATED = dataclasses.replace(RECORD, isolate_documents=True)
WIDE_DC = dataclasses.replace(RECORD, dc_window=14)  # looks back further than attention
CONFIGS = {**ALONE, "all": RECORD, "isolated": ISOLATED, "wide dc": WIDE_DC}


def documents(config, lengths, seed=0):
    """Tokens (sum of lengths), each document with BOS in front, and where they begin."""
    generator = torch.Generator().manual_seed(seed)
    tokens, starts = [], [0]
    for length in lengths:
        others = torch.randint(BOS + 1, config.vocab_size, (length - 1,), generator=generator)
        tokens += [BOS, *others.tolist()]
        starts.append(len(tokens))
    return tokens, starts


def whole(model, tokens, starts, windows=WINDOWS):
    """States (T, D) of one pass over all tokens."""
    batch = micro_batch(model.config, torch.tensor([[*tokens, 0]]).numpy(), starts)
    with torch.no_grad():
        return model.trunk(batch, model.plan_windows(batch, windows))


def in_pieces(model, tokens, sizes, windows=WINDOWS):
    decoder, begin, states = CachedDecoder(model, windows, BOS), 0, []
    for size in sizes:
        states.append(decoder.states(tokens[begin : begin + size]))
        begin += size
    states += [decoder.states([token]) for token in tokens[begin:]]
    return torch.cat(states)


LENGTHS = (1, 1, 2, 40, 3, 1, 12)  # one is longer than all windows twice


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_whole_pass(name):
    """Every technique alone and all together, at every position: a prompt, then token by token."""
    model = random_model(CONFIGS[name])
    tokens, starts = documents(model.config, LENGTHS)
    found = in_pieces(model, tokens, (44,))
    torch.testing.assert_close(found, whole(model, tokens, starts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [RECORD, ISOLATED], ids=["record", "isolated"])
@pytest.mark.parametrize("sizes", [(), (1, 2, 1, 5, 17)], ids=["one by one", "pieces"])
def test_in_any_pieces(config, sizes):
    """Also of a sequence that begins inside a document."""
    model = random_model(config)
    tokens, starts = documents(config, (4, *LENGTHS))
    tokens, starts = tokens[1:], [0, *(start - 1 for start in starts[1:])]
    found = in_pieces(model, tokens, sizes)
    torch.testing.assert_close(found, whole(model, tokens, starts), rtol=1e-10, atol=1e-10)


def test_a_long_prompt_goes_in_parts_and_memory_is_bounded(monkeypatch):
    """Parts of seven tokens; the caches' room is full, and used again, many times."""
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", 7)
    model = random_model(WIDE_DC)
    tokens, starts = documents(model.config, (150, 30))
    decoder = CachedDecoder(model, WINDOWS, BOS)
    rooms = [len(cache.k) for cache in decoder.caches]
    assert rooms[0] == 2 * 3 + 7 and rooms[-1] == 2 * 13 + 7  # a short pair's window, DC's
    found = decoder.states(tokens)
    torch.testing.assert_close(found, whole(model, tokens, starts), rtol=1e-10, atol=1e-10)
    assert [len(cache.k) for cache in decoder.caches] == rooms


def test_float32_logits_of_a_long_prompt():
    """Softcapped, of the token behind each position, for the vocabulary without its padding."""
    model = random_model(RECORD, torch.float32)
    tokens, starts = documents(RECORD, (25, 15))
    z_TV = whole(model, tokens, starts) @ model.lm_head
    expected = softcap(z_TV, RECORD.softcap_a, RECORD.softcap_b, RECORD.softcap_c)
    decoder = CachedDecoder(model, WINDOWS, BOS)
    found = torch.stack([decoder.feed([token]) for token in tokens])
    assert found.shape == (40, RECORD.vocab_size) and RECORD.vocab_size < RECORD.padded_vocab_size
    torch.testing.assert_close(found, expected[:, : RECORD.vocab_size], rtol=0, atol=1e-4)


def test_no_tokens():
    with pytest.raises(ValueError, match="no tokens"):
        decoder_for(random_model(ALONE["plain"]), WINDOWS, BOS).feed([])


# ---- The plain model ----------------------------------------------------------------------------


def test_baseline_model():
    model = random_baseline(29)
    tokens, _ = documents(model.config, (20,))
    batch = micro_batch(model.config, torch.tensor([[*tokens, 0]]).numpy(), [0, 20])
    with torch.no_grad():
        expected = model(batch, model.plan_windows(batch, WINDOWS))[:, :29]
    decoder = decoder_for(model, WINDOWS, BOS)
    found = torch.stack([decoder.feed(tokens[:5]), *(decoder.feed([t]) for t in tokens[5:])])
    torch.testing.assert_close(found, expected[4:], rtol=1e-10, atol=1e-10)


# ---- Drawing ------------------------------------------------------------------------------------


def counts(logits, draws=2000, **options):
    generator = torch.Generator().manual_seed(0)
    tokens = [draw(logits, generator=generator, **options) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


def test_draw_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    for temperature in (1.0, 2.5):
        expected = (logits / temperature).softmax(0)
        found = counts(logits, temperature=temperature, top_k=None)
        # Five standard deviations of a share of 2,000 draws are at most 0.056.
        assert (found - expected).abs().max() < 0.056


def test_draw_of_the_largest():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    assert counts(logits, 50, temperature=0, top_k=None).tolist() == [0, 0, 1, 0]
    assert counts(logits, 50, temperature=1.0, top_k=1).tolist() == [0, 0, 1, 0]
    two = counts(logits, temperature=1.0, top_k=2)
    assert two[:2].tolist() == [0, 0]
    assert (two[2:] - logits[2:].softmax(0)).abs().max() < 0.056
    assert counts(logits, 50, temperature=1.0, top_k=99).sum() == 1


def test_generate_continues_the_prompt():
    """The largest of each whole pass over all tokens so far; seeds give their own texts."""
    model = random_model(RECORD)
    tokens, _ = documents(RECORD, (12,))
    decoder = decoder_for(model, WINDOWS, BOS)
    tokens_of = generate(decoder, tokens, 0, None, torch.Generator())
    for _ in range(4):
        found = next(tokens_of)
        starts = [i for i, token in enumerate(tokens) if token == BOS]
        states = whole(model, tokens, [*starts, len(tokens)])
        assert found == (states[-1] @ model.lm_head)[: RECORD.vocab_size].argmax()
        tokens.append(found)

    def text(seed):
        decoder = decoder_for(model, WINDOWS, BOS)
        generator = torch.Generator().manual_seed(seed)
        return list(itertools.islice(generate(decoder, [BOS], 1.0, 5, generator), 8))

    assert text(0) == text(0) != text(1)
