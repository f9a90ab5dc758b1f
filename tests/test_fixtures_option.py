"""`./test.sh --fixtures PATH`: shared data must be there. The conftest runs on made-up tests."""

import os
import subprocess
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]

TESTS = """
import pytest

def test_with_data(shared_data):
    assert (shared_data / "golden_089").is_dir()

def test_one_file(shared_data):
    if not (shared_data / "golden_089" / "io.npz").is_file():
        pytest.skip(f"no {shared_data / 'golden_089' / 'io.npz'}")

def test_by_variable():
    pytest.skip("no rank file; SPEEDRUN_SHARED_DATA names the folder")

def test_of_hardware():
    pytest.skip("needs a CUDA device")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs TESTS with these words, where the variable names a folder that isn't there."""
    monkeypatch.setenv("SPEEDRUN_SHARED_DATA", str(pytester.path / "nowhere"))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(TESTS)
    (pytester.path / "data" / "golden_089").mkdir(parents=True)
    return lambda *words: pytester.runpytest_inprocess("-rs", "-p", "no:cacheprovider", *words)


def test_without_data_tests_skip(run):
    result = run()
    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines("*no golden_089 in *nowhere; SPEEDRUN_SHARED_DATA names*")


def test_skips_for_want_of_data_fail(run):
    result = run("--shared-data=data")
    result.assert_outcomes(passed=1, skipped=1, failed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines("skipped in spite of --shared-data: *no */data/golden_089/io.npz")
    result.stdout.fnmatch_lines("--shared-data */data: 1 passed, 2 failed, 0 error, 1 skipped")


def test_with_all_data(run, pytester):
    (pytester.path / "data" / "golden_089" / "io.npz").touch()
    result = run("--shared-data=data", "-k", "not variable")
    result.assert_outcomes(passed=2, skipped=1, deselected=1)
    assert result.ret == pytest.ExitCode.OK


def test_a_wrong_folder_is_refused(run):
    result = run("--shared-data=data/golden_089")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*data/golden_089: no folder golden_089 in it; give its parent")


ALL_AT_ONCE = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["-m", "not slow and not gpu and not multigpu", *ALL_AT_ONCE]),
        (
            ["--fixtures", "data"],
            ["-m", "not slow and not gpu and not multigpu", "--shared-data={}", *ALL_AT_ONCE],
        ),
        (["-m", "slow", "-x"], ["-m", "slow", "-x"]),
        (
            ["-q", "--fixtures", "data", "tests/a b.py"],
            [
                "-m",
                "not slow and not gpu and not multigpu",
                "-q",
                "--shared-data={}",
                "tests/a b.py",
            ],
        ),
        (["--fixtures=data", "-m", "slow"], ["--shared-data={}", "-m", "slow"]),
    ],
    ids=lambda words: " ".join(words) or "none",
)
def test_words_of_the_script(tmp_path, words, expected):
    """PATH is relative to where the command is given; all else goes to pytest as it is."""
    for folder in ("there/.ci", "there/.venv/bin", "here/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there/.ci/setup.sh").write_text("setup_venv() { :; }\n")
    python = tmp_path / "there/.venv/bin/python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "there/test.sh").write_text((ROOT / "test.sh").read_text(encoding="utf-8"))
    command = ["bash", tmp_path / "there/test.sh", *words]
    run = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    folder = os.path.realpath(tmp_path / "here/data")
    wanted = ["-m", "pytest", *(word.format(folder) for word in expected)]
    assert run.stdout.splitlines() == wanted, run.stderr
