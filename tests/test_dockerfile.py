"""The Dockerfile pins what constraints.txt pins, and its install lines work in a fresh venv."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTALLS = re.findall(r"^RUN (.*\bpip install .*)$", DOCKERFILE, re.MULTILINE)


def constraints() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            found.setdefault(name, set()).add(version)
    return found


def test_pins_agree():
    pins = re.findall(r"([\w-]+)==([\w.]+)", " ".join(INSTALLS))
    assert len(pins) >= 10
    for name, version in pins:
        assert version in constraints()[name], f"{name}=={version} is not what constraints.txt has"


def test_every_package_is_pinned():
    for line in INSTALLS:
        words = [w for w in line.partition("pip install ")[2].split() if not w.startswith("-")]
        assert all("==" in word or word == "." for word in words), line


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the Dockerfile's pins need Python 3.11")
def test_install_lines_work_in_a_fresh_venv(tmp_path):
    """As written, but for the CUDA build: `_C` has its own test in test_build.py."""
    subprocess.run(["git", "clone", "-q", str(ROOT), tmp_path / "clone"], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clone/.venv"], check=True)
    for line in INSTALLS:
        command = line.replace("SPEEDRUN_CUDA=1", "SPEEDRUN_CUDA=0")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path / "clone")
    command = [".venv/bin/speedrun", "--version"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path / "clone", env=environment
    )
    assert result.stdout.startswith("speedrun "), result.stderr
