"""Timing of functions against each other, and the memory that they take.

On a GPU: CUDA events, in four modes. Cold: the L2 cache is overwritten before every sample, as in
training, where a kernel's input comes from memory. Warm: calls one after another; flatters small
inputs. Plain: launched from Python; graph: replayed from a CUDA graph, without launch cost. Plain
and graph, cold and warm answer different questions, so all four are kept. On a CPU: perf_counter,
one mode, called cpu.

Functions are interleaved, one sample of each in turn, so that a clock that drifts hits all alike.
All samples are kept; the figures are the median and the interquartile range.

Peak: what is allocated at most, by the allocator's counters on a GPU, by the profiler's on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch

GPU_MODES = ("cold/graph", "cold/plain", "warm/graph", "warm/plain")
CPU_MODES = ("cpu",)
_FLUSH_BYTES = 256 << 20  # more than any L2 cache there is
_SAMPLE_US = 200.0  # warm samples are made at least this long by repetition


@dataclasses.dataclass(frozen=True)
class Timing:
    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def iqr_us(self) -> float:
        """Interquartile range: the middle half of the samples lies this close together."""
        if len(self.samples_us) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_us, n=4, method="inclusive")
        return high - low


def modes(device: torch.device) -> tuple[str, ...]:
    return GPU_MODES if device.type == "cuda" else CPU_MODES


def time_interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, mode: str, repeats: int = 30
) -> dict[str, Timing]:
    """Times each function `repeats` times, in turn; each runs 3 times before (compilation, caches).

    A function must do the same work every time. In graph modes, one that a CUDA graph can't capture
    is left out.
    """
    for function in functions.values():
        for _ in range(3):
            function()
    samplers = {}
    for name, function in functions.items():
        try:
            samplers[name] = _sampler(function, device, mode)
        except RuntimeError as problem:  # of capturing: one that waits for the GPU, for example
            print(f"no {mode} of {name}: {str(problem).splitlines()[0]}", file=sys.stderr)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _sampler(function: Callable, device: torch.device, mode: str) -> Callable[[], float]:
    """A function that returns the microseconds of one call."""
    if mode == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6

        return on_cpu

    cache, launch = mode.split("/")
    call = _graph_of(function, device) if launch == "graph" else function
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cache == "cold" else None
    calls = 1
    if cache == "warm":
        calls = max(1, round(_SAMPLE_US / _elapsed_us(call, 1, None)))
    return lambda: _elapsed_us(call, calls, flush)


def _elapsed_us(call: Callable, calls: int, flush: torch.Tensor | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()  # keeps the GPU busy, too, while the host enqueues what is timed
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def _graph_of(function: Callable, device: torch.device) -> Callable[[], None]:
    side = torch.cuda.Stream(device)  # gradients first run on the kind of stream that is captured
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, and raises what it has to complain about."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Of one call that has run before, beyond what was allocated at its start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - start
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return peak_of(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def peak_of(changes: Iterable[int]) -> int:
    """The largest sum of any of the first changes."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def roofs(device: torch.device) -> dict[str, float]:
    """Measured rates: "copy" in bytes a second, read and written; "bf16" and "fp8" matrix products
    in operations a second (nan: not possible on this device)."""
    return {
        "copy": _copy_rate(device, 1 << 30 if device.type == "cuda" else 1 << 26),
        "bf16": _matmul_rate(device, torch.bfloat16),
        "fp8": _matmul_rate(device, torch.float8_e4m3fn),
    }


def _copy_rate(device: torch.device, num_bytes: int) -> float:
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    mode = modes(device)[0]
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device, mode, repeats=10)
    return 2 * num_bytes / (timing["copy"].median_us * 1e-6)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Of square matrices of random values: zeros take less power, and clocks rise."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        if dtype == torch.bfloat16:
            return a @ b.t()
        return torch._scaled_mm(
            a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=device.type == "cuda"
        )

    mode = modes(device)[-1]  # warm: long runs of products are what a roof is of
    try:
        timing = time_interleaved({"product": product}, device, mode, repeats=10)
    except RuntimeError:
        return math.nan
    return 2 * size**3 / (timing["product"].median_us * 1e-6)
