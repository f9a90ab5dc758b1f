"""NorMuon for the banks of matrices and Adam for the rest, over a typed parameter table.

The arithmetic is in the operators (`polar_express`, `normuon_step`, `adam_step`); this file says
which parameter gets what, when, and in which order gradients are reduced. RECIPE section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from speedrun.comms import Comms
from speedrun.config import AdamRow, ConfigError, MuonRow, OptimConfig
from speedrun.ops.adam_step import adam_step
from speedrun.ops.normuon_step import momentum_step, variance_rescale, weight_update
from speedrun.ops.polar_express import polar_express
from speedrun.schedule import StepPlan


class MuonBank:
    """State of one bank: B matrices of M × N. bf16 weights keep 16 low bits apart."""

    def __init__(self, row: MuonRow, param: nn.Parameter) -> None:
        self.row, self.param = row, param
        self.weight_BMN = param.data.view(-1, *param.shape[-2:])
        B, M, N = self.weight_BMN.shape
        device = param.device
        state_dtype = torch.promote_types(param.dtype, torch.float32)
        self.momentum_BMN = torch.zeros(B, M, N, dtype=state_dtype, device=device)
        second_shape = (B, M, 1) if M >= N else (B, 1, N)
        self.second = torch.zeros(second_shape, dtype=state_dtype, device=device)
        self.low_BMN = None
        if param.dtype == torch.bfloat16:
            self.low_BMN = torch.zeros(B, M, N, dtype=torch.int16, device=device)
        repeats = -(-B // len(row.lr_muls))
        lr_muls = torch.tensor(row.lr_muls * repeats, dtype=state_dtype)[:B]
        self.lr_muls_B11 = (lr_muls * max(1.0, M / N) ** 0.5).view(-1, 1, 1).to(device)

    def tensors(self) -> list[Tensor]:
        low = [] if self.low_BMN is None else [self.low_BMN]
        return [self.param.data, self.momentum_BMN, self.second, *low]

    def step(self, config: OptimConfig, lr: float, mu: float) -> None:
        grad = self.param.grad.view_as(self.weight_BMN)
        nesterov = momentum_step(grad, self.momentum_BMN, mu)
        o = polar_express(nesterov, self.weight_BMN.dtype)
        o = variance_rescale(o, self.second, config.muon_beta2)
        rate = config.muon_lr * lr
        wd = config.muon_wd * rate
        weight_update(self.weight_BMN, self.low_BMN, o, self.lr_muls_B11 * rate, wd)


class AdamParam:
    """State of one parameter. Moments in fp32 (or the parameter's wider type)."""

    def __init__(self, row: AdamRow, param: nn.Parameter) -> None:
        self.row, self.param = row, param
        dtype = torch.promote_types(param.dtype, torch.float32)
        self.exp_avg = torch.zeros_like(param, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(param, dtype=dtype)
        self.num_updates = 0

    def tensors(self) -> list[Tensor]:
        return [self.param.data, self.exp_avg, self.exp_avg_sq]

    def step(self, config: OptimConfig, lr: float) -> None:
        self.num_updates += 1
        rate = config.adam_lr * lr * self.row.lr_mul
        adam_step(
            self.param.data,
            self.param.grad,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.num_updates,
            lr=rate,
            decay=rate * rate * config.adam_wd * self.row.wd_mul,
            beta1=self.row.beta1,
            beta2=self.row.beta2,
            eps=config.adam_eps,
        )


class Optimizer:
    """Every parameter of a model with the row of the table that names it.

    Raises ConfigError when a parameter has no row, or two. A row without a parameter is fine: a
    table serves models with a technique switched off. `buffers`: gives what
    else a step changes in the model, for snapshots only.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        comms: Comms,
        buffers: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.config, self.comms, self.buffers = config, comms, buffers
        names = [row.name for row in (*config.muon_table, *config.adam_table)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"muon_table and adam_table name {', '.join(twice)} more than once")
        muon = {row.name: row for row in config.muon_table}
        adam = {row.name: row for row in config.adam_table}
        self.banks: list[MuonBank] = []
        self.adams: list[AdamParam] = []
        for name, param in named_parameters:
            if name not in names:
                raise ConfigError(f"parameter {name!r} needs a row in muon_table or adam_table")
            if name in muon:
                self.banks.append(MuonBank(muon[name], param))
            else:
                self.adams.append(AdamParam(adam[name], param))

    @torch.no_grad()
    def step(self, plan: StepPlan) -> None:
        """Reduce the gradients that are due, update their parameters, clear those gradients.

        Adam's gradients stay and add up between its updates. A missing gradient counts as zero.
        """
        due: Sequence[MuonBank | AdamParam] = self.banks
        if plan.adam:
            due = [*self.banks, *self.adams]
        for item in due:
            if item.param.grad is None:
                item.param.grad = torch.zeros_like(item.param)
        self.comms.all_reduce_sum([item.param.grad for item in due])
        for item in due:
            if isinstance(item, MuonBank):
                item.step(self.config, plan.lr, plan.momentum)
            else:
                item.step(self.config, plan.lr)
            item.param.grad = None

    def snapshot(self) -> list[Tensor]:
        """Copies of parameters, buffers and state, for `restore`; taken before the warm-up."""
        return [t.clone() for t in self._tensors()]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Put a snapshot back, bitwise, and forget gradients and update counts."""
        for t, saved in zip(self._tensors(), snapshot, strict=True):
            t.copy_(saved)
        for item in [*self.banks, *self.adams]:
            item.param.grad = None
        for adam in self.adams:
            adam.num_updates = 0

    def _tensors(self) -> list[Tensor]:
        state = [t for item in [*self.banks, *self.adams] for t in item.tensors()]
        return [*state, *self.buffers()]
