"""What a run reads: which shards, in what shapes, and whether they will do; then the batches.

Everything here is the same on every rank but for the parts that it is dealt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speedrun.batch import MicroBatch, to_device
from speedrun.config import Config, ConfigError, ModelConfig, num_parts
from speedrun.corpus import stdlib_corpus, text_corpus
from speedrun.data import (
    BYTES,
    GPT2,
    BatchShape,
    DataFormat,
    LoaderPosition,
    Part,
    StepBatch,
    TokenLoader,
    check_schedule,
    cu_seqlens_entries,
    find_shards,
    read_format,
    read_long_documents,
    validation_parts,
)
from speedrun.schedule import Schedule

DATA_FOLDER = Path("data")  # of corpora and fetched shards, in the working directory
FINEWEB_FOLDER = DATA_FOLDER / "fineweb10B"


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Shards to train and validate on, and how to read them."""

    folder: Path
    train: list[Path]
    val: list[Path]
    format: DataFormat
    long_documents: str


def open_data(data: Path | None, text: Path | None, config: Config) -> DataSource:
    """--data, --text or the recipe's own; text becomes shards first (one rank builds)."""
    if data:
        folder = Path(data)
    elif text:
        folder = text_corpus(text, DATA_FOLDER)
    elif config.data.default == "stdlib":
        folder = stdlib_corpus(DATA_FOLDER / "stdlib")
    else:
        folder = FINEWEB_FOLDER
    return shards_of(folder, config)


def shards_of(folder: Path, config: Config) -> DataSource:
    """The shards of a folder; long documents as its manifest says, else as the config does."""
    return DataSource(
        folder,
        find_shards(folder, "train"),
        find_shards(folder, "val"),
        read_format(folder),
        read_long_documents(folder) or config.data.long_documents,
    )


def model_for(config: Config, format: DataFormat) -> ModelConfig:
    """The model's config with the data's vocabulary; ConfigError where the two disagree."""
    if config.model.vocab_size not in (None, format.vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the data's tokenizer "
            f"{format.tokenizer!r} has {format.vocab_size} tokens: choose data or recipe to fit"
        )
    return dataclasses.replace(config.model, vocab_size=format.vocab_size)


def with_vocabulary(config: Config) -> Config:
    """The config with the vocabulary of its usual data, where it names none."""
    if config.model.vocab_size is not None:
        return config
    data_format = GPT2 if config.data.default == "fineweb" else BYTES
    return dataclasses.replace(config, model=model_for(config, data_format))


def batch_shapes(config: Config, schedule: Schedule, world_size: int) -> list[BatchShape]:
    """What the loader deals: one entry a stage."""
    shapes = []
    for stage, start, end in zip(schedule.stages, schedule.starts, schedule.ends, strict=True):
        tokens = stage.tokens_per_step // num_parts(world_size)
        entries = config.data.cu_seqlens_entries or cu_seqlens_entries(tokens)
        shapes.append(BatchShape(end - start, tokens, stage.max_seq_len, entries))
    return shapes


def check_training_data(
    config: Config, data: DataSource, schedule: Schedule, world_size: int
) -> None:
    """DataError for what the schedule would meet in the training shards."""
    check_schedule(
        data.train,
        batch_shapes(config, schedule, world_size),
        format=data.format,
        world_size=world_size,
        batching=config.data.batching,
        long_documents=data.long_documents,
        repeat=config.data.repeat,
    )


def check_validation_data(config: Config, data: DataSource) -> None:
    """DataError for what a validation would meet."""
    for _ in validation_data(config, data, rank=0, world_size=1):
        pass


def check_data(config: Config, data: DataSource, schedule: Schedule, world_size: int = 1) -> None:
    """Everything about the data that would stop the run later, found before it starts."""
    check_training_data(config, data, schedule, world_size)
    check_validation_data(config, data)


def training_loader(
    config: Config,
    data: DataSource,
    schedule: Schedule,
    rank: int,
    world_size: int,
    first_step: int = 0,
    start: LoaderPosition | None = None,
) -> TokenLoader:
    """first_step: of a run that goes on, and `start` where its batch is."""
    shapes = batch_shapes(config, schedule, world_size)
    to_come = [
        dataclasses.replace(shape, steps=max(0, min(shape.steps, end - first_step)))
        for shape, end in zip(shapes, schedule.ends, strict=True)
    ]
    return TokenLoader(
        data.train,
        to_come,
        format=data.format,
        bigram_table_rows=config.model.bigram_rows,
        sign_table_rows=config.model.sign_rows,
        rank=rank,
        world_size=world_size,
        batching=config.data.batching,
        long_documents=data.long_documents,
        repeat=config.data.repeat,
        start=start,
    )


def validation_data(config: Config, data: DataSource, rank: int, world_size: int) -> Iterator[Part]:
    sequence_length = None
    if config.data.batching == "consecutive":
        sequence_length = config.schedule.stages[-1].max_seq_len
    return validation_parts(
        data.val,
        format=data.format,
        tokens_per_part=config.data.val_tokens_per_part,
        num_tokens=config.data.val_tokens,
        at_most=config.data.val_tokens_at_most,
        bigram_table_rows=config.model.bigram_rows,
        sign_table_rows=config.model.sign_rows,
        rank=rank,
        world_size=world_size,
        cu_seqlens_entries=config.data.cu_seqlens_entries,
        sequence_length=sequence_length,
    )


def made_up_batch(
    config: Config, shape: BatchShape, vocab_size: int, world_size: int, seed: int
) -> StepBatch:
    """A rank's parts of a step in that shape, of random tokens in documents of max_seq_len."""
    size = (num_parts(world_size) // world_size, shape.tokens_per_part)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, size, dtype=np.int32)
    starts = np.arange(shape.cu_seqlens_entries, dtype=np.int32) * shape.max_seq_len
    starts = starts.clip(max=size[1])
    starts[-1] = size[1]
    cu_seqlens = np.tile(starts, (size[0], 1))
    rows = [
        np.zeros(size, np.int32) if table else None
        for table in (config.model.bigram_rows, config.model.sign_rows)
    ]
    return StepBatch(tokens, tokens, cu_seqlens, *rows, position=None)


def to_micro_batches(batch: StepBatch, config: Config, device: torch.device) -> list[MicroBatch]:
    """This rank's parts in groups of `micro_batch_parts` (fewer where the rank has fewer)."""
    num_parts, num_tokens = batch.inputs.shape
    group = min(config.micro_batch_parts, num_parts)

    def tensor(array: np.ndarray | None, dtype: torch.dtype = torch.int32) -> Tensor | None:
        return None if array is None else to_device(torch.from_numpy(array), device).to(dtype)

    micro_batches = []
    for begin in range(0, num_parts, group):
        parts = slice(begin, begin + group)
        offsets = np.arange(group, dtype=np.int32)[:, None] * num_tokens
        starts = (batch.cu_seqlens[parts] + offsets).reshape(-1)
        micro_batches.append(
            MicroBatch(
                tensor(batch.inputs[parts]),
                tensor(batch.targets[parts], torch.int64),
                tensor(starts),
                None if batch.bigram_rows is None else tensor(batch.bigram_rows[parts]),
                None if batch.sign_rows is None else tensor(batch.sign_rows[parts]),
                int(np.diff(starts).max()),
            )
        )
    return micro_batches
