"""speedrun doctor: each check with both outcomes on made-up machines, and the whole on this one."""

import dataclasses
import json
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from data_helpers import write_shard
from speedrun import cli, doctor, hardware, kernel_trials, machine
from speedrun.kernel_trials import Outcome
from speedrun.machine import Gpu, Machine
from speedrun.ops import _dispatch

GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * GIB)
HEALTHY = {
    "driver_version": "580.82.07",
    "persistence_mode": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "mig.mode.current": "Disabled",
    "power.limit": "700.00 W",
    "power.default_limit": "700.00 W",
}
TWO_H100 = Machine(
    environment={},
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_folders=["/venv/site-packages"],
    has_gpu=True,
    driver="580.82.07",
    cuda_problem="",
    gpus=[H100, H100],
    health=[HEALTHY, HEALTHY],
    blocked_pairs=[],
    nccl="2.27.5",
    triton="3.9.0",
    ptxas="12.9",
    compiler="/usr/bin/cc",
    python_header=True,
    library_problem="",
    stale=[],
    loader_problem="",
    num_cpus=32,
    host_free_bytes=200 * GIB,
    shm_bytes=100 * GIB,
    disk_free_bytes=500 * GIB,
    memlock_bytes=-1,
    infiniband=True,
)
LAPTOP = dataclasses.replace(
    TWO_H100,
    torch="2.13.0+cpu",
    torch_cuda="",
    has_gpu=False,
    driver="",
    cuda_problem="no GPU is visible",
    gpus=[],
    health=[],
    nccl="",
    infiniband=False,
)


def sick(**state):
    return {"health": [HEALTHY, {**HEALTHY, **{k.replace("__", "."): v for k, v in state.items()}}]}


def statuses(facts):
    return {finding.topic: finding.status for finding in doctor.check_machine(facts)}


def test_nothing_is_wrong_with_two_good_gpus():
    assert set(statuses(TWO_H100).values()) == {"pass"}


def test_a_laptop_passes_what_it_has_and_skips_the_rest():
    found = statuses(LAPTOP)
    assert {topic for topic, status in found.items() if status == "skip"} == {
        "driver", "CUDA", "GPUs", "exchange", "triton", "CUDA kernels"
    }  # fmt: skip
    assert set(found.values()) == {"pass", "skip"}


@pytest.mark.parametrize(
    ("changes", "topic", "status", "text", "fix"),
    [
        ({"torch_folders": ["/a", "/b"]}, "torch", "warn", "2 times: /a, /b", "PYTHONPATH"),
        ({"torch_cuda": "", "gpus": []}, "torch", "fail", "would use the CPU", "reinstall torch"),
        ({"driver": "570.10.1"}, "driver", "fail", "needs 580 or newer", "driver 580"),
        (
            {"driver": "525.60.12", "torch_cuda": "12.8"},
            "driver",
            "fail",
            "needs 525.60.13 or newer",
            "driver 525.60.13",
        ),
        ({"driver": ""}, "driver", "warn", "can't be read", "nvidia-container-toolkit"),
        ({"gpus": [], "cuda_problem": "too old"}, "CUDA", "fail", "too old", "--gpus all"),
        (
            {"gpus": [], "cuda_problem": "x", "environment": {"CUDA_VISIBLE_DEVICES": ""}},
            "CUDA",
            "fail",
            "x",
            "unset CUDA_VISIBLE_DEVICES, which is ''",
        ),
        ({"gpus": [H100, H100._replace(name="T4")]}, "GPUs", "warn", "and T4", "of one kind"),
        ({"gpus": [H100._replace(capability="7.5")]}, "GPUs", "warn", "no bf16", "float32"),
        ({"health": []}, "nvidia-smi", "warn", "not there", "DRIVER_CAPABILITIES"),
        (
            sick(ecc__errors__uncorrected__volatile__total="3"),
            "GPU health",
            "fail",
            "GPU 1: 3 memory errors",
            "gpu-reset",
        ),
        (sick(mig__mode__current="Enabled"), "GPU health", "warn", "GPU 1: MIG", "-mig 0"),
        (sick(persistence_mode="Disabled"), "GPU health", "warn", "GPU 1: persist", "-pm 1"),
        (sick(power__limit="350.00 W"), "GPU health", "warn", "350.00 W, by default", "-pl 700"),
        ({"blocked_pairs": [(0, 1), (1, 0)]}, "exchange", "warn", "GPUs 0 and 1:", "topo"),
        ({"shm_bytes": 64 << 20}, "shared memory", "warn", "0.1 GiB free", "--ipc=host"),
        ({"memlock_bytes": 8 << 20}, "locked memory", "warn", "locked only", "ulimit -l"),
        ({"triton": ""}, "triton", "warn", "not installed", "pip install triton"),
        ({"compiler": ""}, "triton", "fail", "a C compiler is missing", "gcc"),
        ({"python_header": False}, "triton", "fail", "Python.h is missing", "python3-dev"),
        ({"ptxas": "12.8"}, "triton", "warn", "ptxas 12.8", "TRITON_PTXAS_PATH"),
        ({"library_problem": "not built"}, "CUDA kernels", "warn", "not built", "SPEEDRUN_CUDA=1"),
        ({"stale": ["transpose"]}, "CUDA kernels", "warn", "other sources", "SPEEDRUN_CUDA=1"),
        ({"loader_problem": "no _host"}, "data loader", "warn", "no _host", "C++20"),
        ({"num_cpus": 3}, "cores", "warn", "3 cores for 2 GPUs", "4 or more"),
        (
            {"environment": {"OMP_NUM_THREADS": "64"}},
            "cores",
            "warn",
            "only 32 cores",
            "export OMP_NUM_THREADS=32",
        ),
        ({"host_free_bytes": GIB}, "memory", "warn", "1.0 GiB free", "end other programs"),
        ({"disk_free_bytes": 10 * GIB}, "disk", "warn", "10.0 GiB free", "make room"),
        ({"disk_free_bytes": 1 << 20}, "disk", "fail", "no log fits", "make room"),
        *(
            ({"environment": {name: "1"}}, "environment", "warn", f"{name}=1", f"unset {name}")
            for name, _, _ in doctor.VARIABLES
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_fix(changes, topic, status, text, fix):
    good = {f.topic for f in doctor.check_machine(TWO_H100) if f.status == "pass"}
    found = doctor.check_machine(dataclasses.replace(TWO_H100, **changes))
    bad = [finding for finding in found if finding.status in ("warn", "fail")]
    assert [(f.topic, f.status) for f in bad] == [(topic, status)]
    assert text in bad[0].text and fix in bad[0].fix
    assert topic in good | {"nvidia-smi", "locked memory"}  # which are silent where all is well


def test_old_drivers_serve_an_older_cuda():
    facts = dataclasses.replace(TWO_H100, driver="525.60.13", torch_cuda="12.8")
    assert statuses(facts)["driver"] == "pass"


def test_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.check_data(None).status == "skip"
    missing = doctor.check_data(Path("mine"))
    assert (missing.status, missing.text) == ("fail", "mine: no such folder")
    Path("mine").mkdir()
    assert "no shard" in doctor.check_data(Path("mine")).text
    write_shard(Path("mine/a_train_000001.bin"), [50256, 1, 2])
    found = doctor.check_data(Path("mine"))
    assert (found.status, found.text) == ("pass", "mine: 1 shards, 3 tokens")
    Path("mine/b.bin").write_bytes(b"0" * 2000)
    broken = doctor.check_data(Path("mine"))
    assert broken.status == "fail" and "b.bin" in broken.text


# ---- What kernels did ------------------------------------------------------------------------


def outcomes(**changes):
    """Of all trials on two H100, with these changed; "softcap_ce__cuda" is an item's name."""
    items = doctor.trial_items(TWO_H100)
    found = {item: Outcome("pass", "error 0", {"backend": "cuda"}) for item in items}
    clock = {"clocks.sm": "1755 MHz", "clocks.max.sm": "1980 MHz", "temperature.gpu": "60"}
    values = {"flops_per_s": 7e14, "states": [clock, {**clock, "clocks.sm": "345 MHz"}]}
    found["matmul"] = Outcome("pass", "", values)
    found["memory"] = Outcome("pass", "", {"free_bytes": [79 * GIB, 79 * GIB]})
    return found | {item.replace("__", " "): outcome for item, outcome in changes.items()}


def bad_ones(found):
    bad = [f for f in doctor.check_kernels(TWO_H100, found) if f.status != "pass"]
    return [(f.topic, f.status, f.text, f.fix) for f in bad]


def test_kernels_that_are_right_pass():
    assert bad_ones(outcomes()) == []
    assert len(doctor.check_kernels(TWO_H100, outcomes())) == 3 + len(kernel_trials.TRIALS)


def test_a_wrong_default_fails_and_a_wrong_choice_is_a_warning():
    wrong = Outcome("fail", "cuda errs by 1", {"backend": "cuda"})
    ((topic, status, text, fix),) = bad_ones(outcomes(transpose__served=wrong))
    assert (topic, status) == ("transpose", "fail") and "errs by 1" in text
    assert "SPEEDRUN_BACKEND=transpose=torch" in fix
    for name in ("cuda", "triton"):  # the first one serves
        died = {f"transpose__{name}": Outcome("fail", "died")}
        ((topic, status, text, _),) = bad_ones(outcomes(**died))
        assert (topic, status) == ("transpose", "warn")
        assert f"{name} does not work here: died" in text
    late = Outcome("skip", "not reached within 20 s")
    ((topic, status, text, fix),) = bad_ones(
        outcomes(transpose__served=late, sym_matmul__served=late)
    )
    assert (topic, status) == ("operators", "skip") and "--seconds" in fix
    assert text == "not reached within 20 s: sym_matmul, transpose"


def test_a_slow_gpu_and_a_broken_exchange_are_named():
    slow = outcomes()["matmul"].values
    ((topic, status, text, _),) = bad_ones(
        outcomes(matmul=Outcome("pass", "", {**slow, "flops_per_s": 3e14}))
    )
    assert (topic, status) == ("GPU speed", "warn") and "30%" in text
    hot = [{**slow["states"][0], "hw_thermal_slowdown": "Active"}]
    ((topic, status, text, _),) = bad_ones(
        outcomes(matmul=Outcome("pass", "", {**slow, "states": hot}))
    )
    assert (topic, status) == ("GPU clocks", "warn") and "hw_thermal_slowdown" in text
    locked = [{**slow["states"][0], "clocks.sm": "1000 MHz"}]
    ((topic, status, text, fix),) = bad_ones(
        outcomes(matmul=Outcome("pass", "", {**slow, "states": locked}))
    )
    assert (topic, status) == ("GPU clocks", "warn") and "-rgc" in fix
    ((topic, status, text, _),) = bad_ones(outcomes(nccl=Outcome("fail", "no end after 15 s")))
    assert (topic, status, text) == ("NCCL", "fail", "no end after 15 s")


def test_without_a_gpu_failures_and_what_there_was_no_time_for_are_said():
    items = doctor.trial_items(LAPTOP)
    found = dict.fromkeys(items, Outcome("pass")) | {
        "transpose served": Outcome("fail", "transpose: the override asks for backend 'x', but"),
        "softcap_ce served": Outcome("fail", "the process died"),
        "adam_step served": Outcome("skip", "not reached within 0 s"),
    }
    said = [(f.topic, f.status, f.fix) for f in doctor.check_kernels(LAPTOP, found)]
    assert said == [
        ("softcap_ce", "fail", f"export SPEEDRUN_BACKEND=softcap_ce=torch; {doctor.REPORT}"),
        ("transpose", "fail", "unset SPEEDRUN_BACKEND, or name another backend by it"),
        ("operators", "skip", doctor.MORE_TIME),
    ]
    (fine,) = doctor.check_kernels(LAPTOP, dict.fromkeys(items, Outcome("pass")))
    assert (fine.status, fine.text.split(" run")[0]) == ("pass", f"all {len(kernel_trials.TRIALS)}")


def test_memory_that_others_hold_is_named():
    held = Outcome("pass", "", {"free_bytes": [79 * GIB, GIB]})
    ((topic, status, text, _),) = bad_ones(outcomes(memory=held))
    assert (topic, status) == ("GPU memory", "warn") and "only GPU 1: 1.0 GiB of 80.0" in text
    ((topic, status, text, _),) = bad_ones(outcomes(memory=Outcome("fail", "device is busy")))
    assert (topic, status, text) == ("GPU memory", "fail", "device is busy")


def test_what_attention_lacks_is_said():
    lacking = outcomes(attention__fa4=Outcome("skip", "flash_attn.cute is not installed"))
    (found,) = (f for f in doctor.check_kernels(TWO_H100, lacking) if f.topic == "attention")
    assert found.status == "pass" and "fa4: flash_attn.cute is not installed" in found.text


def test_the_reason_for_a_backend_is_its_verdict(monkeypatch):
    row = {"gpu": "NVIDIA H200", "compute_capability": "9.0", "commit": "abc", "verdict": "pass"}
    verdicts = {"transpose": {"triton": [{**row, "source_sha256": "now"}]}}
    monkeypatch.setattr(_dispatch, "_verdicts", lambda: verdicts)
    source = "now"
    monkeypatch.setattr(_dispatch, "source_sha256", lambda stem, backend: source)
    reason = doctor.reason
    assert reason("transpose", "triton", "9.0") == "passed on NVIDIA H200 at commit abc"
    assert "never tried on compute capability 8.9" in reason("transpose", "triton", "8.9")
    assert "never tried" in reason("transpose", "cuda", "9.0")
    source = "later"
    assert "sources changed since NVIDIA H200" in reason("transpose", "triton", "9.0")
    source = "now"
    verdicts["transpose"]["triton"][0]["verdict"] = "fail"
    assert reason("transpose", "triton", "9.0") == "opt-in: failed on NVIDIA H200 at commit abc"


def test_every_operator_has_a_trial():
    folder = Path(kernel_trials.__file__).with_name("reference")
    operators = {p.stem for p in folder.glob("[a-z]*.py")}
    # polar_express calls it, and is tried with it, where it serves.
    assert set(kernel_trials.TRIALS) == operators - {"polar_chain"}


@pytest.mark.parametrize("stem", sorted(kernel_trials.TRIALS))
def test_trials_run_on_a_cpu(stem):
    assert kernel_trials.try_item(f"{stem} served", torch.device("cpu")).verdict == "pass"


@pytest.mark.parametrize(
    "stem",
    [
        "transpose",
        *(
            pytest.param(stem, marks=pytest.mark.slow)
            for stem in sorted(kernel_trials.TRIALS.keys() - {"transpose", "attention"})
        ),
    ],
)
def test_trials_agree_with_triton(stem):
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = kernel_trials.try_item(f"{stem} triton", device)
    assert (found.verdict, found.values) == ("pass", {"backend": "triton"}), found.text


def test_wrong_results_are_found(monkeypatch):
    cpu = torch.device("cpu")
    results = iter([1.0, 1.05, 1.0, 1.01, 1.0, float("nan")])
    monkeypatch.setitem(
        kernel_trials.TRIALS, "transpose", lambda draw: [torch.full((3,), next(results))]
    )
    assert "errs by 0.05" in kernel_trials.try_operator("transpose", "served", cpu).text
    assert kernel_trials.try_operator("transpose", "served", cpu).verdict == "pass"
    assert "isn't finite" in kernel_trials.try_operator("transpose", "served", cpu).text
    assert kernel_trials.relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    monkeypatch.setitem(kernel_trials.TRIALS, "transpose", lambda draw: 1 / 0)
    assert "ZeroDivisionError" in kernel_trials.try_item("transpose served", cpu).text


def test_a_backend_that_cannot_serve_is_left_out():
    found = kernel_trials.try_item("transpose cuda", torch.device("cpu"))
    assert found.verdict == "skip" and "without a GPU" in found.text
    with _dispatch.use_backend("cuda", "transpose"):
        found = kernel_trials.try_item("transpose served", torch.device("cpu"))
    assert found.verdict == "fail" and "the override asks for" in found.text
    for item in ("memory", "matmul", "nccl"):
        assert kernel_trials.try_item(item, torch.device("cpu")).verdict == "skip"


CHILD = """
    import json, os, sys, time
    if "cannot start" in sys.argv:
        sys.exit("no torch")
    for item in sys.argv[1:]:
        print(json.dumps({"begins": item}), flush=True)
        if item == "crash":
            print("about to", file=sys.stderr, flush=True)
            os.abort()
        if item == "hang":
            time.sleep(60)
        print(json.dumps({"item": item, "verdict": "pass", "text": "", "values": {}}), flush=True)
        if item == "last":
            sys.exit(1)
"""


def run_fake(items, limit_s=20.0, item_limit_s=5.0):
    command = [sys.executable, "-S", "-c", textwrap.dedent(CHILD)]
    found = kernel_trials.run(items, limit_s, item_limit_s, command)
    return {item: (outcome.verdict, outcome.text) for item, outcome in found.items()}


def test_a_crash_or_hang_costs_only_its_item():
    found = run_fake(["a", "crash", "b", "hang", "last", "c"], item_limit_s=1.0)
    assert found == {
        "a": ("pass", ""),
        "crash": ("fail", "the process died: about to"),
        "b": ("pass", ""),
        "hang": ("fail", "no end after 1 s"),
        "last": ("pass", ""),  # behind which its process takes no more
        "c": ("pass", ""),
    }


def test_the_time_for_trials_is_kept():
    start = time.monotonic()
    found = run_fake(["a", "hang", "b"], limit_s=2.0)
    assert time.monotonic() - start < 4
    assert found["hang"][0] == "skip" and "when the time for all was over" in found["hang"][1]
    assert found["b"] == ("skip", "not reached within 2 s")


def test_trials_that_cannot_start_fail_at_once():
    start = time.monotonic()
    found = run_fake(["a", "cannot start"])
    assert set(found.values()) == {("fail", "the process died: no torch")}
    assert time.monotonic() - start < 4


# ---- Facts -----------------------------------------------------------------------------------


def executable(path, code):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_clocks_are_read_by_both_names_of_the_slowdowns(tmp_path, monkeypatch):
    old = executable(
        tmp_path / "nvidia-smi",
        'case "$1" in *event*) exit 6;; esac\n'
        'echo "1980 MHz, 1980 MHz, 40, Not Active, Active, Not Active, Not Active"',
    )
    monkeypatch.setenv("PATH", str(Path(old).parent), prepend=os.pathsep)
    (state,) = kernel_trials.clocks()
    assert [name for name in kernel_trials.SLOWDOWNS if state[name] == "Active"] == [
        "hw_thermal_slowdown"
    ]
    executable(tmp_path / "nvidia-smi", "exit 6")
    assert kernel_trials.clocks() == hardware.gpu_states() == []


def test_the_version_of_ptxas(tmp_path):
    path = executable(tmp_path / "ptxas", 'echo "Cuda compilation tools, release 12.8, V12.8.93"')
    assert machine._ptxas_version(path) == "12.8"
    assert machine._ptxas_version(str(tmp_path / "none")) == ""


def test_stale_operators_are_those_whose_sources_changed(tmp_path):
    (tmp_path / "pyext").mkdir()
    code = 'def source_hashes(root):\n    return {"a": "1", "b": "2", "c": "3"}\n'
    (tmp_path / "pyext" / "source_hashes.py").write_text(code)
    assert machine.stale_operators(tmp_path, {"a": "1", "b": "other"}) == ["b", "c"]
    assert machine.stale_operators(tmp_path / "nowhere", {}) == []


def test_a_torch_that_is_installed_twice_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "torch-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: torch\nVersion: 1.0\n")
    before = machine._folders_of("torch")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert machine._folders_of("torch") == sorted([*before, str(tmp_path)])


# ---- The command -----------------------------------------------------------------------------


def test_the_whole_on_this_machine(tmp_path, capsys):
    start = time.monotonic()
    code = cli.main(["doctor", "--json", str(tmp_path / "doctor.json")])
    assert time.monotonic() - start < 30
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "doctor.json").read_text())
    topics = {finding["topic"] for finding in content["findings"]}
    assert code == any(finding["status"] == "fail" for finding in content["findings"])
    assert {"torch", "driver", "disk", "data"} < topics
    assert all(topic in said for topic in topics)
    assert all(f["status"] in ("pass", "skip") or f["fix"] for f in content["findings"])


def test_exit_codes_and_json_on_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "look", lambda environment, folder: LAPTOP)
    monkeypatch.setattr(
        kernel_trials, "run", lambda items, *limits: dict.fromkeys(items, Outcome("pass"))
    )
    assert cli.main(["doctor", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["findings"][-1]["topic"] == "operators"
    assert "0 failed" in said.err
    assert cli.main(["doctor", "--data", str(tmp_path / "none")]) == 1
    assert "no such folder" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["doctor", "--json", str(tmp_path / "no" / "file")]) == 2
    assert "can't be written" in capsys.readouterr().err
    for seconds in ("-1", "nan", "soon"):
        with pytest.raises(SystemExit) as end:
            cli.main(["doctor", "--seconds", seconds])
        assert end.value.code == 2 and f"'{seconds}'" in capsys.readouterr().err
