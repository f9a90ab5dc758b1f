"""Update rules by name: what each makes of a gradient, and the state that it keeps.

A new rule is a class here, its numbers in `OptimConfig`, and its name in `RULES` and among those of
`OptimConfig.matrix_rule` or `vector_rule`. A rule sees the shard of one rank: B whole matrices
(M × N) of a bank, or some rows of another parameter. The arithmetic is in the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from speedrun.config import AdamRow, MuonRow, OptimConfig
from speedrun.ops.adam_step import AdamTensor, adam_step, adamw_step
from speedrun.ops.normuon_step import normuon_step
from speedrun.ops.polar_express import S4, PolarExpress, momentum_polar_express
from speedrun.schedule import StepPlan


class Shard(NamedTuple):
    """What a rule updates: a rank's rows of a parameter, and their gradient in the same type."""

    rule: Any  # an UpdateRule, of the class whose `update` gets it
    weight: Tensor
    grad: Tensor


class UpdateRule(Protocol):
    """Made for a shard, `weight`, whose first matrix or row is number `first` of the parameter.

    `state`: its tensors by name, zeros at the start. `numbers`: float64; the optimizer moves them
    to the weight's device, and writes `next_numbers` there before an update. So whatever changes
    from step to step is read by the device, and a step's launches can be captured and replayed.
    """

    state: dict[str, Tensor]
    numbers: Tensor

    def __init__(
        self, row: MuonRow | AdamRow, config: OptimConfig, weight: Tensor, first: int
    ) -> None: ...

    def next_numbers(self, plan: StepPlan) -> list[float]:
        """Those of the update that begins; as many in every step."""

    @staticmethod
    def update(shards: Sequence[Shard]) -> None:
        """Change shards of rules of this class in place, in as few launches as they allow."""


class NorMuon:
    """RECIPE section 4: Polar Express, variance per row or column, cautious decay ∝ lr²."""

    def __init__(self, row: MuonRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.config = config
        self.polar = polar_spec(config.normuon.polar_form, config.normuon.polar_norm)
        self.dtype = PRECISIONS.get(config.normuon.polar_precision, weight.dtype)
        B, M, N = weight.shape
        self.state = {
            "momentum": state_like(weight),
            "second": state_like(weight, B, *((M, 1) if M >= N else (1, N))),
        }
        self.state |= exact_state(weight, config)
        self.lr_muls_B = matrix_lr_muls(row, weight, first) * shape_factor(weight)
        self.numbers = torch.zeros(2 + B, dtype=torch.float64)

    def next_numbers(self, plan: StepPlan) -> list[float]:
        normuon = self.config.normuon
        rate = normuon.lr * plan.lr
        lr_B = (self.lr_muls_B * rate).tolist()
        return [rounded(plan.momentum, self.lr_muls_B), normuon.wd * rate, *lr_B]

    @staticmethod
    def update(shards: Sequence[Shard]) -> None:
        config = shards[0].rule.config
        for (rule, weight, _), o in zip(shards, directions(shards), strict=True):
            normuon_step(
                weight,
                rule.state.get("low"),
                o,
                rule.state["second"] if config.variance_rescale else None,
                rule.numbers[2:],
                rule.numbers[1],
                beta2=config.normuon.beta2,
                cautious=config.cautious_decay,
                nearest=config.weight_rounding == "nearest",
            )


class Muon:
    """RECIPE section 7, the public baseline's: one polynomial many times, decay ∝ lr everywhere."""

    def __init__(self, row: MuonRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.config, muon = config, config.muon
        coefficients = (muon.ns_coefficients,) * muon.ns_steps
        self.polar = PolarExpress(coefficients, norm_factor=1.0, eps=1e-7)
        self.dtype = PRECISIONS.get(muon.ns_precision, weight.dtype)
        self.state = {"momentum": state_like(weight)} | exact_state(weight, config)
        self.lr_muls_B = matrix_lr_muls(row, weight, first)
        self.step_factor = shape_factor(weight)
        self.numbers = torch.zeros(1 + 2 * len(weight), dtype=torch.float64)

    def next_numbers(self, plan: StepPlan) -> list[float]:
        lr_B = self.lr_muls_B * (self.config.muon.lr * plan.lr)
        step_lr_B = lr_B * self.step_factor  # of the step alone, not of the decay
        return [rounded(plan.momentum, lr_B), *step_lr_B.tolist(), *lr_B.tolist()]

    @staticmethod
    def update(shards: Sequence[Shard]) -> None:
        config = shards[0].rule.config
        for (rule, weight, _), o in zip(shards, directions(shards), strict=True):
            step_lr_B, lr_B = rule.numbers[1:].chunk(2)
            normuon_step(
                weight,
                rule.state.get("low"),
                o,
                None,
                step_lr_B,
                config.muon.wd,
                beta2=0.0,  # of no variance
                decay_lr_B=lr_B,
                cautious=False,
                nearest=config.weight_rounding == "nearest",
            )


def directions(shards: Sequence[Shard]) -> list[Tensor]:
    """Momentum and orthogonalisation of all shards together, as rules of one config have them."""
    rules = [shard.rule for shard in shards]
    return momentum_polar_express(
        [shard.grad for shard in shards],
        [rule.state["momentum"] for rule in rules],
        rules[0].numbers[0],
        rules[0].dtype,
        rules[0].polar,
    )


class Adam:
    """RECIPE section 4: decay ∝ lr², cautious; moments in fp32, or bf16."""

    def __init__(self, row: AdamRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.row, self.config = row, config
        self.state = adam_state(weight, row.moments)
        self.numbers = torch.zeros(2, dtype=torch.float64)
        if row.sparse:  # which rows have ever had a gradient: the others need no work
            self.state["seen"] = torch.zeros(
                weight.shape[:-1], dtype=torch.bool, device=weight.device
            ).flatten()

    def next_numbers(self, plan: StepPlan) -> list[float]:
        adam, row, t = self.config.adam, self.row, counted(self.state)
        lr = adam.lr * plan.lr * row.lr_mul
        correction = (1 - row.beta2**t) ** 0.5 / (1 - row.beta1**t)
        return [lr * correction, lr * lr * adam.wd * row.wd_mul]

    @staticmethod
    def update(shards: Sequence[Shard]) -> None:
        config = shards[0].rule.config
        tensors = [
            AdamTensor(
                weight,
                grad,
                rule.state["exp_avg"],
                rule.state["exp_avg_sq"],
                rule.numbers,
                rule.row.beta1,
                rule.row.beta2,
                rule.state.get("seen"),
            )
            for rule, weight, grad in shards
        ]
        adam_step(tensors, eps=config.adam.eps, cautious=config.cautious_decay)


class AdamW:
    """arXiv 1711.05101, of any parameter: decay ∝ lr everywhere; moments in fp32.

    Banks of matrices have its `matrix_` numbers. (The public baseline keeps bf16 moments for its
    bf16 embedding.)
    """

    def __init__(
        self, row: MuonRow | AdamRow, config: OptimConfig, weight: Tensor, first: int
    ) -> None:
        adamw = config.adamw
        self.eps, self.state = adamw.eps, adam_state(weight)
        if isinstance(row, MuonRow):
            self.lr = matrix_lr_muls(row, weight, first).view(-1, 1, 1) * adamw.matrix_lr
            self.wd, (self.beta1, self.beta2) = adamw.wd, adamw.matrix_betas
        else:
            self.lr = torch.tensor(adamw.lr * row.lr_mul, dtype=torch.float64)
            self.wd, self.beta1, self.beta2 = adamw.wd * row.wd_mul, row.beta1, row.beta2
        self.numbers = torch.zeros(1 + self.lr.numel(), dtype=torch.float64)

    def next_numbers(self, plan: StepPlan) -> list[float]:
        return [float(counted(self.state)), *(self.lr * plan.lr).flatten().tolist()]

    @staticmethod
    def update(shards: Sequence[Shard]) -> None:
        for rule, weight, grad in shards:
            exp_avg = rule.state["exp_avg"]
            adamw_step(
                weight,
                grad,
                exp_avg,
                rule.state["exp_avg_sq"],
                step=rule.numbers[0],
                lr=rule.numbers[1:].view(rule.lr.shape).to(exp_avg.dtype),
                wd=rule.wd,
                beta1=rule.beta1,
                beta2=rule.beta2,
                eps=rule.eps,
            )


RULES: dict[str, type[UpdateRule]] = {
    "normuon": NorMuon,
    "muon": Muon,
    "adam": Adam,
    "adamw": AdamW,
}

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # "weight": that of the weights


def polar_spec(form: Literal["standard", "gram"], norm: Literal["frobenius", "s4"]) -> PolarExpress:
    """What `NorMuonConfig.polar_form` and `polar_norm` stand for."""
    return replace(S4 if norm == "s4" else PolarExpress(), form=form)


def state_like(weight: Tensor, *shape: int) -> Tensor:
    """Zeros of the weight's shape, or of another, in fp32 or in its own type if wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape or weight.shape, dtype=dtype, device=weight.device)


def exact_state(weight: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    """The low 16 bits of exact weights, where the parameter is bf16 and these are asked for."""
    if weight.dtype != torch.bfloat16 or not config.exact_weights:
        return {}
    return {"low": torch.zeros_like(weight, dtype=torch.int16)}


def adam_state(weight: Tensor, moments: str = "fp32") -> dict[str, Tensor]:
    """Moments, and the number of updates (on the host, where it is read)."""
    dtype = torch.bfloat16 if moments == "bf16" else state_like(weight, 0).dtype
    names = ("exp_avg", "exp_avg_sq")
    state = {n: torch.zeros(weight.shape, dtype=dtype, device=weight.device) for n in names}
    return state | {"t": torch.zeros((), dtype=torch.int64)}


def counted(state: dict[str, Tensor]) -> int:
    """The number of the update that begins, from 1."""
    state["t"] += 1
    return int(state["t"])


def matrix_lr_muls(row: MuonRow, weight: Tensor, first: int) -> Tensor:
    """(B,) on the host: `lr_muls` for the matrices of a shard; they repeat over the whole bank.

    In the state's type: that is the one in which they are multiplied with a step's rate.
    """
    lr_muls = [row.lr_muls[(first + b) % len(row.lr_muls)] for b in range(len(weight))]
    return torch.tensor(lr_muls, dtype=state_like(weight, 0).dtype)


def rounded(number: float, like: Tensor) -> float:
    """To the type of `like`, as the public program rounds μ before it subtracts it from 1."""
    return torch.tensor(number, dtype=like.dtype).item()


def shape_factor(weight: Tensor) -> float:
    """√max(1, m/n): tall matrices take longer steps."""
    return max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
