"""speedrun ab: its false-positive rate and power by simulation, its files and refusals by runs."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from speedrun import ab_statistics, cli
from speedrun.ab_statistics import (
    FALSE_POSITIVE_RATE,
    FASTER,
    NOT_SHOWN,
    SLOWER,
    block_log_ratio,
    compare,
    plan_blocks,
)
from speedrun.commands import ab

NUM_SIMULATIONS = 1000
# Three standard errors of a rate of 5 % over so many.
RATE_NOISE = 3 * (FALSE_POSITIVE_RATE * (1 - FALSE_POSITIVE_RATE) / NUM_SIMULATIONS) ** 0.5
SHORT = ["--runs", "4", "--noise-blocks", "2"]


def normal(rng, n):
    return 0.01 * rng.standard_normal(n)


def heavy_tails(rng, n):
    return 0.01 * rng.standard_t(2, n)


def outliers(rng, n):
    return 0.003 * rng.standard_normal(n) + 0.3 * (rng.random(n) < 0.05)


def drift(rng, n):
    """A machine that warms up, by 20 %, fast at first."""
    return 0.2 * (1 - np.exp(-np.arange(n) / 15)) + 0.01 * rng.standard_normal(n)


def slow_waves(rng, n):
    """Random walk: the speed changes by a third over an hour, a little between two runs."""
    return np.cumsum(0.02 * rng.standard_normal(n)) + 0.005 * rng.standard_normal(n)


def simulate(noise, seed, log_ratio=0.0, num_ab=5, num_aa=3):
    """A comparison on a machine with such noise (of log time), where B takes exp(log_ratio) × A."""
    blocks = plan_blocks(num_ab, num_aa)
    logs = iter(noise(np.random.default_rng(seed), 4 * len(blocks)))
    ratios = {"A/B": [], "A/A": []}
    for kind, order in blocks:
        effect = log_ratio if kind == "A/B" else 0.0
        seconds = [np.exp(next(logs) + effect * (place == "B")) for place in order]
        ratios[kind].append(block_log_ratio(order, seconds))
    return compare(ratios["A/B"], ratios["A/A"])


@pytest.mark.parametrize("noise", [normal, heavy_tails, outliers, drift, slow_waves])
def test_false_positive_rate(noise):
    found = [simulate(noise, seed).verdict for seed in range(NUM_SIMULATIONS)]
    assert sum(v != NOT_SHOWN for v in found) / NUM_SIMULATIONS <= FALSE_POSITIVE_RATE


def test_interval_covers_at_the_stated_rate():
    """Of the t interval alone, so neither too narrow nor too wide."""
    results = [simulate(normal, seed, log_ratio=0.02) for seed in range(NUM_SIMULATIONS)]
    missed = sum(not r.low <= np.exp(0.02) <= r.high for r in results) / NUM_SIMULATIONS
    assert abs(missed - FALSE_POSITIVE_RATE) <= RATE_NOISE


@pytest.mark.parametrize(("log_ratio", "verdict"), [(-0.03, FASTER), (0.03, SLOWER)])
def test_effects_are_found(log_ratio, verdict):
    """3 % under noise of 1 % a run, with the runs that ab makes by default."""
    found = [simulate(normal, seed, log_ratio).verdict for seed in range(300)]
    assert found.count(verdict) > 0.85 * 300
    assert found.count(verdict) + found.count(NOT_SHOWN) == 300


def test_linear_drift_falls_out():
    for order in ab_statistics.ORDERS:
        seconds = np.exp(0.1 * np.arange(4) + 0.5 * np.array([p == "B" for p in order]))
        assert block_log_ratio(order, seconds) == pytest.approx(0.5, abs=1e-12)


def test_noise_floor():
    sure = [-0.01, -0.0101, -0.0099, -0.01, -0.01]
    assert compare(sure, [1e-4, -1e-4, 0.0]).verdict == FASTER
    biased = compare(sure, [-0.02, -0.02, -0.02])  # of the place in the block, not of B
    assert biased.verdict == NOT_SHOWN and biased.noise_floor >= np.expm1(0.02)
    assert compare(sure, [0.02, -0.02, 0.01]).verdict == NOT_SHOWN
    assert compare(sure, [0.0, 0.0], resolution=0.02).verdict == NOT_SHOWN
    assert compare([0.0, 0.0], [0.0, 0.0]).verdict == NOT_SHOWN


def test_what_would_have_been_shown():
    """The smallest effect that such runs find is found about 4 times in 5, on other machines' runs
    of the same kind; and so is a smaller one by the number of blocks that is asked for."""
    nothing = [simulate(normal, seed) for seed in range(300)]
    size = np.median([np.log1p(result.detectable) for result in nothing])
    assert 0.01 < size < 0.04  # of blocks whose ratios have a standard deviation of 1 %
    assert 0.68 < shown(size, num_ab=5, num_aa=3) < 0.9
    missed = [simulate(normal, seed, log_ratio=0.007) for seed in range(300)]
    wanted = [
        result.blocks_needed
        for result in missed
        if result.verdict == NOT_SHOWN and abs(np.log(result.ratio) - 0.007) < 5e-4
    ]
    num_ab, num_aa = (int(np.median(numbers)) for numbers in zip(*wanted, strict=True))
    assert num_ab > 10 and num_aa > 3
    assert 0.68 < shown(0.007, num_ab, num_aa) < 0.9


def shown(log_ratio, num_ab, num_aa):
    """How often an effect of this size gets a verdict."""
    found = [simulate(normal, 1000 + i, log_ratio, num_ab, num_aa).verdict for i in range(200)]
    return sum(verdict != NOT_SHOWN for verdict in found) / len(found)


def test_what_hides_an_effect():
    sure = [-0.01, -0.0101, -0.0099, -0.01, -0.01]
    floor = compare(sure, [0.02, -0.02, 0.01])
    assert floor.floor_limits and floor.detectable > floor.noise_floor > 0.01
    assert floor.blocks_needed[0] < 5 and floor.blocks_needed[1] > 3  # more A/A blocks would do
    scattered = compare([-0.03, 0.01, -0.02, 0.005, -0.01], [1e-4, -1e-4, 0.0])
    assert not scattered.floor_limits and scattered.blocks_needed[0] > 5
    # What the runs have in common, or their last digit, no number of them takes away.
    assert compare(sure, [-0.02, -0.0201, -0.0199, -0.02]).blocks_needed is None
    assert compare(sure, [0.0, 0.0], resolution=0.02).blocks_needed is None
    assert compare([0.0, 0.0], [0.0, 0.0]).blocks_needed is None


def test_plan():
    blocks = plan_blocks(5, 3)
    kinds = "".join("-" if kind == "A/A" else "+" for kind, _ in blocks)
    assert sorted(kinds) == sorted("+++++---") and "--" not in kinds and "+++" not in kinds
    assert [order for kind, order in blocks if kind == "A/B"] == ["ABBA", "BAAB"] * 2 + ["ABBA"]
    assert [order for kind, order in blocks if kind == "A/A"] == ["ABBA", "BAAB", "ABBA"]


def test_times_of_an_output():
    text = "train_time:1ms\nstep:2/2 val_loss:4.1 train_time:1234ms step_avg:12.34ms\nnanms"
    assert ab.last_time("train_time", text) == pytest.approx((1.234, 1e-3))
    assert ab.last_time("step_avg", text) == pytest.approx((0.01234, 1e-5))
    assert ab.last_time("train_time", "train_time:503.169s") == pytest.approx((503.169, 1e-3))
    assert ab.last_time("train_time", "train_time:nanms") is None


def test_faster_command_and_going_on(tmp_path, capsys):
    path = tmp_path / "new" / "ab.json"
    words = ["ab", "--a", "echo train_time:200ms", "--b", "echo train_time:20ms", *SHORT]
    words += ["--metric", "train_time", "--json", str(path)]
    assert cli.main(words) == 0
    assert "verdict: B is faster" in capsys.readouterr().out
    state = json.loads(path.read_text())
    assert state["result"]["verdict"] == FASTER and state["result"]["high"] < 0.2
    assert len(state["warm_up"]) == 2 and len(state["blocks"]) == 4
    for block in state["blocks"]:
        sides = "".join(r["side"] for r in block["runs"])
        assert sides == ("AAAA" if block["kind"] == "A/A" else block["order"])
        assert all(r["seconds"] in (0.02, 0.2) for r in block["runs"])
    # Stopped within the third block: that one is measured again, the two before are kept.
    kept, stopped = state["blocks"][:2], state["blocks"][2]
    stopped["runs"].pop()
    path.write_text(json.dumps({**state, "blocks": [*kept, stopped]}))
    assert cli.main(words) == 0
    again = json.loads(path.read_text())
    assert again["blocks"][:2] == kept and len(again["blocks"]) == 4
    assert again["interrupted_blocks"] == [stopped]
    # Finished: nothing runs. Another plan isn't mixed in.
    capsys.readouterr()
    assert cli.main(words) == 0 and "0 runs" in capsys.readouterr().out
    assert cli.main([*words, "--runs", "6"]) == 1
    assert "runs 4, not 6" in capsys.readouterr().err


def test_printed_time_is_compared(tmp_path, capsys):
    """By the time that they print; B's whole time is shorter."""
    words = ["--a", "sleep 0.1; echo train_time:100ms", "--b", "echo train_time:150ms"]
    words += [*SHORT, "--warm-up", "0", "--metric", "train_time"]
    assert cli.main(["ab", *words, "--json", str(tmp_path / "ab.json")]) == 0
    out = capsys.readouterr().out
    assert "train_time of B / A: 1.5000" in out and "verdict: B is slower" in out


def test_report_of_nothing_shown():
    unclear = compare([-0.03, 0.01, -0.02, 0.005, -0.01], [0.001, -0.001, 0.0])
    first, second = ab.verdict_text(unclear, 5, 3).splitlines()
    assert first.startswith("verdict: not shown; so many runs show an effect of 3.28%")
    assert first.endswith("the scatter of A/B blocks hides smaller ones")
    number = 2 * unclear.blocks_needed[0]
    assert second == (
        f"for one of 0.90%, as here, if it is real: a new comparison with --runs {number} "
        f"--noise-blocks 3 ({number - 10} and 0 more)"
    )
    coarse = compare([-0.01] * 5, [0.0] * 3, resolution=0.02)
    first, second = ab.verdict_text(coarse, 5, 3).splitlines()
    assert "the noise floor hides smaller ones" in first
    assert second == "no number of runs here would show one of 1.01%, as here"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--b", "echo loss is nan; exit 3"], r"--b 'echo loss is nan; exit 3' failed, code 3:\nl"),
        (["--metric", "train_time"], r"prints no train_time above 0.*--metric"),
        (["--runs", "5"], r"--runs 5: must be even"),
        (["--runs", "2"], r"--runs 2: must be even, two a block, and at least 4"),
        (["--noise-blocks", "1"], r"--noise-blocks 1: must be at least 2"),
        (["--warm-up", "-1"], r"--warm-up -1"),
        (["--json", "."], r"--json \.: is there and no file of speedrun ab"),
        (["--json", "file/x.json"], r"--json file/x.json: can't be written"),
    ],
)
def test_refusals(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = ["ab", "--a", "true", "--b", "true", *SHORT, "--json", "ab.json", *words]
    assert cli.main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("speedrun ab: error: ")
    assert re.search(message, error, re.DOTALL), error


def test_without_scipy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    words = ["--a", "true", "--b", "true", "--json", str(tmp_path / "ab.json")]
    assert cli.main(["ab", *words]) == 1
    assert "pip install 'nanogpt-speedrun[cli]'" in capsys.readouterr().err


def test_clocks_and_temperatures_are_kept(monkeypatch):
    """From a driver that says so; the second GPU's temperature is unknown."""
    clocks = iter((1980, 1200, 1980, *[1980] * 1000))

    def states(keys):
        rows = (f"{next(clocks)} MHz", "61"), ("1755 MHz", "[N/A]")
        return [dict(zip(keys, row, strict=True)) for row in rows]

    monkeypatch.setattr(ab.hardware, "gpu_states", states)
    monkeypatch.setattr(ab, "GPU_INTERVAL_S", 0.01)
    measured, _ = ab.run_once("A", "sleep 0.3", "wall")
    assert measured["seconds"] == measured["wall_s"] >= 0.3
    assert measured["gpus"] == [
        {"sm_clock_mhz": 1980, "temperature_c": 61},
        {"sm_clock_mhz": 1755, "temperature_c": None},
    ]
    monkeypatch.setattr(ab, "GPU_INTERVAL_S", 60)
    measured, _ = ab.run_once("A", "true", "wall")
    assert len(measured["gpus"]) == 2


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and nobody asked for its exit code


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped(number, tmp_path):
    """Within a run: what was measured is kept, and all that the command started ends."""
    path, child = tmp_path / "ab.json", tmp_path / "child"
    words = ["--a", "true", "--b", f"sleep 100 & echo $! > {child}; wait", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "speedrun.cli", "ab", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (child.exists() and child.read_text().endswith("\n")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and f"--json {path} goes on" in error
    assert len(json.loads(path.read_text())["warm_up"]) == 1
    while is_alive(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_equal_commands_in_reality(tmp_path):
    """Five comparisons: two verdicts other than "not shown" have a chance of 2.3 % at most."""
    command = f"{sys.executable} -I -S -c 'sum(range(2_000_000))'"
    verdicts = []
    for i in range(5):
        path = tmp_path / f"{i}.json"
        assert cli.main(["ab", "--a", command, "--b", command, "--json", str(path)]) == 0
        verdicts.append(json.loads(path.read_text())["result"]["verdict"])
    assert sum(v != NOT_SHOWN for v in verdicts) <= 1, verdicts
