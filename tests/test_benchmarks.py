"""The benchmarks' arithmetic, lines and verdicts; what they do on a machine without a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the checkout, it is not installed

from benchmarks import bench, hardware_check, report  # noqa: E402


def run_module(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_median_and_quartiles():
    timing = bench.Timing((4.0, 1.0, 3.0, 2.0, 100.0))
    assert (timing.median_us, timing.iqr_us) == (3.0, 2.0)
    assert bench.Timing((5.0,)).iqr_us == 0


def test_interleaved_keeps_every_sample():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = bench.time_interleaved(functions, torch.device("cpu"), "cpu", repeats=4)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4
    assert [len(t.samples_us) for t in timings.values()] == [4, 4]


def test_a_row_has_rate_roof_and_speedup():
    half, whole = bench.Timing((500.0,)), bench.Timing((1000.0,))
    row = report.Row("s", "c", "cuda", "cold/graph", half, whole, 10**9, roof_per_s=4e12)
    assert row.cells()[4:] == ("500.0", "2000.0 GB/s", "50 %", "2.00", "0.0")
    row = report.Row("s", "c", "cuda", "cold/graph", half, whole, 1, num_flops=10**12)
    assert row.cells()[5:7] == ("2000.0 TFLOP/s", "-")
    assert json.loads(json.dumps(row.as_json()))["roof_per_s"] is None
    assert " | " in report.table([row])


def test_unknown_gpus_have_no_peaks():
    from speedrun.hardware import GPU_PEAKS, gpu_peaks

    assert math.isnan(gpu_peaks("NVIDIA H100 80GB HBM4").bf16_flops_per_s)
    assert gpu_peaks("NVIDIA H200").memory_bytes_per_s == 4.8e12
    for name, peaks in GPU_PEAKS.items():
        assert name.startswith("NVIDIA ") and peaks.source and peaks.bf16_flops_per_s > 1e14
        ratio = peaks.fp8_flops_per_s / peaks.bf16_flops_per_s
        assert math.isnan(ratio) or abs(ratio - 2) < 0.03  # dense against dense


def test_verdicts_are_given_and_withdrawn(tmp_path):
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps({"about": ["kept"], "verdicts": {"transpose": []}}))

    def update(capability, *passed, backend="cuda"):
        row = {"stem": "transpose", "backend": backend}
        where = {"capability": capability, "commit": "c", "gpu": "g", "date": "d"}
        rows = [{**row, "passed": result} for result in passed]
        hardware_check.update_verdicts(path, rows, where)
        content = json.loads(path.read_text())
        assert content["about"] == ["kept"]
        return [entry["capability"] for entry in content["verdicts"]["transpose"]]

    assert update("9.0", True, True) == ["9.0"]
    assert update("8.0", True) == ["8.0", "9.0"]
    assert update("9.0", True, False) == ["8.0"]
    assert update("9.0", True, backend="triton") == ["8.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_hardware_check_without_a_gpu():
    run = run_module("benchmarks.hardware_check")
    assert run.returncode == 2 and len(run.stdout.splitlines()) == 1
    assert "needs a GPU" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_static_check_without_a_library(tmp_path):
    run = run_module("benchmarks.static_check", tmp_path / "none.so")
    assert run.returncode == 2 and "SPEEDRUN_CUDA=1" in run.stderr


def test_unknown_stems_are_refused():
    run = run_module("benchmarks.run", "transpoze")
    assert run.returncode == 2 and "there are transpose" in run.stderr.replace("\n", " ")


@pytest.mark.slow
def test_a_run_on_this_machine(tmp_path):
    run = run_module("benchmarks.run", "transpose", "--repeats", 2, "--json", tmp_path / "r.json")
    assert run.returncode == 0, run.stderr
    assert "transpose  tied_head  torch" in run.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert all(len(row["timing"]["samples"]) == 2 for row in content["rows"])
