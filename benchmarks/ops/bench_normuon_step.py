"""`normuon_step` at the record's banks, against Inductor on the reference and modded-nanogpt.

B matrices of M × N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.run import Benchmark, too_large_for_cpu
from speedrun.ops.normuon_step import Fp8Copies, join_bits, normuon_step
from speedrun.reference import normuon_step as reference
from tests.cases import NORMUON_STEP_FULL, NORMUON_STEP_SMALL, NormuonCase
from tests.numerics import assert_accurate, assert_same_bits

BETA2, LR, WD = 0.9, 0.023, 0.027
E4M3 = torch.float8_e4m3fn


def benchmarks(device: torch.device, shapes: str) -> Iterator[Benchmark]:
    """At the banks of training; "all": also every small case."""
    for case in NORMUON_STEP_FULL if shapes == "record" else all_cases():
        num_bytes = least_bytes(case)
        if too_large_for_cpu(device, num_bytes):
            print(f"normuon_step {case.name}: left out, {num_bytes:,} bytes are many for a CPU")
            continue
        if num_bytes:
            yield benchmark(case, device)


def all_cases() -> Iterator[NormuonCase]:
    yield from NORMUON_STEP_FULL
    for shape, why in NORMUON_STEP_SMALL:
        for second in (True, False):
            for fp8 in (True, False):
                yield NormuonCase(f"{shape} {second=} {fp8=}", shape, why, second, fp8)


def least_bytes(case: NormuonCase) -> int:
    """O read, weights and low bits read and written, fp8 copies written, the state both."""
    num_lines = case.shape[0] * max(case.shape[1:]) if case.second else 0
    return math.prod(case.shape) * (2 + 2 * 4 + 2 * case.fp8) + 8 * num_lines


def random_state(case: NormuonCase, device: torch.device) -> list[Tensor | None]:
    """weight, low, o, second, as in the midst of training."""
    _, M, N = case.shape
    weight, o = (0.03 * torch.randn(case.shape, device=device) for _ in range(2))
    low = torch.randint(-(2**15), 2**15, case.shape, dtype=torch.int16, device=device)
    second = o.square().mean(2 if M >= N else 1, keepdim=True) if case.second else None
    return [weight.bfloat16(), low, o.bfloat16(), second]


def benchmark(case: NormuonCase, device: torch.device) -> Benchmark:
    B, M, N = case.shape
    state = random_state(case, device)
    before = [None if x is None else x.clone() for x in state]
    muls = [1.0, 2.0] if M > N else [1.0]  # the MLP's down matrices have twice the rate
    lr_B = LR * torch.tensor([muls[b % len(muls)] for b in range(B)], dtype=torch.float64)
    rates = lr_B.float().double().to(device), torch.tensor(WD, dtype=torch.float64, device=device)
    fp8 = None
    if case.fp8:
        copies = (torch.zeros(s, dtype=E4M3, device=device) for s in ((B, M, N), (B, N, M)))
        scale, amax = torch.full((2, B), 0.0005, device=device)
        fp8 = Fp8Copies(scale, *copies, amax)

    def reset() -> None:
        for x, saved in zip(state, before, strict=True):
            if x is not None:
                x.copy_(saved)

    def check(name: str, result: object) -> None:
        for b in range(B):  # float64 copies of a whole bank would be large
            old, new = ([None if x is None else x[b : b + 1] for x in s] for s in (before, state))
            assert_right(name, old, new, rates[0][b : b + 1])
        if fp8 is not None and name != "modded-nanogpt":
            codes = (state[0].float() / fp8.scale[:, None, None]).clamp(-448, 448).to(E4M3)
            assert_same_bits(fp8.row, codes)
            assert_same_bits(fp8.transposed, codes.mT.contiguous())
            assert torch.equal(fp8.amax, state[0].abs().amax((1, 2)).float())

    arguments = (*state, *rates)
    return Benchmark(
        stem="normuon_step",
        case=case.name,
        call=lambda: normuon_step(*arguments, beta2=BETA2, fp8=fp8),
        check=check,
        num_bytes=least_bytes(case),
        peers={
            "inductor": lambda: peers.inductor(
                reference.normuon_step, *arguments, beta2=BETA2, fp8=fp8
            ),
            "modded-nanogpt": lambda: modded_nanogpt(case, state, lr_B.tolist()),
        },
        reset=reset,
    )


def assert_right(name: str, old: list, new: list, lr_B: Tensor) -> None:
    """Of one matrix, by the law of numerics; modded-nanogpt rounds O's factors to bf16 before."""
    weight, low, o, second = old
    same = [None if x is None else x.clone() for x in old]
    state = None if second is None else second.double()
    exact = [join_bits(weight, low).double(), None, o.double(), state]
    for one in (same, exact):
        reference.normuon_step(*one, lr_B, WD, beta2=BETA2)
    found, expected = join_bits(*new[:2]), join_bits(*same[:2])
    if name == "modded-nanogpt":
        margin = 2**-6 * LR * o.abs().max().item() * 4
        torch.testing.assert_close(found, expected, rtol=0, atol=margin)
    else:
        assert_accurate(found, expected, exact[0])
    if second is not None:
        assert_accurate(new[3], same[3], exact[3])


def modded_nanogpt(case: NormuonCase, state: list, lrs: list[float]) -> Callable[[], None]:
    """Its two compiled functions as it calls them: the second for each matrix of the MLP."""
    rescale = peers.modded_nanogpt_optimizer("_apply_normuon_variance_reduction")
    update = peers.modded_nanogpt_optimizer("_cautious_wd_and_update_inplace")
    if case.fp8:
        raise peers.Missing("it has no fp8 copies here")
    weight, low, o, second = state
    upper, low = weight.view(torch.uint16), low.view(torch.uint16)
    lr, wd = torch.tensor(0.0), torch.tensor(WD)
    axis = -1 if weight.shape[1] >= weight.shape[2] else -2

    def call() -> None:
        direction = o if second is None else rescale(o, second, BETA2, axis)
        if len(set(lrs)) == 1:
            lr.fill_(lrs[0])
            update(upper, low, direction, wd, lr)
            return
        for b, own in enumerate(lrs):
            lr.fill_(own)
            update(upper[b], low[b], direction[b], wd, lr)

    return call
