"""`speedrun record check`: logs of every age, statistics, rules, exit codes."""

import json
import math
import statistics
from pathlib import Path

import pytest

import record_helpers
from record_helpers import H100, change_header, public_log, write_run
from speedrun import cli, record_rules
from speedrun.record_logs import LogError, parse_log, parse_statistics, read_runs
from speedrun.record_report import judge
from speedrun.record_rules import TRACKS, RecordError, guess_track, select_finished, summarize

MAIN, OPTIMIZATION = TRACKS["main"], TRACKS["optimization"]
LOSSES = (3.2785, 3.2775, 3.2790, 3.2780)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    record_helpers.without_slow_facts(monkeypatch)


def finals(text, track=MAIN):
    finished, excluded = select_finished(parse_log(text, "a.txt"), track)
    return [final for _, final in finished], excluded


def write_logs(folder, losses, **options):
    for i, loss in enumerate(losses):
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(public_log(loss, shift=i / 100, **options))
    return folder


def check(capsys, *words):
    capsys.readouterr()  # what the runs printed
    code = cli.main(["record", "check", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def check_json(capsys, *words):
    code, out, _ = check(capsys, *words, "--json")
    return code, json.loads(out)


def rule(report, name):
    return next(r["met"] for r in report["rules"] if name in r["name"])


# Formats


def test_a_log_of_today():
    (run,) = parse_log(public_log(3.2775), "a.txt")
    assert (run.total_steps, run.last_step, run.clock_restart_step) == (20, 20, None)
    assert run.gpus == (H100,) * 8
    assert run.validations[0] == (0, 10.83, 0.0) and run.validations[-1] == (20, 3.2775, 1.6)
    assert [v.step for v in run.validations] == [0, 5, 10, 15, 20]


def test_an_old_log_whose_clock_starts_again():
    (run,) = parse_log(public_log(3.2775, restart=True), "a.txt")
    assert run.clock_restart_step == 10
    times = [v.train_time_s for v in run.validations]
    assert times == [None, None, None, 0.4, 0.8]  # not those of the first clock


def test_seconds():
    assert finals(public_log(3.2775, unit="s"))[0] == [(20, 3.2775, 1.6)]


def test_losses_on_training_lines_and_six_digits():
    text = (
        "step:0/2 val_loss:10.825800 train_time:0ms step_avg:0.00ms\n"
        "step:1/2 train_loss:10.8258 train_time:90ms step_avg:90.00ms\n"
        "step:2/2 train_loss:9.5000 train_time:180ms step_avg:90.00ms\n"
        "step:2/2 val_loss:2.919837 train_time:181ms step_avg:90.50ms\n"
    )
    assert finals(text)[0] == [(2, 2.919837, 0.181)]


def test_llmc():
    text = "s:0 tel:10.9863\ns:0 trl:10.98\ns:128 trl:6.1234\ns:128 tel:6.2000\ns:256 tel:3.2790\n"
    assert finals(text)[0] == [(256, 3.279, None)]


def test_a_listing_of_the_source_is_no_log():
    source = (
        "print0(f'step:{step}/{total} val_loss:{val_loss:.4f} train_time:{t}ms')\n"
        "# step:5/20 val_loss:1.0000 train_time:1ms step_avg:1.00ms\n"
        "step:20/20 val_loss:1.0000 train_time:1ms step_avg:1.00ms\n"
    )
    assert finals(public_log(3.2775, source=source))[0] == [(20, 3.2775, 1.6)]


def test_two_runs_in_one_file():
    runs = parse_log(public_log(3.27) + public_log(3.28), "a.txt")
    assert [(run.name, run.validations[-1].loss) for run in runs] == [
        ("a.txt#1", 3.27),
        ("a.txt#2", 3.28),
    ]


@pytest.mark.parametrize("line", ["peak", "step:20/20 val_loss", "3.2775", "train_time:1600ms"])
def test_a_log_that_was_cut_short_is_left_out(line):
    """Wherever the cut is; also inside the last line's loss or time."""
    text = public_log(3.2775)
    found, excluded = finals(text[: text.rindex(line) + (0 if line == "peak" else 2)])
    if line == "peak":  # all that counts is there
        assert found and not excluded
    else:
        assert found == [] and "cut short" in excluded["a.txt"]


def test_stopping_early_is_a_matter_of_the_track():
    text = public_log(3.279, total=20).replace("/20 ", "/40 ")
    assert "--track optimization" in finals(text)[1]["a.txt"]
    assert finals(text, OPTIMIZATION)[0][0].step == 20


def test_statistics_file():
    runs = parse_statistics("Losses:\n[3.1, 3.2]\n\nTimes:\n```\n[70, 71.5]\n```\n", "s.md")
    assert [run.validations[0] for run in runs] == [(None, 3.1, 70.0), (None, 3.2, 71.5)]
    assert parse_statistics("accs = [3.1]", "s.md")[0].validations[0].train_time_s is None
    with pytest.raises(LogError, match="2 losses but 1 times"):
        parse_statistics("losses = [3.1, 3.2]\ntimes = [70]", "s.md")
    with pytest.raises(LogError, match=r"s\.md: no list"):
        parse_statistics("# Nothing", "s.md")


def test_a_run_of_ours(tmp_path):
    folder = write_run(tmp_path / "run", 7, 3.2775)
    for path in (folder, folder / "metrics.jsonl", folder / "log.txt", tmp_path):
        (run,) = read_runs(path)
        assert (run.seed, run.total_steps, run.last_step, len(run.gpus)) == (7, 20, 20, 8)
        assert run.validations[-1] == (20, 3.2775, pytest.approx(40.7))
    assert parse_log((folder / "log.txt").read_text(), "x")[0].validations[-1][:2] == (20, 3.2775)


def test_our_run_on_a_machine_that_was_lost(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 7, 3.2775, last=11)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "training", "st')  # half a line
    assert read_runs(folder)[0].last_step == 11
    code, _, err = check(capsys, folder)
    assert code == 2 and "cut short: it ends at step 11 of 20" in err


def test_damage_inside_is_named(tmp_path):
    folder = write_run(tmp_path / "run", 7, 3.2775)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"event": "training"', "{", 1))
    with pytest.raises(LogError, match=r"metrics\.jsonl: line 3 is no JSON"):
        read_runs(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "hello\n", "no line such as 'step:"),
        ("a.txt", "", "no line such as 'step:"),
        ("a.bin", "\xff\x00", "no line such as 'step:"),
        ("metrics.jsonl", "", "empty; the run has not begun"),
        ("metrics.jsonl", "[]\n", "not as this version writes it"),
        ("metrics.jsonl", '{"event": "header", "seed": 1}\n', "no config, environment, sources"),
    ],
)
def test_files_that_are_no_logs(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    code, _, err = check(capsys, tmp_path / name)
    assert code == 2 and message in err and name in err
    code, _, err = check(capsys, tmp_path / "nowhere")
    assert code == 2 and "nowhere: there is no such file" in err


def test_a_file_that_cant_be_read_is_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(public_log(3.2775))

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    code, _, err = check(capsys, path)
    assert code == 2 and "a.txt: can't be read (Permission denied)" in err


# Statistics


def test_statistics_of_small_numbers(tmp_path):
    runs = read_runs(write_logs(tmp_path / "logs", LOSSES))
    found = summarize(select_finished(runs, MAIN)[0], 3.28)
    mean, std = statistics.mean(LOSSES), statistics.stdev(LOSSES)
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)
    # Student's t with 3 degrees of freedom has a closed distribution function.
    t = (mean - 3.28) / (std / 2)
    p = 0.5 + (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))) / math.pi
    assert found.p_value == pytest.approx(p, rel=1e-9)
    assert found.margin == pytest.approx((3.28 - mean) * 2)


def test_runs_needed_is_the_smallest_number(tmp_path):
    runs = read_runs(write_logs(tmp_path / "logs", (3.2788, 3.2794)))
    found = summarize(select_finished(runs, MAIN)[0], 3.28)
    needed = record_rules.runs_needed(found, MAIN)

    def p_value(n):
        t = record_rules.scipy_stats().t
        return t.cdf((found.mean - 3.28) / found.std * math.sqrt(n), n - 1)

    assert p_value(needed) < 0.01 <= p_value(needed - 1)
    assert record_rules.runs_needed(found, OPTIMIZATION) == math.ceil((0.004 / 0.0009) ** 2)


def test_no_number_of_runs_helps_above_the_target(tmp_path, capsys):
    code, out, _ = check(capsys, write_logs(tmp_path / "logs", (3.281, 3.282)))
    assert code == 1 and "no number of runs will do" in out


def test_more_runs_needed(tmp_path, capsys):
    code, out, _ = check(capsys, write_logs(tmp_path / "one", (3.2785,)))
    assert code == 1 and "more runs needed" in out and "std of one run unknown" in out
    code, report = check_json(capsys, tmp_path / "one")
    assert report["runs_needed"] > 1 and report["statistics"]["std"] is None


def test_welch_against_a_baseline(tmp_path, capsys):
    """Sets of other sizes and spreads, which Student's test would take as equal."""
    baseline = (3.2800, 3.2835, 3.2790, 3.2815, 3.2845, 3.2775)
    ours = write_logs(tmp_path / "ours", LOSSES)
    theirs = write_logs(tmp_path / "theirs", baseline)
    code, report = check_json(capsys, ours, "--baseline", theirs, "--experiment")
    found = report["comparison"]["loss"]
    shares = [statistics.variance(side) / len(side) for side in (LOSSES, baseline)]
    difference = statistics.mean(LOSSES) - statistics.mean(baseline)
    freedom = sum(shares) ** 2 / (shares[0] ** 2 / 3 + shares[1] ** 2 / 5)  # Welch, Satterthwaite
    p_value = 2 * record_rules.scipy_stats().t.cdf(-abs(difference) / sum(shares) ** 0.5, freedom)
    assert code == 0 and found["difference"] == pytest.approx(difference)
    assert found["p_value"] == pytest.approx(p_value)
    assert found["low"] < difference < found["high"]
    assert report["comparison"]["time_s"]["p_value"] is None  # no spread in times
    _, out, _ = check(capsys, ours, "--baseline", theirs)
    assert "against the baseline of 6 runs" in out and f"loss {difference:+.6f}" in out


# Rules


def test_a_record_of_our_runs_meets_all_rules(tmp_path, capsys):
    for seed, loss in enumerate(LOSSES):
        write_run(tmp_path / f"run{seed}", seed, loss)
    code, report = check_json(capsys, tmp_path)
    assert code == 0 and report["met"] and report["track"] == "main"
    assert all(r["met"] for r in report["rules"])
    assert [run["seed"] for run in report["runs"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 0}, "own seed"),
        ({"config__optim__normuon__lr": 0.5}, "one configuration"),
        ({"sources": {"train.py": "other"}}, "one configuration"),
        ({"config__data__val_tokens": 1024}, "validation on the first"),
        ({"val_data": ["mine_val_000000.bin"]}, "validation on the first"),
        ({"environment__commit": "0123abc-dirty"}, "those of a commit"),
        ({"environment__commit": "none"}, "those of a commit"),
        ({"device": "NVIDIA H200"}, "8 x NVIDIA H100"),
        ({"world_size": 1}, "8 x NVIDIA H100"),
        ({"device": "CPU (2 threads)"}, "8 x NVIDIA H100"),
        ({"record_obstacles": ["16 parts"]}, "tokens in order"),
        ({"config__data__repeat": True}, "tokens in order"),
        ({"resumed": 12}, "one piece"),
    ],
)
def test_each_rule_can_be_broken(tmp_path, capsys, changes, name):
    for seed, loss in enumerate(LOSSES):
        write_run(tmp_path / f"run{seed}", seed, loss)
    if step := changes.pop("resumed", None):
        with open(tmp_path / "run1" / "metrics.jsonl", "a") as file:
            file.write(f'{{"event": "resumed", "step": {step}}}\n')
    change_header(tmp_path / "run1", **changes)
    code, report = check_json(capsys, tmp_path)
    assert code == 1 and rule(report, name) is False


def test_learning_before_the_clock(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", LOSSES)
    assert rule(check_json(capsys, logs)[1], "before the clock")
    text = (logs / "1.txt").read_text()
    (logs / "1.txt").write_text(text.replace("val_loss:10.8300", "val_loss:7.8300"))
    code, report = check_json(capsys, logs)
    assert code == 1 and rule(report, "before the clock") is False


def test_unequal_stop_steps(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", LOSSES)
    (logs / "4.txt").write_text(public_log(3.2780, total=25, shift=0.4))
    code, report = check_json(capsys, logs)
    assert code == 1 and rule(report, "one step") is False
    code, report = check_json(capsys, logs, "--stop-step", 15, "--target", 4)
    assert {run["step"] for run in report["runs"]} == {15}


def test_one_curve_twice(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", LOSSES)
    (logs / "again.txt").write_text((logs / "0.txt").read_text())
    code, report = check_json(capsys, logs)
    assert code == 1 and rule(report, "own seed") is False
    _, report = check_json(capsys, logs / "0.txt", logs / "0.txt", logs / "1.txt")
    assert report["statistics"]["num_runs"] == 2  # a file given twice is one run


def test_a_list_beside_its_logs_is_refused(tmp_path, capsys):
    """As LOGS/* gives them: each run would count twice, and no rule could see it."""
    logs = write_logs(tmp_path / "logs", LOSSES)
    (logs / "statistics.md").write_text(f"losses = {list(LOSSES)}\n")
    code, _, err = check(capsys, *logs.iterdir())
    assert code == 2 and "statistics.md" in err and "count twice" in err
    assert check(capsys, logs)[0] == 0  # a folder is read for its logs


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", LOSSES)
    text = public_log(3.2780, shift=0.5)
    (logs / "nan.txt").write_text(text.replace("val_loss:3.2780", "val_loss:nan"))
    code, report = check_json(capsys, logs)
    assert code == 1 and rule(report, "finite") is False
    assert report["statistics"]["mean"] is None  # NaN is no JSON


def test_the_optimization_tracks_margin(tmp_path, capsys):
    """(3.28 − mean)·√n: 0.0016·2 is too little for four runs, 0.0021·2 is enough."""
    for folder, loss, expected in (("a", 3.2784, 1), ("b", 3.2779, 0)):
        for seed in range(4):
            path = tmp_path / folder / f"run{seed}"
            write_run(path, seed, loss, recipe="optimization", world_size=1, device="NVIDIA A100")
        code, report = check_json(capsys, tmp_path / folder)
        assert (code, report["track"]) == (expected, "optimization")
        assert report["statistics"]["margin"] == pytest.approx(2 * (3.28 - loss))


def test_tracks_are_guessed(tmp_path):
    public = parse_log(public_log(3.2775), "a.txt")
    medium = parse_log(public_log(2.9190), "b.txt")
    assert (guess_track(public), guess_track(medium)) == ("main", "medium")
    steps = parse_log(public_log(3.2790), str(tmp_path / "track_3_optimization" / "a.txt"))
    assert guess_track(steps) == "optimization"
    with pytest.raises(RecordError, match="several tracks"):
        guess_track(public + medium)


def test_runs_of_no_track_need_a_target(tmp_path, capsys):
    for seed in range(3):
        write_run(tmp_path / f"{seed}", seed, 1.6 + seed / 100, recipe="tiny")
    code, _, err = check(capsys, tmp_path)
    assert code == 2 and "--target" in err
    code, report = check_json(capsys, tmp_path, "--target", 1.7)
    assert code == 0 and report["experiment"]


def test_an_experiment_is_free_of_a_claims_rules(tmp_path, capsys):
    for seed, loss in enumerate(LOSSES):
        write_run(tmp_path / f"run{seed}", seed, loss, device="NVIDIA H200", world_size=1)
    assert check(capsys, tmp_path)[0] == 1
    assert check(capsys, tmp_path, "--experiment")[0] == 0


def test_without_scipy_the_extra_is_named(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, err = check(capsys, write_logs(tmp_path / "logs", LOSSES))
    assert code == 2 and "nanogpt-speedrun[cli]" in err


def test_judging_leaves_out_and_says(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", LOSSES)
    (logs / "short.txt").write_text(public_log(3.2, cut=200))
    code, out, _ = check(capsys, f"{logs}/*.txt")  # a pattern that no shell has seen
    assert code == 0 and "left out: short.txt: cut short" in out
    assert judge(read_runs(logs), MAIN).excluded.keys() == {str(logs / "short.txt")}


def test_a_systems_change_needs_no_p_value(tmp_path, capsys):
    logs = write_logs(tmp_path / "logs", (3.2785,))
    assert check(capsys, logs)[0] == 1
    code, out, _ = check(capsys, logs, "--systems-only")
    assert code == 0 and "not asked of a change of speed only" in out
    assert check(capsys, write_logs(tmp_path / "bad", (3.2815,)), "--systems-only")[0] == 1


def test_a_record_is_faster_than_its_baseline(tmp_path, capsys):
    slow = write_logs(tmp_path / "slow", LOSSES)
    fast = write_logs(tmp_path / "fast", LOSSES)
    for path in fast.iterdir():
        path.write_text(path.read_text().replace("train_time:1600ms", "train_time:1590ms"))
    code, report = check_json(capsys, fast, "--baseline", slow)
    assert code == 0 and rule(report, "faster")
    code, report = check_json(capsys, slow, "--baseline", fast)
    assert code == 1 and rule(report, "faster") is False
    path = slow / "0.txt"
    path.write_text(path.read_text().replace("H100 80GB HBM3", "H100 PCIe     "))
    assert rule(check_json(capsys, fast, "--baseline", slow)[1], "faster") is False


def test_a_resumed_run_counts_what_came_later(tmp_path):
    folder = write_run(tmp_path / "run", 7, 3.2775)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "resumed", "step": 16}\n')
        file.write('{"event": "validation", "step": 20, "val_loss": 3.25, "train_time_s": 41.0}\n')
    (run,) = read_runs(folder)
    assert run.resumed and run.validations[-1] == (20, 3.25, 41.0) and len(run.validations) == 6


# Published logs


def test_record_89(shared_data, capsys):
    """The figures that its authors published."""
    (path,) = (shared_data / "record_logs").glob("*statistics.md")
    code, out, _ = check(capsys, path)
    assert code == 0
    for figure in ("3.2783692308", "0.0014156180", "0.0006690604", "79.684923 s", "79.653 s"):
        assert figure in out


def test_published_logs(shared_data, capsys):
    _, report = check_json(capsys, *(shared_data / "record_logs").glob("*.txt"))
    finals = [(r["step"], r["val_loss"], r["train_time_s"]) for r in report["runs"]]
    assert sorted(finals) == [
        (1390, 3.2775, 79.532),
        (1770, 3.2798, 179.377),
        (1875, 3.2783, 301.825),
    ]
    assert [run["clock_restart_step"] for run in report["runs"]].count(10) == 1
    (left_out,) = report["excluded"]
    assert "2026-01-30" in left_out["name"] and "1555" in left_out["reason"]
