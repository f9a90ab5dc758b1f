"""Dumps of steps that went wrong: written by real runs, read and run again by `speedrun replay`."""

import argparse
import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from speedrun import guards, hardware, step_dump
from speedrun import train as program
from speedrun.commands import replay
from speedrun.data import BYTES, StepBatch
from speedrun.estimate import Precision
from speedrun.prefix_table import NO_PREFIX
from speedrun.runlog import RunError
from speedrun.step_dump import Origin
from train_helpers import read_events, read_losses, tiny_sets, train, write_text

ORIGIN = Origin(["--steps", "40"], BYTES, Precision(torch.bfloat16, fp8=True))
BAD_STEP = 3


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run_here(command, *words) -> Done:
    """A command's `run` in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
        patch.setattr(hardware, "num_cpus", lambda: 1)  # threads that wait for a core are slow
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.run(args)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working directory, with a text and the run `diverged`: its first update is huge."""
    folder = tmp_path_factory.mktemp("replay")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def train_here(out, **settings) -> Done:
    sets = tiny_sets(schedule__num_steps=6, schedule__val_interval=6, **settings)
    return run_here(program, "--text", "text.txt", "--out", out, *sets)


@pytest.fixture(scope="module")
def diverged(folder) -> Done:
    return train_here("diverged", optim__normuon__lr=1e15)


def first_of(text) -> str:
    return re.search(r"(?i)not finite first: (.*)", text)[1]


def test_a_run_that_diverges_names_the_tensor(folder, diverged):
    assert diverged.code == 1
    assert diverged.err.startswith("speedrun: error: step 1: the training loss is nan; the run is")
    assert re.match(r"layer 0: aten\.\w+ \(8, 128, .*float32 has (inf|NaN)", first_of(diverged.err))
    assert "Its batch is kept: speedrun replay diverged/bad_step_000001\n" in diverged.err
    assert "Lower optim.normuon.lr or optim.adam.lr by --set\n" in diverged.err  # fp32 already
    names = {path.name for path in (folder / "diverged" / "bad_step_000001").iterdir()}
    assert names == {"rank0.npz", "step.json", "weights.pt"}


def test_replay_finds_the_same(folder, diverged):
    again = run_here(replay, "diverged/bad_step_000001")
    assert (again.code, again.err) == (0, "")
    assert "step 1: the training loss is nan\nweights: those of that step\n" in again.out
    assert first_of(again.out) == first_of(diverged.err)
    parts = re.findall(r"^(embedding|layer 0|layer 1|head and loss) +\S+", again.out, re.MULTILINE)
    assert parts == ["embedding", "layer 0", "layer 1", "head and loss"]
    assert re.search(r"gradients that aren't finite: embed\[\d+\] .*; \d+ more\n", again.out)
    bf16 = run_here(replay, "diverged/bad_step_000001", "--set", "precision=bf16")
    assert "embed[" in bf16.out and "bfloat16 has NaN" in bf16.out


def test_a_later_check_keeps_the_batch_alone(folder, monkeypatch):
    """With the table of the prefix loss, where there is one."""
    table = torch.full((272,), NO_PREFIX)
    monkeypatch.setattr(program, "load_prefix_table", lambda *_: table)
    run = train_here("later", optim__normuon__lr=1e15, guards__check="loss")
    assert "With --set guards.check=step the first bad tensor is named." in run.err
    assert re.match(r"parameter \w+\[0\] .* has NaN$", first_of(run.err))
    np.testing.assert_array_equal(step_dump.read(Path("later/bad_step_000001")).prefix_table, table)
    again = run_here(replay, "later/bad_step_000001")
    assert "weights: the start values of seed 0, since the dump has none" in again.out
    assert again.out.endswith("everything is finite\n")  # it was the weights


def test_scales_of_fp8_are_those_before_the_step(folder):
    """Each pass writes new ones, which a bad step makes NaN."""
    run = train_here("fp8", optim__normuon__lr=1e15, precision="recipe")
    weights = step_dump.read(Path("fp8/bad_step_000001")).weights
    scales = {name: value for name, value in weights.items() if "." in name}
    assert scales and all(value.isfinite().all() for value in scales.values())
    again = run_here(replay, "fp8/bad_step_000001")
    assert first_of(again.out) == first_of(run.err)
    assert "try --set precision=float32" in run.err


def spoiled(function, value):
    """forward_backward with a gradient that isn't finite in one step."""

    def forward_backward(model, optimizer, micro_batches, plan, *rest):
        loss = function(model, optimizer, micro_batches, plan, *rest)
        if plan.step == BAD_STEP and rest:  # not in the warm-up
            model.vo_bank.grad[1, 2, 3] = value
        return loss

    return forward_backward


def test_a_bad_gradient_with_a_finite_loss(folder, monkeypatch):
    function = spoiled(program.forward_backward, float("inf"))
    monkeypatch.setattr(program, "forward_backward", function)
    run = train_here("gradient")
    assert (
        f"error: step {BAD_STEP}: the gradients' norm isn't finite (the training loss is "
        in run.err
    )
    assert first_of(run.err).startswith("embedding, backward: aten.")  # behind all layers
    later = train_here("gradient_later", guards__check="gradient")
    assert f"error: step {BAD_STEP}: the training loss is nan" in later.err
    assert "a gradient that is nan makes the loss nan, too" in later.err


def test_a_run_goes_on_without_a_bad_update(folder, monkeypatch):
    usual = train_here("usual")
    function = spoiled(program.forward_backward, float("nan"))
    monkeypatch.setattr(program, "forward_backward", function)
    monkeypatch.setattr(guards.LossTrend, "z", lambda *_: 12.0)
    run = train_here("left_out", guards__skip_nonfinite="true")
    assert (usual.code, run.code) == (0, 0), run.err
    assert f"step {BAD_STEP}: the gradients' norm isn't finite" in run.out
    ours, theirs = (read_losses(Path(name)) for name in ("left_out", "usual"))
    steps = [step for kind, step, _ in ours if kind == "training"]
    assert steps == [1, 2, 3, 5, 6]  # after so many
    before = [event for event in theirs if event[1] <= BAD_STEP]
    assert ours[: len(before)] == before
    assert ours[-1][0] == "validation" and ours[-1][2] != theirs[-1][2]
    kinds = [event["event"] for event in read_events(Path("left_out"))]
    assert kinds.count("left_out") == 1
    assert kinds.count("outlier") == len(steps)
    assert " is 12.0 standard deviations above the trend of " in run.out


@pytest.mark.slow
def test_a_gradient_of_one_rank_stops_both(folder, monkeypatch):
    """The message names the rank. Together they keep what one process trains on."""
    code = (
        "import argparse, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from speedrun import train\n"
        "from test_replay import spoiled\n"
        "if os.environ['RANK'] == '1':\n"
        "    train.forward_backward = spoiled(train.forward_backward, float('nan'))\n"
        "parser = argparse.ArgumentParser(); train.add_arguments(parser)\n"
        "sys.exit(train.run(parser.parse_args()))\n"
    )
    (folder / "spoilt.py").write_text(code)
    sets = tiny_sets(schedule__num_steps=6, schedule__val_interval=6)
    run = train(folder, "--text", "text.txt", "--out", "two", *sets, ranks=2, module="spoilt")
    assert run.code != 0
    for rank in (0, 1):
        message = (
            rf"rank {rank}: error: step {BAD_STEP}: the gradients' norm isn't finite .*; the run is"
        )
        assert re.search(message, run.err), run.err
    assert re.search(r"Not finite first: rank 1, embedding, backward: aten\.", run.err)
    function = spoiled(program.forward_backward, float("nan"))
    monkeypatch.setattr(program, "forward_backward", function)
    train_here("alone")
    name = f"bad_step_{BAD_STEP:06d}"
    two, alone = (step_dump.read(Path(run, name)).batch for run in ("two", "alone"))
    for name in step_dump.ARRAYS:
        np.testing.assert_array_equal(getattr(two, name), getattr(alone, name))


# ---- The files ----------------------------------------------------------------------------------


def step_batch(num_parts=8):
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 99, (num_parts, 6), dtype=np.int32) for _ in range(4)]
    return StepBatch(*arrays, sign_rows=None, position=None)


def write_dump(folder, batch, world_size=2, weights=None):
    for rank in range(world_size):
        arrays = (getattr(batch, name) for name in step_dump.ARRAYS)
        own = [None if array is None else array[rank::world_size] for array in arrays]
        step_dump.write_rank(folder, rank, StepBatch(*own, position=None), np.arange(5))
    step_dump.write_step(folder, ORIGIN, 7, "bad", world_size, weights)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_what_is_written_is_read(tmp_path, world_size):
    batch, weights = step_batch(), {"embed": torch.ones(2, dtype=torch.bfloat16)}
    write_dump(tmp_path, batch, world_size, weights)
    dump = step_dump.read(tmp_path)
    assert (dump.origin, dump.step, dump.problem) == (ORIGIN, 7, "bad")
    for name in step_dump.ARRAYS:
        np.testing.assert_array_equal(getattr(dump.batch, name), getattr(batch, name))
    np.testing.assert_array_equal(dump.prefix_table, np.arange(5))
    assert dump.weights["embed"].equal(weights["embed"])
    assert not list(tmp_path.glob("*.tmp"))


def spoil_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("step.json", Path.unlink, r"step\.json: can't be read \(No such file .*bad_step_… of a"),
        ("step.json", lambda p: p.write_text("{}"), r"step\.json: isn't what a run of this vers"),
        ("step.json", lambda p: p.write_text("[1"), r"step\.json: isn't what a run of this vers"),
        ("step.json", spoil_version, r"version 0, not 1"),
        ("rank1.npz", Path.unlink, r"rank1\.npz: is missing; 2 ranks trained: copy it from that"),
        ("rank1.npz", lambda p: p.write_bytes(p.read_bytes()[:99]), r"rank1\.npz: can't be read"),
        ("rank1.npz", lambda p: p.write_bytes(b""), r"rank1\.npz: can't be read"),
        ("rank1.npz", lambda p: np.savez(p, inputs=[1]), r"its rank\*\.npz don't go together"),
        ("weights.pt", lambda p: p.write_bytes(p.read_bytes()[:99]), r"weights\.pt: can't be re"),
    ],
)
def test_spoilt_dumps(tmp_path, name, spoil, message):
    write_dump(tmp_path, step_batch(), weights={"embed": torch.ones(2)})
    spoil(tmp_path / name)
    with pytest.raises(RunError, match=message):
        step_dump.read(tmp_path)


def test_refusals(folder, diverged):
    found = run_here(replay, "nowhere")
    assert found.code == 1 and found.err.startswith("speedrun replay: error: nowhere/step.json: ")
    dump = "diverged/bad_step_000001"
    for words, message in (
        (["--set", "model.layers=short"], "the dump's weights don't fit the config: "),
        (["--set", "model.num_heads=3"], "recipe 'tiny' can't run:"),
        (["--set", "model.bigram_gate=1"], "no setting 'bigram_gate'"),
    ):
        found = run_here(replay, dump, *words)
        assert found.code == 1 and message in found.err
    other = Path(shutil.copytree(dump, "other"))
    values = json.loads((other / "step.json").read_text())
    for argv, message in (
        (["--warp"], "other options: no --warp here"),
        (["--steps=x"], "other options: argument --steps"),
    ):
        (other / "step.json").write_text(json.dumps(values | {"argv": argv}))
        found = run_here(replay, "other")
        assert found.code == 1 and message in found.err
    with torch.no_grad():
        torch.save({"embed": torch.zeros(272, 32)}, other / "weights.pt")
    (other / "step.json").write_text(json.dumps(values))
    found = run_here(replay, "other")
    assert "the dump has no weights for lm_head, qk_bank" in found.err
