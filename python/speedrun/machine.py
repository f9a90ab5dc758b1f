"""The facts of this machine that `speedrun doctor` judges: drivers, GPUs, versions, room."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import re
import resource
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from speedrun import hardware, preflight
from speedrun.ops import _dispatch

CHECKOUT = Path(__file__).resolve().parents[2]
HEALTH_KEYS = (
    "persistence_mode",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
    "power.limit",
    "power.default_limit",
)


class Gpu(NamedTuple):
    name: str
    capability: str  # such as "9.0"
    total_bytes: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts. Versions are "" where there is no such thing."""

    environment: Mapping[str, str]
    torch: str
    torch_cuda: str  # "" for a CPU build
    torch_folders: Sequence[str]  # where a torch is installed that Python could import
    has_gpu: bool  # as the system says, whatever torch can do
    driver: str
    cuda_problem: str  # why torch can't use the GPU; "" where it can
    gpus: Sequence[Gpu]  # that torch can use
    health: Sequence[Mapping[str, str]]  # HEALTH_KEYS of each GPU, from nvidia-smi
    blocked_pairs: Sequence[tuple[int, int]]  # of GPUs that can't read each other's memory
    nccl: str
    triton: str
    ptxas: str
    compiler: str  # of C, which Triton and torch.compile call
    python_header: bool  # Python.h, which Triton needs
    library_problem: str  # why speedrun._C doesn't serve
    stale: Sequence[str]  # operators that _C was built for from other sources than the checkout's
    loader_problem: str  # why the C++ loader doesn't serve
    num_cpus: int
    host_free_bytes: int  # 0: the system doesn't tell
    shm_bytes: int
    disk_free_bytes: int
    memlock_bytes: int  # -1: unlimited
    infiniband: bool


def look(environment: Mapping[str, str], folder: Path) -> Machine:
    """The facts of this machine; `folder` is where runs and data go."""
    health = hardware.gpu_states(("driver_version", *HEALTH_KEYS))
    driver = health[0]["driver_version"] if health else _module_version()
    devices = ("/dev/nvidia0", "/dev/dxg")  # Linux, WSL
    has_gpu = bool(health) or any(Path(device).exists() for device in devices)
    gpus, cuda_problem = _gpus()
    compilers = (environment.get("CC", ""), "cc", "gcc", "clang")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `library` says the same
        library_problem = _dispatch.library_problem()
    return Machine(
        environment=environment,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        torch_folders=_folders_of("torch"),
        has_gpu=has_gpu or bool(gpus),
        driver=driver,
        cuda_problem=cuda_problem,
        gpus=gpus,
        health=health,
        blocked_pairs=_blocked_pairs(len(gpus)),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus else "",
        triton=_version_of("triton"),
        ptxas=_ptxas_version(environment.get("TRITON_PTXAS_PATH", "")),
        compiler=next(filter(None, map(shutil.which, compilers)), ""),
        python_header=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        library_problem=library_problem,
        stale=[] if library_problem else stale_operators(CHECKOUT, _dispatch._built_sources()),
        loader_problem=_loader_problem(),
        num_cpus=hardware.num_cpus(),
        host_free_bytes=min(hardware.free_memory_bytes(), preflight.host_memory_bytes()),
        shm_bytes=_disk_bytes(Path("/dev/shm")),
        disk_free_bytes=_disk_bytes(folder),
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
    )


def _module_version() -> str:
    """Of NVIDIA's kernel module, where nvidia-smi says nothing."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    return next(iter(re.findall(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)), "")


def _gpus() -> tuple[list[Gpu], str]:
    """Those that torch can use, and why it can't, in its words."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            lines = [str(w.message).splitlines()[0] for w in said] or ["no GPU is visible"]
            return [], lines[0]
    try:
        found = []
        for index in range(torch.cuda.device_count()):
            # No context: in mode exclusive_process the kernels' process needs the only one.
            total = torch.cuda.get_device_properties(index).total_memory
            found.append(Gpu(hardware.gpu_name(index), hardware.compute_capability(index), total))
        return found, ""
    except RuntimeError as error:
        return [], str(error).splitlines()[0]


def _blocked_pairs(num_gpus: int) -> list[tuple[int, int]]:
    pairs = [(i, j) for i in range(num_gpus) for j in range(num_gpus) if i != j]
    return [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]


def _folders_of(distribution: str) -> list[str]:
    found = importlib.metadata.distributions(name=distribution)
    return sorted({str(Path(str(d.locate_file(""))).resolve()) for d in found})


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ptxas_version(path: str) -> str:
    """Of the one that Triton calls, "" if there is none: `path`, or the one it brings along."""
    spec = None if path else importlib.util.find_spec("triton")
    if spec and spec.origin:
        path = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(re.findall(r"release (\d+\.\d+)", said.stdout)), "")


def stale_operators(checkout: Path, built: Mapping[str, str]) -> list[str]:
    """Operators of _C whose sources in the checkout are others now; none without a checkout."""
    script = checkout / "pyext" / "source_hashes.py"
    if not script.is_file():
        return []
    spec = importlib.util.spec_from_file_location("source_hashes", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [stem for stem, now in module.source_hashes(checkout).items() if built.get(stem) != now]


def _loader_problem() -> str:
    try:
        importlib.import_module("speedrun._host")
    except ImportError as error:
        return str(error)
    return ""


def _disk_bytes(folder: Path) -> int:
    """Free; 0 where there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
