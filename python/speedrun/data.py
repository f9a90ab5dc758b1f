"""Token shards to training and validation batches.

The loader runs in C++ (`speedrun._host`: mapped shards, a prefetch thread) or as its NumPy twin
(`speedrun._numpy_loader`), with identical streams. Bad data raises DataError, in both.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from speedrun import _numpy_loader as twin
from speedrun._data_types import (
    BYTES,
    GPT2,
    BatchShape,
    DataError,
    DataFormat,
    LoaderPosition,
    Part,
    StepBatch,
    check_rank,
    check_table_rows,
    cu_seqlens_entries,
)
from speedrun._validation_parts import validation_parts
from speedrun.config import num_parts

_HOST_PROBLEM = None
try:
    from speedrun import _host
except ImportError as e:  # no compiler at build time, or built for another Python
    _host = None
    _HOST_PROBLEM = str(e)
_DATA_ERRORS = (DataError,) if _host is None else (DataError, _host.DataError)

__all__ = [
    "BYTES",
    "GPT2",
    "BatchShape",
    "DataError",
    "DataFormat",
    "LoaderPosition",
    "Part",
    "StepBatch",
    "TokenLoader",
    "check_schedule",
    "cu_seqlens_entries",
    "find_shards",
    "read_format",
    "read_long_documents",
    "validation_parts",
]


_MANIFEST_FIX = (
    'write {"tokenizer": ..., "vocab_size": ..., "bos_id": ...}, or none for GPT-2 shards'
)


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as e:  # the last: of brackets without end
        raise DataError(f"{path}: not a readable JSON file ({e}); {_MANIFEST_FIX}") from None
    if not isinstance(manifest, dict):
        kind = type(manifest).__name__
        raise DataError(f"{path}: holds a {kind}, not an object; {_MANIFEST_FIX}")
    return manifest


def read_format(folder) -> DataFormat:
    """The format named by folder/manifest.json; GPT2 where there is none or it names none.

    The manifest's keys are tokenizer, vocab_size and bos_id, all three or none; others are ignored.
    Raises DataError for a manifest that cannot be read or makes no sense.
    """
    path = Path(folder) / "manifest.json"
    manifest = _read_manifest(path)
    tokenizer, vocab_size, bos_id = values = [
        manifest.get(key) for key in ("tokenizer", "vocab_size", "bos_id")
    ]
    if values == [None, None, None]:
        return GPT2
    if not isinstance(tokenizer, str) or type(vocab_size) is not int or type(bos_id) is not int:
        raise DataError(
            f"{path}: tokenizer {tokenizer!r}, vocab_size {vocab_size!r}, bos_id {bos_id!r} are "
            f"not a name and two integers; {_MANIFEST_FIX}"
        )
    try:
        return DataFormat(tokenizer, vocab_size, bos_id)
    except DataError as e:
        raise DataError(f"{path}: {e}; {_MANIFEST_FIX}") from None


def read_long_documents(folder) -> str | None:
    """ "cut" or "split" where folder/manifest.json says how long documents are to be read."""
    path = Path(folder) / "manifest.json"
    value = _read_manifest(path).get("long_documents")
    if value not in (None, "cut", "split"):
        raise DataError(f'{path}: long_documents is {value!r}; use "cut" or "split"')
    return value


def find_shards(folder, split: str) -> list[Path]:
    """The folder's shards of a split ("train" or "val"), sorted by name; DataError if none."""
    folder = Path(folder)
    fix = "fill it by `speedrun data fetch` or `speedrun data tokenize`, or give another by --data"
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; {fix}")
    shards = sorted(folder.glob(f"*_{split}_*.bin"))
    if not shards:
        raise DataError(f"{folder}: no *_{split}_*.bin shard in it; {fix}")
    return shards


def _check_arguments(shards, batching, long_documents):
    if not shards:
        raise DataError("the list of shards is empty; pass at least one .bin file")
    if batching not in ("documents", "consecutive"):
        raise DataError(f'batching is {batching!r}; use "documents" or "consecutive"')
    if long_documents not in ("cut", "split"):
        raise DataError(f'long_documents is {long_documents!r}; use "cut" or "split"')


class TokenLoader:
    """This rank's batches of a schedule, step by step.

    shards: paths, in the order of the stream. shapes: the steps still to come (after a resume
    without those done). start: where they start; None is the first shard's first document.
    batching: "documents" deals whole ones from their BOS (the record's rule), "consecutive" all
    tokens in order, in sequences of max_seq_len that heed no document (the track `optimization`'s).
    long_documents, of documents: "cut" drops what is beyond max_seq_len (the record's rule),
    "split" keeps it as further sequences, and part p reads the p-th of the shard's lanes, one a
    part (for few, long texts). world_size: a step has eight parts of tokens_per_part, and above 8
    ranks one a rank. repeat: start again after the last shard. backend: "host" is C++ with a thread
    that prepares `prefetch_steps` steps ahead, "numpy" its plain twin, and the only one for
    consecutive tokens, "auto" the first that will do. A table of 0 rows costs nothing and gives
    None.

    Raises DataError for impossible arguments; bad shards show in next_step().
    """

    backend: str  # the one that runs: "host" or "numpy"

    def __init__(
        self,
        shards: Sequence,
        shapes: Sequence[BatchShape],
        *,
        format: DataFormat,
        bigram_table_rows: int,
        sign_table_rows: int,
        rank: int = 0,
        world_size: int = 1,
        batching: str = "documents",
        long_documents: str = "cut",
        repeat: bool = False,
        start: LoaderPosition | None = None,
        backend: str = "auto",
        prefetch_steps: int = 2,
    ):
        self._loader = None
        self._error = None
        _check_arguments(shards, batching, long_documents)
        check_rank(rank, world_size)
        check_table_rows(bigram_table_rows, sign_table_rows)
        start = start or LoaderPosition()
        if not 0 <= start.shard < len(shards) or min(start.offset, start.epoch) < 0:
            raise DataError(
                f"{start} does not lie in {len(shards)} shards; resume with the shards of the run "
                "that stored it"
            )
        if prefetch_steps < 1:
            raise DataError(f"prefetch_steps is {prefetch_steps}; use 1 or more")
        self.backend = _choose_backend(backend, batching)
        rows = dict(bigram_table_rows=bigram_table_rows, sign_table_rows=sign_table_rows)
        ranks = dict(rank=rank, world_size=world_size)
        if self.backend == "host":
            self._loader = _host.Loader(
                shards=[os.fsencode(path) for path in shards],
                shapes=[
                    (s.steps, s.tokens_per_part, s.max_seq_len, s.cu_seqlens_entries)
                    for s in shapes
                ],
                format=(format.tokenizer, format.vocab_size, format.bos_id),
                split=long_documents == "split",
                repeat=repeat,
                start=(start.shard, start.offset, start.epoch),
                prefetch_steps=prefetch_steps,
                **rows,
                **ranks,
            )
        else:
            stream = twin.Stream(
                shards,
                shapes,
                format=format,
                num_parts=num_parts(world_size),
                batching=batching,
                long_documents=long_documents,
                repeat=repeat,
                start=start,
            )
            self._loader = twin.NumpyLoader(stream, **rows, **ranks)

    def next_step(self) -> StepBatch:
        """The next step's batch.

        Raises DataError, the same again at each later call, for a bad shard, for tokens that ran
        out, after the last step of the last shape, and after close().
        """
        if self._loader is None:
            raise DataError("the loader is closed; make a new one")
        if self._error is not None:
            raise DataError(self._error)
        try:
            *arrays, position = self._loader.next_step()
        except _DATA_ERRORS as e:
            self._error = str(e)
            raise DataError(self._error) from None
        return StepBatch(*arrays, LoaderPosition(*position))

    def close(self):
        """Ends the prefetch thread and lets the shards go. May be called twice."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __enter__(self) -> "TokenLoader":
        return self

    def __exit__(self, *_):
        self.close()


def _choose_backend(backend: str, batching: str) -> str:
    if backend not in ("auto", "host", "numpy"):
        raise DataError(f'backend is {backend!r}; use "auto", "host" or "numpy"')
    if batching == "consecutive":
        if backend == "host":
            raise DataError('backend "host" deals documents only; use "numpy" or "auto"')
        return "numpy"
    if backend == "numpy" or _host is not None:
        return "numpy" if backend == "numpy" else "host"
    fix = "build it with a C++ compiler: pip install --no-build-isolation -e ."
    if backend == "host":
        raise DataError(f'backend "host" needs speedrun._host ({_HOST_PROBLEM}); {fix}')
    warnings.warn(
        f"speedrun._host is missing ({_HOST_PROBLEM}): batches come from NumPy, slower; {fix}",
        stacklevel=3,
    )
    return "numpy"


def check_schedule(
    shards: Sequence,
    shapes: Sequence[BatchShape],
    *,
    format: DataFormat,
    batching: str = "documents",
    long_documents: str,
    repeat: bool,
    world_size: int = 1,
) -> None:
    """Raises the DataError that a run of this schedule would meet, before it starts.

    Scans every shard that the schedule reaches and deals every step, but builds no batch.
    """
    _check_arguments(shards, batching, long_documents)
    stream = twin.Stream(
        shards,
        shapes,
        format=format,
        num_parts=num_parts(world_size),
        batching=batching,
        long_documents=long_documents,
        repeat=repeat,
        start=LoaderPosition(),
    )
    steps = [
        num_parts(world_size) * shape.tokens_per_part
        for shape in shapes
        for _ in range(shape.steps)
    ]
    try:
        for _ in steps:
            stream.next_step()
    except twin.TokensRunOut:
        filled = stream.num_steps_dealt
        there = sum(twin.Shard(path, format).num_tokens for path in shards)
        raise DataError(
            f"{Path(shards[0]).parent}: the schedule needs {len(steps):,} steps, {sum(steps):,} "
            f"tokens; its {len(shards)} shard(s) with {there:,} tokens fill {filled:,} steps, "
            f"{sum(steps[:filled]):,} tokens (the rest is cut from long documents or left at a "
            "shard's end): fetch more (speedrun data fetch) or use these again (--repeat-data)"
        ) from None
