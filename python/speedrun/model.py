"""The GPT of RECIPE section 3, top to bottom.

The model knows operators, not backends; it never asks which step, rank or layer number it is:
layer roles come from `ModelConfig.layers`.

Shapes: P parts of a micro-batch, T tokens a part, D model dim, H heads, K head dim of queries and
keys, F MLP hidden, V padded vocabulary, L layers, A layers with attention, R bigram rows, N targets
a position, G outputs of a gate network. Streams are (P, T, D).
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.batch import (
    LossWeights,
    MicroBatch,
    document_starts,
    isolated_rows,
    previous,
    shifted_targets,
    to_device,
)
from speedrun.config import LayerSpec, ModelConfig, Windows
from speedrun.fp8_state import Fp8AttentionState, Fp8HeadState, Fp8MLPState
from speedrun.gates import (
    NO_GATES,
    OUTPUT_SCALE,
    GateLayout,
    Gates,
    MuddLayer,
    MuddOut,
    mudd_starts,
    small_network,
)
from speedrun.layer import (
    VE_GATE_COLUMNS,
    BatchPlan,
    LayerFp8,
    LayerWeights,
    Streams,
    layer_forward,
    reads_norm,
)
from speedrun.ops.attention import plan_attention
from speedrun.ops.dc_attention import plan_dc_attention
from speedrun.ops.head_loss import head_loss
from speedrun.ops.qk_norm_rope import (
    rotary_frequencies,
    rotary_positions,
    rotary_table,
    yarn,
)
from speedrun.ops.residual_mix import NORM_EPS, residual_mix_norm

SMEAR_COLUMNS = 12  # of an embedding, that its smear gate reads
# Rotary tables cos and sin, by whether heads are paired; the factor of attention's scores.
Turning = tuple[dict[bool, tuple[Tensor, Tensor]], float]
RESIDUAL_START = 1.1**0.5  # of each factor on the residual stream: 1.1 a layer


class GPT(nn.Module):
    """Parameters are banks: one tensor for all matrices of a kind, as the optimizer wants them.

    qk_bank (2·A·H/2, 2K, D): by layer the Q pairs of heads, then the K pairs.
    vo_bank (2·A, D, D): by layer V, then O.   mlp_bank (2·L, F, D): by layer up, then down.
    Parameters are `dtype`, but single factors (λ, r, p, the gates' s) at least fp32.
    `fp8`: whether training uses FP8 where `config` says so; it needs `dtype` bfloat16.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, fp8: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = config.active_layers
        D, K, V, L = config.model_dim, config.qk_dim, config.padded_vocab_size, len(self.layers)
        wide = torch.promote_types(dtype, torch.float32)

        def parameter(*shape: int, start: float = 0.0, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, start, dtype=dtype))

        self.embed = parameter(V, D)
        self.lm_head = parameter(D, V)  # stored transposed: dX of the head reads it row-major
        self.qk_bank = parameter(config.num_attentions * config.num_heads, 2 * K, D)
        self.vo_bank = parameter(2 * config.num_attentions, D, D)
        self.mlp_bank = parameter(2 * L, config.mlp_hidden, D)
        if config.bigram_rows:
            self.bigram_embed = parameter(config.bigram_rows, config.bigram_dim)
        sign_shape = (config.sign_rows, config.bigram_dim)
        self.register_buffer("sign_table", torch.ones(sign_shape, dtype=dtype))
        if config.smear:
            self.w_smear = parameter(min(SMEAR_COLUMNS, D))
            self.lambda_smear = parameter(dtype=wide)
        with_ve = [spec for spec in self.layers if spec.value_embed]
        if with_ve:
            self.value_embeds = parameter(len(with_ve), V, D)
            num_gates = sum(not spec.mudd for spec in with_ve)  # MUDD has a factor for it
            if num_gates:
                self.ve_gate = parameter(num_gates, config.num_heads, 2 * VE_GATE_COLUMNS)
        if config.attention_lambdas:
            self.lambda_qkv = parameter(L, start=0.5, dtype=wide)
            self.lambda_o = parameter(L, start=1.0, dtype=wide)
        if config.residual_lambdas:
            self.r_attn = parameter(L, start=RESIDUAL_START, dtype=wide)
            self.p_attn = parameter(L, start=1.0, dtype=wide)
            self.r_mlp = parameter(L, start=RESIDUAL_START, dtype=wide)
            self.p_mlp = parameter(L, start=1.0, dtype=wide)
        if any(spec.skip for spec in self.layers):
            self.lambda_skip = parameter(start=-1.5, dtype=wide)
        self.gate_layouts: dict[str, GateLayout] = {}
        if config.gates != "none":
            layouts = {net: GateLayout.of(config, net) for net in ("pre", "post")}
            self.gate_layouts = {net: layout for net, layout in layouts.items() if layout.size}
            self.gate_s = parameter(start=OUTPUT_SCALE, dtype=wide)
        nets = {f"gate_{net}": layout.starts() for net, layout in self.gate_layouts.items()}
        hidden_nets = list(nets) if config.gates == "network" else []
        self.has_mudd = any(spec.mudd for spec in self.layers)
        if self.has_mudd:
            layer_starts, out_starts = mudd_starts(config, RESIDUAL_START)
            nets |= {"mudd_layer": torch.tensor(layer_starts), "mudd_out": torch.tensor(out_starts)}
            hidden_nets += ["mudd_layer", "mudd_out"]
        self.net_starts = nets
        for name, starts in nets.items():
            setattr(self, f"{name}_c", parameter(len(starts)))
            if name in hidden_nets:
                setattr(self, f"{name}_W1", parameter(config.gate_hidden, D))
                setattr(self, f"{name}_W2", parameter(len(starts), config.gate_hidden))

        self.layer_functions: dict[LayerSpec, Callable] = {}  # compiled ones, by kind of layer
        self.fp8_attention: Fp8AttentionState | None = None
        if fp8 and config.attention.uses_fp8 and config.num_attentions:
            self.fp8_attention = Fp8AttentionState(config.num_attentions, config.attention)
        self.fp8_mlp: Fp8MLPState | None = None
        if fp8 and config.mlp.uses_fp8:
            self.fp8_mlp = Fp8MLPState(L, config.mlp)
        self.fp8_head = Fp8HeadState(config.head) if fp8 and config.head.fp8 else None

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start values of RECIPE section 3, drawn on the CPU: the same on every device and rank.

        Those that are constants were set by the constructor.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        bound = 3**0.5 * 0.5 * config.model_dim**-0.5

        def draw(parameter: Tensor, method: str, *args: float) -> None:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(getattr(values, method)(*args, generator=generator))

        draw(self.qk_bank, "uniform_", -bound, bound)
        draw(self.vo_bank, "uniform_", -bound, bound)
        draw(self.mlp_bank[0::2], "uniform_", -bound, bound)  # up; down stays 0
        draw(self.lm_head, "normal_", 0.0, config.embed_std)
        self.embed.copy_(self.lm_head.T)
        if self.sign_table.numel():
            signs = torch.randint(0, 2, self.sign_table.shape, generator=generator)
            self.sign_table.copy_(signs * 2 - 1)
        if hasattr(self, "value_embeds"):
            draw(self.value_embeds, "normal_", 0.0, config.value_embed_std)
        for name, starts in self.net_starts.items():
            getattr(self, f"{name}_c").copy_(starts / OUTPUT_SCALE)
            if hasattr(self, f"{name}_W1"):
                draw(
                    getattr(self, f"{name}_W1"),
                    "uniform_",
                    *(config.model_dim**-0.5 * s for s in (-1, 1)),
                )

    def compile(self, mode: Literal["off", "regional", "full"]) -> None:
        """Compile each kind of layer once ("regional"), or the whole trunk ("full").

        Anew for each size of a micro-batch and each window, in training and in validation: that is
        once a stage for both, which is more often than torch allows by itself.
        """
        if mode == "off":
            return
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        if mode == "full":
            self.trunk = torch.compile(self.trunk, dynamic=False)
        else:
            for spec in dict.fromkeys(self.layers):
                # A code object of its own: compiled versions are looked up, and limited, by that.
                code = layer_forward.__code__.replace()
                function = types.FunctionType(code, layer_forward.__globals__, "layer_forward")
                self.layer_functions[spec] = torch.compile(function, dynamic=False)

    def plan_windows(
        self, batch: MicroBatch, windows: Windows, turning: Turning | None = None
    ) -> BatchPlan:
        """What the layers share: one mask for each kind of attention, the rotary tables.

        turning: that of these windows and of the batch's tokens a part, if it is there already.
        """
        config, dtype = self.config, self.embed.dtype
        num_tokens = batch.inputs_PT.numel()
        kinds = {(spec.window, spec.paired) for spec in self.layers if spec.attention}
        masks = {}
        for window, paired in sorted(kinds):
            length = 2 if paired else 1
            masks[window, paired] = plan_attention(
                batch.cu_seqlens * length,
                num_tokens * length,
                getattr(windows, window),
                dtype,
                (config.qk_dim, config.head_dim),
                None if batch.max_seqlen is None else batch.max_seqlen * length,
            )
        dc = None
        if any(spec.dc for spec in self.layers):
            dc = plan_dc_attention(batch.cu_seqlens, num_tokens, config.dc_window)
        rotary, score_scale = turning or self.turning(windows, batch.inputs_PT.shape[1])
        first_PT = document_starts(batch) if config.isolate_documents else None
        return BatchPlan(masks, dc, rotary, score_scale, first_PT)

    def turning(self, windows: Windows, num_tokens: int, begin: int = 0) -> Turning:
        """Rotary tables of positions from `begin`, by whether heads are paired; the score scale."""
        config, device = self.config, self.embed.device
        frequencies = rotary_frequencies(config.qk_dim, config.rotary_base)
        score_scale = config.score_scale
        for old, new in windows.yarn:
            frequencies, factor = yarn(frequencies, old, new)
            score_scale *= factor
        frequencies, rotary = to_device(frequencies, device), {}
        for paired in sorted({spec.paired for spec in self.layers if spec.attention}):
            heads = config.num_heads if paired else 0
            positions = rotary_positions(num_tokens, heads) + (2 * begin if paired else begin)
            positions = to_device(positions, device)
            rotary[paired] = rotary_table(frequencies, positions, self.embed.dtype)
        return rotary, score_scale

    def refresh_fp8(self, down_own_amax: bool) -> None:
        """FP8 copies of the weights as they are now; once a step, before its micro-batches."""
        if self.fp8_attention is not None:
            self.fp8_attention.refresh(self.qk_bank, self.vo_bank)
        if self.fp8_mlp is not None:
            self.fp8_mlp.refresh(self.mlp_bank, down_own_amax)
        if self.fp8_head is not None:
            self.fp8_head.refresh(self.lm_head)

    def forward(self, batch: MicroBatch, plan: BatchPlan) -> Tensor:
        """z (P*T, V), before the softcap."""
        return self.trunk(batch, plan) @ self.lm_head

    def trunk(self, batch: MicroBatch, plan: BatchPlan, training: bool = False) -> Tensor:
        """(P*T, D): what the head multiplies. FP8 is for training only."""
        config = self.config
        e = self.embedding(batch, plan)
        x0 = F.rms_norm(e, e.shape[-1:], eps=NORM_EPS)
        bigram = self.bigram(batch)
        net = "pre"
        gates = self.gates(net, x0)
        terms = [(1.0, x0)]
        if bigram is not None:
            first = gates.get(0, NO_GATES)
            terms += [(config.bigram_scale if first.bigram is None else first.bigram, bigram)]
            gates[0] = first._replace(bigram=None)
        x, normed, _ = residual_mix_norm(terms)
        c0, saved, mudd_input = x, [(None, None)], None  # saved x, and its norm
        value_embeds = self.embedded_values(batch)
        own_values = iter(value_embeds)
        fp8_states = (self.fp8_attention, self.fp8_mlp) if training else (None, None)
        fp8_layers = [[] if state is None else state.layers() for state in fp8_states]
        attention_fp8, mlp_fp8 = (itertools.chain(p, itertools.repeat(None)) for p in fp8_layers)
        for i, (spec, weights) in enumerate(zip(self.layers, self.layer_weights(), strict=True)):
            if spec.gate_net != net:
                net = spec.gate_net
                gates |= self.gates(net, x)
            own_value = next(own_values) if spec.value_embed else None
            streams = Streams(normed, x0, c0, bigram, *saved[-1], own_value)
            mudd = None
            if spec.mudd:
                mudd_input = x
                mudd = MuddLayer(*self.mudd_factors("mudd_layer", x))
            layer = self.layer_functions.get(spec, layer_forward)
            own_gates = gates.get(i, NO_GATES)
            fp8 = LayerFp8(next(attention_fp8) if spec.attention else None, next(mlp_fp8))
            inputs = (config, spec, x, streams, own_gates, mudd, weights, plan, fp8)
            x, normed = layer(*inputs, self.norm_is_read(i))
            if spec.save:
                saved.append((x, normed))
        for state, layers in zip(fp8_states, fp8_layers, strict=True):
            if state is not None:
                state.update(layers)
        if mudd_input is not None:
            out = MuddOut(*self.mudd_factors("mudd_out", x))
            terms = [(1.0, x), (out.c0, c0), (out.saved, saved[-1][0])]
            terms += [(out.mudd_input, mudd_input), (out.first_saved, saved[1][0])]
            terms += [(out.value_embed, value_embeds[0])] if value_embeds else []
            _, normed, _ = residual_mix_norm(terms)
        return normed.flatten(0, 1)

    def norm_is_read(self, i: int) -> bool:
        """Of x behind layer i: by the next layer, one that shares what i saves, or the head."""
        later = self.layers[i + 1 :]
        if not later:
            return not self.has_mudd
        shares = self.layers[i].save and any(spec.shared_input for spec in later)
        return shares or reads_norm(self.config, later[0])

    def embedding(self, batch: MicroBatch, plan: BatchPlan) -> Tensor:
        """Token embeddings (P, T, D), each smeared with that of the token before."""
        e = F.embedding(batch.inputs_PT, self.embed)
        if not self.config.smear:
            return e
        gate = torch.sigmoid(e[..., : len(self.w_smear)] @ self.w_smear[:, None])
        gate = gate * self.lambda_smear.to(e.dtype)
        if plan.first_PT is not None:
            gate = gate.masked_fill(plan.first_PT[..., None], 0)
        before = previous(e) if plan.past is None else plan.past.previous(e)
        return e + gate * before

    def bigram(self, batch: MicroBatch) -> Tensor | None:
        """Signed rows of the bigram table (P, T, bigram_dim)."""
        rows, signs = self.table_rows(batch)
        if rows is None:
            return None
        b = F.embedding(rows, self.bigram_embed)
        return b if signs is None else b * F.embedding(signs, self.sign_table)

    def table_rows(self, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
        """Rows (P, T) of bigram and sign table that this batch reads."""
        if batch.bigram_rows_PT is None or not self.config.isolate_documents:
            return batch.bigram_rows_PT, batch.sign_rows_PT
        return isolated_rows(batch, document_starts(batch), self.config.bigram_rows)

    def embedded_values(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Rows (P, T, D) of each value embedding."""
        if not any(spec.value_embed for spec in self.layers):
            return ()
        num_tables, num_rows = self.value_embeds.shape[:2]
        offsets = num_rows * torch.arange(num_tables, device=batch.inputs_PT.device)
        rows = batch.inputs_PT + offsets[:, None, None]
        return F.embedding(rows, self.value_embeds.flatten(0, 1)).unbind(0)

    def gates(self, net: str, x: Tensor) -> dict[int, Gates]:
        """By layer what the gate network `net` makes of x (P, T, D)."""
        layout = self.gate_layouts.get(net)
        if layout is None:
            return {}
        gates = layout.split(self.small_network(f"gate_{net}", x, self.gate_s))
        for i, layer in gates.items():
            if layer.skip is not None:
                gates[i] = layer._replace(skip=torch.sigmoid(self.lambda_skip) * layer.skip)
        return gates

    def mudd_factors(self, net: str, x: Tensor) -> tuple[Tensor, ...]:
        """Factors (P, T, 1) in RECIPE's order."""
        return self.small_network(net, x, OUTPUT_SCALE).split(1, dim=-1)

    def small_network(self, name: str, x: Tensor, scale: Tensor | float) -> Tensor:
        """(P, T, G), or (1, 1, G) where the outputs don't depend on the token."""
        w1, w2 = getattr(self, f"{name}_W1", None), getattr(self, f"{name}_W2", None)
        return small_network(x, w1, w2, getattr(self, f"{name}_c"), scale)

    def layer_weights(self) -> list[LayerWeights]:
        """The parameters of each layer, cut out of their banks."""
        qk, vo = iter(self.qk_bank.split(self.config.num_heads)), iter(self.vo_bank.split(2))
        ve_gates = iter(getattr(self, "ve_gate", ()))

        def factors(name: str) -> tuple[Tensor | None, ...]:
            parameter = getattr(self, name, None)
            return (None,) * len(self.layers) if parameter is None else parameter.unbind()

        def residual(name: str) -> tuple[Tensor | float, ...]:  # used rounded to x's type
            return tuple(1.0 if f is None else f.to(self.embed.dtype) for f in factors(name))

        weights = []
        for spec, *own in zip(
            self.layers,
            self.mlp_bank.split(2),
            factors("lambda_qkv"),
            factors("lambda_o"),
            *(residual(name) for name in ("r_attn", "p_attn", "r_mlp", "p_mlp")),
            strict=True,
        ):
            mlp, lambda_qkv, lambda_o, *mix = own
            attends = spec.attention is not None
            gated_values = spec.value_embed and not spec.mudd
            weights.append(
                LayerWeights(
                    *mlp.unbind(),
                    next(qk) if attends else None,
                    next(vo) if attends else None,
                    lambda_qkv,
                    lambda_o,
                    next(ve_gates) if gated_values else None,
                    *mix,
                )
            )
        return weights

    def training_loss(self, batch: MicroBatch, plan: BatchPlan, weights: LossWeights) -> Tensor:
        """Scalar: weighted loss summed over the positions of the micro-batch, fp32 or wider."""
        head, fp8 = self.config.head, self.fp8_head
        numbers = weights.on(self.embed.device).tensor
        targets_TN = shifted_targets(batch.targets_PT, len(weights.multi_token), plan.first_PT)
        prefix_targets_T = None
        if weights.prefix:
            prefix_targets_T = weights.prefix_table_V[batch.targets_PT.flatten()]
        losses = self.losses(
            self.trunk(batch, plan, training=True),
            targets_TN,
            numbers[:-1],
            prefix_targets_T=prefix_targets_T,
            prefix_weight=numbers[-1] if weights.prefix else 0.0,
            count_missing_targets=head.count_missing_targets,
            round_sigmoid=head.round_sigmoid and fp8 is not None,
            fp8=None if fp8 is None else fp8.current(),
            form="logits" if fp8 is None else head.form,
        )
        return losses.sum()

    def validation_loss(self, batch: MicroBatch, plan: BatchPlan) -> Tensor:
        """Scalar: plain cross-entropy of the next token, summed over the positions."""
        targets_TN = shifted_targets(batch.targets_PT, 1)
        weight_N = torch.ones(1, device=targets_TN.device)
        return self.losses(self.trunk(batch, plan), targets_TN, weight_N).sum()

    def losses(self, x_TD: Tensor, targets_TN: Tensor, weights_N: Tensor, **options: Any) -> Tensor:
        """(P*T,) softcapped cross-entropy of the head; `options` are head_loss's."""
        config = self.config
        softcap = (config.softcap_a, config.softcap_b, config.softcap_c)
        return head_loss(x_TD, self.lm_head, targets_TN, weights_N.float(), *softcap, **options)
