"""The record's model written from RECIPE sections 2 and 3: one part, token by token, in float64.

It shares no code with the package; it reads a config's words and parameters by their names. T
tokens, D model dim, H heads, K head dim of queries and keys, E of values. What a document's tokens
can see of others depends on `config.isolate_documents` alone.
"""

import math

import torch
from torch import Tensor

ROLES = {  # a layer's role and the switch of all layers that have it
    "paired": "paired_heads",
    "value_embed": "value_embeds",
    "xsa": "xsa",
    "gated": "attention_gate",
    "dc": "dc",
    "skip": "skip",
    "shared_input": "shared_attention_input",
    "mudd": "mudd",
}


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def signed32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


class RecordDefinition:
    """z (T, V) of `tokens`, whose documents begin at `starts` (the last entry is T)."""

    def __init__(self, model, tokens: list[int], starts: list[int], windows) -> None:
        self.config, self.layers, self.windows = model.config, model.config.layers, windows
        self.p = dict(model.named_parameters())
        self.signs, self.tokens, self.starts = model.sign_table, tokens, starts
        self.T, self.H, self.E = len(tokens), self.config.num_heads, self.config.head_dim
        self.K = self.config.qk_head_dim or self.E
        self.index = torch.tensor(tokens)
        self.frequencies = [1024 ** -(i / max(self.K // 4 - 1, 1)) for i in range(self.K // 4)]
        self.score_scale = self.config.score_scale
        for old, new in windows.yarn:
            blends = [(old * f / (2 * math.pi) - 1) / (32 - 1) for f in self.frequencies]
            blends = [min(max(blend, 0), 1) for blend in blends]
            ratio = old / new
            self.frequencies = [
                f * (ratio + blend * (1 - ratio))
                for f, blend in zip(self.frequencies, blends, strict=True)
            ]
            self.score_scale *= 0.2 * math.log(new / old) + 1

    def has(self, spec, role: str) -> bool:
        return getattr(spec, role) and getattr(self.config, ROLES[role])

    def document(self, t: int) -> int:
        """Where the document of position t begins."""
        return max(start for start in self.starts[:-1] if start <= t)

    def first(self, t: int) -> bool:
        """Whether nothing is before t, for what ignores documents unless they are isolated."""
        return t == 0 or (self.config.isolate_documents and self.document(t) == t)

    # ---- Embedding ----

    def smeared(self) -> Tensor:
        e = self.p["embed"][self.index]
        if not self.config.smear:
            return e
        rows = []
        for t in range(self.T):
            if self.first(t):
                rows.append(e[t])
            else:
                gate = torch.sigmoid(self.p["w_smear"] @ e[t, :12])
                rows.append(e[t] + self.p["lambda_smear"] * gate * e[t - 1])
        return torch.stack(rows)

    def bigram(self) -> Tensor:
        R, S, rows = self.config.bigram_rows, self.config.sign_rows, []
        for t, token in enumerate(self.tokens):
            if self.first(t):
                row, sign = R - 1, 0
            else:
                before = self.tokens[t - 1]
                other = R - 1 if self.first(t - 1) else before
                row = (signed32(36313 * token) ^ signed32(27191 * other)) % (R - 1)
                sign = (before ^ token) % S if S else 0
            b = self.p["bigram_embed"][row]
            rows.append(b * self.signs[sign] if S else b)
        return torch.stack(rows)

    # ---- Small networks ----

    def network(self, name: str, x: Tensor) -> Tensor:
        """W2·gelu(W1·x) + c (T, outputs); c alone where there are no weights."""
        c = self.p[f"{name}_c"].expand(self.T, -1)
        if f"{name}_W1" not in self.p:
            return c
        return gelu(x @ self.p[f"{name}_W1"].T) @ self.p[f"{name}_W2"].T + c

    def gates(self, net: str, x: Tensor) -> dict[tuple[int, str], Tensor]:
        """(layer, gate) -> (T, H or 1), in the order that RECIPE lists the outputs in."""
        if self.config.gates == "none":
            return {}
        own = [(i, spec) for i, spec in enumerate(self.layers) if spec.gate_net == net]
        attending = [(i, spec) for i, spec in own if spec.attention]
        names = [(i, "xsa", self.H) for i, spec in attending if self.has(spec, "xsa")]
        names += [(i, "attention", self.H) for i, spec in attending if self.has(spec, "gated")]
        for i, spec in attending:
            if not self.has(spec, "mudd"):
                names += [(i, "x0", 1)]
                names += [(i, "bigram", 1)] if self.config.bigram_rows else []
        names += [(i, "skip", 1) for i, spec in own if self.has(spec, "skip")]
        for i, spec in attending:
            names += [(i, "dc1", self.H), (i, "dc2", self.H)] if self.has(spec, "dc") else []
        if not names:
            return {}
        outputs = self.p["gate_s"] * self.network(f"gate_{net}", x)
        pieces = outputs.split([size for _, _, size in names], dim=-1)
        return {(i, gate): piece for (i, gate, _), piece in zip(names, pieces, strict=True)}

    # ---- Attention ----

    def turned(self, x: Tensor, paired: bool) -> Tensor:
        """(T, H, K), normed and rotated: head h of token t by its position."""
        x, half = norm(x), self.K // 2
        positions = [[2 * t + h % 2 if paired else t for h in range(self.H)] for t in range(self.T)]
        theta = torch.tensor(positions)[..., None] * torch.tensor(
            self.frequencies, dtype=torch.float64
        )
        a, b = x[..., 0:half:2], x[..., 1:half:2]
        pairs = [a * theta.cos() + b * theta.sin(), b * theta.cos() - a * theta.sin()]
        return torch.cat([torch.stack(pairs, dim=-1).flatten(2), x[..., half:]], dim=-1)

    def weights(self, q: Tensor, k: Tensor, t: int, h: int, window: int, paired: bool):
        """Tokens and heads of the keys that head h of token t sees, and their softmax."""
        start = self.document(t)
        if paired:
            j, place = h % (self.H // 2), 2 * t + h // (self.H // 2)
            places = range(max(2 * start, place - window), place + 1)
            keys = [s // 2 for s in places], [j + (self.H // 2) * (s % 2) for s in places]
        else:
            keys = list(range(max(start, t - window), t + 1)), h
        return keys, (self.score_scale * (k[keys] @ q[t, h])).softmax(0)

    def attend(self, i: int, spec, number: int, h_TD: Tensor, extra: Tensor, gates) -> Tensor:
        """Attention_i, the `number`-th attention; `extra` (T, D) is added to the values."""
        H, K, E, D = self.H, self.K, self.E, self.H * self.E
        bank = self.p["qk_bank"][number * H : (number + 1) * H]
        w_q, w_k = bank[: H // 2].reshape(H * K, D), bank[H // 2 :].reshape(H * K, D)
        w_v, w_o = self.p["vo_bank"][2 * number], self.p["vo_bank"][2 * number + 1]
        if self.config.attention_lambdas:
            w_q, w_k, w_v = (self.p["lambda_qkv"][i] * w for w in (w_q, w_k, w_v))
            w_o = self.p["lambda_o"][i] * w_o
        paired, long = self.has(spec, "paired"), spec.window == "long"
        q, k = (self.turned((h_TD @ w.T).view(-1, H, K), paired) for w in (w_q, w_k))
        v = (h_TD @ w_v.T + extra).view(-1, H, E)
        if long and self.config.key_offset:
            still = [k[t if self.first(t) else t - 1, :, K // 2 :] for t in range(self.T)]
            k = torch.cat([k[..., : K // 2], torch.stack(still)], dim=-1)
        window = self.windows.long if long else self.windows.short
        rows = []
        for t in range(self.T):
            heads = []
            for h in range(H):
                keys, weights = self.weights(q, k, t, h, window, paired)
                heads.append(weights @ v[keys])
            if self.has(spec, "dc"):
                heads = self.composed(i, q, k, v, t, heads, gates)
            for h in range(H):
                if self.has(spec, "xsa") and gates:
                    share = (heads[h] @ v[t, h]) / (v[t, h] @ v[t, h]).clamp(min=1e-8)
                    heads[h] = heads[h] - torch.tanh(gates[i, "xsa"][t, h]) * share * v[t, h]
                if self.has(spec, "gated") and gates:
                    heads[h] = gates[i, "attention"][t, h] * heads[h]
            rows.append(torch.cat(heads))
        return torch.stack(rows) @ w_o.T

    def composed(self, i: int, q, k, v, t: int, heads: list[Tensor], gates) -> list[Tensor]:
        """DC: heads' softmaxes over the last positions, mixed by w1, added to each head by w2."""
        w1, w2 = gates[i, "dc1"][t], gates[i, "dc2"][t]
        w1 = w1 / (w1.pow(2).mean() + 1e-6).sqrt()
        mixed = 0
        for h in range(self.H):
            (keys, _), weights = self.weights(q, k, t, h, self.config.dc_window - 1, False)
            mixed = mixed + w1[h] * weights
        return [y + w2[h] * (mixed @ v[keys, h]) for h, y in enumerate(heads)]

    # ---- Layers ----

    def z(self) -> Tensor:
        config, p = self.config, self.p
        tables = iter(p["value_embeds"] if "value_embeds" in p else ())
        ve_gates, values = iter(p.get("ve_gate", ())), []
        x0 = norm(self.smeared())
        b = torch.zeros_like(x0)
        if config.bigram_rows:
            b = torch.cat([self.bigram(), b[:, config.bigram_dim :]], dim=-1)
        net, gates = "pre", self.gates("pre", x0)
        x = x0 + gates.get((0, "bigram"), config.bigram_scale) * b
        c0, saved, entry, number = x, [], None, 0
        for i, spec in enumerate(self.layers):
            if spec.gate_net != net:
                net = spec.gate_net
                gates |= self.gates(net, x)
            if self.has(spec, "skip"):
                x = x + torch.sigmoid(p["lambda_skip"]) * gates[i, "skip"] * saved[-1]
            r_attn, p_attn, r_mlp, p_mlp = (
                p[name][i] if config.residual_lambdas else 1.0
                for name in ("r_attn", "p_attn", "r_mlp", "p_mlp")
            )
            mudd = self.has(spec, "mudd")
            if mudd:
                entry = x
                mu = (0.1 * self.network("mudd_layer", x)).split(1, dim=-1)
                r_mlp, p_mlp = mu[12], mu[13]
            if self.has(spec, "value_embed"):
                values.append(next(tables)[self.index])
            if spec.attention:
                h = norm(saved[-1] if self.has(spec, "shared_input") else x)
                extra = torch.zeros_like(x)
                if self.has(spec, "value_embed"):
                    ve = values[-1]
                    if mudd:
                        halves = [mu[6]] * (self.H // 2) + [mu[7]] * (self.H // 2)
                        g = torch.cat(halves, dim=-1)
                    else:
                        inputs = torch.cat([h[:, :6], ve[:, :6]], dim=-1)
                        g = 2 * torch.sigmoid(inputs @ next(ve_gates).T)
                    extra = (g[..., None] * ve.view(self.T, self.H, self.E)).flatten(1)
                if mudd:
                    extra = extra + mu[0] * c0 + mu[1] * saved[-1] + mu[2] * x
                a = self.attend(i, spec, number, h, extra, gates)
                number += 1
                if mudd:
                    x = (1 + mu[5]) * x + mu[3] * c0 + mu[4] * saved[-1]
                    x = mu[8] * x + mu[9] * a + mu[10] * c0 + mu[11] * b
                else:
                    x = r_attn * x + p_attn * a + gates.get((i, "x0"), 0.0) * x0
                    x = x + (gates.get((i, "bigram"), 0.0) if i else 0.0) * b
            up, down = p["mlp_bank"][2 * i], p["mlp_bank"][2 * i + 1]
            x = r_mlp * x + p_mlp * ((norm(x) @ up.T).clamp(min=0).pow(2) @ down)
            if spec.save:
                saved.append(x)
        if entry is not None:
            nu = (0.1 * self.network("mudd_out", x)).split(1, dim=-1)
            x = x + nu[0] * c0 + nu[1] * saved[-1] + nu[2] * entry + nu[4] * saved[0]
            x = x + nu[3] * values[0] if values else x
        return norm(x) @ p["lm_head"]
