"""Update rules by name: what each makes of a gradient, and the state that it keeps.

A new rule is a class here, its numbers in `OptimConfig`, and its name in `RULES` and among those of
`OptimConfig.matrix_rule` or `vector_rule`. A rule sees the shard of one rank: B whole matrices
(M × N) of a bank, or some rows of another parameter. The arithmetic is in the operators.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from speedrun.config import AdamRow, MuonRow, OptimConfig
from speedrun.ops.adam_step import adam_step, adamw_step
from speedrun.ops.normuon_step import momentum_step, variance_rescale, weight_update
from speedrun.ops.polar_express import orthogonalize, polar_express
from speedrun.schedule import StepPlan


class UpdateRule(Protocol):
    """Made for a shard, `weight`, whose first matrix or row is number `first` of the parameter.

    `state`: its tensors by name, zeros at the start.
    """

    state: dict[str, Tensor]

    def __init__(
        self, row: MuonRow | AdamRow, config: OptimConfig, weight: Tensor, first: int
    ) -> None: ...

    def update(self, weight: Tensor, grad: Tensor, plan: StepPlan) -> None:
        """Change the shard in place. grad has its shape, in the parameter's type."""


class NorMuon:
    """RECIPE section 4: Polar Express, variance per row or column, cautious decay ∝ lr²."""

    def __init__(self, row: MuonRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.config = config
        B, M, N = weight.shape
        self.state = {
            "momentum": state_like(weight),
            "second": state_like(weight, B, *((M, 1) if M >= N else (1, N))),
        }
        self.state |= exact_state(weight, config)
        self.lr_muls_B11 = matrix_lr_muls(row, weight, first) * shape_factor(weight)

    def update(self, weight: Tensor, grad: Tensor, plan: StepPlan) -> None:
        config, state = self.config, self.state
        nesterov = momentum_step(grad, state["momentum"], plan.momentum)
        o = polar_express(nesterov, weight.dtype)
        if config.variance_rescale:
            o = variance_rescale(o, state["second"], config.normuon.beta2)
        rate = config.normuon.lr * plan.lr
        weight_update(
            weight,
            state.get("low"),
            o,
            self.lr_muls_B11 * rate,
            config.normuon.wd * rate,
            cautious=config.cautious_decay,
            nearest=config.weight_rounding == "nearest",
        )


class Muon:
    """RECIPE section 7, the public baseline's: one polynomial many times, decay ∝ lr everywhere."""

    def __init__(self, row: MuonRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.config = config
        self.state = {"momentum": state_like(weight)} | exact_state(weight, config)
        self.lr_muls_B11 = matrix_lr_muls(row, weight, first)

    def update(self, weight: Tensor, grad: Tensor, plan: StepPlan) -> None:
        muon, state = self.config.muon, self.state
        nesterov = momentum_step(grad, state["momentum"], plan.momentum)
        dtype = torch.bfloat16 if muon.ns_precision == "bf16" else weight.dtype
        o = orthogonalize(nesterov, [muon.ns_coefficients] * muon.ns_steps, dtype)
        o = o.to(nesterov.dtype) * shape_factor(weight)  # of the step alone, not of the decay
        weight_update(
            weight,
            state.get("low"),
            o,
            self.lr_muls_B11 * (muon.lr * plan.lr),
            muon.wd,
            cautious=False,
            nearest=self.config.weight_rounding == "nearest",
        )


class Adam:
    """RECIPE section 4: decay ∝ lr², cautious; moments in fp32."""

    def __init__(self, row: AdamRow, config: OptimConfig, weight: Tensor, first: int) -> None:
        self.row, self.config = row, config
        self.state = adam_state(weight)

    def update(self, weight: Tensor, grad: Tensor, plan: StepPlan) -> None:
        adam, row = self.config.adam, self.row
        lr = adam.lr * plan.lr * row.lr_mul
        adam_step(
            weight,
            grad,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            step=counted(self.state),
            lr=lr,
            decay=lr * lr * adam.wd * row.wd_mul,
            beta1=row.beta1,
            beta2=row.beta2,
            eps=adam.eps,
            cautious=self.config.cautious_decay,
        )


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
            self.lr = matrix_lr_muls(row, weight, first) * adamw.matrix_lr
            self.wd, (self.beta1, self.beta2) = adamw.wd, adamw.matrix_betas
        else:
            self.lr, self.wd = adamw.lr * row.lr_mul, adamw.wd * row.wd_mul
            self.beta1, self.beta2 = row.beta1, row.beta2

    def update(self, weight: Tensor, grad: Tensor, plan: StepPlan) -> None:
        adamw_step(
            weight,
            grad,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            step=counted(self.state),
            lr=self.lr * plan.lr,
            wd=self.wd,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
        )


RULES: dict[str, type[UpdateRule]] = {
    "normuon": NorMuon,
    "muon": Muon,
    "adam": Adam,
    "adamw": AdamW,
}


def state_like(weight: Tensor, *shape: int) -> Tensor:
    """Zeros of the weight's shape, or of another, in fp32 or in its own type if wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape or weight.shape, dtype=dtype, device=weight.device)


def exact_state(weight: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    """The low 16 bits of exact weights, where the parameter is bf16 and these are asked for."""
    if weight.dtype != torch.bfloat16 or not config.exact_weights:
        return {}
    return {"low": torch.zeros_like(weight, dtype=torch.int16)}


def adam_state(weight: Tensor) -> dict[str, Tensor]:
    """Moments, and the number of updates (on the host, where it is read)."""
    names = ("exp_avg", "exp_avg_sq")
    return {name: state_like(weight) for name in names} | {"t": torch.zeros((), dtype=torch.int64)}


def counted(state: dict[str, Tensor]) -> int:
    """The number of the update that begins, from 1."""
    state["t"] += 1
    return int(state["t"])


def matrix_lr_muls(row: MuonRow, weight: Tensor, first: int) -> Tensor:
    """(B, 1, 1): `lr_muls` for the matrices of a shard; they repeat over the whole bank."""
    lr_muls = [row.lr_muls[(first + b) % len(row.lr_muls)] for b in range(len(weight))]
    lr_muls_B11 = torch.tensor(lr_muls, dtype=torch.float64).view(-1, 1, 1)
    return state_like(weight, len(weight), 1, 1).copy_(lr_muls_B11)


def shape_factor(weight: Tensor) -> float:
    """√max(1, m/n): tall matrices take longer steps."""
    return max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
