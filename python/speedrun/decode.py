"""Text token by token: the model's forward pass over new tokens alone, with what the earlier ones
left, and how the next token is drawn.

T new tokens, S keys kept and new, D model dim, H heads, K and E head dims of keys and values, V
vocabulary. One sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun import baseline_model
from speedrun._numpy_loader import bigram_rows, sign_rows
from speedrun.baseline_model import BaselineGPT
from speedrun.batch import MicroBatch, isolated_rows
from speedrun.config import LayerSpec, Windows
from speedrun.layer import BatchPlan
from speedrun.model import GPT
from speedrun.ops.qk_norm_rope import key_offset, pair_heads, unpair_heads
from speedrun.reference.dc_attention import normed_over_heads
from speedrun.reference.softcap_ce import softcap

# A document's first tokens look back over its start (smear, bigram hash, key offset), and the first
# two tokens of all are hashed in a way of their own (RECIPE section 2). Behind so many lone BOS a
# document's states are the same wherever it is, and its rows those that training met.
LEADING_BOS = 3
TOKENS_AT_ONCE = 512  # of a prompt: scores are (H, 512, history + 512)


class Decoder(Protocol):
    """A sequence so far. `decoder_for` makes the one for a model."""

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append at least one token; logits (V,) of the one that follows, in at least fp32."""


def decoder_for(model: GPT | BaselineGPT, windows: Windows, bos_id: int) -> Decoder:
    """At the start of a sequence; `bos_id` begins a document in it."""
    if isinstance(model, BaselineGPT):
        return SequenceDecoder(model, windows)
    return CachedDecoder(model, windows, bos_id)


class KeyValueCache:
    """One layer's keys and values, as far back as it looks: memory is bounded.

    Two windows' worth of room, so that the kept ones move to the front only when it is full.
    """

    def __init__(self, history: int, num_heads: int, head_dims: tuple[int, int], like: Tensor):
        self.history, self.begin, self.end = history, 0, 0
        room = 2 * history + TOKENS_AT_ONCE
        self.k, self.v = (like.new_empty(room, num_heads, head_dim) for head_dim in head_dims)
        self.last_k: Tensor | None = None  # (1, H, K) of the token before, without its offset

    def append(self, k_THK: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (S, H, K) and values (S, H, E): up to `history` earlier ones, then these."""
        begin, end = max(self.begin, self.end - self.history), self.end
        if end + len(k_THK) > len(self.k):
            for buffer in (self.k, self.v):
                buffer[: end - begin] = buffer[begin:end].clone()
            begin, end = 0, end - begin
        self.begin, self.end = begin, end + len(k_THK)
        self.k[end : self.end], self.v[end : self.end] = k_THK, v_THE
        return self.k[begin : self.end], self.v[begin : self.end]

    def offset(self, k_THK: Tensor, first_PT: Tensor | None) -> Tensor:
        """Keys with their offset, of which the first takes its share of the call before's last."""
        k = k_THK if self.last_k is None else torch.cat([self.last_k, k_THK])
        self.last_k = k_THK[-1:]
        if first_PT is not None:
            first_PT = F.pad(first_PT, (len(k) - len(k_THK), 0))
        return key_offset(k[None], first_PT)[0, -len(k_THK) :]


class CachedDecoder:
    """The forward pass of `GPT` over new tokens, which see the earlier ones by caches.

    The states are those of one pass over all tokens, with documents beginning at `bos_id`, up to
    rounding. Positions count on for ever; every cache is bounded by what its layer looks back.
    """

    def __init__(self, model: GPT, windows: Windows, bos_id: int) -> None:
        self.model, self.windows, self.bos_id = model, windows, bos_id
        config = model.config
        head_dims = (config.qk_dim, config.head_dim)
        attending = [spec for spec in model.layers if spec.attention]
        self.caches = [
            KeyValueCache(self.history(spec), config.num_heads, head_dims, model.embed)
            for spec in attending
        ]
        self.position = self.document = 0  # of the next token; where its document began
        self.last_tokens = np.zeros(0, np.int32)  # at most two: hashes look back so far
        self.last_are_first = np.zeros(0, bool)  # in a document
        self.last_embedding: Tensor | None = None  # (1, 1, D), before it was smeared

    def history(self, spec: LayerSpec) -> int:
        """How many earlier tokens a layer looks back."""
        window = getattr(self.windows, spec.window)
        tokens = -(-window // 2) if spec.paired else window
        return max(tokens, self.model.config.dc_window - 1) if spec.dc else tokens

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        config = self.model.config
        z_V = self.states(tokens)[-1] @ self.model.lm_head[:, : config.vocab_size]
        return softcap(z_V, config.softcap_a, config.softcap_b, config.softcap_c)

    @torch.no_grad()
    def states(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; (T, D): what the head multiplies, of each. ValueError for none."""
        if not len(tokens):
            raise ValueError("no tokens to append: a sequence begins with BOS")
        new = np.asarray(tokens, np.int32)
        chunks = [new[i : i + TOKENS_AT_ONCE] for i in range(0, len(new), TOKENS_AT_ONCE)]
        return torch.cat([self._advance(chunk) for chunk in chunks])

    def _advance(self, new: np.ndarray) -> Tensor:
        model, device = self.model, self.model.embed.device
        first = new == self.bos_id
        first[0] |= self.position == 0
        positions = self.position + np.arange(len(new))
        starts = np.maximum.accumulate(np.where(first, positions, self.document))
        batch, first_PT = self._batch(new, first)
        turning = model.turning(self.windows, len(new), self.position)
        past = Past(self, torch.from_numpy(starts).to(device), first_PT, turning[1])
        states = model.trunk(batch, BatchPlan({}, None, *turning, first_PT, past))
        self.position, self.document = self.position + len(new), int(starts[-1])
        return states

    def _batch(self, new: np.ndarray, first: np.ndarray) -> tuple[MicroBatch, Tensor | None]:
        """The new tokens, with rows of the tables that depend on those before them too; and, if
        nothing may look across, where documents begin (1, T)."""
        config, device = self.model.config, self.model.embed.device
        tokens = np.concatenate([self.last_tokens, new])
        firsts = np.concatenate([self.last_are_first, first])
        begin = len(self.last_tokens)
        self.last_tokens, self.last_are_first = tokens[-2:], firsts[-2:]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array)[None].to(device)

        def batch(start: int, rows: Tensor | None, signs: Tensor | None) -> MicroBatch:
            inputs = tensor(tokens[start:])
            places = np.append(np.flatnonzero(firsts[start:]), inputs.numel())
            return MicroBatch(inputs, inputs.long(), tensor(places)[0].int(), rows, signs)

        rows = tensor(bigram_rows(tokens, config.bigram_rows)) if config.bigram_rows else None
        signs = tensor(sign_rows(tokens, config.sign_rows)) if config.sign_rows else None
        if config.isolate_documents and rows is not None:
            rows, signs = isolated_rows(batch(0, rows, signs), tensor(firsts), config.bigram_rows)
        rows, signs = (None if x is None else x[:, begin:] for x in (rows, signs))
        first_PT = tensor(first) if config.isolate_documents else None
        return batch(begin, rows, signs), first_PT


class Past:
    """`layer.Past` of a CachedDecoder, for one pass of its model."""

    def __init__(
        self,
        decoder: CachedDecoder,
        starts_T: Tensor,
        first_PT: Tensor | None,
        score_scale: float,
    ) -> None:
        self.decoder, self.caches = decoder, iter(decoder.caches)
        self.starts_T, self.first_PT, self.score_scale = starts_T, first_PT, score_scale

    def previous(self, e_PTD: Tensor) -> Tensor:
        before, self.decoder.last_embedding = self.decoder.last_embedding, e_PTD[:, -1:]
        before = torch.zeros_like(e_PTD[:, :1]) if before is None else before
        return torch.cat([before, e_PTD[:, :-1]], dim=1)

    def attend(
        self,
        spec: LayerSpec,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THE: Tensor,
        w1_TH: Tensor | None,
        w2_TH: Tensor | None,
    ) -> Tensor:
        config, cache = self.decoder.model.config, next(self.caches)
        if config.key_offset and spec.window == "long":
            k_THK = cache.offset(k_THK, self.first_PT)
        k_SHK, v_SHE = cache.append(k_THK, v_THE)
        window = getattr(self.decoder.windows, spec.window)
        if spec.paired:
            q, k, v = (pair_heads(x) for x in (q_THK, k_SHK, v_SHE))
            y_THE = unpair_heads(weighted(self.weights(q, k, window, places=2), v))
        else:
            y_THE = weighted(self.weights(q_THK, k_SHK, window), v_SHE)
        if spec.dc:
            weights_HTS = self.weights(q_THK, k_SHK, config.dc_window - 1)
            w1_HT1 = normed_over_heads(w1_TH, q_THK.dtype).T[..., None]
            mixed_HTS = (weights_HTS * w1_HT1).sum(0, keepdim=True).expand_as(weights_HTS)
            y_THE = y_THE + weighted(mixed_HTS, v_SHE) * w2_TH[..., None]
        return y_THE

    def weights(self, q_THK: Tensor, k_SHK: Tensor, window: int, places: int = 1) -> Tensor:
        """(H, T, S), at least fp32: softmax over the window's keys of each query's document.

        `places` of a token in the sequence: in one of paired heads 2."""
        starts_T = places * self.starts_T.repeat_interleave(places)
        end = places * self.decoder.position + len(q_THK)
        key_S = torch.arange(end - len(k_SHK), end, device=starts_T.device)
        query_T1 = key_S[-len(q_THK) :, None]
        seen_TS = (key_S <= query_T1) & (
            key_S >= torch.maximum(query_T1 - window, starts_T[:, None])
        )
        scores_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK)
        scores_HTS = scores_HTS.to(torch.promote_types(q_THK.dtype, torch.float32))
        return (self.score_scale * scores_HTS).masked_fill(~seen_TS, -torch.inf).softmax(-1)


def weighted(weights_HTS: Tensor, v_SHE: Tensor) -> Tensor:
    """(T, H, E)"""
    return torch.einsum("hts,she->the", weights_HTS.to(v_SHE.dtype), v_SHE)


class SequenceDecoder:
    """`BaselineGPT` has no caches: each call computes all tokens again."""

    def __init__(self, model: BaselineGPT, windows: Windows) -> None:
        self.model, self.windows = model, windows
        self.tokens: list[int] = []

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        model = self.model
        self.tokens += map(int, tokens)
        inputs = torch.tensor([self.tokens], dtype=torch.int32, device=model.embed.device)
        ends = torch.tensor([0, len(self.tokens)], dtype=torch.int32, device=inputs.device)
        batch = MicroBatch(inputs, inputs.long(), ends)
        states_1D = model.trunk(batch, model.plan_windows(batch, self.windows))[-1:]
        rows = (states_1D, model.lm_head, model.head_bias, model.config.softcap)
        return baseline_model.logits(*rows)[0, : model.config.vocab_size]


def opening(model: GPT | BaselineGPT, bos_id: int) -> list[int]:
    """Tokens in front of a sequence's first text. `BaselineGPT` looks over documents' starts."""
    return [bos_id] if isinstance(model, BaselineGPT) else [bos_id] * (LEADING_BOS + 1)


def generate(
    decoder: Decoder,
    tokens: Sequence[int],
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """Tokens that follow `tokens`, for ever; each is computed when it is asked for."""
    while True:
        token = draw(decoder.feed(tokens), temperature, top_k, generator)
        yield token
        tokens = [token]


def draw(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """One token of softmax(logits/temperature), if among the `top_k` largest; 0: the largest.

    Drawn on the CPU: the same on every device, up to rounding of the logits.
    """
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    probabilities_V = (logits_V / temperature).softmax(-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
