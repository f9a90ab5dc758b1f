"""Who sees whom in the record's model: causality, documents, parts; the recipe's own leaks.

A token's reach are the positions whose logits move when that token is another one; rows of the
bigram and sign tables are made anew. RECIPE section 3 says which techniques ignore documents.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from speedrun.batch import LossWeights, shifted_targets
from speedrun.config import Windows
from test_record_model import ALONE, RECORD, alone, random_model
from train_helpers import FLOAT64_NOISE, micro_batch

STARTS = [0, 4, 5, 11, 16]  # a document of one token among them
WINDOWS = Windows(2, 3)
CONFIGS = {**ALONE, "all": RECORD}
ISOLATED = {
    name: dataclasses.replace(config, isolate_documents=True) for name, config in CONFIGS.items()
}
LEAKS = {"smear", "bigram", "signs", "bigram gates", "constant gates", "key offset", "all"}


def random_tokens(num_parts=1, num_tokens=STARTS[-1] + 1, seed=0):
    return np.random.default_rng(seed).integers(0, RECORD.vocab_size, (num_parts, num_tokens))


def logits(model, tokens, starts=STARTS):
    batch = micro_batch(model.config, tokens, starts)
    with torch.no_grad():
        return model(batch, model.plan_windows(batch, WINDOWS))


def reach(model, position, starts=STARTS):
    tokens = random_tokens(num_tokens=starts[-1] + 1)
    other = tokens.copy()
    other[0, position] = (other[0, position] + 7) % RECORD.vocab_size
    moved = (logits(model, tokens, starts) != logits(model, other, starts)).any(1)
    return moved.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_causality(name):
    """No logits before a token move when it changes; its own do."""
    model = random_model(CONFIGS[name])
    for position in range(STARTS[-1]):
        assert reach(model, position)[0] == position


@pytest.mark.parametrize("name", CONFIGS)
def test_documents(name):
    """Only the techniques that ignore documents cross a boundary; isolated, nothing does."""
    crossed = {}
    for kind, configs in (("record", CONFIGS), ("isolated", ISOLATED)):
        model, crossed[kind] = random_model(configs[name]), []
        for start, end in itertools.pairwise(STARTS):
            for position in range(start, end):
                crossed[kind] += [p for p in reach(model, position) if not start <= p < end]
    assert bool(crossed["record"]) == (name in LEAKS) and crossed["isolated"] == []


NONE = "none,none"  # without attention nothing spreads
CROSSING = {
    # The first token of a document after position 10, and nothing more: smearing reads the
    # embedding before it is smeared, a hash and a sign row read two tokens.
    "smear": (alone(NONE, smear=True), [11]),
    "bigram": (alone(NONE, bigram_rows=37, bigram_dim=40), [11]),
    "signs": (alone(NONE, bigram_rows=37, bigram_dim=40, sign_rows=8), [11]),
    # Whoever sees the key of 11 beside others, in a long window of 3: not 11, whose softmax has one
    # key. In pairs 11 sees two keys, at places 22 and 23, the latter seen up to place 26, in 13.
    "key offset": (alone("long", key_offset=True), [12, 13, 14]),
    "key offset, paired": (alone("long+paired", key_offset=True), [11, 12, 13]),
    "key offset, short": (alone("short", key_offset=True), []),
    "no leak": (alone("long+paired+ve,short+ve"), []),
}


@pytest.mark.parametrize("name", CROSSING)
def test_leaks_reach_exactly(name):
    """From the last token of a document, 10, into the next, 11 … 15."""
    config, expected = CROSSING[name]
    assert [p for p in reach(random_model(config), 10) if p > 10] == expected
    isolated = random_model(dataclasses.replace(config, isolate_documents=True))
    assert [p for p in reach(isolated, 10) if p > 10] == []
    # A token before the last one never gets there.
    assert [p for p in reach(random_model(config), 9) if p > 10] == []


def test_a_leak_spreads_in_its_document_only():
    """Smeared and hashed in at position 11, on from there by attention, not into a third one."""
    model = random_model(alone("long,long", smear=True, bigram_rows=37, bigram_dim=40))
    starts = [0, 4, 9, 14]
    assert reach(model, 3, starts) == [3, 4, 5, 6, 7, 8]


def test_the_first_token_of_a_part():
    """The hash of position 1 takes R−1 in its place; its sign row doesn't (RECIPE section 2)."""
    hashed, signed = (CROSSING[name][0] for name in ("bigram", "signs"))
    assert reach(random_model(hashed), 0) == [0]
    assert reach(random_model(signed), 0) == [0, 1]


# ---- A document in a batch and alone ------------------------------------------------------------


def training_loss(model, tokens, starts, weights):
    batch = micro_batch(model.config, tokens, starts)
    loss = model.training_loss(batch, model.plan_windows(batch, WINDOWS), weights)
    return loss, torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


@pytest.mark.parametrize("name", ISOLATED)
def test_an_isolated_document_is_alone(name):
    """The same logits as in a batch of its own, where it begins at position 0: attention knows
    distances only. For key offset, pairs, hashes and all."""
    model, tokens = random_model(ISOLATED[name]), random_tokens()
    whole = logits(model, tokens)
    for start, end in itertools.pairwise(STARTS):
        own = logits(model, tokens[:, start : end + 1], [0, end - start])
        torch.testing.assert_close(own, whole[start:end], **FLOAT64_NOISE)


def test_not_isolated_it_is_not():
    model, tokens = random_model(RECORD), random_tokens()
    own = logits(model, tokens[:, 11:], [0, 5])
    assert (own - logits(model, tokens)[11:]).abs().max() > 1e-3


PREFIXES = torch.arange(RECORD.padded_vocab_size) // 2 - 1


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights((1.0, 0.5, 0.25)), LossWeights((1.0, 0.5, 0.25), 0.3, PREFIXES)],
    ids=["next token", "multi-token", "prefix"],
)
def test_isolated_losses_are_the_documents_own(weights):
    """Targets stay in the document too: its losses and gradients are those of it alone, up to the
    token behind it, which is its last position's next."""
    model, tokens = random_model(ISOLATED["all"]), random_tokens()
    whole, whole_grads = training_loss(model, tokens, STARTS, weights)
    total, grads = 0.0, [torch.zeros_like(p) for p in model.parameters()]
    for start, end in itertools.pairwise(STARTS):
        loss, own = training_loss(model, tokens[:, start : end + 1], [0, end - start], weights)
        total, grads = total + loss, [a + b for a, b in zip(grads, own, strict=True)]
    torch.testing.assert_close(whole, total, **FLOAT64_NOISE)
    for found, expected in zip(whole_grads, grads, strict=True):
        largest = expected.abs().max().item()
        assert (found - expected).abs().max() <= 1e-11 * max(1, largest)


def test_multi_token_targets_ignore_documents():
    """In the record: target 3 of position 9 is two tokens into the next document."""
    tokens = random_tokens()
    moved = {}
    for kind, configs in (("record", CONFIGS), ("isolated", ISOLATED)):
        model = random_model(configs["no attention"])  # logits that know one token
        moved[kind] = []
        for position in (11, 12, 13):  # as targets; the model's inputs stay
            batch = micro_batch(model.config, tokens, STARTS)
            other = batch.targets_PT.clone()
            other[0, position - 1] = (other[0, position - 1] + 7) % RECORD.vocab_size
            losses = [
                losses_up_to_10(model, dataclasses.replace(batch, targets_PT=targets))
                for targets in (batch.targets_PT, other)
            ]
            moved[kind].append(bool(losses[0] != losses[1]))
    assert moved == {"record": [True, True, True], "isolated": [True, False, False]}


def losses_up_to_10(model, batch):
    """Of the positions of the first three documents."""
    plan = model.plan_windows(batch, WINDOWS)
    targets_TN = shifted_targets(batch.targets_PT, 3, plan.first_PT)
    with torch.no_grad():
        weights_N = torch.tensor([1.0, 0.5, 0.25])
        return model.losses(model.trunk(batch, plan), targets_TN, weights_N)[:11].sum()


# ---- Parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RECORD, ISOLATED["all"]], ids=["record", "isolated"])
def test_parts_of_a_micro_batch_do_not_see_each_other(config):
    """Losses and gradients of both at once are those of each: also at a part's ends."""
    model, tokens = random_model(config), random_tokens(2)
    weights = LossWeights((1.0, 0.5, 0.25), 0.3, PREFIXES)
    both = training_loss(model, tokens, STARTS, weights)
    each = [training_loss(model, part[None], STARTS, weights) for part in tokens]
    torch.testing.assert_close(both[0], each[0][0] + each[1][0], **FLOAT64_NOISE)
    for found, *own in zip(both[1], each[0][1], each[1][1], strict=True):
        largest = found.abs().max().item()
        assert (found - sum(own)).abs().max() <= 1e-11 * max(1, largest)
    whole = logits(model, tokens).view(2, 16, -1)
    for part in range(2):
        own = logits(model, tokens[part : part + 1])
        torch.testing.assert_close(whole[part], own, **FLOAT64_NOISE)


def test_a_token_reaches_its_part_only():
    model, tokens = random_model(RECORD), random_tokens(2)
    other = tokens.copy()
    other[0, 15] = (other[0, 15] + 7) % RECORD.vocab_size
    moved = (logits(model, tokens) != logits(model, other)).any(1).nonzero().flatten().tolist()
    assert moved == [15]
