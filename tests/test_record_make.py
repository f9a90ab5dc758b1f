"""`speedrun record make`: the folder, what is refused, the table, evidence while a run goes on."""

import hashlib
import json
import os
import shlex
import stat
from pathlib import Path

import pytest

import record_helpers
from record_helpers import change_header, public_log, write_run
from speedrun import cli, hardware, record_folder
from train_helpers import read_events, tiny_sets, train, write_text

ROOT = Path(__file__).resolve().parents[1]
LOSSES = (3.2785, 3.2775, 3.2790, 3.2780)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    record_helpers.without_slow_facts(monkeypatch)
    monkeypatch.chdir(tmp_path)


def write_runs(folder, losses=LOSSES, **options):
    for seed, loss in enumerate(losses):
        write_run(folder / f"run{seed}", seed, loss, **options)
    return folder


def record(capsys, *words):
    capsys.readouterr()
    code = cli.main(["record", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


MAKE = ("make", "runs", "--slug", "faster", "--title", "Faster", "--date", "2026-11-26")
FOLDER = Path("records", "2026-11-26_faster")


def test_a_folder(tmp_path, capsys):
    write_runs(tmp_path / "runs")
    for i, loss in enumerate(LOSSES):
        (tmp_path / "old").mkdir(exist_ok=True)
        source = "print('step:0/1 val_loss:1 train_time:1ms')\n"
        text = public_log(loss, source=source, shift=i / 100).replace(":1600ms", ":90000ms")
        (tmp_path / "old" / f"{i}.txt").write_text(text)
    code, out, err = record(capsys, *MAKE, "--baseline", "old", "--text", "Half the work.")
    assert (code, err) == (0, "") and str(FOLDER) in out
    names = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    top = {"README.md", "config.json", "environment.json", "sources.json", "record.json"}
    runs = {f"runs/run{i}/{name}" for i in range(4) for name in ("metrics.jsonl", "log.txt")}
    baseline = {f"baseline/{i}.txt" for i in range(4)}
    assert names == top | {"curves.png", "curves.svg"} | runs | baseline
    assert (
        os.listdir("records") == ["2026-11-26_faster", "README.md"]
        or len(os.listdir("records")) == 2
    )  # nothing unfinished

    readme = (FOLDER / "README.md").read_text()
    for text in (
        "# Faster",
        "Claim: a record of track `main`. Mean validation loss 3.27825 over 4 runs",
        "8 x NVIDIA H100 80GB HBM3",
        "Half the work.",
        "- [x] 8 x NVIDIA H100",
        "| run2 | 2 | 20 | 3.27900 | 40.200 s |",
        "Against the baseline",
    ):
        assert text in readme, text
    assert "print(" not in (FOLDER / "baseline" / "0.txt").read_text()  # no listing of a source
    assert (FOLDER / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (FOLDER / "curves.svg").read_text()

    header = read_events(tmp_path / "runs" / "run0")[0]
    assert json.loads((FOLDER / "config.json").read_text()) == header["config"]
    assert json.loads((FOLDER / "sources.json").read_text()) == header["sources"]
    environment = json.loads((FOLDER / "environment.json").read_text())
    assert environment["run0"] == header["environment"] and len(environment) == 4
    hashes = json.loads((FOLDER / "record.json").read_text())["sha256"]
    assert hashes.keys() == names - {"record.json"}
    for name, digest in hashes.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest

    table = Path("records", "README.md").read_text()
    assert "| 2026-11-26 | [Faster](2026-11-26_faster/README.md) | main | 4 | 3.27825 |" in table

    # The folder's own command finds the same figures in the folder's logs.
    command = next(line for line in readme.splitlines() if line.startswith("speedrun record check"))
    os.chdir(FOLDER)
    words = shlex.split(command.partition("#")[0])
    code, out, _ = record(capsys, *words[2:], "--json")
    again, first = json.loads(out), json.loads(Path("record.json").read_text())["report"]
    assert code == 0 and len(again["rules"]) > 8
    for key in ("statistics", "rules", "comparison", "track", "target"):
        assert str(again[key]).replace("baseline/", "") == str(first[key]), key


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"seed": 0}, "own seed"),
        ({"config__data__val_tokens": 1024}, "validation on the first"),
        ({"environment__commit": "0123abc-dirty"}, "the sources are those of a commit"),
        ({"device": "NVIDIA H200"}, "8 x NVIDIA H100"),
        ({"record_obstacles": ["16 parts"]}, "tokens in order"),
    ],
)
def test_what_the_rules_refuse(tmp_path, capsys, changes, rule):
    """The rule is named, and nothing is left behind."""
    write_runs(tmp_path / "runs")
    change_header(tmp_path / "runs" / "run1", **changes)
    code, _, err = record(capsys, *MAKE)
    assert code == 1 and "refused by the rules" in err and rule in err
    assert os.listdir("records") == ["README.md"]


def test_too_few_runs_are_refused(tmp_path, capsys):
    write_runs(tmp_path / "runs", (3.2799, 3.2790))
    code, _, err = record(capsys, *MAKE)
    assert code == 1 and "mean loss below 3.28: p = " in err and "--experiment" in err


def test_untold_is_refused_too(tmp_path, capsys):
    """A claim needs every rule met: also that nothing was learned before the clock."""
    write_runs(tmp_path / "runs")
    path = tmp_path / "runs" / "run2" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"validation", "step": 0,' not in line))
    code, _, err = record(capsys, *MAKE)
    assert code == 1 and "nothing learned before the clock" in err


def test_an_experiment_may_miss_its_target_but_not_count_twice(tmp_path, capsys):
    write_runs(tmp_path / "runs", (3.29, 3.30), device="NVIDIA H200", world_size=1)
    code = record(capsys, *MAKE, "--experiment")[0]
    readme = (FOLDER / "README.md").read_text()
    assert code == 0 and "An experiment, no claim" in readme and "- [ ] mean loss" in readme
    assert "| Faster" not in readme and "Claim" not in readme
    assert "| experiment | 2 | 3.29500 |" in Path("records", "README.md").read_text()
    change_header(tmp_path / "runs" / "run1", seed=0)
    code, _, err = record(capsys, *MAKE[:3], "again", "--experiment")
    assert code == 1 and "own seed" in err


def test_nothing_is_overwritten(tmp_path, capsys):
    write_runs(tmp_path / "runs")
    assert record(capsys, *MAKE)[0] == 0
    before = {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    code, _, err = record(capsys, *MAKE)
    assert code == 2 and "is there already" in err
    assert before == {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}


def test_a_failure_leaves_nothing(tmp_path, capsys, monkeypatch):
    write_runs(tmp_path / "runs")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_folder, "plot_runs", fail)
    code, _, err = record(capsys, *MAKE)
    assert code == 2 and "No space left" in err and os.listdir("records") == ["README.md"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slug", "a/b"), "--slug 'a/b'"),
        (("--date", "today"), "--date today"),
    ],
)
def test_bad_names(tmp_path, capsys, words, message):
    write_runs(tmp_path / "runs")
    code, _, err = record(capsys, *MAKE, *words)
    assert code == 2 and message in err


def test_public_logs_make_no_folder(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for i, loss in enumerate(LOSSES):
        (tmp_path / "runs" / f"{i}.txt").write_text(public_log(loss, shift=i / 100))
    code, _, err = record(capsys, *MAKE)
    assert code == 2 and "not a run folder of this package" in err


def test_runs_of_several_folders(tmp_path, capsys):
    write_runs(tmp_path / "a", LOSSES[:2])
    write_run(tmp_path / "b" / "run0", 5, LOSSES[2])
    write_run(tmp_path / "b" / "run1", 6, LOSSES[3])
    code, _, _ = record(capsys, "make", "a", "b", *MAKE[2:])
    assert code == 0
    assert sorted(os.listdir(FOLDER / "runs")) == ["a_run0", "a_run1", "b_run0", "b_run1"]


def test_table_keeps_what_is_around_it(tmp_path, capsys):
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "README.md"
    path.write_text("# Mine\n\n<!-- records -->\nold\n<!-- end of records -->\n\nBelow.\n")
    assert record(capsys, "table")[0] == 0
    text = path.read_text()
    assert text.startswith("# Mine\n") and text.endswith("\nBelow.\n") and "old" not in text
    path.write_text("# Mine\n")
    write_runs(tmp_path / "runs")
    code, _, err = record(capsys, *MAKE)
    assert code == 2 and "put them in" in err and not FOLDER.exists()


def test_the_projects_own_table_is_up_to_date():
    text = (ROOT / "records" / "README.md").read_text()
    found = text.partition(record_folder.TABLE_BEGIN)[2].partition(record_folder.TABLE_END)[0]
    assert found.strip() == record_folder.table(ROOT / "records"), "speedrun record table"


# Evidence while a run goes on


def test_validations_are_on_the_disk_before_training_goes_on(tmp_path, monkeypatch):
    """What os.fsync has seen outlives the machine."""
    synced = {}

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[Path(path).name] = Path(path).read_text()

    monkeypatch.setattr(os, "fsync", fsync)
    write_run(tmp_path / "run", 0, 3.2775, last=18)
    assert '"step": 16, "val_loss"' in synced["metrics.jsonl"]
    assert "step:16/20 val_loss" in synced["log.txt"]


def test_gpu_states(tmp_path, monkeypatch):
    """As the driver's tool prints them; none where it fails or is absent."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpu_states() == []
    tool = tmp_path / "nvidia-smi"
    row = (
        "NVIDIA H100 80GB HBM3, 580.1, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 30, On, Off"
    )
    tool.write_text(f"#!/bin/sh\necho '{row}'\necho '{row}'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    first, second = hardware.gpu_states()
    assert first == second and first["clocks.max.sm"] == "1980 MHz"
    assert first["driver_version"] == "580.1" and first["mig.mode.current"] == "Off"
    tool.write_text("#!/bin/sh\necho failed\nexit 9\n")
    assert hardware.gpu_states() == []


@pytest.mark.slow
def test_real_runs(tmp_path, capsys):
    """Two trained runs of recipe tiny: an experiment's folder that its own command confirms."""
    write_text(tmp_path / "text.txt")
    for seed in (1, 2):
        words = ("--recipe", "tiny", "--text", "text.txt", "--out", f"runs/{seed}", "--seed", seed)
        assert train(tmp_path, *words, *tiny_sets()).code == 0
    code, _, err = record(capsys, *MAKE, "--target", 9)
    assert code == 0, err
    assert "- [x] every run has its own seed: seeds 1, 2" in (FOLDER / "README.md").read_text()
    environment = json.loads((FOLDER / "environment.json").read_text())["1"]
    assert environment["cpu"] and "gpu_states" in environment
    code, report = record(capsys, "check", f"{FOLDER}/runs", "--target", 9, "--json")[:2]
    assert json.loads(report)["statistics"]["num_runs"] == 2 and code == 0
