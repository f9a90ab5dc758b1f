"""FP8 copies of the head's weight: made again when it has changed, and only then."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.config import HeadConfig, Windows
from speedrun.fp8_state import Fp8HeadState
from speedrun.model import GPT
from speedrun.ops.head_loss import quantize_head
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from train_helpers import make_batch, normal, small_config

BF16 = torch.bfloat16


@pytest.fixture(params=["logits", "fused"])
def state(request):
    weight = nn.Parameter(normal(16, 48).to(BF16))
    found = Fp8HeadState(HeadConfig(form=request.param))
    found.refresh(weight)
    return found, weight


def assert_copies_are_of(state, weight):
    """Those of the form, by HeadConfig's numbers."""
    head = HeadConfig()
    numbers = dict(x_amax=head.x_amax, w_amax=head.w_amax, grad_amax=head.grad_amax)
    form = state.options["form"]
    assert (state.current().w_VD is not None) == (form == "fused")
    expected = quantize_head(weight, **numbers, form=form)
    for mine, same in zip(state.current(), expected, strict=True):
        if same is not None:
            assert_same_bits(mine, same)


def test_an_unchanged_weight_is_quantised_once(state):
    state, weight = state
    first = state.current()
    state.refresh(weight)
    assert state.current() is first
    assert_copies_are_of(state, weight)


@pytest.mark.parametrize("change", ["in place", "a part", "load_state_dict", "other memory"])
def test_a_changed_weight_is_quantised_again(state, change):
    state, weight = state
    other = normal(16, 48, seed=3).to(BF16)
    with torch.no_grad():
        if change == "in place":
            weight.mul_(2)
        elif change == "a part":
            weight[:, 1:3].neg_()
        elif change == "load_state_dict":
            module = nn.ParameterDict({"lm_head": weight})
            module.load_state_dict({"lm_head": other})
        else:
            weight.data = other
    state.refresh(weight)
    assert_copies_are_of(state, weight)


def test_copies_follow_training():
    """Tied, at the split and apart; they are made again where Adam has been, and only there."""
    config = small_config()
    schedule = dataclasses.replace(config.schedule, untie_frac=0.5)
    model = GPT(config.model, BF16, fp8=True)
    model.init_weights(0)
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms(), model.named_buffers)
    batch = make_batch(config.model, 1, [0, 5, 40])
    windows = model.plan_windows(batch, Windows(3, 7))
    snapshot = optimizer.snapshot()
    plans = [plan for plan in Schedule(schedule) if not plan.last]
    assert {plan.tied for plan in plans} == {True, False} and any(plan.split for plan in plans)
    made, changed = [], []
    for plan in plans:
        model.refresh_fp8(plan.fp8_down_own_amax)
        assert_copies_are_of(model.fp8_head, model.lm_head)
        made.append(model.fp8_head.current())
        model.training_loss(batch, windows, LossWeights()).backward()
        optimizer.step(plan)
        changed.append(plan.adam)
    again = [a is not b for a, b in itertools.pairwise(made)]
    assert again == changed[:-1] and set(again) == {True, False}
    optimizer.restore(snapshot)
    model.refresh_fp8(down_own_amax=True)
    assert_copies_are_of(model.fp8_head, model.lm_head)


def test_copies_are_needed():
    model = GPT(small_config().model, BF16, fp8=True)
    with pytest.raises(RuntimeError, match="no FP8 weights yet: refresh_fp8 begins each step"):
        model.fp8_head.current()
