"""Documents of text files, jsonl and folders, and their tokens, by as many processes as wanted."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from speedrun.data import DataError
from speedrun.tokenizer import Tokenizer, load_tokenizer

_BATCH_BYTES = 1 << 20  # of text that a worker gets at once
_BATCHES_WITHOUT_POOL = 4  # less text than this is done before a pool has started


def _files(inputs: Iterable[Path], skip: Path) -> Iterator[tuple[Path, bool]]:
    """Each file, and whether it was named itself; folders in sorted order, without hidden files."""
    for path in inputs:
        if path.is_file():
            yield path, True
        elif not path.is_dir():
            raise DataError(f"{path}: no such file or folder")
        else:
            for folder, subfolders, names in os.walk(path):
                subfolders[:] = sorted(
                    name
                    for name in subfolders
                    if not name.startswith(".") and Path(folder, name).resolve() != skip.resolve()
                )
                for name in sorted(names):
                    if not name.startswith(".") and Path(folder, name).is_file():
                        yield Path(folder, name), False


def _lines(path: Path, field: str) -> Iterator[tuple[str, bytes | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{where}: not a JSON object with the field {field!r} "
                    f"({type(error).__name__}: {error}); mend the line or choose --field"
                ) from error
            if not isinstance(text, str):
                raise DataError(f"{where}: field {field!r} is a {type(text).__name__}, not a text")
            yield where, text


def documents(
    inputs: Iterable[Path],
    *,
    field: str,
    any_bytes: bool,
    skip: Path,
    not_text: list[Path],
) -> Iterator[tuple[str, bytes | str]]:
    """(where it is from, text) of each document, in order.

    A text file is one document; a .jsonl file has one a line, under `field`; a folder gives those
    of its files, sorted, without hidden ones and the folder `skip`. Files of a folder that are not
    UTF-8 text are left out and go into `not_text`. A file named itself must be UTF-8, unless
    `any_bytes`. DataError, with file and line, for what can't be read.
    """
    for path, named in _files(inputs, skip):
        try:
            if path.suffix == ".jsonl":
                yield from _lines(path, field)
                continue
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})") from error
        try:
            if b"\0" in content:
                raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), 0, "NUL")
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            if not named:
                not_text.append(path)
                continue
            if not any_bytes:
                raise DataError(
                    f"{path}: not UTF-8 text (byte {error.start}); convert it, or use "
                    "--tokenizer bytes"
                ) from error
        yield str(path), content


def _batches(documents: Iterable[tuple[str, bytes | str]]) -> Iterator[list]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list) -> list[tuple[int, np.ndarray]]:
    """(bytes of text, tokens) of each document."""
    encoded = []
    for where, text in batch:
        try:
            tokens = tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        size = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "replace"))
        encoded.append((size, tokens))
    return encoded


_worker_tokenizer: Tokenizer  # of a worker process, made once by _start_worker


def _start_worker(name: str, rank_file: Path | None) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(name, rank_file)


def _encode_in_worker(batch: list) -> list[tuple[int, np.ndarray]]:
    return _encode(_worker_tokenizer, batch)


def encoded(
    documents: Iterable[tuple[str, bytes | str]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes of text, tokens without BOS) of each document, in order whatever `workers` is.

    Only a few MB a worker are held at once. DataError for a text that can't be encoded.
    """
    batches = _batches(documents)
    first = list(itertools.islice(batches, _BATCHES_WITHOUT_POOL if workers > 1 else 0))
    if len(first) < _BATCHES_WITHOUT_POOL:
        for batch in itertools.chain(first, batches):
            yield from _encode(tokenizer, batch)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.format.tokenizer, getattr(tokenizer, "rank_file", None)),
    )
    under_way: deque = deque()
    try:
        for batch in itertools.chain(first, batches):
            # Ctrl-C is this process's to handle: a worker born here never sees it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                under_way.append(pool.submit(_encode_in_worker, batch))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died, perhaps for want of memory; try fewer with --workers N"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
