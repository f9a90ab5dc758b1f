"""The optimizer against eight steps of the public program, before and behind the split.

Names are ours, and so are the numbers: those of recipe `record_089`. PUBLIC has the labels of the
arrays (README_optimizer). Of two steps around the split a cut is in tests/golden/optimizer.npz.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun import recipes, update_rules
from speedrun.comms import Comms
from speedrun.config import ScheduleConfig, Stage
from speedrun.ops.normuon_step import join_bits, normuon_step, variance_rescale
from speedrun.optim import Optimizer
from speedrun.reference.polar_express import momentum_step
from speedrun.schedule import Schedule
from train_helpers import add_gradients, from_golden, golden, low_bits

EPS = torch.finfo(torch.float32).eps
BANKS = ("qk_bank", "vo_bank", "mlp_bank")
PUBLIC = {name: name for name in (*BANKS, "lm_head", "embed", "value_embeds", "bigram_embed")} | {
    "lambda_qkv": "scalars",  # all the λ in one array
    "w_smear": "smear_gate",
    "ve_gate": "ve_gate_bank",
    "p_attn": "post_lambdas",  # with p_mlp
    "r_attn": "resid_lambdas",
    "mudd_layer_W1": "mudd_w1",
    "mudd_layer_W2": "mudd_w2",
    "mudd_layer_c": "mudd_b2",
    "gate_pre_W1": "mudd_gate_w1",
    "gate_pre_W2": "mudd_gate_w2",
    "gate_pre_c": "mudd_gate_b2",
    "gate_s": "_mudd_gate_scale",
}
ADAM_NAMES = [name for name in PUBLIC if name not in BANKS]
CUT_NAMES = {5: ("qk_bank", "lm_head", "embed"), 7: ("lm_head", "embed")}  # by step
CUT = Path(__file__).parent / "golden" / "optimizer.npz"
SPLIT = 5
PLANS = Schedule(
    ScheduleConfig(
        num_steps=6,
        stages=(Stage(8, 8, 1, 1), Stage(8, 8, 1, 1, 1.52), Stage(8, 8, 1, 1, 1.73)),
        extension_steps=2,
        extension=Stage(8, 8, 1, 1, 0.15),
        untie_frac=2 / 3,
        momentum_warmup_steps=3,
        momentum_cooldown_steps=2,
    )
)


@pytest.fixture(scope="module")
def public(shared_data):
    """Both files' arrays; their names differ."""
    return golden(shared_data, "optimizer_a.npz") | golden(shared_data, "optimizer_a_muon.npz")


@pytest.fixture(scope="module")
def cut():
    with np.load(CUT) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=["replicated", "rows"])
def config(request):
    """The record's, whose small parameters are updated by every rank; or all tables by rows."""
    config = recipes.load("record_089").optim
    return (
        config if request.param == "replicated" else dataclasses.replace(config, replicate_below=0)
    )


def make_optimizer(arrays, names, config, prefix):
    """Parameters from the arrays `prefix`/<label>."""
    parameters = {
        name: nn.Parameter(from_golden(arrays[f"{prefix}/{PUBLIC[name]}"])) for name in names
    }
    return parameters, Optimizer(parameters.items(), config, Comms())


def add_step_gradients(parameters, arrays, step):
    add_gradients(
        parameters,
        {name: from_golden(arrays[f"grad/{step}/{PUBLIC[name]}"]) for name in parameters},
    )


def public_update(arrays, step, banks, patch):
    """NorMuon with the public program's polar factors and, once rescaled, its updates.

    They are computed in bf16, whose noise Polar Express amplifies to several percent, and the
    public run rounds twice in the rescaling where we do once (as its compiled form does): from
    different roundings two right programs drift apart. tests/ops judge both functions.
    """
    polar = iter([from_golden(arrays[f"{step}/{bank}/polar"]) for bank in banks])
    updates = iter([from_golden(arrays[f"{step}/{bank}/update"]) for bank in banks])

    def orthogonalized(grads, momenta, mu, *options):
        for grad, momentum in zip(grads, momenta, strict=True):
            momentum_step(grad, momentum, mu)
        return [next(polar) for _ in grads]

    def normuon(weight, low, o, second, lr_B, wd, *, beta2, **options):
        found, expected = variance_rescale(o, second, beta2), next(updates)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        normuon_step(weight, low, expected, None, lr_B, wd, beta2=beta2, **options)

    patch.setattr(update_rules, "momentum_polar_express", orthogonalized)
    patch.setattr(update_rules, "normuon_step", normuon)


def moments_of(rule, name):
    """In the parameter's layout: the head's are held as rows of its transpose."""
    exp_avg, exp_avg_sq = rule.state["exp_avg"], rule.state["exp_avg_sq"]
    return (exp_avg.mT, exp_avg_sq.mT) if name == "lm_head" else (exp_avg, exp_avg_sq)


def load_state(arrays, step, parameters, optimizer):
    """Everything as the public program had it before `step`, from what it stored."""
    adam_step = step - 1 if step % 2 == 0 else step - 2  # Adam's last one
    for name, parameter in parameters.items():
        state, label = optimizer.rules[name].state, PUBLIC[name]
        if name in BANKS and step > 0:
            prefix = f"after/{step - 1}/{label}"
            parameter.data.copy_(from_golden(arrays[prefix]).view_as(parameter))
            state["low"].copy_(low_bits(arrays[f"{prefix}/low16"]))
            for kind in ("momentum", "second"):
                state[kind].copy_(from_golden(arrays[f"{prefix}/{kind}"]))
        elif name not in BANKS and adam_step > 0:
            prefix = f"after/{adam_step}/{label}"
            parameter.data.copy_(from_golden(arrays[prefix]))
            if f"{prefix}/t" in arrays:  # embed has none before the split
                state["t"].fill_(int(arrays[f"{prefix}/t"]))
                for kind, moment in zip(
                    ("exp_avg", "exp_avg_sq"),
                    moments_of(optimizer.rules[name], name),
                    strict=True,
                ):
                    moment.copy_(from_golden(arrays[f"{prefix}/{kind}"]).view_as(moment))
    if step % 2 == 1:  # Adam's gradients of the step before wait for this one
        waiting = {name: p for name, p in parameters.items() if name not in BANKS}
        add_step_gradients(waiting, arrays, step - 1)


def assert_bank(arrays, step, name, parameter, rule):
    """Weight, low bits and momentum in every bit; the second moment to float32."""
    prefix = f"after/{step}/{PUBLIC[name]}"
    assert_same_bits(parameter.data, from_golden(arrays[prefix]).view_as(parameter))
    assert_same_bits(rule.state["low"], low_bits(arrays[f"{prefix}/low16"]))
    assert_same_bits(rule.state["momentum"], from_golden(arrays[f"{prefix}/momentum"]))
    second = from_golden(arrays[f"{prefix}/second"])
    torch.testing.assert_close(rule.state["second"], second, rtol=1e-6, atol=0)


def assert_adam(arrays, step, name, parameter, rule):
    """bf16 in every bit; float32 and moments as README_optimizer measured with float64.

    2e-8 and 1e-7 of the largest entry, and in float32 itself two roundings more.
    """
    prefix = f"after/{step}/{PUBLIC[name]}"
    expected = from_golden(arrays[prefix])
    if parameter.dtype == torch.bfloat16:
        assert_same_bits(parameter.data, expected)
    else:
        error = (parameter - expected).abs().max() / expected.abs().max()
        assert error <= 2e-8 + 2 * EPS
    if name == "embed" and step < SPLIT:
        return  # it has no moments of its own
    assert int(rule.state["t"]) == int(arrays[f"{prefix}/t"]) == (step + 1) // 2
    for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments_of(rule, name), strict=True):
        expected = from_golden(arrays[f"{prefix}/{kind}"]).view_as(moment)
        assert moment.dtype == torch.float32
        assert (moment - expected).abs().max() <= (1e-7 + 2 * EPS) * expected.abs().max()


def check_step(arrays, step, parameters, optimizer, patch):
    """One step from the stored state before it, then everything as stored behind it."""
    load_state(arrays, step, parameters, optimizer)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    add_step_gradients(parameters, arrays, step)
    public_update(arrays, step, [name for name in BANKS if name in parameters], patch)
    optimizer.step(PLANS.plan(step))
    for name, parameter in parameters.items():
        rule = optimizer.rules[name]
        if name in BANKS:
            assert_bank(arrays, step, name, parameter, rule)
        elif step % 2 == 1:
            assert_adam(arrays, step, name, parameter, rule)
        else:
            assert_same_bits(parameter.data, before[name])
            assert parameter.grad is not None


def test_schedule_of_the_public_run(public):
    for step, (number, lr, mu, adam, tied, split) in enumerate(public["schedule"].tolist()):
        plan = PLANS.plan(step)
        assert (plan.step, plan.lr, plan.momentum) == pytest.approx((number, lr, mu), rel=1e-13)
        assert (plan.adam, plan.tied, plan.split) == (bool(adam), bool(tied), bool(split))


@pytest.mark.parametrize("step", range(8))
def test_each_step_from_the_stored_state(public, config, step, monkeypatch):
    check_step(public, step, *make_optimizer(public, PUBLIC, config, "init"), monkeypatch)


@pytest.mark.parametrize("step", CUT_NAMES)
def test_two_steps_of_the_cut(cut, step, monkeypatch):
    """At the split, the last tied update; and the first separate one. These are always there."""
    optim = recipes.load("record_089").optim  # load_state replaces what is behind the step
    parameters, optimizer = make_optimizer(cut, CUT_NAMES[step], optim, f"after/{step}")
    check_step(cut, step, parameters, optimizer, monkeypatch)


def test_a_run_of_eight_steps(public, config, monkeypatch):
    """Without stored states in between: nothing is forgotten or mixed up from step to step."""
    parameters, optimizer = make_optimizer(public, PUBLIC, config, "init")
    for step in range(8):
        add_step_gradients(parameters, public, step)
        public_update(public, step, BANKS, monkeypatch)
        optimizer.step(PLANS.plan(step))
        for name in BANKS:
            assert_bank(public, step, name, parameters[name], optimizer.rules[name])
        for name in ADAM_NAMES if step % 2 == 1 else ():
            assert_adam(public, step, name, parameters[name], optimizer.rules[name])


def test_matrices_without_gradient(public, config):
    """Padding stays zero; weights without gradient only decay, at (1 − 1.2·rate·rate) a step."""
    parameters, optimizer = make_optimizer(public, BANKS, config, "init")
    shrunk = parameters["vo_bank"][3].detach().float()
    for step in range(2):
        add_step_gradients(parameters, public, step)
        optimizer.step(dataclasses.replace(PLANS.plan(step), tied=False))
        rate = 0.023 * PLANS.plan(step).lr
        shrunk = shrunk * (1 - 1.2 * rate * rate)
    assert (parameters["qk_bank"][7] == 0).all()
    low = optimizer.rules["vo_bank"].state["low"]
    exact = join_bits(parameters["vo_bank"].data, low)[3]
    torch.testing.assert_close(exact, shrunk, rtol=4 * EPS, atol=0)
