"""Guards of a run's numbers: losses and gradients that aren't finite, losses far above their trend.

What is looked at, and when, is `GuardConfig`'s. A step that goes wrong is dumped (`step_dump`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from speedrun import nonfinite, step_dump
from speedrun.comms import Comms
from speedrun.config import Config, GuardConfig, OptimConfig
from speedrun.data import StepBatch
from speedrun.failures import Watchdog
from speedrun.runlog import BadLoss, RunError, RunLog
from speedrun.schedule import StepPlan
from speedrun.step_dump import Origin

TREND_STEPS = 64  # losses that a trend is fitted to
TREND_LEAST = 32  # with fewer, nothing is an outlier
SEARCH_S = 600.0  # a step by uncompiled passes, tensor by tensor, and its files
KEPT_STEPS = 32  # batches: further than the host runs ahead of the device


class LossTrend:
    """A straight line through the last losses of a stage, and how far they spread around it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=TREND_STEPS)
        self.stage: int | None = None

    def z(self, plan: StepPlan, loss: float) -> float:
        """Standard deviations by which the next loss is above the line; 0 while there is none.

        A new stage, with lengths and targets of its own, has a new line.
        """
        count = len(self.losses)
        if plan.stage != self.stage or count < TREND_LEAST:
            return 0.0
        y, x = np.array(self.losses), np.arange(count) - (count - 1) / 2
        mean, slope = y.mean(), x @ y / (x @ x)
        deviation = math.sqrt(((y - mean - slope * x) ** 2).sum() / (count - 2))
        above = loss - (mean + slope * (count + 1) / 2)
        return float(above / max(deviation, 1e-6 * abs(mean)))  # below that is rounding

    def add(self, plan: StepPlan, loss: float) -> None:
        """Outliers too, so that a level that stays is soon the trend."""
        if plan.stage != self.stage:
            self.stage = plan.stage
            self.losses.clear()
        self.losses.append(loss)

    def state(self) -> dict[str, Any]:
        """For JSON, and `restore`."""
        return {"losses": list(self.losses), "stage": self.stage}

    def restore(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]
        self.losses = deque(state["losses"], maxlen=TREND_STEPS)


def rate_keys(config: OptimConfig) -> str:
    """The settings of the learning rates in use, for messages."""
    keys = []
    if config.muon_table:
        rule = config.matrix_rule
        keys.append(f"optim.{rule}.{'matrix_lr' if rule == 'adamw' else 'lr'}")
    if config.adam_table:
        keys.append(f"optim.{config.vector_rule}.lr")
    return " or ".join(keys)


def check_of(config: GuardConfig, device: torch.device) -> Literal["loss", "gradient", "step"]:
    """What `check` means on this device."""
    if config.check != "auto":
        return config.check
    skips = config.skip_nonfinite or config.skip_z > 0
    return "step" if skips or device.type == "cpu" else "loss"


class Guard:
    """Runs each step's forward and backward pass, and looks at what they give.

    In `with` around the training: a BadLoss that comes out there becomes a RunError that says what
    to do, and the step's dump. `prefix_table`: (V,), once there is one.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        comms: Comms,
        log: RunLog,
        origin: Origin,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.model, self.comms, self.log = config, model, comms, log
        self.origin, self.watchdog = origin, watchdog
        self.folder = comms.gather_objects(log.folder)[0]
        self.check = check_of(config.guards, model.embed.device)
        self.prefix_table: Tensor | None = None
        self.trend, self.logged_trend = LossTrend(), LossTrend()
        self.kept: deque[tuple[int, StepBatch]] = deque(maxlen=KEPT_STEPS)

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, BadLoss):
            with self.watchdog.phase("keeping the bad step", allowed_s=SEARCH_S):
                found = [f"parameter {text}" for text in nonfinite.bad_tensors(self._parameters())]
                raise self._refusal(error.trained_step, str(error), found[:1]) from None

    def run(
        self, plan: StepPlan, batch: StepBatch, compute: Callable[[], Tensor]
    ) -> tuple[Tensor, bool]:
        """(this rank's summed loss, whether the update may be made).

        compute: the step's passes; leaves gradients and gives that loss. Where the update may not
        be made, all ranks learn so, and the loss may be anything. RunError for a step that isn't
        finite, on all ranks, if it is checked before its update.
        """
        self.kept.append((plan.step, batch))
        if self.check == "loss":
            return compute(), True
        scales = self._scales()
        loss = compute()
        # One number for both: a NaN gradient is one NaN more in the loss's sum over the ranks.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        marked = loss + 0.0 * get_total_norm(gradients).to(loss.dtype)
        if self.check == "gradient":
            return marked, True
        totals = torch.stack([loss, marked])
        self.comms.all_reduce_sum([totals])
        mean, marked_mean = (totals / plan.tokens_per_step).tolist()
        problem = self._problem(plan, mean, marked_mean)
        if problem is None:
            return loss, True
        self._put_back(scales)
        if math.isfinite(marked_mean) or self.config.guards.skip_nonfinite:
            line = f"step {plan.step}: {problem}; its update is left out"
            self.log.note("left_out", line, step=plan.step, train_loss=mean)
            return loss, False
        with self.watchdog.phase("search for the first bad tensor", allowed_s=SEARCH_S):
            raise self._refusal(
                plan.step,
                f"step {plan.step}: {problem}",
                self._first_of_all_ranks(compute, scales),
                weights=self.model.state_dict(),
            )

    def look(self, plan: StepPlan, loss: float) -> None:
        """Says so in the log where the mean loss of a step is far above its trend."""
        if self.log.folder is None:  # on rank 0 alone
            return
        z, at_least = self.logged_trend.z(plan, loss), self.config.guards.alarm_z
        self.logged_trend.add(plan, loss)
        if z >= at_least > 0:
            line = (
                f"step {plan.step}: the training loss {loss:.4f} is {z:.1f} standard deviations "
                f"above the trend of the {len(self.logged_trend.losses) - 1} steps before"
            )
            self.log.note("outlier", line, step=plan.step, train_loss=loss, z=z)

    def _problem(self, plan: StepPlan, mean: float, marked_mean: float) -> str | None:
        if not math.isfinite(mean):
            return f"the training loss is {mean}"
        if not math.isfinite(marked_mean):
            return f"the gradients' norm isn't finite (the training loss is {mean:.4f})"
        z, at_least = self.trend.z(plan, mean), self.config.guards.skip_z
        self.trend.add(plan, mean)
        if z >= at_least > 0:
            return f"the training loss {mean:.4f} is {z:.1f} standard deviations above its trend"
        return None

    def _scales(self) -> dict[str, Tensor]:
        """FP8's, which a step leaves to the next: copies, for a step that mustn't."""
        return {n: b.clone() for n, b in self.model.named_buffers() if "." in n}

    def _put_back(self, scales: dict[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            if name in scales:
                buffer.copy_(scales[name])

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p.data) for name, p in self.model.named_parameters()]

    def _first_of_all_ranks(
        self, compute: Callable[[], Tensor], scales: dict[str, Tensor]
    ) -> list[str]:
        """What each rank's step, run again, finds first; ranks without a finding say nothing."""
        try:
            first = nonfinite.find(self.model, compute).first
        except RuntimeError as error:  # memory, most of all: uncompiled passes need more
            first = f"unknown, since the step couldn't be run again ({error})"
        self._put_back(scales)
        found = self.comms.gather_objects(first)
        if self.comms.world_size == 1:
            return [first or "nothing, when the step was run again, uncompiled"]
        return [f"rank {rank}, {text}" for rank, text in enumerate(found) if text]

    def _refusal(
        self,
        step: int,
        problem: str,
        first: list[str],
        weights: dict[str, Tensor] | None = None,
    ) -> RunError:
        """The error that ends the run, its step dumped."""
        lines = [f"{problem}; the run is stopped."]
        if first:
            lines.append(f"Not finite first: {'; '.join(first)}")
        dumped = self._dump(step, problem, weights)
        self.comms.gather_objects(None)  # a rank that left now would take along who still writes
        lines += [dumped] if dumped else []
        if self.check == "gradient":
            lines.append("guards.check=gradient: a gradient that is nan makes the loss nan, too.")
        if self.check != "step":
            lines.append("With --set guards.check=step the first bad tensor is named.")
        precision = ", or try --set precision=float32"
        lines.append(
            f"Lower {rate_keys(self.config.optim)} by --set"
            + ("" if self.origin.precision.dtype == torch.float32 else precision)
        )
        return RunError("\n  ".join(lines))

    def _dump(self, step: int, problem: str, weights: dict[str, Tensor] | None) -> str:
        """Each rank what it trained on, rank 0 the rest; a line on where it is."""
        batch = dict(self.kept).get(step)
        if batch is None or self.folder is None:
            return ""
        folder = self.folder / f"bad_step_{step:06d}"
        table = None if self.prefix_table is None else self.prefix_table.cpu().numpy()
        try:
            step_dump.write_rank(folder, self.comms.rank, batch, table)
            if self.comms.rank == 0:
                step_dump.write_step(
                    folder, self.origin, step, problem, self.comms.world_size, weights
                )
        except (OSError, RuntimeError) as error:  # torch.save makes the former the latter
            return f"Its batch couldn't be kept in {folder} ({error})."
        return f"Its batch is kept: speedrun replay {folder}"
