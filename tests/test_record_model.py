"""The record's model against its definition: each technique alone, all of them, each one off."""

import dataclasses
import math

import pytest
import torch

from numerics import assert_same_bits
from record_definition import ROLES, RecordDefinition
from speedrun import recipes
from speedrun.config import LayerSpec, ModelConfig, Windows
from speedrun.model import GPT
from speedrun.ops import use_backend
from train_helpers import FLOAT64_NOISE, make_batch, normal

RECORD = dataclasses.replace(
    recipes.load("record_089").model,
    model_dim=48,
    head_dim=8,
    mlp_hidden=32,
    vocab_size=30,
    vocab_multiple=8,
    bigram_rows=37,
    bigram_dim=40,
    sign_rows=8,
    gate_hidden=5,
    dc_window=4,
)
PLAIN = ModelConfig(
    layers=LayerSpec.parse_many("short,long"),
    model_dim=48,
    num_heads=6,
    head_dim=8,
    mlp_hidden=32,
    vocab_size=30,
    vocab_multiple=8,
    gate_hidden=5,
    dc_window=4,
)
TABLE = dict(bigram_rows=37, bigram_dim=40)


def alone(layers=None, **changes):
    if layers:
        changes["layers"] = LayerSpec.parse_many(layers)
    return dataclasses.replace(PLAIN, **changes)


NETWORK = dict(gates="network")
ALONE = {
    "plain": alone(),
    "narrow queries and keys": alone(qk_head_dim=4),
    "narrow, paired": alone("short+paired,long+paired", qk_head_dim=4),
    "bigram": alone(**TABLE),
    "signs": alone(**TABLE, sign_rows=8),
    "smear": alone(smear=True),
    "key offset": alone(key_offset=True),
    "residual lambdas": alone(residual_lambdas=True),
    "attention lambdas": alone(attention_lambdas=True),
    "x0 gates": alone("short,long,none+post,short+post", **NETWORK),
    "bigram gates": alone("short,long,short+post", **NETWORK, **TABLE),
    "constant gates": alone("short+xsa,long+gated+post", gates="constant", **TABLE),
    "paired": alone("short+paired,long+paired"),
    "value embeddings": alone("short+ve,long,long+ve"),
    "xsa": alone("short+xsa,long+xsa", **NETWORK),
    "attention gate": alone("short+gated,long+gated", **NETWORK),
    "dc": alone("short+dc,long+dc", **NETWORK),
    "skip": alone("short+save,short,none+skip", **NETWORK),
    "shared input": alone("short+save,short,long+shared"),
    "mudd": alone("short+save,long,short+save,long+shared+mudd"),
    "no attention": alone("none,short"),
}
OFF = {
    "smear": dict(smear=False),
    "bigram": dict(bigram_rows=0, bigram_dim=0),
    "signs": dict(sign_rows=0),
    "constant gates": dict(gates="constant"),
    "residual lambdas": dict(residual_lambdas=False),
    "attention lambdas": dict(attention_lambdas=False),
    "key offset": dict(key_offset=False),
    **{switch: {switch: False} for switch in ROLES.values()},
}
NO_GATES = dict(gates="none", xsa=False, attention_gate=False, dc=False, skip=False)
OFF["gates"] = NO_GATES
ALL_OFF = dict(
    NO_GATES,
    smear=False,
    bigram_rows=0,
    bigram_dim=0,
    sign_rows=0,
    residual_lambdas=False,
    attention_lambdas=False,
    key_offset=False,
    paired_heads=False,
    value_embeds=False,
    shared_attention_input=False,
    mudd=False,
)
STARTS = [0, 2, 3, 12]
WINDOWS = Windows(2, 5)


def random_model(config, dtype=torch.float64):
    """Every parameter away from its start, so that each part counts: matrices keep the size of
    their inputs, the others are around 1."""
    model = GPT(config, dtype)
    model.init_weights(0)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            matrix = name.endswith(("bank", "_W1", "_W2", "lm_head"))
            size = parameter.shape[-1] ** -0.5 if matrix else 1.0
            parameter.copy_(size * normal(*parameter.shape, seed=i) if parameter.dim() else 0.7)
    return model


def logits_and_gradients(z, model):
    """z (T, V), and the gradient of each parameter where that of z is a fixed random one."""
    parameters = list(model.parameters())
    grad = normal(*z.shape, seed=50).to(z.dtype)
    found = torch.autograd.grad(z, parameters, grad, allow_unused=True)
    zeros = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]
    return z.detach(), dict(zip(dict(model.named_parameters()), zeros, strict=True))


def run(model, batch, windows=WINDOWS):
    return model(batch, model.plan_windows(batch, windows))


def define(model, batch, windows=WINDOWS):
    return RecordDefinition(model, batch.inputs_PT[0].tolist(), STARTS, windows).z()


def assert_is_the_definition(config, windows=WINDOWS):
    """Logits, and the gradient of every parameter."""
    model, batch = random_model(config), make_batch(config, 1, STARTS)
    found, grads = logits_and_gradients(run(model, batch, windows), model)
    expected, expected_grads = logits_and_gradients(define(model, batch, windows), model)
    torch.testing.assert_close(found, expected, **FLOAT64_NOISE)
    for name, grad in grads.items():
        # Sums of products, some of them large: relative to the largest.
        largest = expected_grads[name].abs().max().item()
        error = (grad - expected_grads[name]).abs().max().item()
        assert error <= 1e-11 * max(1, largest), f"{name}: {error} of {largest}"


@pytest.mark.parametrize("config", ALONE.values(), ids=ALONE)
def test_technique_alone(config):
    assert_is_the_definition(config)


@pytest.mark.parametrize("qk_head_dim", [None, 4], ids=["", "narrow"])
@pytest.mark.parametrize("isolate", [False, True], ids=["record", "isolated"])
@pytest.mark.parametrize("windows", [WINDOWS, Windows(2, 5, ((3, 4), (4, 5)))], ids=["", "yarn"])
def test_all_techniques(isolate, windows, qk_head_dim):
    changes = dict(isolate_documents=isolate, qk_head_dim=qk_head_dim)
    assert_is_the_definition(dataclasses.replace(RECORD, **changes), windows)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(isolate_documents=True), dict(qk_head_dim=12)],
    ids=["record", "isolated", "12"],
)
def test_kernels_around_attention(changes):
    """In float32, with what surrounds attention in Triton: errors of 200 ulps, as without."""
    pytest.importorskip("triton")
    config = dataclasses.replace(RECORD, **changes)
    model, batch = random_model(config), make_batch(config, 1, STARTS)
    exact = logits_and_gradients(run(model, batch), model)
    model.float()
    same = logits_and_gradients(run(model, batch), model)
    with use_backend("triton", "qk_norm_rope", "attention_epilogue"):
        found = logits_and_gradients(run(model, batch), model)
    assert not torch.equal(found[0], same[0])  # it has been kernels
    for name, expected in {"z": exact[0], **exact[1]}.items():
        result = found[0] if name == "z" else found[1][name]
        limit = 2e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=limit, msg=name)


# ---- Switches -----------------------------------------------------------------------------------

REMOVED = {
    "smear": {"w_smear", "lambda_smear"},
    "bigram": {"bigram_embed"},
    "residual lambdas": {"r_attn", "p_attn", "r_mlp", "p_mlp"},
    "attention lambdas": {"lambda_qkv", "lambda_o"},
    "value_embeds": {"value_embeds", "ve_gate"},
    "skip": {"lambda_skip"},
    "mudd": {f"mudd_{net}_{part}" for net in ("layer", "out") for part in ("W1", "W2", "c")},
    "constant gates": {f"gate_{net}_{part}" for net in ("pre", "post") for part in ("W1", "W2")},
    "gates": {f"gate_{net}_{part}" for net in ("pre", "post") for part in ("W1", "W2", "c")}
    | {"gate_s", "lambda_skip"},
}


def with_weights_of(model, config):
    """A model of `config` with the same parameters; of gate networks the same outputs, and 0 for
    an output that the other model doesn't have."""
    other, own = GPT(config, torch.float64), dict(model.named_parameters())
    if other.sign_table.numel():
        other.sign_table.copy_(model.sign_table)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith("gate_p") and not name.endswith("_W1"):
                net = name.split("_")[1]
                entries = [model.gate_layouts[net].entries, other.gate_layouts[net].entries]
                sizes = [[size for _, _, size, _ in e] for e in entries]
                rows = dict(zip(entries[0], own[name].split(sizes[0]), strict=True))
                for entry, row in zip(entries[1], parameter.split(sizes[1]), strict=True):
                    row.copy_(rows.get(entry, torch.zeros_like(row)))
            elif name == "ve_gate":  # without MUDD layer 10 has one too
                parameter[: len(own[name])] = own[name]
            else:
                parameter.copy_(own[name])
    return other


@pytest.mark.parametrize("name", OFF)
def test_switched_off(name):
    """Other logits, those of the definition without it; its parameters are gone, no others."""
    config = dataclasses.replace(RECORD, **OFF[name])
    model = random_model(RECORD)
    other = with_weights_of(model, config)
    batches = [make_batch(c, 1, STARTS) for c in (RECORD, config)]
    with torch.no_grad():
        before, after = run(model, batches[0]), run(other, batches[1])
        expected = define(other, batches[1])
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, **FLOAT64_NOISE)
    names = [{key for key, _ in m.named_parameters()} for m in (model, other)]
    assert names[0] - names[1] == REMOVED.get(name, set()) and names[1] <= names[0]


def test_isolation_is_a_switch_too():
    model = random_model(RECORD)
    other = with_weights_of(model, dataclasses.replace(RECORD, isolate_documents=True))
    batch = make_batch(RECORD, 1, STARTS)
    with torch.no_grad():
        assert (run(model, batch) - run(other, batch)).abs().max() > 1e-3


def test_all_off_is_the_plain_model():
    """Layers keep their words, which then mean nothing but attention and window."""
    off = dataclasses.replace(RECORD, **ALL_OFF)
    layers = [LayerSpec(attention=spec.attention, window=spec.window) for spec in RECORD.layers]
    plain = random_model(dataclasses.replace(PLAIN, layers=tuple(layers)))
    other = GPT(off, torch.float64)
    other.load_state_dict(plain.state_dict())
    batch = make_batch(off, 1, STARTS)
    with torch.no_grad():
        assert_same_bits(run(other, batch), run(plain, batch))
    assert {name for name, _ in other.named_parameters()} == {
        *("embed", "lm_head", "qk_bank", "vo_bank", "mlp_bank")
    }


def test_every_field_of_the_config_is_a_tested_switch():
    """A technique that is added to the config must be added here."""
    switches = {f.name for f in dataclasses.fields(ModelConfig) if f.type == "bool"}
    tested = {key for changes in OFF.values() for key in changes} | {"isolate_documents"}
    assert switches <= tested
    roles = {f.name for f in dataclasses.fields(LayerSpec) if f.type == "bool"}
    assert roles - {"save"} == set(ROLES)
    assert set(ALL_OFF) == tested - {"isolate_documents"}


# ---- Start --------------------------------------------------------------------------------------


def test_first_validation_loss_is_that_of_a_guess():
    config = dataclasses.replace(RECORD, vocab_size=4000)
    model, batch = GPT(config), make_batch(config, 1, [0, 20, 400])
    model.init_weights(0)
    with torch.no_grad():
        loss = model.validation_loss(batch, model.plan_windows(batch, Windows(16, 48))) / 400
    assert loss.item() == pytest.approx(math.log(4000), abs=0.02)


D, V = 768, 50_304
BF16_PARAMETERS = {
    "embed": (V, D),
    "lm_head": (D, V),
    "value_embeds": (5, V, D),
    "bigram_embed": (377_280, D),
    "qk_bank": (60, 256, D),
    "vo_bank": (20, D, D),
    "mlp_bank": (22, 4 * D, D),
    "w_smear": (12,),
    "ve_gate": (4, 6, 12),
    **{f"{net}_W1": (64, D) for net in ("gate_pre", "gate_post", "mudd_layer", "mudd_out")},
    **{
        f"{net}_{part}": (size, 64) if part == "W2" else (size,)
        for net, size in (("gate_pre", 26), ("gate_post", 41), ("mudd_layer", 14), ("mudd_out", 5))
        for part in ("W2", "c")
    },
}
FP32_PARAMETERS = {
    **{name: (11,) for name in ("lambda_qkv", "lambda_o", "r_attn", "p_attn", "r_mlp", "p_mlp")},
    **{name: () for name in ("lambda_smear", "lambda_skip", "gate_s")},
}


def test_parameters_of_the_record():
    """Shapes, types and start values of RECIPE section 3 at full size, without their memory."""
    config = dataclasses.replace(recipes.load("record_089").model, vocab_size=50_257)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
    found = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    expected = {name: (shape, torch.bfloat16) for name, shape in BF16_PARAMETERS.items()}
    expected |= {name: (shape, torch.float32) for name, shape in FP32_PARAMETERS.items()}
    assert found == expected
    assert model.sign_table.shape == (8192, D) and not model.sign_table.requires_grad
    with torch.device("meta"):
        narrow = GPT(dataclasses.replace(config, qk_head_dim=96), torch.bfloat16)
    changed = {
        name: tuple(p.shape)
        for name, p in narrow.named_parameters()
        if p.shape != dict(model.named_parameters())[name].shape
    }
    assert changed == {"qk_bank": (60, 2 * 96, D)}


def test_start_values_of_the_record():
    """What is not in tests of gates and of the plain model."""
    model = GPT(RECORD, torch.bfloat16)
    model.init_weights(0)
    starts = {"lambda_qkv": 0.5, "lambda_o": 1.0, "p_attn": 1.0, "p_mlp": 1.0, "lambda_smear": 0.0}
    starts |= {"w_smear": 0.0, "ve_gate": 0.0, "lambda_skip": -1.5, "bigram_embed": 0.0}
    starts |= dict.fromkeys(("r_attn", "r_mlp"), 1.1**0.5)
    for name, value in starts.items():
        parameter = getattr(model, name)
        torch.testing.assert_close(parameter.double(), torch.full_like(parameter, value).double())
    # Used rounded to bf16.
    assert all(weights.r_attn.item() == 1.046875 for weights in model.layer_weights())
    assert model.value_embeds.float().std().item() == pytest.approx(0.01, rel=0.05)
