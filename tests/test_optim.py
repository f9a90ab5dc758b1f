"""The optimizer over named parameters: its definition in float64, tables, rules, snapshots."""

import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun import recipes
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.config import (
    AdamRow,
    ConfigError,
    MuonRow,
    OptimConfig,
    Windows,
)
from speedrun.model import GPT
from speedrun.ops.normuon_step import join_bits
from speedrun.optim import HEAD, Optimizer, placements
from speedrun.reference.polar_express import COEFFICIENTS
from speedrun.schedule import Schedule
from train_helpers import (
    FLOAT64_NOISE,
    SPLIT_PLANS,
    add_gradients,
    make_batch,
    normal,
    small_config,
)

BANKS = ("qk_bank", "vo_bank", "mlp_bank")


# ---- The whole step, in plain float64 -----------------------------------------------------------

TABLES = OptimConfig(
    muon_table=(MuonRow("wide_bank"), MuonRow("tall_*", lr_muls=(1.0, 2.0))),
    adam_table=(
        AdamRow("lm_head", 0.5, 0.95, wd_mul=150.0),
        AdamRow("embed", 0.5, 0.95, wd_mul=150.0),
        AdamRow("table", 0.75, 0.95, lr_mul=75.0, wd_mul=5.0, sparse=True),
        AdamRow("lambda_*", 0.9, 0.99, lr_mul=5.0),
    ),
)
SHAPES = {
    "wide_bank": (3, 4, 6),
    "tall_bank": (2, 2, 9, 5),
    "embed": (7, 6),
    "lm_head": (6, 7),
    "table": (3, 5, 4),
    "lambda_o": (4,),
    "lambda_s": (),
}


def start_values(dtype):
    values = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    values["embed"] = values["lm_head"].mT.contiguous()
    return {name: value.to(dtype) for name, value in values.items()}


def gradients_of(step):
    """By name, float64."""
    return {
        name: normal(*shape, seed=100 * (step + 1) + i)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def run_optimizer(dtype, config, plans):
    parameters = {name: nn.Parameter(value) for name, value in start_values(dtype).items()}
    optimizer = Optimizer(parameters.items(), config, Comms())
    for plan in plans:
        gradients = {name: g.to(dtype) for name, g in gradients_of(plan.step).items()}
        add_gradients(parameters, gradients)
        optimizer.step(plan)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def plain_matrix(weight, state, grad, plan, lr_mul):
    """One matrix, in place: RECIPE section 4, steps 1 to 4."""
    m, n = weight.shape
    state["M"] = plan.momentum * state.get("M", 0) + (1 - plan.momentum) * grad
    g = (1 - plan.momentum) * grad + plan.momentum * state["M"]
    x = g / (g.norm() * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    axis = 1 if m >= n else 0
    state["S"] = 0.9 * state.get("S", 0) + 0.1 * x.square().mean(axis, keepdim=True)
    scaled = x / state["S"].clamp(min=1e-10).sqrt()
    o = scaled * x.norm() / scaled.norm()
    base = 0.023 * plan.lr
    lr, wd = base * max(1, m / n) ** 0.5 * lr_mul, 1.2 * base
    weight -= torch.where(o * weight >= 0, weight * wd * lr, 0.0) + o * lr


def plain_adam(weight, state, grad, plan, row):
    """One tensor, in place: RECIPE section 4."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = row.beta1 * state.get("m", 0) + (1 - row.beta1) * grad
    state["v"] = row.beta2 * state.get("v", 0) + (1 - row.beta2) * grad**2
    lr = 0.008 * plan.lr * row.lr_mul
    correction = (1 - row.beta2 ** state["t"]) ** 0.5 / (1 - row.beta1 ** state["t"])
    update = state["m"] / (state["v"].sqrt() + 1e-10) * lr * correction
    weight -= update + torch.where(update * weight > 0, lr**2 * 0.005 * row.wd_mul * weight, 0.0)


def plain_run(plans):
    weights = start_values(torch.float64)
    states = {name: {} for name in SHAPES}
    rows = {row.name: row for row in TABLES.adam_table}
    rows |= {name: rows["lambda_*"] for name in SHAPES if name.startswith("lambda")}
    waiting = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for plan in plans:
        for name, gradient in gradients_of(plan.step).items():
            weight = weights[name]
            if name.endswith("bank"):
                matrices = weight.view(-1, *weight.shape[-2:])
                for i, grad in enumerate(gradient.view_as(matrices)):
                    lr_mul = 2 if name == "tall_bank" and i % 2 else 1
                    state = states[name].setdefault(i, {})
                    plain_matrix(matrices[i], state, grad, plan, lr_mul)
            else:
                waiting[name] += gradient
        if not plan.adam:
            continue
        if plan.tied:
            waiting["lm_head"] += waiting["embed"].mT
        for name in waiting:
            if name in rows and not (plan.tied and name == "embed"):
                plain_adam(weights[name], states[name], waiting[name], plan, rows[name])
            waiting[name].zero_()
        if plan.tied:
            weights["embed"] = weights["lm_head"].mT.clone()
        if plan.split:
            states["embed"] = {
                key: value if key == "t" else value.mT.clone()
                for key, value in states["lm_head"].items()
            }
    return weights


@pytest.mark.parametrize("replicate_below", [0, 2**16])
def test_definition(replicate_below):
    """Without tying, of which float64 has none. `transpose` moves no such type."""
    plans = [dataclasses.replace(plan, tied=False, split=False) for plan in list(SPLIT_PLANS)[:6]]
    config = dataclasses.replace(TABLES, replicate_below=replicate_below)
    found, expected = run_optimizer(torch.float64, config, plans), plain_run(plans)
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], **FLOAT64_NOISE)


def test_definition_across_the_split():
    """In float32: a few roundings for Adam; Polar Express's slopes, 1,000 together, for banks."""
    plans = list(SPLIT_PLANS)[:6]
    assert [plan.tied for plan in plans] == [True] * 4 + [False] * 2
    found, expected = run_optimizer(torch.float32, TABLES, plans), plain_run(plans)
    for name in SHAPES:
        tolerance = 1e-4 if name.endswith("bank") else 2e-6
        torch.testing.assert_close(
            found[name].double(), expected[name], rtol=tolerance, atol=tolerance
        )
    assert not torch.equal(found["embed"], found["lm_head"].mT)


def test_tied_gradients_add_up_in_their_type():
    """Each sum is rounded to bf16: over the interval, then embed's and the head's."""
    parameters = {name: nn.Parameter(v) for name, v in start_values(torch.bfloat16).items()}
    parameters = {name: parameters[name] for name in ("embed", "lm_head")}
    optimizer = Optimizer(parameters.items(), TABLES, Comms())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for plan in itertools.islice(SPLIT_PLANS, 2):
        gradients = {name: gradients_of(plan.step)[name].bfloat16() for name in parameters}
        add_gradients(parameters, gradients)
        sums = {name: sums[name] + gradients[name] for name in parameters}
        optimizer.step(plan)
    expected = (sums["lm_head"].mT + sums["embed"]).float() * 0.5  # beta1
    assert_same_bits(optimizer.rules[HEAD].state["exp_avg"], expected)
    assert_same_bits(parameters["embed"].data, parameters["lm_head"].data.mT.contiguous())
    assert (optimizer.rules["embed"].state["exp_avg"] == 0).all()


@pytest.mark.parametrize(
    "parameters",
    [
        {"embed": torch.zeros(3, 2)},
        {"embed": torch.zeros(3, 2), "lm_head": torch.zeros(3, 2)},
        {"embed": torch.zeros(3, 2), "lm_head": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"embed": torch.zeros(3, 2).double(), "lm_head": torch.zeros(2, 3).double()},
    ],
    ids=["alone", "shape", "types", "float64"],
)
def test_what_cannot_be_tied(parameters):
    named = [(name, nn.Parameter(value)) for name, value in parameters.items()]
    optimizer = Optimizer(named, TABLES, Comms())
    with pytest.raises(ConfigError, match=r"schedule\.untie_frac: to be tied, embed"):
        optimizer.step(SPLIT_PLANS.plan(0))


# ---- Rules and their switches -------------------------------------------------------------------


def one_step(config, parameters, plan=None):
    """Each parameter with a gradient of its own; returns the optimizer."""
    named = {name: nn.Parameter(value) for name, value in parameters.items()}
    optimizer = Optimizer(named.items(), config, Comms())
    for i, p in enumerate(named.values()):
        p.grad = normal(*p.shape, seed=50 + i, dtype=p.dtype)
    optimizer.step(plan or dataclasses.replace(SPLIT_PLANS.plan(5), split=False))
    return optimizer


def stepped(name, value, **changes):
    config = dataclasses.replace(TABLES, **changes)
    optimizer = one_step(config, {name: value.clone()})
    return optimizer.params[name].data, optimizer.rules[name]


@pytest.mark.parametrize("name", ["wide_bank", "table"])
def test_cautious_decay_off(name):
    """Where both signs disagree, the weight decays too; elsewhere nothing changes."""
    start = normal(*SHAPES[name])
    cautious, everywhere = (
        stepped(name, start, cautious_decay=value)[0] for value in (True, False)
    )
    step = start - stepped(name, start, **decay_of(name, 0.0))[0]
    decayed = torch.where(step * start >= 0, 0.0, 1.0)
    assert 0 < decayed.mean() < 1
    rate = SPLIT_PLANS.plan(5).lr
    share = (0.023 * rate) ** 2 * 1.2 if name == "wide_bank" else (0.6 * rate) ** 2 * 0.025
    torch.testing.assert_close(cautious - everywhere, decayed * start * share, **FLOAT64_NOISE)


def decay_of(name, wd):
    rule = "normuon" if name.endswith("bank") else "adam"
    return {rule: dataclasses.replace(getattr(TABLES, rule), wd=wd)}


def test_variance_rescale_off():
    """NorMuon's step is Polar Express's then: near to all singular values 1, not to equal rows."""
    start = torch.zeros(*SHAPES["wide_bank"], dtype=torch.float64)
    steps = [stepped("wide_bank", start, variance_rescale=value)[0] for value in (True, False)]
    rate = 0.023 * SPLIT_PLANS.plan(5).lr
    spread = [torch.linalg.svdvals(step / rate).sub(1).abs().max() for step in steps]
    assert spread[1] < 0.15 < spread[0]
    columns = [(step / rate).square().mean(1).sqrt() for step in steps]
    assert columns[0].std(1).max() < 1e-3 * columns[1].std(1).min()


def test_exact_weights_off():
    """bf16 alone: the exact result is rounded to nearest, and a small step is lost."""
    start = normal(*SHAPES["wide_bank"], dtype=torch.bfloat16)
    (exact, rule), (rounded, plain) = (
        stepped("wide_bank", start, exact_weights=value) for value in (True, False)
    )
    assert "low" not in plain.state
    assert_same_bits(rounded, join_bits(exact, rule.state["low"]).to(torch.bfloat16))
    tiny = dataclasses.replace(TABLES.normuon, lr=1e-6, wd=0.0)
    assert_same_bits(stepped("wide_bank", start, exact_weights=False, normuon=tiny)[0], start)


def test_weight_rounding():
    """The same exact weights; the model sees their upper half cut off, or the nearest bf16."""
    start = normal(*SHAPES["wide_bank"], dtype=torch.bfloat16)
    (cut, rule), (nearest, other) = (
        stepped("wide_bank", start, weight_rounding=value) for value in ("truncate", "nearest")
    )
    exact = join_bits(cut, rule.state["low"])
    assert_same_bits(join_bits(nearest, other.state["low"], nearest=True), exact)
    assert_same_bits(nearest, exact.to(torch.bfloat16))
    assert not torch.equal(cut, nearest)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("coefficients", [(3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5)], ids=str)
def test_muon_direction_of_torch(shape, coefficients):
    """torch.optim.Muon's, of 5 steps in bf16: ours is at most twice as far from float64.

    The matrix has singular values of 0.4 … 1, so that bf16 noise is amplified in no direction.
    "original": a step is √max(1, m/n) long, as ours.
    """
    u, s, vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    s = torch.linspace(1, 0.4, len(s), dtype=torch.float64)
    grad = u @ torch.diag(s) @ vh
    s = s / s.norm()
    a, b, c = coefficients
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = -(max(1, shape[0] / shape[1]) ** 0.5) * (u @ torch.diag(s) @ vh)
    theirs = nn.Parameter(torch.zeros(shape))
    theirs.grad = grad.float()
    torch.optim.Muon(
        [theirs],
        lr=1.0,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        ns_coefficients=coefficients,
        ns_steps=5,
        adjust_lr_fn="original",
    ).step()
    muon = dataclasses.replace(
        TABLES.muon, lr=1.0, wd=0.0, ns_steps=5, ns_coefficients=coefficients
    )
    config = dataclasses.replace(TABLES, matrix_rule="muon", muon=muon)
    ours = nn.Parameter(torch.zeros(1, *shape))
    ours.grad = grad.float()[None]
    plan = dataclasses.replace(SPLIT_PLANS.plan(5), lr=1.0, momentum=0.0)
    Optimizer([("wide_bank", ours)], config, Comms()).step(plan)
    errors = [(p.double() - expected).norm() / expected.norm() for p in (ours.data[0], theirs.data)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", ["wide_bank", "table", "lambda_o"])
def test_adamw_of_torch(name):
    """Three steps in float64 of a bank with rates for each matrix, a table and a vector."""
    row = {"table": AdamRow("table", 0.8, 0.95, lr_mul=0.5, wd_mul=2.0)}.get(
        name, AdamRow(name, 0.8, 0.95)
    )
    adamw = dataclasses.replace(TABLES.adamw, lr=0.1, wd=0.3, matrix_lr=0.2)
    config = OptimConfig(
        muon_table=(MuonRow("wide_bank", lr_muls=(1.0, 2.0)),),
        adam_table=() if name == "wide_bank" else (row,),
        matrix_rule="adamw",
        vector_rule="adamw",
        adamw=adamw,
    )
    start, bank = normal(*SHAPES[name]), name == "wide_bank"
    ours = nn.Parameter(start.clone())
    optimizer = Optimizer([(name, ours)], config, Comms())
    theirs = [nn.Parameter(part.clone()) for part in (start if bank else [start])]
    groups = []
    for i, part in enumerate(theirs):
        if bank:
            numbers = dict(lr=0.2 * (1, 2)[i % 2], weight_decay=0.3, betas=(0.9, 0.95))
        else:
            numbers = dict(lr=0.1 * row.lr_mul, weight_decay=0.3 * row.wd_mul, betas=(0.8, 0.95))
        groups.append(dict(params=[part], eps=1e-10, **numbers))
    reference = torch.optim.AdamW(groups)
    for step in range(3):
        ours.grad = normal(*start.shape, seed=step)
        for part, grad in zip(theirs, ours.grad if bank else [ours.grad], strict=True):
            part.grad = grad.clone()
        reference.step()
        optimizer.step(dataclasses.replace(SPLIT_PLANS.plan(5), lr=1.0))
    expected = torch.stack([part.data for part in theirs]).view_as(start)
    torch.testing.assert_close(ours.data, expected, **FLOAT64_NOISE)


@pytest.mark.parametrize("rule", ["normuon", "muon", "adamw"])
def test_matrix_rules_of_a_recipe(rule):
    """One word exchanges the rule; each moves the bank downhill, by its own state."""
    config = dataclasses.replace(recipes.load("optimization").optim, matrix_rule=rule)
    start = torch.zeros(3, 4, 6)
    optimizer = one_step(config, {"up_bank": start})
    moved = optimizer.params["up_bank"].data
    assert (moved * normal(3, 4, 6, seed=50, dtype=torch.float32)).sum() < 0
    kinds = {"normuon": {"momentum", "second"}, "muon": {"momentum"}}
    assert set(optimizer.rules["up_bank"].state) == kinds.get(rule, {"exp_avg", "exp_avg_sq", "t"})


def test_rates_of_a_bank():
    """lr_muls go over the matrices of the whole bank in turn, times √(m/n) for tall ones."""
    bank = nn.Parameter(torch.zeros(6, 16, 4))
    config = dataclasses.replace(TABLES, muon_table=(MuonRow("bank", (1.0, 2.0)),))
    found = []
    for rank in range(2):  # three matrices each
        rule = Optimizer([("bank", bank)], config, Comms(rank, 2)).rules["bank"]
        found += rule.lr_muls_B.tolist()
    assert found == [2.0, 4.0, 2.0, 4.0, 2.0, 4.0]


# ---- Tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("gate", (3,), "parameter 'gate' needs a row in optim.muon_table or optim.adam_table"),
        ("Lambda_o", (3,), "parameter 'Lambda_o' needs a row"),
        ("tall_bank", (3,), r"'tall_\*' matches 'tall_bank', which has shape \(3,\)"),
    ],
)
def test_tables_must_match_each_parameter_once(name, shape, words):
    with pytest.raises(ConfigError, match=words):
        Optimizer([(name, nn.Parameter(torch.zeros(shape)))], TABLES, Comms())


@pytest.mark.parametrize("row", [AdamRow("wide_*", 0.9, 0.95), MuonRow("*"), MuonRow("wide_bank")])
def test_two_rows_for_one_parameter(row):
    table = "adam_table" if isinstance(row, AdamRow) else "muon_table"
    config = dataclasses.replace(TABLES, **{table: (*getattr(TABLES, table), row)})
    with pytest.raises(
        ConfigError, match=rf"'wide_bank' matches 'wide_bank', '{re.escape(row.name)}'"
    ):
        Optimizer([("wide_bank", nn.Parameter(torch.zeros(2, 3, 4)))], config, Comms())


def test_rows_of_missing_parameters():
    """A table serves models with a technique switched off."""
    Optimizer([("table", nn.Parameter(torch.zeros(3)))], TABLES, Comms())


def test_order_and_places():
    """Small ones first, then as in the tables; the head with its embedding by rows."""
    config = dataclasses.replace(TABLES, replicate_below=10, sparse_rows_threshold=15)
    parameters = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    config = dataclasses.replace(config, muon_table=(MuonRow("tall_bank"), MuonRow("wide_bank")))
    found = [(p.name, p.kind, p.sparse, p.rows_shape) for p in placements(parameters, config, 2)]
    assert found == [
        ("lambda_o", "replicated", False, (4,)),
        ("lambda_s", "replicated", False, ()),
        ("tall_bank", "matrices", False, (4, 9, 5)),
        ("wide_bank", "matrices", False, (3, 4, 6)),
        ("lm_head", "columns", False, (7, 6)),
        ("embed", "rows", False, (7, 6)),
        ("table", "rows", True, (15, 4)),
    ]
    alone = [place.name for place in placements(parameters, config, 1) if place.sparse]
    never = dataclasses.replace(config, sparse_rows_threshold=0)
    assert alone == [p.name for p in placements(parameters, never, 2) if p.sparse] == []


@pytest.mark.parametrize("name", ["record_089", "record_listed", "tiny"])
def test_recipes_have_a_row_for_each_parameter(name):
    config = recipes.load(name)
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config.model, vocab_size=50257), torch.bfloat16)
    places = {p.name: p for p in placements(model.named_parameters(), config.optim, 8)}
    assert places.keys() == dict(model.named_parameters()).keys()
    if name == "record_089":
        sharded = {n: p.kind for n, p in places.items() if p.kind != "replicated"}
        assert sharded == {bank: "matrices" for bank in BANKS} | {
            "lm_head": "columns",
            "embed": "rows",
            "value_embeds": "rows",
            "bigram_embed": "rows",
        }
        assert [n for n, p in places.items() if p.sparse] == ["bigram_embed"]


# ---- Gradients between updates ------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_adam_interval(interval):
    """Adam moves at the end of each interval, with the sum of its gradients; Muon each step."""
    table, bank = nn.Parameter(normal(4, 3)), nn.Parameter(normal(2, 4, 4))
    optimizer = Optimizer([("table", table), ("wide_bank", bank)], TABLES, Comms())
    schedule = Schedule(dataclasses.replace(small_config().schedule, adam_interval=interval))
    for step in range(2 * interval):
        before = table.clone(), bank.clone()
        add_gradients(
            {"table": table, "wide_bank": bank},
            {"table": normal(4, 3, seed=step), "wide_bank": normal(2, 4, 4, seed=step)},
        )
        optimizer.step(schedule.plan(step))
        due = step % interval == interval - 1
        assert torch.equal(table, before[0]) == (not due)
        assert not torch.equal(bank, before[1]) and bank.grad is None
        waiting = [normal(4, 3, seed=s) for s in range(step - step % interval, step + 1)]
        if due:
            assert table.grad is None
        else:
            torch.testing.assert_close(table.grad, sum(waiting))
    assert optimizer.rules["table"].state["t"] == 2


def small_model(dtype=torch.float32):
    """Steps 0 to 3 are tied, and the head is on its own from step 4 on."""
    config = small_config()
    model = GPT(config.model, dtype)
    model.init_weights(0)
    schedule = Schedule(dataclasses.replace(config.schedule, untie_frac=0.1))
    assert schedule.split_step == 3
    return model, Optimizer(model.named_parameters(), config.optim, Comms()), schedule


def take_steps(model, optimizer, schedule, steps):
    for step in steps:
        gradients = {
            name: normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
            for i, (name, p) in enumerate(model.named_parameters())
        }
        add_gradients(dict(model.named_parameters()), gradients)
        optimizer.step(schedule.plan(step))
    return optimizer.snapshot()


def test_a_missing_gradient_is_zero():
    """The bank decays where O·W = 0 >= 0, Adam's parameter stays, nothing is NaN."""
    model, optimizer, schedule = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(schedule.plan(1))
    for name, parameter in model.named_parameters():
        if name in BANKS:
            rate = 0.023
            tall = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            expected = before[name] * (1 - 1.2 * rate * rate * tall)
            torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=0)
        else:
            assert_same_bits(parameter.data, before[name])


# ---- Snapshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_is_bitwise(dtype):
    """A run after snapshot, six steps across the split and restore is the run without them."""
    model, optimizer, schedule = small_model(dtype)
    take_steps(model, optimizer, schedule, range(2))  # so that no state is zero
    snapshot = optimizer.snapshot()
    first = take_steps(model, optimizer, schedule, range(2, 7))
    changed = [not torch.equal(a, b) for a, b in zip(first, snapshot, strict=True)]
    assert sum(changed) >= len(changed) - 1  # sign_table is no state
    model.embed.grad = torch.ones_like(model.embed)
    optimizer.restore(snapshot)
    assert all(p.grad is None for p in model.parameters())
    for found, saved in zip(optimizer.snapshot(), snapshot, strict=True):
        assert_same_bits(found, saved)
    again = take_steps(model, optimizer, schedule, range(2, 7))
    for found, expected in zip(again, first, strict=True):
        assert_same_bits(found, expected)


def test_restore_forgets_touched_rows():
    """The gradient is gone, so its rows are no longer known to be touched."""
    config = dataclasses.replace(TABLES, replicate_below=0, sparse_rows_threshold=4)
    table = nn.Parameter(normal(6, 3))
    optimizer = Optimizer([("table", table)], config, Comms(0, 2))
    snapshot = optimizer.snapshot()
    table.grad = normal(6, 3)
    optimizer.touched("table", torch.tensor([1, 2], dtype=torch.int32))
    optimizer.restore(snapshot)
    table.grad = normal(6, 3)
    with pytest.raises(RuntimeError, match=r"call optimizer.touched\('table', rows\)"):
        optimizer.step(dataclasses.replace(SPLIT_PLANS.plan(5), tied=False))


def test_restore_puts_fp8_scales_back():
    """What warm_up relies on: the same losses after it as without it, bit for bit."""
    config = small_config()
    model = GPT(config.model, torch.bfloat16, fp8=True)
    model.init_weights(0)
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms(), model.named_buffers)
    batch = make_batch(config.model, 1, [0, 5, 40])
    windows = model.plan_windows(batch, Windows(3, 7))

    def losses():
        found = []
        for plan in itertools.islice(Schedule(config.schedule), 4):
            model.refresh_fp8(down_own_amax=plan.step < 2)
            loss = model.training_loss(batch, windows, LossWeights())
            loss.backward()
            optimizer.step(plan)
            found.append(loss.item())
        return found

    snapshot, scales = optimizer.snapshot(), [b.clone() for b in model.fp8_mlp.buffers()]
    first = losses()
    assert all(not torch.equal(a, b) for a, b in zip(model.fp8_mlp.buffers(), scales, strict=True))
    optimizer.restore(snapshot)
    for found, saved in zip(model.fp8_mlp.buffers(), scales, strict=True):
        assert_same_bits(found, saved)
    assert losses() == first


def test_snapshot_holds_copies():
    model, optimizer, schedule = small_model()
    snapshot = optimizer.snapshot()
    copies = [t.clone() for t in snapshot]
    take_steps(model, optimizer, schedule, range(2))
    for saved, copy in zip(snapshot, copies, strict=True):
        assert_same_bits(saved, copy)
