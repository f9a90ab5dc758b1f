"""Write a model's weights as safetensors, with a small config.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speedrun import checkpoint
from speedrun.runlog import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="folder of a checkpoint or a run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """0; 1 where it can't be read or written, with the reason on stderr."""
    try:
        checkpoint.export(args.checkpoint, args.out)
    except ImportError:
        print(
            "speedrun export: error: the package safetensors is missing (pip install "
            "'nanogpt-speedrun[cli]')",
            file=sys.stderr,
        )
        return 1
    except RunError as error:
        print(f"speedrun export: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {checkpoint.WEIGHTS} and {checkpoint.CONFIG}")
    return 0
