"""The loss that a run is to reach."""

from __future__ import annotations

from speedrun.config import Config
from speedrun.corpus import compressed_nats_per_byte
from speedrun.sources import DataSource


def target_of(config: Config, data: DataSource) -> tuple[float | None, str]:
    """Nats a token, and what it is, in words; None where gzip's is of bytes and the tokens aren't.

    DataError where the validation shards can't be read.
    """
    if config.target_loss != "gzip":
        return config.target_loss, "the recipe's target"
    if data.format.tokenizer != "bytes":
        return None, ""
    validated = config.data.val_tokens or config.data.val_tokens_at_most
    sizes = compressed_nats_per_byte(data.val, validated and validated + 1)
    return sizes["gzip"], f"gzip -9 on the same bytes (bz2 -9: {sizes['bz2']:.4f})"
