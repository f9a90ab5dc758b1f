"""How far the head's gradients are from float64's, by form and by cause.

    python -m benchmarks.head_error [--text FILE] [--steps N] [--tokens T] [--columns V]

‖found − exact‖/‖exact‖ of loss, dX and dW, where exact is the plain expression in float64 of the
same bf16 numbers. Each form is computed with all of its roundings, and with one of them alone, all
else in float64; "√Σ²" is the root of the sum of the squares of those, which "all" comes to where
they are independent. Runs on a CPU.

What a format does: of numbers whose mantissas are spread evenly, rounding to e4m3 leaves 2.5 % of
the norm, to e5m2 4.9 % (`format_error`). A product of both leaves √(2.5² + 4.9²) = 5.5 %.

Problems, all made up but the last: see HEADS.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import markdown_table
from speedrun import recipes, train
from speedrun.batch import shifted_targets
from speedrun.comms import Comms
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_loss import head_loss, quantize_head
from speedrun.optim import Optimizer
from speedrun.reference import softcap_ce as reference
from speedrun.reference._fp8 import FP8_MAX, to_fp8
from speedrun.reference.head_logits import factor_scale
from speedrun.reference.softcap_ce import Loss
from speedrun.schedule import Schedule, scaled
from speedrun.sources import model_for, open_data, to_micro_batches, training_loader

SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3
DIM = 768
WEIGHTS = (1.0, 0.5, 0.25)  # of the first stage's targets
PREFIX_WEIGHT = 0.25
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Causes: x and W of the logits' product; x of dW's and W of dX's; the gradient of the logits, at
# the targets' columns and in all others; and what is rounded to bf16.
LOGITS, OPERANDS, TARGETS, OTHERS = "e4m3 logits", "e4m3 x, W", "e5m2 targets", "e5m2 others"
BF16 = "bf16"
CAUSES = (LOGITS, OPERANDS, TARGETS, OTHERS, BF16)
GRADIENTS = ("loss", "dX", "dW")  # as a Result has them


class Head(NamedTuple):
    """What a made-up head is drawn from. Rows of x are normed to √D, as the model's last norm does.

    All positions share a half of x, and all columns a part along it, which makes the mean of z.
    """

    norm: float  # of W's columns: the median
    spread: float  # and the standard deviation of its logarithm
    mean_z: float
    aligned: float  # |z|/‖w‖ of a position's likeliest column; the other candidates' fall from it


# The last two have a softmax of 3.4 nats on average, like a model that is at RECIPE's 3.28.
HEADS = {
    # RECIPE's initial weight, 0.005·N(0, 1), and x that knows nothing of it.
    "at the start": Head(norm=0.005 * DIM**0.5, spread=0.0, mean_z=0.0, aligned=0.0),
    # Large logits come from x along W's columns, which are small, as in `tiny` after 100 steps on
    # Tiny Shakespeare: ‖w‖ 1.0 to 1.7, a common half (0.47) of x, mean z −6.9, and 0.5 for the
    # cosine of x and the target's column, here 0.4.
    "aligned": Head(norm=1.6, spread=0.2, mean_z=-10.0, aligned=12.0),
    # The other end: x is independent of W, so that large logits come by chance from large columns,
    # the largest that the record's scale has room for, max|W| = 1.6. FP8's error of a logit is
    # 3.5 % of ‖w‖, whatever the logit.
    "large columns": Head(norm=5.0, spread=0.3, mean_z=-13.0, aligned=0.0),
}
CANDIDATES, FALL = 8, 0.8  # columns a position is aligned with, and from one to the next


class Problem(NamedTuple):
    x_TD: Tensor  # bf16
    w_DV: Tensor  # bf16
    loss: Loss


class Result(NamedTuple):
    loss_T: Tensor
    dx_TD: Tensor
    dw_DV: Tensor


def made_up(head: Head, targets: str, num_tokens: int, num_columns: int) -> Problem:
    """Targets, and for half of the positions a prefix target: "any" columns; "drawn" from the
    softmax, as if the model were right; or the softmax's "likeliest"."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions_DV = torch.nn.functional.normalize(random(DIM, num_columns), dim=0)
    common_D = torch.nn.functional.normalize(random(DIM), dim=0) * (DIM / 2) ** 0.5
    w_DV = directions_DV * head.norm * (head.spread * random(num_columns)).exp()
    w_DV = w_DV + common_D[:, None] * (head.mean_z / (DIM / 2))
    x_TD = common_D + random(num_tokens, DIM) * 0.5**0.5
    candidates_TN = torch.randint(num_columns, (num_tokens, CANDIDATES), generator=generator)
    for i, columns_T in enumerate(candidates_TN.T):
        x_TD += head.aligned * FALL**i * directions_DV[:, columns_T].T
    x_TD = torch.nn.functional.rms_norm(x_TD, (DIM,)).bfloat16()
    w_DV = w_DV.clamp(-1.6, 1.6).bfloat16()
    shares_TV = reference.softcap(x_TD.float() @ w_DV.float(), *SOFTCAP).softmax(1)
    if targets == "any":
        shares_TV.fill_(1)
    count = len(WEIGHTS) + 1
    if targets == "likeliest":
        columns_TN = shares_TV.topk(count).indices
    else:
        columns_TN = shares_TV.multinomial(count, generator=generator)
    has_prefix_T = torch.rand(num_tokens, generator=generator) < 0.5
    prefixes_T = torch.where(has_prefix_T, columns_TN[:, -1], reference.NO_TARGET)
    return Problem(x_TD, w_DV, make_loss(columns_TN[:, :-1].contiguous(), prefixes_T))


def trained_tiny(text: Path | None, num_steps: int) -> Problem:
    """The head's input and weight after `num_steps`, on the next step's tokens; next tokens as
    targets, and another column as the prefix target, which bytes don't have."""
    config = recipes.load("tiny")
    config = dataclasses.replace(config, schedule=scaled(config.schedule, num_steps + 1))
    data = open_data(None, text, config)
    config = dataclasses.replace(config, model=model_for(config, data.format))
    run = train.Run(Comms(), torch.device("cpu"), torch.float32)
    model = train.build_model(config, run, seed=0)
    optimizer = Optimizer(model.named_parameters(), config.optim, run.comms, model.named_buffers)
    schedule = Schedule(config.schedule)
    with training_loader(config, data, schedule, 0, 1) as loader:
        for plan in itertools.islice(schedule, num_steps):
            batches = to_micro_batches(loader.next_step(), config, run.device)
            train.forward_backward(model, optimizer, batches, plan)
            optimizer.step(plan)
        (batch, *_) = to_micro_batches(loader.next_step(), config, run.device)
    with torch.no_grad():
        x_TD = model.trunk(batch, model.plan_windows(batch, plan.windows))
    targets_TN = shifted_targets(batch.targets_PT, len(WEIGHTS))
    prefixes_T = (targets_TN[:, 0] + 1) % model.lm_head.shape[1]
    loss = make_loss(targets_TN, prefixes_T)
    return Problem(x_TD.bfloat16(), model.lm_head.detach().bfloat16(), loss)


def make_loss(targets_TN: Tensor, prefixes_T: Tensor) -> Loss:
    weight = torch.tensor(PREFIX_WEIGHT)
    return Loss(targets_TN, torch.tensor(WEIGHTS), *SOFTCAP, prefixes_T, weight, False, False)


def differentiated(problem: Problem, dtype: torch.dtype, fp8: bool = False, **switches) -> Result:
    """By `head_loss`, with `dtype` for x and W."""
    x_TD, w_DV = (t.to(dtype, copy=True).requires_grad_() for t in problem[:2])
    options = problem.loss._asdict() | switches
    head = quantize_head(problem.w_DV) if fp8 else None
    loss_T = head_loss(x_TD, w_DV, **options, fp8=head)
    return Result(loss_T.detach(), *torch.autograd.grad(loss_T.sum(), (x_TD, w_DV)))


def drop_in(problem: Problem, causes: tuple[str, ...], round_sigmoid: bool = True) -> Result:
    """`head_loss` in FP8 with logits in memory, in float64 but for the roundings of `causes`."""
    x_TD, w_DV = operands(problem, OPERANDS in causes)
    z_TV = logits(problem, causes)
    if BF16 in causes:
        z_TV = z_TV.bfloat16().double()
    options = problem.loss._asdict() | {"round_sigmoid": round_sigmoid and BF16 in causes}
    loss_T, _, dz_TV, _ = reference.softcap_ce_grad(z_TV, **options)
    dz_scale = quantize_head(problem.w_DV).dz_scale.double()
    rounded_TV = to_fp8(dz_TV, dz_scale, E5M2).double() * dz_scale
    at_targets_TV = is_target(problem)
    dz_TV = torch.where(at_targets_TV & (TARGETS in causes), rounded_TV, dz_TV)
    dz_TV = torch.where(~at_targets_TV & (OTHERS in causes), rounded_TV, dz_TV)
    return result(loss_T, dz_TV @ w_DV.mT, x_TD.mT @ dz_TV, causes)


def fused(problem: Problem, causes: tuple[str, ...]) -> Result:
    """The head without logits in memory, in float64 but for the roundings of `causes`.

    The logits' product leaves g = exp(a·(σ − 1))·σ·(1 − σ) alone, as e5m2 with one scale for all.
    The softmax's row factors multiply dX's rows and, before their cast, the rows of x for dW. At
    the targets g is 0; their logits, gradient and products are of the unquantised x and W.
    """
    (a, _, c), at_targets_TV = SOFTCAP, is_target(problem)
    x_TD, w_DV = operands(problem, fp8=False)
    z_TV = torch.where(at_targets_TV, x_TD @ w_DV, logits(problem, causes))
    loss_T, lse_T, dz_TV, _ = reference.softcap_ce_grad(z_TV, **problem.loss._asdict())
    total_T = weight_of_targets(problem.loss)
    rows_T1 = (total_T * (a / c) * (a - lse_T).exp())[:, None]
    targets_TV = dz_TV * at_targets_TV
    g_TV = (dz_TV - targets_TV) / rows_T1
    if OTHERS in causes:
        g_scale = torch.tensor(factor_scale(a), dtype=torch.float64)
        g_TV = to_fp8(g_TV, g_scale, E5M2).double() * g_scale
    rows_TD = x_TD * rows_T1
    if OPERANDS in causes:
        scale = x_TD.abs().max() * rows_T1.max() / FP8_MAX[E4M3]
        rows_TD = to_fp8(rows_TD, scale, E4M3).double() * scale
    _, w_f8_DV = operands(problem, OPERANDS in causes)
    dx_TD = (g_TV @ w_f8_DV.mT) * rows_T1 + targets_TV @ w_DV.mT
    return result(loss_T, dx_TD, rows_TD.mT @ g_TV + x_TD.mT @ targets_TV, causes)


def weight_of_targets(loss: Loss) -> Tensor:
    """(T,) float64: of those that a position has."""
    has_prefix_T = loss.prefix_targets_T >= 0
    return ((loss.targets_TN >= 0) * loss.weights_N.double()).sum(1) + has_prefix_T * PREFIX_WEIGHT


def operands(problem: Problem, fp8: bool) -> tuple[Tensor, Tensor]:
    """x and W in float64, as they are or as their e4m3 numbers."""
    if not fp8:
        return problem.x_TD.double(), problem.w_DV.double()
    head = quantize_head(problem.w_DV)
    x_f8 = fp8_quantize(problem.x_TD, head.x_scale)[0]
    return x_f8.double() * head.x_scale, head.w_f8_DV.double() * head.w_scale


def logits(problem: Problem, causes: tuple[str, ...]) -> Tensor:
    x_TD, w_DV = operands(problem, LOGITS in causes)
    return x_TD @ w_DV


def is_target(problem: Problem) -> Tensor:
    """(T, V) bool."""
    loss = problem.loss
    columns_TM = torch.cat([loss.targets_TN, loss.prefix_targets_T[:, None]], 1)
    found_TV = torch.zeros(len(columns_TM), problem.w_DV.shape[1] + 1, dtype=torch.bool)
    found_TV.scatter_(1, columns_TM % found_TV.shape[1], True)  # none goes to the last column
    return found_TV[:, :-1]


def result(loss_T: Tensor, dx_TD: Tensor, dw_DV: Tensor, causes: tuple[str, ...]) -> Result:
    if BF16 in causes:
        dx_TD, dw_DV = dx_TD.bfloat16(), dw_DV.bfloat16()
    return Result(loss_T, dx_TD, dw_DV)


class Form(NamedTuple):
    """One way to compute the head: by its causes, and as the package does."""

    emulated: Callable[[Problem, tuple[str, ...]], Result]
    computed: Callable[[Problem], Result]


def computed(**switches: object) -> Callable[[Problem], Result]:
    return lambda problem: differentiated(problem, torch.bfloat16, fp8=True, **switches)


FORMS = {
    "logits in memory, as the record": Form(drop_in, computed(round_sigmoid=True)),
    "the same, σ not rounded": Form(partial(drop_in, round_sigmoid=False), computed()),
    "no logits in memory": Form(fused, computed(form="fused")),
}


def errors(found: Result, exact: Result) -> list[float]:
    """Of loss, dX and dW."""
    pairs = zip(found, exact, strict=True)
    return [((mine - ref64).norm() / ref64.norm()).item() for mine, ref64 in pairs]


def format_error(dtype: torch.dtype) -> float:
    """√(mean error²/mean x²) of x rounded to `dtype`, whose log is even over a binade: an error is
    even within half a step of ε·2^e, and x² is 1.5/ln 2 · 4^e on average."""
    return torch.finfo(dtype).eps / 12**0.5 / (1.5 / math.log(2)) ** 0.5


def table(problem: Problem) -> str:
    exact, rows = differentiated(problem, torch.float64), []
    for name, form in FORMS.items():
        together = errors(form.emulated(problem, CAUSES), exact)
        alone = [errors(form.emulated(problem, (cause,)), exact) for cause in CAUSES]
        found = errors(form.computed(problem), exact)
        for what, *parts, total, ours in zip(GRADIENTS, *alone, together, found, strict=True):
            rows.append((name, what, *map(percent, (*parts, math.hypot(*parts), total, ours))))
    bf16 = errors(differentiated(problem, torch.bfloat16), exact)
    for what, ours in zip(GRADIENTS, bf16, strict=True):
        rows.append(("bf16, no FP8", what, *[""] * (len(CAUSES) + 2), percent(ours)))
    return markdown_table(("form, % off", "of", *CAUSES, "√Σ²", "all", "head_loss"), rows)


def percent(error: float) -> str:
    return f"{100 * error:.2f}"


def magnitudes(problem: Problem) -> str:
    """How the numbers lie in their formats, by the scales that the record has."""
    x_TD, w_DV = operands(problem, fp8=False)
    *_, dz_TV, _ = reference.softcap_ce_grad(x_TD @ w_DV, **problem.loss._asdict())
    scale = quantize_head(problem.w_DV).dz_scale.double()
    lost = to_fp8(dz_TV, scale, E5M2).double() == 0
    share = (dz_TV * is_target(problem)).norm() / dz_TV.norm()
    softmax_TV = reference.softcap(x_TD @ w_DV, *SOFTCAP).softmax(1)
    nats = -(softmax_TV * softmax_TV.clamp(min=1e-300).log()).sum(1).mean()
    return (
        f"max|x| {x_TD.abs().max():.1f} (clamped at 100), max|W| {w_DV.abs().max():.2f} (at 1.6), "
        f"max|dz| {dz_TV.abs().max():.2f} (at {scale * FP8_MAX[E5M2]:.0f}), targets have "
        f"{100 * share:.0f} % of its norm, {100 * lost.double().mean():.1f} % of its entries "
        f"become 0, {100 * (dz_TV * lost).norm() / dz_TV.norm():.3f} % of the norm; "
        f"softmax {nats:.2f} nats"
    )


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem]]:
    kinds = {
        "at the start": ("any",),
        "aligned": ("drawn", "likeliest"),
        "large columns": ("drawn",),
    }
    for name, targets in kinds.items():
        for kind in targets:
            made = made_up(HEADS[name], kind, args.tokens, args.columns)
            yield f"{name}, {kind} targets", made
    yield f"tiny after {args.steps} steps", trained_tiny(args.text, args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="trains tiny on this file (default: as train)")
    parser.add_argument("--steps", type=int, default=100, help="of training tiny (100)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the made-up problems")
    parser.add_argument("--columns", type=int, default=8192, help="of the made-up problems")
    args = parser.parse_args()
    for dtype in (E4M3, E5M2):
        print(f"{dtype}: {percent(format_error(dtype))} %")
    for name, problem in problems(args):
        (num_tokens, dim), num_columns = problem.x_TD.shape, problem.w_DV.shape[1]
        print(f"\n{name}: T={num_tokens}, D={dim}, V={num_columns}; {magnitudes(problem)}")
        print(f"{table(problem)}", flush=True)


if __name__ == "__main__":
    main()
