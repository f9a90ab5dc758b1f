"""The prefix table: what the loss's prefix term predicts (RECIPE section 2, "Prefix table").

V padded vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from speedrun.config import ScheduleConfig
from speedrun.data import BYTES, DataError, DataFormat
from speedrun.schedule import Schedule
from speedrun.tokenizer import Tokenizer, load_tokenizer

NO_PREFIX = -1


def build_prefix_table(tokenizer: Tokenizer, padded_vocab_size: int) -> np.ndarray:
    """(V,) int64: by token the longest proper prefix of its bytes that is a token, −1 for none.

    BOS and padding have none, and BOS is none. ValueError for a V below the vocabulary's size.
    """
    vocabulary = tokenizer.format
    if padded_vocab_size < vocabulary.vocab_size:
        raise ValueError(
            f"padded_vocab_size={padded_vocab_size}: {vocabulary.tokenizer} has "
            f"{vocabulary.vocab_size} tokens"
        )
    tokens = [token for token in range(vocabulary.vocab_size) if token != vocabulary.bos_id]
    token_of = {tokenizer.token_bytes(token): token for token in tokens}
    table = np.full(padded_vocab_size, NO_PREFIX, np.int64)
    for text, token in token_of.items():
        for end in range(len(text) - 1, 0, -1):
            prefix = token_of.get(text[:end])
            if prefix is not None:
                table[token] = prefix
                break
    return table


def prefix_tokenizer(
    config: ScheduleConfig, data_format: DataFormat, folder: Path
) -> Tokenizer | None:
    """The tokenizer of the data in `folder` if the loss has a prefix term, else None.

    Bytes have no prefixes, so their loss has no such term whatever the schedule says. DataError
    where the tokenizer is needed and isn't there; to be called before the clock starts.
    """
    weights = [weight for stage in Schedule(config).stages for weight in stage.prefix_weight]
    if not (config.prefix_loss and any(weights)) or data_format.tokenizer == BYTES.tokenizer:
        return None
    try:
        return load_tokenizer(data_format.tokenizer, folder=folder)
    except DataError as error:
        raise DataError(
            f"{error}. The schedule's prefix loss needs the tokenizer, with its file in the folder "
            "of the shards; --set schedule.prefix_loss=false trains without"
        ) from error
