"""The optimizer over named parameters: the public program's eight steps, and its edges."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun import optim
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.config import (
    AdamRow,
    ConfigError,
    MuonRow,
    OptimConfig,
    ScheduleConfig,
    Stage,
    Windows,
)
from speedrun.model import GPT
from speedrun.ops.normuon_step import join_bits
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from train_helpers import from_golden, golden, low_bits, make_batch, normal, small_config

BANKS = ("qk_bank", "vo_bank", "mlp_bank")

# RECIPE section 4, the table, under the public program's labels. embed and lm_head are left out:
# they are tied in this run, and tying comes with the whole record recipe.
RECORD = OptimConfig(
    muon_table=(
        MuonRow("qk_bank"),
        MuonRow("vo_bank"),
        MuonRow("mlp_bank", lr_muls=(1.0, 2.0)),
    ),
    adam_table=(
        AdamRow("value_embeds", 0.75, 0.95, lr_mul=75, wd_mul=5),
        AdamRow("bigram_embed", 0.75, 0.95, lr_mul=75, wd_mul=5),
        AdamRow("scalars", 0.9, 0.99, lr_mul=5),
        AdamRow("smear_gate", 0.9, 0.99, lr_mul=0.01),
        AdamRow("ve_gate_bank", 0.9, 0.99, lr_mul=1, wd_mul=1),
        AdamRow("post_lambdas", 0.9, 0.95, lr_mul=1),
        AdamRow("resid_lambdas", 0.9, 0.95, lr_mul=5),
        AdamRow("mudd_w1", 0.9, 0.99, lr_mul=0.25, wd_mul=1),
        AdamRow("mudd_w2", 0.9, 0.99, lr_mul=0.25, wd_mul=1),
        AdamRow("mudd_b2", 0.9, 0.99, lr_mul=0.25),
        AdamRow("mudd_gate_w1", 0.9, 0.99, lr_mul=0.1, wd_mul=1),
        AdamRow("mudd_gate_w2", 0.9, 0.99, lr_mul=0.1, wd_mul=1),
        AdamRow("mudd_gate_b2", 0.9, 0.99, lr_mul=0.1),
        AdamRow("_mudd_gate_scale", 0.9, 0.99, lr_mul=0.1),
    ),
)
NAMES = [row.name for row in (*RECORD.muon_table, *RECORD.adam_table)]
ADAM_NAMES = [row.name for row in RECORD.adam_table]
PLANS = Schedule(
    ScheduleConfig(
        num_steps=6,
        stages=(Stage(8, 8, 1, 1), Stage(8, 8, 1, 1, 1.52), Stage(8, 8, 1, 1, 1.73)),
        extension_steps=2,
        extension=Stage(8, 8, 1, 1, 0.15),
        momentum_warmup_steps=3,
        momentum_cooldown_steps=2,
    )
)


def add_gradients(parameters, gradients):
    """As backward does: into `.grad`, in the parameter's own type."""
    for name, gradient in gradients.items():
        parameter = parameters[name]
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad += gradient


@pytest.fixture(scope="module")
def public(shared_data):
    return golden(shared_data, "optimizer_a.npz")


@pytest.fixture(scope="module")
def inside(shared_data):
    return golden(shared_data, "optimizer_a_muon.npz")


@pytest.fixture(scope="module")
def run(public, inside):
    """State after each of the eight steps; NorMuon takes the public program's polar factors.

    They are computed in bf16, whose noise Polar Express amplifies to several percent, so that two
    right programs drift apart (README_optimizer; tests/ops/test_polar_express.py judges them).
    """
    parameters = {name: nn.Parameter(from_golden(public[f"init/{name}"])) for name in NAMES}
    optimizer = Optimizer(parameters.items(), RECORD, Comms())
    banks = iter([])
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "polar_express", lambda *_: next(banks))
        for step in range(8):
            add_gradients(
                parameters, {name: from_golden(public[f"grad/{step}/{name}"]) for name in NAMES}
            )
            banks = iter([from_golden(inside[f"{step}/{name}/polar"]) for name in BANKS])
            optimizer.step(PLANS.plan(step))
            state = {}
            for item in (*optimizer.banks, *optimizer.adams):
                state[item.row.name] = [t.clone() for t in item.tensors()]
            states.append((state, {item.row.name: item.num_updates for item in optimizer.adams}))
    return states


def test_schedule_of_the_public_run(public):
    for step, (number, lr, mu, adam, *_) in enumerate(public["schedule"].tolist()):
        plan = PLANS.plan(step)
        assert (plan.step, plan.lr, plan.momentum) == pytest.approx((number, lr, mu), rel=1e-13)
        assert plan.adam == bool(adam)


@pytest.mark.parametrize("name", ADAM_NAMES)
def test_adam_of_the_public_run(public, run, name):
    """bf16 parameters in every bit; the rest as README_optimizer measured with float64.

    2e-8 and 1e-7 of the largest entry, and in float32 itself two roundings more.
    """
    eps = torch.finfo(torch.float32).eps
    for step in range(8):
        state, counts = run[step]
        parameter, *moments = state[name]
        if step % 2 == 0:  # gradients wait for the next step
            before = run[step - 1][0][name][0] if step else from_golden(public[f"init/{name}"])
            assert_same_bits(parameter, before)
            continue
        expected = from_golden(public[f"after/{step}/{name}"])
        if parameter.dtype == torch.bfloat16:
            assert_same_bits(parameter, expected)
        else:
            error = (parameter - expected).abs().max() / expected.abs().max()
            assert error <= 2e-8 + 2 * eps
        assert counts[name] == public[f"after/{step}/{name}/t"] == (step + 1) // 2
        for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            expected = from_golden(public[f"after/{step}/{name}/{kind}"])
            assert moment.dtype == torch.float32
            assert (moment - expected).abs().max() <= (1e-7 + 2 * eps) * expected.abs().max()


@pytest.mark.parametrize("bank", BANKS)
def test_normuon_of_the_public_run(public, inside, run, bank):
    """Momentum and variance to float32; weights as far as one bf16 rounding of each update.

    The public run rounds twice in the rescaling, we once (as its compiled form does): each update
    may differ by an ulp, 2⁻⁷ of its size, and is multiplied by its rate.
    """
    eps, allowed = torch.finfo(torch.float32).eps, 0.0
    for step in range(8):
        weight, momentum, second, low = run[step][0][bank]
        prefix = f"after/{step}/{bank}"
        expected = from_golden(public[f"{prefix}/momentum"])
        gradients = [from_golden(public[f"grad/{s}/{bank}"]) for s in range(step + 1)]
        largest = max(gradient.abs().max() for gradient in gradients)
        assert (momentum - expected).abs().max() <= (step + 1) * eps * largest
        expected = from_golden(public[f"{prefix}/second"])
        torch.testing.assert_close(second, expected, rtol=(step + 2) * eps * 4, atol=0)
        exact = join_bits(weight.view_as(low), low)
        expected = join_bits(from_golden(public[prefix]), low_bits(public[f"{prefix}/low16"]))
        rate = 0.023 * PLANS.plan(step).lr * {"qk_bank": 1, "vo_bank": 1, "mlp_bank": 4}[bank]
        update = from_golden(inside[f"{step}/{bank}/update"])
        allowed += rate * 2**-7 * update.abs().max()
        assert (exact - expected).abs().max() <= allowed


def test_matrices_without_gradient(public, run):
    """Padding stays zero; weights without gradient only decay, at (1 − 1.2·rate·rate) a step."""
    weight = run[-1][0]["qk_bank"][0]
    assert (weight[7] == 0).all()
    weight, *_, low = run[-1][0]["vo_bank"]
    shrunk = from_golden(public["init/vo_bank"])[3].float()
    for step in range(8):
        rate = 0.023 * PLANS.plan(step).lr
        shrunk = shrunk * (1 - 1.2 * rate * rate)
    exact = join_bits(weight, low)[3]
    torch.testing.assert_close(exact, shrunk, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


def small_model(dtype=torch.float32):
    config = small_config()
    model = GPT(config.model, dtype)
    model.init_weights(0)
    return model, Optimizer(model.named_parameters(), config.optim, Comms())


def take_steps(model, optimizer, steps):
    schedule = Schedule(small_config().schedule)
    for step in steps:
        gradients = {
            name: normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
            for i, (name, p) in enumerate(model.named_parameters())
        }
        add_gradients(dict(model.named_parameters()), gradients)
        optimizer.step(schedule.plan(step))
    return optimizer.snapshot()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_is_bitwise(dtype):
    """A run after snapshot, five steps and restore is the run without them."""
    model, optimizer = small_model(dtype)
    snapshot = optimizer.snapshot()
    first = take_steps(model, optimizer, range(5))
    assert any(not torch.equal(a, b) for a, b in zip(first, snapshot, strict=True))
    model.embed.grad = torch.ones_like(model.embed)
    optimizer.restore(snapshot)
    assert all(p.grad is None for p in model.parameters())
    for found, saved in zip(optimizer.snapshot(), snapshot, strict=True):
        assert_same_bits(found, saved)
    for found, expected in zip(take_steps(model, optimizer, range(5)), first, strict=True):
        assert_same_bits(found, expected)


def test_restore_puts_fp8_scales_back():
    """What warm_up relies on: the same losses after it as without it, bit for bit."""
    config = small_config()
    model = GPT(config.model, torch.bfloat16, fp8=True)
    model.init_weights(0)
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms(), model.buffers)
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
    model, optimizer = small_model()
    snapshot = optimizer.snapshot()
    copies = [t.clone() for t in snapshot]
    take_steps(model, optimizer, range(2))
    for saved, copy in zip(snapshot, copies, strict=True):
        assert_same_bits(saved, copy)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_adam_interval(interval):
    """Adam moves at the end of each interval, with the sum of its gradients; Muon each step."""
    config = small_config().optim
    embed, bank = nn.Parameter(normal(4, 3)), nn.Parameter(normal(2, 4, 4))
    optimizer = Optimizer([("embed", embed), ("qk_bank", bank)], config, Comms())
    schedule = Schedule(dataclasses.replace(small_config().schedule, adam_interval=interval))
    for step in range(2 * interval):
        before = embed.clone(), bank.clone()
        add_gradients(
            {"embed": embed, "qk_bank": bank},
            {"embed": normal(4, 3, seed=step), "qk_bank": normal(2, 4, 4, seed=step)},
        )
        optimizer.step(schedule.plan(step))
        due = step % interval == interval - 1
        assert torch.equal(embed, before[0]) == (not due)
        assert not torch.equal(bank, before[1]) and bank.grad is None
        waiting = [normal(4, 3, seed=s) for s in range(step - step % interval, step + 1)]
        if due:
            assert embed.grad is None
        else:
            torch.testing.assert_close(embed.grad, sum(waiting))
    assert optimizer.adams[0].num_updates == 2


def test_adam_takes_the_sum_of_the_interval():
    """Moments after two steps are those of one step with the summed gradient."""
    config = small_config().optim
    gradients = [normal(4, 3, seed=s) for s in (1, 2)]
    moments = []
    for interval, grads in ((2, gradients), (1, [sum(gradients)])):
        embed = nn.Parameter(normal(4, 3))
        schedule = Schedule(dataclasses.replace(small_config().schedule, adam_interval=interval))
        optimizer = Optimizer([("embed", embed)], config, Comms())
        for step, gradient in enumerate(grads):
            add_gradients({"embed": embed}, {"embed": gradient})
            optimizer.step(schedule.plan(step))
        moments.append((embed.detach(), optimizer.adams[0].exp_avg))
    for found, expected in zip(*moments, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_a_missing_gradient_is_zero():
    """The bank decays where O·W = 0 >= 0, Adam's parameter stays, nothing is NaN."""
    model, optimizer = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(Schedule(small_config().schedule).plan(1))
    for name, parameter in model.named_parameters():
        if name in BANKS:
            rate = 0.023
            expected = before[name] * (1 - 1.2 * rate * rate * tall(parameter))
            torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=0)
        else:
            assert_same_bits(parameter.data, before[name])


def tall(parameter):
    return max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5


def test_rates_of_a_bank():
    """lr_muls go over the matrices in turn, times √(m/n) for tall ones."""
    config = dataclasses.replace(
        small_config().optim, muon_table=(MuonRow("mlp_bank", (1.0, 2.0)),)
    )
    optimizer = Optimizer([("mlp_bank", nn.Parameter(torch.zeros(6, 16, 4)))], config, Comms())
    assert optimizer.banks[0].lr_muls_B11.flatten().tolist() == [2.0, 4.0, 2.0, 4.0, 2.0, 4.0]


def test_tables_must_name_each_parameter_once():
    config = small_config().optim
    with pytest.raises(ConfigError, match="parameter 'gate' needs a row"):
        Optimizer([("gate", nn.Parameter(torch.zeros(3)))], config, Comms())
    doubled = dataclasses.replace(config, adam_table=(AdamRow("qk_bank", 0.9, 0.95),))
    with pytest.raises(ConfigError, match="qk_bank more than once"):
        Optimizer([("qk_bank", nn.Parameter(torch.zeros(1, 2, 2)))], doubled, Comms())
    # A row without a parameter serves a model with that technique switched off.
    Optimizer([("embed", nn.Parameter(torch.zeros(3)))], config, Comms())


def test_two_rows_in_one_table():
    row = AdamRow("embed", 0.9, 0.95)
    config = dataclasses.replace(small_config().optim, adam_table=(row, row))
    with pytest.raises(ConfigError, match="embed"):
        Optimizer([("embed", nn.Parameter(torch.zeros(3)))], config, Comms())
