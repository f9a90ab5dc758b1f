"""The record's model against the public program run in float64: arrays of golden_089's README."""

import dataclasses
import json

import pytest
import torch

from speedrun import layer, recipes
from speedrun.batch import LossWeights, MicroBatch, shifted_targets
from speedrun.config import HeadConfig, Windows
from speedrun.model import GPT
from train_helpers import from_golden, golden

RECORD = recipes.load("record_089").model
WINDOWS = {
    "": Windows(32, 96),
    "_yarn": Windows(48, 160, ((96, 160),)),
    "_final": Windows(48, 224, ((96, 160),)),  # YaRN is not applied again
}
TRAINING = {  # multi-token weights and that of the prefix
    "loss_train": ((1.0, 0.5, 0.25), 0.25),
    "loss_train_2": ((1.0, 0.375), 0.125),
}
# README, "How close": how far a plain implementation is from the public program's expressions.
LOGITS = {torch.float64: 1e-13, torch.float32: 3e-5}
LOSSES = {torch.float64: 1e-13, torch.float32: 1e-5}  # of one cross-entropy
GRADIENTS = {torch.float64: 1e-7, torch.float32: 1e-5}  # of a parameter's largest
STORED_IN_FLOAT64 = 1e-13  # as gradients of small parameters are


@pytest.fixture(scope="module")
def config(shared_data):
    """The record's, at the sizes of config.json. Its gradients are those of the reported loss."""
    sizes = json.loads((shared_data / "golden_089" / "config.json").read_text())
    names = ("model_dim", "num_heads", "head_dim", "mlp_hidden", "vocab_size", "bigram_rows")
    names += ("bigram_dim", "sign_rows", "gate_hidden", "dc_window")
    assert sizes["num_layers"] == len(RECORD.layers)
    changes = {name: sizes[name] for name in names}
    changes["vocab_multiple"] = sizes["padded_vocab_size"] // 4
    head = HeadConfig(count_missing_targets=False)
    return dataclasses.replace(RECORD, head=head, **changes)


@pytest.fixture(scope="module")
def arrays(shared_data):
    files = ("io", "logits_yarn", "logits_final", "states")
    return {k: from_golden(a) for f in files for k, a in golden(shared_data, f"{f}.npz").items()}


def by_our_names(shared_data, *files):
    found = {}
    for file in files:
        for name, array in golden(shared_data, file).items():
            found[name.replace("mudd_10", "mudd_layer")] = from_golden(array)
    return found


@pytest.fixture(scope="module")
def models(shared_data, config):
    """By type: float64, float32 and bf16, all of the same weights, which are bf16 numbers."""
    weights = by_our_names(shared_data, "params.npz", "params_mlp.npz")
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found[dtype] = GPT(config, dtype)
        assert set(found[dtype].state_dict()) == set(weights)
        found[dtype].load_state_dict(weights)
        assert torch.equal(found[dtype].qk_bank.float(), weights["qk_bank"])
    return found


@pytest.fixture(scope="module")
def batch(arrays):
    return MicroBatch(
        arrays["inputs"][None],
        arrays["targets"][None],
        arrays["cu_seqlens"],
        arrays["bigram_row"][None],
        arrays["sign_row"][None],
    )


def largest_error(found, expected):
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item()


def logits_of(model, batch, windows):
    with torch.no_grad():
        z = model(batch, model.plan_windows(batch, windows)).double()
    return 23 * torch.sigmoid((z + 5) / 7.5)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("which", WINDOWS, ids=lambda which: which or "_start")
def test_logits(models, batch, arrays, dtype, which):
    found = logits_of(models[dtype], batch, WINDOWS[which])
    assert found.shape == (256, 512)
    assert largest_error(found, arrays[f"logits{which}"]) <= LOGITS[dtype]


def losses_of(model, batch, arrays, windows, multi_token, prefix):
    """(256,) of each position."""
    plan = model.plan_windows(batch, windows)
    targets_TN = shifted_targets(batch.targets_PT, len(multi_token))
    prefixes = arrays["prefix_table"].long()[batch.targets_PT.flatten()]
    with torch.no_grad():
        return model.losses(
            model.trunk(batch, plan),
            targets_TN,
            torch.tensor(multi_token),
            prefix_targets_T=prefixes,
            prefix_weight=prefix,
        )


@pytest.mark.parametrize("dtype", LOSSES, ids=str)
@pytest.mark.parametrize("name", ["loss_val", "loss_val_yarn", "loss_val_final", *TRAINING])
def test_losses(models, batch, arrays, dtype, name):
    """Of each position, and as the training program gets them: summed."""
    model, expected = models[dtype], arrays[name]
    windows = WINDOWS[name.removeprefix("loss_val") if name.startswith("loss_val") else ""]
    multi_token, prefix = TRAINING.get(name, ((1.0,), 0.0))
    found = losses_of(model, batch, arrays, windows, multi_token, prefix)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    allowed = LOSSES[dtype] * (sum(multi_token) + prefix)
    assert largest_error(found, expected) <= allowed
    plan = model.plan_windows(batch, windows)
    with torch.no_grad():
        if name in TRAINING:
            weights = LossWeights(multi_token, prefix, arrays["prefix_table"].long())
            total = model.training_loss(batch, plan, weights)
        else:
            total = model.validation_loss(batch, plan)
    assert abs(total.item() / 256 - expected.mean().item()) <= allowed


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        (torch.float64, "off"),
        (torch.float32, "off"),
        pytest.param(torch.float64, "regional", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients(shared_data, models, config, batch, arrays, dtype, compiled):
    """Of every parameter, of the training loss summed over the positions."""
    model = GPT(config, dtype)
    model.load_state_dict(models[dtype].state_dict())
    model.compile(compiled)
    weights = LossWeights(*TRAINING["loss_train"], arrays["prefix_table"].long())
    model.training_loss(batch, model.plan_windows(batch, WINDOWS[""]), weights).backward()
    expected = by_our_names(shared_data, "grads.npz", "grads_mlp.npz")
    found = {name: p.grad for name, p in model.named_parameters()}
    assert set(found) == set(expected) and len(found) == 30
    for name, grad in expected.items():
        if not found[name].dim():
            found[name], grad = found[name][None], grad[None]
        exact = dtype == grad.dtype == torch.float64
        share = STORED_IN_FLOAT64 if exact else GRADIENTS[dtype]
        error, largest = largest_error(found[name], grad), grad.abs().max().item()
        assert largest > 0 and error <= share * largest, f"{name}: {error} of {largest}"


def test_gradient_counts_missing_targets_as_the_public_kernel(models, config, batch, arrays):
    """In `record_089`: what the head's gradient has more comes from the last two positions."""
    weights = LossWeights(*TRAINING["loss_train"], arrays["prefix_table"].long())
    assert RECORD.head.count_missing_targets
    grads, losses = [], []
    for head in (RECORD.head, config.head):
        model = GPT(dataclasses.replace(config, head=head), torch.float64)
        model.load_state_dict(models[torch.float64].state_dict())
        plan = model.plan_windows(batch, WINDOWS[""])
        loss = model.training_loss(batch, plan, weights)
        loss.backward()
        grads.append(model.lm_head.grad)
        losses.append(loss.item())
    with torch.no_grad():
        last_two = model.trunk(batch, plan)[-2:]
    more = arrays["dz_last2_all_weights"] - arrays["dz_last2"]
    assert (
        largest_error(grads[0] - grads[1], last_two.T @ more) <= 1e-12 and more.abs().max() > 1e-3
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-15)


def test_inputs_of_the_mlps(models, batch, arrays, monkeypatch):
    """norm(x) at the entry of each layer's MLP: the first that differs is where to look."""
    seen, relu2_mlp = [], layer.relu2_mlp
    monkeypatch.setattr(layer, "relu2_mlp", lambda h, *rest: seen.append(h) or relu2_mlp(h, *rest))
    logits_of(models[torch.float64], batch, WINDOWS[""])
    assert len(seen) == 11
    for i, h in enumerate(seen):
        error = largest_error(h[0], arrays["norm_before_mlp"][i])
        assert error <= 2**-24 * h.abs().max(), f"layer {i}: {error}"  # stored in float32


def test_rotary_tables(models, batch, arrays):
    """Of the model's own plan: its angles are position · f, its score scale the program's."""
    for which in ("", "_yarn"):
        plan = models[torch.float64].plan_windows(batch, WINDOWS[which])
        assert plan.score_scale == pytest.approx(arrays[f"score_scale{which}"].item(), rel=1e-12)
        cos, sin = plan.rotary[False]
        angles = torch.arange(256.0).double()[:, None, None] * arrays[f"rotary_freq{which}"]
        # f is kept in float32 by the public program: half an ulp of it, 255 positions on.
        noise = dict(rtol=0, atol=256 * 2**-24)
        torch.testing.assert_close(cos, angles.cos(), **noise)
        torch.testing.assert_close(sin, angles.sin(), **noise)
        assert torch.equal(plan.rotary[True][0][:128, 0], cos[::2, 0])  # even heads: position 2t


def test_bf16(models, batch, arrays):
    """README: bf16 moves logits by about 0.13 in the middle position, by 0.6 at most."""
    found = logits_of(models[torch.bfloat16], batch, WINDOWS[""])
    errors = (found - arrays["logits"]).abs().amax(1)
    assert errors.median() < 2 * 0.13 and errors.max() < 2 * 0.6
