"""Gate networks: whose outputs go where, and what they are at the start (RECIPE section 3)."""

import dataclasses
import itertools
import math

import pytest
import torch

from numerics import assert_accurate
from op_helpers import assert_compiles, assert_same_with_gradients
from speedrun import recipes
from speedrun.config import LayerSpec, Windows
from speedrun.gates import GateLayout, MuddLayer, MuddOut, small_network
from speedrun.model import GPT
from train_helpers import FLOAT64_NOISE, make_batch, normal

RECORD = recipes.load("record_089").model
HEADS = 6
SMALL = dataclasses.replace(
    RECORD, model_dim=48, head_dim=8, mlp_hidden=48, vocab_size=60, bigram_rows=64, bigram_dim=48,
    sign_rows=16,
)  # fmt: skip

# RECIPE, in its words: what, of which layer, how many, the value in brackets.
PRE = [("xsa", 1, HEADS, 0), ("xsa", 3, HEADS, 0), ("attention", 3, HEADS, 0.25)]
PRE += [(gate, i, 1, start) for i in range(4) for gate, start in (("x0", 0), ("bigram", 0.05))]
POST = [("xsa", 4, HEADS, 0), ("xsa", 7, HEADS, 0), ("attention", 10, HEADS, 0.25)]
POST += [
    (gate, i, 1, start) for i in (4, 5, 7, 8, 9) for gate, start in (("x0", 0), ("bigram", 0.05))
]
POST += [("skip", 6, 1, 0.5), ("dc1", 10, HEADS, 1), ("dc2", 10, HEADS, 0)]


@pytest.mark.parametrize(("net", "expected", "size"), [("pre", PRE, 26), ("post", POST, 41)])
def test_outputs_of_the_record(net, expected, size):
    layout = GateLayout.of(RECORD, net)
    assert layout.size == size == sum(count for _, _, count, _ in expected)
    starts = [start for _, _, count, start in expected for _ in range(count)]
    torch.testing.assert_close(layout.starts(), torch.tensor(starts, dtype=torch.float32))
    # Each output reaches the gate of its layer: outputs that are their own numbers.
    found, number = layout.split(torch.arange(size).view(1, 1, size)), 0
    for gate, layer, count, _ in expected:
        own = getattr(found[layer], gate)
        assert own.flatten().tolist() == list(range(number, number + count)), (gate, layer)
        number += count
    given = {(gate, layer) for gate, layer, _, _ in expected}
    for layer, gates in found.items():
        assert {(g, layer) for g in gates._fields if getattr(gates, g) is not None} <= given


def test_outputs_are_counted():
    layout = GateLayout.of(RECORD, "pre")
    with pytest.raises(AssertionError):
        layout.split(torch.zeros(1, 1, 25))


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"xsa": False}, (14, 29)),
        ({"attention_gate": False}, (20, 35)),
        ({"dc": False}, (26, 29)),
        ({"skip": False}, (26, 40)),
        ({"bigram_rows": 0, "bigram_dim": 0}, (22, 36)),
        ({"mudd": False}, (26, 43)),  # layer 10 has x0 and bigram gates then, as other layers do
    ],
    ids=str,
)
def test_outputs_without_a_technique(changes, sizes):
    config = dataclasses.replace(RECORD, **changes)
    assert tuple(GateLayout.of(config, net).size for net in ("pre", "post")) == sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", ["network", "constant"])
def test_first_outputs_are_the_values_in_brackets(dtype, gates):
    """W2 = 0 at the start, whatever x is; s·c = 0.1·(value/0.1), c in bf16 in training."""
    config = dataclasses.replace(SMALL, gates=gates)
    model = GPT(config, dtype)
    model.init_weights(0)
    x = normal(2, 5, 48, dtype=dtype)
    # c and the product are rounded to bf16; in float64 what is left is float32's start value of s.
    tolerance = dict(rtol=2**-7 if dtype == torch.bfloat16 else 2**-22, atol=0)
    for net, expected in (("pre", PRE), ("post", POST)):
        found = model.gates(net, x)
        for gate, layer, count, start in expected:
            out = getattr(found[layer], gate)
            # The skip gate's share: σ(λ_skip) with λ_skip = −1.5.
            value = start / (1 + math.exp(1.5)) if gate == "skip" else start
            tokens = (2, 5) if gates == "network" else (1, 1)
            expected_out = torch.full((*tokens, count), value, dtype=torch.float64)
            torch.testing.assert_close(out.double(), expected_out, **tolerance)
        assert model.gate_s.dtype == torch.promote_types(dtype, torch.float32)
        assert model.gate_s.item() == pytest.approx(0.1)


def test_first_factors_of_mudd():
    """μ0 … μ13 and ν0 … ν4 in RECIPE's order, and their c in bf16: 10.5 for μ8 and μ12."""
    model = GPT(SMALL, torch.bfloat16)
    model.init_weights(0)
    root = 1.1**0.5
    mu = [0, 0, 0, 0, 0, 0, 2, 2, root, 1, 0, 0.05, root, 1]
    nu = [0, -0.5, 0, 0, 0]
    assert MuddLayer._fields == (
        *("v_c0", "v_saved", "v_x", "c0", "saved", "x", "ve_low", "ve_high"),
        *("r_attn", "p_attn", "c0_attn", "bigram", "r_mlp", "p_mlp"),
    )
    assert MuddOut._fields == ("c0", "saved", "mudd_input", "value_embed", "first_saved")
    for name, starts in (("mudd_layer", mu), ("mudd_out", nu)):
        c = getattr(model, f"{name}_c")
        assert torch.equal(c, (torch.tensor(starts) / 0.1).bfloat16())
        found = [f.double() for f in model.mudd_factors(name, normal(1, 3, 48, dtype=c.dtype))]
        expected = torch.tensor(starts, dtype=torch.float64)[:, None, None, None].expand(
            -1, 1, 3, 1
        )
        torch.testing.assert_close(torch.stack(found), expected, rtol=2**-7, atol=0)
    assert model.mudd_layer_c[8] == model.mudd_layer_c[12] == 10.5


def test_weights_at_the_start():
    """W1 uniform in ±D^−½, W2 zero."""
    model = GPT(SMALL)
    model.init_weights(0)
    for name in ("gate_pre", "gate_post", "mudd_layer", "mudd_out"):
        w1, w2 = getattr(model, f"{name}_W1"), getattr(model, f"{name}_W2")
        assert w1.shape == (64, 48) and (w2 == 0).all()
        assert 0.99 * 48**-0.5 < w1.abs().max() <= 48**-0.5
        # A uniform sample's std is its bound/√3; of 3,072 numbers, to a few parts in √6,144.
        assert w1.std().item() == pytest.approx((48 * 3) ** -0.5, rel=0.05)


def network(x, w1, w2, bias, scale):
    """s·(W2·gelu(W1·x) + c), gelu(a) = a·Φ(a): number by number, the error function by Python."""
    erf = _Erf.apply
    rows = []
    for token in x.flatten(0, -2):
        hidden = [(w * token).sum() for w in w1]
        hidden = torch.stack([a * (1 + erf(a / 2**0.5)) / 2 for a in hidden])
        rows.append(
            torch.stack([scale * ((w * hidden).sum() + c) for w, c in zip(w2, bias, strict=True)])
        )
    return torch.stack(rows).view(*x.shape[:-1], -1)


class _Erf(torch.autograd.Function):
    """Python's error function of one number, with its derivative."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return torch.tensor(math.erf(a.item()), dtype=a.dtype)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad * 2 / math.pi**0.5 * (-(a**2)).exp()


SIZES = [(2, 3, 5), (4, 5), (6, 4), (6,), (1,)]  # x, W1, W2, c, s


def network_inputs(dtype=torch.float64):
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(SIZES)]


def test_network():
    """Values and gradients; s as a tensor, as the gates have it."""
    grad = normal(2, 3, 6, seed=9)
    assert_same_with_gradients(small_network, network, network_inputs(), grad)


def test_network_in_bf16():
    """In bf16, products and all, but for s."""
    x, w1, w2, bias, _ = network_inputs(torch.bfloat16)
    scale = torch.tensor(0.1)
    same = torch.nn.functional.linear(torch.nn.functional.gelu(x @ w1.T), w2) + bias
    same = same * scale.bfloat16()
    exact = network(*(t.double() for t in (x, w1, w2, bias)), 0.1)
    assert_accurate(small_network(x, w1, w2, bias, scale), same, exact)


def test_network_compiled():
    assert_compiles(small_network, network_inputs(), normal(2, 3, 6, seed=9))


def test_constant_gates_are_parameters_only():
    """No network: c is all there is, and s·c is the gate of every token."""
    model = GPT(dataclasses.replace(SMALL, gates="constant"), torch.float64)
    names = {name for name, _ in model.named_parameters() if name.startswith("gate")}
    assert names == {"gate_s", "gate_pre_c", "gate_post_c"}
    with torch.no_grad():
        model.gate_pre_c.copy_(torch.arange(26))
        model.gate_s.fill_(2.0)
        gates = model.gates("pre", normal(2, 5, 48))
    torch.testing.assert_close(gates[1].xsa, 2.0 * torch.arange(6).view(1, 1, 6).double())


def test_no_gates_no_parameters():
    model = GPT(dataclasses.replace(SMALL, gates="none"), torch.float64)
    assert not [name for name, _ in model.named_parameters() if name.startswith("gate")]
    assert model.gates("pre", normal(2, 5, 48)) == {}


# ---- Each gate reaches its layer ----------------------------------------------------------------


def test_each_gate_reaches_its_layer_only(monkeypatch):
    """The gates that layer_forward gets, when c counts the outputs and the networks are off."""
    model = GPT(SMALL, torch.float64)
    model.init_weights(0)
    with torch.no_grad():
        model.gate_pre_c.copy_(torch.arange(26))
        model.gate_post_c.copy_(100 + torch.arange(41))
        model.gate_s.fill_(1.0)
        model.lambda_skip.fill_(0.0)  # σ = 1/2
    seen = []

    def spy(config, spec, x, streams, gates, *others):
        seen.append(gates)
        return x, x

    monkeypatch.setattr("speedrun.model.layer_forward", spy)
    batch = make_batch(SMALL, 1, [0, 4])
    model.trunk(batch, model.plan_windows(batch, Windows(2, 3)))
    assert len(seen) == 11
    for first, expected in ((0, PRE), (100, POST)):
        counts = itertools.accumulate((count for _, _, count, _ in expected), initial=0)
        for (gate, layer, count, _), start in zip(expected, counts, strict=False):
            found = getattr(seen[layer], gate)
            if (gate, layer) == ("bigram", 0):  # taken by c0, before the first layer
                assert found is None
                continue
            wanted = torch.arange(first + start, first + start + count).double()
            wanted = wanted / 2 if gate == "skip" else wanted
            torch.testing.assert_close(found[0, 0], wanted, **FLOAT64_NOISE)
    assert all(g is None for layer in (6,) for g in seen[layer]._replace(skip=None))


def test_layers_before_post_have_pre_gates():
    """A layer's words say which network; the default is the one that reads x0."""
    config = dataclasses.replace(
        SMALL, layers=LayerSpec.parse_many("short+gated,long+gated,short+gated+post")
    )
    for net, layers in (("pre", [0, 1]), ("post", [2])):
        entries = GateLayout.of(config, net).entries
        assert [i for i, gate, _, _ in entries if gate == "attention"] == layers
