"""Runs that stop and go on: bitwise on as many ranks, to rounding on others."""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import random_tokens, write_shard
from speedrun import train as program
from speedrun.checkpoint import checkpoints_of, folder_of, verified
from speedrun.config import Config
from speedrun.data import BYTES
from speedrun.failures import EXIT_STOPPED
from train_helpers import (
    read_events,
    read_losses,
    start_training,
    tiny_sets,
    train,
)

STEPS = 16
# Stages end at 5, 11 and 16; Adam runs at odd steps, and head and embedding part behind step 7.
# Several ranks send the bigram table by rows, of which no step touches all.
SETS = tiny_sets(
    schedule__num_steps=STEPS,
    model__bigram_rows=4096,
    schedule__untie_frac=0.4,
    optim__normuon__lr=0.02,
    optim__replicate_below=64,
    optim__sparse_rows_threshold=1,
    schedule__stages__1__tokens_per_step=512,
)
WORDS = ["--data", "shards", "--device", "cpu", "--deterministic", *SETS]
LONG = ["--set", "schedule.num_steps=300", "--set", "schedule.val_interval=300"]
# Sums in another order, then 16 steps: float32 losses around 3 differ by a few of their last bits.
OTHER_ORDER = dict(rel=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with shards of 3 to 4 steps each."""
    folder = tmp_path_factory.mktemp("resume")
    shards = folder / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text(json.dumps(vars(BYTES)))
    for i in range(5):
        write_shard(shards / f"made_train_{i:06d}.bin", random_tokens(5000, seed=i))
    write_shard(shards / "made_val_000000.bin", random_tokens(2100, seed=9))
    return folder


@pytest.fixture(scope="module")
def run_here(folder):
    """Trains in this process, in `folder`; gives the exit code."""

    def run(*words):
        parser = argparse.ArgumentParser()
        program.add_arguments(parser)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(program.hardware, "num_cpus", lambda: 1)  # threads spin where they wait
            try:
                return program.run(parser.parse_args([*WORDS, *map(str, words)]))
            finally:
                torch.use_deterministic_algorithms(False)

    return run


@pytest.fixture(scope="module")
def whole(folder, run_here) -> Path:
    """A run to the end with a checkpoint at each step."""
    assert run_here("--out", "whole", "--save-every", 1, "--keep", 100) == 0
    return folder / "whole"


def test_each_step_is_kept(whole, folder):
    assert [path.name for path in checkpoints_of(whole)] == [
        f"step-{step:06d}" for step in range(STEPS, 0, -1)
    ]
    manifest = verified(folder_of(whole, 6))
    assert isinstance(manifest.config, Config) and manifest.step == 6 and manifest.elapsed_s > 0
    assert manifest.position.shard == 1  # in the middle of the second of five


def resumed_as(whole, folder, run_here, step, name):
    """Goes on from a checkpoint in a run of its own; all losses and the end's state are equal."""
    source = folder_of(whole, step)
    assert run_here("--out", name, "--resume", source, "--save-every", STEPS) == 0
    assert read_losses(folder / name) == [
        (kind, at, loss)
        for kind, at, loss in read_losses(whole)
        if at > step or (at == step and kind == "validation")
    ]
    ends = folder_of(whole, STEPS), folder_of(folder / name, STEPS)
    tensors = [(end / "__0_0.distcp").read_bytes() for end in ends]
    assert tensors[0] == tensors[1]
    one, other = map(verified, ends)
    assert one.position == other.position and one.trends == other.trends
    assert other.elapsed_s > verified(source).elapsed_s


# 5: a stage's end, odd; 8: behind the split, even; 10: a validation.
@pytest.mark.parametrize("step", [5, 8, 10])
def test_resumed_run_is_bitwise_the_uninterrupted_one(whole, folder, run_here, step):
    resumed_as(whole, folder, run_here, step, f"from_{step}")


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in range(1, STEPS + 1) if step not in (5, 8, 10)])
def test_any_step_will_do(whole, folder, run_here, step):
    resumed_as(whole, folder, run_here, step, f"from_{step}")


def test_the_same_folder_goes_on(whole, folder, run_here, capsys):
    """A signal stops the run; --resume auto goes on in its folder and logs."""
    wanted = read_losses(whole)
    take_step = program.forward_backward

    def forward_backward(model, optimizer, batches, plan, *rest):
        if plan.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(model, optimizer, batches, plan, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "forward_backward", forward_backward)
        # The warm-up runs every shape at its stage's first step, and none of these is 6.
        assert run_here("--out", "stopped") == EXIT_STOPPED
    assert "stopped before step 7; saved" in capsys.readouterr().err
    run = folder / "stopped"
    assert [path.name for path in checkpoints_of(run)] == ["step-000007"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "trai')  # as a kill leaves it
    assert run_here("--out", "stopped", "--resume", "auto") == 0
    assert read_losses(run) == wanted
    resumed = [event for event in read_events(run) if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [7]
    # At its end there is nothing to do but to validate.
    assert run_here("--out", "stopped", "--resume", "stopped") == 0
    assert read_losses(run)[-1] == wanted[-1]


def test_auto_begins_anew_where_there_is_nothing(folder, run_here):
    """Nothing is drawn from the global generators either, whose state no checkpoint holds."""
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert run_here("--out", "new", "--resume", "auto", "--steps", 4) == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert (folder / "new" / "checkpoints" / "step-000004").is_dir()


def damage(checkpoint):
    path = checkpoint / "__0_0.distcp"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_checkpoint_is_left_out(whole, folder, run_here, capsys):
    assert run_here("--out", "old", "--save-every", 4) == 0
    run = folder / "old"
    assert [path.name for path in checkpoints_of(run)] == ["step-000016", "step-000012"]
    damage(run / "checkpoints" / "step-000016")
    assert run_here("--out", "old", "--resume", run / "checkpoints" / "step-000016") == 1
    assert "__0_0.distcp isn't as it was written" in capsys.readouterr().err
    (run / "checkpoints" / "step-000009.tmp").mkdir()
    assert run_here("--out", "old", "--resume", "auto", "--save-every", 4) == 0
    assert "left out: old/checkpoints/step-000016: damaged" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000012",
        "step-000016",
        "step-000016.bad",
    ]
    assert read_losses(run)[-1] == read_losses(whole)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "optim.adam.wd=0.1"], r"optim\.adam\.wd: 0\.005 in the checkpoint, 0\.1 now"),
        (["--seed", 3], r"--seed: 0 in the checkpoint, 3 now"),
        (["--recipe", "tiny_plain"], r"is of another run"),
        (["--resume", "nowhere"], r"--resume nowhere: neither a checkpoint"),
        (["--save-every", -1], r"--save-every -1"),
        (["--save-every", 4, "--keep", 0], r"--keep 1 or more"),
    ],
)
def test_refused(whole, folder, run_here, capsys, words, message):
    if "--resume" not in words:
        words = ["--resume", folder_of(whole, 5), *words]
    assert run_here("--out", "refused_" + re.sub(r"\W", "", str(words[-1])), *words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_auto_needs_a_folder(run_here, capsys):
    assert run_here("--resume", "auto") == 1
    assert "--resume auto: needs --out" in capsys.readouterr().err


def test_other_settings_may_change(whole, run_here):
    words = ["--set", "log_interval=1", "--set", "schedule.val_interval=3"]
    assert run_here("--out", "changed", "--resume", folder_of(whole, 15), *words) == 0


@contextlib.contextmanager
def full_disk_from(step):
    """From this step of the runs inside on, files may have 50 kB."""
    resource = pytest.importorskip("resource")
    take_step, limits = program.forward_backward, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def forward_backward(model, optimizer, batches, plan, *rest):
        if plan.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return take_step(model, optimizer, batches, plan, *rest)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, "forward_backward", forward_backward)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


CANT = r"step-0000{}: the checkpoint can't be written \(.*\)"


def test_a_disk_that_is_full(folder, run_here, capsys):
    """The second checkpoint can't be written: the first is as it was, nothing half-written."""
    with full_disk_from(7):
        assert run_here("--out", "full", "--save-every", 4) == 1
    assert re.search("full/checkpoints/" + CANT.format("08"), capsys.readouterr().err)
    assert [path.name for path in (folder / "full" / "checkpoints").iterdir()] == ["step-000004"]
    assert verified(folder / "full" / "checkpoints" / "step-000004").step == 4


def test_a_save_that_nobody_asked_for_costs_no_result(run_here, capsys):
    with full_disk_from(7):
        assert run_here("--out", "unasked") == 0
    out = capsys.readouterr().out
    assert re.search("warning: unasked/checkpoints/" + CANT.format("16"), out)
    assert "final val_loss" in out


# ---- Several ranks ------------------------------------------------------------------------------


def assert_close(run, whole, first):
    ours, wanted = read_losses(run), [e for e in read_losses(whole) if e[1] > first]
    ours = [event for event in ours if event[1] > first]
    assert [event[:2] for event in ours] == [event[:2] for event in wanted]
    losses = [event[2] for event in ours]
    assert losses == pytest.approx([event[2] for event in wanted], **OTHER_ORDER)


def test_two_ranks_go_on_with_what_one_saved(whole, folder):
    """At an odd step: gradients wait for Adam, and rows of the bigram table are noted anew."""
    words = ["--out", "two", "--resume", folder_of(whole, 9), "--save-every", 4]
    run = train(folder, *WORDS, *words, ranks=2)
    assert run.code == 0, run.err
    assert "saved by 1 ranks, resumed by 2" in run.out
    assert_close(folder / "two", whole, 9)
    assert verified(folder_of(folder / "two", STEPS)).world_size == 2


@pytest.mark.slow
def test_four_ranks(whole, folder):
    """Bitwise as they were on four; to rounding on one and two."""
    run = train(folder, *WORDS, "--out", "four", "--save-every", 1, "--keep", 100, ranks=4)
    assert run.code == 0, run.err
    for step, ranks in [(7, 4), (9, 4), (8, 4), (9, 2), (9, 0), (8, 0)]:
        name, source = f"four_{step}_{ranks}", folder_of(folder / "four", step)
        run = train(folder, *WORDS, "--out", name, "--resume", source, ranks=ranks)
        assert run.code == 0, run.err
        if ranks == 4:
            assert read_losses(folder / name) == [
                e for e in read_losses(folder / "four") if e[1] > step
            ]
        else:
            assert_close(folder / name, whole, step)


# ---- Kills --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_in_a_row(folder):
    """SIGKILL at random times, in saving too: the last loss is that of the uninterrupted run."""
    words = [*WORDS, *LONG, "--save-every", 3]
    uninterrupted = train(folder, *words, "--out", "unkilled")
    assert uninterrupted.code == 0, uninterrupted.err
    draw = random.Random(0)
    metrics = folder / "killed" / "metrics.jsonl"
    num_kills = 0
    while True:
        process = start_training(folder, *words, "--out", "killed", "--resume", "auto")
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and num_kills < 20:
            if metrics.exists() and metrics.read_bytes()[size:].count(b'"training"') > 0:
                time.sleep(draw.uniform(0, 0.5))
                process.kill()
                num_kills += process.wait() == -signal.SIGKILL
            time.sleep(0.01)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            break
    assert num_kills == 20
    losses = [dict((e[:2], e[2]) for e in read_losses(folder / n)) for n in ("unkilled", "killed")]
    assert losses[0] == losses[1]
