"""How far the head's gradients are from float64's, by form.

    python -m benchmarks.head_error [--text FILE] [--steps N] [--tokens T] [--columns V]

‖found − exact‖/‖exact‖ of loss, dX and dW, where exact is the plain expression in float64 of the
same bf16 numbers. Problems: heavy-tailed logits with two kinds of targets, and the head of recipe
`tiny` after some steps (100), on the step behind them. Runs on a CPU, by the reference, whose
roundings are the kernels'.

The last form is none of the package's: it has no logits in memory. What it computes is emulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import markdown_table
from speedrun import recipes, train
from speedrun.batch import shifted_targets
from speedrun.comms import Comms
from speedrun.ops.fp8_matmul import fp8_matmul
from speedrun.ops.fp8_quantize import fp8_quantize
from speedrun.ops.head_loss import head_loss, quantize_head
from speedrun.optim import Optimizer
from speedrun.reference import softcap_ce as reference
from speedrun.reference.softcap_ce import Loss
from speedrun.schedule import Schedule, scaled
from speedrun.sources import model_for, open_data, to_micro_batches, training_loader

SOFTCAP = (23.0, 5.0, 7.5)  # RECIPE section 3
DIM = 768
WEIGHTS = (1.0, 0.5, 0.25)  # of the first stage's targets
PREFIX_WEIGHT = 0.25
E5M2 = torch.float8_e5m2
LARGEST_E5M2 = torch.finfo(E5M2).max


class Problem(NamedTuple):
    x_TD: Tensor  # bf16
    w_DV: Tensor  # bf16
    loss: Loss


class Result(NamedTuple):
    loss_T: Tensor
    dx_TD: Tensor
    dw_DV: Tensor


def heavy_tailed(num_tokens: int, num_columns: int, drawn: bool) -> Problem:
    """Columns of W have lognormal norms. Targets are any columns, or `drawn` from the softmax, as
    if the model were right; then many of them are near the cap, where the slope is small."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_TD = torch.nn.functional.rms_norm(random(num_tokens, DIM), (DIM,)).bfloat16()
    norms_V = 0.1 * (0.7 * random(num_columns)).exp()
    w_DV = (random(DIM, num_columns) * norms_V).clamp(-1.6, 1.6).bfloat16()
    logits = reference.softcap(x_TD.float() @ w_DV.float(), *SOFTCAP)
    shares = logits.softmax(1) if drawn else torch.ones_like(logits)
    targets_TN = shares.multinomial(len(WEIGHTS), generator=generator)
    prefixes_T = torch.randint(-1, num_columns, (num_tokens,), generator=generator)
    return Problem(x_TD, w_DV, make_loss(targets_TN, prefixes_T))


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


def exact_gradient_of_logits(problem: Problem) -> Result:
    """FP8 x and W, but logits and their gradient in float64: what no form can do better."""
    (x_TD, w_DV), loss = fp8_operands(problem), problem.loss
    loss_T, _, dz_TV, _ = reference.softcap_ce_grad(x_TD @ w_DV, **loss._asdict())
    return Result(loss_T, (dz_TV @ w_DV.mT).bfloat16(), (x_TD.mT @ dz_TV).bfloat16())


def without_logits(problem: Problem) -> Result:
    """The logits' GEMM stores g = exp(a·(σ − 1))·σ·(1 − σ) alone, as e5m2 with one scale for all.

    The softmax's row factors multiply dX's rows and, before their cast, the rows of x for dW; the
    targets' part is added in bf16's numbers, and not through e5m2.
    """
    (a, _, c), (x_TD, w_DV) = SOFTCAP, problem[:2]
    head = quantize_head(w_DV)
    x_f8 = fp8_quantize(x_TD, head.x_scale)[0]
    z_TV = fp8_matmul(x_f8, head.w_f8_VD, head.x_scale, head.w_scale, out_dtype=torch.float32)
    loss = problem.loss._asdict()
    loss_T, lse_T, dz_TV, _ = reference.softcap_ce_grad(z_TV, **loss)
    sigmoid = reference.softcap(z_TV, *SOFTCAP) / a
    slope = sigmoid * (1 - sigmoid)
    g = (a * (sigmoid - 1)).exp() * slope
    s = 1 - 1 / a  # where g is largest
    g_scale = torch.tensor(s * (1 - s)).div(torch.e * LARGEST_E5M2)
    g_f8 = (g / g_scale).clamp(max=LARGEST_E5M2).to(E5M2)
    exists_TN = problem.loss.targets_TN >= 0
    prefix_T = problem.loss.prefix_targets_T >= 0
    total_T = (exists_TN * problem.loss.weights_N).sum(1) + prefix_T * PREFIX_WEIGHT
    row_T = total_T * (a / c) * (a - lse_T).exp()
    targets_TV = dz_TV - row_T[:, None] * g  # minus the targets' weights, 0 elsewhere

    w_f8_DV = head.w_f8_DV
    dx = fp8_matmul(g_f8, w_f8_DV, g_scale, head.w_scale, out_dtype=torch.float32, row_scale=row_T)
    dx = dx + targets_TV @ w_DV.float().mT
    scaled_x = x_TD * row_T[:, None]
    x_scale = scaled_x.abs().max() / 448
    _, x_f8_t, _ = fp8_quantize(scaled_x, x_scale, transposed=True)
    dw = fp8_matmul(x_f8_t, g_f8.mT.contiguous(), x_scale, g_scale, out_dtype=torch.float32)
    dw = dw + x_TD.float().mT @ targets_TV
    return Result(loss_T, dx.bfloat16(), dw.bfloat16())


def fp8_operands(problem: Problem) -> tuple[Tensor, Tensor]:
    """x and W as their e4m3 numbers, in float64."""
    head = quantize_head(problem.w_DV)
    x_f8 = fp8_quantize(problem.x_TD, head.x_scale)[0]
    return x_f8.double() * head.x_scale, head.w_f8_DV.double() * head.w_scale


FORMS: dict[str, Callable[[Problem], Result]] = {
    "bf16": lambda p: differentiated(p, torch.bfloat16),
    "FP8, σ rounded as in the record": lambda p: differentiated(
        p, torch.bfloat16, fp8=True, round_sigmoid=True
    ),
    "FP8, σ not rounded": lambda p: differentiated(p, torch.bfloat16, fp8=True),
    "FP8 operands, exact gradient of the logits": exact_gradient_of_logits,
    "without logits in memory, emulated": without_logits,
}


def errors(found: Result, exact: Result) -> list[float]:
    """Of loss, dX and dW."""
    pairs = zip(found, exact, strict=True)
    return [((mine - ref64).norm() / ref64.norm()).item() for mine, ref64 in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="trains tiny on this file (default: as train)")
    parser.add_argument("--steps", type=int, default=100, help="of training tiny (100)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the heavy-tailed problem")
    parser.add_argument("--columns", type=int, default=8192, help="of the heavy-tailed problem")
    args = parser.parse_args()
    size = (args.tokens, args.columns)
    problems = {
        "heavy-tailed logits, any targets": lambda: heavy_tailed(*size, drawn=False),
        "heavy-tailed logits, likely targets": lambda: heavy_tailed(*size, drawn=True),
        f"tiny after {args.steps} steps": lambda: trained_tiny(args.text, args.steps),
    }
    for name, make in problems.items():
        problem = make()
        (num_tokens, dim), num_columns = problem.x_TD.shape, problem.w_DV.shape[1]
        exact = differentiated(problem, torch.float64)
        rows = [
            (form, *(f"{error:.2%}" for error in errors(function(problem), exact)))
            for form, function in FORMS.items()
        ]
        print(f"\n{name}: T={num_tokens}, D={dim}, V={num_columns}")
        print(markdown_table(("form", "loss", "dX", "dW"), rows), flush=True)


if __name__ == "__main__":
    main()
