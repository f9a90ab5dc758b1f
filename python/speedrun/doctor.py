"""What of this machine would stop a run, slow it down, or make it wrong, each with its fix.

Each check is a function of the facts (machine.py) or of what kernels did (kernel_trials.py).
"""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import speedrun
from speedrun import hardware, kernel_trials, preflight
from speedrun._numpy_loader import Shard
from speedrun.data import DataError, read_format
from speedrun.kernel_trials import Outcome
from speedrun.machine import Machine
from speedrun.ops import _dispatch

GIB = 1 << 30
DATA_FOLDER = Path("data/fineweb10B")  # where `speedrun data fetch` puts it
# From which driver on each CUDA major version works (CUDA Toolkit release notes, "Minimum Required
# Driver Version for CUDA Minor Version Compatibility").
LEAST_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 0, 0)}
BAD_PTXAS = (12, 8)  # the newest known to compile stores of FP8 bytes wrong (H200, Triton 3.6)
REPORT = "please report it with the output of speedrun doctor --json -"
MORE_TIME = "speedrun doctor --seconds 120"
LEAST_DISK_BYTES = 20 * GIB  # FineWeb for a record (2 GB) and two checkpoints of record_089
LEAST_SHM_BYTES = 1 * GIB
LEAST_HOST_BYTES = 2 * GIB
LEAST_CORES_A_GPU = 2  # the rank's own thread, and the loader's
FREE_FRAC = 0.9  # of a GPU's memory, before a run
GOOD_FRAC = 0.5  # of a data sheet's rate that a large bf16 product reaches at full clocks
LOW_CLOCK_FRAC = 0.6
# What else is in the environment: name, values that are harmless, what the others do.
VARIABLES = (
    ("CUDA_LAUNCH_BLOCKING", ("", "0"), "the host waits for every kernel"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", ("", "0"), "every tensor is allocated anew"),
    ("TRITON_INTERPRET", ("", "0"), "Triton kernels run in its interpreter"),
    ("TORCHDYNAMO_DISABLE", ("", "0"), "torch.compile does nothing"),
    ("NCCL_P2P_DISABLE", ("", "0"), "GPUs exchange everything through the host's memory"),
    ("NCCL_SHM_DISABLE", ("", "0"), "ranks exchange everything by the network"),
    ("SPEEDRUN_BACKEND", ("",), "overrides which backend serves the operators"),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """status: pass, warn, fail, or skip: it could not be tried here."""

    topic: str
    status: str
    text: str
    fix: str = ""


# ---- Checks of what is installed -------------------------------------------------------------


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def check_python(machine: Machine) -> Iterator[Finding]:
    text = f"{platform.python_version()} ({sys.executable}), speedrun {speedrun.__version__}"
    yield Finding("python", "pass", text)


def check_torch(machine: Machine) -> Iterator[Finding]:
    build = f"for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a CPU build"
    text = f"{machine.torch}, {build}"
    if len(machine.torch_folders) > 1:
        yield Finding(
            "torch",
            "warn",
            f"{text}; installed {len(machine.torch_folders)} times: "
            f"{', '.join(machine.torch_folders)}",
            "use one virtual environment: unset PYTHONPATH, or pip uninstall the others",
        )
    elif machine.has_gpu and not machine.torch_cuda and not machine.gpus:
        yield Finding(
            "torch",
            "fail",
            f"{text}, on a machine with a GPU: training would use the CPU",
            "unset SPEEDRUN_TORCH_INDEX; pip install --force-reinstall torch "
            "(on Linux the package index has CUDA builds)",
        )
    else:
        yield Finding("torch", "pass", text)


def check_driver(machine: Machine) -> Iterator[Finding]:
    if not machine.has_gpu:
        yield Finding("driver", "skip", "no NVIDIA GPU here: training uses the CPU")
        return
    if not machine.driver:
        yield Finding(
            "driver",
            "warn",
            "a GPU, but the driver's version can't be read",
            "in a container: install nvidia-container-toolkit on the host and start it with "
            "--gpus all",
        )
        return
    least = LEAST_DRIVERS.get(int(machine.torch_cuda.partition(".")[0] or 0), ())
    if version_tuple(machine.driver) < least:
        needed = ".".join(map(str, least)).removesuffix(".0.0")
        yield Finding(
            "driver",
            "fail",
            f"{machine.driver}; CUDA {machine.torch_cuda} of torch needs {needed} or newer",
            f"install driver {needed} or newer, or a torch that was built for an older CUDA",
        )
        return
    yield Finding("driver", "pass", machine.driver)


def check_cuda(machine: Machine) -> Iterator[Finding]:
    if not machine.has_gpu or not machine.torch_cuda:
        yield Finding("CUDA", "skip", "needs a GPU and a CUDA build of torch")
    elif machine.cuda_problem:
        visible = machine.environment.get("CUDA_VISIBLE_DEVICES")
        fix = "see the driver's line; in a container: start it with --gpus all"
        if visible is not None:
            fix = f"unset CUDA_VISIBLE_DEVICES, which is {visible!r}"
        yield Finding("CUDA", "fail", f"torch can't use the GPU: {machine.cuda_problem}", fix)
    else:
        yield Finding("CUDA", "pass", f"{machine.torch_cuda}, {len(machine.gpus)} GPUs usable")


def check_triton(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        found = machine.triton or "not installed"
        yield Finding("triton", "skip", f"{found}; its kernels need a GPU")
    elif not machine.triton:
        yield Finding(
            "triton", "warn", "not installed: PyTorch serves instead", "pip install triton"
        )
    elif not machine.compiler or not machine.python_header:
        lacking = "a C compiler" if not machine.compiler else "Python.h"
        yield Finding(
            "triton",
            "fail",
            f"{machine.triton}, but {lacking} is missing, without which no kernel starts",
            "install gcc" if not machine.compiler else "install python3-dev (or python3-devel)",
        )
    elif machine.ptxas and version_tuple(machine.ptxas) <= BAD_PTXAS:
        yield Finding(
            "triton",
            "warn",
            f"{machine.triton} with ptxas {machine.ptxas}, which compiled stores of FP8 bytes "
            "wrong on an H200 (ours avoid them)",
            "use a torch whose Triton has a newer one, or set TRITON_PTXAS_PATH to the ptxas of "
            "CUDA 12.9 or newer",
        )
    else:
        yield Finding("triton", "pass", f"{machine.triton}, ptxas {machine.ptxas or 'unknown'}")


def check_library(machine: Machine) -> Iterator[Finding]:
    """speedrun._C, the CUDA kernels."""
    fix = "SPEEDRUN_CUDA=1 pip install . in the checkout, with nvcc of torch's CUDA version there"
    if not machine.gpus:
        yield Finding("CUDA kernels", "skip", "need a GPU")
    elif machine.library_problem:
        yield Finding("CUDA kernels", "warn", machine.library_problem, fix)
    elif machine.stale:
        text = f"built from other sources than the checkout's: {', '.join(machine.stale)}"
        yield Finding("CUDA kernels", "warn", text, fix)
    else:
        yield Finding("CUDA kernels", "pass", "speedrun._C can be loaded")


def check_loader(machine: Machine) -> Iterator[Finding]:
    if machine.loader_problem:
        yield Finding(
            "data loader",
            "warn",
            f"the NumPy one serves, with a quarter of the speed: {machine.loader_problem}",
            "install a C++20 compiler and python3-dev, then pip install . again",
        )
    else:
        yield Finding("data loader", "pass", "the C++ one")


# ---- Checks of the machine -------------------------------------------------------------------


def check_gpus(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("GPUs", "skip", "none")
        return
    names = sorted({gpu.name for gpu in machine.gpus})
    text = f"{len(machine.gpus)} × {' and '.join(names)}"
    if len(names) > 1:
        fix = "name those of one kind by CUDA_VISIBLE_DEVICES: the slowest sets the pace"
        yield Finding("GPUs", "warn", text, fix)
    elif version_tuple(machine.gpus[0].capability) < (8, 0):
        yield Finding(
            "GPUs",
            "warn",
            f"{text}, compute capability {machine.gpus[0].capability}: no bf16 in hardware",
            "train with --set precision=float32, or use a GPU of capability 8.0 or newer",
        )
    else:
        yield Finding("GPUs", "pass", f"{text}, compute capability {machine.gpus[0].capability}")


def check_health(machine: Machine) -> Iterator[Finding]:
    """What nvidia-smi says of each GPU."""
    if not machine.gpus:
        return
    if not machine.health:
        yield Finding(
            "nvidia-smi",
            "warn",
            "not there, or it fails: clocks, power and memory errors can't be seen",
            "in a container: -e NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
        return
    by_problem: dict[tuple[str, str, str], list[int]] = {}
    for index, state in enumerate(machine.health):
        for problem in _health_problems(state):
            by_problem.setdefault(problem, []).append(index)
    for (status, text, fix), indices in by_problem.items():
        numbers = ", ".join(map(str, indices))
        yield Finding("GPU health", status, f"GPU {numbers}: {text}", fix)
    if not by_problem:
        yield Finding("GPU health", "pass", "no memory errors; persistence mode is on")


def _health_problems(state: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    errors = version_tuple(state["ecc.errors.uncorrected.volatile.total"])
    if errors and errors[0]:
        text = f"{errors[0]} memory errors since the driver was loaded that ECC could not correct"
        yield "fail", text, "nvidia-smi --gpu-reset -i N, then change the machine if they come back"
    if state["mig.mode.current"] == "Enabled":
        yield "warn", "MIG: it is cut in parts", "sudo nvidia-smi -mig 0 -i N"
    if state["persistence_mode"] == "Disabled":
        yield "warn", "persistence mode is off: each start waits for it", "sudo nvidia-smi -pm 1"
    limit, usual = (version_tuple(state[f"power.{name}limit"]) for name in ("", "default_"))
    if limit and usual and limit[0] < usual[0]:
        text = (
            f"power is limited to {state['power.limit']}, by default {state['power.default_limit']}"
        )
        yield "warn", text, f"sudo nvidia-smi -pl {usual[0]} -i N"


def check_exchange(machine: Machine) -> Iterator[Finding]:
    """What ranks on several GPUs need to speak to each other."""
    if len(machine.gpus) < 2:
        yield Finding("exchange", "skip", "one device: nothing to exchange")
        return
    if machine.blocked_pairs:
        pairs = ", ".join(f"{i} and {j}" for i, j in machine.blocked_pairs[:4] if i < j)
        yield Finding(
            "exchange",
            "warn",
            f"NCCL {machine.nccl}; no direct access between GPUs {pairs}: all goes by the host",
            "nvidia-smi topo -p2p r says why; on a virtual machine ask for GPUs with NVLink, and "
            "switch off ACS and IOMMU on your own",
        )
    else:
        yield Finding("exchange", "pass", f"NCCL {machine.nccl}, GPUs reach each other directly")
    if machine.shm_bytes < LEAST_SHM_BYTES:
        text = f"{gib(machine.shm_bytes)} free in /dev/shm, where NCCL keeps its buffers"
        yield Finding("shared memory", "warn", text, "docker run --ipc=host, or --shm-size=2g")
    else:
        yield Finding("shared memory", "pass", f"{gib(machine.shm_bytes)} free in /dev/shm")
    if machine.infiniband and machine.memlock_bytes >= 0:
        text = f"InfiniBand, but memory can be locked only up to {gib(machine.memlock_bytes)}"
        yield Finding(
            "locked memory", "warn", text, "ulimit -l unlimited; docker: --ulimit memlock=-1"
        )


def check_host(machine: Machine) -> Iterator[Finding]:
    cores, num_gpus = machine.num_cpus, max(1, len(machine.gpus))
    threads = machine.environment.get("OMP_NUM_THREADS", "")
    if machine.gpus and cores < LEAST_CORES_A_GPU * num_gpus:
        text = f"{cores} cores for {num_gpus} GPUs: launching would wait for them"
        yield Finding("cores", "warn", text, f"give it {LEAST_CORES_A_GPU * num_gpus} or more")
    elif threads.isdecimal() and int(threads) > cores:
        text = f"OMP_NUM_THREADS={threads}, but only {cores} cores: threads wait for each other"
        yield Finding("cores", "warn", text, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding("cores", "pass", f"{cores}, {hardware.cpu_model()}")
    if 0 < machine.host_free_bytes < LEAST_HOST_BYTES:
        text = f"{gib(machine.host_free_bytes)} free"
        yield Finding("memory", "warn", text, "end other programs, or give the container more")
    else:
        free = gib(machine.host_free_bytes) if machine.host_free_bytes else "unknown"
        yield Finding("memory", "pass", f"{free} free")
    text = f"{gib(machine.disk_free_bytes)} free here"
    if machine.disk_free_bytes < preflight.LOG_BYTES:
        yield Finding("disk", "fail", f"{text}: no log fits", "make room, or use another folder")
    elif machine.disk_free_bytes < LEAST_DISK_BYTES:
        text += f"; data and checkpoints of record_089 take up to {gib(LEAST_DISK_BYTES)}"
        yield Finding("disk", "warn", text, "make room, or use another folder (--out, --data)")
    else:
        yield Finding("disk", "pass", text)


def check_environment(machine: Machine) -> Iterator[Finding]:
    found = 0
    for name, harmless, effect in VARIABLES:
        value = machine.environment.get(name, "")
        if value not in harmless:
            found += 1
            yield Finding("environment", "warn", f"{name}={value}: {effect}", f"unset {name}")
    if not found:
        yield Finding("environment", "pass", "no variable that slows a run down")


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_driver,
    check_cuda,
    check_gpus,
    check_health,
    check_exchange,
    check_triton,
    check_library,
    check_loader,
    check_host,
    check_environment,
)


def check_machine(machine: Machine) -> list[Finding]:
    """All findings that need nothing but the facts."""
    return [finding for check in CHECKS for finding in check(machine)]


def check_data(folder: Path | None) -> Finding:
    """Headers and sizes of all shards; `speedrun data check` reads them whole. None: DATA_FOLDER,
    which need not be there."""
    fetch = f"speedrun data fetch (2 GB, into {DATA_FOLDER}), or train on --text FILE"
    if folder is None and not DATA_FOLDER.is_dir():
        return Finding("data", "skip", f"no {DATA_FOLDER} here", fetch)
    folder = folder or DATA_FOLDER
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        what = "no shard (.bin) in it" if folder.is_dir() else "no such folder"
        return Finding("data", "fail", f"{folder}: {what}", fetch)
    try:
        tokens = sum(Shard(path, read_format(folder)).num_tokens for path in paths)
    except DataError as error:
        return Finding("data", "fail", str(error), "fetch or make that shard again")
    return Finding("data", "pass", f"{folder}: {len(paths)} shards, {tokens:,} tokens")


# ---- Kernels ---------------------------------------------------------------------------------

ATTENTION = ("fa3", "fa4", "triton", "fa2")  # flex compiles for too long, sdpa serves short batches


def trial_items(machine: Machine) -> list[str]:
    """What serves first: it matters most if the time is over before the end."""
    stems = list(kernel_trials.TRIALS)
    items = [f"{stem} served" for stem in stems]
    if machine.gpus:
        items = ["memory", "matmul", "nccl", *items]
        others = [
            f"{stem} {b}" for b in ("cuda", "triton") for stem in stems if stem != "attention"
        ]
        items += [f"attention {name}" for name in ATTENTION] + others
    return items


def check_kernels(machine: Machine, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """What became of `trial_items`."""
    if not machine.gpus:
        return [*check_references(outcomes)]
    found = [check_memory(machine, outcomes["memory"]), *check_rate(machine, outcomes["matmul"])]
    if len(machine.gpus) > 1:
        found.append(check_nccl(outcomes["nccl"]))
    tried = [s for s in kernel_trials.TRIALS if outcomes[f"{s} served"].verdict != "skip"]
    found += [check_operator(machine, stem, outcomes) for stem in tried]
    return [*found, *left_out(outcomes)]


def check_references(outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
    """Where there is no GPU."""
    for item, outcome in outcomes.items():
        if outcome.verdict == "fail":
            stem = item.partition(" ")[0]
            yield Finding(stem, "fail", outcome.text, failure_fix(stem, outcome))
    yield from left_out(outcomes)
    if all(outcome.verdict == "pass" for outcome in outcomes.values()):
        text = f"all {len(outcomes)} run in PyTorch; CUDA and Triton kernels need a GPU"
        yield Finding("operators", "pass", text)


def left_out(outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
    """Operators that there was no time for, together by the reason."""
    stems_by_text: dict[str, list[str]] = {}
    for item, outcome in outcomes.items():
        stem, _, backend = item.partition(" ")
        if backend == "served" and outcome.verdict == "skip":
            stems_by_text.setdefault(outcome.text, []).append(stem)
    for text, stems in stems_by_text.items():
        yield Finding("operators", "skip", f"{text}: {', '.join(stems)}", MORE_TIME)


def failure_fix(stem: str, outcome: Outcome) -> str:
    """For an operator that whatever serves it can't compute."""
    if "the override asks for" in outcome.text:
        return "unset SPEEDRUN_BACKEND, or name another backend by it"
    return f"export SPEEDRUN_BACKEND={stem}=torch; {REPORT}"


def check_memory(machine: Machine, outcome: Outcome) -> Finding:
    """Of each GPU, what other programs have left."""
    if outcome.verdict != "pass":
        fix = "end the programs that nvidia-smi lists" if outcome.verdict == "fail" else MORE_TIME
        return Finding("GPU memory", outcome.verdict, outcome.text, fix)
    parts = [
        f"GPU {index}: {gib(free)} of {gib(gpu.total_bytes)}"
        for index, (gpu, free) in enumerate(
            zip(machine.gpus, outcome.values["free_bytes"], strict=True)
        )
        if free < FREE_FRAC * gpu.total_bytes
    ]
    if parts:
        fix = "end the programs that nvidia-smi lists, or choose other GPUs"
        return Finding("GPU memory", "warn", f"free is only {'; '.join(parts)}", fix)
    return Finding("GPU memory", "pass", f"{gib(machine.gpus[0].total_bytes)} each, free")


def check_rate(machine: Machine, outcome: Outcome) -> Iterator[Finding]:
    """Of GPU 0 under load; the clocks of all."""
    if outcome.verdict != "pass":
        fix = REPORT if outcome.verdict == "fail" else MORE_TIME
        yield Finding("GPU speed", outcome.verdict, outcome.text, fix)
        return
    rate = outcome.values["flops_per_s"]
    peak = hardware.gpu_peaks(machine.gpus[0].name).bf16_flops_per_s
    text = f"{rate / 1e12:,.0f} TFLOP/s in bf16"
    text += f", {rate / peak:.0%} of the data sheet's" if peak == peak else ""
    slow = rate < GOOD_FRAC * peak
    fix = "nvidia-smi -q -d PERFORMANCE,CLOCK says why; sudo nvidia-smi -rgc lifts a lock"
    yield Finding("GPU speed", "warn" if slow else "pass", text, fix if slow else "")
    for index, state in enumerate(outcome.values["states"]):
        active = [name for name in kernel_trials.SLOWDOWNS if state.get(name) == "Active"]
        clock, most = (version_tuple(state[key]) for key in ("clocks.sm", "clocks.max.sm"))
        where = f"GPU {index} at {state['clocks.sm']} of {state['clocks.max.sm']}"
        where += f", {state['temperature.gpu']} °C"
        if active:
            fix = "its cooling or power supply is at fault: choose another GPU or machine"
            yield Finding("GPU clocks", "warn", f"{where}: {', '.join(active)}", fix)
        elif index == 0 and clock and most and clock[0] < LOW_CLOCK_FRAC * most[0]:
            fix = "sudo nvidia-smi -rgc -i 0 lifts a locked clock"
            yield Finding("GPU clocks", "warn", f"{where} under load", fix)


def check_nccl(outcome: Outcome) -> Finding:
    fix = "NCCL_DEBUG=INFO speedrun doctor says where it stops" if outcome.verdict == "fail" else ""
    return Finding("NCCL", outcome.verdict, outcome.text, fix)


def check_operator(machine: Machine, stem: str, outcomes: Mapping[str, Outcome]) -> Finding:
    """Who serves it and why, whether that is right here, and what else was tried."""
    served = outcomes[f"{stem} served"]
    capability = machine.gpus[0].capability
    others = {
        item.partition(" ")[2]: outcome
        for item, outcome in outcomes.items()
        if item.partition(" ")[0] == stem and item != f"{stem} served"
    }
    backend = served.values.get("backend", "")
    parts = [f"{backend or 'what serves'}: {served.text}"]
    if backend in _dispatch.BACKENDS and backend != "torch":
        parts.append(reason(stem, backend, capability))
    for name, outcome in others.items():
        if outcome.verdict == "fail":
            parts.append(f"{name} does not work here: {outcome.text}")
        elif outcome.verdict == "skip" and stem == "attention":
            parts.append(f"{name}: {outcome.text}")
        elif outcome.verdict == "pass" and name != backend:
            why = f", {reason(stem, name, capability)}" if name in ("cuda", "triton") else ""
            parts.append(f"{name} is right too{why}")
    text = "; ".join(parts)
    if served.verdict == "fail":
        return Finding(stem, "fail", text, failure_fix(stem, served))
    if any(outcome.verdict == "fail" for outcome in others.values()):
        return Finding(stem, "warn", text, f"nothing to do unless you ask for it; {REPORT}")
    return Finding(stem, "pass", text)


def reason(stem: str, backend: str, capability: str) -> str:
    """Why `backend` may serve without being asked for, or why not, from verdicts.json."""
    rows = _dispatch._verdicts().get(stem, {}).get(backend, [])
    rows = [row for row in rows if row["compute_capability"] == capability]
    source = _dispatch.source_sha256(stem, backend)
    same = [row for row in rows if row["source_sha256"] == source]
    for row in same:
        word = {"pass": "passed", "fail": "opt-in: failed"}[row["verdict"]]
        return f"{word} on {row['gpu']} at commit {row['commit']}"
    if rows:
        return f"opt-in: its sources changed since {rows[0]['gpu']} at commit {rows[0]['commit']}"
    return f"opt-in: never tried on compute capability {capability}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB"
