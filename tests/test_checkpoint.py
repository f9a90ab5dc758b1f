"""Checkpoints as files: what is in them, that no changed byte passes, exports."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speedrun import checkpoint, cli, recipes
from speedrun.checkpoint import CheckpointError, Damaged, Manifest, load_for_inference, verified
from speedrun.comms import Comms
from speedrun.config import ConfigError, from_dict, to_dict
from speedrun.data import BYTES, LoaderPosition
from speedrun.estimate import Precision
from speedrun.model import GPT
from speedrun.optim import Optimizer
from train_helpers import SPLIT_PLANS, add_gradients, normal, small_config

STEP = 3
SLOWNESS = [HealthCheck.function_scoped_fixture]


def model_and_optimizer(seed, dtype=torch.bfloat16, fp8=True):
    config = small_config()
    model = GPT(config.model, dtype, fp8)
    model.init_weights(seed)
    optim = dataclasses.replace(config.optim, replicate_below=64)
    return model, Optimizer(model.named_parameters(), optim, Comms(), model.named_buffers)


def trained(seed=1):
    """A model in bf16 with exact weights and FP8 scales, in the middle of an Adam interval."""
    model, optimizer = model_and_optimizer(seed)
    params = dict(model.named_parameters())
    for step in range(STEP):
        add_gradients(params, {n: normal(*p.shape, dtype=p.dtype) for n, p in params.items()})
        optimizer.step(SPLIT_PLANS.plan(step))
    for name, buffer in model.named_buffers():
        if "." in name:
            buffer.fill_(0.25)
    return model, optimizer


def manifest_of(**changes):
    values = dict(
        step=STEP,
        world_size=1,
        elapsed_s=1.5,
        position=LoaderPosition(1, 2, 3),
        config=small_config(),
        format=BYTES,
        precision=Precision(torch.bfloat16, True),
        facts={"--seed": "1"},
        trends={},
        environment={},
    )
    return Manifest(**(values | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, optimizer, the folder of their checkpoint)."""
    model, optimizer = trained()
    folder = checkpoint.folder_of(tmp_path_factory.mktemp("run"), STEP)
    checkpoint.write(folder, checkpoint.host_copy(optimizer, 0, None), manifest_of(), 0, None)
    return model, optimizer, folder


def test_all_state_comes_back(saved):
    """Weights with their low bits, moments, counters, FP8 scales, waiting gradients."""
    _, optimizer, folder = saved
    assert verified(folder) == manifest_of()
    other = model_and_optimizer(seed=2)[1]
    assert checkpoint.load(folder, manifest_of(), other, 0, 1, None) == []
    for one, two in (
        ({n: s.tensor for n, s in o.state().items()} | o.unused_gradients() for o in pair)
        for pair in [(optimizer, other)]
    ):
        assert one.keys() == two.keys()
        kinds = {name.split(".")[-1] for name in one}
        assert {"low", "momentum", "exp_avg", "t", "post_scale_L"} <= kinds
        assert "grad.embed" in one
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), name


def test_another_number_of_ranks(saved, tmp_path):
    """FP8's scales are the largest; waiting gradients are summed on rank 0; and it is said."""
    _, optimizer, _ = saved
    state = checkpoint.host_copy(optimizer, 0, None)
    scales = {n: t for n, t in state.items() if n.endswith("post_scale_L")}
    gradients = {n: t for n, t in state.items() if n.startswith("rank0.grad.")}
    assert scales and gradients
    state |= {n.replace("rank0", "rank1"): 2 * t for n, t in (scales | gradients).items()}
    others = {n: t for n, t in state.items() if n.startswith("rank0.") and n not in gradients}
    state |= {n.replace("rank0", "rank1"): t for n, t in others.items() if n not in scales}
    folder, manifest = tmp_path / "step-000003", manifest_of(world_size=2)
    checkpoint.write(folder, state, manifest, 0, None)
    other = model_and_optimizer(seed=2)[1]
    notes = checkpoint.load(folder, manifest, other, 0, 1, None)
    assert [note.split()[0] for note in notes] == ["saved", "FP8", "gradients"]
    for name, tensor in other.unused_gradients().items():
        assert torch.equal(tensor, gradients[f"rank0.{name}"] + 2 * gradients[f"rank0.{name}"])
    found = {n: s.tensor for n, s in other.state().items() if n.endswith("post_scale_L")}
    assert all(torch.all(t == 0.5) for t in found.values())


def test_the_sums_are_those_of_sha256sum(saved):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    command = ["sha256sum", "--check", "--strict", checkpoint.SUMS]
    assert subprocess.run(command, cwd=saved[2], capture_output=True).returncode == 0


def harm(folder, draw):
    """One change to one file of a checkpoint."""
    path = draw(st.sampled_from(sorted(folder.iterdir())))
    data = path.read_bytes()
    place = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "remove", "insert", "append", "new", "rename"]))
    if kind == "flip":
        path.write_bytes(
            data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
        )
    elif kind == "cut":
        path.write_bytes(data[:place])
    elif kind == "remove":
        path.unlink()
    elif kind == "insert":
        path.write_bytes(data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:])
    elif kind == "append":
        path.write_bytes(data + draw(st.binary(min_size=1, max_size=9)))
    elif kind == "new":
        (folder / "another").write_bytes(draw(st.binary(max_size=9)))
    else:
        path.rename(folder / "another")
    return f"{kind} {path.name} at {place}"


def no_changed_byte_passes(saved, data):
    folder = saved[2].parent / "harmed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[2], folder)
    what = harm(folder, data.draw)
    with pytest.raises(Damaged) as refusal:
        verified(folder)
    assert str(folder) in str(refusal.value), what


@settings(max_examples=40, deadline=None, suppress_health_check=SLOWNESS)
@given(st.data())
def test_no_changed_byte_passes(saved, data):
    no_changed_byte_passes(saved, data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=SLOWNESS)
@given(st.data())
def test_no_changed_byte_passes_at_length(saved, data):
    no_changed_byte_passes(saved, data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_strange_manifests_are_refused_by_name(tmp_path_factory, data):
    """A value that another version might write, with sums that fit, is no exception of Python's."""
    values = json.loads(manifest_of().to_text())
    node, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node)))
    if data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(JSON_VALUES)
    folder = tmp_path_factory.mktemp("strange")
    (folder / checkpoint.MANIFEST).write_text(json.dumps(values))
    (folder / checkpoint.SUMS).write_text(checkpoint.sha256_sums(folder))
    try:
        verified(folder)
    except CheckpointError as error:
        assert str(folder / checkpoint.MANIFEST) in str(error)


def test_a_newer_format_is_not_called_damaged(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text('{"version": 99}')
    (tmp_path / checkpoint.SUMS).write_text(checkpoint.sha256_sums(tmp_path))
    with pytest.raises(CheckpointError, match="version 99, this program's 1") as refusal:
        verified(tmp_path)
    assert not isinstance(refusal.value, Damaged)


def test_tensors_of_another_model(saved):
    model = GPT(dataclasses.replace(small_config().model, model_dim=32), torch.bfloat16)
    config = small_config().optim
    optimizer = Optimizer(model.named_parameters(), config, Comms(), model.named_buffers)
    with pytest.raises(CheckpointError, match="its tensors aren't those of this model"):
        checkpoint.load(saved[2], manifest_of(), optimizer, 0, 1, None)


@pytest.mark.parametrize("name", recipes.names())
def test_configs_come_back_from_json(name):
    config = recipes.load(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("key", "value"), [("name", 3), ("precision", "fp4"), ("optim", {}), ("log_interval", True)]
)
def test_configs_of_other_versions_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"config.{key}="):
        from_dict(to_dict(small_config()) | {key: value})


def test_a_folder_that_hosts_do_not_share(tmp_path, monkeypatch):
    """Another rank's file is on another host: no checkpoint, instead of one that can't be read."""
    folder, dcp_save = tmp_path / "step-000001", dcp.save

    def save(*args, **kwargs):
        dcp_save(*args, **kwargs)
        (folder.with_name("step-000001.tmp") / "__0_0.distcp").unlink()

    state = checkpoint.host_copy(trained()[1], 0, None)
    monkeypatch.setattr(dcp, "save", save)
    with pytest.raises(CheckpointError, match=r"such as __0_0\.distcp: all hosts must share it"):
        checkpoint.write(folder, state, manifest_of(), 0, None)
    assert list(tmp_path.iterdir()) == []


def mount(folder):
    """A file system of 300 KB there; None where this user may not."""
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs tmpfs")
def test_a_full_file_system(tmp_path):
    if not mount(tmp_path):
        pytest.skip("needs the right to mount a tmpfs")
    optimizer = trained()[1]
    state = checkpoint.host_copy(optimizer, 0, None)
    try:
        checkpoint.write(checkpoint.folder_of(tmp_path, 1), state, manifest_of(), 0, None)
        (tmp_path / "ballast").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 8192))
        with pytest.raises(CheckpointError, match=r"step-000002: the checkpoint can't be written"):
            checkpoint.write(checkpoint.folder_of(tmp_path, 2), state, manifest_of(), 0, None)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
        verified(checkpoint.folder_of(tmp_path, 1))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- Export -------------------------------------------------------------------------------------


def test_export(saved, tmp_path, capsys):
    """The weights that training's model has, from a run, a checkpoint and an export alike."""
    model, _, folder = saved
    pytest.importorskip("safetensors")
    out = tmp_path / "export"
    assert cli.main(["export", str(folder), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    wanted = {n: t for n, t in model.state_dict().items() if "." not in n}
    for source in (folder, folder.parents[1], out):
        loaded, config, data_format, step = load_for_inference(source, torch.device("cpu"))
        assert config == small_config() and data_format == BYTES and step == STEP
        assert loaded.state_dict().keys() == wanted.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype, name
    assert cli.main(["export", str(folder), "--out", str(out)]) == 1
    assert "can't be written (it exists): give a new folder" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not as `speedrun export`"):
        load_for_inference(out, torch.device("cpu"))


def test_export_of_an_earlier_version(saved, tmp_path):
    """It has no step, and counts as of the run's end; a step of no schedule is refused."""
    pytest.importorskip("safetensors")
    checkpoint.export(saved[2], tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"step": 34}))
    with pytest.raises(CheckpointError, match="step 34 is outside the schedule's 0"):
        load_for_inference(path.parent, torch.device("cpu"))
    del values["step"]
    path.write_text(json.dumps(values))
    found = load_for_inference(path.parent, torch.device("cpu"))
    assert found.step == 33 and found.plan.windows == (24, 64, found.plan.windows.yarn)


def test_nothing_to_export(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "neither a checkpoint (step-…), nor the folder of a run" in capsys.readouterr().err


def test_the_newest_whole_one_serves(saved, tmp_path):
    good = checkpoint.folder_of(tmp_path, 1)
    shutil.copytree(saved[2], good)
    shutil.copytree(saved[2], checkpoint.folder_of(tmp_path, 2))
    (checkpoint.folder_of(tmp_path, 2) / ".metadata").unlink()
    with pytest.warns(UserWarning, match="left out: .*step-000002"):
        load_for_inference(tmp_path, torch.device("cpu"))
