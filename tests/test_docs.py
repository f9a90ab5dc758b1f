"""Documents: their links lead somewhere, their commands are taken, their names exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from speedrun import cli
from speedrun.techniques import TECHNIQUES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("records/README.md"),
        *ROOT.glob("records/hardware/README.md"),
    ]
)
COMMAND = re.compile(r"^(?:\.venv/bin/)?speedrun ([a-z]+.*)$", re.MULTILINE)
INLINE = re.compile(r"`speedrun ([a-z]+)[ `]")


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands_of(path):
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text_of(path), re.MULTILINE | re.DOTALL)
    return [command for block in blocks for command in COMMAND.findall(block)]


def test_there_is_something_to_test():
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "many_hosts.md", "from_45_minutes.md"} <= names
    assert len(commands_of(ROOT / "README.md")) > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    for target in re.findall(r"\]\(([^)#\s]+)", text_of(path)):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(path, capsys):
    """By the parser of their verb; "…" stands for more, words in capitals for a value."""
    assert set(INLINE.findall(text_of(path))) <= set(cli.verbs())
    for command in commands_of(path):
        verb, *words = shlex.split(command, comments=True)
        if "…" in command or "|" in words:
            continue
        assert verb in cli.verbs(), f"{path}: speedrun {command}"
        parser = argparse.ArgumentParser()
        importlib.import_module(f"speedrun.commands.{verb}").add_arguments(parser)
        words = ["1" if re.fullmatch(r"[A-Z]", word) else word for word in words]
        try:
            parser.parse_args(words)
        except SystemExit as end:
            assert end.code == 0, f"{path}: speedrun {command}: {capsys.readouterr().err}"


def test_techniques_of_the_history():
    tables = text_of(ROOT / "docs" / "from_45_minutes.md").split("## The model")[1]
    named = set(re.findall(r"`([a-z0-9_]+)`", tables))
    assert set(TECHNIQUES) - {"fp8_projections"} <= named


def test_each_kernel_has_a_page():
    kernels = ROOT / "python" / "speedrun" / "triton_kernels"
    stems = {path.stem for path in kernels.glob("[a-z]*.py")}
    assert {path.stem for path in ROOT.glob("docs/kernels/*.md")} == stems
