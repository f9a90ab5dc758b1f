"""Fetch, make and check token shards."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speedrun._numpy_loader import Shard
from speedrun._text_documents import documents, encoded
from speedrun._text_table import text_table
from speedrun.data import DataError, read_format
from speedrun.fetch import PUBLIC_SOURCE, FetchError, fetch_rank_file, fetch_shards
from speedrun.shards import folder_lock, read_manifest, sha256_file, write_splits
from speedrun.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs fetch, tokenize and check, each with its options."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")

    fetch = verbs.add_parser("fetch", help="download FineWeb shards and GPT-2's rank file")
    fetch.add_argument("--out", type=Path, default=Path("data/fineweb10B"), metavar="DIR")
    fetch.add_argument(
        "--train-shards",
        type=int,
        default=9,
        metavar="N",
        help="training shards of 100M tokens, 200 MB each (default 9: enough for a record)",
    )
    fetch.add_argument(
        "--source",
        default=PUBLIC_SOURCE,
        metavar="URL-or-FOLDER",
        help="a mirror, or a folder that holds the files (default: the public data set)",
    )
    fetch.add_argument("--rank-file", type=Path, metavar="F", help="a gpt2.tiktoken you have")
    fetch.add_argument("--verify", action="store_true", help="hash also the files already there")

    tokenize = verbs.add_parser("tokenize", help="write shards from text, jsonl or folders")
    tokenize.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    tokenize.add_argument("--out", type=Path, required=True, metavar="DIR")
    tokenize.add_argument("--tokenizer", required=True, choices=("gpt2", "bytes"))
    tokenize.add_argument("--rank-file", type=Path, metavar="F", help="GPT-2's (default: in DIR)")
    share = tokenize.add_mutually_exclusive_group()
    share.add_argument(
        "--val-frac",
        type=float,
        default=0.1,
        metavar="X",
        help="fraction of the documents for validation, evenly spread (default 0.1)",
    )
    share.add_argument("--val-documents", type=int, metavar="N", help="the first N instead")
    tokenize.add_argument("--name", default="text", help="begins the shards' names (default text)")
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    tokenize.add_argument("--field", default="text", help="of a jsonl line (default text)")

    check = verbs.add_parser("check", help="verify shards: header, size, tokens, hashes")
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="shards or folders")
    check.add_argument("--recipe", metavar="NAME", help="is a folder enough for this recipe?")


def run(args: argparse.Namespace) -> int:
    """The verb's exit code: 0 fine, 1 a problem (said on stderr), 130 stopped by Ctrl-C."""
    verb = {"fetch": _fetch, "tokenize": _tokenize, "check": _check}[args.data_verb]
    try:
        return verb(args)
    except (DataError, FetchError) as error:
        print(f"speedrun data {args.data_verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"speedrun data {args.data_verb}: stopped", file=sys.stderr)
        return 130


def _fetch(args: argparse.Namespace) -> int:
    paths = fetch_shards(args.out, args.train_shards, args.source, args.verify)
    fetch_rank_file(args.out, args.source, args.rank_file)
    print(f"{args.out}: {len(paths)} shards are there")
    return 0


@dataclass
class _Counts:
    """What tokenize reports."""

    documents: int = 0
    tokens: int = 0  # with BOS
    bytes: int = 0  # of text
    empty: int = 0


def _is_validation(index: int, args: argparse.Namespace) -> bool:
    if args.val_documents is not None:
        return index < args.val_documents
    return math.floor((index + 1) * args.val_frac) > math.floor(index * args.val_frac)


def _tokenize(args: argparse.Namespace) -> int:
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 1 or not 0 <= args.val_frac < 1 or (args.val_documents or 0) < 0:
        raise DataError("wanted: --workers 1 or more, 0 <= --val-frac < 1, --val-documents >= 0")
    if any(path.resolve() == args.out.resolve() for path in args.inputs):
        raise DataError(f"{args.out}: is an input too; write the shards into another folder")
    tokenizer = load_tokenizer(args.tokenizer, args.rank_file, args.out)
    counts = _Counts()
    not_text: list[Path] = []
    splits = set()

    def labelled() -> Iterator[tuple[str, np.ndarray]]:
        texts = documents(
            args.inputs,
            field=args.field,
            any_bytes=args.tokenizer == "bytes",
            skip=args.out,
            not_text=not_text,
        )
        for size, tokens in encoded(texts, tokenizer, workers):
            if not tokens.size:
                counts.empty += 1
                continue
            split = "val" if _is_validation(counts.documents, args) else "train"
            splits.add(split)
            counts.documents += 1
            counts.tokens += 1 + tokens.size
            counts.bytes += size
            yield split, tokens
        wants_val = args.val_frac > 0 if args.val_documents is None else args.val_documents > 0
        lacking = {"train", "val"} - splits if wants_val else {"train"} - splits
        if lacking:  # raised inside the writer, which then leaves nothing behind
            raise DataError(
                f"{counts.documents} documents leave none for {' and '.join(sorted(lacking))}; "
                "choose --val-documents N, or --val-frac 0 for no validation; one text alone "
                "needs no shards: speedrun train --text FILE"
            )

    began = time.monotonic()
    with folder_lock(args.out, wait=False):
        entries = write_splits(args.out, args.name, labelled(), tokenizer.format)
    seconds = time.monotonic() - began
    for path in not_text:
        print(f"left out, not UTF-8 text: {path}")
    if counts.empty:
        print(f"left out, empty: {counts.empty:,} documents")
    for name, entry in entries.items():
        print(f"{args.out / name}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
    print(
        f"{counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens in "
        f"{seconds:.1f} s: {counts.tokens / seconds:,.0f} tokens/s"
    )
    return 0


def _check_shard(path: Path) -> tuple[list[str], list[str]]:
    """A row of the table, and the problems found."""
    problems = []
    tokens = documents = mean = "-"
    try:
        shard = Shard(path, read_format(path.parent))
        tokens = f"{shard.num_tokens:,}"
        count = len(shard.find_documents(at_least_one=True))
        documents, mean = f"{count:,}", f"{shard.num_tokens / count:,.1f}"
    except DataError as error:
        problems.append(str(error))
    state = "no manifest"
    try:
        manifest = read_manifest(path.parent)
        recorded = (manifest or {"files": {}})["files"].get(path.name, {}).get("sha256")
        if not path.is_file():
            state = "missing"
        elif recorded:
            digest = sha256_file(path).hexdigest()
            state = "ok" if digest == recorded else "WRONG"
            if digest != recorded:
                problems.append(f"{path}: sha256 {digest}, the manifest says {recorded}")
        elif manifest is not None:
            state = "not listed"
    except DataError as error:
        state = "bad manifest"
        problems.append(str(error))
    return [str(path), tokens, documents, mean, state], problems


def _recipe_problem(name: str, folder: Path) -> str | None:
    """Why the folder's shards can't serve a recipe's schedule and validation, if they can't."""
    from speedrun import recipes, sources  # torch, which the other verbs do without
    from speedrun.schedule import Schedule

    try:
        config = recipes.load(name)
        data = sources.shards_of(folder, config)
        sources.model_for(config, data.format)
        sources.check_data(config, data, Schedule(config.schedule))
    except ValueError as error:  # ConfigError, DataError
        return str(error)
    print(f"{folder}: enough for recipe {name}")
    return None


def _check(args: argparse.Namespace) -> int:
    rows = [["file", "tokens", "documents", "mean length", "sha256"]]
    problems: list[str] = []
    shards: list[Path] = []
    for path in args.paths:
        if not path.is_dir():
            shards.append(path)
            continue
        listed = set()
        try:
            listed = {path / name for name in (read_manifest(path) or {"files": {}})["files"]}
        except DataError as error:
            problems.append(str(error))
        found = sorted(listed | set(path.glob("*.bin")))
        if not found:
            problems.append(f"{path}: no .bin shard in it")
        shards += found
        if args.recipe and (problem := _recipe_problem(args.recipe, path)):
            problems.append(problem)
    for path in dict.fromkeys(shards):
        row, found_problems = _check_shard(path)
        rows.append(row)
        problems += found_problems
    print(text_table(rows))
    for problem in dict.fromkeys(problems):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0
