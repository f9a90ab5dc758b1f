"""The forward and backward passes of a step: launch by launch, or as CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from speedrun.baseline_model import BaselineGPT
from speedrun.batch import LossWeights, MicroBatch
from speedrun.config import GRADIENT_DIVISOR, Windows
from speedrun.model import GPT
from speedrun.optim import Optimizer
from speedrun.schedule import StepPlan
from speedrun.step_graph import StepGraphs

FP8_STATES = ("fp8_attention", "fp8_mlp", "fp8_head")  # of a GPT


def forward_backward(
    model: GPT | BaselineGPT,
    optimizer: Optimizer | None,
    micro_batches: Sequence[MicroBatch],
    plan: StepPlan,
    prefix_table: Tensor | None = None,
    graphs: PassGraphs | None = None,
) -> Tensor:
    """Gradients of the step's summed loss / 8 added to `.grad`; returns this rank's summed loss.

    Whatever the number of ranks, the sum over them is the gradient of all positions / 8.
    The optimizer, where there is one, learns which rows of the bigram table have one. The host
    waits for the device nowhere, unless an operator without a kernel of its own does.
    """
    device = model.embed.device
    model.refresh_fp8(plan.fp8_down_own_amax)
    prefix_weight = 0.0 if prefix_table is None else plan.prefix_weight
    table = prefix_table if prefix_weight else None
    weights = LossWeights(plan.multi_token_weights, prefix_weight, table).on(device)
    total = torch.zeros((), device=device)
    if graphs is not None and _get_current_dispatch_mode() is None:
        graphs.run(micro_batches, weights, plan, total)
    else:  # who watches each operator would see none in a replay
        for inputs in _inputs(model, micro_batches, weights, plan.windows):
            one_pass(model, inputs, total)
    if optimizer is not None:
        for batch in micro_batches:
            if batch.bigram_rows_PT is not None:
                optimizer.touched("bigram_embed", model.table_rows(batch)[0])
    return total


@dataclasses.dataclass
class Inputs:
    """What one pass reads beside the model."""

    batch: MicroBatch
    weights: LossWeights
    windows: Windows
    turning: Any  # the model's, for these windows and as many tokens a part


def _inputs(
    model: GPT | BaselineGPT,
    micro_batches: Sequence[MicroBatch],
    weights: LossWeights,
    windows: Windows,
) -> list[Inputs]:
    turning = model.turning(windows, micro_batches[0].inputs_PT.shape[1])
    return [Inputs(batch, weights, windows, turning) for batch in micro_batches]


def one_pass(model: GPT | BaselineGPT, inputs: Inputs, total: Tensor) -> None:
    """Gradients of one micro-batch are added to `.grad`, its summed loss to `total` ()."""
    plans = model.plan_windows(inputs.batch, inputs.windows, inputs.turning)
    loss = model.training_loss(inputs.batch, plans, inputs.weights)
    (loss / GRADIENT_DIVISOR).backward()
    total += loss.detach()


class PassGraphs:
    """A graph for each kind of pass: of its shapes, windows and number of targets.

    A replay reads and writes what it did at the capture, so all of this stays where it is: batch,
    weights of the loss, gradients, FP8 copies of weights, the scales that a pass leaves to the
    next. `optimizer` is told to keep the gradients. Opt-in: not yet run on hardware.
    """

    def __init__(
        self, model: GPT | BaselineGPT, optimizer: Optimizer, graphs: StepGraphs | None = None
    ) -> None:
        self.model = model
        self.graphs = graphs or StepGraphs("cuda_graph")
        self.inputs: dict[Hashable, Inputs] = {}
        self.fp8_weights: dict[str, Any] = {}
        self.total = torch.zeros((), device=model.embed.device)
        optimizer.keep_gradients()

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: LossWeights,
        plan: StepPlan,
        total: Tensor,
    ) -> None:
        """`one_pass` of each."""
        self._keep_fp8_weights()
        for param in self.model.parameters():
            if param.grad is None:  # a capture would make it anew in each replay
                param.grad = torch.zeros_like(param)
        self.total.zero_()
        for batch in micro_batches:
            if batch.max_seqlen is not None:
                if batch.max_seqlen > plan.max_seq_len:
                    raise ValueError(
                        f"a document of {batch.max_seqlen} tokens, in a step whose plan has "
                        f"max_seq_len={plan.max_seq_len}"
                    )
                # FlashAttention's launch depends on it.
                batch = dataclasses.replace(batch, max_seqlen=plan.max_seq_len)
            tensors = _tensors(batch, weights)
            kind = (plan.windows, batch.max_seqlen, *(t.shape for t in tensors))
            if kind in self.inputs:
                kept = self.inputs[kind]
                for old, new in zip(_tensors(kept.batch, kept.weights), tensors, strict=True):
                    old.copy_(new, non_blocking=True)
            else:
                own = _inputs(self.model, [_copy(batch)], _copy(weights), plan.windows)
                (self.inputs[kind],) = own
            inputs = self.inputs[kind]
            self.graphs.run(kind, lambda inputs=inputs: self._pass(inputs))
        total += self.total

    def _pass(self, inputs: Inputs) -> None:
        """One whose new scales end up where the old ones were."""
        before = dict(self.model.named_buffers())
        one_pass(self.model, inputs, self.total)
        for name, new in dict(self.model.named_buffers()).items():
            if new is not before[name]:
                before[name].copy_(new)
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, before[name])

    def _keep_fp8_weights(self) -> None:
        """The copies of this step, where those of the first one were."""
        for name in FP8_STATES:
            state = getattr(self.model, name, None)
            if state is None:
                continue
            kept = self.fp8_weights.setdefault(name, state.weights)
            if kept is not state.weights:
                for old, new in zip(tree_leaves(kept), tree_leaves(state.weights), strict=True):
                    if old is not None:
                        old.copy_(new)
                state.weights = kept


def _tensors(*values: MicroBatch | LossWeights) -> list[Tensor]:
    """Those among the fields."""
    fields = [getattr(value, f.name) for value in values for f in dataclasses.fields(value)]
    return [field for field in fields if isinstance(field, Tensor)]


def _copy(value: Any) -> Any:
    """The same, with tensors of its own."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    tensors = {name: t.clone() for name, t in fields.items() if isinstance(t, Tensor)}
    return dataclasses.replace(value, **tensors)
