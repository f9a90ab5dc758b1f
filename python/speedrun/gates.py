"""Gates and mixing factors that small networks compute for each token: RECIPE section 3.

Each network's outputs have names, so that nobody counts columns. G outputs, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.config import ModelConfig

OUTPUT_SCALE = 0.1  # of MUDD's outputs for ever, of the gates' s at the start


class Gates(NamedTuple):
    """One layer's gates, each (P, T, H) or (P, T, 1), or (1, 1, …) where all tokens share it."""

    xsa: Tensor | None = None  # strength of exclusive self-attention, by head
    attention: Tensor | None = None  # by head
    x0: Tensor | None = None
    bigram: Tensor | None = None
    skip: Tensor | None = None
    dc1: Tensor | None = None  # weights of dynamically composed attention, by head
    dc2: Tensor | None = None


NO_GATES = Gates()


@dataclass(frozen=True)
class GateLayout:
    """The outputs of the network for `gate_net`: entries (layer, gate, size, start value)."""

    entries: tuple[tuple[int, str, int, float], ...]

    @classmethod
    def of(cls, config: ModelConfig, gate_net: str) -> GateLayout:
        own = [
            (i, spec) for i, spec in enumerate(config.active_layers) if spec.gate_net == gate_net
        ]
        attending = [(i, spec) for i, spec in own if spec.attention is not None]
        heads, entries = config.num_heads, []
        entries += [(i, "xsa", heads, 0.0) for i, spec in attending if spec.xsa]
        entries += [(i, "attention", heads, 0.25) for i, spec in attending if spec.gated]
        for i, spec in attending:
            if not spec.mudd:  # MUDD has factors of its own for these
                entries.append((i, "x0", 1, 0.0))
                if config.bigram_rows:
                    entries.append((i, "bigram", 1, config.bigram_scale))
        entries += [(i, "skip", 1, 0.5) for i, spec in own if spec.skip]
        for i, spec in attending:
            entries += [(i, "dc1", heads, 1.0), (i, "dc2", heads, 0.0)] if spec.dc else []
        return cls(tuple(entries))

    @property
    def size(self) -> int:
        """G."""
        return sum(size for _, _, size, _ in self.entries)

    def starts(self) -> Tensor:
        """(G,) float32 values of the outputs at the start."""
        return torch.tensor([start for _, _, size, start in self.entries for _ in range(size)])

    def split(self, outputs: Tensor) -> dict[int, Gates]:
        """By layer the gates in outputs (…, G)."""
        assert outputs.shape[-1] == self.size
        by_layer: dict[int, dict[str, Tensor]] = {}
        pieces = outputs.split([size for _, _, size, _ in self.entries], dim=-1)
        for (layer, gate, _, _), piece in zip(self.entries, pieces, strict=True):
            by_layer.setdefault(layer, {})[gate] = piece
        return {layer: Gates(**gates) for layer, gates in by_layer.items()}


class MuddLayer(NamedTuple):
    """Factors by which a MUDD layer mixes streams, each (P, T, 1); or their start values."""

    v_c0: Tensor | float  # into the values
    v_saved: Tensor | float
    v_x: Tensor | float
    c0: Tensor | float  # into x before attention's output
    saved: Tensor | float
    x: Tensor | float  # beside 1
    ve_low: Tensor | float  # on the value embedding in the first half of the heads
    ve_high: Tensor | float
    r_attn: Tensor | float  # behind attention: on x, on the output, c0 and bigram embedding
    p_attn: Tensor | float
    c0_attn: Tensor | float
    bigram: Tensor | float
    r_mlp: Tensor | float
    p_mlp: Tensor | float


class MuddOut(NamedTuple):
    """Factors of what is added to x behind the last layer; or their start values."""

    c0: Tensor | float
    saved: Tensor | float
    mudd_input: Tensor | float  # x before the MUDD layer
    value_embed: Tensor | float  # the first one
    first_saved: Tensor | float


def mudd_starts(config: ModelConfig, residual_start: float) -> tuple[MuddLayer, MuddOut]:
    """The factors at the start: as in other layers, nothing mixed; half of saved x taken out."""
    layer = MuddLayer(
        *(0.0,) * 6,
        ve_low=2.0,
        ve_high=2.0,
        r_attn=residual_start,
        p_attn=1.0,
        c0_attn=0.0,
        bigram=config.bigram_scale,
        r_mlp=residual_start,
        p_mlp=1.0,
    )
    return layer, MuddOut(0.0, -0.5, 0.0, 0.0, 0.0)


def small_network(
    x: Tensor, w1: Tensor | None, w2: Tensor | None, bias: Tensor, scale: Tensor | float
) -> Tensor:
    """(…, G): scale·(W2·gelu(W1·x) + c) of x (…, D), with the exact gelu.

    Without weights scale·c with one size for each of x's other dims: the same for all tokens.
    """
    outputs = bias.view(*(1 for _ in x.shape[:-1]), -1)
    if w1 is not None:
        outputs = F.gelu(x @ w1.T) @ w2.T + outputs
    return outputs * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
