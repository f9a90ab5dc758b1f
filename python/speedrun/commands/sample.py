"""Write text with a trained model, token by token."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from speedrun.checkpoint import load_for_inference
from speedrun.config import ConfigError
from speedrun.data import DataError
from speedrun.decode import decoder_for, generate, opening
from speedrun.runlog import RunError
from speedrun.sources import FINEWEB_FOLDER
from speedrun.tokenizer import Tokenizer, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with")
    parser.add_argument(
        "--interactive", action="store_true", help="read prompts, a line each, until an empty one"
    )
    parser.add_argument(
        "--tokens", type=at_least(1), default=256, metavar="N", help="at most (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=at_least(0.0), default=0.8, help="0: the likeliest (default: 0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=at_least(1),
        default=200,
        metavar="K",
        help="draw among the K likeliest (default: 200)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What `eval` has too."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="folder of a run, checkpoint or export"
    )
    parser.add_argument(
        "--rank-file",
        type=Path,
        metavar="FILE",
        help=f"GPT-2's vocabulary (default: in the data's folder, {FINEWEB_FOLDER})",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where a GPU is visible",
    )


def at_least(minimum: float) -> Callable[[str], float]:
    """An argparse type: a number of minimum's type, not below it."""

    def parse(text: str) -> float:
        value = type(minimum)(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}, or no number")
        return value

    parse.__name__ = type(minimum).__name__  # which argparse names where it can't convert
    return parse


def run(args: argparse.Namespace) -> int:
    """0; 1 where the checkpoint or its tokenizer can't be used, with the reason on stderr."""
    try:
        trained = load_for_inference(args.checkpoint, torch.device(args.device))
        model, data_format, windows = trained.model, trained.format, trained.plan.windows
        tokenizer = load_tokenizer(data_format.tokenizer, args.rank_file, FINEWEB_FOLDER)
        generator = torch.Generator().manual_seed(args.seed)
        for prompt in prompts() if args.interactive else [args.prompt]:
            decoder = decoder_for(model, windows, data_format.bos_id)
            tokens = [*opening(model, data_format.bos_id), *tokenizer.encode(prompt)]
            drawn = generate(decoder, tokens, args.temperature, args.top_k, generator)
            write(prompt, islice(drawn, args.tokens), tokenizer)
    except (ConfigError, DataError, RunError) as error:
        print(f"speedrun sample: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def prompts() -> Iterator[str]:
    """Lines from the keyboard, or standard input, up to an empty one or its end."""
    try:
        while prompt := input("> " if sys.stdin.isatty() else ""):
            yield prompt
    except EOFError:
        return


def write(prompt: str, tokens: Iterable[int], tokenizer: Tokenizer) -> None:
    """Prompt and tokens to stdout as they come, up to a document's end; the rate to stderr."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # characters of many tokens
    print(prompt, end="", flush=True)
    times = [time.perf_counter()]
    for token in tokens:
        times.append(time.perf_counter())
        if token == tokenizer.format.bos_id:
            break
        print(decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decode(b"", final=True))
    first_s, rest_s = times[1] - times[0], times[-1] - times[1]
    rate = f", then {(len(times) - 2) / rest_s:,.1f} tokens/s" if len(times) > 2 else ""
    print(f"[first token after {first_s:.3f} s{rate}]", file=sys.stderr)
