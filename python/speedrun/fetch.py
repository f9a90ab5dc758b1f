"""Bring FineWeb shards and GPT-2's rank file into a folder, each verified before it appears."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from speedrun._download import FetchError, Remote, Retry, ask, discard, download
from speedrun._numpy_loader import Shard
from speedrun._progress import Progress
from speedrun.data import GPT2, DataError
from speedrun.shards import (
    check_same_format,
    folder_lock,
    read_manifest,
    replace_atomically,
    sha256_file,
    shard_name,
    update_manifest,
)
from speedrun.tokenizer import (
    MERGES_SHA256,
    RANK_FILE,
    RANK_FILE_SHA256,
    parse_ranks,
    ranks_from_merges,
)

__all__ = ["PUBLIC_SOURCE", "FetchError", "Retry", "fetch_rank_file", "fetch_shards"]

PUBLIC_SOURCE = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
# GPT-2's merges, from which the rank file is made; whoever serves them, their hash decides.
MERGES_URLS = (
    "https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
)
_COPY_BLOCK_BYTES = 1 << 20


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


@contextlib.contextmanager
def _as_fetch_errors(folder: Path) -> Iterator[None]:
    """Everything that goes wrong with files comes out as a FetchError."""
    try:
        yield
    except DataError as error:
        raise FetchError(str(error)) from error
    except BrokenPipeError:  # of stdout: for cli
        raise
    except OSError as error:
        raise FetchError(
            f"{error.filename or folder}: {error.strerror or error}; what came so far is kept, "
            "run again when this is mended"
        ) from error


def _entry(path: Path, sha256: str, reported_sha256: str | None) -> dict[str, Any]:
    shard = Shard(path, GPT2)
    return {
        "bytes": path.stat().st_size,
        "tokens": shard.num_tokens,
        "documents": len(shard.find_documents(at_least_one=True)),
        "sha256": sha256,
        "reported_sha256": reported_sha256,
    }


def _is_there(path: Path, listed: dict[str, Any] | None, verify: bool, say: Callable) -> bool:
    """Whether a good shard is at `path`, by its sizes and with `verify` by its recorded hash."""
    if not path.exists():
        return False
    try:
        Shard(path, GPT2)
    except DataError as error:
        say(f"{error}; it is replaced")
        return False
    if listed is None:
        digest = sha256_file(path).hexdigest()
        update_manifest(path.parent, GPT2, {path.name: _entry(path, digest, None)})
        say(f"{path.name}: there already; its hash is recorded, no server was asked for it")
    elif path.stat().st_size != listed["bytes"]:
        say(f"{path.name}: {path.stat().st_size:,} bytes, not {listed['bytes']:,}; it is replaced")
        return False
    elif verify and sha256_file(path).hexdigest() != listed["sha256"]:
        say(f"{path.name}: its sha256 is no longer the one in the manifest; it is replaced")
        return False
    return True


def _ask_about(
    names: Sequence[str], source: str, folder: Path, retry: Retry, say: Callable
) -> list[Remote]:
    """What the source says of each file, in order."""
    if _is_url(source):
        remotes: list[Remote] = []
        for name in names:
            # Whether there is a network shows at the first file, and in seconds.
            tries = None if remotes else 2
            try:
                remotes.append(ask(f"{source.rstrip('/')}/{name}", retry, say, tries=tries))
            except FetchError as error:
                raise FetchError(
                    f"{error}\n  To fill {folder} by hand: put {', '.join(names)} there, or name "
                    f"a mirror or a folder that holds them with --source URL-or-FOLDER"
                ) from error
        return remotes
    place = Path(source)
    if not place.is_dir():
        raise FetchError(f"{source}: --source is neither an http(s) address nor a folder")
    if place.resolve() == folder.resolve():
        raise FetchError(f"{source}: is the folder to fill itself, and lacks {', '.join(names)}")
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        raise FetchError(f"{source}: lacks {', '.join(missing)}; put them there")
    listed = (read_manifest(place) or {"files": {}})["files"]
    return [
        Remote(str(place / name), (place / name).stat().st_size, listed.get(name, {}).get("sha256"))
        for name in names
    ]


def _check_space(
    folder: Path, names: Sequence[str], remotes: Sequence[Remote], say: Callable
) -> int:
    """Say how much is to come, and refuse what the disk can't hold. Returns the bytes known of."""
    total = sum(remote.bytes or 0 for remote in remotes)
    parts = [folder / f"{name}.part" for name in names]
    held = sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    unknown = " or more (not all sizes are known)" if any(r.bytes is None for r in remotes) else ""
    resumed = f", {held / 1e6:,.1f} MB of it here already" if held else ""
    say(f"{len(names)} files, {total / 1e6:,.1f} MB{unknown}{resumed}, into {folder}")
    if total - held > free:
        raise FetchError(
            f"{folder}: {(total - held) / 1e6:,.1f} MB are to come and {free / 1e6:,.1f} MB are "
            "free; make room or choose another folder with --out"
        )
    return total


def _copy(remote: Remote, part: Path, progress: Progress) -> str:
    state, done = hashlib.sha256(), 0
    with open(remote.place, "rb") as source, part.open("wb") as target:
        while block := source.read(_COPY_BLOCK_BYTES):
            target.write(block)
            state.update(block)
            done += len(block)
            progress.show(done)
        target.flush()
        os.fsync(target.fileno())
    if remote.sha256 and state.hexdigest() != remote.sha256:
        discard(part)
        raise FetchError(
            f"{remote.place}: has sha256 {state.hexdigest()}, and its manifest says "
            f"{remote.sha256}; bring that file anew"
        )
    return state.hexdigest()


def _bring(
    remote: Remote, target: Path, retry: Retry, say: Callable[[str], None], progress: Progress
) -> None:
    """One shard from its source to `target` and into the manifest."""
    part = target.with_name(target.name + ".part")
    try:
        if _is_url(remote.place):
            digest = download(remote, part, retry, say, progress)
        else:
            digest = _copy(remote, part, progress)
    except KeyboardInterrupt:
        if part.exists():
            say(f"\nstopped; {part} keeps {part.stat().st_size:,} bytes, run again to go on")
        raise
    try:
        entry = _entry(part, digest, remote.sha256)
    except DataError as error:
        discard(part)
        raise FetchError(f"{remote.place}: not a good shard: {error}") from error
    os.replace(part, target)
    discard(part)  # its note
    update_manifest(target.parent, GPT2, {target.name: entry})
    proof = "sha256 as its source reports" if remote.sha256 else "no hash reported; size checked"
    say(f"{target.name}: {entry['bytes'] / 1e6:,.1f} MB, {entry['tokens']:,} tokens, {proof}")


def fetch_shards(
    folder: Path | str,
    train_shards: int,
    source: str = PUBLIC_SOURCE,
    verify: bool = False,
    progress: bool = True,
    *,
    retry: Retry | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """FineWeb's validation shard and its first `train_shards` training shards, into `folder`.

    source: the address that the file names are added to, or a local folder. Files that are there
    and in the manifest are kept (with `verify` their SHA-256 is computed again). Returns the paths,
    validation first. FetchError for everything that can't be had; what came is kept for a resume.
    """
    if train_shards < 0:
        raise FetchError(f"{train_shards} training shards: 0 or more")
    folder, retry = Path(folder), retry or Retry()
    names = [shard_name("fineweb", "val", 0)]
    names += [shard_name("fineweb", "train", index + 1) for index in range(train_shards)]
    with _as_fetch_errors(folder), folder_lock(folder, wait=False):
        manifest = check_same_format(folder, GPT2) or {"files": {}}
        wanted = [
            name
            for name in names
            if not _is_there(folder / name, manifest["files"].get(name), verify, say)
        ]
        if wanted:
            remotes = _ask_about(wanted, source, folder, retry, say)
            total = _check_space(folder, wanted, remotes, say)
            bar = Progress(total, say, progress)
            with contextlib.closing(bar):
                for name, remote in zip(wanted, remotes, strict=True):
                    _bring(remote, folder / name, retry, say, bar)
                    bar.finished += remote.bytes or 0
    return [folder / name for name in names]


def _rank_file_content(
    source: str, folder: Path, retry: Retry, say: Callable[[str], None], urls: Sequence[str]
) -> bytes:
    """The rank file's content, from the source or made from public merges. FetchError if none."""
    part = folder / f"{RANK_FILE}.part"
    problems = []
    mirror = [] if source == PUBLIC_SOURCE else [f"{source.rstrip('/')}/{RANK_FILE}"]
    for url in [*mirror, *urls]:
        is_rank_file = url in mirror
        remote = Remote(url, sha256=RANK_FILE_SHA256 if is_rank_file else MERGES_SHA256)
        try:
            # Another address comes next: no need to insist on this one.
            download(
                remote, part, dataclasses.replace(retry, tries=2), say, Progress(None, say, False)
            )
            content = part.read_bytes()
            return content if is_rank_file else ranks_from_merges(content)
        except FetchError as error:
            problems.append(str(error))
        finally:
            discard(part)
    raise FetchError(
        f"{folder / RANK_FILE}: GPT-2's rank file can't be had; give one you have with "
        "--rank-file FILE\n  " + "\n  ".join(problems)
    )


def fetch_rank_file(
    folder: Path | str,
    source: str = PUBLIC_SOURCE,
    rank_file: Path | str | None = None,
    *,
    retry: Retry | None = None,
    say: Callable[[str], None] = print,
    urls: Sequence[str] = MERGES_URLS,
) -> Path | None:
    """GPT-2's rank file into `folder`, checked by its hash; None if a local `source` has none.

    It is copied from `rank_file` or the source, or made from the public merges. FetchError if it
    can't be had, or isn't GPT-2's.
    """
    folder = Path(folder)
    target = folder / RANK_FILE
    if rank_file is None and not _is_url(source):
        rank_file = Path(source) / RANK_FILE
        if not rank_file.exists() and not target.exists():
            say(f"{source}: has no {RANK_FILE}; GPT-2 text needs it: --rank-file FILE")
            return None
    with _as_fetch_errors(folder), folder_lock(folder, wait=False):
        with contextlib.suppress(DataError):
            parse_ranks(target)
            return target
        if rank_file is not None:
            parse_ranks(Path(rank_file))
            content = Path(rank_file).read_bytes()
        else:
            content = _rank_file_content(source, folder, retry or Retry(), say, urls)
        replace_atomically(target, content)
        say(f"{target}: GPT-2's rank file, sha256 as published")
    return target
