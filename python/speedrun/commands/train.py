"""Train a recipe on text or token shards."""

from speedrun.train import add_arguments, run

__all__ = ["add_arguments", "run"]
