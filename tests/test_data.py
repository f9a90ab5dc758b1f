"""The token loader: golden batches, its two backends against each other, folders, validation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import (
    BACKENDS,
    FIELDS,
    NEEDS_HOST,
    ROWS,
    SHAPES,
    SHARED_DATA,
    all_steps,
    make_shards,
    outcome,
    random_tokens,
    write_shard,
)
from speedrun import data
from speedrun.data import BYTES, GPT2, BatchShape, DataError, LoaderPosition


def assert_same(a, b):
    """Two StepBatches are equal in every field, in type and shape too."""
    assert a.position == b.position
    for field in FIELDS:
        x, y = getattr(a, field), getattr(b, field)
        assert x.dtype == y.dtype == np.int32
        np.testing.assert_array_equal(x, y, err_msg=field, strict=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


# ---- Golden batches of the public program -------------------------------------------------------
@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = SHARED_DATA / "golden_089" / "batches.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set SPEEDRUN_SHARED_DATA to the folder with golden_089")
    arrays, folder = dict(np.load(path)), tmp_path_factory.mktemp("golden")
    names = ["shard_0", "shard_1", "shard_2", "val_shard"]
    return arrays, [write_shard(folder / f"{name}.bin", arrays[name]) for name in names]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [8, 2, 1])
def test_golden_training_batches(golden, backend, world_size):
    arrays, shards = golden
    # At fewer ranks the public program leaves a shard later than ours does: 16 parts agree.
    num_steps = 4 if world_size == 8 else 2
    shapes = [BatchShape(1, 320, 96, 128), BatchShape(num_steps - 1, 400, 200, 128)]
    compared = 0
    for rank in range(world_size):
        steps = all_steps(
            shards[:3], shapes, format=GPT2, rank=rank, world_size=world_size, backend=backend
        )
        micro_batches = [(step, part) for step in steps for part in range(8 // world_size)]
        for number, (step, part) in enumerate(micro_batches):
            tokens = step.inputs.shape[1]
            for field in FIELDS:
                name = f"w{world_size}_{field.removesuffix('s') if 'rows' in field else field}"
                length = 128 if field == "cu_seqlens" else tokens
                expected = arrays[name][number, rank, :length]
                np.testing.assert_array_equal(getattr(step, field)[part], expected, name)
            compared += 1
    assert compared == 8 * num_steps


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_golden_validation_parts(golden, world_size):
    arrays, shards = golden
    for rank in range(world_size):
        parts = data.validation_parts(
            shards[3:],
            format=GPT2,
            tokens_per_part=400,
            num_tokens=6_400,
            **ROWS,
            rank=rank,
            world_size=world_size,
        )
        numbers = range(rank, 16, world_size)
        for number, part in zip(numbers, parts, strict=True):
            for field in ("inputs", "targets", "cu_seqlens", "bigram_rows"):
                name = f"val_{field.removesuffix('s') if 'rows' in field else field}"
                np.testing.assert_array_equal(getattr(part, field), arrays[name][number], name)


# ---- The stream ---------------------------------------------------------------------------------
@pytest.mark.parametrize("long_documents", ["cut", "split"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_rank_gets_its_parts(shards, long_documents, world_size):
    options = dict(long_documents=long_documents, repeat=True)
    whole = all_steps(shards, SHAPES, backend="numpy", **options)
    assert whole[-1].position.epoch == 1  # the case has seen a repeat
    for backend in ["numpy"] + ["host"] * (data._host is not None):
        for rank in range(world_size):
            ranks = dict(rank=rank, world_size=world_size)
            mine = all_steps(shards, SHAPES, backend=backend, **ranks, **options)
            for a, b in zip(whole, mine, strict=True):
                parts = {field: getattr(a, field)[rank::world_size] for field in FIELDS}
                assert_same(data.StepBatch(**parts, position=a.position), b)


@pytest.mark.parametrize("long_documents", ["cut", "split"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_continues_the_stream(shards, long_documents, backend):
    options = dict(long_documents=long_documents, repeat=True, backend=backend)
    whole = all_steps(shards, SHAPES, **options)
    for done in range(1, 15):
        to_come = [BatchShape(max(3 - done, 0), 100, 16, 101)]
        to_come += [BatchShape(min(15 - done, 12), 200, 30, 201)]
        resumed = all_steps(shards, to_come, start=whole[done - 1].position, **options)
        for a, b in zip(whole[done:], resumed, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [2_000, 2_001, 2_007])
def test_split_uses_every_token(tmp_path, backend, num_tokens):
    """Against the definition, token by token: part p reads lane p of eight overlapping lanes."""
    tokens = random_tokens(num_tokens, seed=5, longest=300)
    shard = write_shard(tmp_path / "text.bin", tokens)
    lane = math.ceil((num_tokens - 1) / 8)
    num_steps = math.ceil(lane / 60)
    shapes = [BatchShape(num_steps, 60, 25, 61)]
    steps = all_steps([shard], shapes, long_documents="split", backend=backend)
    used = set()
    for number, step in enumerate(steps):
        for part in range(8):
            begin = (num_tokens - 1 - lane) * part // 7 + min(60 * number, lane - 60)
            used |= set(range(begin, begin + 60))
            expected = tokens[begin : begin + 61]
            np.testing.assert_array_equal(step.inputs[part], expected[:-1])
            np.testing.assert_array_equal(step.targets[part], expected[1:])
            starts, since = [], 0
            for t in range(60):
                since = 0 if t == 0 or expected[t] == BYTES.bos_id else since + 1
                if since % 25 == 0:
                    starts.append(t)
            assert step.cu_seqlens[part].tolist() == starts + [60] * (61 - len(starts))
    assert used == set(range(num_tokens - 1))
    with pytest.raises(DataError, match="used up"):
        one_more = [BatchShape(num_steps + 1, 60, 25, 61)]
        all_steps([shard], one_more, long_documents="split", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table_rows", [(2, 1), (3, 7), (377_280, 8_192), (1 << 30, 1 << 30)])
def test_row_formulas(shards, backend, table_rows):
    """Against Python's unbounded integers."""
    bigram, sign = table_rows
    [step] = all_steps(
        shards, [BatchShape(1, 150, 20, 151)], backend=backend,
        bigram_table_rows=bigram, sign_table_rows=sign,
    )  # fmt: skip

    def wrapped(x):
        return (x + 2**31) % 2**32 - 2**31

    for part, inputs in enumerate(step.inputs.tolist()):
        before = [None, bigram - 1, *inputs[1:]]
        hashes = [
            (wrapped(36313 * x) ^ wrapped(27191 * y)) % (bigram - 1)
            for x, y in list(zip(inputs, before, strict=False))[1:]
        ]
        signs = [(x ^ y) % sign for x, y in zip(inputs[1:], inputs, strict=False)]
        assert step.bigram_rows[part].tolist() == [bigram - 1, *hashes]
        assert step.sign_rows[part].tolist() == [0, *signs]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_without_rows_cost_nothing(shards, backend):
    options = dict(bigram_table_rows=0, sign_table_rows=0, backend=backend)
    [step] = all_steps(shards, [BatchShape(1, 100, 16, 101)], **options)
    assert step.bigram_rows is None and step.sign_rows is None


@NEEDS_HOST
def test_arrays_outlive_the_loader(shards):
    steps = all_steps(shards, SHAPES[:1], backend="host")
    kept = [step.inputs[1:] for step in steps]
    copies = [part.copy() for part in kept]
    del steps
    all_steps(shards, SHAPES, backend="host", repeat=True)  # would reuse memory let go too early
    for part, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(part, copy)


@NEEDS_HOST
@settings(max_examples=60, deadline=None)
@given(case=st.data())
def test_backends_agree_on_anything(tmp_path_factory, case):
    folder = tmp_path_factory.mktemp("any")
    numbers = st.integers(1, 30)
    shards = [
        write_shard(
            folder / f"{i}.bin",
            random_tokens(case.draw(st.integers(1, 1_500)), i, longest=case.draw(numbers)),
        )
        for i in range(case.draw(st.integers(1, 3)))
    ]
    shapes = [
        BatchShape(case.draw(st.integers(0, 3)), case.draw(numbers), case.draw(numbers), entries)
        for entries in case.draw(st.lists(st.integers(8, 40), max_size=3))
    ]
    world_size = case.draw(st.sampled_from([1, 2, 4, 8]))
    options = dict(
        world_size=world_size,
        rank=case.draw(st.integers(0, world_size - 1)),
        long_documents=case.draw(st.sampled_from(["cut", "split"])),
        repeat=case.draw(st.booleans()),
        start=LoaderPosition(len(shards) - 1, case.draw(st.integers(0, 60)), 2),
        bigram_table_rows=case.draw(st.integers(2, 1 << 30)),
        sign_table_rows=case.draw(st.integers(1, 1 << 30)),
    )
    (a, error_a), (b, error_b) = (
        outcome(shards, shapes, backend=backend, **options) for backend in ("numpy", "host")
    )
    assert error_a == error_b and len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


# ---- Folders, formats, validation ---------------------------------------------------------------
def test_cu_seqlens_entries():
    expected = {
        16_384: 64,
        32_768: 96,
        49_152: 128,
        65_536: 256,
        262_144: 896,
        400: 128,
        38_700: 256,
    }
    assert {tokens: data.cu_seqlens_entries(tokens) for tokens in expected} == expected


def test_find_shards(tmp_path):
    for name in ("b_train_2.bin", "b_train_1.bin", "a_val_0.bin", "a_train_3.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in data.find_shards(tmp_path, "train")] == [
        "b_train_1.bin",
        "b_train_2.bin",
    ]
    assert [path.name for path in data.find_shards(str(tmp_path), "val")] == ["a_val_0.bin"]
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent", "a_val_0.bin"):
        with pytest.raises(DataError, match=f"{folder}.*speedrun data fetch"):
            data.find_shards(tmp_path / folder, "val")


def test_read_format(tmp_path):
    def with_manifest(text):
        (tmp_path / "manifest.json").write_text(text)
        return data.read_format(tmp_path)

    assert data.read_format(tmp_path) == data.read_format(tmp_path / "absent") == GPT2
    mine = {"tokenizer": "mine", "vocab_size": 300, "bos_id": 0, "files": {}}
    assert with_manifest(json.dumps(mine)) == data.DataFormat("mine", 300, 0)
    assert with_manifest('{"files": {"a.bin": "hash"}}') == GPT2
    for bad in (
        "{",
        "[]",
        json.dumps(mine | {"bos_id": 300}),
        json.dumps(mine | {"vocab_size": 65_537}),
        json.dumps(mine | {"vocab_size": "300"}),
        '{"tokenizer": "mine"}',
    ):
        with pytest.raises(DataError, match=r"manifest\.json"):
            with_manifest(bad)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("num_tokens", [None, 2_100, 100])
def test_validation_covers_each_token_once(shards, world_size, num_tokens):
    stream = np.concatenate([np.fromfile(path, "<u2", offset=1_024) for path in shards])
    options = dict(
        format=BYTES, tokens_per_part=800, num_tokens=num_tokens, world_size=world_size, **ROWS
    )
    by_rank = [
        list(data.validation_parts(shards, rank=rank, **options)) for rank in range(world_size)
    ]
    count = num_tokens or len(stream) - 1
    parts = [by_rank[i % world_size][i // world_size] for i in range(-(-count // 800))]
    assert len(parts) == sum(map(len, by_rank))
    np.testing.assert_array_equal(np.concatenate([p.inputs for p in parts]), stream[:count])
    np.testing.assert_array_equal(np.concatenate([p.targets for p in parts]), stream[1 : count + 1])
    for part in parts:
        starts = [0, *np.flatnonzero(part.inputs == BYTES.bos_id).tolist()]
        assert part.cu_seqlens.tolist() == starts + [len(part.inputs)] * (128 - len(starts))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (dict(num_tokens=17_300), "hold 17,300 tokens, .* 17,300 needs 17,301 .*data.val_tokens"),
        (dict(num_tokens=0), "at least 2"),
        (dict(cu_seqlens_entries=4), "room for 3: --set data.cu_seqlens_entries="),
        (dict(tokens_per_part=0), "tokens"),
        (dict(format=data.DataFormat("tiny", 100, 3)), "made_train_0.bin: token"),
        (dict(shards=[]), "empty"),
        (dict(world_size=3), "3"),
    ],
)
def test_bad_validation(shards, options, pattern):
    options = (
        dict(shards=shards, format=BYTES, tokens_per_part=800, num_tokens=None, rank=0)
        | dict(world_size=1, **ROWS)
        | options
    )
    with pytest.raises(DataError, match=pattern):
        list(data.validation_parts(**options))


def test_validation_of_all_tokens_up_to_a_limit(shards):
    def predicted(**options):
        parts = data.validation_parts(
            shards, format=BYTES, tokens_per_part=800, rank=0, world_size=1, **ROWS, **options
        )
        return sum(len(part.inputs) for part in parts)

    assert predicted(num_tokens=None) == 17_299
    assert predicted(num_tokens=None, at_most=20_000) == 17_299
    assert predicted(num_tokens=None, at_most=1_000) == 1_000
    assert predicted(num_tokens=1_200, at_most=1_000) == 1_200  # asked for by number
