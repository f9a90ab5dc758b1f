"""More than 8 ranks, and more than one host: parts, sums, what is allowed, real rendezvous."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import BACKENDS, all_steps, random_tokens, write_shard
from speedrun import data, recipes
from speedrun import train as program
from speedrun.batch import LossWeights
from speedrun.comms import Comms
from speedrun.config import ConfigError, num_parts
from speedrun.data import BYTES, BatchShape, DataError, StepBatch
from speedrun.model import GPT
from speedrun.optim import Optimizer
from speedrun.schedule import Schedule
from speedrun.sources import batch_shapes, made_up_batch, to_micro_batches
from speedrun.world_size import check_world_size, record_obstacles
from train_helpers import (
    FLOAT64_NOISE,
    make_batch,
    read_events,
    read_losses,
    small_config,
    tiny_sets,
    train,
    write_text,
)

MANY = [16, 32]
SLURM_JOB = Path(__file__).parents[1] / "docs" / "slurm.sh"


# ---- Parts of a step ----------------------------------------------------------------------------
def steps_of_all_ranks(shards, shapes, world_size, **options):
    """Inputs and targets of each step, a row for each part."""
    ranks = [
        all_steps(shards, shapes, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    assert all(len({rank[i].position for rank in ranks}) == 1 for i in range(len(ranks[0])))
    return [
        tuple(
            np.concatenate([getattr(step, name) for step in steps])
            for name in ("inputs", "targets")
        )
        for steps in zip(*ranks, strict=True)
    ]


def whole_documents(tokens, shape, num_parts):
    """The definition: documents in order, each cut, until a part and one more token are filled."""
    starts = np.flatnonzero(tokens == BYTES.bos_id)
    documents = iter([d[: shape.max_seq_len] for d in np.split(tokens, starts)[1:]])
    for _ in range(shape.steps):
        parts = []
        for _ in range(num_parts):
            part = []
            while len(part) <= shape.tokens_per_part:
                part.extend(next(documents))
            parts.append(part[: shape.tokens_per_part + 1])
        yield np.array(parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", MANY)
def test_a_part_a_rank(tmp_path, backend, world_size):
    tokens, shape = random_tokens(15_000, seed=1), BatchShape(3, 50, 16, 51)
    shard = write_shard(tmp_path / "train.bin", tokens)
    steps = steps_of_all_ranks([shard], [shape], world_size, backend=backend)
    for step, expected in zip(steps, whole_documents(tokens, shape, world_size), strict=True):
        np.testing.assert_array_equal(step[0], expected[:, :-1])
        np.testing.assert_array_equal(step[1], expected[:, 1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", MANY)
def test_a_lane_a_rank(tmp_path, backend, world_size):
    """Long documents: rank r reads its own stretch of the text, and all tokens are used."""
    num_tokens = 6_007
    tokens = np.arange(num_tokens) % 256  # says where it is
    shard = write_shard(tmp_path / "train.bin", tokens)
    lane = -(-(num_tokens - 1) // world_size)
    shape = BatchShape(-(-lane // 60), 60, 25, 61)
    options = dict(long_documents="split", backend=backend)
    used = set()
    for number, (inputs, targets) in enumerate(
        steps_of_all_ranks([shard], [shape], world_size, **options)
    ):
        for part in range(world_size):
            begin = part * (num_tokens - 1 - lane) // (world_size - 1)
            begin += min(60 * number, lane - 60)
            np.testing.assert_array_equal(inputs[part], tokens[begin : begin + 60])
            np.testing.assert_array_equal(targets[part], tokens[begin + 1 : begin + 61])
            used |= set(range(begin, begin + 60))
    assert used == set(range(num_tokens - 1))


def test_whole_sequences_are_the_same_on_any_number_of_ranks(tmp_path):
    """Of the track `optimization`: 640 tokens a step in sequences of 20, dealt to 8 or 16 parts."""
    shard = write_shard(tmp_path / "train.bin", random_tokens(2_000, seed=2))
    options = dict(batching="consecutive", bigram_table_rows=0, sign_table_rows=0)
    eight = steps_of_all_ranks([shard], [BatchShape(3, 80, 20, 5)], 8, **options)
    sixteen = steps_of_all_ranks([shard], [BatchShape(3, 40, 20, 3)], 16, **options)
    for a, b in zip(eight, sixteen, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x.reshape(-1, 20), y.reshape(-1, 20))


def test_the_schedule_is_checked_with_so_many_parts(tmp_path):
    """A part's documents are cut: 16 small parts want other tokens than 8 large ones."""
    shard = write_shard(tmp_path / "train.bin", random_tokens(1_300, seed=3, longest=100))
    options = dict(format=BYTES, long_documents="cut", repeat=False)
    data.check_schedule([shard], [BatchShape(1, 100, 100, 101)], world_size=8, **options)
    with pytest.raises(DataError, match=r"needs 1 steps, 800 tokens; .* fill 0 steps"):
        data.check_schedule([shard], [BatchShape(1, 50, 100, 51)], world_size=16, **options)


# ---- What they sum up to ------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [8, *MANY])
def test_gradient_of_a_step(ranks):
    """Summed over ranks: that of the loss at all positions of all parts, over 8, in float64."""
    config = small_config()
    plan = Schedule(config.schedule).plan(0)
    whole = make_batch(config.model, num_parts(ranks), [0, 5, 20])
    model = GPT(config.model, torch.float64)
    model.init_weights(0)
    loss = model.training_loss(whole, model.plan_windows(whole, plan.windows), LossWeights())
    expected = torch.autograd.grad(loss / 8, list(model.parameters()))
    rows = [whole.inputs_PT, whole.targets_PT, np.tile([0, 5, 20], (num_parts(ranks), 1))]
    rows = [np.asarray(t, np.int32) for t in (*rows, whole.bigram_rows_PT, whole.sign_rows_PT)]
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms())
    for rank in range(ranks):
        batch = StepBatch(*(t[rank::ranks] for t in rows), position=None)
        batches = to_micro_batches(batch, config, torch.device("cpu"))
        program.forward_backward(model, optimizer, batches, plan)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **FLOAT64_NOISE)


@pytest.mark.parametrize("world_size", [1, 8, 16, 64])
def test_sizes_of_a_ranks_batches(world_size):
    """A step's tokens are the recipe's on any number of ranks, in the warm-up too."""
    config = recipes.load("record_089")
    schedule = Schedule(config.schedule)
    for stage, shape in zip(
        schedule.stages, batch_shapes(config, schedule, world_size), strict=True
    ):
        batch = made_up_batch(config, shape, 50_257, world_size, seed=0)
        assert batch.inputs.size * world_size == stage.tokens_per_step


# ---- What is allowed, and what is a record ------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "changes", "world_size", "message"),
    [
        ("record_089", {}, 3, "3 ranks: a step has 8 parts.* use 1, 2, 4, 8, 16, 32 or 64 ranks"),
        ("record_089", {}, 0, "0 ranks: .* use 1, 2, 4, 8, 16, 32 or 64 ranks"),
        ("record_089", {}, 24, r"131,072 tokens of stage 0 \(schedule.stages.0.tokens_per_step\)"),
        ("record_089", {}, 300, "use 1, 2, 4, 8, 16, 32, 64, 128 or 256 ranks"),
        ("optimization", {"tokens_per_step": 96}, 64, "use 1, 2, 4, 8, 12, 16, 24, 32 or 48 ranks"),
    ],
)
def test_numbers_of_ranks_that_are_refused(recipe, changes, world_size, message):
    with pytest.raises(ConfigError, match=message):
        check_world_size(with_stages(recipes.load(recipe), **changes), world_size)


def with_stages(config, **changes):
    stages = tuple(dataclasses.replace(stage, **changes) for stage in config.schedule.stages)
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stages=stages))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("recipe", ["record_089", "optimization"])
def test_records(recipe, world_size):
    """Other tokens than those of 8 ranks are no record; whole sequences stay what they are."""
    config = recipes.load(recipe)
    check_world_size(config, world_size)
    obstacles = record_obstacles(config, world_size)
    assert len(obstacles) == (world_size > 8 and recipe == "record_089")
    assert all(f"on {world_size} ranks a step has {world_size} parts" in o for o in obstacles)


def test_a_sequence_that_is_cut_is_no_record():
    longer = with_stages(recipes.load("optimization"), max_seq_len=65_536)
    assert record_obstacles(longer, 8) == [] and len(record_obstacles(longer, 16)) == 1


# ---- Several hosts ------------------------------------------------------------------------------
STEPS = 6
SETS = tiny_sets(schedule__num_steps=STEPS, schedule__val_interval=3)


def start_host(folder, endpoint, *words, num_hosts, ranks, prefix=(), **variables):
    """torchrun's agent of one host, with a folder of its own."""
    folder.mkdir()
    write_text(folder / "text.txt")
    torchrun = [f"--nnodes={num_hosts}", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint={endpoint}", "--rdzv-id=1", *words]
    program = ["-m", "speedrun.train", "--text", "text.txt", "--out", "run", *SETS]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", *torchrun, *program],
        cwd=folder,
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"} | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_of(hosts, folders) -> Path:
    """Waits for all hosts; the run that one of them has in its folder, alone.

    No host has a checkpoint: they share no folder.
    """
    try:
        outputs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0] * len(hosts), outputs
    (run,) = [path.parent for folder in folders for path in folder.glob("run/metrics.jsonl")]
    others = [folder / "run" for folder in folders if folder / "run" != run]
    assert [path for other in others for path in other.rglob("*") if path.is_file()] == []
    assert list((run / "checkpoints").glob("*")) == []
    assert sum("final val_loss" in output for output in outputs) == 1
    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """Losses of two ranks on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    write_text(folder / "text.txt")
    run = train(folder, "--text", "text.txt", "--out", "run", *SETS, ranks=2)
    assert run.code == 0, run.err
    return read_losses(folder / "run")


def test_two_agents(one_host, tmp_path):
    """Two hosts share nothing but the network, and compute what one does, bit for bit."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    endpoint = f"127.0.0.1:{free_port()}"
    hosts = [start_host(folder, endpoint, num_hosts=2, ranks=1) for folder in folders]
    assert read_losses(run_of(hosts, folders)) == one_host


@pytest.fixture
def namespaces():
    """Two network namespaces, joined by a cable, and the addresses of their ends."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making a network namespace takes root and the program ip")
    names = [f"speedrun{os.getpid()}{end}" for end in "ab"]
    links = [f"s{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        peer = ["peer", "name", links[1], "netns", names[1]]
        commands = [["link", "add", links[0], "netns", names[0], "type", "veth", *peer]]
        for name, link, address in zip(names, links, addresses, strict=True):
            commands.append(["-n", name, "addr", "add", f"{address}/24", "dev", link])
            commands += [["-n", name, "link", "set", device, "up"] for device in (link, "lo")]
        for command in commands:
            if (done := ip(*command)).returncode:
                pytest.skip(f"no network between namespaces here: {done.stderr.strip()}")
        yield list(zip(names, links, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_network_namespaces(one_host, tmp_path, namespaces):
    """Hosts that reach each other over a network device only, none by its name."""
    endpoint = f"{namespaces[0][2]}:29400"
    folders = [tmp_path / f"host{i}" for i in range(2)]
    hosts = [
        start_host(
            folder,
            endpoint,
            f"--rdzv-conf=is_host={int(i == 0)}",
            f"--local-addr={address}",
            num_hosts=2,
            ranks=1,
            prefix=["ip", "netns", "exec", name],
            GLOO_SOCKET_IFNAME=link,
        )
        for i, (folder, (name, link, address)) in enumerate(zip(folders, namespaces, strict=True))
    ]
    assert read_losses(run_of(hosts, folders)) == one_host


SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames hosts[0-1]" ] && printf "127.0.0.1\\nlocalhost\\n"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for host in host0 host1; do
  (cd $host && exec "$@") &
done
wait -n && wait -n
"""


@pytest.mark.slow
def test_slurm_job(one_host, tmp_path):
    """The job's file, as Slurm would run it, with a folder for each of two hosts."""
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
        write_text(folder / "text.txt")
    path = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {
        "PATH": os.pathsep.join(path),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "hosts[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | variables
    job = subprocess.Popen(
        ["bash", SLURM_JOB, "--text", "text.txt", "--out", "run", *SETS],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert read_losses(run_of([job], folders)) == one_host


@pytest.mark.slow
def test_sixteen_ranks_on_two_hosts(tmp_path):
    """They train, validate like any other number of ranks, and say that it is no record."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    endpoint = f"127.0.0.1:{free_port()}"
    hosts = [start_host(folder, endpoint, num_hosts=2, ranks=8) for folder in folders]
    run = run_of(hosts, folders)
    validations = [loss for event, _, loss in read_losses(run) if event == "validation"]
    assert len(validations) == 3 and validations == sorted(validations, reverse=True)
    header = read_events(run)[0]
    assert header["world_size"] == 16 and not header["record_eligible"]
    (obstacle,) = header["record_obstacles"]
    assert f"no record: {obstacle}" in (run / "log.txt").read_text()
