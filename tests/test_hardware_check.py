"""hardware_check: crashes and time limits survived, going on, and the verdicts that follow."""

import argparse
import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the checkout, it is not installed

from benchmarks import hardware_check, training_check  # noqa: E402
from benchmarks.hardware_check import Step, run_step, run_steps  # noqa: E402


def script(name, code, **fields):
    return Step(name, [sys.executable, "-c", code], fields.pop("limit_s", 60), **fields)


CRASH = "import os, signal; print('about to'); os.kill(os.getpid(), signal.SIGSEGV)"


def a_record(**fields):
    record = {"gpu": "NVIDIA H100", "compute_capability": "9.0", "commit": "c", "steps": {}}
    return {**record, "operators": {}, "triton_operators": {}, **fields}


def run_all(steps, record=None, minutes=math.inf, **options):
    """Each step of `steps`, or each list of steps, is a group."""
    record = record or a_record()
    groups = (step if isinstance(step, list) else [step] for step in steps)
    written = []
    deadline = time.monotonic() + minutes * 60
    write = lambda: written.append(len(record["steps"]))  # noqa: E731
    done = run_steps(groups, record, write, deadline, **options)
    return done, record["steps"], written


def test_a_crash_costs_only_its_own_step():
    steps = [script("crash", CRASH), script("next", "print('fine')")]
    done, found, written = run_all(steps)
    assert done and written == [1, 2]
    assert found["crash"]["verdict"] == "fail"
    assert found["crash"]["error"] == "killed by SIGSEGV" and found["crash"]["tail"] == ["about to"]
    assert (found["next"]["verdict"], found["next"]["error"]) == ("pass", "")


def test_a_step_that_hangs_is_ended_with_its_children():
    code = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    start = time.monotonic()
    _, found, _ = run_all([script("hang", code, limit_s=2)])
    assert found["hang"]["error"] == "no end after 2 s" and time.monotonic() - start < 30


def test_what_a_step_wrote_before_it_crashed_is_read():
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('1');" + CRASH
    read = lambda folder: {"verdict": "fail", "error": (folder / "f").read_text() + " wrong"}  # noqa: E731
    step = Step("s", [sys.executable, "-c", code, "{folder}/f"], 60, read=read)
    assert run_step(step, 60)["error"] == "1 wrong; killed by SIGSEGV"


def test_exit_codes():
    assert run_step(script("s", "raise SystemExit(5)"), 60)["error"] == "exit code 5: no output"
    assert run_step(script("s", "raise SystemExit(5)", good_codes=(0, 5)), 60)["verdict"] == "pass"
    assert run_step(script("s", "print(1/0)"), 60)["error"].endswith("division by zero")


def test_stops_when_the_time_is_over_and_goes_on_later():
    first, second = script("first", "pass"), script("second", "import time; time.sleep(60)")
    done, found, _ = run_all([first, second], minutes=(hardware_check.LEAST_S + 3) / 60)
    # A step that the end of the time cut off is not a step that failed.
    assert not done and list(found) == ["first"]
    record = a_record(steps=found)
    before = dict(found["first"])
    done, found, written = run_all([first, script("second", "pass")], record)
    assert done and list(found) == ["first", "second"] and written == [2]
    assert found["first"] == before
    assert not run_all([first], minutes=0)[0]


def test_steps_of_a_group_run_at_once(tmp_path):
    """Each waits for the other's file; what comes after the group finds both."""
    code = """
        import pathlib, sys, time
        pathlib.Path(sys.argv[1]).touch()
        while not pathlib.Path(sys.argv[2]).exists():
            time.sleep(0.01)
    """
    files = [str(tmp_path / name) for name in ("a", "b")]
    command = [sys.executable, "-c", textwrap.dedent(code)]
    group = [Step(f"step {i}", [*command, files[i], files[1 - i]], 30) for i in range(2)]
    found = run_all([group, script("last", "pass")], jobs=2)[1]
    assert len(found) == 3 and all(entry["verdict"] == "pass" for entry in found.values())
    assert not run_all([group], minutes=0, jobs=2)[0]


def test_what_ran_out_of_memory_beside_others_runs_again_alone(tmp_path):
    code = """
        import pathlib, sys
        path = pathlib.Path(sys.argv[1])
        if not path.exists():
            path.touch()
            raise RuntimeError("CUDA out of memory")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    steps = [Step(name, [*command, str(tmp_path / name)], 30) for name in ("a", "b")]
    assert run_all([[steps[0]]], jobs=2)[1]["a"]["verdict"] == "pass"
    assert run_all([[steps[1]]], jobs=1)[1]["b"]["verdict"] == "fail"  # it was alone


def test_logs_are_kept(tmp_path):
    run_all([script("a step", "print('x\\n' * 50)")], logs=tmp_path)
    assert (tmp_path / "a_step.txt").read_text().count("x") == 50


def test_steps_of_other_sources_are_done_again():
    record = a_record()
    run_all([script("s", "raise SystemExit(1)", source="old")], record)
    assert record["steps"]["s"]["verdict"] == "fail"
    run_all([script("s", "pass", source="old")], record)
    assert record["steps"]["s"]["verdict"] == "fail"
    run_all([script("s", "pass", source="new")], record)
    assert record["steps"]["s"]["verdict"] == "pass"


def test_stale_steps_of_an_operator_are_dropped(monkeypatch):
    monkeypatch.setattr(hardware_check, "source_of", lambda stem, backend: f"new {backend}")
    entry = {"verdict": "pass", "error": ""}
    names = {"test op cuda": "old", "check op cuda": "new cuda", "bench op": "x"}
    names |= {"check op triton": "new triton", "check other cuda": "new cuda"}
    record = a_record(steps={name: {**entry, "source": s} for name, s in names.items()})
    hardware_check.forget_stale(record, ["op", "other"])
    assert set(record["steps"]) == {"check op triton", "check other cuda"}


def plan_names(monkeypatch, record, failing=("bench abc", "check transpose cuda"), **fields):
    monkeypatch.setattr(hardware_check, "source_of", lambda stem, backend: f"{stem} {backend}")
    args = {"device": "cuda", "data": None, "modded_nanogpt": None, "sanitizer": False, **fields}
    stems = hardware_check.in_order(["transpose", "abc", "fp8_matmul"])
    names = []
    for group in hardware_check.plan(argparse.Namespace(**args), stems, record):
        for step in group:
            names.append(step.name)
            verdict = "fail" if step.name in failing else "pass"
            record["steps"][step.name] = {"verdict": verdict, "error": "e", "source": step.source}
    return names


def test_what_is_wanted_most_comes_first(monkeypatch):
    record = a_record()
    names = plan_names(monkeypatch, record)
    order = ["fp8_matmul", "transpose", "abc"]
    assert names[0] == "build"
    pairs = [f"{stem} {backend}" for stem in order for backend in ("cuda", "triton")]
    assert names[1:7] == [f"test {pair}" for pair in pairs] and names[7] == "test rest"
    assert names[8:14] == [f"check {pair}" for pair in pairs]
    # A benchmark that failed is done again without peers; what is wrong is not timed.
    assert names[14:] == [
        "bench fp8_matmul",
        "bench transpose",
        "bench abc",
        "bench abc without peers",
        "train",
    ]
    assert record["steps"]["bench transpose"]["source"] == "transpose triton"
    names = plan_names(monkeypatch, a_record(), sanitizer=True)
    assert "sanitizer memcheck transpose_smoke" in names
    names = plan_names(monkeypatch, a_record(), failing=["build"])
    assert not any(name.endswith(" cuda") for name in names) and "check abc triton" in names


def step_entry(verdict="pass", error="", source="abc", **fields):
    return {"verdict": verdict, "error": error, "source": source, **fields}


def test_an_operator_passes_by_its_tests_and_its_check():
    def conclude(**steps):
        steps = {name.replace("_", " "): entry for name, entry in steps.items()}
        record = a_record(steps=steps)
        hardware_check.update_operators(record, ["op"])
        assert record["triton_operators"] == {}
        return record["operators"].get("op", {})

    assert conclude() == {}
    speed = {"times_torch": 2.0, "mode": "cold/graph", "cases": {}}
    bench = step_entry(speeds={"cuda": speed})
    passed = conclude(test_op_cuda=step_entry(), check_op_cuda=step_entry(), bench_op=bench)
    assert passed == {"verdict": "pass", "error": "", "speed": speed, "source_sha256": "abc"}
    failed = step_entry("fail", "wrong")
    assert conclude(test_op_cuda=failed, check_op_cuda=step_entry())["verdict"] == "fail"
    found = conclude(test_op_cuda=step_entry(), check_op_cuda=failed)
    assert (found["verdict"], found["error"]) == ("fail", "check op cuda: wrong")
    assert conclude(test_op_cuda=step_entry())["verdict"] == "skip"
    skipped = step_entry("skip", "no kernel for this GPU")
    assert conclude(check_op_cuda=skipped)["error"] == "no kernel for this GPU"
    alone = {"bench op": step_entry("fail", "a peer"), "bench op without peers": bench}
    steps = {"check op cuda": step_entry(), **alone}
    record = a_record(steps=steps)
    hardware_check.update_operators(record, ["op"])
    assert record["operators"]["op"]["verdict"] == "pass"
    assert record["operators"]["op"]["speed"] == speed
    steps["bench op without peers"] = step_entry("fail", "killed by SIGSEGV")
    hardware_check.update_operators(record, ["op"])
    assert record["operators"]["op"]["verdict"] == "fail"


def entry(verdict, speed=None, source="abc"):
    speed = speed and {"times_torch": speed, "mode": "cold/graph", "cases": {}}
    return {"verdict": verdict, "error": "", "speed": speed, "source_sha256": source}


def test_verdicts_follow_from_the_records():
    records = [
        a_record(operators={"op": entry("pass", 1.5), "later": entry("skip")}),
        a_record(
            gpu="NVIDIA A100",
            compute_capability="8.0",
            operators={"op": entry("fail")},
            triton_operators={"op": entry("pass", 0.9, "def")},
        ),
    ]
    found = hardware_check.verdicts_from(records)
    assert list(found) == ["op"]
    assert [row["gpu"] for row in found["op"]["cuda"]] == ["NVIDIA A100", "NVIDIA H100"]
    assert found["op"]["cuda"][1] == {
        "gpu": "NVIDIA H100",
        "compute_capability": "9.0",
        "commit": "c",
        "verdict": "pass",
        "source_sha256": "abc",
        "speed": 1.5,
    }
    assert found["op"]["triton"][0]["speed"] == 0.9
    table = hardware_check.status_table(records)
    assert "| NVIDIA H100 | op | cuda | pass | 1.50 | - | c |" in table


def test_speed_is_against_the_faster_reference_in_the_mode_of_training():
    def row(name, case, mode, us, **ratios):
        return {"name": name, "case": case, "mode": mode, "median_us": us} | {
            "ratios": ratios,
            "roof_frac": 0.5,
        }

    rows = [
        row("cuda", "a", "warm/graph", 1.0, torch=9.0),
        row("cuda", "a", "cold/graph", 10.0, torch=4.0, inductor=2.0, quack=0.5),
        row("cuda", "b", "cold/graph", 10.0, torch=8.0),
        row("cuda", "a", "cold/plain", 10.0, torch=100.0),
        row("torch", "a", "cold/graph", 40.0, cuda=0.25),
    ]
    speed = hardware_check.speed_of(rows, "cuda")
    assert speed["times_torch"] == 4.0 and speed["mode"] == "cold/graph"
    assert speed["cases"]["a"]["others"] == {"torch": 4.0, "inductor": 2.0, "quack": 0.5}
    assert hardware_check.speed_of(rows, "triton") is None
    assert hardware_check.speed_of([], "cuda") is None


def test_verdicts_are_those_of_the_records():
    """verdicts.json and the table are written by hardware_check, never by hand."""
    records = hardware_check.read_records(hardware_check.RECORDS)
    text = hardware_check.VERDICTS.read_text()
    about = json.loads(text)["about"]
    fix = "run python -m benchmarks.hardware_check --verdicts"
    assert text == hardware_check.verdicts_text(records, about), fix
    readme = (hardware_check.RECORDS / "README.md").read_text()
    assert hardware_check.status_table(records) in readme, fix


def hardware_check_module(*arguments):
    command = [sys.executable, "-m", "benchmarks.hardware_check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_written():
    run = hardware_check_module()
    assert run.returncode == 2 and len(run.stdout.splitlines()) == 1
    assert "needs a GPU" in run.stdout
    run = hardware_check_module("--device", "cpu")
    assert run.returncode == 2 and "name a folder by --records" in run.stderr


def test_a_record_of_another_gpu_is_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(a_record()))
    with pytest.raises(SystemExit, match="is of a NVIDIA H100, and this is a NVIDIA L4"):
        hardware_check.resumed(tmp_path / "old.json", a_record(gpu="NVIDIA L4"))
    old = a_record(steps={"s": 1}, operators={"op": 2})
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = hardware_check.resumed(tmp_path / "old.json", a_record(commit="new"))
    assert (found["steps"], found["operators"], found["commit"]) == ({"s": 1}, {"op": 2}, "new")


def test_the_recipe_to_train_has_the_operators_model():
    assert training_check.largest_recipe() == "record_089"  # "optimization" has larger steps


@pytest.mark.slow
def test_a_dry_run_without_a_gpu(tmp_path):
    run = hardware_check_module("--device", "cpu", "--records", tmp_path, "transpose")
    assert run.returncode == 0, run.stdout
    record = json.loads((tmp_path / "cpu.json").read_text())
    names = ["check transpose torch", "bench transpose", "train"]
    assert list(record["steps"]) == names
    assert all(entry["verdict"] == "pass" for entry in record["steps"].values())
    training = record["training"]
    assert training["last_val_loss"] < training["first_val_loss"]
    assert set(training["step_ms_by_stage"]) == {"0", "1"}
    assert training["seconds_to_first_step"] > 0
    assert json.loads((tmp_path / "verdicts.json").read_text())["verdicts"] == {}
