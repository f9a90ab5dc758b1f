"""Train with what this machine has: choose the recipe, fetch its data, use all GPUs."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from speedrun import recipes, sources, train
from speedrun.config import NUM_PARTS
from speedrun.fetch import FetchError, fetch_rank_file, fetch_shards

RECORD_RECIPE = "record_089"
RECORD_MEMORY_BYTES = 48e9  # a card sold with 48 GB reports a little less
RECORD_CAPABILITY = (8, 0)


def num_ranks(num_gpus: int) -> int:
    """The largest of 1, 2, 4, 8 that this many GPUs allow."""
    return max(n for n in (1, 2, 4, NUM_PARTS) if n <= num_gpus)


def choose_recipe(gpus: list[tuple[int, tuple[int, int]]]) -> str:
    """The recipe for GPUs given as (memory bytes, compute capability); none means a CPU."""
    fits = all(
        memory >= 0.9 * RECORD_MEMORY_BYTES and capability >= RECORD_CAPABILITY
        for memory, capability in gpus
    )
    return RECORD_RECIPE if gpus and fits and RECORD_RECIPE in recipes.names() else "tiny"


def visible_gpus() -> list[tuple[int, tuple[int, int]]]:
    """(memory bytes, compute capability) of each."""
    return [
        (torch.cuda.get_device_properties(i).total_memory, torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.set_defaults(recipe=None)


def run(args: argparse.Namespace) -> int:
    gpus = visible_gpus() if args.device == "cuda" else []
    args.recipe = args.recipe or choose_recipe(gpus)
    if not gpus:
        return train.run(args)
    try:
        data = recipes.load(args.recipe).data
        if data.default == "fineweb" and not (args.data or args.text):
            fetch_shards(sources.FINEWEB_FOLDER, data.train_shards)
            fetch_rank_file(sources.FINEWEB_FOLDER)  # the prefix loss needs the vocabulary
    except (FetchError, ValueError) as error:
        print(f"speedrun: error: {error}", file=sys.stderr)
        return 1
    launch = ["-m", "torch.distributed.run", "--standalone"]
    ranks = f"--nproc_per_node={num_ranks(len(gpus))}"
    command = [sys.executable, *launch, ranks, "-m", "speedrun.train", *train.to_argv(args)]
    print("$", *command[1:], flush=True)
    os.execv(sys.executable, command)
