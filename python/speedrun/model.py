"""The GPT of RECIPE section 3 in its plain form, top to bottom.

The model knows operators, not backends; it never asks which step, rank or layer number it is:
layer roles come from `ModelConfig.layers`.

Shapes: P parts of a micro-batch, T tokens a part, D model dim, H heads, K head dim, F MLP hidden,
V padded vocabulary, L layers, A layers with attention, R bigram rows, N targets a position.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import LayerSpec, MLPConfig, ModelConfig, Windows
from speedrun.ops.attention import AttentionPlan, attention, plan_attention
from speedrun.ops.fp8_quantize import MlpWeights, delayed_scale, refresh_mlp_weights
from speedrun.ops.qk_norm_rope import NORM_EPS, qk_norm_rope, rotary_frequencies, rotary_table
from speedrun.ops.relu2_mlp import Fp8Layer, Gemms, relu2_mlp
from speedrun.ops.softcap_ce import NO_TARGET, softcap_ce

LOGITS_AT_ONCE = 1 << 24  # in validation: 64 MB in fp32, little enough for caches and laptops


@dataclass(frozen=True)
class MicroBatch:
    """Some parts of a step on the model's device. Rows of tables are None without the table."""

    inputs_PT: Tensor  # int32
    targets_PT: Tensor  # int64
    cu_seqlens: Tensor  # (P * entries,) int32: document starts in the P*T tokens
    bigram_rows_PT: Tensor | None = None  # int32
    sign_rows_PT: Tensor | None = None  # int32


@dataclass(frozen=True)
class LossWeights:
    """Weights of the targets t+1, t+2, … in the training loss."""

    multi_token: tuple[float, ...] = (1.0,)


def norm(x: Tensor) -> Tensor:
    """x/√(mean(x²) + 2⁻²³) over the last dim, computed in at least fp32, no weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def shifted_targets(targets_PT: Tensor, num_targets: int) -> Tensor:
    """(P*T, N) int64: column n is the target n positions on; past the end of its part −1."""
    columns = [
        F.pad(targets_PT[:, n:], (0, min(n, targets_PT.shape[1])), value=NO_TARGET).flatten()
        for n in range(num_targets)
    ]
    return torch.stack(columns, dim=1)


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
        w = self.weights
        if w is None:
            raise RuntimeError("there are no FP8 weights yet: refresh_fp8 begins each step")
        banks = (w.up_f8, w.up_f8_t, w.up_scale, w.down_f8, w.down_f8_t, w.down_scale)
        banks += (self.post_scale_L,)
        return [
            Fp8Layer(self.gemms, *(None if bank is None else bank[i] for bank in banks))
            for i in range(len(self.post_scale_L))
        ]

    def update(self, layers: list[Fp8Layer]) -> None:
        """After a forward pass: the scales of the next one. New tensors, as `Fp8Layer` says."""
        self.post_scale_L = delayed_scale(torch.stack([layer.post_amax for layer in layers]))


class GPT(nn.Module):
    """Parameters are banks: one tensor for all matrices of a kind, as the optimizer wants them.

    qk_bank (2·A·H/2, 2K, D): by layer the Q pairs of heads, then the K pairs.
    vo_bank (2·A, D, D): by layer V, then O.   mlp_bank (2·L, F, D): by layer up, then down.
    `fp8`: whether training uses FP8 where `config` says so; it needs `dtype` bfloat16.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, fp8: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        D, K, V = config.model_dim, config.head_dim, config.padded_vocab_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        self.embed = parameter(V, D)
        self.lm_head = parameter(D, V)  # stored transposed: dX of the head reads it row-major
        self.qk_bank = parameter(config.num_attentions * config.num_heads, 2 * K, D)
        self.vo_bank = parameter(2 * config.num_attentions, D, D)
        self.mlp_bank = parameter(2 * len(config.layers), config.mlp_hidden, D)
        if config.bigram_rows:
            self.bigram_embed = parameter(config.bigram_rows, config.bigram_dim)
        sign_shape = (config.sign_rows, config.bigram_dim)
        self.register_buffer("sign_table", torch.ones(sign_shape, dtype=dtype))
        frequencies = rotary_frequencies(K, config.rotary_base)
        self.register_buffer("rotary_freq", frequencies, persistent=True)
        self.score_scale = config.score_scale
        self.fp8_mlp: Fp8MLPState | None = None
        if fp8 and config.mlp.uses_fp8:
            self.fp8_mlp = Fp8MLPState(len(config.layers), config.mlp)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start values of RECIPE section 3, drawn on the CPU: the same on every device and rank."""
        generator = torch.Generator().manual_seed(seed)
        bound = 3**0.5 * 0.5 * self.config.model_dim**-0.5

        def draw(parameter: Tensor, method: str, *args: float) -> None:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(getattr(values, method)(*args, generator=generator))

        draw(self.qk_bank, "uniform_", -bound, bound)
        draw(self.vo_bank, "uniform_", -bound, bound)
        draw(self.mlp_bank[0::2], "uniform_", -bound, bound)  # up; down stays 0
        draw(self.lm_head, "normal_", 0.0, self.config.embed_std)
        self.embed.copy_(self.lm_head.T)
        if self.sign_table.numel():
            signs = torch.randint(0, 2, self.sign_table.shape, generator=generator)
            self.sign_table.copy_(signs * 2 - 1)

    def plan_windows(self, batch: MicroBatch, windows: Windows) -> dict[str, AttentionPlan]:
        """One attention plan for each window that a layer uses."""
        sizes = windows._asdict()
        used = {layer.window for layer in self.config.layers if layer.attention}
        num_tokens = batch.inputs_PT.numel()
        dtype = self.embed.dtype
        return {
            name: plan_attention(batch.cu_seqlens, num_tokens, sizes[name], dtype)
            for name in sorted(used)
        }

    def refresh_fp8(self, down_own_amax: bool) -> None:
        """FP8 copies of the weights as they are now; once a step, before its micro-batches."""
        if self.fp8_mlp is not None:
            self.fp8_mlp.refresh(self.mlp_bank, down_own_amax)

    def forward(self, batch: MicroBatch, windows: dict[str, AttentionPlan]) -> Tensor:
        """z (P*T, V), before the softcap."""
        return self.trunk(batch, windows) @ self.lm_head

    def trunk(
        self, batch: MicroBatch, windows: dict[str, AttentionPlan], training: bool = False
    ) -> Tensor:
        """(P*T, D): what the head multiplies. FP8 is for training only."""
        rotary = rotary_table(
            self.rotary_freq,
            torch.arange(batch.inputs_PT.shape[1], device=self.embed.device),
            self.embed.dtype,
        )
        x_PTD = norm(F.embedding(batch.inputs_PT, self.embed))
        if batch.bigram_rows_PT is not None:
            x_PTD = self.add_bigram(x_PTD, batch)
        qk, vo = iter(self.qk_bank.split(self.config.num_heads)), iter(self.vo_bank.split(2))
        mlp = iter(self.mlp_bank.split(2))
        fp8_layers = self.fp8_mlp.layers() if training and self.fp8_mlp is not None else []
        fp8 = itertools.chain(fp8_layers, itertools.repeat(None))
        for spec in self.config.layers:
            if spec.attention is not None:
                x_PTD = x_PTD + self.attend(spec, norm(x_PTD), next(qk), next(vo), windows, rotary)
            up_FD, down_FD = next(mlp)
            x_PTD = x_PTD + relu2_mlp(norm(x_PTD), up_FD, down_FD, next(fp8))
        if fp8_layers:
            self.fp8_mlp.update(fp8_layers)
        return norm(x_PTD).flatten(0, 1)

    def add_bigram(self, x_PTD: Tensor, batch: MicroBatch) -> Tensor:
        """x with the scaled (and signed) bigram embedding added to its first bigram_dim columns."""
        b = F.embedding(batch.bigram_rows_PT, self.bigram_embed) * self.config.bigram_scale
        if batch.sign_rows_PT is not None:
            b = b * F.embedding(batch.sign_rows_PT, self.sign_table)
        return x_PTD + F.pad(b, (0, x_PTD.shape[-1] - b.shape[-1]))

    def attend(
        self,
        spec: LayerSpec,
        h_PTD: Tensor,
        qk_bank: Tensor,
        vo_bank: Tensor,
        windows: dict[str, AttentionPlan],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention of one layer: `qk_bank` (H, 2K, D) is its Q then K pairs, `vo_bank` V, O."""
        heads = (self.config.num_heads, self.config.head_dim)
        w_v, w_o = vo_bank
        qkv = h_PTD @ torch.cat([qk_bank.flatten(0, 1), w_v]).T
        q, k, v = (t.unflatten(-1, heads) for t in qkv.chunk(3, dim=-1))
        q, k = qk_norm_rope(q, *rotary), qk_norm_rope(k, *rotary)
        y = attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            windows[spec.window],
            self.score_scale,
        )
        return y.flatten(1).unflatten(0, h_PTD.shape[:2]) @ w_o.T

    def training_loss(
        self, batch: MicroBatch, windows: dict[str, AttentionPlan], weights: LossWeights
    ) -> Tensor:
        """Scalar: weighted loss summed over the positions of the micro-batch, fp32 or wider."""
        targets_TN = shifted_targets(batch.targets_PT, len(weights.multi_token))
        x_TD = self.trunk(batch, windows, training=True)
        return self.head_loss(x_TD, targets_TN, weights.multi_token)

    def validation_loss(self, batch: MicroBatch, windows: dict[str, AttentionPlan]) -> Tensor:
        """Scalar: plain cross-entropy of the next token, summed over the positions.

        The head takes some rows at a time: all logits of a part at once would be gigabytes.
        """
        rows = max(1, LOGITS_AT_ONCE // self.lm_head.shape[1])
        chunks = zip(
            self.trunk(batch, windows).split(rows),
            shifted_targets(batch.targets_PT, 1).split(rows),
            strict=True,
        )
        losses = [self.head_loss(x_TD, targets_TN, (1.0,)) for x_TD, targets_TN in chunks]
        return torch.stack(losses).sum()

    def head_loss(self, x_TD: Tensor, targets_TN: Tensor, weights: tuple[float, ...]) -> Tensor:
        """Scalar: the weighted losses of these positions, summed."""
        config, z_TV = self.config, x_TD @ self.lm_head
        weights_N = torch.tensor(weights, dtype=torch.float32, device=z_TV.device)
        losses = softcap_ce(
            z_TV, targets_TN, weights_N, config.softcap_a, config.softcap_b, config.softcap_c
        )
        return losses.sum()
