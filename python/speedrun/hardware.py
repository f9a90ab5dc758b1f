"""What is known of the GPU and the memory of this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class GpuPeaks:
    """What a data sheet promises, dense (without structured sparsity); nan: unknown."""

    bf16_flops_per_s: float = math.nan  # float32 accumulation
    fp8_flops_per_s: float = math.nan  # float32 accumulation
    memory_bytes_per_s: float = math.nan
    link_bytes_per_s: float = math.nan  # to the other GPUs of a machine, one way
    num_sms: float = math.nan  # streaming multiprocessors
    source: str = "unknown GPU"


def _peaks(
    bf16_tflops: float, fp8_tflops: float, memory_gb: float, link_gb: float, sms: int, source: str
) -> GpuPeaks:
    rates = (bf16_tflops * 1e12, fp8_tflops * 1e12, memory_gb * 1e9, link_gb * 1e9)
    return GpuPeaks(*rates, sms, source)


# By the name that CUDA reports. Where a data sheet gives only the rate with sparsity, half of it.
# Links are NVLink's where all GPUs of a machine share it, else PCIe's: half of both ways' sum.
_HOPPER = "NVIDIA H100 data sheet (rates with sparsity halved)"
_H200 = "NVIDIA H200 data sheet (rates with sparsity halved)"
_A100 = "NVIDIA A100 data sheet; no FP8"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
GPU_PEAKS = {
    "NVIDIA H100 80GB HBM3": _peaks(989.4, 1978.9, 3350, 450, 132, _HOPPER),
    "NVIDIA H100 NVL": _peaks(835.5, 1670.5, 3900, 64, 132, _HOPPER),
    "NVIDIA H100 PCIe": _peaks(756.5, 1513, 2000, 64, 114, _HOPPER),
    "NVIDIA H200": _peaks(989.4, 1978.9, 4800, 450, 132, _H200),
    "NVIDIA H200 NVL": _peaks(835.5, 1670.5, 4800, 64, 132, _H200),
    "NVIDIA A100-SXM4-80GB": _peaks(312, math.nan, 2039, 300, 108, _A100),
    "NVIDIA A100 80GB PCIe": _peaks(312, math.nan, 1935, 32, 108, _A100),
    "NVIDIA A100-SXM4-40GB": _peaks(312, math.nan, 1555, 300, 108, _A100),
    "NVIDIA A100-PCIE-40GB": _peaks(312, math.nan, 1555, 32, 108, _A100),
    "NVIDIA L40S": _peaks(362.05, 733, 864, 32, 142, "NVIDIA L40S data sheet"),
    "NVIDIA L4": _peaks(
        121, 242.5, 300, 32, 58, "NVIDIA L4 data sheet (rates with sparsity halved)"
    ),
    "NVIDIA GeForce RTX 4090": _peaks(165.2, 330.3, 1008, 32, 128, _ADA),
}


def gpu_name(device: int = 0) -> str:
    """Name that CUDA reports, or "cpu" where there is no GPU."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cpu"


def gpu_peaks(name: str) -> GpuPeaks:
    """Peaks of the GPU of exactly that name; nan everywhere for any other."""
    return GPU_PEAKS.get(name, GpuPeaks())


def compute_capability(device: int = 0) -> str:
    """Such as "9.0"; "" where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def best_precision(device: torch.device) -> str:
    """What the config's `precision: auto` means on a device."""
    if device.type != "cuda":
        return "float32"
    has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    return "recipe" if has_fp8 else "bf16"


def free_memory_bytes(device: int | None = None) -> int:
    """Free memory of a GPU, or of the host (device None); 0 if the system doesn't tell."""
    if device is not None:
        return torch.cuda.mem_get_info(device)[0]
    try:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) << 10
    except (OSError, ValueError):
        return 0


def num_cpus() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H100 80GB HBM3", or "CPU (2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def cpu_model() -> str:
    """Such as "AMD EPYC 9V74 80-Core Processor"; the architecture where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


GPU_STATE_KEYS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


def gpu_states(keys: Sequence[str] = GPU_STATE_KEYS) -> list[dict[str, str]]:
    """What the driver says of each GPU of this machine now; none where there is no driver, or
    where it doesn't know one of the keys."""
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if run.returncode:
        return []
    rows = [[value.strip() for value in line.split(",")] for line in run.stdout.splitlines()]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def process_age_s() -> float:
    """Seconds since this process began; where the system doesn't tell, its time on the CPU."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next tensor instead of giving them back.

    By default each activation above 128 kB is mapped and faulted in anew at every step, which
    costs more than the arithmetic on it. No effect on other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
