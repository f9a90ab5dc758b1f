"""Checkpoints: folders RUN/checkpoints/step-000123, in PyTorch's distributed checkpoint format.

Each rank writes the rows that it owns, so that any number of ranks can read them. In a folder are

* the tensors of `Optimizer.state`, and the gradients that wait for Adam, of each rank;
* manifest.json: the next step, the loader's position, the clock, what the run is;
* SHA256SUMS of all files, as `sha256sum -c` reads it. A folder that differs in one byte is refused.

What a step takes from its number alone is in none of them: rates, momentum, windows, rotary
frequencies, the score scale, whether head and embedding are tied. Training draws no random numbers
after the weights' start values, and so leaves no generator's state.

A folder is written under a temporary name and renamed when all of it is on the disk.

The sums find damage, not intent: PyTorch's index is a pickle, and to load one runs what is in it.
Take checkpoints from those alone whose programs you would run; an export runs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from speedrun.comms import gather_objects
from speedrun.config import Config, ConfigError, from_dict, to_dict
from speedrun.data import DataError, DataFormat, LoaderPosition
from speedrun.estimate import Precision, meta_model
from speedrun.optim import Optimizer
from speedrun.runlog import RunError
from speedrun.schedule import Schedule, StepPlan

if TYPE_CHECKING:  # PyTorch's checkpoints take a second to import: who saves none does without
    from torch.distributed import ProcessGroup

FORMAT_VERSION = 1
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of an export
FOLDER = "checkpoints"  # in a run's folder
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY, BAD = ".tmp", ".bad"  # suffixes: being written or removed; found damaged


class CheckpointError(RunError):
    """A checkpoint that can't be used or written. The message names it, the reason and the fix."""


class Damaged(CheckpointError):
    """Its files aren't those that were written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of. `step` is the next one to train, `position` where its batch starts.

    facts: by name, what must be the same for the run to go on. trends: of the guards' losses.
    """

    step: int
    world_size: int
    elapsed_s: float
    position: LoaderPosition
    config: Config  # with the data's vocabulary
    format: DataFormat
    precision: Precision
    facts: dict[str, str]
    trends: dict[str, Any]
    environment: dict[str, Any]

    def to_text(self) -> str:
        values = dataclasses.asdict(self)
        values["precision"]["dtype"] = str(self.precision.dtype).removeprefix("torch.")
        return json.dumps({"version": FORMAT_VERSION, **values}, indent=1) + "\n"

    @classmethod
    def of_text(cls, text: str) -> Manifest:
        """ValueError, KeyError or TypeError where it isn't what `to_text` gives."""
        values = json.loads(text)
        version = values.pop("version")
        if version != FORMAT_VERSION:
            raise ValueError(f"its format has version {version}, this program's {FORMAT_VERSION}")
        dtype = getattr(torch, values["precision"]["dtype"], None)
        values["precision"] = Precision(dtype, values["precision"]["fp8"])
        values["config"] = from_dict(values["config"])
        values["position"] = LoaderPosition(**values["position"])
        values["format"] = DataFormat(**values["format"])
        return cls(**values)


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first, good or not."""
    try:
        found = [path for path in (run / FOLDER).iterdir() if NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1])


# Writing.


def host_copy(optimizer: Optimizer, rank: int, group: ProcessGroup | None) -> dict[str, Tensor]:
    """All state and waiting gradients by their names in a checkpoint, copied to the host.

    What belongs to one rank has its number in front. group: of all ranks, on the host; None for one
    rank alone.
    """
    copies = {}
    for name, (tensor, num_rows, per_rank) in optimizer.state().items():
        own = tensor.detach().to("cpu", copy=True).contiguous()
        copies[f"rank{rank}.{name}" if per_rank else name] = _sharded(own, num_rows, group)
    for name, tensor in optimizer.unused_gradients().items():
        copies[f"rank{rank}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return copies


def _sharded(own: Tensor, num_rows: int | None, group: ProcessGroup | None) -> Tensor:
    """A rank's own rows as part of the whole, for PyTorch's checkpoints. `Comms.own_rows` deals
    rows as torch.chunk does."""
    if num_rows is None or group is None:
        return own
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    whole = torch.empty(num_rows, *own.shape[1:], device="meta")
    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def write(
    folder: Path,
    state: Mapping[str, Tensor],
    manifest: Manifest,
    rank: int,
    group: ProcessGroup | None,
) -> None:
    """A checkpoint, by all ranks together. CheckpointError, on all of them, where one can't write.

    state: of `host_copy`. May run in a thread beside the training.
    """
    import torch.distributed.checkpoint as dcp

    # It says at each call that there is one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    temporary, problem = folder.with_name(folder.name + TEMPORARY), None
    try:
        dcp.save(
            dict(state),
            storage_writer=dcp.FileSystemWriter(temporary),
            process_group=group,
            no_dist=group is None,
        )
        if rank == 0:
            _check_all_here(temporary)
            _write_text(temporary / MANIFEST, manifest.to_text())
            _write_text(temporary / SUMS, sha256_sums(temporary))
            _sync_folder(temporary)
            os.replace(temporary, folder)
            _sync_folder(folder.parent)
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        problem = reason_of(error)
    problem = _first_of_all(problem, group)
    if problem is not None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a folder that isn't shared, each its own
        raise CheckpointError(
            f"{folder}: the checkpoint can't be written ({problem}; {_free(folder)}); "
            "earlier ones are as they were: mend that, then go on with --resume auto"
        )


def _first_of_all(problem: str | None, group: ProcessGroup | None) -> str | None:
    """The first rank's problem that has one, so that all know of it."""
    if group is None:
        return problem
    try:
        problems = gather_objects(problem, group)
    except RuntimeError as error:  # a rank is gone
        return problem or reason_of(error)
    return next((found for found in problems if found is not None), None)


def _check_all_here(folder: Path) -> None:
    """FileNotFoundError where files of other ranks are in a folder of their own hosts."""
    import torch.distributed.checkpoint as dcp

    written = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    missing = {info.relative_path for info in written} - {path.name for path in folder.iterdir()}
    if missing:
        reason = f"other ranks' files aren't in it, such as {min(missing)}: all hosts must share it"
        raise FileNotFoundError(errno.ENOENT, reason)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The names in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"


def reason_of(error: BaseException) -> str:
    """The first cause, in one line: PyTorch puts the ranks' exceptions into one of its own."""
    for cause, _ in getattr(error, "failures", {}).values():
        return reason_of(cause)
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or repr(error)


def remove(folder: Path) -> None:
    """Whole or not at all, as far as its name tells."""
    temporary = folder.with_name(folder.name + TEMPORARY)
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest checkpoints of a run, and what earlier ends left half-written."""
    for path in checkpoints_of(run)[count:]:
        remove(path)


def clean(run: Path) -> None:
    """Remove what a run that was killed left half-written."""
    with contextlib.suppress(FileNotFoundError):
        for path in (run / FOLDER).glob(f"step-*{TEMPORARY}"):
            shutil.rmtree(path)


# Reading.


def sha256_sums(folder: Path) -> str:
    """Of all files in a checkpoint but this list, in the format of sha256sum."""
    paths = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in paths)


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def verified(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was written, else CheckpointError.

    Damaged, which is one, where a byte isn't.
    """
    try:
        listed = (folder / SUMS).read_bytes().decode("utf-8", errors="replace")
        found = sha256_sums(folder)
        text = (folder / MANIFEST).read_text(encoding="utf-8") if listed == found else ""
    except OSError as error:
        raise Damaged(
            f"{folder}: no whole checkpoint ({error.strerror}: {Path(error.filename).name}); take "
            "another, or --resume auto"
        ) from None
    if listed != found:
        changed = set(listed.splitlines()) ^ set(found.splitlines())
        names = sorted({line.partition("  ")[2] or SUMS for line in changed}) or [SUMS]
        raise Damaged(
            f"{folder}: damaged: {', '.join(names)} isn't as it was written ({SUMS}); take another "
            "checkpoint, or --resume auto"
        )
    try:
        return Manifest.of_text(text)
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
        *(ConfigError, DataError),
    ) as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: not as this version of the program writes it ({error}): go on "
            "with the version that wrote it"
        ) from None


def load(
    folder: Path,
    manifest: Manifest,
    optimizer: Optimizer,
    rank: int,
    world_size: int,
    group: ProcessGroup | None,
) -> list[str]:
    """Put the state of a checkpoint into the optimizer and its model; lines on what isn't the same.

    On as many ranks as wrote it everything is bitwise what it was. On another number, FP8's scales
    are the largest of all ranks', and rank 0 has all waiting gradients, which are summed anyway.
    CheckpointError where tensors are missing or have other shapes.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    kinds = reader.read_metadata().state_dict_metadata
    same_world = world_size == manifest.world_size
    everyone = range(manifest.world_size)
    live = optimizer.state()
    common = {
        name: _sharded(torch.empty(t.shape, dtype=t.dtype), num_rows, group)
        for name, (t, num_rows, per_rank) in live.items()
        if not per_rank
    }
    of_ranks = {
        f"rank{r}.{name}": torch.empty(t.shape, dtype=t.dtype)
        for name, (t, _, per_rank) in live.items()
        for r in ([rank] if same_world else everyone)
        if per_rank
    }
    takes_from = [rank] if same_world else everyone if rank == 0 else []
    gradients = {
        key: torch.empty(kind.size, dtype=kind.properties.dtype)
        for r in takes_from
        for key, kind in kinds.items()
        if key.startswith((f"rank{r}.grad.", f"rank{r}.touched."))
    }
    _read(folder, reader, common | of_ranks | gradients)
    with torch.no_grad():
        for name, state in live.items():
            if state.per_rank:
                saved = [t for key, t in of_ranks.items() if key.partition(".")[2] == name]
                state.tensor.copy_(torch.stack(saved).amax(0))
            else:
                state.tensor.copy_(getattr(common[name], "_local_tensor", common[name]))
    increment_version(optimizer.params.values())
    for key, tensor in gradients.items():
        _, kind, name = key.split(".", 2)
        optimizer.add_gradients({f"{kind}.{name}": tensor})
        if kind == "grad" and name in optimizer.sparse:
            if key.replace("grad", "touched", 1) not in gradients:  # of one rank, which sends none
                optimizer.touched(name, tensor.any(1).nonzero())
    return [] if same_world else _notes(manifest, world_size, live, kinds)


def _notes(manifest: Manifest, world_size: int, live: Mapping, kinds: Mapping) -> list[str]:
    notes = [
        f"saved by {manifest.world_size} ranks, resumed by {world_size}: sums have another order, "
        "so losses differ in their last digits"
    ]
    if any(state.per_rank for state in live.values()):
        notes.append("FP8 scales begin with the largest of all saved ranks'")
    if any(".grad." in key for key in kinds):
        notes.append("gradients that wait for Adam are summed on rank 0")
    return notes


def _read(folder: Path, reader: Any, wanted: dict[str, Tensor]) -> None:
    """Fill the tensors with those of these names. Each rank reads by itself what it needs."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its tensors aren't those of this model ({reason_of(error)}): go on with "
            "the version of the program that wrote it"
        ) from None


class Trained(NamedTuple):
    """A model without FP8 copies; its config; what its tokens mean; how many steps it was trained.

    The step tells its windows and rotary frequencies, which are those of a stage: `plan`.
    """

    model: nn.Module
    config: Config
    format: DataFormat
    step: int

    @property
    def plan(self) -> StepPlan:
        """ValueError for a step that is outside of the config's schedule."""
        return Schedule(self.config.schedule).plan(self.step)


def load_for_inference(path: Path, device: torch.device) -> Trained:
    """Of a checkpoint, a run (its newest good one) or what `speedrun export` wrote.

    CheckpointError where there is none.
    """
    if (path / WEIGHTS).exists():
        return _load_export(path, device)
    folder, manifest = path, None
    if not NAME.fullmatch(path.name):
        for folder in checkpoints_of(path):
            try:
                manifest = verified(folder)
                break
            except Damaged as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            raise CheckpointError(
                f"{path}: neither a checkpoint (step-…), nor the folder of a run with a whole one, "
                f"nor an export ({WEIGHTS})"
            )
    manifest = manifest or verified(folder)
    model, weights = _empty_model(manifest.config, manifest.precision.dtype)
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    _read(folder, reader, {f"model.{name}": tensor for name, tensor in weights.items()})
    return Trained(model.to(device), manifest.config, manifest.format, manifest.step)


def _empty_model(config: Config, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """On the host, with its weights' memory by their names."""
    model = meta_model(config.model, Precision(dtype, fp8=False)).to_empty(device="cpu")
    return model, model.state_dict()


def export(source: Path, target: Path) -> None:
    """The weights alone, as safetensors, with a small config.json. The folder must be new.

    CheckpointError where the source can't be read or the target can't be written; ImportError
    without the package safetensors.
    """
    from safetensors.torch import save_file

    model, config, data_format, step = load_for_inference(source, torch.device("cpu"))
    values = {"version": FORMAT_VERSION, "config": to_dict(config), "format": vars(data_format)}
    values["step"] = step
    values["dtype"] = str(model.embed.dtype).removeprefix("torch.")
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "it exists")
        temporary.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        _write_text(temporary / CONFIG, json.dumps(values, indent=1) + "\n")
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # safetensors has an error of its own, too
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: can't be written ({reason_of(error)}): give a new folder by --out"
        ) from None


def _load_export(folder: Path, device: torch.device) -> Trained:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(
            f"{folder}: reading it needs the package safetensors (pip install "
            "'nanogpt-speedrun[cli]')"
        ) from None
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config, data_format = from_dict(values["config"]), DataFormat(**values["format"])
        model, _ = _empty_model(config, getattr(torch, values["dtype"]))
        model.load_state_dict(load_file(folder / WEIGHTS))
        # Without a step it is of an earlier version, which took all for the run's end.
        step = values.get("step", config.schedule.total_steps)
        trained = Trained(model.to(device), config, data_format, step)
        _ = trained.plan
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(ConfigError, DataError, SafetensorError),
    ) as error:
        raise CheckpointError(
            f"{folder}: not as `speedrun export` of this version writes it ({reason_of(error)})"
        ) from None
    return trained
