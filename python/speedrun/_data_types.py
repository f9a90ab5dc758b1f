"""What the loader's two backends and the programs above them hand to each other."""

from dataclasses import dataclass

import numpy as np

from speedrun.config import num_parts


class DataError(ValueError):
    """Bad or missing data. The message names the file, the value found and the fix."""


@dataclass(frozen=True)
class DataFormat:
    """What the tokens of a shard mean: ids lie in [0, vocab_size), bos_id starts a document."""

    tokenizer: str
    vocab_size: int
    bos_id: int

    def __post_init__(self):
        if not 0 <= self.bos_id < self.vocab_size <= 1 << 16:
            raise DataError(f"{self}: needs 0 <= bos_id < vocab_size <= 65536 (16-bit tokens)")


GPT2 = DataFormat("gpt2", 50257, 50256)
BYTES = DataFormat("bytes", 257, 256)


MAX_SIZE = 2**31 - 1  # cu_seqlens and a shard's token count are int32


@dataclass(frozen=True)
class BatchShape:
    """`steps` steps in a row, of parts of `tokens_per_part` tokens.

    Documents are cut to `max_seq_len` tokens; cu_seqlens has `cu_seqlens_entries` entries a part,
    of which the last is tokens_per_part, so at most cu_seqlens_entries − 1 documents fit.
    """

    steps: int
    tokens_per_part: int
    max_seq_len: int
    cu_seqlens_entries: int

    def __post_init__(self):
        if self.steps < 0 or min(self.tokens_per_part, self.max_seq_len) < 1:
            raise DataError(f"{self}: steps must be 0 or more, tokens and max_seq_len 1 or more")
        if self.cu_seqlens_entries < 2:
            raise DataError(f"{self}: data.cu_seqlens_entries must be 2 or more")
        if max(vars(self).values()) > MAX_SIZE:
            raise DataError(f"{self}: no size may be above {MAX_SIZE} (32-bit offsets)")

    def check_documents_fit(self, path, num_documents: int):
        """DataError where a part's documents do not fit into cu_seqlens."""
        if num_documents > self.cu_seqlens_entries - 1:
            raise DataError(
                f"{path}: {num_documents} documents in one part of {self.tokens_per_part} tokens, "
                f"but cu_seqlens has room for {self.cu_seqlens_entries - 1}: "
                f"--set data.cu_seqlens_entries={num_documents + 1} (or more)"
            )


def cu_seqlens_entries(tokens_per_part: int) -> int:
    """The recipe's fixed length of cu_seqlens for a part of `tokens_per_part` tokens."""
    fixed = {16_384: 64, 32_768: 96, 49_152: 128}
    if tokens_per_part in fixed:
        return fixed[tokens_per_part]
    return max(128, -(-(tokens_per_part // 300) // 128) * 128)


@dataclass(frozen=True)
class LoaderPosition:
    """Where the next step starts.

    shard: index into the list of shards. offset: index of a document in that shard, or of a token
    in each of its lanes (one a part) where long documents are split, or of a token where tokens are
    dealt one behind the other. epoch: how often the list of shards has been used up. Lanes are
    others where a step has another number of parts: there a position of theirs means nothing.
    """

    shard: int = 0
    offset: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Part:
    """One part of T tokens; every array is int32. Rows are None where their table has 0."""

    inputs: np.ndarray  # (T,)
    targets: np.ndarray  # (T,) the token after each input
    cu_seqlens: np.ndarray  # (N,) document starts, padded with T
    bigram_rows: np.ndarray | None  # (T,) rows of the bigram table
    sign_rows: np.ndarray | None  # (T,) rows of the sign table


@dataclass(frozen=True)
class StepBatch:
    """This rank's P parts of one step; every array is int32.

    Row p is part p · world_size + rank of the step's: of W ranks, rank r has parts r, r + W,
    r + 2 W, … (as the public program does). P = num_parts(W) / W.
    """

    inputs: np.ndarray  # (P, T)
    targets: np.ndarray  # (P, T)
    cu_seqlens: np.ndarray  # (P, N)
    bigram_rows: np.ndarray | None  # (P, T)
    sign_rows: np.ndarray | None  # (P, T)
    position: LoaderPosition  # after this step


# Keeps the remainder of the row formulas inside 32 bits.
MAX_TABLE_ROWS = 1 << 30


def check_rank(rank: int, world_size: int):
    """DataError unless the rank's world deals a step's parts evenly."""
    if not 0 <= rank < world_size or num_parts(world_size) % world_size:
        raise DataError(
            f"rank {rank} of {world_size}: there can be 1, 2, 4, 8 or more ranks, from 0 on"
        )


def check_table_rows(bigram_table_rows: int, sign_table_rows: int):
    """DataError unless both are 0 (none) or sizes that the row formulas can serve."""
    if bigram_table_rows == 1 or not 0 <= bigram_table_rows <= MAX_TABLE_ROWS:
        raise DataError(f"bigram_table_rows is {bigram_table_rows}; use 0 (none) or 2 to 2**30")
    if not 0 <= sign_table_rows <= MAX_TABLE_ROWS:
        raise DataError(f"sign_table_rows is {sign_table_rows}; use 0 (none) or 1 to 2**30")
