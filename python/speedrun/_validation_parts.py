"""Validation batches: consecutive tokens, the same for every number of ranks."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from speedrun import _data_types
from speedrun import _numpy_loader as twin
from speedrun._data_types import (
    BatchShape,
    DataError,
    DataFormat,
    Part,
    check_rank,
    check_table_rows,
)


def validation_parts(
    shards: Sequence,
    *,
    format: DataFormat,
    tokens_per_part: int,
    num_tokens: int | None,
    bigram_table_rows: int,
    sign_table_rows: int,
    rank: int,
    world_size: int,
    cu_seqlens_entries: int | None = None,
    at_most: int | None = None,
    sequence_length: int | None = None,
) -> Iterator[Part]:
    """This rank's validation parts: consecutive tokens of the shards, not aligned to documents.

    Parts are dealt to the ranks like cards, as in training (rank, rank + world_size, …), so that
    some ranks may get one fewer. num_tokens: how many are predicted (one more is read); None is
    everything, or the first `at_most` of more. The last part is shorter where tokens_per_part does
    not divide num_tokens. cu_seqlens is 0, then every document start (0 twice for a part that
    begins with one), padded with the part's length; with `sequence_length` it is the start of every
    sequence of so many tokens instead. Raises DataError, at once for bad headers and too few
    tokens.
    """
    check_rank(rank, world_size)
    check_table_rows(bigram_table_rows, sign_table_rows)
    entries = cu_seqlens_entries or _data_types.cu_seqlens_entries(tokens_per_part)
    shape = BatchShape(1, tokens_per_part, tokens_per_part, entries)
    if not shards:
        raise DataError("the list of validation shards is empty; pass at least one .bin file")
    files = [twin.Shard(path, format) for path in shards]
    firsts = [0, *accumulate(file.num_tokens for file in files)]  # stream offset of each shard
    if num_tokens is None:
        num_tokens = min(firsts[-1] - 1, firsts[-1] if at_most is None else at_most)
    if not 1 <= num_tokens < firsts[-1]:
        raise DataError(
            f"{shards[0]}: {len(files)} validation shard(s) hold {firsts[-1]:,} tokens, and "
            f"predicting {num_tokens:,} needs {num_tokens + 1:,} (at least 2): fetch the whole "
            "shard (speedrun data fetch) or lower data.val_tokens"
        )

    def read(begin, end):
        pieces = [
            file.read(max(begin - first, 0), min(end - first, file.num_tokens))
            for file, first in zip(files, firsts, strict=False)
            if first < end and begin < first + file.num_tokens
        ]
        return np.concatenate(pieces).astype(np.int32)

    def parts():
        for number, begin in enumerate(range(0, num_tokens, tokens_per_part)):
            if number % world_size != rank:
                continue
            tokens = read(begin, min(begin + tokens_per_part, num_tokens) + 1)
            inputs, targets = tokens[:-1], tokens[1:]
            if sequence_length:
                starts = np.arange(0, len(inputs), sequence_length)
            else:
                starts = np.append(0, np.flatnonzero(inputs == format.bos_id))
            shape.check_documents_fit(shards[0], len(starts))
            yield Part(
                inputs,
                targets,
                twin.padded(starts, entries, len(inputs)),
                twin.bigram_rows(inputs, bigram_table_rows) if bigram_table_rows else None,
                twin.sign_rows(inputs, sign_table_rows) if sign_table_rows else None,
            )

    return parts()
