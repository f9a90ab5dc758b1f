"""Which backend serves an operator: cuda (our kernels), triton, or torch (the reference).

CUDA tensors: `cuda` if speedrun._C is loaded and verdicts.json says that the kernel has passed on
this compute capability, else `triton`, else `torch`. Other tensors: `torch`.

An override goes before that choice: `with use_backend("triton"):`, or the environment variable
SPEEDRUN_BACKEND ("triton", or per operator "transpose=cuda,softcap_ce=torch"), which is read at
import. It needs no verdict, and raises where it can't serve. Triton serves CPU tensors only in its
interpreter (TRITON_INTERPRET=1 before triton is imported) and only by override.

Compiled code holds the backend of its trace; a new override makes torch.compile trace again.
"""

from __future__ import annotations

import functools
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
VERDICTS_PATH = Path(__file__).with_name("verdicts.json")
EVERY_OP = "*"


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
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(BACKENDS)}")
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
    """Backend for this call of `op` on tensors of `device`.

    `cuda_kernel`: name of the operator that _C implements, empty if this call has none (no kernel,
    or none for its shape or type); `triton`: whether this call has a Triton version.
    RuntimeError: an override names a backend that can't serve the call.
    """
    forced = _forced.get(op, _forced.get(EVERY_OP))
    if forced is not None:
        problem = _problem(op, forced, device.type, device.index, cuda_kernel, triton, True)
        if problem:
            raise RuntimeError(f"{op}: the override asks for backend {forced!r}, but {problem}")
        backend = forced
    elif device.type != "cuda":
        backend = "torch"
    elif not _problem(op, "cuda", device.type, device.index, cuda_kernel, triton, False):
        backend = "cuda"
    elif not _problem(op, "triton", device.type, device.index, cuda_kernel, triton, False):
        backend = "triton"
    else:
        backend = "torch"
    _note(op, backend)
    return backend


def _note(op: str, backend: str) -> None:
    _used.setdefault(op, set()).add(backend)


def _problem(
    op: str,
    backend: str,
    device_type: str,
    device_index: int | None,
    cuda_kernel: str,
    triton: bool,
    forced: bool,
) -> str:
    """Why `backend` can't serve the call; empty if it can."""
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
    capability = "%d.%d" % torch.cuda.get_device_capability(device_index)  # noqa: UP031
    if not forced and capability not in _passed(op):
        return f"it has not passed on compute capability {capability} (verdicts.json)"
    return ""


# Under torch.compile both are called at the trace, and only there: their results are constants of
# the graph. This is what torch.compiler.assume_constant_result sets; calling that would import the
# compiler, which takes longer than all of speedrun.
_note._dynamo_marked_constant = True
_problem._dynamo_marked_constant = True


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


@functools.cache
def _passed(op: str) -> frozenset[str]:
    """Compute capabilities on which the CUDA kernel of `op` has passed, such as "9.0"."""
    table = json.loads(VERDICTS_PATH.read_text())["verdicts"]
    return frozenset(row["capability"] for row in table.get(op, []))


def _triton_interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
