"""Collectives on 1 to 16 gloo ranks, and the optimizer over them: results, bytes, shards."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from numerics import assert_same_bits
from speedrun import recipes
from speedrun.comms import Comms
from speedrun.config import NUM_PARTS, AdamRow, MuonRow, OptimConfig
from speedrun.model import GPT
from speedrun.optim import Optimizer, communication_bytes
from train_helpers import SPLIT_PLANS, add_gradients, normal

WORLD_SIZES = (1, 2, 4, 8, 16)
DTYPES = (torch.float32, torch.bfloat16)
NUM_ROWS = (1, 5, 16)  # fewer than ranks, not divisible, divisible

TABLES = OptimConfig(
    muon_table=(MuonRow("qk_bank"), MuonRow("mlp_bank", lr_muls=(1.0, 2.0))),
    adam_table=(
        AdamRow("lm_head", 0.5, 0.95, wd_mul=150.0),
        AdamRow("embed", 0.5, 0.95, wd_mul=150.0),
        AdamRow("*_table", 0.75, 0.95, lr_mul=75.0, wd_mul=5.0, sparse=True),
        AdamRow("gate_*", 0.9, 0.99, lr_mul=5.0),
    ),
    replicate_below=30,
)
# Divisible by 1 rank only, and the last ranks have none of a bank of three.
SHAPES = {
    "qk_bank": (3, 4, 6),
    "mlp_bank": (2, 3, 9, 5),
    "embed": (21, 6),
    "lm_head": (6, 21),
    "hash_table": (37, 5),
    "gate_W1": (4, 6),
    "gate_s": (),
}
SPARSE_ROWS = SHAPES["hash_table"][0]
TOUCHED = 5  # rows of hash_table in each part of a step


def part_gradients(step, part, dtype):
    """Gradients of an eighth of a step, and the rows of hash_table where they are not 0.

    In bf16 they are small whole numbers, whose sums have no rounding in any order.
    """
    seed = 1000 * step + 100 * part
    grads = {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}
    if dtype == torch.bfloat16:
        grads = {name: (2 * grad).round().clamp(-4, 4) for name, grad in grads.items()}
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, SPARSE_ROWS, (TOUCHED,), generator=generator, dtype=torch.int32)
    untouched = torch.ones(SPARSE_ROWS, dtype=torch.bool)
    untouched[rows] = False
    grads["hash_table"][untouched] = 0
    return {name: grad.to(dtype) for name, grad in grads.items()}, rows


def start_values(dtype):
    values = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    values["embed"] = values["lm_head"].mT.contiguous()
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def train(comms, dtype, sparse_rows_threshold):
    """Six steps of this rank. For each: bytes sent, and what `communication_bytes` says."""
    config = dataclasses.replace(TABLES, sparse_rows_threshold=sparse_rows_threshold)
    parameters = start_values(dtype)
    optimizer = Optimizer(parameters.items(), config, comms)
    own_rows = comms.own_rows(SPARSE_ROWS)
    sent, expected, touched = [], [], set()
    for plan in list(SPLIT_PLANS)[:6]:
        for part in range(comms.rank, NUM_PARTS, comms.world_size):
            gradients, rows = part_gradients(plan.step, part, dtype)
            add_gradients(parameters, gradients)
            optimizer.touched("hash_table", rows.view(1, -1))
            touched |= set(rows.tolist())
        before = comms.sent.copy()
        optimizer.step(plan)
        sent.append(comms.sent - before)
        to_others = len([row for row in touched if not own_rows.start <= row < own_rows.stop])
        expected.append(
            communication_bytes(
                parameters.items(),
                config,
                comms.world_size,
                adam=plan.adam,
                tied=plan.tied,
                sparse_rows={"hash_table": to_others},
            )
        )
        touched = set() if plan.adam else touched
    return {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "state": {name: rule.state for name, rule in optimizer.rules.items()},
        "sent": sent,
        "expected": expected,
    }


def values(rank, num_rows, dtype):
    """Whole numbers, whose sums over up to 16 ranks are exact in bf16 too: at most 216."""
    rows = torch.arange(num_rows)[:, None] % 3 + 1
    return ((rank % 8 + 1) * rows * torch.tensor([1, -1])).to(dtype)


def touched_by(rank, num_rows):
    """Some rows, repeated and out of order; none at all for rank 1."""
    rows = torch.arange(num_rows - 1, -1, -1 - rank % 3)
    return torch.cat([rows, rows[:1]])[: 0 if rank == 1 else None].to(torch.int32)


def rows_of(rank, num_rows, dtype):
    x = torch.zeros(num_rows, 2, dtype=dtype)
    rows = touched_by(rank, num_rows).long()
    x[rows] = values(rank, num_rows, dtype)[rows]
    return x


def collectives(comms):
    found = {}
    for dtype in DTYPES:
        for num_rows in NUM_ROWS:
            x, own = values(comms.rank, num_rows, dtype), comms.own_rows(num_rows)
            kept = x.clone()
            summed = comms.reduce_scatter(x)
            rows = comms.reduce_scatter_rows(
                rows_of(comms.rank, num_rows, dtype), touched_by(comms.rank, num_rows)
            )
            gathered = torch.full_like(x, torch.nan)
            gathered[own] = values(0, num_rows, dtype)[own]
            pending = comms.all_gather_(gathered)
            found[dtype, num_rows] = summed.wait(), rows.wait(), pending.wait(), gathered, own
            assert_same_bits(x, kept)
    reduced = [torch.ones(()), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4)]
    result = comms.all_reduce_(reduced).wait()
    assert all(a is b for a, b in zip(result, reduced, strict=True))
    return found, reduced


def work(rank, folder):
    """One process: rank `rank` of each world that is large enough."""
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        if world_size > 1:
            group = f"file://{folder}/group_{world_size}"
            dist.init_process_group("gloo", group, rank=rank, world_size=world_size)
        comms = Comms(rank, world_size)
        results = {
            (dtype, kind): train(comms, dtype, threshold)
            for dtype in DTYPES
            for kind, threshold in (("sparse", SPARSE_ROWS), ("dense", 0))
        }
        results["collectives"] = collectives(comms)
        torch.save(results, f"{folder}/{world_size}_{rank}.pt")
        if world_size > 1:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By world size, the results of its ranks. One process a rank serves all worlds."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["speedrun.optim"])  # torch is imported only once
    mp.start_processes(work, (str(folder),), nprocs=max(WORLD_SIZES), start_method="forkserver")
    return {
        world_size: [
            torch.load(folder / f"{world_size}_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives(ranks, world_size):
    """Each rank's rows of the sum, dense or by rows; all rows gathered; sums in place."""
    for rank in range(world_size):
        found, reduced = ranks[world_size][rank]["collectives"]
        for (dtype, num_rows), (summed, rows, gathered, in_place, own) in found.items():
            size = -(-num_rows // world_size)
            expected_own = list(range(num_rows))[rank * size : (rank + 1) * size]
            assert list(range(num_rows))[own] == expected_own
            for result, function in ((summed, values), (rows, rows_of)):
                total = sum(function(r, num_rows, dtype).float() for r in range(world_size))
                assert_same_bits(result, total[expected_own].to(dtype))
            assert_same_bits(gathered, values(0, num_rows, dtype))
            assert_same_bits(in_place, gathered)
        for tensor, (shape, dtype) in zip(
            reduced, [((), DTYPES[0]), ((2, 3), DTYPES[1]), ((4,), DTYPES[0])], strict=True
        ):
            assert_same_bits(tensor, torch.full(shape, float(world_size), dtype=dtype))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_do_not_depend_on_the_ranks(ranks, world_size, kind):
    """float32 sums in another order. All ranks of a world have the same bits."""
    expected = ranks[1][0][torch.float32, "dense"]["parameters"]
    first = ranks[world_size][0][torch.float32, kind]["parameters"]
    for result in ranks[world_size]:
        for name, value in result[torch.float32, kind]["parameters"].items():
            assert_same_bits(value, first[name])
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
            assert (value - start_values(torch.float32)[name]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_exact_sums_give_the_same_bits(ranks, world_size, kind):
    """bf16 parameters, their low bits and moments, with gradients whose sums have no rounding."""
    expected = ranks[1][0][torch.bfloat16, "dense"]
    for result in ranks[world_size]:
        for name, value in result[torch.bfloat16, kind]["parameters"].items():
            assert_same_bits(value, expected["parameters"][name])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_state_is_kept_by_its_owner(ranks, world_size):
    """The ranks' shards one behind the other are the state of one rank; small ones are with all."""
    whole = ranks[1][0][torch.bfloat16, "dense"]["state"]
    states = [result[torch.bfloat16, "sparse"]["state"] for result in ranks[world_size]]
    for name, expected in whole.items():
        for kind, tensor in expected.items():
            parts = [state[name][kind] for state in states]
            if kind == "t" or name.startswith("gate"):
                assert all(torch.equal(part, tensor) for part in parts)
            else:
                assert_same_bits(torch.cat(parts), tensor)
                assert max(len(part) for part in parts) == -(-len(tensor) // world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_sent(ranks, world_size):
    """Counted in each step, on each rank, as the formula says; alone, none."""
    for result in ranks[world_size]:
        for dtype in DTYPES:
            for kind in ("sparse", "dense"):
                steps = result[dtype, kind]
                assert steps["sent"] == steps["expected"]
                assert any(steps["sent"]) == (world_size > 1)
                sparse = any("all_to_all" in sent for sent in steps["sent"])
                assert sparse == (kind == "sparse" and world_size > 1)


# ---- The formula --------------------------------------------------------------------------------


def bytes_sent(**changes):
    values = dict(adam=True, tied=True, sparse_rows={"hash_table": 7}) | changes
    config = dataclasses.replace(TABLES, sparse_rows_threshold=SPARSE_ROWS)
    parameters = start_values(torch.float32)
    return dict(communication_bytes(parameters.items(), config, 4, **values))


def test_bytes_by_hand():
    """Four ranks, of which each sends three quarters of a message, whose rows are padded to 4·S."""
    qk, mlp = 4 * (4 * 6 * 4) * 3 // 4, 8 * (9 * 5 * 4) * 3 // 4
    head, table = 24 * (6 * 4) * 3 // 4, 40 * (5 * 4) * 3 // 4
    gates = 2 * (4 * 6 + 1) * 4 * 3 // 4
    rows = 3 * 8 + 7 * (4 + 5 * 4)  # counts for three others, then rows with their numbers
    assert bytes_sent(adam=False) == {"reduce_scatter": qk + mlp, "all_gather": qk + mlp}
    tied = {
        "reduce_scatter": qk + mlp + head,
        "all_gather": qk + mlp + head + table,
        "all_to_all": rows,
        "all_reduce": gates,
    }
    assert bytes_sent() == tied
    assert bytes_sent(tied=False) == tied | {
        "reduce_scatter": tied["reduce_scatter"] + head,
        "all_gather": tied["all_gather"] + head,
    }


@pytest.mark.parametrize("sparse_rows", [None, {}, {"embed": 3}])
def test_bytes_of_a_sparse_table_need_its_rows(sparse_rows):
    with pytest.raises(ValueError, match="'hash_table' is sent by rows"):
        bytes_sent(sparse_rows=sparse_rows)


def test_bytes_of_the_record():
    """On 8 GPUs: 167 MB of padded banks each step, at 7/8; on Adam's the tables too."""
    config = recipes.load("record_089")
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config.model, vocab_size=50257), torch.bfloat16)
    parameters = list(model.named_parameters())
    banks = 2 * (64 * 256 * 768 + 24 * 768 * 768 + 24 * 3072 * 768) * 7 // 8
    head = 2 * 50304 * 768 * 7 // 8
    bigram = 2 * 377_280 * 768 * 7 // 8
    assert communication_bytes(parameters, config.optim, 8, adam=False) == {
        "reduce_scatter": banks,
        "all_gather": banks,
    }
    sent = communication_bytes(
        parameters, config.optim, 8, tied=True, sparse_rows={"bigram_embed": 100_000}
    )
    assert sent["reduce_scatter"] == banks + 6 * head  # head and five value embeddings
    assert sent["all_gather"] == banks + 6 * head + bigram
    assert sent["all_to_all"] == 7 * 8 + 100_000 * (4 + 2 * 768)
    small = [p for _, p in parameters if p.numel() < 2**16]
    assert sent["all_reduce"] == sum(
        2 * sum(p.nbytes for p in small if p.dtype == dtype) * 7 // 8
        for dtype in {p.dtype for p in small}
    )
    assert not communication_bytes(parameters, config.optim, 1)


ENDS_ITS_GROUP = """
import os
import torch.distributed as dist
from speedrun.comms import Comms
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
import torch._dynamo  # as torch.compile does, after the group exists
dist.destroy_process_group()
threads = [open(f"/proc/self/task/{{task}}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_no_thread_outlives_its_group(tmp_path):
    """One that does may abort the process: "terminate called without an active exception"."""
    code = ENDS_ITS_GROUP.format(store=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
