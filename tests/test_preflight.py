"""Pre-flight: all problems of all ranks at once, before anything is built."""

import argparse
import dataclasses
import json
import re
import shutil
import socket
import time
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from data_helpers import random_tokens, write_shard
from speedrun import preflight as checks
from speedrun import train as program
from speedrun.comms import Comms
from speedrun.data import BYTES
from speedrun.estimate import Precision
from speedrun.optim import Optimizer
from speedrun.preflight import Memory, Report, differences, judge, preflight, refusal
from speedrun.runlog import RunError
from train_helpers import tiny_sets, train, write_text

SETS = tiny_sets()
CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a text, and shards that hold too few tokens."""
    folder = tmp_path_factory.mktemp("preflight")
    write_text(folder / "text.txt")
    short = folder / "short"
    short.mkdir()
    (short / "manifest.json").write_text(json.dumps(vars(BYTES)))
    write_shard(short / "made_train_000000.bin", random_tokens(6000, seed=0))
    write_shard(short / "made_val_000000.bin", random_tokens(2100, seed=1))
    return folder


class OneOf(Comms):
    """A rank that alone is there: the others' reports are given."""

    def __init__(self, rank, others):
        super().__init__(rank, len(others) + 1)
        self.others = others

    def gather_objects(self, value):
        values = [change(value) for change in self.others]
        return [*values[: self.rank], value, *values[self.rank :]]


@pytest.fixture
def look(folder, monkeypatch):
    """Runs the checks of one rank with these words; what the others report is made of its own."""
    monkeypatch.chdir(folder)

    def look(*words, rank=0, others=()):
        parser = argparse.ArgumentParser()
        program.add_arguments(parser)
        words = [*SETS, *words] if "--data" in words else ["--text", "text.txt", *SETS, *words]
        args = parser.parse_args([str(word) for word in words])
        config = program.configure(args)
        return preflight(args, config, OneOf(rank, others), CPU, Precision(torch.float32, False))

    return look


def test_what_it_opens(look):
    config, data, tokenizer = look()
    assert config.model.vocab_size == BYTES.vocab_size and tokenizer is None
    assert [path.name for path in data.train] and data.format == BYTES


def test_all_problems_at_once(folder, monkeypatch, capsys):
    """Data, validation, output and memory, in one message, within seconds and nothing written."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
    monkeypatch.setattr(checks, "host_memory_bytes", lambda: 1 << 20)
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    sets = tiny_sets(data__repeat="false", data__val_tokens=1_000_000)
    words = ["--data", "short", "--out", "text.txt/run", *sets]
    began = time.monotonic()
    assert program.run(parser.parse_args(words)) == 1
    assert time.monotonic() - began < 5
    message = capsys.readouterr().err
    assert "error: 4 problems, all to be solved before the run:\n" in message
    for problem in (
        "short: the schedule needs 20 steps, 20,480 tokens; its 1 shard(s) with 6,000 tokens",
        "lower data.val_tokens",
        "text.txt/run: can't be written (Not a directory); choose another folder by --out",
        "GiB in all; weights, gradients and optimizer state of 1 rank take",
    ):
        assert problem in message, problem
    assert not (folder / "runs").exists()


def test_a_folder_with_a_run(look, folder):
    (folder / "old").mkdir()
    (folder / "old" / "log.txt").touch()
    with pytest.raises(RunError, match=r"^old: holds a run already; choose another folder"):
        look("--out", "old")
    assert [path.name for path in (folder / "old").iterdir()] == ["log.txt"]


def test_a_full_disk(look, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, GIB, checks.LOG_BYTES - 1))
    with pytest.raises(RunError, match=r"^out: 0\.0 GiB are free on its disk, and the run's logs"):
        look("--out", "out")


def test_bytes_of_a_checkpoint(look):
    """What a run changes, and a gradient of each weight."""
    config, *_ = look()
    model = program.build_model(config, program.Run(Comms(), CPU, torch.float32), seed=0)
    optimizer = Optimizer(model.named_parameters(), config.optim, Comms(), model.named_buffers)
    size = sum(t.nbytes for t in optimizer.snapshot()) + sum(p.nbytes for p in model.parameters())
    assert checks.checkpoint_bytes(config, Precision(torch.float32, False)) == size


def changed(**facts):
    return lambda report: report._replace(facts={**report.facts, **facts})


def same(report):
    return report


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--seed", "1"), "--seed: 0 on rank 0; 1 on rank 1"),
        (("--set", "optim.adam.lr=0.03"), "config.optim.adam.lr: 0.02 on rank 0; 0.03 on rank 1"),
    ],
)
def test_settings_that_differ(look, words, key):
    """Two ranks, each with its own arguments."""
    reports = []
    with pytest.raises(StopIteration):
        look(*words, others=[lambda report: next(iter(reports.append(report) or ()))])
    with pytest.raises(RunError) as error:
        look(others=[lambda report: reports[0]])
    assert str(error.value) == f"not the same on all ranks: {key}"


@pytest.mark.parametrize("name", ["version of torch", "version of triton", "source model.py"])
def test_versions_and_sources_that_differ(look, name):
    others = [same, same, changed(**{name: "other"})]
    with pytest.raises(RunError, match=rf"all ranks: {name}: .+ on ranks 0-2; other on rank 3$"):
        look(others=others)
    with pytest.raises(RunError, match=r"refused by the checks before it \(see rank 0\)"):
        look(rank=2, others=others)


def test_equal_ranks_may_run(look):
    assert look(others=[same] * 7) is not None


def test_a_shard_that_differs(folder):
    """One bit beyond the header, in one of the pages that are read; and a size."""
    shard = folder / "short" / "made_train_000000.bin"
    before = checks.fingerprint(shard)
    copy = folder / "copy.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert checks.fingerprint(copy) != before
    content[-1] ^= 1
    copy.write_bytes(content)
    assert checks.fingerprint(copy) == before
    copy.write_bytes(content + b"\0\0")
    assert checks.fingerprint(copy).split(" bytes")[0] != before.split(" bytes")[0]
    assert "No such file" in checks.fingerprint(folder / "none.bin")


def test_pages_are_spread_over_a_shard(tmp_path):
    """Of a file of a page times 300, a change in every 64th part of it shows."""
    path = tmp_path / "long.bin"
    size = 300 * checks.PAGE_BYTES
    path.write_bytes(bytes(size))
    before = checks.fingerprint(path)
    for part in range(checks.PAGES_A_SHARD):
        start, end = (size * i // checks.PAGES_A_SHARD for i in (part, part + 1))
        content = bytearray(size)
        content[start:end] = b"\1" * (end - start)
        path.write_bytes(content)
        assert checks.fingerprint(path) != before, part


def report(*problems, host="a", facts=None, shards=None, memory=None):
    return Report(host, list(problems), facts or {}, shards, memory)


def test_problems_name_their_ranks():
    reports = [report("all"), report("all", "x"), report("all", "x"), report("all", host="b")]
    reports.append(report("all", "x", "y", host="b"))
    problems, _ = judge(reports)
    assert problems == ["all", "ranks 1-2, 4 (a, b): x", "rank 4 (b): y"]
    first, last = (refusal(problems, reports, rank) for rank in (0, 4))
    assert first.splitlines() == [
        "3 problems, all to be solved before the run:",
        "  all",
        "  ranks 1-2, 4 (a, b): x",
        "  rank 4 (b): y",
    ]
    assert last == "the run is refused by the checks before it (all; x; y)"


def test_shards_are_compared_where_there_are_any():
    """A rank whose data can't be opened has said so, and that is enough."""
    shards = {"shard a": "1"}
    assert judge([report(shards=shards), report("no data")])[0] == ["rank 1 (a): no data"]
    problems, _ = judge([report(shards=shards), report("no data"), report(shards={})])
    assert problems[1:] == ["not the same on all ranks: shard a: 1 on rank 0; missing on rank 2"]


def test_many_differences_are_counted():
    ours = {f"source {i}": "1" for i in range(100)}
    theirs = dict.fromkeys(ours, "2")
    found = differences({0: ours, 1: theirs})
    assert len(found) == checks.MOST_DIFFERENCES + 1
    assert found[-1] == f"{100 - checks.MOST_DIFFERENCES} more such differences"


def memory(place="gpu", free=80, total=80, sure=10, rest=0):
    needed = dict.fromkeys(checks.SURE_MEMORY, 0) | {"parameters": sure * GIB, "logits": rest * GIB}
    return report(memory=Memory(place, free * GIB, total * GIB, needed))


def test_memory():
    """Refused: what can't fit for sure. Warned of: what may not fit. Unknown sizes: neither."""
    assert judge([memory(rest=70)]) == ([], [])
    assert judge([memory(free=0, total=0, sure=1000)]) == ([], [])
    (problem,), concerns = judge([memory(sure=81)])
    assert re.match(r"gpu: 80\.0 GiB in all; .* of 1 rank take 81\.0 GiB", problem)
    assert concerns == []
    problems, (concern,) = judge([memory(rest=71)])
    assert problems == [] and "80.0 GiB are free; 1 rank will take about 81.0 GiB" in concern
    assert "which weights, gradients and optimizer state 10.0 GiB" in concern


def test_ranks_that_share_a_memory():
    assert judge([memory(f"gpu {i}", sure=50) for i in range(2)]) == ([], [])
    (problem,), _ = judge([memory("host", sure=50) for _ in range(2)])
    assert "of 2 ranks take 100.0 GiB" in problem


def test_what_is_not_sure_is_a_warning(look, monkeypatch):
    monkeypatch.setattr(checks.hardware, "free_memory_bytes", lambda: 1 << 20)
    with pytest.warns(UserWarning, match=r"GiB are free; 1 rank will take about .*micro_batch"):
        look()


def test_host_memory(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "max"
    assert checks.host_memory_bytes(meminfo, limit) == 0
    meminfo.write_text("MemTotal:       2048 kB\nMemFree: 1 kB\n")
    assert checks.host_memory_bytes(meminfo, limit) == 2 << 20
    limit.write_text("max\n")
    assert checks.host_memory_bytes(meminfo, limit) == 2 << 20
    limit.write_text("1048576\n")
    assert checks.host_memory_bytes(meminfo, limit) == 1 << 20


def test_a_vocabulary_that_does_not_fit_is_one_problem_of_several(look):
    with pytest.raises(RunError) as error:
        look("--set", "model.vocab_size=300", "--out", "text.txt/run")
    assert "2 problems" in str(error.value) and "'bytes' has 257 tokens" in str(error.value)


def test_an_optimizer_table_without_a_parameter(look, monkeypatch):
    """What the optimizer would refuse is found with the rest."""
    configure = program.configure

    def without_embed(args):
        config = configure(args)
        table = tuple(row for row in config.optim.adam_table if row.name != "embed")
        return dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, adam_table=table)
        )

    monkeypatch.setattr(program, "configure", without_embed)
    with pytest.raises(RunError, match=r"parameter 'embed' needs a row in optim\.muon_table"):
        look()


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            RunError, match=rf"^MASTER_PORT={port}: Address already in use.*torchrun"
        ):
            checks.check_port(str(port))
    checks.check_port(str(port))


@pytest.mark.parametrize("port", [None, "", "-1", "70000"])
def test_no_such_port(port):
    with pytest.raises(
        RunError, match=r"^MASTER_PORT.*start the ranks by torchrun, or set MASTER_"
    ):
        checks.check_port(port)


def test_ranks_that_cannot_meet(folder, monkeypatch, capsys):
    """Started without torchrun, whose agent would listen in their place."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--text", "text.txt", *SETS])
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        ranks = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)
        for name, value in dict(ranks, MASTER_ADDR="localhost", MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
        assert program.run(args) == 1
    assert re.search(rf"speedrun: rank 0: error: .*MASTER_PORT={port}", capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes(folder):
    """Rank 1 reads other shards: both end with an error, and rank 0 says what differs."""
    data = folder / "each"
    for rank in "01":
        shutil.copytree(folder / "short", data / rank / "data")
    write_shard(data / "1" / "data" / "made_val_000000.bin", random_tokens(2100, seed=7))
    code = (
        "import argparse, os, sys\n"
        f"os.chdir(os.path.join({str(data)!r}, os.environ['RANK']))\n"
        "from speedrun import train\n"
        "parser = argparse.ArgumentParser(); train.add_arguments(parser)\n"
        "sys.exit(train.run(parser.parse_args()))\n"
    )
    (folder / "elsewhere.py").write_text(code)
    began = time.monotonic()
    run = train(folder, "--data", "data", *SETS, ranks=2, module="elsewhere")
    assert run.code != 0 and time.monotonic() - began < 60
    differs = r"shard made_val_000000\.bin: 5,224 bytes, \w+ on rank 0; 5,224 bytes, \w+ on rank 1"
    assert re.search(rf"rank 0: error: not the same on all ranks: {differs}\n", run.err)
