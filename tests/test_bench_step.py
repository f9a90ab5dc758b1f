"""The step benchmark's dry run on a CPU: what is watched of a training run, and what it reports."""

import dataclasses
import gzip
import json

import pytest
import torch

from benchmarks import bench_step, step_probe
from benchmarks.bench_step import PHASES
from benchmarks.step_probe import Figures, KernelCost, Profile
from speedrun import recipes
from speedrun.estimate import Precision
from speedrun.schedule import Schedule
from train_helpers import small_config, tiny_sets

ROUNDS = 2


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The benchmark's JSON, and the folder of its timelines."""
    folder = tmp_path_factory.mktemp("bench_step")
    args = [f"--rounds={ROUNDS}", f"--timelines={folder / 'timelines'}", "--device=cpu"]
    args += ["--recipe=tiny", f"--json={folder / 'step.json'}", *tiny_sets()]
    assert bench_step.main(args) == 0
    return json.loads((folder / "step.json").read_text()), folder / "timelines"


def test_stages_and_validation(report):
    rows = report[0]["rows"]
    assert [row["name"] for row in rows] == ["1", "2", "validation"]
    for row in rows[:-1]:
        assert row["tokens"] == 1024 and row["micro_batch_tokens"] == 1024
        assert len(row["figures"]["rounds_ms"]) == ROUNDS
        phases = row["figures"]["phases_ms"]
        assert set(phases) == set(PHASES)
        counts = {name: len(samples) for name, samples in phases.items()}
        every_step = step_probe.PHASED * 2  # Adam's interval is 2
        assert counts == dict.fromkeys(PHASES, every_step) | {
            name: every_step // 2 for name in ("optimizer", "optimizer with Adam")
        }
        for whole, *both in zip(
            *(phases[name] for name in ("forward and backward", "forward", "backward")), strict=True
        ):
            assert sum(both) == pytest.approx(whole) and min(both) > 0
    assert rows[-1]["tokens"] % 256 == 0 and len(rows[-1]["figures"]["rounds_ms"]) == 1
    for row in rows:
        assert row["median_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["median_ms"] * 1e3)
        assert row["busy_ms"] is None and row["roof_frac"] is None  # on a CPU, in float32
    assert report[0]["data"] == "made up" and report[0]["torch"] == torch.__version__


def test_a_round_is_of_one_step():
    """By a clock that only steps move: lead-in, then rounds of as many steps as Adam's interval."""
    config = dataclasses.replace(small_config().schedule, adam_interval=2)
    probe = step_probe.Probe(Schedule(config), torch.device("cpu"), ROUNDS, None)
    now = 0.0
    probe._now = lambda: now
    for step in range(2 * (step_probe.LEAD_IN + ROUNDS)):
        probe._begin()
        now += step
        probe._end()
    assert probe.stages[0].rounds_ms == [2500.0, 4500.0]


def test_kernels_of_a_stage(report):
    """Costliest first, those of one step."""
    for row in report[0]["rows"]:
        kernels = row["figures"]["profile"]["kernels"]
        assert [k["us"] for k in kernels] == sorted((k["us"] for k in kernels), reverse=True)
        assert row["launches"] == pytest.approx(sum(k["calls"] for k in kernels))
    by_name = {k["name"]: k["calls"] for k in report[0]["rows"][0]["figures"]["profile"]["kernels"]}
    assert by_name["aten::embedding"] == 3  # of tokens, bigrams and signs: one micro-batch a step


def test_timelines(report):
    paths = sorted(report[1].iterdir())
    assert [path.name for path in paths] == [
        "stage_1.json.gz",
        "stage_2.json.gz",
        "validation.json.gz",
    ]
    for path in paths:
        assert "aten::mm" in {e["name"] for e in json.loads(gzip.open(path).read())["traceEvents"]}


@pytest.mark.gpu
def test_a_device_is_watched(tmp_path):
    args = ["--recipe=tiny", "--rounds=2", f"--timelines={tmp_path / 'timelines'}", "--device=cuda"]
    args += [f"--json={tmp_path / 'step.json'}", *tiny_sets(precision="bf16")]
    assert bench_step.main(args) == 0
    for row in json.loads((tmp_path / "step.json").read_text())["rows"]:
        total_ms = sum(k["us"] for k in row["figures"]["profile"]["kernels"]) / 1e3
        assert 0 < row["busy_ms"] <= 1.001 * total_ms and row["launches"] > 100
        assert row["figures"]["peak_bytes"] > 0
    assert len(list((tmp_path / "timelines").iterdir())) == 3


def test_what_cannot_run_says_why(capsys):
    assert bench_step.main(["--recipe=tiny", "--set=model.model_dim=7"]) == 1
    assert "model.model_dim" in capsys.readouterr().err


def test_device_time_of_overlapping_kernels():
    events = [("a", 0.0, 4.0), ("b", 2.0, 5.0), ("a", 7.0, 9.0), ("b", 7.5, 8.0)]
    profile = step_probe.device_profile(events, count=2)
    assert profile.busy_us == (5 + 2) / 2
    assert profile.kernels == (KernelCost("a", 1.0, 3.0), KernelCost("b", 1.0, 1.75))
    assert profile.launches == 2


def test_a_row_shows_only_what_was_seen():
    """A replayed graph has no forward pass to be seen; what a device is not busy, it is idle."""
    profile = Profile((KernelCost("k", 3.0, 5_000.0),), busy_us=6_000.0)
    figures = Figures([7.0, 9.0, 8.0], {"forward and backward": [5.0, 6.0]}, profile, 2_000_000_000)
    row = bench_step.Row("1", 100, 800, figures, roof_s=2e-3)
    shown = dict(zip(bench_step.HEADER, row.cells(), strict=True))
    assert shown["forward and backward ms"] == "5.50" and shown["forward ms"] == "-"
    assert (shown["device busy ms"], shown["idle ms"]) == ("6.00", "2.00")
    assert (shown["ms a step"], shown["peak GB"]) == ("8.00", "2.0")
    assert (shown["tokens/s"], shown["% of roof"]) == ("100,000", "25.0")


def test_least_time_of_the_records_products():
    """In FP8: the head, forward and backward, and the MLP forward (RECIPE section 3)."""
    config = recipes.load("record_089")
    plan = Schedule(config.schedule).plan(0)
    precision = Precision(torch.bfloat16, fp8=True)
    config = bench_step.with_vocabulary(config)

    def seconds(bf16, fp8):
        return bench_step.products_s(config, precision, plan, {"bf16": bf16, "fp8": fp8})

    head, mlp = 3 * 2 * 768 * 50304, 2 * 11 * 2 * 768 * 3072
    assert seconds(1e30, 1e12) == pytest.approx(131_072 * (head + mlp) / 1e12)
    both = seconds(1e12, 1e12)
    assert seconds(1e12, 1e30) == pytest.approx(both - seconds(1e30, 1e12))
    wide = plan.windows._replace(long=2 * plan.windows.long)
    plan = dataclasses.replace(plan, windows=wide)
    assert seconds(1e12, 1e12) > both  # attention counts
    # Twice as much for FLOPs in 16 bits: all of the MLP's backward, attention, and the optimizer.
    assert seconds(1e12, 1e30) > 131_072 * 2 * mlp / 1e12
