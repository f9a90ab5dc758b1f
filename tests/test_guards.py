"""Guards: what isn't finite is named and dumped, outliers are said, bad updates are left out."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from numerics import assert_same_bits
from speedrun import guards, nonfinite, recipes, step_dump
from speedrun import train as program
from speedrun.comms import Comms
from speedrun.config import ConfigError, GuardConfig, MuonRow, OptimConfig
from speedrun.config_check import check
from speedrun.data import BYTES, StepBatch
from speedrun.estimate import Precision
from speedrun.failures import Watchdog
from speedrun.guards import Guard, LossTrend, check_of, rate_keys
from speedrun.optim import HEAD, Optimizer
from speedrun.overrides import apply_overrides
from speedrun.runlog import BadLoss, RunError, RunLog
from speedrun.schedule import Schedule
from speedrun.sources import batch_shapes, made_up_batch, to_micro_batches
from speedrun.step_dump import Origin
from train_helpers import (
    SPLIT_PLANS,
    add_gradients,
    normal,
    small_config,
)

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, False)
CONFIG = small_config(micro_batch_parts=4)
PLANS = Schedule(CONFIG.schedule)


# ---- The trend of the losses --------------------------------------------------------------------


def trend_of(losses):
    trend = LossTrend()
    for loss in losses:
        trend.add(PLANS.plan(0), loss)
    return trend


def test_z_is_that_of_a_fitted_line():
    noise = np.random.default_rng(0).normal(size=100)
    losses = 5 - 0.02 * np.arange(100) + 0.1 * noise
    last = losses[-guards.TREND_STEPS :]
    x = np.arange(len(last))
    line = np.polyfit(x, last, 1)
    deviation = np.std(last - np.polyval(line, x), ddof=2)
    z = trend_of(losses).z(PLANS.plan(0), 4.0)
    assert math.isclose(z, (4.0 - np.polyval(line, len(last))) / deviation, rel_tol=1e-6)


def test_a_trend_needs_losses_of_its_stage():
    few = trend_of([1.0] * (guards.TREND_LEAST - 1))
    assert few.z(PLANS.plan(0), 100.0) == 0.0
    few.add(PLANS.plan(0), 1.0)
    assert few.z(PLANS.plan(0), 100.0) > 100
    next_stage = PLANS.plan(PLANS.starts[1])
    assert few.z(next_stage, 100.0) == 0.0
    few.add(next_stage, 1.0)
    assert list(few.losses) == [1.0]


def test_a_level_that_stays_is_soon_the_trend():
    trend = trend_of([1.0, 1.1] * 32)
    high = []
    for step in range(100):
        high += [step] * (trend.z(PLANS.plan(0), 3.0) > 6)
        trend.add(PLANS.plan(0), 3.0)
    assert high in ([0], [0, 1])


# ---- Settings -----------------------------------------------------------------------------------


def test_when_to_look():
    cuda = torch.device("cuda")
    assert check_of(GuardConfig(), CPU) == "step" and check_of(GuardConfig(), cuda) == "loss"
    assert check_of(GuardConfig(skip_z=5.0), cuda) == "step"
    assert check_of(GuardConfig(skip_nonfinite=True), cuda) == "step"
    assert check_of(GuardConfig("gradient"), CPU) == "gradient"


@pytest.mark.parametrize("skip", ["guards.skip_z=5", "guards.skip_nonfinite=true"])
def test_what_is_left_out_must_be_seen_before(skip):
    check(apply_overrides(CONFIG, [skip, "guards.check=step"]))
    with pytest.raises(ConfigError, match=r"guards\.check=loss: must be step \(or auto\)"):
        check(apply_overrides(CONFIG, [skip, "guards.check=loss"]))


@pytest.mark.parametrize(
    ("rules", "keys"),
    [
        ({}, "optim.normuon.lr or optim.adam.lr"),
        ({"matrix_rule": "muon", "vector_rule": "adamw"}, "optim.muon.lr or optim.adamw.lr"),
        (
            {"matrix_rule": "adamw", "vector_rule": "adamw"},
            "optim.adamw.matrix_lr or optim.adamw.lr",
        ),
    ],
)
def test_rates_in_use(rules, keys):
    rows = dict(muon_table=(MuonRow("bank"),), adam_table=CONFIG.optim.adam_table)
    optim = OptimConfig(**rows, **rules)
    assert rate_keys(optim) == keys
    for key in keys.split(" or "):  # they are there
        apply_overrides(small_config(optim=optim), [f"{key}=0.5"])


# ---- What isn't finite first --------------------------------------------------------------------


def built(config=CONFIG, seed=0):
    return program.build_model(config, program.Run(Comms(), CPU, torch.float32), seed)


def passes(model, config=CONFIG, step=3):
    """A step's forward and backward pass on made-up tokens."""
    schedule = Schedule(config.schedule)
    shape = batch_shapes(config, schedule, 1)[0]
    batch = made_up_batch(config, shape, config.model.vocab_size, 1, seed=0)
    batches = to_micro_batches(batch, config, CPU)
    return functools.partial(program.forward_backward, model, None, batches, schedule.plan(step))


def test_a_finite_step():
    model = built()
    compute = passes(model)
    compute()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    before = dict(vars(model))
    findings = nonfinite.find(model, compute)
    assert findings.first is None and findings.bad_gradients == []
    assert vars(model) == before
    for name, param in model.named_parameters():
        assert_same_bits(param.grad, gradients[name])
    parts = [row.part for row in findings.rows]
    assert parts == ["embedding", "layer 0", "layer 1", "head and loss"]
    assert all(0 < row.largest < math.inf for row in findings.rows)
    assert all(0 < row.largest_gradient < math.inf for row in findings.rows[:3])


def test_rows_are_of_the_stream():
    """The largest |x| behind each layer, of both micro-batches."""
    model = built()
    largest = [0.0, 0.0]
    function, place = nonfinite.layer_forward, iter([0, 1] * 2)

    def layer(*inputs):
        x, normed = function(*inputs)
        i = next(place)
        largest[i] = max(largest[i], x.abs().max().item())
        return x, normed

    compute = passes(model)
    findings = nonfinite.find(model, compute)
    model.layer_functions = dict.fromkeys(model.layers, layer)
    compute()
    assert [row.largest for row in findings.rows[1:3]] == largest


def test_an_overflow_in_a_layer():
    """Compiled functions aren't called, so that single operators are seen."""
    model = built()
    compiled = model.layer_functions = dict.fromkeys(model.layers, None)
    with torch.no_grad():
        model.mlp_bank[2].fill_(1e25)  # layer 1, up: relu² overflows
    findings = nonfinite.find(model, passes(model))
    assert model.layer_functions is compiled
    assert findings.first.startswith("layer 1: aten.pow (4, 64, 24) float32 has inf, from ")
    file, line = findings.first.rpartition("from ")[2].split(":")
    assert file == "reference/relu2_mlp.py"
    assert "square()" in (nonfinite.PACKAGE / file).read_text().splitlines()[int(line) - 1]
    assert math.isfinite(findings.rows[1].largest) and math.isnan(findings.rows[2].largest)


def test_a_parameter():
    """It comes before what is computed with it."""
    model = built()
    with torch.no_grad():
        model.vo_bank[3, 1, 2] = math.nan
    findings = nonfinite.find(model, passes(model))
    assert findings.first == "parameter vo_bank[3] (16, 16) float32 has NaN"


def test_a_gradient():
    """That of a bank, whose last part layer 0 gives. Forward all is finite."""
    model = built()
    model.vo_bank.register_hook(lambda gradient: gradient * 1e38 * 1e38)
    findings = nonfinite.find(model, passes(model))
    assert findings.first.startswith("layer 0, backward: aten.mul (4, 16, 16) float32 has ")
    assert len(findings.bad_gradients) == 1 and "vo_bank[" in findings.bad_gradients[0]
    assert all(math.isfinite(row.largest) for row in findings.rows)


def test_a_gradient_that_overflows_in_a_layer():
    """A factor on the way back between the layers: what layer 0 makes of it."""
    model = built()
    function = nonfinite.layer_forward

    def layer(*inputs):
        x, normed = function(*inputs)
        x.register_hook(lambda gradient: gradient * 1e38)
        return x, normed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonfinite, "layer_forward", layer)
        findings = nonfinite.find(model, passes(model))
    assert findings.first.startswith(("layer 1, backward: ", "layer 0, backward: "))


def test_the_baseline_model():
    config = recipes.load("optimization")
    layers = dict(num_layers=2, model_dim=32, head_dim=16, mlp_hidden=64, vocab_size=29)
    config = small_config(
        model=dataclasses.replace(config.model, **layers),
        schedule=dataclasses.replace(
            CONFIG.schedule, untie_frac=0.0, multi_token=False, prefix_loss=False
        ),
        micro_batch_parts=8,
    )
    model = built(config)
    compute = passes(model, config)
    findings = nonfinite.find(model, compute)
    assert findings.first is None and len(findings.rows) == 4
    model.block = model.summed_loss = None  # as if compiled: not to be called
    with torch.no_grad():
        model.up_bank[1].fill_(1e25)
    assert nonfinite.find(model, compute).first.startswith("layer 1: aten.pow")


def test_masks_and_unwritten_memory_are_no_finding():
    watch = nonfinite._Watch()
    torch.use_deterministic_algorithms(True)  # fills memory with NaN
    try:
        with watch:
            x = torch.empty(4)
            x[:2].fill_(90.0)
            x[2:].fill_(1.0)
            x = x.masked_fill(torch.tensor([False, False, False, True]), -math.inf)
            x = torch.exp(x)
    finally:
        torch.use_deterministic_algorithms(False)
    watch.ended(x, None)
    assert watch.first.startswith("weights in FP8: aten.exp (4,) float32 has inf")


def test_what_is_mended_inside_a_part_is_no_finding():
    watch = nonfinite._Watch()
    with watch:
        x = torch.nan_to_num(torch.zeros(3) / 0)
    watch.ended(x, "next")
    with watch:
        y = x.log()
    watch.ended(y, None)
    assert watch.first.startswith("next: aten.log")


# ---- The guard of a run -------------------------------------------------------------------------


class Toy(nn.Module):
    """A weight, and a scale like FP8's that each pass leaves to the next."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.ones(3))
        self.fp8 = nn.Module()
        self.fp8.register_buffer("scale", torch.ones(()))


class TwoRanks(Comms):
    """Rank 0 of two: what the other one adds to sums is given."""

    def __init__(self, other):
        super().__init__(0, 2)
        self.other = other

    def all_reduce_sum(self, tensors):
        for tensor in tensors:
            tensor += self.other

    def gather_objects(self, value):
        return [value, value]


def guarded(tmp_path, config=CONFIG, model=None, comms=None, **settings):
    config = dataclasses.replace(config, guards=GuardConfig(**settings))
    log = RunLog(tmp_path, config.schedule.total_steps, config.log_interval)
    origin = Origin([], BYTES, FLOAT32)
    return Guard(config, model or Toy(), comms or Comms(), log, origin, Watchdog())


BATCH = StepBatch(np.zeros((8, 4), np.int32), *[np.ones((8, 4), np.int32)] * 2, None, None, None)


def loss_of(model, loss, gradient=1.0):
    """A step's passes with this result."""

    def compute():
        model.fp8.scale = torch.tensor(gradient)  # a new tensor, as FP8's states do it
        model.embed.grad = torch.full((3,), gradient)
        return torch.tensor(float(loss)) * PLANS.plan(0).tokens_per_step

    return compute


def test_a_good_step_is_updated(tmp_path):
    guard = guarded(tmp_path)
    compute = loss_of(guard.model, 2.5, gradient=3.0)
    loss, is_good = guard.run(PLANS.plan(0), BATCH, compute)
    assert is_good and loss == compute() and guard.model.fp8.scale == 3.0


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (2.5, math.inf)])
def test_a_bad_step_is_left_out(tmp_path, loss, gradient):
    """Its FP8 scales too, which would spoil all later steps."""
    guard = guarded(tmp_path, skip_nonfinite=True)
    _, is_good = guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, loss, gradient))
    assert not is_good and guard.model.fp8.scale == 1.0
    (event,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert (event["event"], event["step"]) == ("left_out", 0)
    assert "step 0: " in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("bad_step_*"))


def test_a_bad_step_of_another_rank_is_left_out(tmp_path):
    guard = guarded(tmp_path, comms=TwoRanks(math.nan), skip_nonfinite=True)
    assert not guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, 2.0))[1]


def test_outliers_are_left_out(tmp_path):
    guard = guarded(tmp_path, skip_z=5.0)
    results = []
    for i in range(40):
        loss = 9.0 if i == 36 else 2.0 + 0.01 * (i % 3)
        results.append(guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, loss))[1])
    assert [i for i, is_good in enumerate(results) if not is_good] == [36]
    assert "the training loss 9.0000 is " in (tmp_path / "log.txt").read_text()


def test_outliers_are_said(tmp_path):
    guard = guarded(tmp_path)
    for i in range(40):
        guard.look(dataclasses.replace(PLANS.plan(0), step=i), 9.0 if i == 36 else 2.0)
    (event,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert (event["event"], event["step"], event["train_loss"]) == ("outlier", 36, 9.0)
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.startswith("step 36: the training loss 9.0000 is ")
    assert line.endswith(" standard deviations above the trend of the 36 steps before")


def test_no_outlier_is_said_if_none_is_wanted(tmp_path):
    guard = guarded(tmp_path, alarm_z=0.0)
    for i in range(40):
        guard.look(PLANS.plan(0), 9.0 if i == 36 else 2.0)
    assert (tmp_path / "log.txt").read_text() == ""


def test_gradients_are_seen_without_waiting(tmp_path):
    """They make the loss NaN, which is read with it later."""
    guard = guarded(tmp_path, check="gradient")
    loss, is_good = guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, 2.0, math.nan))
    assert is_good and loss.isnan()
    loss, _ = guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, 2.0))
    assert loss == 2.0 * PLANS.plan(0).tokens_per_step
    with (
        pytest.raises(RunError, match=r"a gradient that is nan makes the loss nan") as error,
        guard,
    ):
        raise BadLoss("step 0: the training loss is nan", 0)
    assert "optim.normuon.lr or optim.adam.lr" in str(error.value)


def test_what_is_dumped_later(tmp_path):
    """The batch of the step that is named, not the last one; with what its loss needs."""
    guard = guarded(tmp_path, check="loss")
    guard.prefix_table = torch.arange(5)
    for i in range(3):
        batch = dataclasses.replace(BATCH, inputs=BATCH.inputs + i)
        plan = dataclasses.replace(PLANS.plan(0), step=i)
        guard.run(plan, batch, loss_of(guard.model, 2.0))
    with pytest.raises(RunError, match=r"speedrun replay \S+bad_step_000001\n"), guard:
        raise BadLoss("step 1: the training loss is nan", 1)
    dump = step_dump.read(tmp_path / "bad_step_000001")
    np.testing.assert_array_equal(dump.batch.inputs, BATCH.inputs + 1)
    np.testing.assert_array_equal(dump.prefix_table, np.arange(5))
    assert dump.weights is None and dump.step == 1


def test_other_errors_pass(tmp_path):
    with pytest.raises(RunError, match=r"^full$"), guarded(tmp_path):
        raise RunError("full")


def test_a_full_disk_doesnt_hide_the_problem(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_dump.np, "savez", full)
    guard = guarded(tmp_path, check="loss")
    guard.run(PLANS.plan(0), BATCH, loss_of(guard.model, math.nan))
    with pytest.raises(RunError) as error, guard:
        raise BadLoss("step 0: the training loss is nan", 0)
    assert str(error.value).startswith("step 0: the training loss is nan; the run is stopped.")
    assert "couldn't be kept" in str(error.value) and "No space left" in str(error.value)
    assert list((tmp_path / "bad_step_000000").iterdir()) == []


def test_an_update_left_out_changes_nothing():
    """But head and embedding part where they would have, with the moments of the head."""
    shapes = {"embed": (7, 6), "lm_head": (6, 7), "bank": (2, 4, 4)}
    params = {n: nn.Parameter(normal(*s, dtype=torch.float32)) for n, s in shapes.items()}
    config = OptimConfig((MuonRow("bank"),), CONFIG.optim.adam_table)
    optimizer = Optimizer(params.items(), config, Comms())
    for plan in SPLIT_PLANS:
        gradients = {n: normal(*s, seed=1 + plan.step).float() for n, s in shapes.items()}
        add_gradients(params, gradients)
        if plan.split:
            break
        optimizer.step(plan)
    before = {name: state.tensor.clone() for name, state in optimizer.state().items()}
    optimizer.leave_out(plan)
    assert all(param.grad is None for param in params.values())
    moments = [name for name in before if name.startswith("optim.embed.")]
    for name, state in optimizer.state().items():
        source = name.replace("embed", HEAD) if name in moments else name
        assert_same_bits(state.tensor, before[source])
    assert moments and not any(before[name].any() for name in moments)
    assert all(before[name.replace("embed", HEAD)].any() for name in moments)
