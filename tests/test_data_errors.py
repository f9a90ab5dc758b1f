"""The token loader's refusals: every bad input, the prefetch thread's end, the missing _host."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_helpers import (
    BACKENDS,
    NEEDS_HOST,
    SHAPES,
    make_loader,
    make_shards,
    outcome,
    random_tokens,
    write_shard,
)
from speedrun import data
from speedrun.data import BYTES, BatchShape, DataError, LoaderPosition


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


# ---- Bad input: USERS' table, each with the file, the value and the fix -------------------------
GOOD = random_tokens(3_000, seed=1)
BAD_SHARDS = {
    "magic": (dict(magic=7), "magic number 7, not 20240520"),
    "version": (dict(version=2), "version 2, not 1"),
    "no tokens": (dict(count=0), "token count 0"),
    "negative count": (dict(count=-8), "token count -8"),
    "huge count": (dict(count=2**31 - 1), "7024 bytes, but 2147483647 tokens .* make 4294968318"),
    "truncated": (dict(count=3_001), "7024 bytes, but 3001 tokens .* make 7026"),
    "too long": (dict(count=2_999), "7024 bytes, but 2999 tokens .* make 7022"),
    "wrong tokenizer": (dict(tokens=np.append(GOOD, 300)), "token 300 at offset 3000, .* 257"),
    "no document": (dict(tokens=np.ones(3_000)), r"no document start \(token 256\)"),
}


@pytest.fixture(params=BAD_SHARDS)
def bad_shard(request, tmp_path):
    """(path, pattern of its error) of one bad shard."""
    options, pattern = BAD_SHARDS[request.param]
    path = write_shard(tmp_path / "bad_train_1.bin", **(dict(tokens=GOOD) | options))
    return path, f"bad_train_1.bin: {pattern}.*speedrun data fetch"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_shard_is_refused(bad_shard, backend):
    path, pattern = bad_shard
    with pytest.raises(DataError, match=pattern):
        data.check_schedule([path], SHAPES[:1], format=BYTES, long_documents="cut", repeat=True)
    with make_loader([path], SHAPES[:1], backend=backend) as loader:
        for _ in range(2):  # the same again, never a hang
            with pytest.raises(DataError, match=pattern):
                loader.next_step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_next_shard_is_bad(shards, bad_shard, backend):
    path, pattern = bad_shard
    begin = time.monotonic()
    with make_loader([shards[0], path], SHAPES, backend=backend) as loader:
        for _ in range(4):  # the good shard's steps come through
            loader.next_step()
        with pytest.raises(DataError, match=pattern):
            for _ in range(10):
                loader.next_step()
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: None, "no such file"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(b""), "0 bytes, less than the header's 1024"),
        (lambda path: path.write_bytes(bytes(1_023)), "1023 bytes, less than the header's 1024"),
    ],
)
def test_not_a_shard_at_all(tmp_path, backend, make, pattern):
    path = tmp_path / "odd.bin"
    make(path)
    with (
        make_loader([path], SHAPES, backend=backend) as loader,
        pytest.raises(DataError, match=f"odd.bin: {pattern}"),
    ):
        loader.next_step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("harm", ["truncate", "overwrite"])
def test_shard_goes_bad_under_the_loader(tmp_path, backend, harm):
    path = write_shard(tmp_path / "victim.bin", random_tokens(200_000, seed=3))
    shapes = [BatchShape(1_000, 100, 20, 101)]
    with make_loader([path], shapes, backend=backend, repeat=True) as loader:
        loader.next_step()
        if harm == "truncate":
            os.truncate(path, 2_000)
            pattern = "victim.bin: 2000 bytes, but 200000 tokens"
        else:
            with open(path, "r+b") as file:
                file.seek(1_024 + 2 * 50_000)
                file.write(b"\xff" * 20_000)
            pattern = "victim.bin: token 65535 at offset 50000"
        with pytest.raises(DataError, match=pattern):
            for _ in range(120):  # the shard's scan for the next epoch would be later
                loader.next_step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_documents(shards, backend):
    shapes = [BatchShape(1, 200, 30, 8)]
    pattern = r"made_train_0.bin: \d+ documents .* room for 7: --set data.cu_seqlens_entries=\d+"
    with pytest.raises(DataError, match=pattern) as pre_flight:
        data.check_schedule(shards, shapes, format=BYTES, long_documents="cut", repeat=False)
    with make_loader(shards, shapes, backend=backend, rank=7, world_size=8) as loader:
        with pytest.raises(DataError) as in_run:
            loader.next_step()
    assert str(in_run.value) == str(pre_flight.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("long_documents", ["cut", "split"])
def test_no_shard_holds_a_step(shards, backend, long_documents):
    shapes = [BatchShape(1, 2_000, 30, 2_001)]
    options = dict(long_documents=long_documents, repeat=True)
    with make_loader(shards, shapes, backend=backend, **options) as loader:
        with pytest.raises(DataError, match="no shard of 3 holds one step of 8 x 2000 tokens"):
            loader.next_step()
    with pytest.raises(DataError, match="no shard of 3"):
        data.check_schedule(shards, shapes, format=BYTES, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_run_out(shards, backend):
    batches, error = outcome(shards, [BatchShape(50, 200, 30, 201)], backend=backend)
    assert re.search(f"last shard is used up after {len(batches)} steps", error)
    schedule = dict(shapes=[BatchShape(50, 200, 30, 201)], format=BYTES, long_documents="cut")
    pattern = (
        rf"needs 50 steps, 80,000 tokens; its 3 shard\(s\) with 17,300 tokens fill {len(batches)} "
        rf"steps, {1_600 * len(batches):,} tokens .*speedrun data fetch.*--repeat-data"
    )
    with pytest.raises(DataError, match=pattern):
        data.check_schedule(shards, **schedule, repeat=False)
    data.check_schedule(shards, **schedule, repeat=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_the_last_step_and_after_close(shards, backend):
    loader = make_loader(shards, [BatchShape(2, 100, 16, 101)], backend=backend)
    for _ in range(2):
        loader.next_step()
    with pytest.raises(DataError, match="all 2 steps of the schedule are dealt"):
        loader.next_step()
    for _ in range(2):
        loader.close()
        with pytest.raises(DataError, match="closed"):
            loader.next_step()


@pytest.mark.parametrize(
    "options",
    [
        dict(shards=[]),
        dict(world_size=3),
        dict(rank=2, world_size=2),
        dict(long_documents="drop"),
        dict(backend="rust"),
        dict(bigram_table_rows=1),
        dict(sign_table_rows=-1),
        dict(prefetch_steps=0),
        dict(start=LoaderPosition(3, 0, 0)),
        dict(start=LoaderPosition(0, -1, 0)),
    ],
)
def test_impossible_arguments(shards, options):
    with pytest.raises(DataError):
        make_loader(**(dict(shards=shards, shapes=SHAPES) | options))


@pytest.mark.parametrize(
    "shape", [(-1, 1, 1, 2), (1, 0, 1, 2), (1, 1, 0, 2), (1, 1, 1, 1), (1, 2**31, 1, 2)]
)
def test_impossible_shapes(shape):
    with pytest.raises(DataError):
        BatchShape(*shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_of_other_shards(shards, backend):
    start = LoaderPosition(1, 1_000_000, 0)
    with make_loader(shards, SHAPES, backend=backend, start=start) as loader:
        with pytest.raises(DataError, match="position to start from is 1000000"):
            loader.next_step()


# ---- The thread ---------------------------------------------------------------------------------
@NEEDS_HOST
def test_close_while_another_thread_takes(shards):
    for round_number in range(100):
        loader = make_loader(shards, [BatchShape(10**6, 100, 16, 101)], repeat=True)

        def take(loader=loader):
            with contextlib.suppress(DataError):
                while True:
                    loader.next_step()

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        time.sleep(round_number % 10 * 1e-4)
        loader.close()
        taker.join(10)
        assert not taker.is_alive()


@NEEDS_HOST
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads through /proc")
def test_nothing_is_left_behind(shards):
    def held():
        return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]

    before = held()
    for close in (True, False):
        for _ in range(5):
            loader = make_loader(shards, [BatchShape(10**6, 100, 16, 101)], repeat=True)
            loader.next_step()
            if close:
                loader.close()
            del loader
    deadline = time.monotonic() + 10  # the kernel lists a thread for a moment after its end
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.01)


@NEEDS_HOST
def test_a_wait_can_be_interrupted(tmp_path):
    """A scan of 512 MB, one big hole, is long enough to interrupt; close() doesn't await it."""
    path = write_shard(tmp_path / "hole.bin", [], count=2**28)
    os.truncate(path, 1_024 + 2**29)

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    for _ in range(2):  # the second time from the page cache, as in the interrupted one
        begin = time.monotonic()
        with pytest.raises(DataError, match="no document start"):
            make_loader([path], SHAPES, backend="host").next_step()
        whole = time.monotonic() - begin
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        begin = time.monotonic()
        with pytest.raises(Interrupt):
            signal.setitimer(signal.ITIMER_REAL, whole / 10)
            with make_loader([path], SHAPES, backend="host") as loader:
                loader.next_step()
        assert time.monotonic() - begin < 0.7 * whole
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_falls_back_to_numpy(shards):
    """Without _host: no complaint at import, one warning at construction, a fix where demanded."""
    program = """
import sys, warnings
sys.modules["speedrun._host"] = None
with warnings.catch_warnings():
    warnings.simplefilter("error")
    from speedrun import data
shape = data.BatchShape(1, 100, 16, 101)
options = dict(format=data.BYTES, bigram_table_rows=0, sign_table_rows=0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loader = data.TokenLoader(sys.argv[1:], [shape], **options)
assert loader.backend == "numpy" and loader.next_step().inputs.shape == (8, 100)
[warning] = caught
assert "NumPy" in str(warning.message) and warning.filename == "<string>", warning
try:
    data.TokenLoader(sys.argv[1:], [shape], **options, backend="host")
except data.DataError as e:
    assert "pip install" in str(e)
else:
    raise SystemExit("backend host did not refuse")
"""
    subprocess.run([sys.executable, "-c", program, *map(str, shards)], check=True, timeout=60)
