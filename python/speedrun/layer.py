"""One layer of the GPT: skip, attention, MLP, and how they are mixed into the residual stream.

Shapes: P parts of a micro-batch, T tokens a part, D model dim, H heads, K head dim of queries and
keys, F MLP hidden. Streams are (P, T, D). RECIPE section 3, "Layers" and "Attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from speedrun.config import LayerSpec, ModelConfig
from speedrun.fp8_state import Fp8Projections
from speedrun.gates import Gates, MuddLayer
from speedrun.ops.attention import AttentionPlan, attention
from speedrun.ops.attention_epilogue import attention_epilogue, attention_epilogue_fp8
from speedrun.ops.dc_attention import DcPlan, dc_attention
from speedrun.ops.fp8_linear import fp8_linear
from speedrun.ops.fp8_quantize import fp8_quantize, fp8_quantize_current
from speedrun.ops.qk_norm_rope import pair_heads, qk_norm_rope, unpair_heads
from speedrun.ops.relu2_mlp import Fp8Layer, relu2_mlp
from speedrun.ops.residual_mix import residual_mix, residual_mix_norm

VE_GATE_COLUMNS = 6  # of h and of the value embedding, that a value gate reads


class Past(Protocol):
    """What the tokens of a plan continue, where earlier calls had those before (`decode`)."""

    def previous(self, e_PTD: Tensor) -> Tensor:
        """Each token's predecessor; for the first, what it was in the call before."""

    def attend(
        self, spec: LayerSpec, q_THK: Tensor, k_THK: Tensor, v_THE: Tensor, *dc_TH: Tensor | None
    ) -> Tensor:
        """(T, H, E): the next layer's attention, over earlier keys too, with DC by its w1 and w2.

        Keys come without their offset."""


@dataclass(frozen=True)
class BatchPlan:
    """What all layers of a micro-batch share: who sees whom, and how positions turn."""

    masks: dict[tuple[str, bool], AttentionPlan]  # by window and by whether heads are paired
    dc: DcPlan | None
    rotary: dict[bool, tuple[Tensor, Tensor]]  # cos and sin, by whether heads are paired
    score_scale: float
    first_PT: Tensor | None  # bool: where documents begin, if nothing may look across
    past: Past | None = None  # instead of masks and dc


class Streams(NamedTuple):
    """What a layer reads beside x. None: nothing in this model has it."""

    normed: Tensor | None  # norm(x), if this layer reads it
    x0: Tensor  # the normed embedding
    c0: Tensor  # x before the first layer
    bigram: Tensor | None  # (P, T, bigram_dim)
    saved: Tensor | None  # x behind the last layer that saved it
    saved_normed: Tensor | None  # norm(saved), if a later layer reads it
    value_embed: Tensor | None  # this layer's own rows


class LayerWeights(NamedTuple):
    """One layer's parameters. None: attention's in a layer without it, and techniques not used."""

    up_FD: Tensor
    down_FD: Tensor
    qk: Tensor | None  # (H, 2K, D): Q then K pairs of heads
    vo: Tensor | None  # (2, D, D): V, O
    lambda_qkv: Tensor | None
    lambda_o: Tensor | None
    ve_gate: Tensor | None  # (H, 12)
    r_attn: Tensor | float
    p_attn: Tensor | float
    r_mlp: Tensor | float
    p_mlp: Tensor | float


class LayerFp8(NamedTuple):
    """What one layer has in FP8 in this forward pass. None: nothing of it."""

    attention: Fp8Projections | None
    mlp: Fp8Layer | None


def reads_norm(config: ModelConfig, spec: LayerSpec) -> bool:
    """Whether a layer reads norm(x) of x as it comes: not behind its own skip, nor a saved x's."""
    skips = spec.skip and config.gates != "none"
    return not (skips or (spec.attention is not None and spec.shared_input))


def layer_forward(
    config: ModelConfig,
    spec: LayerSpec,
    x: Tensor,
    streams: Streams,
    gates: Gates,
    mudd: MuddLayer | None,
    weights: LayerWeights,
    plan: BatchPlan,
    fp8: LayerFp8,
    wants_norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """x behind one layer: skip, attention, MLP; and norm(x) for the next one, if it wants that.

    `mudd`: the factors of a MUDD layer.
    """
    h = streams.normed
    if gates.skip is not None:
        x, h, _ = residual_mix_norm([(1.0, x), (gates.skip, streams.saved)])
    if spec.attention is not None:
        if spec.shared_input:
            h = streams.saved_normed
        extra_v, v_gate = value_terms(config, h, x, streams, weights.ve_gate, mudd)
        a = attend(config, spec, h, extra_v, v_gate, gates, weights, plan, fp8.attention)
        x, h = mix_attention(x, a, streams, gates, weights, mudd)
    r, p = (weights.r_mlp, weights.p_mlp) if mudd is None else (mudd.r_mlp, mudd.p_mlp)
    terms = [(r, x), (p, relu2_mlp(h, weights.up_FD, weights.down_FD, fp8.mlp))]
    return residual_mix_norm(terms)[:2] if wants_norm else (residual_mix(terms), None)


def mix_attention(
    x: Tensor,
    a: Tensor,
    streams: Streams,
    gates: Gates,
    weights: LayerWeights,
    mudd: MuddLayer | None,
) -> tuple[Tensor, Tensor]:
    """x with attention's output `a`, and gated shares of first stream and bigram embedding; and
    norm(x)."""
    if mudd is None:
        terms = [(weights.r_attn, x), (weights.p_attn, a)]
        terms += [] if gates.x0 is None else [(gates.x0, streams.x0)]
    else:
        x = residual_mix([(1 + mudd.x, x), (mudd.c0, streams.c0), (mudd.saved, streams.saved)])
        terms = [(mudd.r_attn, x), (mudd.p_attn, a), (mudd.c0_attn, streams.c0)]
    bigram_gate = gates.bigram if mudd is None else mudd.bigram
    if streams.bigram is not None and bigram_gate is not None:
        terms.append((bigram_gate, streams.bigram))
    return residual_mix_norm(terms)[:2]


def value_terms(
    config: ModelConfig,
    h: Tensor,
    x: Tensor,
    streams: Streams,
    ve_gate: Tensor | None,
    mudd: MuddLayer | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to a layer's values, (P, T, D), and its factor by head, (P, T, H) or None: its
    value embedding and gate; with MUDD the gated value embedding and streams in one sum."""
    ve = streams.value_embed
    if mudd is None:
        if ve is None:
            return None, None
        columns = [t[..., :VE_GATE_COLUMNS] for t in (h, ve)]
        return ve, 2 * torch.sigmoid(torch.cat(columns, dim=-1) @ ve_gate.T)
    extra = residual_mix([(mudd.v_c0, streams.c0), (mudd.v_saved, streams.saved), (mudd.v_x, x)])
    if ve is not None:  # one factor for each half of the heads
        halves = torch.cat([mudd.ve_low, mudd.ve_high], dim=-1)
        gate_PTH = halves.repeat_interleave(config.num_heads // 2, dim=-1)
        heads = (config.num_heads, config.head_dim)
        extra = (ve.unflatten(-1, heads) * gate_PTH[..., None]).flatten(-2) + extra
    return extra, None


def attend(
    config: ModelConfig,
    spec: LayerSpec,
    h: Tensor,
    extra_v: Tensor | None,
    v_gate: Tensor | None,
    gates: Gates,
    weights: LayerWeights,
    plan: BatchPlan,
    fp8: Fp8Projections | None,
) -> Tensor:
    """Attention of one layer over its normed input h."""
    w_v, w_o = weights.vo
    w_qkv = torch.cat([weights.qk.flatten(0, 1), w_v])
    qkv = project_in(h, w_qkv, weights.lambda_qkv, fp8)
    offset_keys = config.key_offset and spec.window == "long"
    q, k, v = (
        t.flatten(0, 1)
        for t in qk_norm_rope(
            qkv,
            *plan.rotary[spec.paired],
            config.num_heads,
            offset_keys=offset_keys and plan.past is None,
            first_PT=plan.first_PT,
            ve_PTD=extra_v,
            ve_gate_PTH=v_gate,
        )
    )

    def by_token(gate: Tensor | None) -> Tensor | None:  # (P*T, H), also of one for all tokens
        return None if gate is None else gate.expand(*h.shape[:2], -1).flatten(0, 1)

    dc = (by_token(gates.dc1), by_token(gates.dc2))
    if plan.past is not None:
        y = plan.past.attend(spec, q, k, v, *dc)
    else:
        y = attend_batch(spec, q, k, v, *dc, plan)
    xsa, gate = by_token(gates.xsa), by_token(gates.attention)
    return project_out(y, v, xsa, gate, w_o, weights.lambda_o, fp8).unflatten(0, h.shape[:2])


def attend_batch(
    spec: LayerSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1_TH: Tensor | None,
    w2_TH: Tensor | None,
    plan: BatchPlan,
) -> Tensor:
    """(P*T, H, E): attention of one layer among the tokens of a micro-batch, with DC."""
    mask = plan.masks[spec.window, spec.paired]
    if spec.paired:
        y = attention(*(pair_heads(t) for t in (q, k, v)), mask, plan.score_scale)
        y = unpair_heads(y)
    else:
        y = attention(q, k, v, mask, plan.score_scale)
    if spec.dc:
        y = y + dc_attention(q, k, v, w1_TH, w2_TH, plan.dc, plan.score_scale)
    return y


def project_in(
    h: Tensor, w_qkv: Tensor, factor: Tensor | None, fp8: Fp8Projections | None
) -> Tensor:
    """(P, T, 2·H·K + D) of h (P, T, D) and the weights of Q, K and V times `factor`."""
    weight = scaled(factor, w_qkv)
    if fp8 is None or fp8.qkv is None:
        return h @ weight.T
    x_TD, x_scale = h.flatten(0, 1), fp8.x_scale
    if x_scale is None:
        x_f8, _, x_scale = fp8_quantize_current(x_TD)
    else:
        x_f8, _, _ = fp8_quantize(x_TD, x_scale)
    qkv = fp8_linear(x_TD, weight, x_f8, x_scale, fp8.qkv.times(factor))
    return qkv.unflatten(0, h.shape[:2])


def project_out(
    y: Tensor,
    v: Tensor,
    xsa: Tensor | None,
    gate: Tensor | None,
    w_o: Tensor,
    factor: Tensor | None,
    fp8: Fp8Projections | None,
) -> Tensor:
    """(P*T, D) of attention's y (P*T, H, E): XSA, gate, and the output weights times `factor`."""
    weight = scaled(factor, w_o)
    if fp8 is None or fp8.out is None:
        return attention_epilogue(y, v, xsa, gate).flatten(1) @ weight.T
    if xsa is None and gate is None:  # nothing to compute: y isn't written again
        y_TD = y.flatten(1)
        y_f8, _, fp8.y_amax = fp8_quantize(y_TD, fp8.y_scale, amax=True)
    else:
        y, y_f8, fp8.y_amax = attention_epilogue_fp8(y, v, fp8.y_scale, xsa, gate)
        y_TD, y_f8 = y.flatten(1), y_f8.flatten(1)
    return fp8_linear(y_TD, weight, y_f8, fp8.y_scale, fp8.out.times(factor))


def scaled(factor: Tensor | None, weight: Tensor) -> Tensor:
    """factor·W in at least fp32, rounded to W's type before it is multiplied."""
    return weight if factor is None else (weight.to(factor.dtype) * factor).to(weight.dtype)
