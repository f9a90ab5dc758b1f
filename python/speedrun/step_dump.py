"""A step that went wrong, as files, for `speedrun replay`.

RUN/bad_step_000123 holds rankN.npz, what each rank trained on; step.json, how to build the model;
and, where the step was looked at before its update, weights.pt, the model that computed it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedrun.data import DataFormat, StepBatch
from speedrun.estimate import Precision
from speedrun.runlog import RunError

FORMAT_VERSION = 1
STEP, WEIGHTS = "step.json", "weights.pt"
ROWS = ("bigram_rows", "sign_rows")  # of a StepBatch, None without the table
ARRAYS = ("inputs", "targets", "cu_seqlens", *ROWS)


class Origin(NamedTuple):
    """What a run's model is built from."""

    argv: list[str]  # of `speedrun train`
    format: DataFormat
    precision: Precision


class StepDump(NamedTuple):
    """`batch`: all parts of the step, in the order of a world of one."""

    origin: Origin
    step: int
    problem: str
    batch: StepBatch
    prefix_table: np.ndarray | None  # (V,)
    weights: dict[str, Tensor] | None


def write_rank(folder: Path, rank: int, batch: StepBatch, prefix_table: np.ndarray | None) -> None:
    """rankN.npz. OSError where it can't be written; nothing is half-written."""
    arrays = {name: getattr(batch, name) for name in ARRAYS}
    arrays["prefix_table"] = prefix_table
    present = {name: array for name, array in arrays.items() if array is not None}
    _write(folder / f"rank{rank}.npz", lambda file: np.savez(file, **present))


def write_step(
    folder: Path,
    origin: Origin,
    step: int,
    problem: str,
    world_size: int,
    weights: dict[str, Tensor] | None,
) -> None:
    """The files of the whole step, by one rank. OSError where they can't be written."""
    if weights is not None:
        _write(folder / WEIGHTS, lambda file: torch.save(weights, file))
    values = {
        "version": FORMAT_VERSION,
        "argv": origin.argv,
        "format": vars(origin.format),
        "dtype": str(origin.precision.dtype).removeprefix("torch."),
        "fp8": origin.precision.fp8,
        "step": step,
        "problem": problem,
        "world_size": world_size,
    }
    text = json.dumps(values, indent=1) + "\n"
    _write(folder / STEP, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """A file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(folder: Path) -> StepDump:
    """All of it, checked. RunError that names the file and what is the matter."""
    path = folder / STEP
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != FORMAT_VERSION:
            raise ValueError(f"version {values['version']}, not {FORMAT_VERSION}")
        precision = Precision(getattr(torch, values["dtype"]), values["fp8"])
        origin = Origin(values["argv"], DataFormat(**values["format"]), precision)
        step, problem, world_size = (values[k] for k in ("step", "problem", "world_size"))
    except OSError as error:
        raise RunError(
            f"{path}: can't be read ({error.strerror}); give the folder bad_step_… of a run"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: isn't what a run of this version writes ({error})") from None
    ranks = [_read_rank(folder / f"rank{rank}.npz", world_size) for rank in range(world_size)]
    try:
        # Of W ranks, rank r has parts r, r + W, …
        parts = [
            np.stack([rank[name] for rank in ranks], 1).reshape(-1, *ranks[0][name].shape[1:])
            if name in ranks[0]
            else None
            for name in ARRAYS
        ]
    except (KeyError, ValueError) as error:
        raise RunError(f"{folder}: its rank*.npz don't go together ({error})") from None
    batch = StepBatch(*parts, position=None)
    table, weights = ranks[0].get("prefix_table"), None
    if (folder / WEIGHTS).exists():
        weights = _read_weights(folder / WEIGHTS)
    return StepDump(origin, step, problem, batch, table, weights)


def _read_rank(path: Path, world_size: int) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise RunError(
            f"{path}: is missing; {world_size} ranks trained: copy it from that rank's machine"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: can't be read ({error})") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no family of errors
        raise RunError(f"{path}: can't be read ({type(error).__name__}: {error})") from None
