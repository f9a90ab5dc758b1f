"""What others import: names and their docstrings, types, and the examples of the README."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speedrun.optim
from speedrun import ops

ROOT = Path(__file__).resolve().parents[1]
SECTION = (
    (ROOT / "README.md").read_text().partition("## In your own code\n")[2].partition("\n## ")[0]
)
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
NOT_OPERATORS = {"use_backend", "backends_used"}
OPERATORS = [
    name
    for name in ops.__all__
    if inspect.isfunction(getattr(ops, name)) and name not in NOT_OPERATORS
]
TYPES = r"int32|bf16|bfloat16|float32|fp32|FP8|float64|floating|[Tt]ypes"


@pytest.mark.parametrize("name", OPERATORS)
def test_help_has_shapes_types_errors_and_source(name):
    text = inspect.getdoc(getattr(ops, name))
    assert re.search(r"\((?:…|\.\.\.|[A-Z]|\d*[A-Z]),? ?[^()]*\)|\(\.\.\.\)", text), "no shape"
    assert re.search(TYPES, text), "no type"
    assert re.search(r"TypeError|ValueError|rrors as for|rrors and source as for", text), "no error"
    assert "ource" in text, "no source"


def test_all_names_are_in_the_overview():
    missing = [name for name in ops.__all__ if not re.search(rf"\b{name}\b", ops.__doc__)]
    assert not missing
    namespace = {}
    exec("from speedrun.ops import *", namespace)
    assert set(ops.__all__) <= namespace.keys()


def test_signatures_are_annotated():
    functions = [getattr(ops, name) for name in ops.__all__]
    functions += [speedrun.optim.NorMuon.__init__, speedrun.optim.NorMuon.load_state_dict]
    for function in functions:
        if not inspect.isfunction(function):
            continue
        for name, parameter in inspect.signature(function).parameters.items():
            annotated = parameter.annotation is not parameter.empty or name == "self"
            assert annotated, f"{function.__name__}: {name}"


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("number", range(3))
def test_examples_run(number, capsys):
    torch.manual_seed(0)
    namespace = {}
    code = EXAMPLES[number]
    exec(compile(code, f"README.md, example {number}", "exec"), namespace)
    if number == 0:
        model, x, y = (namespace[name] for name in ("model", "x", "y"))
        torch.manual_seed(0)
        untrained = {}
        exec(code.partition("for step")[0], untrained)
        first_loss = torch.nn.functional.cross_entropy(untrained["model"](x), y)
        assert torch.nn.functional.cross_entropy(model(x), y) < 0.8 * first_loss
    elif number == 1:
        exact = namespace["a"].float() @ namespace["b"].float().mT
        error = (namespace["product"].float() - exact).norm() / exact.norm()
        assert namespace["product"].shape == (32, 48) and error < 0.05
        assert "'fp8_matmul': (" in capsys.readouterr().out
    else:
        assert namespace["loss"].isfinite()
        assert all(namespace[name].grad.isfinite().all() for name in ("x", "head"))


USER_PROGRAM = """
import torch
from torch import Tensor

from speedrun.ops import fp8_matmul, polar_express, softcap_ce, transpose, use_backend
from speedrun.optim import NorMuon


def train(weight: torch.nn.Parameter) -> Tensor:
    optimizer = NorMuon([{"params": [weight], "lr": 0.1}], polar_form="gram")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    optimizer.step()
    scheduler.step()
    with use_backend("torch", "transpose"):
        return transpose(weight.detach())


def multiply(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return fp8_matmul(a, b, scale, scale, fast_accum=True)
"""
WRONG_PROGRAM = """
import torch

from speedrun.ops import fp8_matmul
from speedrun.optim import NorMuon

NorMuon([torch.zeros(2, 2)], polar_form="round")
fp8_matmul(1, torch.zeros(2), torch.zeros(1), torch.zeros(1))
"""


@pytest.mark.slow
def test_users_programs_are_checked_by_mypy(tmp_path):
    pytest.importorskip("mypy")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(USER_PROGRAM)
    wrong.write_text(WRONG_PROGRAM)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            "--cache-dir",
            tmp_path,
            right,
            wrong,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    *found, summary = run.stdout.splitlines()
    assert [line.partition(" error:")[0] for line in found] == ["wrong.py:7:", "wrong.py:8:"], found
    assert "polar_form" in found[0] and '"int"; expected "Tensor"' in found[1]
    assert summary.startswith("Found 2 errors in 1 file")
