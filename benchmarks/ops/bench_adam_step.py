"""`adam_step` against Inductor on the reference and torch's fused AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.adam_step import KERNEL_DTYPES, AdamTensor, adam_step
from speedrun.reference import adam_step as reference
from tests.cases import ADAM_STEP_FULL, ADAM_STEP_SMALL, AdamCase
from tests.numerics import assert_accurate

EPS, BETA1, BETA2 = 1e-10, 0.75, 0.95
RESULTS = ("param", "exp_avg", "exp_avg_sq")


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the tables of training; "all": also every small case in every type."""
    for case in ADAM_STEP_FULL if shapes == "record" else all_cases():
        num_bytes = sum(
            math.prod(shape) * (3 * dtype.itemsize + 4 * case.moments.itemsize)
            for shape, dtype in case.params
        )
        if too_large_for_cpu(device, num_bytes):
            print(f"adam_step {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        yield benchmark(case, device)


def all_cases() -> Iterator[AdamCase]:
    yield from ADAM_STEP_FULL
    for shape, why in ADAM_STEP_SMALL:
        for dtype in KERNEL_DTYPES:
            for moments in KERNEL_DTYPES:
                name = f"{shape} {dtype} moments {moments}"
                yield AdamCase(name, ((shape, dtype),), why, moments)


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, case: AdamCase, device: torch.device
) -> AdamTensor:
    """In the midst of training; where the case has unseen rows, they are as they must be."""

    def random(dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    numbers = torch.tensor([0.01, 1e-4], dtype=torch.float64, device=device)
    moments = random(case.moments), random(case.moments).square_()
    tensor = AdamTensor(random(dtype), random(dtype), *moments, numbers, BETA1, BETA2)
    if case.unseen_frac is None:
        return tensor
    seen = torch.rand(math.prod(shape[:-1]), device=device) >= case.unseen_frac
    for x in tensor[1:4]:
        x.view(-1, shape[-1])[~seen] = 0
    return tensor._replace(seen=seen)


def least_bytes(tensor: AdamTensor) -> int:
    """Parameter and moments read and written, gradient read; of unseen rows only the gradient."""
    updated = 2 * sum(getattr(tensor, name).nbytes for name in RESULTS)
    if tensor.seen is not None:
        updated = updated * int(tensor.seen.sum()) // max(1, tensor.seen.numel())
    return tensor.grad.nbytes + updated


def benchmark(case: AdamCase, device: torch.device) -> Benchmark:
    tensors = [random_tensor(shape, dtype, case, device) for shape, dtype in case.params]
    before = [[getattr(t, name).clone() for name in RESULTS] for t in tensors]

    def reset() -> None:
        for tensor, saved in zip(tensors, before, strict=True):
            for name, values in zip(RESULTS, saved, strict=True):
                getattr(tensor, name).copy_(values)

    def check(name: str, result: object) -> None:
        if name == "torch-fused":  # it decays otherwise: here for its time
            return
        for tensor, saved in zip(tensors, before, strict=True):
            assert_right(tensor, saved)

    return Benchmark(
        stem="adam_step",
        case=case.name,
        call=lambda: adam_step(tensors, eps=EPS),
        check=check,
        num_bytes=sum(map(least_bytes, tensors)),
        peers={
            "inductor": lambda: peers.inductor(reference.adam_step, tensors, eps=EPS),
            "torch-fused": lambda: torch_fused(tensors),
        },
        reset=reset,
    )


def assert_right(tensor: AdamTensor, before: list[Tensor]) -> None:
    """By the law of numerics, in parts: float64 copies of a whole table would not fit."""
    old = dict(zip(RESULTS, before, strict=True))
    names = (*RESULTS, "grad")
    start = tensor._replace(**old, seen=None)
    parts = {name: getattr(start, name).flatten().split(1 << 24) for name in names}
    found = {name: getattr(tensor, name).flatten().split(1 << 24) for name in RESULTS}
    for i in range(len(parts["grad"])):
        part = {name: parts[name][i] for name in names}
        same = start._replace(**{name: x.clone() for name, x in part.items()})
        exact = start._replace(**{name: x.double() for name, x in part.items()})
        for one in (same, exact):
            reference.adam_step([one], eps=EPS)
        for name in RESULTS:
            assert_accurate(found[name][i], getattr(same, name), getattr(exact, name))


def torch_fused(tensors: list[AdamTensor]) -> Callable[[], None]:
    """torch.optim.AdamW(fused=True): decays otherwise; its moments are of the parameter's type."""
    if any(tensor.param.dtype != tensor.exp_avg.dtype for tensor in tensors):
        raise peers.Missing("torch's fused Adam keeps moments of the parameter's type")
    params = [torch.nn.Parameter(tensor.param) for tensor in tensors]
    for param, tensor in zip(params, tensors, strict=True):
        param.grad = tensor.grad
    optimizer = torch.optim.AdamW(params, betas=(BETA1, BETA2), eps=EPS, fused=True)
    return optimizer.step
