"""Made-up shards and loaders for the tests of speedrun.data."""

import os
from pathlib import Path

import numpy as np
import pytest

from speedrun import data
from speedrun.data import BYTES, BatchShape, DataError, TokenLoader

SHARED_DATA = Path(
    os.environ.get("SPEEDRUN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
)
NEEDS_HOST = pytest.mark.skipif(
    data._host is None, reason=f"speedrun._host is missing: {data._HOST_PROBLEM}"
)
BACKENDS = ["numpy", pytest.param("host", marks=NEEDS_HOST)]
FIELDS = ("inputs", "targets", "cu_seqlens", "bigram_rows", "sign_rows")
ROWS = dict(bigram_table_rows=377_280, sign_table_rows=8_192)


def write_shard(path, tokens, *, magic=20240520, version=1, count=None) -> Path:
    """Writes a shard; a header that lies on request."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def random_tokens(num_tokens, seed, *, longest=40):
    """Byte tokens in documents of 1 … longest tokens; a few tokens come before the first."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 256, num_tokens)
    starts = 3 + np.cumsum(random.integers(1, longest + 1, num_tokens))
    tokens[starts[starts < num_tokens]] = BYTES.bos_id
    return tokens


def make_loader(shards, shapes, **options) -> TokenLoader:
    options = dict(format=BYTES, **ROWS) | options
    return TokenLoader(shards, shapes, **options)


def all_steps(shards, shapes, **options) -> list:
    with make_loader(shards, shapes, **options) as loader:
        return [loader.next_step() for _ in range(sum(shape.steps for shape in shapes))]


def make_shards(folder) -> list:
    """Three shards of byte tokens, the second too short for a step of 8 x 200 tokens."""
    return [
        write_shard(folder / f"made_train_{i}.bin", random_tokens(size, seed=i))
        for i, size in enumerate((9_000, 1_300, 7_000))
    ]


# Two stages; the stream ends three shards and starts again.
SHAPES = [BatchShape(3, 100, 16, 101), BatchShape(12, 200, 30, 201)]


def outcome(shards, shapes, **options):
    """Batches up to the first error, and its message."""
    batches = []
    try:
        with make_loader(shards, shapes, **options) as loader:
            while True:
                batches.append(loader.next_step())
    except DataError as e:
        return batches, str(e)
