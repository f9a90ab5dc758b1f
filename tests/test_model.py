"""The plain GPT: an independent forward pass, start values, who sees whom, and its gradients."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from speedrun.batch import LossWeights, shifted_targets
from speedrun.config import HeadConfig, LayerSpec, MLPConfig, Windows
from speedrun.fp8_state import Fp8MLPState
from speedrun.model import GPT
from speedrun.ops.relu2_mlp import Gemms
from speedrun.ops.softcap_ce import LOGITS_AT_ONCE
from train_helpers import (
    FLOAT64_NOISE,
    from_golden,
    golden,
    make_batch,
    micro_batch,
    normal,
    small_config,
)

CONFIG = small_config().model
PLAIN = dataclasses.replace(CONFIG, bigram_rows=0, bigram_dim=0, sign_rows=0)
SHORT, LONG, NONE = LayerSpec(), LayerSpec(window="long"), LayerSpec(attention=None)
WINDOWS = Windows(3, 7)


def random_model(config=CONFIG, dtype=torch.float64):
    """Every parameter away from its start, so that each part of the model counts."""
    model = GPT(config, dtype)
    model.init_weights(0)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=i))
    return model


def forward(model, batch, windows=WINDOWS):
    with torch.no_grad():
        return model(batch, model.plan_windows(batch, windows))


def definition(model, batch, windows):
    """z of the first part: RECIPE section 3 without its techniques, written from the page."""
    config, p = model.config, dict(model.named_parameters())
    H, K, D = config.num_heads, config.head_dim, config.model_dim
    starts = batch.cu_seqlens.tolist()

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()

    def turn(x):  # (T, H, K): half of the head dim rotates in adjacent pairs
        x = norm(x)
        theta = torch.arange(len(x))[:, None] * 1024 ** -torch.linspace(0, 1, K // 4).double()
        turned = torch.view_as_complex(x[..., : K // 2].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(turned * torch.polar(torch.ones(()).double(), -theta)[:, None])
        return torch.cat([turned.flatten(-2), x[..., K // 2 :]], -1)

    x = norm(p["embed"][batch.inputs_PT[0].long()])
    if config.bigram_rows:
        b = p["bigram_embed"][batch.bigram_rows_PT[0].long()]
        x[:, : config.bigram_dim] += 0.05 * b * model.sign_table[batch.sign_rows_PT[0].long()]
    attentions = 0
    for layer, spec in enumerate(config.layers):
        if spec.attention:
            h, first = norm(x), attentions * H
            w_q = p["qk_bank"][first : first + H // 2].reshape(D, D)
            w_k = p["qk_bank"][first + H // 2 : first + H].reshape(D, D)
            w_v, w_o = p["vo_bank"][2 * attentions : 2 * attentions + 2]
            q, k, v = ((h @ w.T).view(-1, H, K) for w in (w_q, w_k, w_v))
            q, k, window = turn(q), turn(k), windows[spec.window == "long"]
            y = torch.zeros_like(v)
            for t in range(len(x)):
                own = max(start for start in starts if start <= t)
                keys = slice(max(own, t - window), t + 1)
                scores = 0.1 * torch.einsum("hk,shk->hs", q[t], k[keys])
                y[t] = torch.einsum("hs,shk->hk", scores.softmax(-1), v[keys])
            x = x + y.flatten(1) @ w_o.T
            attentions += 1
        up, down = p["mlp_bank"][2 * layer : 2 * layer + 2]
        x = x + (norm(x) @ up.T).clamp(min=0).pow(2) @ down
    return norm(x) @ p["lm_head"]


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        pytest.param(CONFIG, Windows(1, 1), id="windows of 1"),
        pytest.param(CONFIG, WINDOWS, id="bigram and signs"),
        pytest.param(PLAIN, WINDOWS, id="plain"),
        pytest.param(
            dataclasses.replace(PLAIN, layers=(LONG, NONE, SHORT)),
            Windows(2, 50),
            id="a layer without attention",
        ),
    ],
)
def test_forward(config, windows):
    model, batch = random_model(config), make_batch(config, 1, [0, 5, 6, 19])
    with torch.no_grad():
        expected = definition(model, batch, windows)
    assert expected.shape == (19, 32)
    torch.testing.assert_close(forward(model, batch, windows), expected, **FLOAT64_NOISE)


def test_start_values():
    """RECIPE section 3, sizes and bounds; samples of thousands come near their bounds."""
    config = dataclasses.replace(CONFIG, model_dim=64, head_dim=32, mlp_hidden=128, vocab_size=999)
    model = GPT(config)
    model.init_weights(3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "embed": (1008, 64),
        "lm_head": (64, 1008),
        "qk_bank": (2 * 2, 64, 64),
        "vo_bank": (2 * 2, 64, 64),
        "mlp_bank": (2 * 2, 128, 64),
        "bigram_embed": (31, 12),
    }
    bound = math.sqrt(3) * 0.5 * 64**-0.5
    for weights in (*model.qk_bank, *model.vo_bank, *model.mlp_bank[0::2]):
        assert 0.99 * bound < weights.abs().max() <= bound
        # A uniform sample's std is its bound/√3, to a few parts in √(2n).
        assert weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (model.mlp_bank[1::2] == 0).all() and (model.bigram_embed == 0).all()
    assert model.lm_head.std().item() == pytest.approx(0.005, rel=0.02)
    assert torch.equal(model.embed, model.lm_head.T)
    assert model.sign_table.shape == (8, 12)
    assert set(model.sign_table.flatten().tolist()) == {-1.0, 1.0}


def test_start_values_come_from_the_seed_alone():
    models = []
    for seed, global_seed, dtype in ((7, 0, None), (7, 1, None), (8, 0, None), (7, 0, "bf16")):
        torch.manual_seed(global_seed)
        model = GPT(CONFIG, torch.bfloat16 if dtype else torch.float32)
        before = torch.get_rng_state()
        model.init_weights(seed)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model)
    first, again, other, bf16 = (list(m.state_dict().values()) for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(models[0].qk_bank, models[2].qk_bank)
    assert not torch.equal(models[0].lm_head, models[2].lm_head)
    for a, b in zip(first, bf16, strict=True):
        assert torch.equal(a.to(b.dtype), b)
    assert len(first) == len(other)


def test_first_loss_is_that_of_a_guess():
    """Logits near 0 at the start: every token of the padded vocabulary is as likely."""
    model = GPT(CONFIG)
    model.init_weights(0)
    batch = make_batch(CONFIG, 2, [0, 40])
    loss = model.validation_loss(batch, model.plan_windows(batch, WINDOWS)) / 80
    assert loss.item() == pytest.approx(math.log(32), abs=0.05)


def test_validation_loss_in_pieces(monkeypatch):
    """The head takes some rows at a time; the loss is that of all logits."""
    model, batch = random_model(), make_batch(CONFIG, 2, [0, 40])
    whole = forward(model, batch)
    logits = 23 * torch.sigmoid((whole + 5) / 7.5)
    expected = torch.nn.functional.cross_entropy(
        logits, batch.targets_PT.flatten(), reduction="sum"
    )
    plans = model.plan_windows(batch, WINDOWS)
    for at_once in (1, 7 * 32, 1 << 24):
        monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
        loss = model.validation_loss(batch, plans)
        torch.testing.assert_close(loss, expected, **FLOAT64_NOISE)


def changed_logits(model, tokens, position, starts):
    """Positions whose logits move when the token at `position` is another one."""
    other = tokens.copy()
    other[0, position] = (other[0, position] + 1) % model.config.vocab_size
    before, after = (forward(model, micro_batch(model.config, t, starts)) for t in (tokens, other))
    return torch.nonzero((before != after).any(1)).flatten().tolist()


@pytest.mark.parametrize(("layers", "reach"), [((SHORT,), 3), ((LONG,), 7), ((LONG, SHORT), 10)])
def test_window_reach(layers, reach):
    """Changing one token moves logits from there to the end of the windows, no further."""
    model = random_model(dataclasses.replace(PLAIN, layers=layers))
    tokens = np.random.default_rng(0).integers(0, 29, (1, 31))
    assert changed_logits(model, tokens, 10, [0, 30]) == list(range(10, 10 + reach + 1))
    assert changed_logits(model, tokens, 28, [0, 30]) == [28, 29]  # nothing before: causal


def test_documents_are_isolated():
    """A token moves its own document only: the next one's first row of the bigram table, which
    ignores document boundaries (RECIPE section 2), hashes the last token of the one before."""
    model = random_model()
    tokens = np.random.default_rng(0).integers(0, 29, (1, 13))
    starts = [0, 4, 9, 12]
    assert changed_logits(model, tokens, 5, starts) == [5, 6, 7, 8]
    assert changed_logits(model, tokens, 8, starts) == [8, 9, 10, 11]
    assert changed_logits(random_model(PLAIN), tokens, 8, starts) == [8]


def test_layer_without_attention():
    model = random_model(dataclasses.replace(PLAIN, layers=(NONE, NONE)))
    assert model.qk_bank.shape[0] == model.vo_bank.shape[0] == 0
    tokens = np.random.default_rng(0).integers(0, 29, (1, 13))
    assert changed_logits(model, tokens, 5, [0, 12]) == [5]
    plan = model.plan_windows(make_batch(PLAIN, 1, [0, 4]), WINDOWS)
    assert plan.masks == plan.rotary == {}


def gradients(model, batches, weights):
    model.zero_grad()
    total = 0
    for batch in batches:
        loss = model.training_loss(batch, model.plan_windows(batch, WINDOWS), LossWeights(weights))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_parts_together_and_apart():
    """Three parts in one micro-batch: the loss and gradients of three micro-batches."""
    model, weights = random_model(), (1.0, 0.5, 0.25)
    tokens = np.random.default_rng(1).integers(0, 29, (3, 18))
    starts = [0, 2, 3, 17, 17]
    together = gradients(model, [micro_batch(CONFIG, tokens, starts)], weights)
    apart = gradients(model, [micro_batch(CONFIG, t[None], starts) for t in tokens], weights)
    assert together[0] == pytest.approx(apart[0], rel=1e-12)
    for name, found in together[1].items():
        torch.testing.assert_close(found, apart[1][name], **FLOAT64_NOISE)


@pytest.mark.parametrize("name", ["all", *dict(GPT(CONFIG).named_parameters())])
def test_gradient_by_finite_differences(name):
    """Along a random direction in one parameter (or all), in float64.

    Central differences with step h: error of h² times the third derivative, and 1e−16 / h of
    rounding, both around 1e−10 of the loss for h = 1e−5; relative to slopes of order 1 that is
    below 1e−6.
    """
    model, batch = random_model(), make_batch(CONFIG, 2, [0, 5, 6, 14])
    plans, weights = model.plan_windows(batch, WINDOWS), LossWeights((1.0, 0.5))
    model.training_loss(batch, plans, weights).backward()
    parameters = [p for key, p in model.named_parameters() if name in ("all", key)]
    directions = [normal(*p.shape, seed=100 + i) for i, p in enumerate(parameters)]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))

    def loss_at(h):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=h)
            loss = model.training_loss(batch, plans, weights).item()
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=h)
        return loss

    h = 1e-5
    found = (loss_at(h) - loss_at(-h)) / (2 * h)
    assert abs(slope) > 1e-3
    assert found == pytest.approx(slope, rel=1e-6)


def test_padded_vocabulary():
    """Padded columns take part in the softmax and learn; padded rows of embed are never read."""
    model, batch = random_model(), make_batch(CONFIG, 1, [0, 40])
    _, grads = gradients(model, [batch], (1.0,))
    assert forward(model, batch).shape == (40, 32)
    assert (grads["lm_head"][:, 29:] != 0).any(0).all()
    assert (grads["embed"][29:] == 0).all()


def test_targets_stay_in_their_part():
    targets = torch.arange(8).view(2, 4)
    assert shifted_targets(targets, 3).tolist() == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, -1],
        [3, -1, -1],
        [4, 5, 6],
        [5, 6, 7],
        [6, 7, -1],
        [7, -1, -1],
    ]
    assert shifted_targets(targets[:, :1], 3).tolist() == [[0, -1, -1], [4, -1, -1]]


def test_losses_are_sums_over_positions():
    """Weighted, of the targets one, two and three ahead, from the model's own logits."""
    model, batch = random_model(), make_batch(CONFIG, 2, [0, 3, 9])
    plans = model.plan_windows(batch, WINDOWS)
    with torch.no_grad():
        logs = (23 * torch.sigmoid((model(batch, plans) + 5) / 7.5)).log_softmax(-1).view(2, 9, -1)
        sums = []
        for n in range(3):
            ahead = batch.targets_PT[:, n:, None]
            sums.append(-logs[:, : 9 - n].gather(2, ahead).sum().item())
        train = model.training_loss(batch, plans, LossWeights((1.0, 0.5, 0.25))).item()
        val = model.validation_loss(batch, plans).item()
    assert val == pytest.approx(sums[0], rel=1e-12)
    assert train == pytest.approx(sums[0] + 0.5 * sums[1] + 0.25 * sums[2], rel=1e-12)


def test_bf16():
    """`precision: recipe` anywhere: parameters and gradients in bf16, the loss in float32.

    Its mean is within two bf16 ulps (2⁻⁷) of that of the same weights in float64.
    """
    exact, model = random_model(), random_model(dtype=torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    batch = make_batch(CONFIG, 2, [0, 5, 40])
    losses = [
        m.training_loss(batch, m.plan_windows(batch, WINDOWS), LossWeights())
        for m in (exact, model)
    ]
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2 * 2**-7)
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all()


# ---- FP8 in the MLP ------------------------------------------------------------------------------


def fp8_model(head=None, **choices):
    head = head or HeadConfig()
    config = dataclasses.replace(CONFIG, mlp=MLPConfig(**choices), head=head)
    model = GPT(config, torch.bfloat16, fp8=True)
    model.load_state_dict(random_model(dtype=torch.bfloat16).state_dict(), strict=False)
    return model


def train_once(model, batch, own_amax=True):
    """The loss, with gradients in the parameters."""
    model.refresh_fp8(own_amax)
    windows = model.plan_windows(batch, WINDOWS)
    loss = model.training_loss(batch, windows, LossWeights())
    loss.backward()
    return loss.item()


def test_config_names_the_gemms():
    assert dataclasses.asdict(MLPConfig()) == Gemms()._asdict()


def test_state_is_the_public_programs(shared_data):
    """20 steps of 12 layers: the scales of the weights and of post, bit for bit."""
    arrays = golden(shared_data, "fp8_a.npz")
    series = {
        key.removeprefix("mlp/series/"): torch.from_numpy(array.copy())
        for key, array in arrays.items()
        if key.startswith("mlp/series/")
    }
    state = Fp8MLPState(12, MLPConfig())
    for step in range(20):
        # A matrix of one number, which is its amax.
        bank = torch.stack([series["up_amax"][step], series["down_amax"][step]], 1).view(24, 1, 1)
        state.refresh(bank.bfloat16(), own_amax=step <= 16)
        assert torch.equal(state.weights.up_scale, series["up_scale"][step])
        assert torch.equal(state.weights.down_scale, series["down_scale_used"][step])
        layers = state.layers()
        used = torch.stack([layer.post_scale for layer in layers])
        assert torch.equal(used[:2], series["act_scale_used"][step])
        for layer, amax in zip(layers, series["act_amax"][step].repeat(6), strict=True):
            layer.post_amax = amax
        state.update(layers)
    for step in (0, 1, 2, 16, 17, 18):
        prefix = f"mlp/{step}/"
        bank = torch.stack([from_golden(arrays[prefix + name]) for name in ("w_up", "w_down")])
        state = Fp8MLPState(1, MLPConfig())
        state.down_amax_L.copy_(series["down_amax"][max(step - 1, 0), :1])
        state.refresh(bank, own_amax=step <= 16)
        for name, found in (("up", state.weights.up_f8), ("down", state.weights.down_f8_t)):
            assert np.array_equal(found[0].view(torch.uint8), arrays[prefix + f"w_{name}_f8"])


@pytest.mark.parametrize("choices", [{}, dict.fromkeys(Gemms._fields[:7], "fp8")], ids=str)
def test_fp8_trains_near_bf16(choices):
    """The same loss within FP8's roundings; gradients of every parameter, finite."""
    batch = make_batch(CONFIG, 2, [0, 5, 40])
    plain, model = random_model(dtype=torch.bfloat16), fp8_model(**choices)
    expected = train_once(plain, batch)
    found = train_once(model, batch)
    # Two of e4m3's 2^-4 on each side of relu² are a fifth of what an MLP adds, a part of x.
    assert found != expected and found == pytest.approx(expected, rel=0.2)
    for parameter, same in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all()
        cosine = torch.cosine_similarity(
            parameter.grad.double().flatten(), same.grad.double().flatten(), 0
        )
        assert cosine > 0.9


def test_training_begins_with_a_refresh():
    model, batch = fp8_model(), make_batch(CONFIG, 1, [0, 5, 40])
    with pytest.raises(RuntimeError, match="refresh_fp8 begins each step"):
        model.training_loss(batch, model.plan_windows(batch, WINDOWS), LossWeights())


def test_validation_knows_no_fp8():
    batch = make_batch(CONFIG, 1, [0, 5, 40])
    plain, model = random_model(dtype=torch.bfloat16), fp8_model()
    with torch.no_grad():
        losses = [m.validation_loss(batch, m.plan_windows(batch, WINDOWS)) for m in (plain, model)]
    assert losses[0] == losses[1]
    assert (model.fp8_mlp.post_scale_L == 1).all()


def test_each_micro_batch_sets_the_next_ones_scale():
    """1 at first; then 1.80/448 of the amax of the forward pass before, also within a step."""
    first, second = (make_batch(CONFIG, 1, [0, 5, 40], seed=s) for s in (1, 2))
    model = fp8_model()
    scales = []
    for batch in (first, second, first):
        train_once(model, batch)
        scales.append(model.fp8_mlp.post_scale_L.clone())
    # The layers' input depends on the scales of the layers before it, but the first one's doesn't.
    assert scales[0][0] == scales[2][0] != scales[1][0]
    assert (scales[0] != 1).all()


def test_all_bf16_needs_no_state():
    model = fp8_model(HeadConfig(fp8=False), up="bf16", down="bf16")
    assert model.fp8_mlp is None and model.fp8_head is None
    batch = make_batch(CONFIG, 1, [0, 5, 40])
    assert train_once(model, batch) == train_once(random_model(dtype=torch.bfloat16), batch)
