"""Measure a trained model: validation loss, bits per byte, HellaSwag."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedrun import hardware, hellaswag, train
from speedrun.baseline_model import BaselineGPT
from speedrun.checkpoint import load_for_inference
from speedrun.commands.sample import add_checkpoint_arguments, at_least
from speedrun.comms import Comms
from speedrun.config import Config, ConfigError, Windows
from speedrun.data import DataError, DataFormat
from speedrun.model import GPT
from speedrun.runlog import RunError
from speedrun.schedule import StepPlan
from speedrun.sources import FINEWEB_FOLDER, DataSource, open_data, validation_data
from speedrun.tokenizer import Tokenizer, load_tokenizer

PROGRESS_S = 10.0  # between lines on how far it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DIR", help="folder of token shards (default: as train)")
    source.add_argument("--text", metavar="FILE", help="any text: its last 10 %%, as in training")
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        metavar="N",
        help="to validate on (default: those of the rule, as the recipe has them)",
    )
    parser.add_argument(
        "--hellaswag", type=Path, metavar="FILE", help="its tasks, JSON lines or text, also bz2"
    )
    parser.add_argument(
        "--tasks", type=at_least(1), metavar="N", help="the first N of HellaSwag (default: all)"
    )
    parser.add_argument(
        "--skip-validation", action="store_true", help="HellaSwag alone, which needs no data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results too, as JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 where something can't be measured, with the reason on stderr."""
    try:
        results = measure(args)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except BrokenPipeError:  # of stdout: for cli
        raise
    except OSError as error:
        print(f"speedrun eval: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except (ConfigError, DataError, RunError) as error:
        print(f"speedrun eval: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, printed when it is there. All input is opened before anything runs."""
    if args.skip_validation and args.hellaswag is None:
        raise ConfigError("--skip-validation leaves nothing to measure: add --hellaswag FILE")
    if args.json and not args.json.parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.parent}; make it")
    tasks = hellaswag.read_tasks(args.hellaswag)[: args.tasks] if args.hellaswag else []
    trained = load_for_inference(args.checkpoint, torch.device(args.device))
    model, config, data_format, _ = trained
    plan = trained.plan
    data = None if args.skip_validation else open_validation_data(args, config, data_format)
    tokenizer = open_tokenizer(args, data_format, data)
    results = {
        "checkpoint": str(args.checkpoint),
        "recipe": config.name,
        "device": hardware.device_name(model.embed.device),
        "dtype": str(model.embed.dtype).removeprefix("torch."),
        "windows": plan.windows._asdict(),
    }
    if data is not None:
        if args.tokens:
            changed = dataclasses.replace(config.data, val_tokens=args.tokens)
            config = dataclasses.replace(config, data=changed)
        results["validation"] = validation(model, config, data, plan, tokenizer)
    if tasks:
        results["hellaswag"] = tasks_scored(model, plan.windows, tasks, tokenizer)
    return results


def open_validation_data(
    args: argparse.Namespace, config: Config, data_format: DataFormat
) -> DataSource:
    data = open_data(args.data, args.text, config)
    if data.format != data_format:
        raise DataError(
            f"{data.folder}: tokens of {data.format.tokenizer!r}, but {args.checkpoint} was "
            f"trained on those of {data_format.tokenizer!r}: give a folder of such by --data"
        )
    return data


def open_tokenizer(
    args: argparse.Namespace, data_format: DataFormat, data: DataSource | None
) -> Tokenizer | None:
    """None, and said so, where it can't be had and HellaSwag doesn't need it."""
    try:
        folder = FINEWEB_FOLDER if data is None else data.folder
        return load_tokenizer(data_format.tokenizer, args.rank_file, folder)
    except DataError as error:
        if args.hellaswag or args.rank_file:
            raise
        print(f"no bits per byte: {error}")
        return None


def validation(
    model: GPT | BaselineGPT,
    config: Config,
    data: DataSource,
    plan: StepPlan,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Mean loss (nats a token), and bits per byte: all tokens' nats over their text's bytes, of
    which BOS has none."""
    where = train.Run(Comms(), model.embed.device, model.embed.dtype)
    began = time.perf_counter()
    loss = train.validate(model, config, data, plan, where, beat=lambda: None)
    seconds = time.perf_counter() - began
    targets = [part.targets for part in validation_data(config, data, rank=0, world_size=1)]
    tokens = sum(map(len, targets))
    num_bytes = None
    if tokenizer is not None:
        counts = byte_counts(tokenizer)
        num_bytes = sum(int(counts[part].sum()) for part in targets)
    bits = loss * tokens / (math.log(2) * num_bytes) if num_bytes else None
    print(
        f"validation loss {loss:.4f} nats a token over {tokens:,} tokens"
        f"{'' if bits is None else f', {bits:.4f} bits a byte'} ({tokens / seconds:,.0f} tokens/s)"
    )
    return {
        "loss": loss,
        "bits_per_byte": bits,
        "num_tokens": tokens,
        "num_bytes": num_bytes,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) int64: bytes of each token; BOS is none of the text's."""
    data_format = tokenizer.format
    counts = [len(tokenizer.token_bytes(token)) for token in range(data_format.vocab_size)]
    counts[data_format.bos_id] = 0
    return np.array(counts)


def tasks_scored(
    model: GPT | BaselineGPT,
    windows: Windows,
    tasks: list[hellaswag.Task],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    def progress(num_scored: int, tokens_per_s: float) -> None:
        nonlocal said
        if time.perf_counter() - said > PROGRESS_S:
            said = time.perf_counter()
            of = f"{num_scored:,} of {hellaswag.NUM_ENDINGS * len(tasks):,} texts"
            print(f"HellaSwag: {of}, {tokens_per_s:,.0f} tokens/s", file=sys.stderr)

    said = time.perf_counter()
    score = hellaswag.evaluate(model, windows, tasks, tokenizer, progress=progress)
    error = math.sqrt(score.acc_norm * (1 - score.acc_norm) / score.num_tasks)
    print(
        f"HellaSwag acc_norm {score.acc_norm:.4f} ± {error:.4f} (log-probability over the "
        f"ending's bytes), acc {score.acc:.4f}, {score.num_tasks:,} tasks "
        f"({score.num_tokens:,} packed tokens, {score.tokens_per_s:,.0f} tokens/s)"
    )
    return {
        **dataclasses.asdict(score),
        "acc_norm_standard_error": error,
        "tokens_per_s": score.tokens_per_s,
    }
