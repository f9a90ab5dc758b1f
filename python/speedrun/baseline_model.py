"""The plain GPT of the track `optimization`, top to bottom (RECIPE section 7).

Its architecture is fixed, so that runs of that track compare optimizers alone: biases and RMSNorm
gains, full causal attention within sequences of one length, whatever documents they hold.

Shapes: P parts of a micro-batch, T tokens a part, D model dim, H heads, K head dim, F MLP hidden,
V padded vocabulary, L layers. The residual stream x is (P, T, D).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedrun.batch import LossWeights, MicroBatch, to_device
from speedrun.config import BaselineConfig, Windows
from speedrun.ops.attention import AttentionPlan, attention, plan_attention
from speedrun.ops.qk_norm_rope import NORM_EPS, rotary_frequencies, rotary_table

LOGITS_AT_ONCE = 1 << 26  # 256 MB in fp32, and some times that for what autograd keeps of them


class BaselinePlan(NamedTuple):
    """What all layers of a micro-batch share."""

    mask: AttentionPlan
    cos: Tensor  # (P*T, 1, K/4), fp32 or wider
    sin: Tensor


class BlockWeights(NamedTuple):
    """One layer's parameters; matrices are (out, in)."""

    qkvo: Tensor  # (4, D, D)
    qkvo_bias: Tensor  # (4, D)
    attention_gain: Tensor  # (D,)
    up_FD: Tensor
    up_bias_F: Tensor
    down_DF: Tensor
    down_bias_D: Tensor
    mlp_gain: Tensor  # (D,)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm over the last dim with a gain, computed in at least fp32."""
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), NORM_EPS)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·Wᵀ + b in x's type, to which the parameters are rounded."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary in the half-split layout: of the head dim's quarters the first turns with the third.

    Computed in the type of `cos` and `sin` (T, 1, K/4), rounded once.
    """
    a, b, c, d = x_THK.to(cos.dtype).chunk(4, dim=-1)
    return torch.cat([a * cos + c * sin, b, c * cos - a * sin, d], dim=-1).to(x_THK.dtype)


def block_forward(
    config: BaselineConfig, x: Tensor, weights: BlockWeights, plan: BaselinePlan
) -> Tensor:
    """x behind one layer. The MLP is plain, since the operator `relu2_mlp` has no biases."""
    h = norm(x, weights.attention_gain)
    *qkv, out = zip(weights.qkvo.unbind(), weights.qkvo_bias.unbind(), strict=True)
    heads = (config.num_heads, config.head_dim)
    q, k, v = (linear(h, *wb).flatten(0, 1).unflatten(-1, heads) for wb in qkv)
    q, k = (rotate(F.rms_norm(t, t.shape[-1:], eps=NORM_EPS), plan.cos, plan.sin) for t in (q, k))
    y = attention(q, k, v, plan.mask, config.score_scale)
    x = x + linear(y.flatten(1).view_as(x), *out)
    post = linear(norm(x, weights.mlp_gain), weights.up_FD, weights.up_bias_F).relu().square()
    return x + linear(post, weights.down_DF, weights.down_bias_D)


def logits(x_TD: Tensor, lm_head_DV: Tensor, bias_V: Tensor, softcap: float) -> Tensor:
    """(T, V), fp32 or wider: softcap·z/√(z² + softcap²), z in x's type."""
    z = linear(x_TD, lm_head_DV.T, bias_V)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return softcap * z * (z.square() + softcap**2).rsqrt()


def summed_loss(
    x_TD: Tensor, lm_head_DV: Tensor, bias_V: Tensor, targets_T: Tensor, softcap: float
) -> Tensor:
    """Scalar, fp32 or wider: cross-entropy of the softcapped logits, summed."""
    z_TV = logits(x_TD, lm_head_DV, bias_V, softcap)
    return F.cross_entropy(z_TV, targets_T, reduction="sum")


class BaselineGPT(nn.Module):
    """Parameters are banks: one tensor for all matrices, or vectors, of a kind.

    qkvo_bank (4·L, D, D) and qkvo_bias (4·L, D): by layer q, k, v and the output projection.
    up_bank (L, F, D), down_bank (L, D, F). lm_head (D, V) is stored transposed.
    The embedding is `dtype`, the activations' type; all others are at least fp32, and rounded to
    that type where they are used, as in the public program.
    """

    def __init__(self, config: BaselineConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        D, V, L = config.model_dim, config.padded_vocab_size, config.num_layers
        hidden = config.mlp_hidden
        wide = torch.promote_types(dtype, torch.float32)

        def parameter(*shape: int, start: float = 0.0, dtype: torch.dtype = wide) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, start, dtype=dtype))

        self.embed = parameter(V, D, dtype=dtype)
        self.embed_gain = parameter(D, start=1.0)
        self.qkvo_bank, self.qkvo_bias = parameter(4 * L, D, D), parameter(4 * L, D)
        self.up_bank, self.up_bias = parameter(L, hidden, D), parameter(L, hidden)
        self.down_bank, self.down_bias = parameter(L, D, hidden), parameter(L, D)
        self.attention_gain, self.mlp_gain = parameter(L, D, start=1.0), parameter(L, D, start=1.0)
        self.lm_head, self.head_bias = parameter(D, V), parameter(V)
        self.head_gain = parameter(D, start=1.0)

        self.block, self.summed_loss = block_forward, summed_loss  # or compiled ones

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start values, drawn on the CPU: embedding N(0, embed_std²), matrices N(0, 0.33/fan_in).

        Output projections and head stay 0, where the constructor left them, like the biases.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)

        def draw(parameter: Tensor, std: float) -> None:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(values.normal_(0.0, std, generator=generator))

        draw(self.embed, config.embed_std)
        std = (config.weight_variance / config.model_dim) ** 0.5
        draw(self.qkvo_bank.unflatten(0, (-1, 4))[:, :3], std)
        draw(self.up_bank, std)

    def compile(self, mode: Literal["off", "regional", "full"]) -> None:
        """Compile a layer and the head ("regional"), or the whole trunk and the head ("full")."""
        if mode == "off":
            return
        self.summed_loss = torch.compile(summed_loss, dynamic=False)
        if mode == "full":
            self.trunk = torch.compile(self.trunk, dynamic=False)
        else:
            self.block = torch.compile(block_forward, dynamic=False)

    def refresh_fp8(self, down_own_amax: bool) -> None:
        """Nothing: this model has no FP8. The program calls it before a step's micro-batches."""

    def turning(self, windows: Windows, num_tokens: int) -> Tensor:
        """(head_dim / 4,) rotary frequencies, the same for all windows."""
        frequencies = rotary_frequencies(self.config.head_dim, self.config.rotary_base)
        return to_device(frequencies, self.embed.device)

    def plan_windows(
        self, batch: MicroBatch, windows: Windows, turning: Tensor | None = None
    ) -> BaselinePlan:
        """One mask, of the long window, which reaches over a whole sequence; the rotary tables.

        `batch.cu_seqlens` are sequences here, and positions count from the start of each.
        """
        num_tokens, dtype = batch.inputs_PT.numel(), self.embed.dtype
        head_dims = (self.config.head_dim, self.config.head_dim)
        lengths = (batch.cu_seqlens, num_tokens, windows.long)
        mask = plan_attention(*lengths, dtype, head_dims, batch.max_seqlen)
        places = torch.arange(num_tokens, device=self.embed.device, dtype=torch.int32)
        sequence = torch.searchsorted(batch.cu_seqlens, places, right=True) - 1
        positions = (places - batch.cu_seqlens[sequence])[:, None]
        frequencies = self.turning(windows, num_tokens) if turning is None else turning
        wide = torch.promote_types(dtype, torch.float32)
        return BaselinePlan(mask, *rotary_table(frequencies, positions, wide))

    def forward(self, batch: MicroBatch, plan: BaselinePlan) -> Tensor:
        """Logits (P*T, V), behind the softcap."""
        x_TD = self.trunk(batch, plan)
        return logits(x_TD, self.lm_head, self.head_bias, self.config.softcap)

    def trunk(self, batch: MicroBatch, plan: BaselinePlan) -> Tensor:
        """(P*T, D): what the head multiplies."""
        x = norm(F.embedding(batch.inputs_PT, self.embed), self.embed_gain)
        for weights in zip(
            self.qkvo_bank.split(4),
            self.qkvo_bias.split(4),
            self.attention_gain,
            self.up_bank,
            self.up_bias,
            self.down_bank,
            self.down_bias,
            self.mlp_gain,
            strict=True,
        ):
            x = self.block(self.config, x, BlockWeights(*weights), plan)
        return norm(x, self.head_gain).flatten(0, 1)

    def training_loss(self, batch: MicroBatch, plan: BaselinePlan, weights: LossWeights) -> Tensor:
        """Scalar: cross-entropy of the next token, summed over the micro-batch, fp32 or wider.

        ValueError for targets with weights: the track's loss has none.
        """
        if weights.multi_token != (1.0,) or weights.prefix:
            raise ValueError(
                f"BaselineGPT trains on the next token alone, got {weights}: set the stages' "
                "multi_token_weights to ((1, 1),) and prefix_weight to (0, 0)"
            )
        return self.loss(batch, plan)

    def validation_loss(self, batch: MicroBatch, plan: BaselinePlan) -> Tensor:
        """Scalar: the same loss."""
        return self.loss(batch, plan)

    def loss(self, batch: MicroBatch, plan: BaselinePlan) -> Tensor:
        """Summed loss. The head takes some rows at a time, and their logits are computed again in
        the backward pass: of 65,536 tokens they are 13 GB in fp32, and autograd keeps several such.
        """
        rows = max(1, LOGITS_AT_ONCE // len(self.head_bias))
        chunks = zip(
            self.trunk(batch, plan).split(rows),
            batch.targets_PT.flatten().split(rows),
            strict=True,
        )
        losses = [
            checkpoint(
                self.summed_loss,
                x_TD,
                self.lm_head,
                self.head_bias,
                targets_T,
                self.config.softcap,
                use_reentrant=False,
            )
            for x_TD, targets_T in chunks
        ]
        return torch.stack(losses).sum()
