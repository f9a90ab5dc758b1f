"""The schedule against the public program's, step by step, and its scaling by --steps."""

import csv
import dataclasses
import itertools

import numpy as np
import pytest

from speedrun import recipes
from speedrun.config import ConfigError, Windows
from speedrun.schedule import Schedule, learning_rate, momentum, scaled, stage_ends
from train_helpers import golden, small_config

RECORD = recipes.load("record_089").schedule
BOUNDARIES = [0, 423, 847, 1270, 1285]  # of the stages, the extension and the end

YARN = ((384, 896), (896, 1408), (1408, 1664))  # growth of the long window

# Floats of the two programs come from a few float64 operations in another order.
FLOATS = dict(rel=1e-13, abs=1e-13)


@pytest.fixture(scope="module")
def plans():
    return list(Schedule(RECORD))


@pytest.fixture(scope="module")
def rows(shared_data):
    with open(shared_data / "golden_089" / "schedule.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_of_the_record(plans, rows):
    assert len(plans) == len(rows) == 1286
    grown = []
    for plan, row in zip(plans, rows, strict=True):
        trains = row["trains"] == "1"
        assert plan.last == (not trains)
        assert plan.step == int(row["step"])
        assert plan.stage == int(row["stage"]) - 1
        assert plan.windows[:2] == (
            int(row["window_short"]),
            int(row["window_long"]),
        )
        assert plan.validate == (row["validate"] == "1")
        weights = [float(row[f"w{n}"]) for n in (1, 2, 3) if row[f"w{n}"]]
        assert len(plan.multi_token_weights) == int(row["num_targets"])
        growth = (int(row["yarn_from"]), int(row["yarn_to"])) if row["yarn_to"] else None
        if growth:
            grown.append(growth)
        assert plan.windows.yarn == tuple(grown)
        if trains:
            assert plan.adam == (row["adam"] == "1")
            assert plan.tied == (row["tied_update"] == "1") or not plan.adam
            assert plan.split == (row["split_after"] == "1")
            assert plan.fp8_down_own_amax == (row["fp8_down_own_amax"] == "1")
            assert plan.lr == pytest.approx(float(row["lr"]), **FLOATS)
            assert plan.momentum == pytest.approx(float(row["momentum"]), **FLOATS)
            assert plan.tokens_per_step == int(row["batch_tokens"])
            assert plan.max_seq_len == int(row["max_seq_len"])
            assert list(plan.multi_token_weights) == pytest.approx(weights, **FLOATS)
            assert plan.prefix_weight == pytest.approx(float(row["prefix_weight"]), **FLOATS)


def test_arrays_of_the_record(plans, shared_data):
    """The same from the other file, computed by another run of the public program."""
    arrays = golden(shared_data, "schedule.npz")
    schedule, steps = Schedule(RECORD), plans[:-1]
    assert [*schedule.starts, schedule.total_steps] == arrays["stage_starts"].tolist() == BOUNDARIES
    weights = [
        plan.multi_token_weights + (0.0,) * (3 - len(plan.multi_token_weights)) for plan in steps
    ]
    windows = [(plan.windows.short // 128, plan.windows.long // 128) for plan in steps]
    np.testing.assert_allclose([plan.lr for plan in steps], arrays["lr"], rtol=1e-13)
    np.testing.assert_array_equal(
        [plan.tokens_per_step for plan in steps], arrays["tokens_per_step"]
    )
    np.testing.assert_array_equal([plan.max_seq_len for plan in steps], arrays["max_seq_len"])
    np.testing.assert_array_equal(windows, arrays["windows_x128"])
    # Stored in float32.
    np.testing.assert_allclose(weights, arrays["multi_token_weights"], rtol=2**-23, atol=1e-9)
    prefix = [plan.prefix_weight for plan in steps]
    np.testing.assert_allclose(prefix, arrays["prefix_weight"], rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize(
    ("step", "name", "before", "at"),
    [
        (423, "tokens_per_step", 131_072, 262_144),
        (423, "lr", 1.0, 1.52),
        (847, "tokens_per_step", 262_144, 393_216),
        (847, "max_seq_len", 2048, 2048),
        (1270, "lr", None, 0.15),
        (300, "momentum", 0.85 + 0.1 * 299 / 300, 0.95),
        (1235, "momentum", 0.95, 0.95),
        (1236, "momentum", 0.95, 0.948),
        (508, "lr", 1.52, 1.52),
        (509, "lr", 1.52, 1.52 * (1 - 1 / 762) + 0.15 / 762),
        (847, "lr", 0.912, 1.027),
    ],
)
def test_boundaries(step, name, before, at):
    schedule = Schedule(RECORD)
    # 0.912 and 1.027 are RECIPE's, to three digits.
    digits = dict(abs=6e-4) if step == 847 and name == "lr" else FLOATS
    if before is not None:
        assert getattr(schedule.plan(step - 1), name) == pytest.approx(before, **digits)
    assert getattr(schedule.plan(step), name) == pytest.approx(at, **digits)


@pytest.mark.parametrize(
    ("step", "windows"),
    [
        (422, Windows(128, 384)),
        (423, Windows(384, 896, YARN[:1])),
        (846, Windows(384, 896, YARN[:1])),
        (847, Windows(640, 1408, YARN[:2])),
        (1269, Windows(640, 1408, YARN[:2])),
        (1270, Windows(768, 1664, YARN)),
        (1284, Windows(768, 1664, YARN)),
        (1285, Windows(768, 2560, YARN)),  # frequencies stay as they were trained
    ],
)
def test_windows(step, windows):
    assert Schedule(RECORD).plan(step).windows == windows


@pytest.mark.parametrize(
    ("frac", "interval", "step"),
    [(2 / 3, 2, 847), (2 / 3, 1, 847), (0.5, 2, 635), (0.5, 4, 635), (0.5, 3, 635), (0.7, 2, 889)],
)
def test_embedding_and_head_part_at_an_update(frac, interval, step):
    config = dataclasses.replace(RECORD, untie_frac=frac, adam_interval=interval)
    plans = list(Schedule(config))
    assert [plan.step for plan in plans if plan.split] == [step]
    assert plans[step].adam
    assert all(plan.tied == (plan.step <= step) for plan in plans)


@pytest.mark.parametrize(("frac", "tied"), [(0.0, False), (1.0, True)])
def test_embedding_and_head_never_part(frac, tied):
    plans = list(Schedule(dataclasses.replace(RECORD, untie_frac=frac)))
    assert not any(plan.split for plan in plans)
    assert all(plan.tied == tied for plan in plans)


def test_techniques_switched_off():
    off = dict(multi_token=False, prefix_loss=False, window_warmup=False, yarn=False)
    for plan in list(Schedule(dataclasses.replace(RECORD, **off)))[:-1]:
        assert plan.multi_token_weights == (1.0,) and plan.prefix_weight == 0
        assert plan.windows == Windows(768, 1664)


def test_last_training_step():
    plan = Schedule(RECORD).plan(1284)
    assert (plan.lr, plan.last, plan.validate) == (0.15, False, False)
    assert plan.momentum == pytest.approx(0.852, **FLOATS)


def test_loss_weights_do_not_reach_their_ends(plans):
    for start, end in itertools.pairwise(BOUNDARIES[:3]):
        assert (
            plans[start].multi_token_weights[-1]
            == RECORD.stages[plans[start].stage].multi_token_weights[-1][0]
        )
        assert 0 < plans[end - 1].multi_token_weights[-1] < 0.01


def test_same_step_same_plan(plans):
    """Pure: asked for out of order, or of another object, the plan is the same."""
    schedule = Schedule(RECORD)
    for step in (1285, 3, 847, 3, 0):
        assert schedule.plan(step) == plans[step] == Schedule(RECORD).plan(step)
    assert hash(plans[5]) == hash(schedule.plan(5))


@pytest.mark.parametrize("step", [-1, 1286])
def test_steps_outside(step):
    with pytest.raises(ValueError, match=r"outside the schedule's 0\.\.1285"):
        Schedule(RECORD).plan(step)


def test_warmup():
    config = dataclasses.replace(RECORD, lr_warmup_steps=3)
    rates = [learning_rate(config, config.stages[0], step) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_momentum_of_short_runs_stays_in_its_range():
    """Warm-up goes first where the two overlap."""
    config = dataclasses.replace(RECORD, num_steps=20, extension_steps=0, extension=None)
    for step in range(20):
        assert momentum(config, step) == 0.85 + 0.1 * step / 300 or step >= 300


def test_stages_by_fractions():
    config = dataclasses.replace(RECORD, num_steps=1000, stage_ends=(0.1, 0.25, 1.0))
    assert stage_ends(config) == [100, 250, 1000]
    assert Schedule(config).starts == [0, 100, 250, 1000]


def test_scaled_to_itself():
    assert scaled(RECORD, RECORD.total_steps) == RECORD


def test_scaled_keeps_proportions():
    config = scaled(RECORD, 257)  # a fifth
    assert (config.num_steps, config.extension_steps, config.total_steps) == (254, 3, 257)
    assert (config.val_interval, config.momentum_warmup_steps) == (50, 60)
    assert config.momentum_cooldown_steps == 10
    assert stage_ends(config) == [85, 169, 254]
    assert config.lr_warmup_steps == 0  # it was off
    assert config.stages == RECORD.stages
    double = scaled(RECORD, 2570)
    assert (double.num_steps, double.extension_steps, double.val_interval) == (2540, 30, 500)


@pytest.mark.parametrize("total_steps", [4, 5, 7, 20, 100, 10_000])
def test_scaled_runs(total_steps):
    """Every stage has a step, intervals are at least 1, and the rate arrives where it should."""
    config = scaled(dataclasses.replace(RECORD, lr_warmup_steps=2), total_steps)
    assert config.total_steps == total_steps
    for name in ("extension_steps", "val_interval", "lr_warmup_steps"):
        assert getattr(config, name) >= 1
    assert min(config.momentum_warmup_steps, config.momentum_cooldown_steps) >= 1
    plans = list(Schedule(config))
    assert {plan.stage for plan in plans} == {0, 1, 2, 3}
    assert [plan.step for plan in plans] == list(range(total_steps + 1))
    assert plans[-2].lr == 0.15
    assert all(0.85 - 1e-12 <= plan.momentum <= 0.95 + 1e-12 for plan in plans)
    assert plans[0].validate and plans[-1].validate


@pytest.mark.parametrize("total_steps", [-5, 0, 3])
def test_too_few_steps(total_steps):
    with pytest.raises(ConfigError, match=f"--steps {total_steps}: .* needs at least 4"):
        scaled(RECORD, total_steps)


def test_a_stage_without_steps_is_refused():
    config = dataclasses.replace(RECORD, num_steps=20, stage_ends=(0.01, 0.5, 1.0))
    with pytest.raises(ConfigError, match=r"schedule\.num_steps=20: too few for 3 stages"):
        Schedule(config)


def test_small_config_has_all_it_should():
    """What the other tests build on: two stages, an extension, final windows."""
    schedule = Schedule(small_config().schedule)
    assert (schedule.starts, schedule.ends) == ([0, 15, 30], [15, 30, 33])
    assert schedule.plan(33).windows.long == 64 and schedule.plan(32).windows.long == 48
