"""Tokens per second of the token loader on one core, against its NumPy twin.

    python benchmarks/bench_data.py [--steps 48] [--repeats 5] [--json FILE]

Made-up shards with document lengths like FineWeb's, record shapes on one rank (8 parts of 49,152
tokens), bigram and sign rows included. The clock covers everything from opening the first shard:
its scan, the prefetch thread on the same core, and the hand-over. A warm page cache is assumed.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from speedrun.data import GPT2, BatchShape, DataError, TokenLoader, cu_seqlens_entries

TOKENS_PER_PART, MAX_SEQ_LEN = 49_152, 2_048  # the record's last stage
BIGRAM_TABLE_ROWS, SIGN_TABLE_ROWS = 377_280, 8_192
# Lengths of FineWeb documents: lognormal, median 403 and mean 690 tokens.
LENGTH_MU, LENGTH_SIGMA = np.log(403), np.sqrt(2 * np.log(690 / 403))
SHARD_TOKENS = 16_000_000
TARGET_TOKENS_PER_S = 50e6


def write_shard(path: Path, seed: int):
    """A shard of random tokens in documents of realistic lengths."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, GPT2.bos_id, SHARD_TOKENS, dtype=np.uint16)
    lengths = random.lognormal(LENGTH_MU, LENGTH_SIGMA, SHARD_TOKENS // 100)
    starts = np.cumsum(np.maximum(lengths, 2).astype(np.int64))
    tokens[0] = GPT2.bos_id
    tokens[starts[starts < SHARD_TOKENS]] = GPT2.bos_id
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, SHARD_TOKENS
    path.write_bytes(header.tobytes() + tokens.tobytes())


def tokens_per_second(shards, steps: int, backend: str) -> float:
    """One timed pass over `steps` steps, the shards used again where they end."""
    entries = cu_seqlens_entries(TOKENS_PER_PART)
    begin = time.perf_counter()
    with TokenLoader(
        shards,
        [BatchShape(steps, TOKENS_PER_PART, MAX_SEQ_LEN, entries)],
        format=GPT2,
        bigram_table_rows=BIGRAM_TABLE_ROWS,
        sign_table_rows=SIGN_TABLE_ROWS,
        repeat=True,
        backend=backend,
    ) as loader:
        num_tokens = sum(loader.next_step().inputs.size for _ in range(steps))
        return num_tokens / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()

    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})  # before the prefetch thread exists, so it is bound as well
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards = [Path(folder) / f"made_up_train_{i:06d}.bin" for i in range(2)]
        for seed, path in enumerate(shards):
            write_shard(path, seed)
        print(f"{platform.processor() or platform.machine()}, one core; median of {args.repeats}")
        print(f"{'backend':8} {'Mtokens/s':>10} {'IQR':>8} {'x numpy':>8}")
        for backend in ("numpy", "host"):
            try:
                tokens_per_second(shards, 2, backend)  # warms the page cache and the code
            except DataError as e:
                print(f"{backend:8} not run: {e}")
                continue
            rates = [tokens_per_second(shards, args.steps, backend) for _ in range(args.repeats)]
            quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
            row = {
                "backend": backend,
                "tokens_per_s": statistics.median(rates),
                "iqr_tokens_per_s": quartiles[2] - quartiles[0],
                "steps": args.steps,
                "repeats": args.repeats,
                "tokens_per_part": TOKENS_PER_PART,
            }
            row["times_numpy"] = row["tokens_per_s"] / (rows or [row])[0]["tokens_per_s"]
            rows.append(row)
            print(
                f"{backend:8} {row['tokens_per_s'] / 1e6:10.1f} "
                f"{row['iqr_tokens_per_s'] / 1e6:8.1f} {row['times_numpy']:8.1f}"
            )
    if rows[-1]["backend"] == "host":
        verdict = "holds" if rows[-1]["tokens_per_s"] >= TARGET_TOKENS_PER_S else "is missed"
        print(f"target of {TARGET_TOKENS_PER_S / 1e6:.0f} Mtokens/s {verdict}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
