"""Which backend serves an operator: cuda (our kernels), triton, or torch (the reference).

Without being asked for, `cuda` and `triton` serve CUDA tensors only where verdicts.json, written by
benchmarks/hardware_check.py, says that they may: the operator has passed on this compute capability
(and failed on no GPU of it), built from the very sources that are in use here, and was not measured
to be slower than `torch` on a GPU of this name. Of two that may, the one measured faster, or
`cuda`. All other calls are served by `torch`.

An override goes before that choice: `with use_backend("triton"):`, or the environment variable
SPEEDRUN_BACKEND ("triton", or per operator "transpose=cuda,softcap_ce=torch"), which is read at
import. It needs no verdict, and raises where it can't serve. Triton serves CPU tensors only in its
interpreter (TRITON_INTERPRET=1 before triton is imported) and only by override.

Compiled code holds the backend of its trace; a new override makes torch.compile trace again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

BACKENDS = ("cuda", "triton", "torch")
# What single operators have beside these, for overrides of that operator alone.
OTHER_BACKENDS = {"attention": ("fa3", "fa4", "fa2", "flex", "sdpa")}
VERDICTS_PATH = Path(__file__).with_name("verdicts.json")
TRITON_FOLDER = Path(__file__).parents[1] / "triton_kernels"
# Other forms of an operator's Triton kernels, with verdicts of their own -> the file whose
# functions they use: in a file that all share, these would cost all kernels their verdicts.
FORMS = {"attention_strip": "attention"}
EVERY_OP = "*"


class Unavailable(RuntimeError):
    """An override asks for a backend that can't serve the call."""


def _parse(text: str) -> dict[str, str]:
    """Operator (or "*") -> backend, of a value of SPEEDRUN_BACKEND."""
    pairs = (part.rpartition("=") for part in text.replace(" ", "").split(",") if part)
    return {op or EVERY_OP: backend for op, _, backend in pairs}


# Not per thread: gradients are computed in other threads than the forward pass.
_forced: dict[str, str] = _parse(os.environ.get("SPEEDRUN_BACKEND", ""))
_used: dict[str, set[str]] = {}


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Runs the named operators (none named: all) on `backend` inside the `with` block."""
    global _forced
    for op in ops or (EVERY_OP,):
        allowed = (*BACKENDS, *OTHER_BACKENDS.get(op, ()))
        if backend not in allowed:
            raise ValueError(f"backend {backend!r}: allowed are {', '.join(allowed)}")
    before = _forced
    _forced = {**before, **dict.fromkeys(ops, backend)} if ops else {EVERY_OP: backend}
    try:
        yield
    finally:
        _forced = before


def backends_used() -> dict[str, tuple[str, ...]]:
    """Operator -> backends that have served it in this process (compiled: at its traces)."""
    return {op: tuple(sorted(backends)) for op, backends in sorted(_used.items())}


def choose(op: str, device: torch.device, cuda_kernel: str = "", triton: bool = False) -> str:
    """Backend for this call of an operator on tensors of `device`; `op` is its stem.

    `cuda_kernel`: name of the operator that _C implements, empty if this call has none (no kernel,
    or none for its shape or type); `triton`: whether this call has a Triton version.
    Unavailable: an override names a backend that can't serve the call.
    """
    answer = decide(op, device, cuda_kernel, triton)
    note(op, answer)
    return answer


def decide(op: str, device: torch.device, cuda_kernel: str = "", triton: bool = False) -> str:
    """What `choose` would answer, without a note in `backends_used`."""
    forced = forced_backend(op)
    answer = _decide(op, device.type, device.index, cuda_kernel, triton, forced)
    if answer not in BACKENDS:
        raise Unavailable(f"{op}: the override asks for backend {forced!r}, but {answer}")
    return answer


def forced_backend(op: str) -> str | None:
    """The override for an operator."""
    return _forced.get(op, _forced.get(EVERY_OP))


def named_override(op: str) -> str | None:
    """The override that names an operator; None where there is none, or only one for all."""
    return _forced.get(op)


def note(op: str, backend: str) -> None:
    _used.setdefault(op, set()).add(backend)


def _decide(*call: str | int | bool | None) -> str:
    return _decide_once(*call)


# Under torch.compile both are called at the trace, and only there: their results are constants of
# the graph. This is what torch.compiler.assume_constant_result sets; calling that would import the
# compiler, which takes longer than all of speedrun.
note._dynamo_marked_constant = True  # type: ignore[attr-defined]
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide_once(
    op: str,
    device_type: str,
    device_index: int | None,
    cuda_kernel: str,
    triton: bool,
    forced: str | None,
) -> str:
    """The backend, or why the one that was asked for can't serve."""

    def problem(backend: str) -> str:
        return _problem(backend, device_type, cuda_kernel, triton)

    if forced is not None:
        return problem(forced) or forced
    if device_type != "cuda":
        return "torch"
    ready = [b for b in ("cuda", "triton") if not problem(b)]
    if not ready:
        return "torch"
    capability = "%d.%d" % torch.cuda.get_device_capability(device_index)  # noqa: UP031
    gpu = torch.cuda.get_device_name(device_index)
    found = {backend: _verdict(op, backend, capability, gpu) for backend in ready}
    speeds = {b: speed for b, (passed, speed) in found.items() if passed and (speed or 1) >= 1}
    if None in speeds.values():
        return next(iter(speeds))
    return max(speeds, key=lambda backend: speeds[backend] or 0.0, default="torch")


def _problem(backend: str, device_type: str, cuda_kernel: str, triton: bool) -> str:
    """Why `backend` can't serve the call, whatever its verdicts; empty if it can."""
    if backend == "torch":
        return ""
    if backend not in BACKENDS:
        return f"there is no such backend; allowed are {', '.join(BACKENDS)}"
    on_gpu = device_type == "cuda" and torch.cuda.is_available()
    if backend == "triton":
        if not triton:
            return "this call has no Triton version"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not on_gpu and not (device_type == "cpu" and _triton_interprets()):
            return f"its tensors are on {device_type}, where Triton needs TRITON_INTERPRET=1"
        return ""
    if not cuda_kernel:
        return "this call has no CUDA kernel"
    if not on_gpu:
        return f"its tensors are on {device_type}, without a GPU"
    if library_problem():
        return library_problem()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"speedrun::{cuda_kernel}", "CUDA"):
        return f"speedrun._C has no kernel {cuda_kernel}: it was built from older sources"
    return ""


def _verdict(op: str, backend: str, capability: str, gpu: str) -> tuple[bool, float | None]:
    """Whether the sources in use have passed on this capability; their speed on `gpu`, if known:
    how many times faster than `torch`."""
    source = source_sha256(op, backend)
    rows = _verdicts().get(op, {}).get(backend, [])
    rows = [row for row in rows if source and row["source_sha256"] == source]
    verdicts = {row["verdict"] for row in rows if row["compute_capability"] == capability}
    speeds = [row["speed"] for row in rows if row["gpu"] == gpu]
    return "pass" in verdicts and "fail" not in verdicts, next(iter(speeds), None)


@functools.cache
def _verdicts() -> dict[str, dict[str, list[dict]]]:
    return json.loads(VERDICTS_PATH.read_text())["verdicts"]


def source_sha256(op: str, backend: str) -> str:
    """Of the sources that `backend` runs for `op` here; "" if it has none.

    cuda: kernel, headers and binding, as they were when speedrun._C was built, which carries the
    table (pyext/source_hashes.py); triton: the file of its kernels, that of FORMS, and what all of
    them share.
    """
    if backend == "cuda":
        return "" if library_problem() else _built_sources().get(op, "")
    paths = [TRITON_FOLDER / f"{name}.py" for name in (op, FORMS.get(op)) if name]
    if not paths[0].is_file():
        return ""
    paths += sorted(TRITON_FOLDER.glob("_[a-z]*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _built_sources() -> dict[str, str]:
    library = importlib.import_module("speedrun._C")
    return json.loads(getattr(library, "source_hashes", "{}"))


@functools.cache
def library_problem() -> str:
    """Loads speedrun._C, which registers its kernels; returns why it can't be used, or ""."""
    try:
        importlib.import_module("speedrun._C")
    except ModuleNotFoundError:
        return "speedrun was built without CUDA kernels (build with SPEEDRUN_CUDA=1)"
    except Exception as error:
        warnings.warn(f"no CUDA kernels: speedrun._C can't be loaded: {error}", stacklevel=2)
        return f"speedrun._C can't be loaded: {error}"
    return ""


def _triton_interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
