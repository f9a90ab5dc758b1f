"""Write shard files and the manifest beside them.

A shard is 256 little-endian int32 (magic, version, token count, zeros) and then uint16 tokens.
Here every shard holds whole documents, each behind its BOS, so that no token is lost to a reader
that begins at a shard's first BOS. A set of shards appears all at once: everything is written
under temporary names first, and the manifest is replaced last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speedrun._numpy_loader import HEADER_BYTES, MAGIC, VERSION
from speedrun.data import GPT2, DataError, DataFormat

MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
MANIFEST = "manifest.json"
LOCK = ".lock"
_FIRST_INDEX = {"val": 0, "train": 1}  # as the public FineWeb files count


def shard_name(name: str, split: str, index: int) -> str:
    """File name of a shard: `fineweb_train_000001.bin`."""
    return f"{name}_{split}_{index:06d}.bin"


def sha256_file(path: Path) -> hashlib._Hash:
    """SHA-256 state over a file; more can be added to it."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state


def replace_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the folder's writer lock; the kernel frees it if the process dies.

    With `wait` a second writer waits its turn, else it gets a DataError naming the holder.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DataError(
                f"{folder}: another process (pid {holder}) is writing into this folder; "
                "wait for it to end, or use another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if it has none. DataError if it can't be understood."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # the last: of brackets without end
        raise DataError(f"{path}: not a readable manifest ({error}); delete it to go on") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(e, dict) for e in files.values()):
        raise DataError(f"{path}: not a manifest (no table of files); delete it to go on")
    return manifest


def check_same_format(folder: Path, format: DataFormat) -> dict[str, Any] | None:
    """Refuse a folder that holds shards of another tokenizer; returns its manifest, if any."""
    manifest = read_manifest(folder)
    held = GPT2.tokenizer  # what a reader takes a folder without a manifest for
    if manifest is not None:
        held = manifest.get("tokenizer", held)
    elif not any(folder.glob("*.bin")):
        return None
    if held != format.tokenizer:
        raise DataError(
            f"{folder}: holds shards of tokenizer {held!r}, and these are {format.tokenizer!r}; "
            "choose another folder"
        )
    return manifest


def update_manifest(
    folder: Path,
    format: DataFormat,
    files: dict[str, dict[str, Any]],
    *,
    remove: Iterable[str] = (),
    **facts: Any,
) -> None:
    """Add `files` and other `facts` to the folder's manifest, keeping what else it lists."""
    manifest = check_same_format(folder, format) or {"files": {}}
    kept = {name: entry for name, entry in manifest["files"].items() if name not in set(remove)}
    manifest.update(
        version=1,
        tokenizer=format.tokenizer,
        vocab_size=format.vocab_size,
        bos_id=format.bos_id,
        **facts,
        files=dict(sorted({**kept, **files}.items())),
    )
    replace_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


class _OpenShard:
    """One shard under its temporary name; `close` gives it its header and hash."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.path = folder / f".{name}.{os.getpid()}.tmp"
        self.tokens = 0
        self.documents = 0
        self.file = self.path.open("wb")
        self.file.write(bytes(HEADER_BYTES))

    def add(self, document: np.ndarray, bos_id: int) -> None:
        self.file.write(np.array([bos_id], "<u2").tobytes())
        self.file.write(document.astype("<u2", copy=False).tobytes())
        self.tokens += 1 + document.size
        self.documents += 1

    def close(self) -> dict[str, Any]:
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "bytes": self.path.stat().st_size,
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": sha256_file(self.path).hexdigest(),
        }

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk may refuse the last buffer
            self.file.close()
        self.path.unlink(missing_ok=True)


def _checked(document: np.ndarray, format: DataFormat, where: str) -> np.ndarray:
    document = np.asarray(document)
    if document.dtype != np.uint16 or document.ndim != 1:
        raise DataError(f"{where}: wants one row of uint16 tokens, got {document.dtype}")
    if document.size and document.max() >= format.vocab_size:
        raise DataError(
            f"{where}: token {document.max()} is outside the vocabulary of {format.tokenizer} "
            f"({format.vocab_size})"
        )
    if (document == format.bos_id).any():
        raise DataError(f"{where}: holds BOS ({format.bos_id}); the writer adds it itself")
    if document.size >= MAX_SHARD_TOKENS:
        raise DataError(f"{where}: {document.size:,} tokens, a shard holds {MAX_SHARD_TOKENS:,}")
    return document


def write_splits(
    folder: Path | str,
    name: str,
    documents: Iterable[tuple[str, np.ndarray]],
    format: DataFormat,
    *,
    splits: Iterable[str] = ("train", "val"),
    tokens_per_shard: int = 100_000_000,
    overwrite: bool = False,
    **facts: Any,
) -> dict[str, dict[str, Any]]:
    """Write (split, tokens without BOS) pairs as shards `{name}_{split}_{index:06d}.bin`.

    A shard ends before the document that would take it beyond `tokens_per_shard`; one longer than
    that has a shard of its own. `facts` go into the manifest. With `overwrite` the older shards of
    this name are replaced, else they are an error. The caller holds the folder's lock.

    Returns the manifest's entries, by file name. If anything goes wrong (disk full, Ctrl-C, a bad
    document) nothing of this set is left behind; an OSError comes out as a DataError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*", name):
        raise DataError(f"shard name {name!r}: letters, digits, '-', '.' and single '_' only")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_format(folder, format)
    older = [p.name for split in splits for p in folder.glob(f"{name}_{split}_*.bin")]
    if older and not overwrite:
        raise DataError(f"{folder / min(older)}: is there already; delete it or use another name")
    shards: list[_OpenShard] = []
    current: dict[str, _OpenShard] = {}
    entries: dict[str, dict[str, Any]] = {}
    next_index = dict(_FIRST_INDEX)
    try:
        for count, (split, document) in enumerate(documents):
            document = _checked(document, format, f"{folder}/{name}: document {count}")
            shard = current.get(split)
            if shard and shard.tokens + 1 + document.size > tokens_per_shard:
                entries[shard.name] = shard.close()
                shard = None
            if shard is None:
                shard = _OpenShard(folder, shard_name(name, split, next_index[split]))
                shards.append(shard)
                current[split] = shard
                next_index[split] += 1
            shard.add(document, format.bos_id)
        for shard in current.values():
            entries[shard.name] = shard.close()
        # First a manifest without them: it names the tokenizer before a shard can be taken for
        # GPT-2's, and never vouches for bytes that it didn't see.
        update_manifest(folder, format, {}, remove=older)
        for stale in older:
            (folder / stale).unlink(missing_ok=True)
        for shard in shards:
            os.replace(shard.path, folder / shard.name)
        update_manifest(folder, format, entries, **facts)
    except OSError as error:
        written = sum(shard.tokens for shard in shards) * 2
        raise DataError(
            f"{folder}: could not be written after {written:,} bytes ({error.strerror}); "
            "the unfinished shards were removed"
        ) from error
    finally:
        for shard in shards:
            shard.discard()
    return entries


def write_shards(
    folder: Path | str,
    name: str,
    split: str,
    documents: Iterable[np.ndarray],
    format: DataFormat,
    tokens_per_shard: int = 100_000_000,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Write documents (uint16 tokens without BOS) of one split; see `write_splits`."""
    if split not in _FIRST_INDEX:
        raise DataError(f"split {split!r}: train or val")
    labelled = ((split, document) for document in documents)
    return write_splits(
        folder,
        name,
        labelled,
        format,
        splits=(split,),
        tokens_per_shard=tokens_per_shard,
        **options,
    )
