"""The token loader in plain NumPy: the specification of csrc/data, and its stand-in.

Shapes: T tokens of a part, D documents of a shard, P parts of a rank.
"""

import dataclasses
import errno
import itertools
import os
import stat
from typing import NamedTuple

import numpy as np

from speedrun._data_types import BatchShape, DataError, DataFormat, LoaderPosition

HEADER_BYTES = 1024
MAGIC = 20240520
VERSION = 1
SCAN_TOKENS = 1 << 22  # tokens a read of the scan: 8 MiB, small beside a shard's 200 MB
REFETCH = "fetch the shard again (speedrun data fetch) or write it again (speedrun data tokenize)"


class Shard:
    """One shard file with a verified header; num_tokens: int.

    Raises DataError for every file that is not a whole shard. Reads by pread, never through a
    mapping: a file cut short meanwhile is a short read, not a signal.
    """

    def __init__(self, path, format: DataFormat):
        self.path = path
        self.format = format
        self._fd = -1
        try:
            # Non-blocking, because opening a named pipe would wait for its writer for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            if e.errno == errno.ENOENT:
                raise DataError(f"{path}: no such file; {REFETCH}") from None
            raise DataError(f"{path}: cannot be opened ({e.strerror}); check its rights") from None
        self._verify_header()

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)

    def _verify_header(self):
        path, info = self.path, os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path}: not a regular file; give the path of a .bin shard")
        if info.st_size < HEADER_BYTES:
            raise DataError(
                f"{path}: {info.st_size} bytes, less than the header's {HEADER_BYTES}; {REFETCH}"
            )
        magic, version, count = np.frombuffer(os.pread(self._fd, 12, 0), "<i4").tolist()
        if magic != MAGIC:
            raise DataError(f"{path}: magic number {magic}, not {MAGIC}: not a shard; {REFETCH}")
        if version != VERSION:
            raise DataError(f"{path}: version {version}, not {VERSION}; {REFETCH}")
        if count < 1:
            raise DataError(f"{path}: token count {count} in the header, not 1 or more; {REFETCH}")
        self.num_tokens = count
        self._num_bytes = HEADER_BYTES + 2 * count
        self._check_size()

    def _check_size(self):
        size = os.fstat(self._fd).st_size
        if size != self._num_bytes:
            raise DataError(
                f"{self.path}: {size} bytes, but {self.num_tokens} tokens in the header make "
                f"{self._num_bytes}: truncated or changed; {REFETCH}"
            )

    def find_documents(self, *, at_least_one: bool) -> np.ndarray:
        """(D,) int64 token offsets of the documents' starts; checks every token on the way."""
        found = []
        for begin in range(0, self.num_tokens, SCAN_TOKENS):
            tokens = self.read(begin, min(begin + SCAN_TOKENS, self.num_tokens))
            found.append(begin + np.flatnonzero(tokens == self.format.bos_id))
        bos = np.concatenate(found)
        if at_least_one and len(bos) == 0:
            raise DataError(
                f"{self.path}: no document start (token {self.format.bos_id}) among "
                f"{self.num_tokens} tokens; was it written with another tokenizer than "
                f"{self.format.tokenizer}? {REFETCH}"
            )
        return bos

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin … end−1 as uint16; DataError where the file or a token has gone bad."""
        self._check_size()
        tokens = np.frombuffer(
            os.pread(self._fd, 2 * (end - begin), HEADER_BYTES + 2 * begin), "<u2"
        )
        if len(tokens) != end - begin:
            raise DataError(f"{self.path}: shrank while it was read; {REFETCH}")
        if tokens.max() >= self.format.vocab_size:
            at = int(np.argmax(tokens >= self.format.vocab_size))
            raise DataError(
                f"{self.path}: token {tokens[at]} at offset {begin + at}, outside the "
                f"{self.format.tokenizer} vocabulary of {self.format.vocab_size}; {REFETCH}"
            )
        return tokens


class PartRanges(NamedTuple):
    """Where one part lies in its shard."""

    ranges: np.ndarray  # (n, 2) token ranges, T + 1 tokens in all
    starts: np.ndarray  # (documents,) their starts in the part, each below T


class Documents:
    """Cuts each document to max_seq_len and deals whole documents. Offsets are document indices."""

    def __init__(self, bos: np.ndarray, shard_tokens: int, shape: BatchShape, num_parts: int):
        self.begins = bos
        lengths = np.minimum(np.diff(bos, append=shard_tokens), shape.max_seq_len)
        self.before = np.concatenate([[0], np.cumsum(lengths)])  # (D + 1,) tokens before document
        self.end = len(bos)
        self.num_parts = num_parts
        self.num_tokens = shape.tokens_per_part

    def deal_step(self, offset: int) -> tuple[list[PartRanges], int] | None:
        """The step that starts at `offset` and the next one's offset; None if it does not fit."""
        parts = []
        for _ in range(self.num_parts):
            last = int(np.searchsorted(self.before, self.before[offset] + self.num_tokens + 1))
            if last > self.end:
                return None
            starts = self.before[offset : last + 1] - self.before[offset]
            starts[-1] = self.num_tokens + 1  # the last document is cut to fit
            begins = self.begins[offset:last]
            ranges = np.stack([begins, begins + np.diff(starts)], axis=1)
            # A document of which only the last target is here has no input, hence no start.
            parts.append(PartRanges(ranges, starts[starts < self.num_tokens]))
            offset = last
        return parts, offset


class Lanes:
    """Deals each part consecutive tokens of a lane of its own. Offsets are tokens of a lane.

    Part p reads lane p of the shard: as many places of a text at once, where neighbouring pieces
    would be about the same thing. max_seq_len cuts a document without loss. Lanes overlap by less
    than a token a part, and a lane's last part reaches back, so that every token is used.
    """

    def __init__(self, bos: np.ndarray, shard_tokens: int, shape: BatchShape, num_parts: int):
        self.bos = bos
        self.num_parts = num_parts
        self.num_inputs = shard_tokens - 1  # the last token is only a target
        self.end = -(-self.num_inputs // num_parts)  # length of a lane
        self.num_tokens = shape.tokens_per_part
        self.max_seq_len = shape.max_seq_len

    def deal_step(self, offset: int) -> tuple[list[PartRanges], int] | None:
        """The step that starts at `offset` and the next one's offset; None if it does not fit."""
        if offset >= self.end or self.num_tokens > self.end:
            return None
        offset = min(offset, self.end - self.num_tokens)
        spare = self.num_inputs - self.end
        lanes = [part * spare // (self.num_parts - 1) for part in range(self.num_parts)]
        return [self._pieces(lane + offset) for lane in lanes], offset + self.num_tokens

    def _pieces(self, begin: int) -> PartRanges:
        after = begin + self.num_tokens
        bos = self.bos[slice(*np.searchsorted(self.bos, [begin + 1, after]))] - begin
        edges = [0, *bos.tolist(), self.num_tokens]
        starts = [
            np.arange(edge, following, self.max_seq_len)
            for edge, following in itertools.pairwise(edges)
        ]
        return PartRanges(np.array([[begin, after + 1]]), np.concatenate(starts))


class Sequences:
    """Deals the shard's tokens in order, in sequences of max_seq_len. Offsets are tokens.

    Documents don't matter. A shard is left as early as the public program of the track
    `optimization` does, which wants one token more than the step reads.
    """

    def __init__(self, bos: np.ndarray, shard_tokens: int, shape: BatchShape, num_parts: int):
        self.end = shard_tokens
        self.num_parts = num_parts
        self.num_tokens = shape.tokens_per_part
        self.starts = np.arange(0, shape.tokens_per_part, shape.max_seq_len)

    def deal_step(self, offset: int) -> tuple[list[PartRanges], int] | None:
        """The step that starts at `offset` and the next one's offset; None if it does not fit."""
        after = offset + self.num_parts * self.num_tokens
        if after + 1 >= self.end:
            return None
        begins = range(offset, after, self.num_tokens)
        ranges = [np.array([[begin, begin + self.num_tokens + 1]]) for begin in begins]
        return [PartRanges(part, self.starts) for part in ranges], after


def dealer_type(batching: str, long_documents: str) -> type:
    """Who deals the tokens of a shard."""
    if batching == "consecutive":
        return Sequences
    return Documents if long_documents == "cut" else Lanes


class TokensRunOut(DataError):
    """The last shard is used up before the last step."""


class Stream:
    """Deals step after step, without building the batches: the same on every rank."""

    def __init__(
        self,
        shards,
        shapes,
        *,
        format,
        num_parts: int,
        batching,
        long_documents,
        repeat,
        start: LoaderPosition,
    ):
        self._shards = list(shards)
        self._shapes = iter([shape for shape in shapes for _ in range(shape.steps)])
        self._format = format
        self._num_parts = num_parts
        self._dealer_type = dealer_type(batching, long_documents)
        self._repeat = repeat
        self._shard = None
        self.position = start
        self.num_steps_dealt = 0

    def _open(self):
        self._shard = Shard(self._shards[self.position.shard], self._format)
        self._bos = self._shard.find_documents(at_least_one=self._dealer_type is Documents)
        self._dealer_shape = None

    def _next_shard(self, shape: BatchShape):
        shard, epoch = self.position.shard + 1, self.position.epoch
        if shard == len(self._shards):
            if not self._repeat:
                raise TokensRunOut(
                    f"{self._shards[-1]}: the last shard is used up after {self.num_steps_dealt} "
                    f"steps, and the next needs {self._num_parts} x {shape.tokens_per_part} "
                    "tokens; fetch more shards (speedrun data fetch) or use them again "
                    "(--repeat-data)"
                )
            shard, epoch = 0, epoch + 1
        self.position = LoaderPosition(shard, 0, epoch)
        self._open()

    def _deal(self, shape: BatchShape) -> list[PartRanges] | None:
        if self._dealer_shape != shape:
            size = self._shard.num_tokens
            self._dealer = self._dealer_type(self._bos, size, shape, self._num_parts)
            self._dealer_shape = shape
        offset = self.position.offset
        if offset > self._dealer.end:
            raise DataError(
                f"{self._shard.path}: the position to start from is {offset}, beyond the shard's "
                f"end {self._dealer.end}; resume with the shards of the run that stored it"
            )
        dealt = self._dealer.deal_step(offset)
        if dealt is None:
            return None
        parts, offset = dealt
        for part in parts:
            shape.check_documents_fit(self._shard.path, len(part.starts))
        self.position = LoaderPosition(self.position.shard, offset, self.position.epoch)
        return parts

    def next_step(self) -> tuple[Shard, BatchShape, list[PartRanges]]:
        """All parts of the next step, of one shard."""
        shape = next(self._shapes, None)
        if shape is None:
            raise DataError(
                f"all {self.num_steps_dealt} steps of the schedule are dealt; give the loader the "
                "shapes of the steps to come"
            )
        if self._shard is None:
            self._open()
        # The first failure may be the rest of a shard; one more round means that none will do.
        for _ in range(len(self._shards) + 1):
            parts = self._deal(shape)
            if parts is not None:
                self.num_steps_dealt += 1
                return self._shard, shape, parts
            self._next_shard(shape)
        raise DataError(
            f"{self._shards[0]}: no shard of {len(self._shards)} holds one step of "
            f"{self._num_parts} x {shape.tokens_per_part} tokens; use fewer tokens a step or "
            "longer shards"
        )


def bigram_rows(inputs: np.ndarray, table_rows: int) -> np.ndarray:
    """(T,) int32 rows of the bigram table for (T,) int32 inputs; int32 arithmetic that wraps."""
    previous = np.roll(inputs, 1)
    previous[1:2] = table_rows - 1
    mixed = (np.int32(36313) * inputs) ^ (np.int32(27191) * previous)
    rows = mixed % np.int32(table_rows - 1)  # NumPy's % is never negative for a positive divisor
    rows[0] = table_rows - 1
    return rows


def sign_rows(inputs: np.ndarray, table_rows: int) -> np.ndarray:
    """(T,) int32 rows of the sign table for (T,) int32 inputs."""
    rows = (np.roll(inputs, 1) ^ inputs) % np.int32(table_rows)
    rows[0] = 0
    return rows


def padded(starts: np.ndarray, entries: int, num_tokens: int) -> np.ndarray:
    """(entries,) int32: starts, padded with num_tokens."""
    cu_seqlens = np.full(entries, num_tokens, np.int32)
    cu_seqlens[: len(starts)] = starts
    return cu_seqlens


class NumpyLoader:
    """Builds this rank's parts of each step; next_step() gives the fields of a StepBatch."""

    def __init__(self, stream: Stream, *, bigram_table_rows, sign_table_rows, rank, world_size):
        self._stream = stream
        self._bigram_table_rows = bigram_table_rows
        self._sign_table_rows = sign_table_rows
        self._mine = slice(rank, None, world_size)

    def next_step(self):
        """(inputs, targets, cu_seqlens, bigram_rows, sign_rows, position) of the next step."""
        shard, shape, parts = self._stream.next_step()
        parts = parts[self._mine]
        rows = [np.concatenate([shard.read(*r) for r in part.ranges.tolist()]) for part in parts]
        tokens = np.stack(rows).astype(np.int32)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        lengths = shape.cu_seqlens_entries, shape.tokens_per_part
        cu_seqlens = np.stack([padded(part.starts, *lengths) for part in parts])
        hashes = signs = None
        if self._bigram_table_rows:
            hashes = np.stack([bigram_rows(row, self._bigram_table_rows) for row in inputs])
        if self._sign_table_rows:
            signs = np.stack([sign_rows(row, self._sign_table_rows) for row in inputs])
        return (
            inputs,
            targets,
            cu_seqlens,
            hashes,
            signs,
            dataclasses.astuple(self._stream.position),
        )

    def close(self):
        """Lets the shard go."""
        self._stream = None
