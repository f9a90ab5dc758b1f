"""Our small recipes against nanoGPT's CPU quick start, on Tiny Shakespeare, in one run.

    python -m benchmarks.compare_nanogpt NANOGPT_FOLDER TEXT_FILE [--rounds N] [--json FILE]

Each round trains nanoGPT by the command of its README (4 layers, width 128, 2,000 iterations, CPU),
then `speedrun train --recipe NAME --text TEXT_FILE` with `tiny_plain` and `tiny`, then a larger
`tiny_plain` over nanoGPT's whole time. nanoGPT's folder is used unchanged; its evaluations are
switched off (eval_interval beyond the last iteration but for the first, whose time is not counted),
and its final weights are evaluated here over the whole last 10 % of the text, as ours are. Times
are training alone, on both sides.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

TARGET_LOSS = 1.92
RECIPES = ("tiny_plain", "tiny")
LARGER = ("--set=model.layers=short*2,long",)
LARGER_TARGET_LOSS = 1.65
NANOGPT_ARGUMENTS = (  # its README, "I only have a macbook"; evaluation and log settings apart
    "config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--log_interval=1 --eval_interval=2000 --eval_iters=1 --always_save_checkpoint=True"
).split()


def train_nanogpt(folder: Path, text: Path) -> dict[str, float]:
    """Seconds of its 2,000 iterations, and its mean loss over the last 10 % of the text."""
    data = folder / "data/shakespeare_char"
    shutil.copyfile(text, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    command = [sys.executable, "train.py", *NANOGPT_ARGUMENTS]
    result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    times = re.findall(r"^iter (\d+): loss [\d.]+, time ([\d.]+)ms", result.stdout, re.MULTILINE)
    # Iterations 0 and 2,000 hold its evaluations; the 2,001st is not part of the 2,000.
    times_ms = [float(ms) for iteration, ms in times if 0 < int(iteration) < 2000]
    return {
        "train_time_s": statistics.fmean(times_ms) * 2000 / 1e3,
        "val_loss": evaluate_nanogpt(folder),
    }


def evaluate_nanogpt(folder: Path) -> float:
    """Mean loss over every character of the last 10 %: blocks of 64 that overlap by half."""
    sys.path.insert(0, str(folder))
    try:
        from model import GPT, GPTConfig
    finally:
        sys.path.pop(0)
    checkpoint = torch.load(folder / "out-shakespeare-char/ckpt.pt", map_location="cpu")
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    tokens = torch.from_numpy(
        np.fromfile(folder / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64)
    )
    with open(folder / "data/shakespeare_char/meta.pkl", "rb") as file:
        assert pickle.load(file)["vocab_size"] == checkpoint["model_args"]["vocab_size"]
    block = checkpoint["model_args"]["block_size"]
    losses = []
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, block // 2):
            x, y = tokens[begin : begin + block], tokens[begin + 1 : begin + block + 1]
            x = x[: len(y)]
            logits, _ = model(x[None], y[None])
            each = torch.nn.functional.cross_entropy(logits[0], y, reduction="none")
            losses.append(each if begin == 0 else each[block // 2 :])  # the half with context
    return torch.cat(losses).mean().item()


def train_speedrun(recipe: str, text: Path, *arguments: str) -> list[dict[str, float]]:
    """Validation events of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "speedrun.cli", "train", "--recipe", recipe]
        command += ["--text", str(text.resolve()), "--device", "cpu", "--out", "run", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event for event in events if event["event"] == "validation"]


def first_at_or_below(events: list[dict[str, float]], loss: float) -> dict[str, float] | None:
    return next((event for event in events if event["val_loss"] <= loss), None)


def describe(event: dict[str, float]) -> str:
    return f"{event['val_loss']:.4f} after {event['train_time_s']:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("text", type=Path, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--larger-steps", type=int, default=330, help="steps of the larger run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    rows = []
    for number in range(1, args.rounds + 1):
        peer = train_nanogpt(args.nanogpt, args.text)
        peer_s = peer["train_time_s"]
        print(f"round {number}: nanoGPT {peer['val_loss']:.4f} after {peer_s:.1f} s", flush=True)
        row = {"round": number, "nanogpt": peer}
        for recipe in RECIPES:
            events = row[recipe] = train_speedrun(recipe, args.text)
            reached = first_at_or_below(events, TARGET_LOSS)
            if reached is None:
                print(f"  {recipe} did not reach {TARGET_LOSS}")
            else:
                share = reached["train_time_s"] / peer_s
                print(
                    f"  {recipe} reached {describe(reached)}: {share:.3f} of nanoGPT's time "
                    "(wanted: 0.2, aim: 0.1)"
                )
            print(f"  {recipe} ended at {describe(events[-1])}", flush=True)
        larger = row["larger"] = train_speedrun(
            RECIPES[0], args.text, *LARGER, f"--steps={args.larger_steps}"
        )
        wanted = f"(wanted: <= {LARGER_TARGET_LOSS})"
        print(f"  larger {RECIPES[0]} ended at {describe(larger[-1])} {wanted}")
        print(f"  within nanoGPT's time: {larger[-1]['train_time_s'] <= peer_s}", flush=True)
        rows.append(row)
    if args.json:
        command = [Path(word).name for word in sys.argv]  # whose folders they were says nothing
        args.json.write_text(json.dumps({"command": command, "rounds": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
