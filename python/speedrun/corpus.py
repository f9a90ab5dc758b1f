"""Training text that needs no download: Python's own sources, or any text file, as byte shards."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import math
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speedrun._numpy_loader import HEADER_BYTES
from speedrun.data import BYTES, DataError
from speedrun.shards import MANIFEST, folder_lock, read_manifest, write_splits

# Validation runs every few seconds of a short training: a fair sample, and no more.
VAL_FRAC = 0.05
MIN_VAL_BYTES, MAX_VAL_BYTES = 32_000, 48_000
MIN_TEXT_BYTES = 1_000
TEXT_TRAIN_FRAC = 0.9

# Left out, because they are not the prose-and-code that the rest is: installed packages, tests
# (a third of all sources, much of it tables of expected values), the copy of the old compiler
# front end, character tables, and help texts or entity tables generated from elsewhere.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
}
_SKIPPED_FILES = {"html/entities.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata",)


def _standard_library_files(root: Path) -> list[tuple[str, int]]:
    """(path relative to root with '/', bytes) of each source used, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not name.endswith(".py") or name.startswith(_SKIPPED_PREFIXES):
                continue
            if relative not in _SKIPPED_FILES and path.stat().st_size:
                found.append((relative, path.stat().st_size))
    return sorted(found)


def _validation_files(files: Sequence[tuple[str, int]]) -> set[str]:
    """About 5 % of the bytes, by a hash of each path: the same files on each machine."""
    total = sum(size for _, size in files)
    goal = min(max(int(VAL_FRAC * total), MIN_VAL_BYTES), MAX_VAL_BYTES)
    chosen: set[str] = set()
    held = 0
    for name, size in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        if held >= goal:
            break
        if held + size <= MAX_VAL_BYTES:
            chosen.add(name)
            held += size
    return chosen


def byte_tokens(content: bytes) -> np.ndarray:
    """The bytes as uint16 tokens of the byte-level format, without BOS."""
    return np.frombuffer(content, np.uint8).astype(np.uint16)


def _readable_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except DataError:
        return None  # a broken cache is built again


def _is_current(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder's manifest has these facts and its files have the sizes it lists."""
    manifest = _readable_manifest(folder)
    if manifest is None or any(manifest.get(key) != value for key, value in facts.items()):
        return False
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _build_once(
    folder: Path, name: str, documents: Iterator[tuple[str, np.ndarray]], **facts: Any
) -> None:
    """Write the corpus unless it is there; of several ranks the first builds and others wait."""
    if _is_current(folder, facts):
        return
    with folder_lock(folder, wait=True):
        if _is_current(folder, facts):
            return
        if _readable_manifest(folder) is None:
            for stale in (*folder.glob(f"{name}_*_*.bin"), folder / MANIFEST):
                stale.unlink(missing_ok=True)
        write_splits(folder, name, documents, BYTES, overwrite=True, **facts)


def stdlib_corpus(folder: Path | str) -> Path:
    """Byte-level shards of the standard library's sources in `folder`, which is returned.

    Each file is a document; about 5 % of the bytes, and 32 to 48 kB, are validation. Built
    again when Python's version, its set of files or the split changes. DataError where the
    sources are absent or the folder can't be written.
    """
    folder = Path(folder)
    root = Path(sysconfig.get_path("stdlib"))
    files = _standard_library_files(root)
    if sum(size for _, size in files) < 10 * MIN_VAL_BYTES:
        raise DataError(
            f"{root}: this Python comes without its sources ({len(files)} files found); "
            "train on a text of yours with --text FILE, or on shards with --data FOLDER"
        )
    validation = _validation_files(files)

    def documents() -> Iterator[tuple[str, np.ndarray]]:
        for name, _ in files:
            try:
                content = (root / name).read_bytes()
            except OSError as error:
                raise DataError(f"{root / name}: can't be read ({error.strerror})") from error
            yield "val" if name in validation else "train", byte_tokens(content)

    _build_once(
        folder,
        "stdlib",
        documents(),
        long_documents="split",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        sources_sha256=hashlib.sha256(repr((files, sorted(validation))).encode()).hexdigest(),
    )
    return folder


def _cut_for_validation(content: bytes) -> int:
    """Bytes of the training part: 90 %, less what keeps a UTF-8 character whole."""
    cut = int(len(content) * TEXT_TRAIN_FRAC)
    for start in range(cut, max(cut - 4, -1), -1):
        if content[start] & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            return start
    return cut  # not UTF-8; any place is as good


def text_corpus(file: Path | str, folder: Path | str) -> Path:
    """Byte-level shards of one text, in a subfolder of `folder` named by the text's hash.

    The text is one document: its first 90 % of bytes are train, the last 10 % validation. Bytes
    that are not UTF-8 are kept, with a warning. DataError for a file that can't be read or has
    less than 1,000 bytes.
    """
    file = Path(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: can't be read ({error.strerror}); --text wants a text file"
        ) from error
    if len(content) < MIN_TEXT_BYTES:
        raise DataError(
            f"{file}: {len(content)} bytes are too little to train on; "
            f"--text wants {MIN_TEXT_BYTES:,} or more"
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        warnings.warn(
            f"{file}: not UTF-8 (byte {error.start}); its raw bytes are used", stacklevel=2
        )
    cut = _cut_for_validation(content)
    digest = hashlib.sha256(content).hexdigest()
    target = Path(folder) / f"text_{digest[:16]}"
    documents = [("train", byte_tokens(content[:cut])), ("val", byte_tokens(content[cut:]))]
    _build_once(target, "text", iter(documents), long_documents="split", source_sha256=digest)
    return target


def compressed_nats_per_byte(
    val_shards: Sequence[Path | str], num_tokens: int | None = None
) -> dict[str, float]:
    """Nats a byte that `gzip -9` and `bz2 -9` need for the text of byte-level shards.

    `num_tokens`: of so many of their first tokens only (BOS counts). The documents are joined,
    without BOS. A model's mean loss in nats over the same bytes can be compared with it. DataError
    for shards that are not byte-level, or hold no text.
    """
    parts = []
    for path in val_shards:
        try:
            tokens = np.fromfile(path, "<u2", offset=HEADER_BYTES)[:num_tokens]
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})") from error
        if tokens.size and tokens.max() > BYTES.bos_id:
            raise DataError(f"{path}: token {tokens.max()}: not a byte-level shard")
        parts.append(tokens[tokens != BYTES.bos_id].astype(np.uint8).tobytes())
        if num_tokens is not None:
            num_tokens -= tokens.size
    text = b"".join(parts)
    if not text:
        raise DataError(f"no text in {len(val_shards)} validation shards: nothing to compress")
    nats_per_compressed_byte = 8 * math.log(2) / len(text)
    return {
        "gzip": len(gzip.compress(text, 9)) * nats_per_compressed_byte,
        "bz2": len(bz2.compress(text, 9)) * nats_per_compressed_byte,
    }
