"""Pre-flight: what would stop a run later, found on every rank before anything is built.

Each rank opens its data and looks at its machine. What they found is gathered, so that all
problems of all ranks are said at once, and what has to be equal on them is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from speedrun import estimate, hardware, trackers
from speedrun.comms import Comms
from speedrun.config import Config, ConfigError, to_dict
from speedrun.data import DataError
from speedrun.estimate import Precision
from speedrun.prefix_table import prefix_tokenizer
from speedrun.runlog import RunError, check_run_folder, environment, source_hashes
from speedrun.schedule import Schedule
from speedrun.sources import (
    DataSource,
    check_training_data,
    check_validation_data,
    model_for,
    open_data,
    with_vocabulary,
)
from speedrun.tokenizer import Tokenizer

LOG_BYTES = 16 << 20  # of logs and pictures: those of 10,000 steps take a tenth of it
PAGE_BYTES, PAGES_A_SHARD = 4096, 64  # of a shard, that its fingerprint reads behind the header
SURE_MEMORY = ("parameters", "gradients", "optimizer state", "fixed tables")
SAME_VERSIONS = ("speedrun", "python", "torch", "numpy", "triton", "cuda")  # of `environment`
SAME_ARGUMENTS = ("seed", "compile", "device")
MOST_DIFFERENCES = 12  # said one by one

Facts = Mapping[str, str]


class Inputs(NamedTuple):
    """What a run reads, opened and checked."""

    config: Config  # with the data's vocabulary
    data: DataSource
    tokenizer: Tokenizer | None  # for the prefix loss


class Memory(NamedTuple):
    """Of a rank's device. Ranks with the same `place` share it."""

    place: str
    free_bytes: int  # 0: the system doesn't tell
    total_bytes: int
    needed_bytes: dict[str, int]  # by what it is for: `estimate.memory_bytes`


class Report(NamedTuple):
    """What one rank found."""

    host: str
    problems: list[str]
    facts: Facts  # that must be equal on all ranks
    shards: Facts | None  # the same of the data; None where it can't be opened
    memory: Memory | None


def preflight(
    args: argparse.Namespace,
    config: Config,
    comms: Comms,
    device: torch.device,
    precision: Precision,
) -> Inputs:
    """Open what the run reads. RunError, on all ranks, with everything that stands in its way.

    Rank 0's has the whole list, those of the others their own problems. What may go wrong but need
    not is a warning.
    """
    problems: list[str] = []

    def attempt(check: Callable, *inputs: Any) -> Any:
        """What the check gives; None where it finds a problem."""
        try:
            return check(*inputs)
        except (ConfigError, DataError, RunError) as error:
            problems.append(str(error))

    schedule = attempt(Schedule, config.schedule)
    data = attempt(open_data, args.data, args.text, config)
    model_config = data and attempt(model_for, config, data.format)
    tokenizer = None
    if model_config:
        config = dataclasses.replace(config, model=model_config)
    if model_config and schedule:
        attempt(check_training_data, config, data, schedule, comms.world_size)
        attempt(check_validation_data, config, data)
        tokenizer = attempt(prefix_tokenizer, config.schedule, data.format, data.folder)
    memory = attempt(memory_of, with_vocabulary(config), device, precision, comms.world_size)
    if comms.rank == 0:
        folder = Path(args.out or "runs")
        if args.out and args.resume is None:
            attempt(check_run_folder, folder)
        attempt(check_writable, folder)
        attempt(trackers.check, args.trackers)
        kept = args.keep + 1 if args.save_every else 0  # the next one beside them
        needed = attempt(checkpoint_bytes, with_vocabulary(config), precision) if kept else 0
        attempt(check_disk, folder, LOG_BYTES + kept * (needed or 0))
    facts = run_facts(args, config, device, precision)
    report = Report(platform.node(), problems, facts, data and shard_facts(data), memory)
    reports = comms.gather_objects(report)
    found, concerns = judge(reports)
    if found:
        raise RunError(refusal(found, reports, comms.rank))
    if comms.rank == 0:
        for concern in concerns:
            warnings.warn(concern, stacklevel=2)
    return Inputs(config, data, tokenizer)


def judge(reports: Sequence[Report]) -> tuple[list[str], list[str]]:
    """All problems of all ranks, each with the ranks that have it; and what is worth a warning."""
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        for problem in report.problems:
            ranks_of[problem].append(rank)
    problems = [
        problem if len(ranks) == len(reports) else f"{_where(ranks, reports)}: {problem}"
        for problem, ranks in ranks_of.items()
    ]
    problems += differences({rank: report.facts for rank, report in enumerate(reports)})
    with_data = {r: report.shards for r, report in enumerate(reports) if report.shards is not None}
    problems += differences(with_data)
    too_much, concerns = memory_problems([r.memory for r in reports if r.memory is not None])
    return problems + too_much, concerns


def refusal(problems: Sequence[str], reports: Sequence[Report], rank: int) -> str:
    """The message of a rank: rank 0 has the whole list."""
    if rank:
        own = reports[rank].problems or ["see rank 0"]
        return f"the run is refused by the checks before it ({'; '.join(own)})"
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems, all to be solved before the run:", *problems])


def _where(ranks: Sequence[int], reports: Sequence[Report]) -> str:
    hosts = ", ".join(dict.fromkeys(reports[rank].host for rank in ranks))
    return f"{_names(ranks)} ({hosts})"


def _names(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def differences(facts_of: Mapping[int, Facts]) -> list[str]:
    """One line for each fact that isn't the same on all these ranks, with who has which value."""
    keys = dict.fromkeys(key for facts in facts_of.values() for key in facts)
    found = []
    for key in keys:
        ranks_with: dict[str, list[int]] = defaultdict(list)
        for rank, facts in facts_of.items():
            ranks_with[facts.get(key, "missing")].append(rank)
        if len(ranks_with) > 1:
            values = "; ".join(f"{value} on {_names(ranks)}" for value, ranks in ranks_with.items())
            found.append(f"not the same on all ranks: {key}: {values}")
    more = len(found) - MOST_DIFFERENCES
    return found if more <= 0 else [*found[:MOST_DIFFERENCES], f"{more} more such differences"]


def run_facts(
    args: argparse.Namespace, config: Config, device: torch.device, precision: Precision
) -> Facts:
    """Settings, versions and sources: ranks that differ in one would train different models."""
    versions = environment()
    facts = {f"version of {name}": versions[name] for name in SAME_VERSIONS}
    facts["NVIDIA driver"] = _driver() if device.type == "cuda" else "none"
    facts |= {f"--{name}": getattr(args, name) for name in SAME_ARGUMENTS}
    facts |= {"type of parameters": precision.dtype, "FP8": precision.fp8}
    facts |= dict(flat("config", to_dict(config)))
    facts |= {f"source {path}": digest[:16] for path, digest in source_hashes().items()}
    return {key: str(value) for key, value in facts.items()}


def _driver() -> str:
    """Version of NVIDIA's kernel module, as it names itself."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return "unknown"


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """ "a.b.c" and value of everything inside dictionaries and lists."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, inner in items:
        yield from flat(f"{key}.{name}", inner)


def shard_facts(data: DataSource) -> Facts:
    """Format, names, sizes and fingerprints of the shards."""
    facts = {"tokenizer": str(data.format), "long documents": data.long_documents}
    return facts | {f"shard {path.name}": fingerprint(path) for path in [*data.train, *data.val]}


def fingerprint(path: Path) -> str:
    """Size and checksum of a shard: of its first page, with the header, and of 64 spread evenly.

    A whole shard has 200 MB; `speedrun data check` reads all of it.
    """
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for page in range(PAGES_A_SHARD + 1):
                file.seek(max(0, size - PAGE_BYTES) * page // PAGES_A_SHARD)
                state.update(file.read(PAGE_BYTES))
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return f"{size:,} bytes, {state.hexdigest()[:16]}"


def check_writable(folder: Path) -> None:
    """RunError unless the folder can be made and written. Leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise RunError(
            f"{folder}: can't be written ({error.strerror}); choose another folder by --out"
        ) from None


def check_disk(folder: Path, needed_bytes: int) -> None:
    """RunError where the file system has less room than that."""
    try:
        free = shutil.disk_usage(_existing(folder)).free
    except OSError:
        return  # `check_writable` has the reason
    if free < needed_bytes:
        raise RunError(
            f"{folder}: {_gib(free)} are free on its disk, and the run's logs and checkpoints need "
            f"{_gib(needed_bytes)}: make room, choose another --out, or keep fewer (--keep)"
        )


def checkpoint_bytes(config: Config, precision: Precision) -> int:
    """Weights, gradients under way and optimizer state of all ranks."""
    model = estimate.meta_model(config.model, precision)
    sizes = estimate.memory_bytes(config, model, precision, world_size=1)
    return sum(sizes[name] for name in SURE_MEMORY)


def check_port(master_port: str | None) -> None:
    """RunError unless rank 0 can listen there, where the ranks are to meet.

    For ranks that torchrun did not start: its agent listens by itself, before there are ranks.
    """
    fix = "start the ranks by torchrun, or set MASTER_ADDR and MASTER_PORT to a free port of rank 0"
    if master_port is None or not master_port.isdecimal():
        raise RunError(f"MASTER_PORT is {master_port or 'not set'}: {fix}")
    try:
        socket.create_server(("", int(master_port))).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"MASTER_PORT={master_port}: {reason}: {fix}") from None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def memory_of(
    config: Config, device: torch.device, precision: Precision, world_size: int
) -> Memory:
    """What this rank's device has, and what the run will take of it."""
    model = estimate.meta_model(config.model, precision)
    needed = estimate.memory_bytes(config, model, precision, world_size)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(f"{device} of {platform.node()}", free, total, needed)
    total = host_memory_bytes()
    free = min(hardware.free_memory_bytes(), total)
    return Memory(f"the memory of {platform.node()}", free, total, needed)


def host_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int:
    """Of the machine, or of the container where that may use less; 0 if the system doesn't tell."""
    try:
        words = meminfo.read_text().split()
        total = int(words[words.index("MemTotal:") + 1]) << 10
    except (OSError, ValueError):
        return 0
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def memory_problems(memories: Sequence[Memory]) -> tuple[list[str], list[str]]:
    """Refused is what can't fit for sure; what may not fit, by an estimate, is a warning."""
    problems, concerns = [], []
    by_place: dict[str, list[Memory]] = defaultdict(list)
    for memory in memories:
        by_place[memory.place].append(memory)
    for place, sharing in by_place.items():
        total, free = sharing[0].total_bytes, sharing[0].free_bytes
        sure = sum(m.needed_bytes[name] for m in sharing for name in SURE_MEMORY)
        all_of_it = sum(sum(m.needed_bytes.values()) for m in sharing)
        ranks = f"{len(sharing)} rank{'s' * (len(sharing) > 1)}"
        if total and sure > total:
            problems.append(
                f"{place}: {_gib(total)} in all; weights, gradients and optimizer state of {ranks} "
                f"take {_gib(sure)}: choose a smaller model, a larger device, or more GPUs, which "
                "share the optimizer state"
            )
        elif free and all_of_it > free:
            concerns.append(
                f"{place}: {_gib(free)} are free; {ranks} will take about {_gib(all_of_it)}, of "
                f"which weights, gradients and optimizer state {_gib(sure)}: if memory runs out, "
                "end other programs there or lower micro_batch_parts by --set"
            )
    return problems, concerns


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
