"""Recipe `optimization`: the numbers of the public baseline of that track, and a small run."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from speedrun import recipes
from speedrun.baseline_model import BaselineGPT
from speedrun.comms import Comms
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from speedrun.update_rules import Muon
from train_helpers import FLOAT64_NOISE, from_golden, read_losses, train, write_text

CONFIG = recipes.load("optimization")
GOLDEN = Path(__file__).parent / "golden" / "optimization" / "optimizer.npz"


def test_the_public_schedule():
    """Rates stay for 30 % of the steps and then fall to 0 linearly; momentum stays."""
    plans = list(Schedule(CONFIG.schedule))[:-1]
    assert len(plans) == 3250
    for plan in plans:
        progress = plan.step / 3250
        assert plan.lr == pytest.approx(min(1, (1 - progress) / 0.7), rel=1e-12)
        assert plan.momentum == 0.95 and plan.adam and not plan.tied
        assert (plan.tokens_per_step, plan.max_seq_len) == (8 * 64 * 1024, 1024)


def test_every_parameter_has_its_numbers():
    """AdamW's three rates of the public program; all matrices of the blocks are Muon's."""
    small = dict(num_layers=1, model_dim=8, head_dim=4, mlp_hidden=8, vocab_size=9)
    model = BaselineGPT(dataclasses.replace(CONFIG.model, **small))
    rules = Optimizer(model.named_parameters(), CONFIG.optim, Comms(0, 1)).rules
    assert {type(rules.pop(f"{name}_bank")) for name in ("qkvo", "up", "down")} == {Muon}
    rates = {"embed": 0.7, "lm_head": 0.004}
    assert rates.keys() < rules.keys() and len(rules) == 10
    for name, rule in rules.items():
        assert rule.lr == pytest.approx(rates.get(name, 0.015), rel=1e-12), name
        assert (rule.wd, rule.beta1, rule.beta2) == (0.001, 0.8, 0.95), name


@pytest.fixture
def golden():
    with np.load(GOLDEN) as file:
        return {key: from_golden(file[key]).double() for key in file.files}


# The public arrays by a parameter's name here.
ARRAYS = {
    "tall_bank": "muon_tall",
    "wide_bank": "muon_wide",
    "square_bank": "muon_square",
    "embed": "adamw_embed",
    "lm_head": "adamw_head",
    "some_bias": "adamw_vector",
}


def test_the_public_optimizers(golden):
    """Three steps of each rule in float64. AdamW's gradients are an eighth, as in training."""
    muon = dataclasses.replace(CONFIG.optim.muon, ns_precision="weight")
    optim = dataclasses.replace(CONFIG.optim, muon=muon)
    params = {name: nn.Parameter(golden[f"{array}_start"]) for name, array in ARRAYS.items()}
    optimizer = Optimizer(params.items(), optim, Comms(0, 1))
    plan = Schedule(CONFIG.schedule).plan(0)
    for step, lr in enumerate(golden["lr_factors"].tolist()):
        for name, array in ARRAYS.items():
            share = 1 if array.startswith("muon") else 1 / 8
            params[name].grad = share * golden[f"{array}_grads"][step]
        optimizer.step(dataclasses.replace(plan, step=step, lr=lr))
        for name, array in ARRAYS.items():
            expected = golden[f"{array}_weights"][step]
            torch.testing.assert_close(params[name].data, expected, **FLOAT64_NOISE)


SMALL = {
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.head_dim": 16,
    "model.mlp_hidden": 64,
    "schedule.num_steps": 12,
    "schedule.val_interval": 6,
    "schedule.stages.0.tokens_per_step": 512,
    "schedule.stages.0.max_seq_len": 32,
    "optim.muon.ns_precision": "weight",
    "data.val_tokens": 1024,
    "data.val_tokens_per_part": 256,
    "data.repeat": "true",
    "micro_batch_parts": 4,
}


def test_a_small_run(tmp_path):
    """One rank and two, on a text: from the loss of a head of zeros down to frequent bytes'.

    Their losses differ by the order of float32 sums: a loss is the mean of 512 numbers in eight
    parts, 8 ulps; an update adds what Newton–Schulz makes of a gradient's rounding, in its smallest
    singular directions the product of its slopes, times the rate. Seen: 1 ulp at most.
    """
    write_text(tmp_path / "text.txt")
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    words = ("--recipe", "optimization", "--text", "text.txt", "--device", "cpu", *sets)
    runs = []
    for ranks in (0, 2):
        run = train(tmp_path, *words, "--out", f"of{ranks}", ranks=ranks)
        assert run.code == 0, run.err
        runs.append(read_losses(tmp_path / f"of{ranks}"))
    (_, _, first), (_, _, last) = runs[0][0], runs[0][-1]
    assert first == pytest.approx(math.log(320), rel=1e-6)  # tokens: 257, padded
    assert last < first - 1

    muon = CONFIG.optim.muon
    ulps_an_update = muon.lr * muon.ns_coefficients[0] ** muon.ns_steps
    for (event, step, a), (other_event, other_step, b) in zip(*runs, strict=True):
        assert (event, step) == (other_event, other_step)
        num_updates = step - 1 if event == "training" else step
        limit = torch.finfo(torch.float32).eps * (8 + ulps_an_update * num_updates)
        assert b == pytest.approx(a, rel=limit), (event, step)
