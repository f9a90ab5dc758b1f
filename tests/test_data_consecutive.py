"""Consecutive tokens in sequences of one length: the batches of the track `optimization`."""

import numpy as np
import pytest

from data_helpers import FIELDS, all_steps, make_shards, random_tokens, write_shard
from speedrun import data
from speedrun.data import BYTES, BatchShape, DataError

OPTIONS = dict(batching="consecutive", bigram_table_rows=0, sign_table_rows=0)
ARRAYS = FIELDS[:3]  # there are no table rows


def definition(streams, shapes):
    """(inputs, targets) (8, T) of each step: a shard is left if not more than a token would stay.

    That the public program wants more than a step and its last target is its own rule.
    """
    shard, position, steps = 0, 0, []
    for shape in shapes:
        tokens = 8 * shape.tokens_per_part
        for _ in range(shape.steps):
            if position + tokens + 1 >= len(streams[shard]):
                shard, position = shard + 1, 0
            taken = streams[shard][position : position + tokens + 1].astype(np.int32)
            steps.append((taken[:-1].reshape(8, -1), taken[1:].reshape(8, -1)))
            position += tokens
    return steps


@pytest.mark.parametrize("surplus", [0, 1, 2])
def test_tokens_in_order(tmp_path, surplus):
    """Two steps fit the first shard only if a token beyond the last target is there."""
    sizes = (2 * 8 * 60 + surplus, 3_000)
    streams = [random_tokens(size, seed=i) for i, size in enumerate(sizes)]
    shards = [write_shard(tmp_path / f"{i}.bin", tokens) for i, tokens in enumerate(streams)]
    shapes = [BatchShape(3, 60, 20, 5), BatchShape(1, 50, 20, 4)]
    steps = all_steps(shards, shapes, **OPTIONS)
    assert steps[1].position.shard == (0 if surplus == 2 else 1)
    expected = definition(streams, shapes)
    for step, (inputs, targets) in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.inputs, inputs)
        np.testing.assert_array_equal(step.targets, targets)
        assert step.inputs.dtype == step.targets.dtype == step.cu_seqlens.dtype == np.int32
        assert step.bigram_rows is None and step.sign_rows is None
    assert steps[0].cu_seqlens.tolist() == [[0, 20, 40, 60, 60]] * 8
    assert steps[3].cu_seqlens.tolist() == [[0, 20, 40, 50]] * 8  # the last sequence is shorter


SHAPES = [BatchShape(3, 100, 16, 10), BatchShape(12, 200, 50, 5)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def assert_same_arrays(a, b, parts=slice(None)):
    for field in ARRAYS:
        np.testing.assert_array_equal(getattr(a, field)[parts], getattr(b, field), field)
    assert a.position == b.position


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_rank_gets_its_parts(shards, world_size):
    whole = all_steps(shards, SHAPES, repeat=True, **OPTIONS)
    assert whole[-1].position.epoch == 1  # the case has seen a repeat
    for rank in range(world_size):
        options = OPTIONS | dict(repeat=True, rank=rank, world_size=world_size)
        for a, b in zip(whole, all_steps(shards, SHAPES, **options), strict=True):
            assert_same_arrays(a, b, slice(rank, 8, world_size))


def test_resume_continues_the_stream(shards):
    whole = all_steps(shards, SHAPES, repeat=True, **OPTIONS)
    for done in (1, 3, 8, 14):
        to_come = [BatchShape(max(3 - done, 0), 100, 16, 10)]
        to_come += [BatchShape(min(15 - done, 12), 200, 50, 5)]
        start = whole[done - 1].position
        resumed = all_steps(shards, to_come, repeat=True, start=start, **OPTIONS)
        for a, b in zip(whole[done:], resumed, strict=True):
            assert_same_arrays(a, b)


def test_a_shard_without_documents_will_do(tmp_path):
    shard = write_shard(tmp_path / "train.bin", np.zeros(1_000))
    all_steps([shard], [BatchShape(1, 100, 50, 3)], **OPTIONS)


@pytest.mark.parametrize(
    ("shapes", "options", "pattern"),
    [
        (SHAPES, dict(batching="sequences"), 'batching.*use "documents" or "consecutive"'),
        (SHAPES, dict(backend="host"), 'backend "host" deals documents only; use "numpy"'),
        (SHAPES, {}, "the last shard is used up after .* steps"),
        ([BatchShape(1, 100, 16, 7)], {}, "data.cu_seqlens_entries=8"),
    ],
)
def test_refusals(shards, shapes, options, pattern):
    with pytest.raises(DataError, match=pattern):
        all_steps(shards, shapes, **(OPTIONS | options))


def test_the_schedule_is_checked_before(shards):
    options = dict(format=BYTES, batching="consecutive", long_documents="cut")
    data.check_schedule(shards, SHAPES, repeat=True, **options)
    with pytest.raises(DataError, match=r"needs 15 steps, 21,600 tokens; .* fill 11 steps"):
        data.check_schedule(shards, SHAPES, repeat=False, **options)


@pytest.mark.parametrize("world_size", [1, 4])
def test_validation(shards, world_size):
    """The same tokens as with documents; sequences start every 60 tokens of a part."""
    options = dict(
        format=BYTES, tokens_per_part=240, num_tokens=1_000, world_size=world_size,
        bigram_table_rows=0, sign_table_rows=0,
    )  # fmt: skip
    for rank in range(world_size):
        parts = list(data.validation_parts(shards, rank=rank, sequence_length=60, **options))
        same = list(data.validation_parts(shards, rank=rank, **options))
        for number, part, other in zip(range(rank, 5, world_size), parts, same, strict=True):
            np.testing.assert_array_equal(part.inputs, other.inputs)
            np.testing.assert_array_equal(part.targets, other.targets)
            length = 240 if number < 4 else 40
            starts = [*range(0, length, 60)]
            assert part.cu_seqlens.tolist() == starts + [length] * (128 - len(starts))
