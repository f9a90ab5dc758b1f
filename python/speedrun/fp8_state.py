"""What FP8 training keeps beside the parameters: copies of weights, and scales between steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from speedrun.config import AttentionConfig, HeadConfig, MLPConfig
from speedrun.ops.fp8_linear import Fp8Weight, normed_scale
from speedrun.ops.fp8_quantize import (
    MlpWeights,
    delayed_scale,
    fp8_quantize_current,
    refresh_mlp_weights,
)
from speedrun.ops.head_loss import Fp8Head, quantize_head
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms

_Weights = TypeVar("_Weights", MlpWeights, Fp8Head, dict[str, Fp8Weight])


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


@dataclass
class Fp8Projections:
    """One attention's projections in one forward pass. None: a projection is bf16."""

    qkv: Fp8Weight | None  # (2·H·K + D, D): Q, K, V
    out: Fp8Weight | None  # (D, D)
    x_scale: Tensor | None  # float32 (), of QKV's input; None: by its own amax
    y_scale: Tensor  # float32 (), of the output's input: foretold by the forward pass before
    y_amax: Tensor | None = None  # set in the forward pass: the largest of that input, ()


class Fp8AttentionState(nn.Module):
    """FP8 weights of every attention's projections, and the scales of attention's outputs.

    QKV has one scale for all its weights, and so has the output: FP8 numbers are as precise at any
    scale, and the matrices' sizes are far less than e4m3's 2^15 apart. Each bank is quantised in
    one launch, when the weights have changed: see `_version`. `y_scale_A` belongs to one rank, as
    `Fp8MLPState.post_scale_L` does.
    """

    def __init__(self, num_attentions: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("y_scale_A", torch.ones(num_attentions))
        self.weights: dict[str, Fp8Weight] | None = None  # of all layers, by the field's name
        self.x_scale: Tensor | None = None
        self.source: tuple[tuple[int, int], ...] | None = None

    @torch.no_grad()
    def refresh(self, qk_bank: Tensor, vo_bank: Tensor) -> None:
        """Quantise the weights if they have changed; once a step, before its first micro-batch."""
        source = _version(qk_bank, vo_bank)
        if source == self.source:
            return
        banks, (v_bank, o_bank) = {}, vo_bank.unflatten(0, (-1, 2)).unbind(1)
        if self.config.qkv == "fp8":
            banks["qkv"] = torch.cat([qk_bank.view(len(v_bank), -1, qk_bank.shape[-1]), v_bank], 1)
        if self.config.out == "fp8":
            banks["out"] = o_bank
        if self.config.x_scale == "static" and self.x_scale is None:
            self.x_scale = normed_scale(qk_bank.shape[-1], qk_bank.device)
        transposed = self.config.dx == "fp8"
        self.weights = {
            name: Fp8Weight(*fp8_quantize_current(bank, transposed=transposed))
            for name, bank in banks.items()
        }
        self.source = source

    def layers(self) -> list[Fp8Projections]:
        """What the layers with attention take, one after the other, in one forward pass."""
        weights = _existing(self.weights)

        def of_layer(name: str, i: int) -> Fp8Weight | None:
            if name not in weights:
                return None
            f8, f8_t, scale = weights[name]
            return Fp8Weight(f8[i], None if f8_t is None else f8_t[i], scale)

        return [
            Fp8Projections(of_layer("qkv", i), of_layer("out", i), self.x_scale, y_scale)
            for i, y_scale in enumerate(self.y_scale_A)
        ]

    def update(self, layers: list[Fp8Projections]) -> None:
        """After a forward pass: the next one's scales, in new tensors: backward reads these."""
        if self.config.out == "fp8":
            self.y_scale_A = delayed_scale(torch.stack([layer.y_amax for layer in layers]))


class Fp8HeadState:
    """FP8 copies of the head's weight, as new as its `_version`. Its scales are constants, so
    nothing else is kept."""

    def __init__(self, config: HeadConfig) -> None:
        names = ("x_amax", "w_amax", "grad_amax", "form")
        self.options = {name: getattr(config, name) for name in names}
        self.weights: Fp8Head | None = None
        self.source: tuple[tuple[int, int], ...] | None = None

    @torch.no_grad()
    def refresh(self, lm_head: Tensor) -> None:
        """Quantise the weight if it has changed; once a step, before its first micro-batch."""
        source = _version(lm_head)
        if source != self.source:
            self.weights, self.source = quantize_head(lm_head, **self.options), source

    def current(self) -> Fp8Head:
        """What `head_loss` takes."""
        return _existing(self.weights)


def _version(*parameters: Tensor) -> tuple[tuple[int, int], ...]:
    """Address and version counter of each: equal only if nothing has changed.

    PyTorch raises the counter at each change in place, and `Optimizer` where it goes around
    autograd. What else writes through `.data` must call `torch.autograd.graph.increment_version`.
    """
    return tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)


def _existing(weights: _Weights | None) -> _Weights:
    if weights is None:
        raise RuntimeError("there are no FP8 weights yet: refresh_fp8 begins each step")
    return weights
