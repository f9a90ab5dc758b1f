"""HellaSwag: does the model find the right one of four endings the likeliest?

Texts are documents packed into rows, as in training: many in one forward pass. T tokens of a row.
Reference: Zellers et al., arXiv 1905.07830; scores as lm-evaluation-harness names them.
"""

from __future__ import annotations

import bz2
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun import baseline_model
from speedrun._numpy_loader import bigram_rows, sign_rows
from speedrun.baseline_model import BaselineGPT
from speedrun.batch import MicroBatch
from speedrun.config import Windows
from speedrun.data import DataError
from speedrun.decode import LEADING_BOS
from speedrun.model import GPT
from speedrun.ops.softcap_ce import NO_TARGET
from speedrun.tokenizer import Tokenizer

TOKENS_A_ROW = 16_384  # of packed documents; a longer one has a row of its own
NUM_ENDINGS = 4


class Task(NamedTuple):
    context: str
    endings: tuple[str, ...]
    label: int  # of the right ending, from 0


class Document(NamedTuple):
    """A context with one of its endings."""

    tokens: np.ndarray  # int32, BOS in front
    ending: int  # where in them the ending begins
    num_bytes: int  # of the ending's text


class Row(NamedTuple):
    """Packed documents."""

    tokens_T: np.ndarray  # int32
    starts: list[int]  # of everything that attention takes for a document
    targets_T: np.ndarray  # int64: the next token where that is of an ending, else −1
    document_T: np.ndarray  # int64: whose ending that is, from 0 in this row
    num_documents: int


@dataclass(frozen=True)
class Score:
    """`acc`: the right ending has the largest sum of log-probabilities; `acc_norm`: the largest
    sum over the ending's bytes in UTF-8."""

    acc: float
    acc_norm: float
    num_tasks: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def read_tasks(path: Path) -> list[Task]:
    """The public JSON lines (ctx, endings, label), or text with six lines a task: context, label,
    four endings; either may be packed by bzip2. DataError names the line that is neither."""
    try:
        content = path.read_bytes()
        if content.startswith(b"BZh"):
            content = bz2.decompress(content)
        lines = content.decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: HellaSwag's tasks can't be read ({reason})") from error
    if not lines:
        raise DataError(f"{path}: empty; wanted are HellaSwag's tasks, as JSON lines or as text")
    one_line = lines[0].startswith("{")
    size, parse = (1, _from_json) if one_line else (2 + NUM_ENDINGS, _from_text)
    tasks = []
    for i in range(0, len(lines), size):
        try:
            task = parse(lines[i : i + size])
            if len(task.endings) != NUM_ENDINGS or task.label not in range(NUM_ENDINGS):
                raise ValueError(f"{len(task.endings)} endings, label {task.label}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: line {i + 1} doesn't begin a task of HellaSwag ({error!r}); wanted are "
                f"lines of JSON with ctx, endings and label, or {2 + NUM_ENDINGS} lines of text: "
                "context, label from 0, four endings"
            ) from error
        tasks.append(task)
    return tasks


def _from_json(lines: list[str]) -> Task:
    values = json.loads(lines[0])
    return Task(values["ctx"], tuple(values["endings"]), int(values["label"]))


def _from_text(lines: list[str]) -> Task:
    return Task(lines[0], tuple(lines[2:]), int(lines[1]))


def documents(task: Task, tokenizer: Tokenizer) -> list[Document]:
    """The context with each ending, a space between."""
    context = [tokenizer.format.bos_id, *tokenizer.encode(task.context)]
    found = []
    for ending in task.endings:
        tokens = np.array([*context, *tokenizer.encode(f" {ending}")], np.int32)
        found.append(Document(tokens, len(context), len(ending.encode())))
    return found


def pack(documents: Sequence[Document], bos_id: int, tokens_a_row: int) -> Iterator[Row]:
    """Rows of at most so many tokens, each document behind LEADING_BOS lone ones."""
    row: list[Document] = []
    size = 0
    for document in documents:
        added = LEADING_BOS + len(document.tokens)
        if row and size + added > tokens_a_row:
            yield _row(row, bos_id)
            row, size = [], 0
        row.append(document)
        size += added
    if row:
        yield _row(row, bos_id)


def _row(documents: list[Document], bos_id: int) -> Row:
    tokens, starts, targets, owners = [], [0], [], []
    for i, document in enumerate(documents):
        own = np.append(np.full(LEADING_BOS, bos_id, np.int32), document.tokens)
        lengths = [1] * LEADING_BOS + [len(document.tokens)]
        starts += (starts[-1] + np.cumsum(lengths)).tolist()
        own_targets = np.full(len(own), NO_TARGET, np.int64)
        ending = LEADING_BOS + document.ending
        own_targets[ending - 1 : -1] = own[ending:]
        tokens.append(own)
        targets.append(own_targets)
        owners.append(np.full(len(own), i))
    rows = (np.concatenate(arrays) for arrays in (tokens, targets, owners))
    tokens_T, targets_T, document_T = rows
    return Row(tokens_T, starts, targets_T, document_T, len(documents))


@torch.no_grad()
def log_probabilities(model: GPT | BaselineGPT, row: Row, windows: Windows) -> Tensor:
    """(documents of the row,) float64: the sum over each ending's tokens."""
    batch = to_batch(row, model)
    longest = 2 * batch.max_seqlen  # in paired heads; masks are as large as windows
    windows = windows._replace(short=min(windows.short, longest), long=min(windows.long, longest))
    losses_T = token_losses(model, batch, windows).double()
    sums = losses_T.new_zeros(row.num_documents)
    return -sums.index_add(0, torch.from_numpy(row.document_T).to(sums.device), losses_T)


def to_batch(row: Row, model: GPT | BaselineGPT) -> MicroBatch:
    config, device = model.config, model.embed.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array)[None].to(device)

    tokens_T = row.tokens_T
    return MicroBatch(
        tensor(tokens_T),
        tensor(row.targets_T),
        torch.tensor(row.starts, dtype=torch.int32, device=device),
        tensor(bigram_rows(tokens_T, config.bigram_rows)) if config.bigram_rows else None,
        tensor(sign_rows(tokens_T, config.sign_rows)) if config.sign_rows else None,
        int(np.diff(row.starts).max()),
    )


def token_losses(model: GPT | BaselineGPT, batch: MicroBatch, windows: Windows) -> Tensor:
    """(T,) cross-entropy of the targets, in nats; 0 without one."""
    x_TD, targets_T = model.trunk(batch, model.plan_windows(batch, windows)), batch.targets_PT[0]
    if isinstance(model, GPT):
        return model.losses(x_TD, targets_T[:, None], torch.ones(1, device=x_TD.device))
    losses = []
    for x, targets in zip(x_TD.split(1024), targets_T.split(1024), strict=True):
        z = baseline_model.logits(x, model.lm_head, model.head_bias, model.config.softcap)
        losses.append(F.cross_entropy(z, targets, ignore_index=NO_TARGET, reduction="none"))
    return torch.cat(losses)


def evaluate(
    model: GPT | BaselineGPT,
    windows: Windows,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    tokens_a_row: int = TOKENS_A_ROW,
    progress: Callable[[int, float], None] | None = None,
) -> Score:
    """All tasks. progress: told behind each row how many endings have a score, and the tokens/s.

    Tokenizing is not in the seconds.
    """
    packed = [document for task in tasks for document in documents(task, tokenizer)]
    sums: list[float] = []
    num_tokens, began = 0, time.perf_counter()
    for row in pack(packed, tokenizer.format.bos_id, tokens_a_row):
        sums += log_probabilities(model, row, windows).tolist()
        num_tokens += len(row.tokens_T)
        if progress:
            progress(len(sums), num_tokens / (time.perf_counter() - began))
    seconds = time.perf_counter() - began
    num_bytes = np.array([document.num_bytes for document in packed])
    labels = np.array([task.label for task in tasks])

    def accuracy(scores: np.ndarray) -> float:
        return float((scores.reshape(-1, NUM_ENDINGS).argmax(1) == labels).mean())

    scores = np.array(sums)
    return Score(accuracy(scores), accuracy(scores / num_bytes), len(tasks), num_tokens, seconds)
