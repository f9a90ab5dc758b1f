"""`speedrun.optim.NorMuon` in plain PyTorch loops: against the training program and the formula."""

import copy
import dataclasses
import io
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun import normuon
from speedrun.comms import Comms
from speedrun.config import MuonRow, NorMuonConfig, OptimConfig
from speedrun.optim import NorMuon, Optimizer
from test_optim import plain_matrix
from train_helpers import FLOAT64_NOISE, SPLIT_PLANS, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Two of one shape, a batch of the same, and others.
SHAPES = {"wide": (4, 6), "wide_too": (4, 6), "tall": (9, 5), "batch": (3, 4, 6), "square": (5, 5)}


def matrices(dtype=FP32):
    return {
        name: nn.Parameter(normal(*shape, seed=i).to(DEVICE, dtype))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def train(params, optimizer, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def give_gradients(params, step):
    for i, param in enumerate(params):
        grad = normal(*param.shape, seed=100 * (step + 1) + i)
        param.grad = grad.to(param.device, param.dtype)


def clones(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_all_same(params, others):
    for param, other in zip(params, others, strict=True):
        assert_same_bits(param.detach(), other.detach())


# ---- What it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "config", "options"),
    [
        (BF16, {}, {}),
        (BF16, {"weight_rounding": "nearest"}, {"weight_rounding": "nearest"}),
        (BF16, {"exact_weights": False}, {"exact_weights": False}),
        (FP32, {"cautious_decay": False}, {"cautious": False, "polar_precision": "weight"}),
        (
            FP32,
            {"normuon": NorMuonConfig(0.1, 0.5, 0.8, "gram", "fp16", "s4")},
            {
                "lr": 0.1,
                "weight_decay": 0.5,
                "beta2": 0.8,
                "polar_form": "gram",
                "polar_precision": "fp16",
                "polar_norm": "s4",
            },
        ),
    ],
)
def test_it_is_the_training_programs_rule(dtype, config, options):
    ours, theirs = matrices(dtype), matrices(dtype)
    program = Optimizer(theirs.items(), OptimConfig((MuonRow("*"),), (), **config), Comms())
    optimizer = NorMuon(ours.values(), **options)
    base = optimizer.param_groups[0]["lr"]
    for plan in itertools.islice(SPLIT_PLANS, SPLIT_PLANS.total_steps):
        plan = dataclasses.replace(plan, tied=False, split=False)  # that is of other parameters
        give_gradients(ours.values(), plan.step)
        give_gradients(theirs.values(), plan.step)
        optimizer.param_groups[0].update(lr=base * plan.lr, momentum=plan.momentum)
        optimizer.step()
        program.step(plan)
        assert_all_same(ours.values(), theirs.values())


def test_a_network_learns_by_the_formula_step_by_step():
    torch.manual_seed(0)
    x, y = normal(32, 6), normal(32, 3).sin()
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
    ).double()
    optimizer = NorMuon(model.named_parameters(), lr=0.023, polar_precision="weight")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    weights, states = [p.detach().clone() for p in model.parameters()], [{}, {}]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        plan = SimpleNamespace(momentum=0.95, lr=scheduler.get_last_lr()[0] / 0.023)
        for weight, state, param in zip(weights, states, model.parameters(), strict=True):
            plain_matrix(weight, state, param.grad, plan, 1)
        optimizer.step()
        scheduler.step()
        for weight, param in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(param.detach(), weight, **FLOAT64_NOISE)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_decay_that_goes_by_the_rate():
    """As in torch.optim.AdamW; of a tall matrix, whose step is longer."""
    decayed, plain = (nn.Parameter(normal(9, 5)) for _ in range(2))
    options = {"lr": 0.1, "cautious": False, "squared_decay": False}
    for param, weight_decay in ((decayed, 0.3), (plain, 0.0)):
        train([param], NorMuon([param], weight_decay=weight_decay, **options), range(1))
    difference = (plain - decayed).detach()
    torch.testing.assert_close(difference, 0.1 * 0.3 * normal(9, 5), **FLOAT64_NOISE)


def test_parameters_of_one_shape_are_one_bank_and_get_what_each_alone_would(monkeypatch):
    banks = []

    def spy(grads, *arguments):
        banks.append([tuple(grad.shape) for grad in grads])
        return momentum_polar_express(grads, *arguments)

    momentum_polar_express = normuon.momentum_polar_express
    monkeypatch.setattr(normuon, "momentum_polar_express", spy)
    together, alone = list(matrices().values()), list(matrices().values())
    train(together, NorMuon(together), range(3))
    assert banks == [[(5, 4, 6), (1, 9, 5), (1, 5, 5)]] * 3
    for i, param in enumerate(alone):
        optimizer = NorMuon([param])
        for step in range(3):
            param.grad = normal(*param.shape, seed=100 * (step + 1) + i).to(DEVICE, FP32)
            optimizer.step()
    for param, other in zip(together, alone, strict=True):
        # GEMMs of a batch and of one matrix may add up in another order.
        torch.testing.assert_close(param, other, rtol=0, atol=2e-3 * 0.023)


def test_types_mix_and_layouts_are_free():
    base = [normal(6, 4), normal(4, 6), normal(3, 4, 6)]
    params = [
        nn.Parameter(base[0].float().mT),  # not contiguous
        nn.Parameter(base[1].float()),
        nn.Parameter(base[2].bfloat16()),
    ]
    contiguous = clones(param.contiguous() for param in params)
    for group in (params, contiguous):
        train(group, NorMuon(group), range(2))
    assert not params[0].is_contiguous()
    assert_all_same(params, contiguous)


# ---- The conventions of torch.optim -------------------------------------------------------------


def test_groups_have_rates_of_their_own_and_what_has_no_gradient_stays():
    params = list(matrices().values())
    before = clones(params)
    optimizer = NorMuon([{"params": params[:2]}, {"params": params[2:], "lr": 0.0}], lr=0.1)
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert_all_same(params[1:], before[1:])
    assert params[1] not in optimizer.state
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def test_closure():
    param = nn.Parameter(normal(4, 6))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    optimizer = NorMuon([param], lr=0.1)
    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first == normal(4, 6).square().sum()


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_state_goes_through_a_file_bit_for_bit(how, dtype):
    params = list(matrices(dtype).values())
    optimizer = NorMuon(params, momentum=0.9, polar_form="gram")
    train(params, optimizer, range(2))
    if how == "deepcopy":
        loaded, others = copy.deepcopy((optimizer, params))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        others = clones(params)
        loaded = NorMuon(others, lr=1.0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.param_groups[0]["momentum"] == 0.9
    for param, other in zip(params, others, strict=True):
        assert optimizer.state[param].keys() == loaded.state[other].keys()
        assert ("low" in loaded.state[other]) == (dtype == BF16)
        for name, tensor in optimizer.state[param].items():
            assert_same_bits(loaded.state[other][name], tensor)
    train(params, optimizer, range(2, 4))
    train(others, loaded, range(2, 4))
    assert_all_same(params, others)


def test_the_state_of_another_optimizer_is_refused():
    params = list(matrices().values())
    sgd = torch.optim.SGD(params, momentum=0.9)
    train(params, sgd, range(1))
    other_shapes = [nn.Parameter(normal(*param.shape[::-1]).float()) for param in params]
    normuon_of_others = NorMuon(other_shapes)
    train(other_shapes, normuon_of_others, range(1))
    optimizer = NorMuon(params)
    for saved in (sgd, normuon_of_others):
        with pytest.raises(ValueError, match=r"\(4, 6\) needs the state .* another optimizer or"):
            optimizer.load_state_dict(saved.state_dict())
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.023
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(NorMuon(params[:2]).state_dict())


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((), FP32, ValueError, r"shape \(\).*torch\.optim\.AdamW"),
        ((7,), FP32, ValueError, r"shape \(7,\).*torch\.optim\.AdamW"),
        ((8, 3, 3, 3), FP32, ValueError, r"shape \(8, 3, 3, 3\).*view it"),
        ((4, 6), torch.float16, TypeError, r"\(4, 6\) has type torch\.float16; it takes bfloat16"),
        ((4, 6), torch.complex64, TypeError, "complex64"),
    ],
)
def test_parameters_that_are_not_its_are_refused_by_name(shape, dtype, error, message):
    bad, good = nn.Parameter(torch.zeros(shape, dtype=dtype)), nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(error, match=message):
        NorMuon([good, bad])
    with pytest.raises(error, match=r"'model\.bad'"):
        NorMuon([("model.bad", bad)])
    optimizer = NorMuon([good])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be a number >= 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"beta2": -1}, r"beta2 must be in \[0, 1\), got -1"),
        ({"weight_decay": -1e-3}, "weight_decay must be >= 0, got -0.001"),
        ({"polar_precision": "fp8"}, "polar_precision must be one of 'weight', 'bf16', 'fp16', go"),
        ({"weight_rounding": "up"}, "weight_rounding must be one of 'truncate', 'nearest', got"),
        ({"polar_form": "x"}, "polar_form must be one of 'standard', 'gram', got 'x'"),
        ({"polar_norm": "x"}, "polar_norm must be one of 'frobenius', 's4', got 'x'"),
    ],
)
def test_numbers_that_can_not_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([nn.Parameter(torch.zeros(4, 6))], **options)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(8, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(8, 4\) is sparse"):
        NorMuon(table.parameters()).step()
