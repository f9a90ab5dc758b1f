"""`speedrun ablate`: the table of techniques, what is run of it, the statistics, end to end."""

import dataclasses
import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from speedrun import recipes
from speedrun.commands import ablate
from speedrun.commands.ablate import ALL_ON, Result, Run, compare, format_table
from speedrun.config import (
    AttentionConfig,
    BaselineConfig,
    ConfigError,
    HeadConfig,
    LayerSpec,
    MLPConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
)
from speedrun.techniques import NOT_TECHNIQUES, TECHNIQUES, in_use
from train_helpers import small_config, start_training, tiny_sets, train, write_text

RECORD = dict(precision="recipe", tokenizer="gpt2")
SECTIONS = {
    "model": ModelConfig,
    "model.attention": AttentionConfig,
    "model.mlp": MLPConfig,
    "model.head": HeadConfig,
    "schedule": ScheduleConfig,
    "optim": OptimConfig,
}


def is_listed(key):
    switched = {override.partition("=")[0] for words in TECHNIQUES.values() for override in words}
    return (key in switched) + (key in NOT_TECHNIQUES or f"{key}.*" in NOT_TECHNIQUES)


def test_every_setting_is_a_technique_or_says_why_not():
    keys = {
        f"{section}.{field.name}"
        for section, config in SECTIONS.items()
        for field in dataclasses.fields(config)
    } - SECTIONS.keys()
    assert {key: 1 for key in keys} == {key: is_listed(key) for key in keys}
    assert {key.removesuffix(".*") for key in NOT_TECHNIQUES} <= keys  # none that is no setting


def record_with_all(**model):
    """record_089, and what came after it."""
    config = recipes.load("record_089")
    model = {"attention": AttentionConfig(qkv="fp8", out="fp8")} | model
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def test_every_technique_is_used_and_can_be_left_out():
    config = record_with_all(vocab_size=50_257)
    found = in_use(config, **RECORD)
    assert list(found) == list(TECHNIQUES)
    for name, without in found.items():
        assert without != config
        ablate._check_optimizer(name, without)  # builds the model, on the meta device
    assert not any(layer.xsa for layer in found["xsa"].model.active_layers)
    assert found["untie"].schedule.untie_frac == 1
    assert (found["bigram"].model.bigram_rows, found["bigram"].model.sign_rows) == (0, 0)
    assert not found["fp8_mlp"].model.mlp.uses_fp8 and found["fp8_mlp"].model.head.fp8
    assert not found["fp8_projections"].model.attention.uses_fp8


def missing(**changes):
    """Techniques that are not in use after a change."""
    config = record_with_all()
    for section in ("model", "schedule", "optim"):
        values = changes.pop(section, {})
        part = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: part})
    return set(TECHNIQUES) - set(in_use(config, **(RECORD | changes)))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (dict(precision="bf16"), {"fp8_head", "fp8_mlp", "fp8_projections"}),
        (
            dict(precision="float32"),
            {"fp8_head", "fp8_mlp", "fp8_projections", "exact_weights"},
        ),
        (dict(model=dict(attention=AttentionConfig(dx="fp8"))), {"fp8_projections"}),
        (dict(tokenizer="bytes"), {"prefix_loss"}),
        (dict(schedule=dict(prefix_loss=False)), {"prefix_loss"}),
        (dict(schedule=dict(window_warmup=False)), {"window_warmup", "yarn"}),
        (dict(schedule=dict(untie_frac=0.0)), {"tie"}),
        (dict(schedule=dict(untie_frac=1.0)), {"untie"}),
        (dict(model=dict(xsa=False)), {"xsa"}),
        (dict(model=dict(bigram_rows=0, bigram_dim=0)), {"bigram", "signs"}),
        (dict(model=dict(gates="constant")), {"gate_networks"}),
        (dict(optim=dict(matrix_rule="muon")), {"variance_rescale"}),
        (
            dict(optim=dict(matrix_rule="adamw", vector_rule="adamw")),
            {"variance_rescale", "exact_weights", "cautious_decay"},
        ),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_switches_of_what_is_not_there_are_left_out(changes, wanted):
    assert missing(**changes) == wanted


def test_roles_and_gates_that_no_layer_has():
    config = small_config(
        model=dataclasses.replace(
            small_config().model, layers=LayerSpec.parse_many("short*2"), key_offset=True
        )
    )
    found = in_use(config, precision="float32", tokenizer="bytes")
    assert {"xsa", "key_offset", "gate_networks", "mudd"}.isdisjoint(found)
    assert {"bigram", "asymmetric_softcap", "cautious_decay"} <= set(found)
    baseline = BaselineConfig(num_layers=1, model_dim=16, head_dim=8, mlp_hidden=8)
    with pytest.raises(ConfigError, match="'small': its model is fixed"):
        in_use(dataclasses.replace(config, model=baseline), **RECORD)


def test_a_technique_that_others_need_is_named():
    config = small_config(
        model=dataclasses.replace(small_config().model, gates="none", xsa=True, bigram_dim=99)
    )
    with pytest.raises(ConfigError, match=r"(?s)without technique '.*'.*model\.bigram_dim=99"):
        in_use(config, precision="float32", tokenizer="bytes")


def results(**losses):
    return {
        Run(name, seed, "cpu", None, Path(name, str(seed)), ()): Result(loss, seconds)
        for name, runs in losses.items()
        for seed, (loss, seconds) in enumerate(runs)
    }


def test_statistics_by_hand():
    """Losses 1, 2, 3 have std 1; 4 and 6 have √2: errors 1/√3 and 1."""
    all_on = [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    rows = compare(results(xsa=[(1.5, 5.0)], all_on=all_on, smear=[(4.0, 10.0), (6.0, 20.0)]))
    assert [row["technique"] for row in rows] == [ALL_ON, "smear", "xsa"]
    base, smear, xsa = rows
    assert (base["mean"], base["std"], base["time_ratio"]) == (2.0, 1.0, 1.0)
    assert smear["std"] == pytest.approx(2**0.5)
    assert smear["difference"] == 3.0 and smear["time_ratio"] == 0.75
    assert smear["standard_error"] == pytest.approx((1 / 3 + 1) ** 0.5)
    assert (xsa["difference"], xsa["std"], xsa["standard_error"]) == (-0.5, None, None)
    assert xsa["overrides"] == ["model.xsa=false"]
    lines = format_table(rows).splitlines()
    assert re.fullmatch(r"none +3 +2\.0000 +± 1\.0000 +× 1\.00", lines[1])
    wanted = r"smear +2 +5\.0000 +± 1\.4142 +\+3\.0000 +± 1\.1547 +× 0\.75"
    assert re.fullmatch(wanted, lines[2])
    assert re.fullmatch(r"xsa +1 +1\.5000 +-0\.5000 +× 0\.25", lines[3])


def test_without_all_on_nothing_is_compared():
    (row,) = compare(results(smear=[(4.0, 10.0), (6.0, 20.0)]))
    assert (row["mean"], row["difference"], row["time_ratio"]) == (5.0, None, None)
    assert "smear" in format_table([row])


def slots(jobs, monkeypatch, cores=(2, 3, 5), gpus=0, visible=None, device="cpu"):
    monkeypatch.setattr(ablate.os, "sched_getaffinity", lambda pid: set(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    words = ablate.argparse.Namespace(jobs=jobs, device=device)
    return [(slot.cores, slot.gpu) for slot in ablate._slots(words)]


def test_cores_and_gpus_are_dealt(monkeypatch):
    assert slots(None, monkeypatch) == [((2,), None), ((3,), None), ((5,), None)]
    assert slots(2, monkeypatch) == [((2, 5), None), ((3,), None)]
    assert slots(4, monkeypatch) == [((2,), None), ((3,), None), ((5,), None), ((2,), None)]
    on_gpus = dict(gpus=2, device="cuda")
    assert slots(None, monkeypatch, **on_gpus) == [((2, 5), "0"), ((3,), "1")]
    assert slots(None, monkeypatch, visible="4,7", **on_gpus) == [((2, 5), "4"), ((3,), "7")]


STEPS = 4
CHOSEN = ("bigram", "asymmetric_softcap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_text(folder / "text.txt")
    return folder


def words(*more, techniques=CHOSEN, out="out", **sets):
    sets = dict(schedule__num_steps=STEPS, schedule__val_interval=STEPS) | sets
    own = [
        "--recipe",
        "tiny",
        "--text",
        "text.txt",
        "--device",
        "cpu",
        "--techniques",
        ",".join(techniques),
    ]
    return ["ablate", *own, "--out", out, *tiny_sets(**sets), *map(str, more)]


def run_ablate(folder, *more, **options):
    return train(folder, *words(*more, **options), module="speedrun.cli")


@pytest.fixture(scope="module")
def first_run(folder):
    return run_ablate(folder, "--seeds", 1)


def report(folder):
    return json.loads((folder / "ablation.json").read_text())


def test_end_to_end(first_run, folder):
    assert first_run.code == 0, first_run.err
    assert "2 techniques, 3 runs, 0 of them finished before" in first_run.out
    rows = report(folder / "out")["rows"]
    assert {row["technique"] for row in rows} == {ALL_ON, *CHOSEN}
    for row in rows:
        assert row["technique"].replace(ALL_ON, "none") in first_run.out
        run_folder = folder / "out" / row["technique"] / "seed_0"
        log = (run_folder / "log.txt").read_text()
        (loss,) = re.findall(rf"step:{STEPS}/{STEPS} val_loss:(\S+)", log)
        assert f"{row['val_losses'][0]:.4f}" == loss
        config = json.loads((run_folder / "config.json").read_text())
        assert config["model"]["bigram_rows"] == (0 if row["technique"] == "bigram" else 256)
    assert not list(folder.rglob("*.unfinished"))


def test_finished_runs_are_not_run_again(first_run, folder):
    logs = list((folder / "out").rglob("log.txt"))
    before = {log: log.read_bytes() for log in logs}
    again = run_ablate(folder, "--seeds", 2, techniques=CHOSEN[:1])
    assert again.code == 0, again.err
    assert "1 techniques, 4 runs, 2 of them finished before" in again.out
    assert {log: log.read_bytes() for log in logs} == before
    for row in report(folder / "out")["rows"]:
        assert row["seeds"] == [0, 1] and row["std"] > 0
    other = run_ablate(folder, "--seeds", 1, schedule__num_steps=STEPS + 1)
    assert other.code == 1
    assert "seed_0: holds a run with another config; choose another folder by --out" in other.err


def test_a_failed_run_is_named(folder):
    """The bigram table decays at such a rate that it overflows, where there is one."""
    row = "optim__adam_table__bigram_embed"
    sets = {f"{row}__lr_mul": 1e12, f"{row}__wd_mul": 1e15, "schedule__adam_interval": 1}
    sets["optim__cautious_decay"] = "false"
    run = run_ablate(folder, "--seeds", 1, out="failed", techniques=("bigram",), **sets)
    assert run.code == 1 and "Traceback" not in run.err
    assert "all_on, seed 0: failed" in run.err and "loss is nan" in run.err
    (failure,) = report(folder / "failed")["failed"]
    assert failure["technique"] == ALL_ON and "loss is nan" in failure["error"]
    assert [row["technique"] for row in report(folder / "failed")["rows"]] == ["bigram"]


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["--seeds", 0], {}, "--seeds 0, --jobs None: must be at least 1"),
        ([], dict(techniques=("smeer",)), "--techniques smeer: there are smear, bigram"),
        ([], dict(techniques=("fp8_mlp",)), "--techniques fp8_mlp: off or without effect"),
        ([], dict(model__model_dim=99), "model.model_dim=99: must be"),
        ([], dict(data__repeat="false", schedule__num_steps=4000), "tokens"),
    ],
    ids=str,
)
def test_refusals(folder, more, options, message):
    run = run_ablate(folder, *more, out="refused", **options)
    assert run.code == 1 and message in run.err and "Traceback" not in run.err
    assert not (folder / "refused").exists()


def test_interrupted(folder):
    """Ctrl-C ends the runs too; the same command goes on."""
    long = dict(schedule__num_steps=10_000, schedule__val_interval=10_000)
    command = words("--seeds", 1, "--jobs", 1, out="interrupted", techniques=("bigram",), **long)
    process = start_training(folder, *command, module="speedrun.cli")
    log = folder / "interrupted" / ALL_ON / "seed_0.unfinished" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and "training" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in err
    written = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == written  # nobody trains any more
