"""The schedule: pure functions from a step to what that step does. The same step, the same plan.

Numbers and names: RECIPE section 5. Steps count from 0; a `StepPlan` for step `total_steps` exists
too and only validates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from speedrun.config import ConfigError, ScheduleConfig, Stage, Windows


@dataclass(frozen=True)
class StepPlan:
    """What one step does. Windows and lengths in tokens; `lr` multiplies the base rates.

    `adam`: Adam parameters are updated, with the gradients of the whole interval; `tied`: embed and
    lm_head are one parameter up to and in this step's update; `split`: they part behind it.
    """

    step: int
    stage: int
    lr: float
    momentum: float
    tokens_per_step: int
    max_seq_len: int
    windows: Windows
    multi_token_weights: tuple[float, ...]
    prefix_weight: float
    fp8_down_own_amax: bool  # FP8 copies of the MLP's down weights use their own amax
    adam: bool
    tied: bool
    split: bool
    validate: bool
    last: bool  # validate, then stop: nothing is trained at this step


class Schedule:
    """All plans of a run: `plan(step)` for 0 <= step <= total_steps, iterable in order."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.stages: tuple[Stage, ...] = config.stages
        ends = stage_ends(config)
        if config.extension is not None:
            self.stages += (config.extension,)
            ends.append(config.total_steps)
        self.starts = [0, *ends[:-1]]
        self.ends = ends
        self.split_step = split_step(config)
        self.windows = stage_windows(config, self.stages)

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    def stage_of(self, step: int) -> int:
        """Index of the stage that trains `step`; the last stage for step == total_steps."""
        for i, end in enumerate(self.ends):
            if step < end:
                return i
        return len(self.ends) - 1

    def plan(self, step: int) -> StepPlan:
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is outside the schedule's 0..{self.total_steps}")
        config, index = self.config, self.stage_of(step)
        stage, last = self.stages[index], step == self.total_steps
        frac = (step - self.starts[index]) / (self.ends[index] - self.starts[index])
        windows = self.windows[index]
        if last and config.final_windows is not None:  # frequencies stay as they were trained
            windows = Windows(*config.final_windows, windows.yarn)
        targets = stage.multi_token_weights if config.multi_token else ((1.0, 1.0),)
        weights = tuple(_between(start, end, frac) for start, end in targets)
        return StepPlan(
            step=step,
            stage=index,
            lr=learning_rate(config, stage, step),
            momentum=momentum(config, step),
            tokens_per_step=stage.tokens_per_step,
            max_seq_len=stage.max_seq_len,
            windows=windows,
            multi_token_weights=weights,
            prefix_weight=_between(*stage.prefix_weight, frac) if config.prefix_loss else 0.0,
            fp8_down_own_amax=step < config.fp8_down_own_amax_steps,
            adam=not last and adam_runs(config, step),
            tied=self.split_step is None or step <= self.split_step,
            split=step == self.split_step,
            validate=last or step % config.val_interval == 0,
            last=last,
        )

    def __iter__(self) -> Iterator[StepPlan]:
        return self.plans_from(0)

    def tokens_before(self, step: int) -> int:
        """Trained on by the steps before this one."""
        return sum(self.plan(done).tokens_per_step for done in range(step))

    def plans_from(self, first: int) -> Iterator[StepPlan]:
        """Of a run that goes on at this step."""
        return (self.plan(step) for step in range(first, self.total_steps + 1))


def _between(start: float, end: float, frac: float) -> float:
    return start + (end - start) * frac


def stage_ends(config: ScheduleConfig) -> list[int]:
    """Step after the last of each scheduled stage: round(N/3), round(2N/3), N for three stages."""
    fracs = config.stage_ends or [(i + 1) / len(config.stages) for i in range(len(config.stages))]
    ends = [round(config.num_steps * frac) for frac in fracs]
    for start, end in zip([0, *ends], ends, strict=False):
        if end <= start:
            raise ConfigError(
                f"schedule.num_steps={config.num_steps}: too few for {len(config.stages)} stages; "
                "take more steps"
            )
    return ends


def adam_runs(config: ScheduleConfig, step: int) -> bool:
    """On odd steps for an interval of 2: on the last step of each interval."""
    return (step + 1) % config.adam_interval == 0


def split_step(config: ScheduleConfig) -> int | None:
    """The last step with embed and lm_head as one parameter; −1: they never were, None: always."""
    if config.untie_frac == 0:
        return -1
    if config.untie_frac == 1:
        return None
    step = round(config.untie_frac * config.num_steps)
    while not adam_runs(config, step):
        step += 1
    return step


def stage_windows(config: ScheduleConfig, stages: tuple[Stage, ...]) -> list[Windows]:
    """Each stage's windows, with the growth of the long one until then if YaRN follows it."""
    sizes = [(stage.window_short, stage.window_long) for stage in stages]
    if not config.window_warmup:
        sizes = [sizes[-1]] * len(sizes)
    windows, yarn = [], ()
    for i, (short, long) in enumerate(sizes):
        if config.yarn and i and long > sizes[i - 1][1]:
            yarn += ((sizes[i - 1][1], long),)
        windows.append(Windows(short, long, yarn))
    return windows


def learning_rate(config: ScheduleConfig, stage: Stage, step: int) -> float:
    """Factor on the base rates: the stage's, blended towards lr_end over the cool-down."""
    if stage is config.extension:
        return stage.lr_factor
    warmup = min(1.0, (step + 1) / (config.lr_warmup_steps + 1))
    start = int(config.lr_cooldown_start_frac * config.num_steps)
    if step < start or config.num_steps == start:
        return stage.lr_factor * warmup
    u = min(1.0, (step - start) / (config.num_steps - start))
    return (stage.lr_factor * (1 - u) + config.lr_end * u) * warmup


def momentum(config: ScheduleConfig, step: int) -> float:
    """Muon's momentum: up over the warm-up, then flat, down over the last cool-down steps."""
    spread = config.momentum_peak - config.momentum_start
    if step < config.momentum_warmup_steps:
        return config.momentum_start + spread * step / config.momentum_warmup_steps
    start = config.total_steps - config.momentum_cooldown_steps
    if step > start:
        return config.momentum_peak - spread * (step - start) / config.momentum_cooldown_steps
    return config.momentum_peak


def scaled(config: ScheduleConfig, total_steps: int) -> ScheduleConfig:
    """The same schedule over `total_steps` steps (extension included), everything in proportion.

    Extension, learning-rate and momentum warm-up, momentum cool-down and validation interval
    scale with it and stay at least 1 where they were.
    """
    minimum = len(config.stages) + (config.extension is not None)
    if config.total_steps < 1:
        raise ConfigError(f"schedule.num_steps={config.num_steps}: must be greater than 0")
    if total_steps < minimum:
        raise ConfigError(f"--steps {total_steps}: this schedule needs at least {minimum}")
    ratio = total_steps / config.total_steps

    def scale(steps: int) -> int:
        return max(1, round(steps * ratio)) if steps else 0

    extension = min(scale(config.extension_steps), total_steps - len(config.stages))
    return dataclasses.replace(
        config,
        num_steps=total_steps - extension,
        extension_steps=extension,
        val_interval=scale(config.val_interval),
        lr_warmup_steps=scale(config.lr_warmup_steps),
        momentum_warmup_steps=scale(config.momentum_warmup_steps),
        momentum_cooldown_steps=scale(config.momentum_cooldown_steps),
    )
