"""The optimizer benchmark's dry run on a CPU: what it counts and what it reports."""

import json

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_optimizer
from speedrun import recipes
from speedrun.schedule import Schedule

CPU = torch.device("cpu")


def test_kinds_of_the_record():
    kinds = bench_optimizer.kinds_of(Schedule(recipes.load("record_089").schedule))
    found = {name: (plan.step, plan.adam, plan.tied) for name, plan in kinds.items()}
    assert found == {
        "Muon, tied": (0, False, True),
        "Muon and Adam, tied": (1, True, True),
        "Muon": (848, False, False),
        "Muon and Adam": (849, True, False),
    }


def test_calls_are_counted_without_views():
    x = torch.ones(2, 3)
    assert bench_optimizer.count_launches(lambda: x.view(6).add_(1).mul_(2), CPU) == 2


@pytest.mark.parametrize("world_size", [1, 4])
def test_dry_run(world_size, tmp_path, capsys):
    """Every kind of step of the recipe, its share of the ranks, as a table and as JSON."""
    path = tmp_path / "step.json"
    args = ["--recipe=tiny", "--repeats=2", f"--world-size={world_size}", f"--json={path}"]
    try:
        assert bench_optimizer.main(args) == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    content = json.loads(path.read_text())
    assert [row["kind"] for row in content["rows"]] == ["Muon and Adam, tied", "Muon and Adam"]
    for row in content["rows"]:
        assert row["mode"] == "launched" and row["launches"] > 0
        assert len(row["timing"]["samples_us"]) == 2
    shown = capsys.readouterr().out
    assert f"tiny, rank 0 of {world_size} on cpu" in shown
    assert content["torch"] == torch.__version__
