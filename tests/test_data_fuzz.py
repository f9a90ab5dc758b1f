"""Random harm to shards, and the loader's C++ under the sanitizers."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from data_helpers import BACKENDS, make_loader, outcome, random_tokens, write_shard
from speedrun import data
from speedrun._numpy_loader import Shard
from speedrun.data import BYTES, BatchShape, DataError
from speedrun.shards import read_manifest

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[1]
# Room for documents of one token, so that no flip of a bit makes too many.
SHAPES = [BatchShape(2, 30, 10, 31), BatchShape(4, 50, 20, 51)]


def harmed(shard: bytes, random: np.random.Generator) -> bytes:
    """The shard's bytes after one kind of harm."""
    harm = random.integers(5)
    if harm == 0:  # header words of every size
        words = np.frombuffer(shard, "<i4", 3).copy()
        words[random.integers(3)] = random.integers(-(2**31), 2**31) >> random.integers(32)
        return words.tobytes() + shard[12:]
    if harm == 1:
        return shard[: random.integers(len(shard))]
    if harm == 2:
        return shard + random.bytes(int(random.integers(1, 3_000)))
    if harm == 3:
        return random.bytes(int(random.integers(4_000)))
    flipped = np.frombuffer(shard, np.uint8).copy()
    flipped[random.integers(len(flipped), size=4)] ^= random.integers(1, 256, 4).astype(np.uint8)
    return flipped.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_harmed_shards_give_batches_or_data_errors(tmp_path, backend):
    random = np.random.default_rng(1)
    refused = 0
    for case in range(1_500):
        good = write_shard(tmp_path / "good.bin", random_tokens(900, seed=case))
        bad = tmp_path / "bad.bin"
        bad.write_bytes(harmed(good.read_bytes(), random))
        options = dict(
            long_documents=("cut", "split")[case % 2],
            repeat=bool(case % 3),
            backend=backend,
        )
        begin = time.monotonic()
        batches, error = outcome([good, bad], SHAPES, **options)
        assert time.monotonic() - begin < 5
        assert error and len(batches) <= 6
        refused += "bad.bin: " in error
        for batch in batches:
            assert 0 <= batch.inputs.min() and batch.inputs.max() < BYTES.vocab_size
            assert batch.cu_seqlens.max() == batch.inputs.shape[1]
        try:
            data.check_schedule(
                [good, bad],
                SHAPES,
                format=BYTES,
                long_documents=options["long_documents"],
                repeat=options["repeat"],
            )
            assert len(batches) == 6  # what pre-flight lets pass, runs
        except DataError as e:
            assert len(batches) < 6 and str(tmp_path) in str(e)
    assert refused > 300


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_at_any_moment(tmp_path, backend):
    random = np.random.default_rng(2)
    path = tmp_path / "shard.bin"
    for case in range(60):
        write_shard(path, random_tokens(60_000, seed=case))
        size, steps = int(random.integers(1_024 + 120_000)), int(random.integers(8))
        shapes = [BatchShape(steps, 50, 20, 51), BatchShape(10_000, 50, 20, 51)]
        with make_loader([path], shapes, backend=backend, repeat=True) as loader:
            for _ in range(steps):
                loader.next_step()
            os.truncate(path, size)
            with pytest.raises(DataError, match=r"shard\.bin: "):
                for _ in range(10_000):
                    loader.next_step()


def is_whole(content: bytes) -> bool:
    """What a shard of bytes must be, from the format's description alone."""
    if len(content) < 1024:
        return False
    magic, version, count = np.frombuffer(content, "<i4", 3).tolist()
    if (magic, version) != (20240520, 1) or count < 1 or len(content) != 1024 + 2 * count:
        return False
    tokens = np.frombuffer(content, "<u2", offset=1024)
    return bool(tokens.max() < BYTES.vocab_size and (tokens == BYTES.bos_id).any())


def test_sixty_thousand_harmed_shards(tmp_path):
    """The verification takes exactly what is whole, and says the same of all else: DataError."""
    random = np.random.default_rng(2)
    good = write_shard(tmp_path / "good.bin", random_tokens(900, seed=0)).read_bytes()
    path = tmp_path / "bad.bin"
    taken = 0
    for _ in range(60_000):
        content = harmed(good, random)
        path.write_bytes(content)
        try:
            Shard(path, BYTES).find_documents(at_least_one=True)
            whole = True
        except DataError as error:
            whole = False
            assert "bad.bin: " in str(error)
        assert whole == is_whole(content)
        taken += whole
    assert 100 < taken < 30_000  # both kinds are among them


def harmed_text(text: bytes, random: np.random.Generator) -> bytes:
    """A manifest's bytes after one kind of harm."""
    harm, at = random.integers(6), int(random.integers(len(text)))
    if harm == 0:
        return text[:at]
    if harm == 1:
        return text[:at] + random.bytes(int(random.integers(1, 20))) + text[at:]
    if harm == 2:
        return text[:at] + text[at + int(random.integers(1, 30)) :]
    if harm == 3:
        return random.choice([b"[", b'{"files":', b"null", b"1e999", b'"', b""]) * int(
            2 ** random.integers(18)
        )
    if harm == 4:
        values = (b"null", b"-1", b"[]", b"{}", b'"x"', b"1e999", b"true", b"70000", b"NaN")
        words = text.split(b" ")
        words[random.integers(len(words))] = random.choice(values)
        return b" ".join(words)
    changed = bytearray(text)
    changed[at] ^= int(random.integers(1, 256))
    return bytes(changed)


def test_forty_thousand_harmed_manifests(tmp_path):
    """Each reader gives what makes sense, or DataError that names the file."""
    random = np.random.default_rng(3)
    text = (
        b'{ "tokenizer": "bytes" , "vocab_size": 257 , "bos_id": 256 , "long_documents": "split" ,'
        b' "files": { "made_train_000000.bin": { "bytes": 3000 , "sha256": "00ff" } } }'
    )
    path = tmp_path / "manifest.json"
    refused = 0
    for _ in range(40_000):
        path.write_bytes(harmed_text(text, random))
        for read in (read_manifest, data.read_format, data.read_long_documents):
            try:
                found = read(tmp_path)
            except DataError as error:
                refused += 1
                assert "manifest.json: " in str(error)
                continue
            if read is data.read_format:
                assert isinstance(found.tokenizer, str) and 0 <= found.bos_id < found.vocab_size
            elif read is read_manifest:
                assert all(isinstance(entry, dict) for entry in found["files"].values())
            else:
                assert found in (None, "cut", "split")
    assert 10_000 < refused < 110_000


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_cpp_tests_under_sanitizer(tmp_path, sanitizer):
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "data_test"
    sources = [REPO / "csrc/tests/data_test.cpp", *(REPO / "csrc/data").glob("*.cpp")]
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [compiler, *flags, f"-I{REPO / 'csrc'}", *sources, "-pthread", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer} library")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "all passed" in ran.stdout, ran.stdout + ran.stderr
