"""Each operator once, on a small problem, against its reference.

A program of its own (`python -m speedrun.kernel_trials ITEM …`), since a kernel may crash or hang:
`run` reads what it prints line by line, ends it where an item takes too long, and starts it again
for those that are left. The real proof is tests/ops and benchmarks/hardware_check.py; this finds
what is broken on one machine.

Items: "STEM served" (by whatever would serve, ops/_dispatch.py), "STEM cuda", "STEM triton",
"attention NAME" (its backends, which need a GPU); of the GPUs "memory", "matmul" and "nccl".
"""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from speedrun import hardware
from speedrun.ops import _attention_choice, _dispatch
from speedrun.ops._attention_backends import LOADERS, NotInstalled, load
from speedrun.ops.adam_step import AdamTensor, adam_step
from speedrun.ops.attention import attention, plan_attention
from speedrun.ops.attention_epilogue import attention_epilogue
from speedrun.ops.dc_attention import dc_attention, plan_dc_attention
from speedrun.ops.fp8_matmul import fp8_matmul
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_loss import head_loss, quantize_head
from speedrun.ops.normuon_step import normuon_step
from speedrun.ops.polar_express import momentum_polar_express
from speedrun.ops.qk_norm_rope import qk_norm_rope, rotary_frequencies, rotary_table
from speedrun.ops.relu2_mlp import relu2_mlp
from speedrun.ops.residual_mix import residual_mix_norm
from speedrun.ops.softcap_ce import softcap_ce_fp8
from speedrun.ops.sym_matmul import sym_matmul
from speedrun.ops.transpose import transpose

MOST_ERROR = 0.03  # of the norm; bf16 rounding gives up to 0.01, a wrong kernel about 1
START_S = 60.0  # until the first item begins: imports, and CUDA's context
HEAD_DIMS = (128, 128)  # attention's, as record_089 has them
MATMUL_SIZE, MATMUL_S = 8192, 2.0
CLOCK_KEYS = ("clocks.sm", "clocks.max.sm", "temperature.gpu")
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
MOST_CHARACTERS = 200  # of an error's first line


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of an item. verdict: pass, fail or skip (it could not be tried)."""

    verdict: str
    text: str = ""
    values: dict = dataclasses.field(default_factory=dict)


# ---- The problems: T tokens, D model, H heads, K head dim, V vocab, F hidden -----------------


class Draw:
    """Random tensors that are the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)


def _adam_step(draw: Draw) -> list[Tensor]:
    param, grad = draw(64, 96), draw(64, 96)
    moments = [draw.full(0.0, 64, 96), draw.full(0.0, 64, 96)]
    scalars = torch.tensor([0.01, 0.001], dtype=torch.float64, device=draw.device)
    adam_step([AdamTensor(param, grad, *moments, scalars, 0.9, 0.95)], eps=1e-8)
    return [param, *moments]


def _attention(draw: Draw) -> list[Tensor]:
    starts = torch.tensor([0, 67, 256], dtype=torch.int32, device=draw.device)
    plan = plan_attention(starts, 256, 100, torch.bfloat16, HEAD_DIMS)
    q, k, v = (draw(256, 2, K) for K in (*HEAD_DIMS[:1] * 2, HEAD_DIMS[1]))
    return [attention(q, k, v, plan, 0.1)]


def _attention_epilogue(draw: Draw) -> list[Tensor]:
    return [attention_epilogue(draw(64, 6, 128), draw(64, 6, 128), draw(64, 6), draw(64, 6))]


def _dc_attention(draw: Draw) -> list[Tensor]:
    starts = torch.tensor([0, 67, 128], dtype=torch.int32, device=draw.device)
    streams, weights = [draw(128, 4, 64) for _ in range(3)], [draw(128, 4) for _ in range(2)]
    return [dc_attention(*streams, *weights, plan_dc_attention(starts, 128, 50), 0.1)]


def _fp8_matmul(draw: Draw) -> list[Tensor]:
    a, b = (draw(size, 128).to(torch.float8_e4m3fn) for size in (128, 256))
    return [fp8_matmul(a, b, draw.full(0.5), draw.full(0.25))]


def _fp8_quantize(draw: Draw) -> list[Tensor]:
    out, out_t, amax = fp8_quantize(draw(128, 256), draw.full(0.01), transposed=True, amax=True)
    return [out, out_t, amax]


def _normuon_step(draw: Draw) -> list[Tensor]:
    weight, second = draw(2, 128, 64), draw.full(0.0, 2, 128, 1)
    low = torch.zeros(2, 128, 64, dtype=torch.int16, device=draw.device)
    lr = draw.full(0.01, 2, dtype=torch.float64)
    normuon_step(weight, low, draw(2, 128, 64), second, lr, 0.1, beta2=0.9)
    return [weight, second]


def _polar_express(draw: Draw) -> list[Tensor]:
    momentum = draw.full(0.0, 2, 64, 192)
    return [*momentum_polar_express([draw(2, 64, 192)], [momentum], 0.9), momentum]


def _qk_norm_rope(draw: Draw) -> list[Tensor]:
    positions = torch.arange(64, device=draw.device)[:, None]
    frequencies = rotary_frequencies(128, 1024.0).to(draw.device)
    cos, sin = rotary_table(frequencies, positions, torch.bfloat16)
    return [*qk_norm_rope(draw(1, 64, 3 * 2 * 128), cos, sin, 2)]


def _relu2_mlp(draw: Draw) -> list[Tensor]:
    h, up, down = (draw(*shape).requires_grad_() for shape in ((128, 64), (256, 64), (256, 64)))
    y = relu2_mlp(h, up, down)
    return [y.detach(), *torch.autograd.grad(y, (h, up, down), draw(128, 64))]


def _residual_mix(draw: Draw) -> list[Tensor]:
    x, normed, _ = residual_mix_norm([(draw(1)[0], draw(64, 768)), (0.5, draw(64, 768))])
    return [x, normed]


def _softcap_ce(draw: Draw) -> list[Tensor]:
    targets = torch.arange(128, device=draw.device)[:, None] * 3
    loss = (targets, draw.full(1.0, 1), 23.0, 5.0, 7.5)
    return [*softcap_ce_fp8(draw(128, 512), *loss, draw.full(2**-9))[:3]]


def _head_logits(draw: Draw) -> list[Tensor]:
    targets = torch.arange(128, device=draw.device)[:, None] * 3
    x, w = draw(128, 64).requires_grad_(), draw(64, 512).requires_grad_()
    loss = (targets, draw.full(1.0, 1), 23.0, 5.0, 7.5)
    losses = head_loss(x, w, *loss, fp8=quantize_head(w.detach()), form="fused")
    return [losses.detach(), *torch.autograd.grad(losses.sum(), (x, w))]


def _sym_matmul(draw: Draw) -> list[Tensor]:
    return [sym_matmul(draw(2, 144, 80))]


def _transpose(draw: Draw) -> list[Tensor]:
    return [transpose(draw(2, 40, 128))]


TRIALS: dict[str, Callable[[Draw], list[Tensor]]] = {
    "adam_step": _adam_step,
    "attention": _attention,
    "attention_epilogue": _attention_epilogue,
    "dc_attention": _dc_attention,
    "fp8_matmul": _fp8_matmul,
    "fp8_quantize": _fp8_quantize,
    "head_logits": _head_logits,
    "normuon_step": _normuon_step,
    "polar_express": _polar_express,
    "qk_norm_rope": _qk_norm_rope,
    "relu2_mlp": _relu2_mlp,
    "residual_mix": _residual_mix,
    "softcap_ce": _softcap_ce,
    "sym_matmul": _sym_matmul,
    "transpose": _transpose,
}


# ---- In the child ----------------------------------------------------------------------------


def try_operator(stem: str, backend: str, device: torch.device) -> Outcome:
    """Its results by `backend` ("served": without an override) against the reference's."""
    with _dispatch.use_backend("torch"):
        expected = TRIALS[stem](Draw(device))
    try:
        if backend == "served":
            found = TRIALS[stem](Draw(device))
            backend = "+".join(_used(stem))
        else:
            with _dispatch.use_backend(backend, stem):
                found = TRIALS[stem](Draw(device))
    except _dispatch.Unavailable as problem:  # of a user's override, if it should have served
        return Outcome("fail" if backend == "served" else "skip", str(problem))
    values = {"backend": backend}
    if not all(bool(torch.isfinite(t.double()).all()) for t in found):
        return Outcome("fail", f"{backend}: a result isn't finite", values)
    error = max(map(relative_error, found, expected))
    if error > MOST_ERROR:
        return Outcome("fail", f"{backend} errs by {error:.2g} of the reference's norm", values)
    return Outcome("pass", f"error {error:.1g}", values)


def _used(stem: str) -> list[str]:
    """Who served last: "torch" served first, for what was expected."""
    used = [b for b in _dispatch.backends_used().get(stem, ()) if b != "torch"]
    return used or ["torch"]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|, norms of all numbers in float64; inf for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def try_attention(name: str, device: torch.device) -> Outcome:
    """One way to compute attention, by the trial that decides whether it may serve."""
    try:
        _attention_choice.trial(load(name), device, HEAD_DIMS)
    except NotInstalled as problem:
        return Outcome("skip", f"{problem} is not installed")
    return Outcome("pass", "right")


def try_memory(device: torch.device) -> Outcome:
    """Free bytes of all GPUs."""
    if device.type != "cuda":
        return Outcome("skip", "no GPU")
    free = [hardware.free_memory_bytes(index) for index in range(torch.cuda.device_count())]
    return Outcome("pass", "", {"free_bytes": free})


def try_matmul(device: torch.device) -> Outcome:
    """Rate and clock of a GPU under bf16 products for about MATMUL_S seconds."""
    if device.type != "cuda":
        return Outcome("skip", "no GPU")
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    num_calls = 1
    for _ in range(2):  # the first warms up, and says how many calls fill the time
        begin.record()
        for _ in range(num_calls):
            a @ a
        end.record()
        states = clocks() if num_calls > 1 else []  # while the GPU works
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3 / num_calls
        num_calls = max(2, round(MATMUL_S / seconds))
    flops_per_s = 2 * MATMUL_SIZE**3 / seconds
    return Outcome("pass", "", {"flops_per_s": flops_per_s, "states": states})


def clocks() -> list[dict[str, str]]:
    """Of each GPU: CLOCK_KEYS, and which of SLOWDOWNS are active, by both names they have had."""
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):
        keys = [f"{prefix}.{name}" for name in SLOWDOWNS]
        if states := hardware.gpu_states([*CLOCK_KEYS, *keys]):
            return [
                {
                    key.rpartition(".")[2] if key in keys else key: value
                    for key, value in state.items()
                }
                for state in states
            ]
    return hardware.gpu_states(CLOCK_KEYS)


def try_nccl(device: torch.device) -> Outcome:
    """A sum over all GPUs of this machine from one process."""
    if torch.cuda.device_count() < 2:
        return Outcome("skip", "needs two GPUs")
    devices = range(torch.cuda.device_count())
    tensors = [torch.full((1 << 20,), float(i + 1), device=i) for i in devices]
    torch.cuda.nccl.all_reduce(tensors)
    expected = len(tensors) * (len(tensors) + 1) / 2
    if not all(bool((t == expected).all()) for t in tensors):
        return Outcome("fail", f"a sum over {len(tensors)} GPUs is wrong")
    return Outcome("pass", f"a sum over {len(tensors)} GPUs is right")


def try_item(item: str, device: torch.device) -> Outcome:
    """Whatever it raises is its outcome."""
    stem, _, backend = item.partition(" ")
    alone = {"memory": try_memory, "matmul": try_matmul, "nccl": try_nccl}
    try:
        if item in alone:
            return alone[item](device)
        if stem == "attention" and backend in LOADERS:
            return try_attention(backend, device)
        return try_operator(stem, backend, device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Outcome("fail", f"{type(error).__name__}: {lines[0][:MOST_CHARACTERS]}")


def main(items: Sequence[str]) -> int:
    """A line when an item begins and one when it ends; 1: the GPU takes no more work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for item in items:
        print(json.dumps({"begins": item}), flush=True)
        outcome = try_item(item, device)
        print(json.dumps({"item": item, **dataclasses.asdict(outcome)}), flush=True)
        if outcome.verdict == "fail" and not still_works(device):
            return 1
    return 0


def still_works(device: torch.device) -> bool:
    """Whether the GPU takes more work of this process: after some errors it never does."""
    try:
        return bool(torch.ones((), device=device).item())
    except RuntimeError:
        return False


# ---- In the parent ---------------------------------------------------------------------------


def run(
    items: Sequence[str],
    limit_s: float,
    item_limit_s: float,
    command: Sequence[str] = (sys.executable, "-m", "speedrun.kernel_trials"),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Outcome]:
    """Item -> outcome, of all items. A crash or hang costs its item and a new process."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + limit_s
    while todo := [item for item in items if item not in outcomes]:
        if time.monotonic() >= deadline:
            late = Outcome("skip", f"not reached within {limit_s:.0f} s")
            return outcomes | dict.fromkeys(todo, late)
        outcomes |= _one_process(command, todo, deadline, item_limit_s, environment)
    return outcomes


def _one_process(
    command: Sequence[str],
    items: Sequence[str],
    deadline: float,
    item_limit_s: float,
    environment: Mapping[str, str] | None,
) -> dict[str, Outcome]:
    """At least one outcome, unless the deadline is over before."""
    outcomes: dict[str, Outcome] = {}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*command, *items], stdout=pipe, stderr=pipe, text=True, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    threads = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, errors.append), daemon=True),
    ]
    for thread in threads:
        thread.start()
    current, limit_s, began = "", START_S, time.monotonic()
    try:
        while True:
            left_s = deadline - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, min(limit_s, left_s)))
            except queue.Empty:
                if limit_s < left_s:
                    late = Outcome("fail", f"no end after {limit_s:.0f} s")
                    outcomes |= dict.fromkeys([current] if current else items, late)
                elif current:
                    seconds = time.monotonic() - began
                    text = f"had run for {seconds:.0f} s when the time for all was over"
                    outcomes[current] = Outcome("skip", text)
                return outcomes
            if line is None:
                break
            event = json.loads(line)
            current, limit_s, began = event.pop("begins", ""), item_limit_s, time.monotonic()
            if "item" in event:
                item = event.pop("item")
                outcomes[item] = Outcome(**event)
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()
        process.stdout.close()
        process.stderr.close()
    said = [line.strip() for line in errors if line and line.strip()]
    died = Outcome("fail", f"the process died: {(said or ['it said nothing'])[-1]}")
    if current:
        outcomes[current] = died
    elif not outcomes:  # nor would it begin for the others
        outcomes = dict.fromkeys(items, died)
    return outcomes


def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
