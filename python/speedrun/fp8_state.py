"""What FP8 training keeps beside the parameters: copies of weights, and scales between steps."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor, nn

from speedrun.config import HeadConfig, MLPConfig
from speedrun.ops.fp8_quantize import MlpWeights, delayed_scale, refresh_mlp_weights
from speedrun.ops.head_loss import Fp8Head, quantize_head
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms

_Weights = TypeVar("_Weights", MlpWeights, Fp8Head)


class Fp8MLPState(nn.Module):
    """FP8 weights and scales of every layer's MLP: RECIPE section 3, "FP8".

    Buffers hold what one step leaves to the next; the weights' copies come from the parameters. It
    belongs to one rank, whose micro-batches set `post_scale_L` in turn: so the scales of post, and
    those of the MLP's input, depend on the number of ranks and on the grouping of parts into
    micro-batches. Nothing else in the model does.
    """

    def __init__(self, num_layers: int, config: MLPConfig) -> None:
        super().__init__()
        self.gemms = Gemms(**dataclasses.asdict(config))
        self.register_buffer("post_scale_L", torch.ones(num_layers))
        self.register_buffer("down_amax_L", torch.zeros(num_layers))
        self.weights: MlpWeights | None = None

    @torch.no_grad()
    def refresh(self, mlp_bank: Tensor, own_amax: bool) -> None:
        """Quantise all weights anew; once a step, before its first micro-batch.

        `own_amax`: Down by its own largest value, else by that of the refresh before.
        """
        copies = {"up_t": self.gemms.dx == "fp8", "down_row": self.gemms.dpre == "fp8"}
        self.weights = refresh_mlp_weights(mlp_bank, self.down_amax_L, not own_amax, **copies)
        self.down_amax_L.copy_(self.weights.down_amax)

    def layers(self) -> list[Fp8Layer]:
        """What `relu2_mlp` takes, layer by layer, in one forward pass."""
        w = _existing(self.weights)
        banks = (w.up_f8, w.up_f8_t, w.up_scale, w.down_f8, w.down_f8_t, w.down_scale)
        banks += (self.post_scale_L,)
        return [
            Fp8Layer(self.gemms, *(None if bank is None else bank[i] for bank in banks))
            for i in range(len(self.post_scale_L))
        ]

    def update(self, layers: list[Fp8Layer]) -> None:
        """After a forward pass: the scales of the next one. New tensors, as `Fp8Layer` says."""
        self.post_scale_L = delayed_scale(torch.stack([layer.post_amax for layer in layers]))


class Fp8HeadState:
    """FP8 copies of the head's weight. Its scales are constants, so nothing else is kept.

    They are as new as the weight's version counter says: PyTorch raises it at each change in
    place, and `Optimizer` where it goes around autograd. What else writes through `.data` must
    call `torch.autograd.graph.increment_version`.
    """

    def __init__(self, config: HeadConfig) -> None:
        self.amax = {name: getattr(config, name) for name in ("x_amax", "w_amax", "grad_amax")}
        self.weights: Fp8Head | None = None
        self.source: tuple[int, int] | None = None  # address and version of what was quantised

    @torch.no_grad()
    def refresh(self, lm_head: Tensor) -> None:
        """Quantise the weight if it has changed; once a step, before its first micro-batch."""
        source = (lm_head.data_ptr(), lm_head._version)
        if source != self.source:
            self.weights, self.source = quantize_head(lm_head, **self.amax), source

    def current(self) -> Fp8Head:
        """What `head_loss` takes."""
        return _existing(self.weights)


def _existing(weights: _Weights | None) -> _Weights:
    if weights is None:
        raise RuntimeError("there are no FP8 weights yet: refresh_fp8 begins each step")
    return weights
